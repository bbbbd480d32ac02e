"""The helpers of dsv4.testing notice what they are there to notice."""

import os

import pytest
import torch

from dsv4.ops import _registry
from dsv4.ops._registry import register
from dsv4.testing import (
    Guarded,
    assert_no_worse,
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    relative_rms,
    same_bits,
    strided,
    ulp_distance,
)


def test_same_bits_sees_zero_signs_shapes_dtypes_and_equal_nans():
    zero = torch.zeros(3)
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero[:2])
    assert not same_bits(zero, zero.double())
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    codes = torch.arange(256, dtype=torch.uint8)
    assert same_bits(codes.view(torch.float8_e4m3fn), codes.clone().view(torch.float8_e4m3fn))


def test_assert_same_bits_names_the_first_difference():
    a = torch.zeros(2, 3)
    b = a.clone()
    b[1, 2] = 1
    with pytest.raises(AssertionError, match=r"1 of 6 differ, first at \(1, 2\): 0.0 against 1.0"):
        assert_same_bits(a, b)
    with pytest.raises(AssertionError, match=r"float32 \[2, 3\] against torch.float64 \[2, 3\]"):
        assert_same_bits(a, b.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ulp_distance(dtype):
    one = torch.ones(1, dtype=dtype)
    up = torch.nextafter(one.float(), 2 * one.float()) if dtype == torch.float32 else one + torch.finfo(dtype).eps
    assert ulp_distance(one, up.to(dtype)).item() == 1
    smallest = torch.tensor([torch.finfo(dtype).smallest_normal], dtype=dtype)
    steps = {torch.bfloat16: 2**7, torch.float16: 2**10, torch.float32: 2**23}[dtype]
    assert ulp_distance(smallest, -smallest).item() == 2 * steps
    assert ulp_distance(torch.zeros(1, dtype=dtype), -torch.zeros(1, dtype=dtype)).item() == 0
    nan = torch.full((1,), torch.nan, dtype=dtype)
    assert ulp_distance(nan, nan).item() == 0
    assert ulp_distance(nan, one).item() > 2**32
    with pytest.raises(ValueError, match="one float dtype"):
        ulp_distance(one, one.double())


def test_relative_rms():
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert relative_rms(expected, expected).tolist() == [0, 0]
    assert relative_rms(1.1 * expected, expected)[0].item() == pytest.approx(0.1, rel=1e-6)
    assert relative_rms(expected + 1, expected)[1].item() == float("inf")


def test_assert_no_worse():
    torch.manual_seed(0)
    exact = torch.randn(64, 64, dtype=torch.float64)
    noise = torch.randn(64, 64, dtype=torch.float64) * 1e-3
    baseline = (exact + noise).float()
    assert_no_worse((exact - 1.5 * noise).float(), baseline, exact)
    with pytest.raises(AssertionError, match="rms error"):
        assert_no_worse((exact - 3 * noise).float(), baseline, exact)
    spike = baseline.clone()
    spike[3, 4] += 0.02
    with pytest.raises(AssertionError, match="largest error"):
        assert_no_worse(spike, baseline, exact)
    spike[3, 4] = torch.nan
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse(spike, baseline, exact)
    with pytest.raises(ValueError, match="float64"):
        assert_no_worse(baseline, baseline, baseline)


def test_guard_bands_see_one_byte_on_either_side():
    for offset in (-1, 12):
        guarded = Guarded(torch.arange(3, dtype=torch.float32))
        guarded.check()
        assert guarded.tensor.tolist() == [0, 1, 2]
        guarded.tensor.as_strided((1,), (1,), guarded.tensor.storage_offset())  # a read is no write
        guarded.check()
        memory = guarded.tensor.view(torch.uint8)
        memory.as_strided((1,), (1,), memory.storage_offset() + offset).fill_(0)
        with pytest.raises(AssertionError, match="before" if offset < 0 else "after"):
            guarded.check()


def test_strided_keeps_the_values():
    x = torch.randn(3, 4, 5)
    view = strided(x)
    assert torch.equal(x, view)
    assert not view.is_contiguous()
    assert view.stride(-1) == 2
    codes = torch.arange(64, dtype=torch.uint8).view(4, 16).view(torch.float8_e4m3fn)
    assert same_bits(strided(codes), codes)


def test_grid_names_its_cases():
    cases = grid(tokens=[0, 1], hidden=[8])
    assert [case.id for case in cases] == ["tokens=0-hidden=8", "tokens=1-hidden=8"]
    assert cases[1].values == ({"tokens": 1, "hidden": 8},)


def test_max_isa_is_set_within_and_restored(monkeypatch):
    monkeypatch.delenv("DSV4_MAX_ISA", raising=False)
    with max_isa("scalar"):
        assert os.environ["DSV4_MAX_ISA"] == "scalar"
        with max_isa("avx512"):
            assert os.environ["DSV4_MAX_ISA"] == "avx512"
        assert os.environ["DSV4_MAX_ISA"] == "scalar"
    assert "DSV4_MAX_ISA" not in os.environ
    with pytest.raises(ValueError, match="scalar, avx2, avx512, amx"), max_isa("sse"):
        pass


def test_implementation_cases_mark_what_cannot_run():
    register("without_a_kernel(Tensor x) -> Tensor", torch.clone)
    try:
        assert [case.values for case in implementation_cases("without_a_kernel")] == [("reference",)]
    finally:
        _registry._registered.remove("without_a_kernel")  # other tests go through all ops
    with max_isa("scalar"):
        cases = implementation_cases("mhc_post")
    skipped = {case.values[0]: [mark.kwargs["reason"] for mark in case.marks] for case in cases if case.marks}
    assert all(reason[0].startswith("not run: ") for reason in skipped.values())
    assert not {"scalar", "reference"} & skipped.keys()


def _double(x):
    if x.dim() != 1:
        raise RuntimeError(f"double: x must be [n], got {list(x.shape)}\nmore")
    return 2 * x


def test_assert_rejects():
    good, bad = torch.zeros(2), torch.zeros(2, 2)
    message = "double: x must be [n], got [2, 2]"
    assert_rejects(_double, {"x": good}, message, x=bad)
    with pytest.raises(AssertionError, match="wrong message"):
        assert_rejects(_double, {"x": good}, "double: x must be [n]", x=bad)
    with pytest.raises(AssertionError, match="accepted"):
        assert_rejects(_double, {"x": good}, message, x=good)
    with pytest.raises(RuntimeError, match="double"):  # the unchanged call must be a good one
        assert_rejects(_double, {"x": bad}, message)


def test_assert_rows_independent():
    x = torch.arange(1.0, 45).view(11, 4)
    x[-1] *= -1  # the first row is positive, the last negative
    assert_rows_independent(lambda rows: rows * 2, [x])
    assert_rows_independent(lambda rows: (rows.to(torch.float8_e4m3fn), rows), [x])
    with pytest.raises(AssertionError, match="rows alone"):
        assert_rows_independent(lambda rows: rows - rows.mean(), [x])
    with pytest.raises(AssertionError, match="rows in chunks"):
        assert_rows_independent(lambda rows: rows * (2 if len(rows) in (1, 11) else 3), [x])
    with pytest.raises(AssertionError, match="rows reversed"):
        assert_rows_independent(_follows_the_first_row, [x], cuts=(11,))
    calls = iter(range(100))
    with pytest.raises(AssertionError, match="rows"):
        assert_rows_independent(lambda rows: rows + next(calls), [x])


def _follows_the_first_row(rows):
    return rows * rows[0, 0].sign() if len(rows) > 1 else rows * 1


def test_check_op_finds_a_wrong_fake_kernel():
    library = torch.library.Library("dsv4_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("dsv4_test::twice", lambda x: x.new_empty(x.shape[0] + 1), lib=library)
    with pytest.raises(Exception, match="test_faketensor"):
        check_op(torch.ops.dsv4_test.twice, torch.randn(3))
    library.define("thrice(Tensor x) -> Tensor")
    library.impl("thrice", lambda x: 3 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("dsv4_test::thrice", lambda x: torch.empty_like(x), lib=library)
    check_op(torch.ops.dsv4_test.thrice, torch.randn(3))


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("view", lambda x: x[:1].view(torch.uint8).view(torch.float8_e4m3fn), "shares its memory"),
        ("write", lambda x: (x.view(torch.uint8).add_(1), x.clone())[1], "argument x: 3 of 3 differ"),
    ],
)
def test_check_op_holds_8_bit_floats_to_the_schema(name, function, message):
    library = torch.library.Library("dsv4_test", "FRAGMENT")
    library.define(f"{name}(Tensor x) -> Tensor")
    library.impl(name, function, "CompositeExplicitAutograd")
    with pytest.raises(AssertionError, match=message):
        check_op(getattr(torch.ops.dsv4_test, name), torch.ones(3).to(torch.float8_e4m3fn))
