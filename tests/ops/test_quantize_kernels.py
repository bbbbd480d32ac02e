"""Quantisers and their inverses: every implementation gives the bits of the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsv4.ops as ops
from dsv4 import _library
from dsv4.testing import (
    Guarded,
    assert_rows_independent,
    assert_same_bits,
    grid,
    implementation_cases,
    max_isa,
    strided,
)

KERNELS = bool(_library.kernel_implementations().get("quantize_fp8"))
pytestmark = pytest.mark.skipif(not KERNELS, reason="not run: the op library has no quantize_fp8")
NARROW = [torch.bfloat16, torch.float32]
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
QUANTIZE = {
    "quantize_fp8": (ops.quantize_fp8, ops.quantize_fp8_reference),
    "quantize_fp4": (ops.quantize_fp4, ops.quantize_fp4_reference),
}
BOTH = [(op, case) for op in QUANTIZE for case in implementation_cases(op)]
ENCODERS = [pytest.param(op, *case.values, marks=case.marks, id=f"{op}-{case.values[0]}") for op, case in BOTH]


def run(implementation: str, op: str, function: Callable[[], Any], whole: bool) -> Any:
    """The result, once it is certain who computed it: the scalar kernel takes what is not whole steps of 32."""
    with max_isa(implementation):
        result = function()
    assert _library.last_implementation(op) == (implementation if whole else "scalar")
    return result


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks that differ in size by many powers of two, some zeros of either sign, many ties between codes."""
    x = torch.randn(*shape) * torch.randint(-30, 30, (*shape[:-1], 1)).float().exp2()
    ties = torch.randint(-24, 25, shape) / 4 * torch.randint(-2, 3, shape).float().exp2()
    x = torch.where(torch.rand(*shape[:-1], 1) < 0.5, x, ties)
    return torch.where(torch.rand(*shape) < 0.05, x * 0, x).to(dtype)


def check_codes(op: str, implementation: str, x: Tensor, given_x: Tensor, block: int) -> None:
    own, reference = QUANTIZE[op]
    whole = x.shape[-1] % 32 == 0 and block % 32 == 0
    found = run(implementation, op, lambda: own(given_x, block), whole)
    for name, mine, expected in zip(("codes", "scale"), found, reference(x, block), strict=True):
        assert mine.is_contiguous()
        assert_same_bits(mine, expected, name)


CODES = grid(
    rows=[(), (0,), (2, 3)], n=[0, 2, 30, 32, 64, 126, 128, 160, 4096], block=[32, 48, 64, 128], dtype=NARROW
)  # fmt: skip


@pytest.mark.parametrize(("op", "implementation"), ENCODERS)
@pytest.mark.parametrize("case", CODES)
def test_codes(op: str, implementation: str, case: dict[str, Any]) -> None:
    x = values(*case["rows"], case["n"], dtype=case["dtype"])
    for change in (torch.clone, strided):
        check_codes(op, implementation, x, change(x), case["block"])


@pytest.mark.parametrize(("op", "implementation"), ENCODERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_codes_of_any_shape(op: str, implementation: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    n = 2 * data.draw(st.integers(0, 200))
    x = values(data.draw(st.integers(0, 9)), n, dtype=data.draw(st.sampled_from(NARROW)))
    check_codes(op, implementation, x, x, 2 * data.draw(st.integers(1, 300)))


@pytest.mark.parametrize(("op", "implementation"), ENCODERS)
@pytest.mark.parametrize("dtype", NARROW)
def test_codes_of_every_size(op: str, implementation: str, dtype: torch.dtype) -> None:
    """One block for each binary order from the smallest denormal to the end of float32; both sides of each power."""
    powers = torch.arange(-149, 128).double().exp2()
    sizes = torch.cat((powers, powers * (1 + 2.0**-7), powers * 0.75 * (1 + 2.0**-7))).unsqueeze(1)
    x = (sizes * (2 * torch.rand(len(sizes), 64, dtype=torch.float64) - 1)).to(dtype)
    x[:, 0] = sizes.squeeze(1).to(dtype)
    check_codes(op, implementation, x, x, 32)


@pytest.mark.parametrize(("op", "implementation"), ENCODERS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, -torch.nan])
def test_codes_of_what_is_not_finite(op: str, implementation: str, dtype: torch.dtype, bad: float) -> None:
    for n in (128, 126):
        x = values(3, n, dtype=dtype)
        x[1, 70] = bad
        check_codes(op, implementation, x, x, 64 if n == 128 else 42)


@pytest.mark.parametrize(("op", "implementation"), ENCODERS)
def test_company_and_threads(op: str, implementation: str) -> None:
    x = values(41, 1024, dtype=torch.bfloat16)  # more than one thread's least share
    own, reference = QUANTIZE[op]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with max_isa(implementation):
                assert_rows_independent(own, [x])
                for mine, expected in zip(own(x), reference(x), strict=True):
                    assert_same_bits(mine, expected)
    finally:
        torch.set_num_threads(before)


def scales(*shape: int, dtype: torch.dtype) -> Tensor:
    """Powers of two from 2^-127, the smallest, up; float32 ones are any numbers."""
    if dtype == torch.float32:
        return torch.randn(shape) * torch.randint(-20, 20, shape).float().exp2()
    return torch.randint(0, 200, shape, dtype=torch.uint8).view(E8M0)


def check_values(found: Tensor, expected: Tensor) -> None:
    assert found.is_contiguous()
    assert torch.equal(found.isnan(), expected.isnan())
    assert_same_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0))  # the bits of a NaN are nobody's promise


