"""The gradient of query_norm_rope: kernels against the formula in float64, the formula against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
    ulp_distance,
)

OP = "query_norm_rope_backward"
NARROW = [torch.bfloat16, torch.float32]
# head_dim, rope_dim; the last four are not whole vector steps
DIMS = [(512, 64), (128, 64), (96, 32), (160, 0), (64, 64), (40, 8), (96, 48), (33, 2), (1, 0)]
kernels = pytest.mark.parametrize("implementation", implementation_cases(OP))


def turns(rows: int, rope_dim: int) -> Tensor:
    angle = 100 * torch.randn(rows, rope_dim // 2)
    return torch.stack((angle.cos(), angle.sin()), -1)


def draw(tokens: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, size: float = 3) -> tuple[Tensor, ...]:
    shape = (tokens, heads, dims[0])
    return torch.randn(shape).to(dtype), (size * torch.randn(shape)).to(dtype), turns(tokens, dims[1])


def run(implementation: str, *arguments: Any, whole: bool = True) -> Tensor:
    with max_isa(implementation):
        result = getattr(torch.ops.dsv4, OP)(*arguments)
    assert _library.last_implementation(OP) == (implementation if whole else "scalar")
    assert result.is_contiguous()
    return result


@kernels
@pytest.mark.parametrize(
    "case", grid(tokens=[0, 1, 5], heads=[1, 3, 16], dims=DIMS, dtype=NARROW, layout=["contiguous", "strided"])
)
def test_equals_the_formula(implementation: str, case: dict[str, Any]) -> None:
    """Both sum in float64 and round once, so that few results differ, and by one unit."""
    layout, dims = case["layout"], case["dims"]
    change = strided if layout == "strided" else torch.clone
    grad, q, rope = draw(case["tokens"], case["heads"], dims, case["dtype"])
    found = run(
        implementation, change(grad), change(q), change(rope), 1e-5, whole=dims[0] % 32 == 0 and dims[1] % 32 == 0
    )
    expected = ops.query_norm_rope_backward_reference(grad, q, rope, 1e-5)
    # A head of one dim, whose gradient is eps and rounding alone, is left out.
    near = expected.float().abs() > 1e-3 * expected.float().abs().amax(-1, keepdim=True)
    if dims[0] > 1 and found.numel():
        assert ulp_distance(found, expected)[near].max() <= 1
        assert (ulp_distance(found, expected)[near] == 0).float().mean() > 0.99
    scale = grad.float().abs().max() / q.float().pow(2).mean(-1, keepdim=True).sqrt() if found.numel() else 1
    assert ((found.float() - expected.float()).abs() <= (2**-8 if case["dtype"] == NARROW[0] else 1e-6) * scale).all()


@kernels
@pytest.mark.parametrize("dtype", NARROW)
def test_reached_through_autograd(implementation: str, dtype: torch.dtype) -> None:
    grad, q, rope = draw(7, 4, (128, 64), dtype)
    leaf = q.clone().requires_grad_()
    with max_isa(implementation):
        y = ops.query_norm_rope(leaf, rope, 1e-5)
        (found,) = torch.autograd.grad(y, leaf, grad)
    assert _library.last_implementation(OP) == implementation
    assert_same_bits(found, run(implementation, grad, q, rope, 1e-5))
    wide = q.double().requires_grad_()
    (exact,) = torch.autograd.grad(ops.query_norm_rope_reference(wide, rope, 1e-5), wide, grad.double())
    # The forward pass rounds its root to 8 bits, so the gradient belongs to another length.
    error = (found.double() - exact).norm() / exact.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_no_gradient_of_a_gradient_is_lost() -> None:
    grad, q, rope = draw(2, 1, (8, 4), torch.float32)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = q.to(dtype).requires_grad_()
        y = ops.query_norm_rope(leaf, rope, 1e-5)
        (first,) = torch.autograd.grad(y, leaf, grad.to(dtype), create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(found[0], found[1].float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("op", ["query_norm_rope", "apply_rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_rope_is_refused(op: str, dtype: torch.dtype) -> None:
    _, q, rope = draw(2, 1, (8, 4), dtype)
    y = getattr(ops, op)(q, rope.requires_grad_())
    with pytest.raises(RuntimeError, match=f"^{op}: rope has no gradient; detach it$"):
        y.sum().backward()


@kernels
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e4])
def test_queries_of_any_size(implementation: str, dtype: torch.dtype, size: float) -> None:
    grad, q, rope = draw(20, 2, (128, 64), dtype, size)
    expected = ops.query_norm_rope_backward_reference(grad, q, rope, 1e-6).float()
    found = run(implementation, grad, q, rope, 1e-6).float()
    close = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found, expected, rtol=close, atol=close * float(expected.abs().max()) / 100)


@kernels
@pytest.mark.parametrize("dtype", NARROW)
def test_nan_reaches_its_own_head(implementation: str, dtype: torch.dtype) -> None:
    grad, q, rope = draw(6, 3, (96, 32), dtype)
    before = run(implementation, grad, q, rope)
    grad[1, 2, 5], q[4, 0, 90] = float("nan"), float("inf")
    after = run(implementation, grad, q, rope)
    spoilt = torch.zeros(6, 3, dtype=torch.bool)
    spoilt[1, 2] = spoilt[4, 0] = True
    assert after[spoilt].isnan().any(-1).all()
    assert_same_bits(after[~spoilt], before[~spoilt])


@kernels
@pytest.mark.parametrize("dtype", NARROW)
def test_rows_threads_and_memory(implementation: str, dtype: torch.dtype) -> None:
    grad, q, rope = draw(9, 16, (512, 64), dtype)
    with max_isa(implementation):
        assert_rows_independent(getattr(torch.ops.dsv4, OP), [grad, q, rope])
    expected = run(implementation, grad, q, rope)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(run(implementation, grad, q, rope), expected)
    finally:
        torch.set_num_threads(before)
    guards = [Guarded(t) for t in (grad, q, rope)]
    assert_same_bits(run(implementation, *(g.tensor for g in guards)), expected)
    for guard, value in zip(guards, (grad, q, rope), strict=True):
        guard.check()
        assert_same_bits(guard.tensor, value)


@pytest.mark.parametrize("dtype", NARROW)
def test_op_registration(dtype: torch.dtype) -> None:
    grad, q, rope = draw(3, 2, (32, 32), dtype)
    check_op(torch.ops.dsv4.query_norm_rope_backward, grad, q, rope)
    check_op(torch.ops.dsv4._query_norm_rope_backward_reference, grad.double(), q.double(), rope)


Q, ROPE, FLOATS = torch.zeros(3, 1, 8), torch.zeros(3, 2, 2), "bfloat16 or float32 or float64"
BAD = [
    ({"q": Q[:, 0]}, f"q must be {FLOATS} [tokens, heads, head_dim], got float32 [3, 8]"),
    ({"q": Q.half()}, f"q must be {FLOATS} [tokens, heads, head_dim], got float16 [3, 1, 8]"),
    ({"grad": Q.bfloat16()}, "grad must be float32 [3, 1, 8], got bfloat16 [3, 1, 8]"),
    ({"grad": Q[:2]}, "grad must be float32 [3, 1, 8], got float32 [2, 1, 8]"),
    ({"grad": Q.to("meta")}, "grad must be on cpu as q is, got meta"),
    ({"rope": ROPE[:2]}, "rope must be float32 or float64 [3, rope_dim / 2, 2], got float32 [2, 2, 2]"),
    ({"rope": ROPE.bfloat16()}, "rope must be float32 or float64 [3, rope_dim / 2, 2], got bfloat16 [3, 2, 2]"),
    ({"rope": torch.zeros(3, 5, 2)}, "rope must have at most 4 pairs, got 5"),
    ({"rope": ROPE.to("meta")}, "rope must be on cpu as q is, got meta"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=range(len(BAD)))
def test_rejects(changes: dict[str, Tensor], message: str) -> None:
    for op in (torch.ops.dsv4.query_norm_rope_backward, torch.ops.dsv4._query_norm_rope_backward_reference):
        if "meta" in message and op is torch.ops.dsv4.query_norm_rope_backward:
            continue  # torch itself chooses the fake kernel then
        assert_rejects(op, {"grad": Q, "q": Q, "rope": ROPE}, f"{OP}: {message}", **changes)
