"""The gradient of sparse_attention: kernels against float64 autograd of the definition, and what they must not read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import NAN, make
from attention_gradient_cases import (
    KERNELS,
    WANTED,
    Gradient,
    assert_one_draw,
    assert_one_draw_of_all,
    exact,
    places_of,
    seeds,
    wanted,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import _library
from dsv4.ops import sparse_attention, sparse_attention_reference
from dsv4.ops.layout import allocate_pages, read_rows, write_rows
from dsv4.testing import Guarded, assert_rejects, assert_same_bits, check_op, grid, max_isa, strided

ROW_ARGUMENTS = ("query", "sequence", "position", "rope", "indices", "lengths")
ORDER = list(sparse_attention_reference.__annotations__)[:-1]


@pytest.fixture(params=KERNELS)
def gradient(request: pytest.FixtureRequest) -> Gradient:
    return Gradient(request.param)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows_of(a: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {**a, **{n: a[n][rows] for n in ROW_ARGUMENTS if a[n] is not None}}


@pytest.mark.parametrize(
    "case",
    grid(
        source=["window", "indices", "lengths"],
        dtype=[torch.float32, torch.bfloat16],
        heads=[1, 5, 16],
        head_dim=[32, 96],
    ),
)
def test_equals_autograd_of_the_definition(gradient: Gradient, case: dict[str, Any]) -> None:
    a = make(**case)
    assert_one_draw(a, gradient(a))


@pytest.mark.parametrize("head_dim", [64, 128, 224, 512, 544])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width(gradient: Gradient, head_dim: int, dtype: torch.dtype) -> None:
    a = make(heads=3, head_dim=head_dim, rope_dim=48, dtype=dtype, runs=((60, 9),), source="lengths")
    assert_one_draw(a, gradient(a))


@pytest.mark.parametrize("heads", [2, 3, 4, 7, 8, 9, 12, 15, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_of_heads(gradient: Gradient, heads: int, dtype: torch.dtype) -> None:
    a = make(heads=heads, head_dim=64, dtype=dtype, runs=((30, 4),), window=9)
    assert_one_draw(a, gradient(a))


@pytest.mark.parametrize("head_dim", [2, 30, 100])
def test_other_widths_are_left_to_the_scalar_kernel(head_dim: int) -> None:
    a = make(head_dim=head_dim, rope_dim=2, dtype=torch.float32)
    assert_one_draw(a, Gradient("scalar")(a))
    leaf = a["query"].requires_grad_()
    sparse_attention(**a)[0].sum().backward()
    assert leaf.grad is not None
    assert _library.last_implementation("sparse_attention_backward") == "scalar"


# Multiples of a group (32), of a tile (128) and of a chunk (1,024) of keys, and their neighbours.
@pytest.mark.parametrize(
    "keys", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_keys(gradient: Gradient, keys: int, dtype: torch.dtype) -> None:
    a = make(heads=5, runs=((keys - 1, 1),), window=keys, window_page_size=50, source="window", rope_dim=8, dtype=dtype)
    got, truth = gradient(a), exact(a)
    close = 4e-6 if dtype == torch.float32 else 0.02  # one row: few numbers to take a mean of
    for n in wanted(a):
        atol = close * max(float(truth[n].abs().max()), 0.05)
        torch.testing.assert_close(got[n].double(), truth[n], rtol=0, atol=atol)


@pytest.mark.parametrize("window", [1, 2, 16, 17])
@pytest.mark.parametrize("start", [0, 1, 15, 16, 31])
def test_window_around_page_boundaries(gradient: Gradient, window: int, start: int) -> None:
    problems = [
        make(
            runs=((start, 8), (start + 1, 5)), heads=8, head_dim=64, window=window, source="window", rope_dim=None,
            dtype=gradient.dtype, seed=seed,
        )
        for seed in range(4 if window == 2 else 1)  # of two keys the largest error is a matter of luck
    ]  # fmt: skip
    if window > 1:
        assert_one_draw_of_all(problems, [gradient(a) for a in problems])
        return
    (a,) = problems
    got, truth = gradient(a), exact(a)  # softmax of one score: gradients are sums that nearly cancel
    for n in wanted(a):
        atol = 5e-6 if gradient.dtype == torch.float32 else 0.02 * max(float(truth[n].abs().max()), 1.0)
        torch.testing.assert_close(got[n].double(), truth[n], rtol=0, atol=atol)


@pytest.mark.parametrize("page_size", [1, 2, 53, 64])
@pytest.mark.parametrize("source", ["indices", "lengths"])
def test_entries_around_page_boundaries(gradient: Gradient, page_size: int, source: str) -> None:
    a = make(
        runs=((4 * page_size - 3, 12),),
        heads=8,
        head_dim=64,
        page_size=page_size,
        source=source,
        k=9,
        dtype=gradient.dtype,
    )
    assert_one_draw(a, gradient(a))


def test_more_indices_than_entries_and_none_visible(gradient: Gradient) -> None:
    a = make(runs=((0, 3), (5, 9)), k=64, dtype=gradient.dtype)
    assert a["lengths"][:4].tolist() == [0, 0, 0, 1]
    assert_one_draw(a, gradient(a))
    none = {**a, "indices": a["indices"][:, :0]}
    assert not gradient(none)["compressed_pages"].any()
    only = make(runs=((0, 2),), source="lengths", dtype=gradient.dtype)
    assert not gradient(only)["compressed_pages"].any()


@pytest.mark.parametrize("pools", ["plain", "fp8"])
def test_no_rows(gradient: Gradient, pools: str) -> None:
    a = make(dtype=gradient.dtype)
    for name in ROW_ARGUMENTS:
        a[name] = a[name][:0]
    got = gradient(a)
    assert got["query"].shape == (0, 3, 32)
    for name in WANTED[1:]:
        assert not got[name].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_heads(dtype: torch.dtype) -> None:
    a = make(dtype=dtype)
    a["query"], a["sink"] = a["query"][:, :0], a["sink"][:0]
    leaves = [a[name].requires_grad_() for name in ("query", "window_pages", "compressed_pages")]
    out, lse = sparse_attention(**a)
    assert out.shape == (len(out), 0, 32)
    for grad in torch.autograd.grad(out.sum() + lse.sum(), leaves):
        assert not grad.any()


def test_rows_without_keys(gradient: Gradient) -> None:
    """They give nothing, whatever their gradients are."""
    a = make(source="lengths", dtype=gradient.dtype)
    a["window_table"][0] = -1
    a["compressed_table"][0] = -1
    empty = a["sequence"] == 0
    grads = seeds(a)
    expected = gradient(a, grads)
    assert not expected["query"][empty].any()
    assert_one_draw(a, expected, grads)
    for x in grads:
        x[empty] = NAN
    for n, got in gradient(a, grads).items():
        assert_same_bits(got, expected[n], n)


@pytest.mark.parametrize("sink", [-math.inf, math.inf, -40.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_of_any_size(gradient: Gradient, sink: float, dtype: torch.dtype) -> None:
    a = make(source="lengths", dtype=dtype, head_dim=64)
    a["sink"].fill_(sink)
    got, truth = gradient(a), exact(a)
    for n in wanted(a):
        # 1 - g is 0 in float64 where it is smaller than a rounding of 1.
        size = max(float(truth[n].abs().max()), 1e-6)
        torch.testing.assert_close(
            got[n].double(), truth[n], rtol=0, atol=(2e-6 if dtype.itemsize == 4 else 0.02) * size
        )
    if math.isinf(sink):
        assert not got["sink"].any()


def test_out_or_lse_alone(gradient: Gradient) -> None:
    """What a caller does not use has a gradient of zeros."""
    a = make(dtype=gradient.dtype, head_dim=64)
    for keep in (0, 1):
        grads = tuple(x if i == keep else torch.zeros_like(x) for i, x in enumerate(seeds(a)))
        assert_one_draw(a, gradient(a, grads), grads)


@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
def test_pages_that_are_not_stored_are_left_out(gradient: Gradient, source: str) -> None:
    a = make(source=source, runs=((40, 12),), heads=8, head_dim=64, window=30, dtype=gradient.dtype)
    a["window_table"][0, 1] = -1
    if source != "window":
        a["compressed_table"][0, 1] = len(a["compressed_pages"])  # outside of the pool: the same
    got = gradient(a)
    if source != "window":
        a["compressed_table"][0, 1] = -1
    assert_one_draw(a, got)


def test_lengths_past_the_table(gradient: Gradient) -> None:
    a = make(source="lengths", runs=((60, 4),), dtype=gradient.dtype)
    a["compressed_pages"].nan_to_num_(0.5)
    a["compressed_table"] = a["compressed_table"][:, :3]
    expected = gradient({**a, "lengths": torch.full_like(a["lengths"], 12)})
    for n, got in gradient({**a, "lengths": torch.full_like(a["lengths"], 2**31 - 1)}).items():
        assert_same_bits(got, expected[n], n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_listed_twice_counts_twice(gradient: Gradient, dtype: torch.dtype) -> None:
    """As an index, next to each other and far apart; and as a page that stands in both tables."""
    a = make(runs=((120, 7),), heads=4, head_dim=64, k=12, dtype=dtype)
    a["indices"][:, :] = torch.tensor([3, 3, -1, 7, 3, 9, 9, 1, 0, 7, 40, 5])
    a["compressed_pages"].nan_to_num_(0.5)
    assert_one_draw(a, gradient(a))
    a = make(source="window", runs=((20, 12),), heads=4, head_dim=64, window=25, dtype=dtype)
    a["window_table"][0, 1] = a["window_table"][0, 0]
    a["window_pages"].nan_to_num_(0.25)
    assert_one_draw(a, gradient(a))


@pytest.mark.parametrize("source", ["window", "lengths"])
def test_a_nan_reaches_only_what_sees_it(gradient: Gradient, source: str) -> None:
    a = make(source=source, runs=((40, 40), (3, 9)), window=5, dtype=torch.bfloat16)
    before = gradient(a)
    if source == "window":
        a["window_pages"][a["window_table"][0, 60 // 16], 60 % 16] = NAN
    else:
        a["compressed_pages"][a["compressed_table"][0, 17 // 4], 17 % 4] = NAN
    after = gradient(a)
    places = [set(places_of(a, row)) for row in range(len(a["query"]))]
    spoilt = {
        (name, *at.tolist())
        for name in ("window_pages", "compressed_pages")
        if a[name] is not None
        for at in a[name].isnan().all(-1).nonzero()
    }
    sees = torch.tensor([bool(found & spoilt) for found in places])
    assert 0 < sees.sum() < len(sees)
    assert after["query"][sees].isnan().all()
    assert_same_bits(after["query"][~sees], before["query"][~sees])
    touched = set().union(*(found for found, seen in zip(places, sees.tolist(), strict=True) if seen))
    for name in ("window_pages", "compressed_pages"):
        if a[name] is None:
            continue
        safe = torch.ones(a[name].shape[:2], dtype=torch.bool)
        for pool, page, offset in touched:
            if pool == name:
                safe[page, offset] = False
        assert_same_bits(after[name][safe], before[name][safe])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
def test_threads_do_not_matter(gradient: Gradient, threads: Any, source: str, dtype: torch.dtype) -> None:
    """100 rows: several blocks of them, cut differently for every number of threads."""
    a = make(source=source, dtype=dtype, runs=((150, 70), (0, 3), (61, 27)), heads=3, head_dim=160, window=32)
    threads(1)
    expected = gradient(a)
    assert_one_draw(a, expected)
    for count in (2, 3, 7):
        threads(count)
        for n, got in gradient(a).items():
            assert_same_bits(got, expected[n], f"{n}, {count} threads")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
def test_a_sequence_does_not_depend_on_its_company(gradient: Gradient, source: str, dtype: torch.dtype) -> None:
    a = make(source=source, dtype=dtype, runs=((50, 37), (0, 3), (61, 23)), heads=4, head_dim=64, window=32)
    grads = seeds(a)
    together = gradient(a, grads)
    for sequence in range(3):
        rows = a["sequence"] == sequence
        alone = gradient(rows_of(a, rows), (grads[0][rows], grads[1][rows]))
        assert_same_bits(alone["query"], together["query"][rows])
        for kind in ("window", "compressed"):
            if a[f"{kind}_pages"] is None:
                continue
            pages = a[f"{kind}_table"][sequence].long()
            assert_same_bits(alone[f"{kind}_pages"][pages], together[f"{kind}_pages"][pages])


def test_a_query_does_not_depend_on_its_company(gradient: Gradient) -> None:
    a = make(dtype=torch.bfloat16, runs=((50, 9), (0, 3)), heads=4, head_dim=64)
    grads = seeds(a)
    together = gradient(a, grads)["query"]
    for rows in (torch.tensor([4]), torch.arange(12).flip(0), torch.tensor([1, 3, 10])):
        alone = gradient(rows_of(a, rows), (grads[0][rows], grads[1][rows]))["query"]
        assert_same_bits(alone, together[rows])


@pytest.mark.parametrize("query", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", ["fp8", torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", ["fp8", torch.float32, torch.bfloat16])
def test_pools_of_any_two_formats(gradient: Gradient, query: torch.dtype, window: Any, entries: Any) -> None:
    """A pool of bytes is a constant; the others' gradients are those of its values."""
    a = make(dtype=torch.bfloat16, head_dim=160, rope_dim=32, runs=((40, 9), (3, 4)))
    a["query"] = a["query"].to(query)
    plain = dict(a)
    for name, size, format in (("window_pages", 16, window), ("compressed_pages", 4, entries)):
        if format != "fp8":
            plain[name] = a[name] = a[name].to(format)
            continue
        count = len(a[name])
        where = torch.arange(count * size)
        stored = allocate_pages(count, size, 160, 32, "fp8")
        write_rows(stored, a[name].flatten(0, 1), where // size, where % size, size, 32)
        rows = read_rows(stored, where // size, where % size, size, 160, 32, torch.float32)
        a[name], plain[name] = stored, rows.view(count, size, 160)
    got = gradient(a)
    assert set(got) == set(wanted(a))
    assert_one_draw(plain, got)


def test_fp8_rows_of_over_a_thousand_keys(gradient: Gradient) -> None:
    """Such rows are decoded again for the second step."""
    a = make(dtype=torch.bfloat16, source="lengths", heads=5, head_dim=160, rope_dim=32, runs=((4700, 2),), window=20)
    plain = dict(a)
    for name, size in (("window_pages", 16), ("compressed_pages", 4)):
        where = torch.arange(len(a[name]) * size)
        a[name], rows = allocate_pages(len(a[name]), size, 160, 32, "fp8"), a[name].nan_to_num(0.5).flatten(0, 1)
        write_rows(a[name], rows, where // size, where % size, size, 32)
        plain[name] = read_rows(a[name], where // size, where % size, size, 160, 32, torch.float32).view(-1, size, 160)
    assert_one_draw(plain, gradient(a))


def test_inputs_with_gaps(gradient: Gradient) -> None:
    a = make(dtype=torch.bfloat16)
    grads = seeds(a)
    expected = gradient(a, grads)
    gaps = {n: strided(x) if x.dim() > 1 else strided(x.unsqueeze(0))[0] for n, x in a.items() if isinstance(x, Tensor)}
    spread = tuple(strided(x) for x in grads)
    with_gaps = {**a, **gaps}
    with max_isa(gradient.name):
        lse = strided(sparse_attention(**a)[1])
        found = torch.ops.dsv4.sparse_attention_backward(*spread, lse, *(with_gaps[n] for n in ORDER))
    for n, got in zip(WANTED, found, strict=True):
        assert_same_bits(got, expected[n], n)
    # What autograd hands on from a sum: one number for all elements.
    one = (torch.ones((), dtype=torch.bfloat16).expand(a["query"].shape), grads[1])
    dense = (torch.ones(a["query"].shape, dtype=torch.bfloat16), grads[1])
    for n, got in gradient(a, one).items():
        assert_same_bits(got, gradient(a, dense)[n], n)


def test_reads_nothing_else_and_writes_nothing(gradient: Gradient) -> None:
    a = make(source="indices", runs=((40, 4), (0, 2)), dtype=torch.bfloat16)
    guards = {n: Guarded(x) for n, x in a.items() if isinstance(x, Tensor)}
    expected = gradient(a)
    for n, got in gradient({**a, **{n: g.tensor for n, g in guards.items()}}).items():
        assert_same_bits(got, expected[n], n)
    for name, guard in guards.items():
        guard.check()
        assert_same_bits(guard.tensor, a[name], name)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from(["window", "indices", "lengths"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    heads=st.integers(1, 9),
    width=st.integers(1, 4),
    window=st.integers(2, 40),
    window_page_size=st.integers(1, 40),
    page_size=st.integers(1, 70),
    ratio=st.sampled_from([1, 2, 4, 128]),
    k=st.integers(2, 50),
    runs=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 4)), min_size=1, max_size=3),
    missing=st.sets(st.integers(0, 20), max_size=8),
    seed=st.integers(0, 1000),
)
def test_any_call(gradient: Gradient, runs: list[tuple[int, int]], width: int, missing: set[int], **case: Any) -> None:
    """Empty rows, rows without a stored page, more indices than entries; what no row reads holds NaN."""
    a = make(runs=tuple(runs), head_dim=32 * width, **case)
    for name in ("window_table", "compressed_table"):
        if a[name] is not None:
            for place in missing:
                a[name].view(-1)[place % a[name].numel()] = -1
    got, truth = gradient(a), exact(a)
    close = 5e-6 if case["dtype"] == torch.float32 else 0.03
    for n in wanted(a):
        size = max(float(truth[n].abs().max()), 1.0)
        torch.testing.assert_close(got[n].double(), truth[n], rtol=0, atol=close * size)


@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_registration(source: str, dtype: torch.dtype) -> None:
    a = make(source=source, runs=((9, 4), (0, 3)), dtype=dtype)
    for name in ("window_pages", "compressed_pages"):
        if a[name] is not None:
            a[name].nan_to_num_(0.5)
    values = (*seeds(a), sparse_attention(**a)[1], *(a[n] for n in ORDER))
    check_op(torch.ops.dsv4.sparse_attention_backward, *values)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]
    check_op(torch.ops.dsv4._sparse_attention_backward_reference, *wide)


def test_second_derivatives_are_refused() -> None:
    a = make(dtype=torch.float32)
    a["query"].requires_grad_()
    (grad,) = torch.autograd.grad(sparse_attention(**a)[0].square().sum(), a["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="sparse_attention_backward: has no gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_rope_is_refused(dtype: torch.dtype) -> None:
    a = make(dtype=dtype)
    a["rope"].requires_grad_()
    out, _ = sparse_attention(**a)
    with pytest.raises(RuntimeError, match=r"^sparse_attention: rope has no gradient; detach it$"):
        out.sum().backward()


def call(**changes: Any) -> tuple[Tensor, ...]:
    """The backward op by the names of its arguments."""
    arguments = {**changes}
    first = [arguments.pop(n) for n in ("grad_out", "grad_lse", "lse")]
    return torch.ops.dsv4.sparse_attention_backward(*first, *(arguments[n] for n in ORDER))


BAD: list[tuple[str, dict[str, Any]]] = [
    (
        "query must be bfloat16 or float32 [tokens, heads, head_dim], got float64 [17, 3, 32]; dsv4.ops takes that too",
        {"query": torch.zeros(17, 3, 32).double()},
    ),
    ("grad_out must be float32 [17, 3, 32], got bfloat16 [17, 3, 32]", {"grad_out": torch.zeros(17, 3, 32).bfloat16()}),
    ("grad_out must be float32 [17, 3, 32], got float32 [17, 3, 16]", {"grad_out": torch.zeros(17, 3, 16)}),
    ("grad_lse must be float32 [17, 3], got float32 [17, 4]", {"grad_lse": torch.zeros(17, 4)}),
    ("grad_lse must be float32 [17, 3], got float64 [17, 3]", {"grad_lse": torch.zeros(17, 3).double()}),
    ("lse must be float32 [17, 3], got float32 [17]", {"lse": torch.zeros(17)}),
    ("indices must be int32 [17, k], got int64 [17, 6]", {"indices": torch.zeros(17, 6, dtype=torch.int64)}),
    ("lengths must be given with compressed_pages, got None", {"lengths": None}),
    ("sink must be float32 or float64 [3], got float32 [4]", {"sink": torch.zeros(4)}),
    ("rope must be float32 or float64 [17, rope_dim / 2, 2], got float32 [1, 8, 2]", {"rope": torch.zeros(1, 8, 2)}),
    ("window must be at least 1, got 0", {"window": 0}),
    (
        "window_pages must be bfloat16 or float16 or float32 or float64 [pages, 16, 32], got float32 [4, 16, 64]",
        {"window_pages": torch.zeros(4, 16, 64)},
    ),
    (
        "sequence must lie in [0, 3), the rows of the table, got 3",
        {"sequence": torch.full((17,), 3, dtype=torch.int32)},
    ),
]


@pytest.mark.skipif(not KERNELS, reason="not run: the op library has no sparse_attention_backward")
@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:60] for message, _ in BAD])
def test_refuses(message: str, change: dict[str, Any]) -> None:
    a = make(dtype=torch.float32)
    _, lse = sparse_attention(**a)
    grad_out, grad_lse = seeds(a)
    arguments = {**a, "grad_out": grad_out, "grad_lse": grad_lse, "lse": lse}
    assert_rejects(call, arguments, f"sparse_attention_backward: {message}", **change)