VALUES = grid(
    rows=[(), (0,), (2, 3)], n=[0, 2, 32, 126, 160, 512], block=[32, 48, 128], dtype=NARROW, scale=[E8M0, torch.float32]
)  # fmt: skip


@pytest.mark.parametrize("implementation", implementation_cases("dequantize_fp8"))
@pytest.mark.parametrize("case", VALUES)
def test_values_of_fp8(implementation: str, case: dict[str, Any]) -> None:
    rows, n, block, dtype = case["rows"], case["n"], case["block"], case["dtype"]
    codes = torch.randint(0, 256, (*rows, n), dtype=torch.uint8).view(E4M3)
    scale = scales(*rows, -(-n // block), dtype=case["scale"])
    whole = n % 32 == 0 and block % 32 == 0
    for change in (torch.clone, strided):
        a, b = change(codes), change(scale)
        found = run(implementation, "dequantize_fp8", lambda a=a, b=b: ops.dequantize_fp8(a, b, block, dtype), whole)
        check_values(found, ops.dequantize_fp8_reference(codes, scale, block, dtype))


@pytest.mark.parametrize("implementation", implementation_cases("dequantize_fp4"))
@pytest.mark.parametrize("case", VALUES)
def test_values_of_fp4(implementation: str, case: dict[str, Any]) -> None:
    rows, n, block, dtype = case["rows"], case["n"], case["block"], case["dtype"]
    codes = torch.randint(0, 256, (*rows, n // 2), dtype=torch.uint8)
    scale = scales(*rows, -(-n // block), dtype=case["scale"])
    whole = n % 32 == 0 and block % 32 == 0
    for change in (torch.clone, strided):
        a, b = change(codes), change(scale)
        found = run(implementation, "dequantize_fp4", lambda a=a, b=b: ops.dequantize_fp4(a, b, block, dtype), whole)
        check_values(found, ops.dequantize_fp4_reference(codes, scale, block, dtype))


WEIGHTS = grid(
    stack=[(), (3,), (2, 2)], rows=[0, 1, 128, 129, 300], n=[0, 32, 130, 256], dtype=NARROW, scale=[E8M0, torch.float32]
)  # fmt: skip


@pytest.mark.parametrize("implementation", implementation_cases("dequantize_weight"))
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(implementation: str, case: dict[str, Any]) -> None:
    stack, rows, n, dtype = case["stack"], case["rows"], case["n"], case["dtype"]
    wide = torch.randint(0, 256, (*stack, rows, n), dtype=torch.uint8).view(E4M3)
    packed = torch.randint(0, 256, (*stack, rows, n // 2), dtype=torch.uint8).view(torch.int8)
    blocks = -(-rows // 128), -(-n // 128)
    for weight, scale in (
        (wide, scales(*stack, *blocks, dtype=case["scale"])),
        (packed, scales(*stack, rows, -(-n // 32), dtype=case["scale"])),
    ):
        found = run(
            implementation,
            "dequantize_weight",
            lambda w=weight, s=scale: ops.dequantize_weight(strided(w), strided(s), dtype),
            n % 32 == 0,
        )
        check_values(found, ops.dequantize_weight_reference(weight, scale, dtype))


@pytest.mark.parametrize("implementation", implementation_cases("dequantize_fp8"))
@pytest.mark.parametrize("dtype", NARROW)
def test_every_code_under_every_scale(implementation: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scale = torch.arange(256, dtype=torch.uint8).view(E8M0).unsqueeze(1)
    with max_isa(implementation):
        found = ops.dequantize_fp8(codes.view(E4M3), scale, 256, dtype)
        found4 = ops.dequantize_fp4(codes, scale, 512, dtype)
    check_values(found, ops.dequantize_fp8_reference(codes.view(E4M3), scale, 256, dtype))
    check_values(found4, ops.dequantize_fp4_reference(codes, scale, 512, dtype))


def test_reads_nothing_beside_its_rows() -> None:
    x = Guarded(values(5, 96, dtype=torch.bfloat16))
    for own, reference in QUANTIZE.values():
        for mine, expected in zip(own(x.tensor, 64), reference(x.tensor, 64), strict=True):
            assert_same_bits(mine, expected)
    x.check()
