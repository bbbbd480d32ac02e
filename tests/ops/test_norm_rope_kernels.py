"""Norms, rotations and stores: every implementation gives the bits of the definition."""

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
from dsv4.ops.layout import allocate_pages, read_rows
from dsv4.testing import (
    Guarded,
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    grid,
    implementation_cases,
    max_isa,
    strided,
    ulp_distance,
)

NARROW = [torch.bfloat16, torch.float32]
KERNELS = bool(_library.kernel_implementations().get("store_window"))
pytestmark = pytest.mark.skipif(not KERNELS, reason="not run: the op library has no store_window")
# head_dim, rope_dim; the last four are not whole vector steps
DIMS = [(512, 64), (128, 64), (96, 32), (160, 0), (64, 64), (40, 8), (96, 48), (33, 2), (1, 0)]


def run(implementation: str, op: str, function: Callable[[], Any], whole: bool = True) -> Any:
    """The result, once it is certain who computed it: the scalar kernel takes what is not whole steps."""
    with max_isa(implementation):
        result = function()
    assert _library.last_implementation(op) == (implementation if whole else "scalar")
    return result


def whole_steps(head_dim: int, rope_dim: int) -> bool:
    return head_dim % 32 == 0 and rope_dim % 32 == 0


def turns(rows: int, rope_dim: int) -> Tensor:
    angle = 100 * torch.randn(rows, rope_dim // 2)
    return torch.stack((angle.cos(), angle.sin()), -1)


NORMS = grid(
    rows=[(), (0,), (1,), (2, 3)], size=[1, 31, 32, 33, 96, 512, 4096], weight=[None, *NARROW], dtype=NARROW
)  # fmt: skip


@pytest.mark.parametrize("implementation", implementation_cases("rms_norm"))
@pytest.mark.parametrize("case", NORMS)
def test_norms(implementation: str, case: dict[str, Any]) -> None:
    x = (3 * torch.randn(*case["rows"], case["size"])).to(case["dtype"])
    weight = None if case["weight"] is None else torch.randn(case["size"]).to(case["weight"])
    expected, whole = ops.rms_norm_reference(x, weight, 1e-5), case["size"] % 32 == 0
    for change in (torch.clone, strided):
        own = None if weight is None else change(weight)
        y = run(implementation, "rms_norm", lambda c=change, w=own: ops.rms_norm(c(x), w, 1e-5), whole=whole)
        assert y.is_contiguous()
        assert_same_bits(y, expected)


@pytest.mark.parametrize("implementation", implementation_cases("rms_norm"))
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-133, 1e-12, 1e-3, 1e4, 1e30])
def test_norms_of_any_size(implementation: str, dtype: torch.dtype, size: float) -> None:
    x = (size * torch.randn(40, 128).double()).to(dtype)
    for weight in (None, 2.0**-126 * torch.randn(128)):
        y = run(implementation, "rms_norm", lambda weight=weight: ops.rms_norm(x, weight, 1e-6))
        assert_same_bits(y, ops.rms_norm_reference(x, weight, 1e-6))
    x[3, 7], x[4, 100] = float("nan"), float("inf")
    y, expected = run(implementation, "rms_norm", lambda: ops.rms_norm(x)), ops.rms_norm_reference(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y.isnan().sum() == 128 + 1
    assert_same_bits(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("implementation", implementation_cases("rms_norm"))
@pytest.mark.parametrize("dtype", NARROW)
def test_norms_company_and_threads(implementation: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(41, 1024).to(dtype), torch.randn(1024)  # more than one thread's least share
    expected = ops.rms_norm_reference(x, weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with max_isa(implementation):
                assert_rows_independent(lambda rows: ops.rms_norm(rows, weight), [x])
                assert_same_bits(ops.rms_norm(x, weight), expected)
    finally:
        torch.set_num_threads(before)


ROWS = grid(tokens=[0, 1, 5], dims=DIMS, dtype=NARROW, weight=NARROW)


@pytest.mark.parametrize("implementation", implementation_cases("kv_norm_rope"))
@pytest.mark.parametrize("case", ROWS)
def test_rows(implementation: str, case: dict[str, Any]) -> None:
    head_dim, rope_dim = case["dims"]
    kv, rope = (3 * torch.randn(case["tokens"], head_dim)).to(case["dtype"]), turns(case["tokens"], rope_dim)
    weight = torch.randn(head_dim).to(case["weight"])
    expected, whole = ops.kv_norm_rope_reference(kv, weight, rope, 1e-5), whole_steps(head_dim, rope_dim)
    for change in (torch.clone, strided):
        own = [change(x) for x in (kv, weight, rope)]
        y = run(implementation, "kv_norm_rope", lambda own=own: ops.kv_norm_rope(*own, 1e-5), whole=whole)
        assert y.is_contiguous()
        assert_same_bits(y, expected)


TURNS = grid(tokens=[0, 1, 5], heads=[None, 1, 3], dims=DIMS, dtype=NARROW, inverse=[False, True])


@pytest.mark.parametrize("implementation", implementation_cases("apply_rope"))
@pytest.mark.parametrize("case", TURNS)
def test_turns(implementation: str, case: dict[str, Any]) -> None:
    head_dim, rope_dim = case["dims"]
    heads = () if case["heads"] is None else (case["heads"],)
    x = torch.randn(case["tokens"], *heads, head_dim)
    x = (x * torch.randint(-140, 20, x.shape).float().exp2()).to(case["dtype"])  # denormals among them
    rope = turns(case["tokens"], rope_dim)
    expected = ops.apply_rope_reference(x, rope, case["inverse"])
    for change in (torch.clone, strided):
        a, b = change(x), change(rope)
        y = run(
            implementation,
            "apply_rope",
            lambda a=a, b=b: ops.apply_rope(a, b, case["inverse"]),
            whole=rope_dim % 32 == 0,
        )
        assert y.is_contiguous()
        assert_same_bits(y, expected)


@pytest.mark.parametrize("implementation", implementation_cases("apply_rope"))
def test_dims_that_are_not_turned_keep_their_bits(implementation: str) -> None:
    """NaNs of any bits among them."""
    x = torch.randint(-(2**15), 2**15, (50, 4, 96), dtype=torch.int16).view(torch.bfloat16)
    y = run(implementation, "apply_rope", lambda: ops.apply_rope(x, turns(50, 32)))
    assert torch.equal(y[..., :64].view(torch.int16), x[..., :64].view(torch.int16))


@pytest.mark.parametrize("implementation", implementation_cases("rope_rows"))
@pytest.mark.parametrize("rope_dim", [0, 2, 30, 32, 34, 64, 128])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables(implementation: str, rope_dim: int, dtype: torch.dtype) -> None:
    """Both instruction sets use the same operations. torch's own cosine differs from them by far less than a step."""
    position = torch.cat((torch.arange(300), torch.randint(0, 1 << 20, (300,)), torch.randint(0, 2**31, (300,))))
    frequency = ops.rope_frequencies(rope_dim, 1.6e5) if rope_dim else torch.zeros(0)
    whole = rope_dim % 32 == 0
    for change in (torch.clone, strided):
        a, b = change(position.to(dtype)), change(frequency)
        rows = run(implementation, "rope_rows", lambda a=a, b=b: ops.rope_rows(a, b), whole=whole)
        assert rows.is_contiguous()
        with max_isa("scalar"):
            assert_same_bits(rows, ops.rope_rows(position, frequency))
        expected = ops.rope_rows_reference(position, frequency)
        assert ulp_distance(rows, expected).amax() <= 1 if rope_dim else rows.shape == expected.shape
        assert (rows != expected).double().sum() <= 1e-4 * rows.numel()


@pytest.mark.parametrize("implementation", implementation_cases("rope_rows"))
def test_tables_of_any_angle(implementation: str) -> None:
    """Angles next to multiples of pi / 2, negative and beyond what is reduced, infinities and NaN; each alone."""
    angle = torch.cat((torch.arange(-4000, 4000) * torch.pi / 2, torch.logspace(-30, 38, 4000), torch.zeros(1)))
    angle = torch.cat((angle.float(), torch.tensor([torch.inf, -torch.inf, torch.nan])))
    angle = torch.nn.functional.pad(angle, (0, -len(angle) % 16))
    one = torch.ones(1, dtype=torch.int32)
    rows = run(implementation, "rope_rows", lambda: ops.rope_rows(one, angle))
    with max_isa("scalar"):
        assert_same_bits(rows, ops.rope_rows(one, angle))
    expected = ops.rope_rows_reference(one, angle)
    assert ulp_distance(rows, expected).amax() <= 1
    assert rows.isnan().sum() == 6


@pytest.mark.parametrize("implementation", implementation_cases("rope_rows"))
def test_rows_company_and_threads(implementation: str) -> None:
    kv, weight, rope, x = torch.randn(80, 512).bfloat16(), torch.randn(512), turns(80, 64), torch.randn(80, 4, 128)
    position, frequency = torch.arange(80) * 1001, ops.rope_frequencies(64, 1e4)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with max_isa(implementation):
                assert_rows_independent(lambda k, r: ops.kv_norm_rope(k, weight, r), [kv, rope])
                assert_rows_independent(ops.apply_rope, [x, rope])
                assert_rows_independent(lambda p: ops.rope_rows(p, frequency), [position])
                results.append((ops.kv_norm_rope(kv, weight, rope), ops.apply_rope(x, rope)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert_same_bits(mine, first)


@pytest.mark.parametrize("implementation", implementation_cases("query_norm_rope"))
@pytest.mark.parametrize("dtype", NARROW)
def test_heads_of_one_row_over_threads(implementation: str, dtype: torch.dtype) -> None:
    q, rope = torch.randn(1, 128, 512).to(dtype), turns(1, 64)
    expected = ops.query_norm_rope_reference(q, rope)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = run(implementation, "query_norm_rope", lambda: ops.query_norm_rope(q, rope))
            assert_same_bits(y, expected)
    finally:
        torch.set_num_threads(before)


QUERIES = grid(tokens=[0, 1, 5], heads=[1, 3, 16], dims=DIMS, dtype=NARROW, layout=["contiguous", "strided"])


@pytest.mark.parametrize("implementation", implementation_cases("query_norm_rope"))
@pytest.mark.parametrize("case", QUERIES)
def test_queries(implementation: str, case: dict[str, Any]) -> None:
    head_dim, rope_dim = case["dims"]
    q = (3 * torch.randn(case["tokens"], case["heads"], head_dim)).to(case["dtype"])
    rope = turns(case["tokens"], rope_dim)
    change = strided if case["layout"] == "strided" else torch.clone
    whole = whole_steps(head_dim, rope_dim)
    y = run(implementation, "query_norm_rope", lambda: ops.query_norm_rope(change(q), change(rope), 1e-5), whole=whole)
    assert y.is_contiguous()
    assert_same_bits(y, ops.query_norm_rope_reference(q, rope, 1e-5))


@pytest.mark.parametrize("implementation", implementation_cases("query_norm_rope"))
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-3, 1e4, 1e16])
def test_queries_of_any_size(implementation: str, dtype: torch.dtype, size: float) -> None:
    """The eps counts beside small heads; a square that overflows gives a root of zero."""
    q = (size * torch.randn(40, 2, 128)).to(dtype)
    rope = turns(40, 64)
    y = run(implementation, "query_norm_rope", lambda: ops.query_norm_rope(q, rope, 1e-6))
    assert_same_bits(y, ops.query_norm_rope_reference(q, rope, 1e-6))
    q[3, 1, 7], q[4, 0, 100] = float("nan"), float("inf")
    y = run(implementation, "query_norm_rope", lambda: ops.query_norm_rope(q, rope, 1e-6))
    expected = ops.query_norm_rope_reference(q, rope, 1e-6)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_same_bits(y.nan_to_num(), expected.nan_to_num())
    assert not y[4, 1].isnan().any()


def stored(
    tokens: int = 9,
    head_dim: int = 128,
    rope_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    format: Any = "fp8",
    weight: torch.dtype = torch.float32,
    page_size: int = 4,
    seed: int | None = None,
) -> dict[str, Any]:
    """Rows of three sequences at places of their own; every second block is not stored, and some rows have none."""
    if seed is not None:
        torch.manual_seed(seed)
    blocks = tokens // page_size + 1
    table = torch.randperm(3 * blocks).int().view(3, blocks)
    table[:, 1::2] = -1
    position = torch.randperm((blocks + 1) * page_size)[:tokens].int()
    pages = allocate_pages(3 * blocks, page_size, head_dim, rope_dim, "fp8") if format == "fp8" else None
    if pages is None:
        pages = torch.zeros(3 * blocks, page_size, head_dim, dtype=format)
    size = torch.randint(-3, 4, (tokens, 1)).exp2()
    return {
        "kv": (size * torch.randn(tokens, head_dim)).to(dtype),
        "weight": torch.randn(head_dim).to(weight),
        "rope": turns(tokens, rope_dim),
        "pages": pages.view(torch.uint8).fill_(0x5A).view(pages.dtype),
        "table": table,
        "sequence": torch.randint(0, 3, (tokens,)).int(),
        "position": position,
        "eps": 1e-5,
        "page_size": page_size,
    }


def check_stored(implementation: str, a: dict[str, Any]) -> Tensor:
    expected = a["pages"].clone()
    ops.store_window_reference(**{**a, "pages": expected})
    guarded = Guarded(a["pages"])
    whole = whole_steps(a["kv"].shape[1], 2 * a["rope"].shape[1])
    run(implementation, "store_window", lambda: ops.store_window(**{**a, "pages": guarded.tensor}), whole=whole)
    guarded.check()
    assert_same_bits(guarded.tensor, expected)
    return expected


STORES = grid(
    tokens=[1, 9],
    dims=[dims for dims in DIMS if dims != (64, 64)],
    dtype=NARROW,
    format=["fp8", *NARROW],
    weight=NARROW,
    page_size=[3, 256],
)


@pytest.mark.parametrize("implementation", implementation_cases("store_window"))
@pytest.mark.parametrize("case", STORES)
def test_window_rows(implementation: str, case: dict[str, Any]) -> None:
    head_dim, rope_dim = case["dims"]
    others = {name: value for name, value in case.items() if name != "dims"}
    check_stored(implementation, stored(head_dim=head_dim, rope_dim=rope_dim, **others))


@pytest.mark.parametrize("implementation", implementation_cases("store_window"))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_window_rows_of_any_shape(implementation: str, data: st.DataObject) -> None:
    rope_dim = 2 * data.draw(st.integers(0, 40))
    a = stored(
        tokens=data.draw(st.integers(0, 40)),
        head_dim=rope_dim + data.draw(st.integers(1, 200)),
        rope_dim=rope_dim,
        dtype=data.draw(st.sampled_from(NARROW)),
        format=data.draw(st.sampled_from(["fp8", *NARROW])),
        page_size=data.draw(st.integers(1, 70)),
        seed=data.draw(st.integers(0, 1000)),
    )
    check_stored(implementation, a)


@pytest.mark.parametrize("implementation", implementation_cases("store_window"))
@pytest.mark.parametrize("dtype", NARROW)
def test_codes_at_the_edges(implementation: str, dtype: torch.dtype) -> None:
    """Rows whose norm is 1 keep their values: ties, denormal codes, the largest code, the floor of the scale."""
    values = torch.cat((torch.arange(-512, 512) / 64, torch.arange(-512, 512) / 2**14, torch.logspace(-9, 9, 1024)))
    kv = values.view(-1, 64).repeat(1, 2)
    kv = torch.cat((kv, torch.zeros(3, 128), torch.full((2, 128), 1e-7))).to(dtype)
    a = stored(tokens=len(kv), dtype=dtype, page_size=8)
    a["kv"], a["weight"] = kv, kv.new_ones(128)
    a["table"] = torch.arange(a["table"].numel(), dtype=torch.int32).view_as(a["table"])
    for scale in (1.0, 1e-4, 2.0**-20, 448.0, 1e30):
        a["weight"] = torch.full((128,), scale)
        check_stored(implementation, a)


@pytest.mark.parametrize("implementation", implementation_cases("store_window"))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(implementation: str, value: float) -> None:
    a = stored(tokens=6, page_size=2)
    a["table"] = torch.arange(12, dtype=torch.int32).view(3, 4)
    expected = check_stored(implementation, a)
    a["kv"][2, 5] = value
    run(implementation, "store_window", lambda: ops.store_window(**a))
    rows = [t for t in range(6) if t != 2 and a["position"][t] < 8]
    page = a["table"][a["sequence"].long(), a["position"].clamp_max(7) // 2]
    for t in rows:
        place = page[t], a["position"][t] % 2
        assert_same_bits(read_rows(a["pages"], *place, 2, 128, 64), read_rows(expected, *place, 2, 128, 64))
    if a["position"][2] < 8:
        assert read_rows(a["pages"], page[2], a["position"][2] % 2, 2, 128, 64)[:64].isnan().all()


@pytest.mark.parametrize("implementation", implementation_cases("store_window"))
def test_pages_outside_of_the_pool_are_not_written(implementation: str) -> None:
    a = stored(tokens=9, page_size=1)
    a["table"] = torch.full((3, 20), len(a["pages"]), dtype=torch.int32)
    a["table"][0] = 2**31 - 1
    a["table"][1] = -(2**31)
    guarded = Guarded(a["pages"])
    run(implementation, "store_window", lambda: ops.store_window(**{**a, "pages": guarded.tensor}))
    guarded.check()
    assert_same_bits(guarded.tensor, a["pages"])


@pytest.mark.parametrize("implementation", implementation_cases("store_window"))
@pytest.mark.parametrize("dtype", NARROW)
def test_company_chunks_and_threads(implementation: str, dtype: torch.dtype) -> None:
    a = stored(tokens=41, page_size=16, dtype=dtype)
    names = ("kv", "rope", "sequence", "position")

    def rows(*parts: Tensor) -> Tensor:
        pages = a["pages"].clone()
        ops.store_window(**{**a, **dict(zip(names, parts, strict=True)), "pages": pages})
        sequence, position = parts[2].long(), parts[3]
        page = a["table"][sequence, (position // 16).clamp_max(a["table"].shape[1] - 1)]
        return read_rows(pages, torch.where(position // 16 < a["table"].shape[1], page, -1), position % 16, 16, 128, 64)

    q = torch.randn(41, 3, 128).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with max_isa(implementation):
                assert_rows_independent(rows, [a[name] for name in names])
                assert_rows_independent(ops.query_norm_rope, [q, a["rope"]])
                results.append((rows(*(a[name] for name in names)), ops.query_norm_rope(q, a["rope"])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert_same_bits(mine, first)


BAD: list[tuple[str, dict[str, Any]]] = [
    (
        "kv must be bfloat16 or float32 or float64 [tokens, head_dim], got bfloat16 [9]",
        {"kv": torch.zeros(9).bfloat16()},
    ),
    ("weight must be bfloat16 or float32 or float64 [128], got float32 [64]", {"weight": torch.zeros(64)}),
    ("rope must be float32 or float64 [9, rope_dim / 2, 2], got float32 [8, 32, 2]", {"rope": torch.zeros(8, 32, 2)}),
    ("rope must have at most 64 pairs, got 65", {"rope": torch.zeros(9, 65, 2)}),
    ("rope_dim must lie in [0, 128) for FP8 rows, got 128", {"rope": torch.zeros(9, 64, 2)}),
    ("the page size of pages must be at least 1, got 0", {"page_size": 0}),
    ("pages must be uint8 [pages, 960], got uint8 [9, 100]", {"pages": torch.zeros(9, 100).byte()}),
    (
        "pages must be bfloat16 or float16 or float32 or float64 [pages, 4, 128], got float32 [9, 4, 64]",
        {"pages": torch.zeros(9, 4, 64)},
    ),
    ("table must be int32 [sequences, blocks], got int64 [3, 3]", {"table": torch.zeros(3, 3).long()}),
    ("sequence must be int32 or int64 [9], got int32 [8]", {"sequence": torch.zeros(8).int()}),
    ("position must be int32 or int64 [9], got int32 [1]", {"position": torch.zeros(1).int()}),
    (
        "sequence must lie in [0, 3), the rows of the table, got 7",
        {"sequence": torch.tensor([0, 1, 2, 5, 7, 0, 0, 0, 0]).int()},
    ),
    (
        "sequence must lie in [0, 3), the rows of the table, got -2",
        {"sequence": torch.tensor([0, 1, 2, 5, -2, -1, 0, 0, 0]).int()},
    ),
]


@pytest.mark.parametrize(("message", "changes"), BAD, ids=[message[:50] for message, _ in BAD])
def test_the_kernels_refuse_in_the_same_words(message: str, changes: dict[str, Any]) -> None:
    assert_rejects(ops.store_window, stored(seed=0), f"store_window: {message}", **changes)
    assert_rejects(torch.ops.dsv4._store_window_reference, stored(seed=0), f"store_window: {message}", **changes)
