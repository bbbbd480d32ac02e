"""index_query: the composition of rotation, Hadamard and FP4, bit for bit, on every implementation."""

from __future__ import annotations

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
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    strided,
)

NARROW = [torch.bfloat16, torch.float32]
IMPLEMENTATIONS = implementation_cases("index_query")


def composed(query: Tensor, rope: Tensor) -> Tensor:
    """The three steps apart, each rounded to the dtype of the query."""
    turned = ops.hadamard_reference(ops.apply_rope_reference(query, rope))
    return ops.dequantize_fp4_reference(*ops.quantize_fp4_reference(turned), 32, query.dtype)


def turns(rows: int, rope_dim: int) -> Tensor:
    angle = 100 * torch.randn(rows, rope_dim // 2)
    return torch.stack((angle.cos(), angle.sin()), -1)


def queries(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Heads of very different sizes."""
    return (torch.randint(-20, 20, (tokens, heads, 1)).exp2() * torch.randn(tokens, heads, dim)).to(dtype)


def run(implementation: str, query: Tensor, rope: Tensor) -> Tensor:
    """The result, once it is certain who computed it: the scalar kernel takes what is not whole steps of 32."""
    if implementation == "reference":
        return ops.index_query(query, rope)
    with max_isa(implementation):
        result = ops.index_query(query, rope)
    whole = query.shape[2] % 32 == 0 and rope.shape[1] % 16 == 0
    assert _library.last_implementation("index_query") == (implementation if whole else "scalar")
    return result


SHAPES = [(2, 0), (8, 4), (16, 16), (32, 0), (32, 32), (64, 8), (64, 32), (128, 64), (128, 128), (256, 64), (1024, 64)]
CASES = grid(tokens=[0, 1, 5], heads=[1, 3, 8], dims=SHAPES, dtype=NARROW)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_bits_of_the_composition(implementation: str, case: dict[str, Any]) -> None:
    dim, rope_dim = case["dims"]
    query, rope = queries(case["tokens"], case["heads"], dim, case["dtype"]), turns(case["tokens"], rope_dim)
    for change in (torch.clone, strided):
        result = run(implementation, change(query), change(rope))
        assert result.is_contiguous()
        assert_same_bits(result, composed(query, rope))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(implementation: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    dim = 2 ** data.draw(st.integers(1, 9))
    tokens, heads = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 5))
    query = queries(tokens, heads, dim, data.draw(st.sampled_from(NARROW)))
    rope = turns(tokens, 2 * data.draw(st.integers(0, dim // 2)))
    assert_same_bits(run(implementation, query, rope), composed(query, rope))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-133, 2.0**-126, 2.0**-120, 2.0**120, 2.0**126])
def test_the_ends_of_the_range(implementation: str, dtype: torch.dtype, size: float) -> None:
    """Denormal queries and results; results at the end of float32, where a rounding up may overflow."""
    query = (size * torch.randint(-8, 9, (20, 2, 128)).double() / 8).to(dtype)
    rope = turns(20, 64)
    assert_same_bits(run(implementation, query, rope), composed(query, rope))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_code(implementation: str) -> None:
    """Rows that the Hadamard rotation turns into all values between the codes, ties among them."""
    wanted = torch.cat((torch.arange(-24, 24) / 4, torch.arange(-8, 8) / 8)).view(2, 32)
    wanted[:, 0] = 6
    query = ops.hadamard(wanted.double()).float().view(2, 1, 32)
    result = run(implementation, query, turns(2, 0))
    assert_same_bits(result, composed(query, turns(2, 0)))
    assert result.unique().numel() >= 15


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dim", [16, 128])
def test_a_head_that_is_not_finite_stays_alone(implementation: str, value: float, dim: int) -> None:
    query, rope = queries(3, 4, dim, torch.bfloat16), turns(3, 0)
    expected = run(implementation, query, rope)
    query[1, 2, 5] = value
    result = run(implementation, query, rope)
    assert result[1, 2].isnan().all()
    expected[1, 2] = 0
    assert_same_bits(result.nan_to_num(), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", NARROW)
def test_company_chunks_and_threads(implementation: str, dtype: torch.dtype) -> None:
    query, rope = queries(41, 16, 128, dtype), turns(41, 64)  # more than one thread's least share
    expected = composed(query, rope)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_rows_independent(lambda q, r: run(implementation, q, r), [query, rope])
            assert_same_bits(run(implementation, query, rope), expected)
    finally:
        torch.set_num_threads(before)


def test_reads_nothing_beside_its_rows() -> None:
    query, rope = Guarded(queries(5, 3, 128, torch.bfloat16)), Guarded(turns(5, 64))
    assert_same_bits(ops.index_query(query.tensor, rope.tensor), composed(query.tensor, rope.tensor))
    query.check()
    rope.check()


def test_float64_runs_the_definition() -> None:
    query, rope = queries(3, 2, 64, torch.float64), turns(3, 32).double()
    assert_same_bits(ops.index_query(query, rope), composed(query, rope))
    assert_same_bits(ops.index_query(query.float(), rope), composed(query.float(), rope))


def test_opcheck_and_compile() -> None:
    query, rope = queries(3, 2, 64, torch.bfloat16), turns(3, 32)
    check_op(torch.ops.dsv4.index_query, query, rope)
    check_op(torch.ops.dsv4._index_query_reference, query.double(), rope)
    compiled = torch.compile(ops.index_query, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(query, rope), composed(query, rope))


def test_a_gradient_is_refused() -> None:
    query = torch.randn(3, 2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="index_query: has no gradient; detach query"):
        ops.index_query(query, turns(3, 32)).sum().backward()


QUERY, ROPE = torch.zeros(3, 2, 8), torch.zeros(3, 2, 2)
QUERIES = "query must be bfloat16 or float32 or float64 [tokens, heads, dim]"
ROPES = "rope must be float32 or float64 [3, rope_dim / 2, 2]"
BAD: list[tuple[str, dict[str, Any]]] = [
    (f"{QUERIES}, got float32 [3, 8]", {"query": QUERY[:, 0]}),
    (f"{QUERIES}, got float16 [3, 2, 8]", {"query": QUERY.half()}),
    (f"{QUERIES}, got int32 [3, 2, 8]", {"query": QUERY.int()}),
    (f"{ROPES}, got float32 [2, 2, 2]", {"rope": ROPE[:2]}),
    (f"{ROPES}, got float32 [3, 4]", {"rope": ROPE.flatten(1)}),
    (f"{ROPES}, got bfloat16 [3, 2, 2]", {"rope": ROPE.bfloat16()}),
    ("rope must be on cpu as query is, got meta", {"rope": ROPE.to("meta")}),
    ("rope must have at most 4 pairs, got 5", {"rope": torch.zeros(3, 5, 2)}),
    ("dim must be a power of two from 2 to 1024, got 6", {"query": QUERY[..., :6]}),
    ("dim must be a power of two from 2 to 1024, got 1", {"query": QUERY[..., :1], "rope": ROPE[:, :0]}),
    ("dim must be a power of two from 2 to 1024, got 2048", {"query": torch.zeros(3, 1, 2048)}),
]


@pytest.mark.parametrize(("message", "changes"), BAD, ids=[message[:60] for message, _ in BAD])
def test_bad_arguments(message: str, changes: dict[str, Any]) -> None:
    arguments = {"query": QUERY, "rope": ROPE}
    assert_rejects(ops.index_query, arguments, f"index_query: {message}", **changes)
    assert_rejects(torch.ops.dsv4._index_query_reference, arguments, f"index_query: {message}", **changes)
