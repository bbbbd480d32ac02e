"""The gradients of rms_norm and kv_norm_rope: kernels against the formulas in float64, and against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4.ops as ops
from dsv4 import _library
from dsv4.testing import (
    Guarded,
    assert_no_worse,
    assert_rejects,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    strided,
    ulp_distance,
)

OPS = ("rms_norm", "kv_norm_rope")
NARROW = [torch.bfloat16, torch.float32]
EPS = 1e-5
# dim, rope_dim (which rms_norm ignores); the last four are not whole vector steps
DIMS = [(512, 64), (128, 64), (96, 32), (160, 0), (64, 64), (40, 8), (96, 48), (33, 2), (1, 0)]
kernels = pytest.mark.parametrize(
    ("op", "implementation"),
    [pytest.param(op, *case.values, marks=case.marks) for op in OPS for case in implementation_cases(f"{op}_backward")],
)


def draw(op: str, rows: int, dims: tuple[int, int], x: torch.dtype, weight: torch.dtype | None) -> list[Any]:
    """grad, x, weight and, where the op has it, rope."""
    dim, rope_dim = dims
    angle = 100 * torch.randn(rows, rope_dim // 2)
    rope = [torch.stack((angle.cos(), angle.sin()), -1)] if op == "kv_norm_rope" else []
    scale = None if weight is None else (1 + 0.3 * torch.randn(dim)).to(weight)
    return [torch.randn(rows, dim).to(x), (3 * torch.randn(rows, dim)).to(x), scale, *rope]


def run(op: str, implementation: str, arguments: list[Any], whole: bool = True) -> list[Tensor]:
    with max_isa(implementation):
        result = getattr(torch.ops.dsv4, f"{op}_backward")(*arguments, EPS)
    assert _library.last_implementation(f"{op}_backward") == (implementation if whole else "scalar")
    assert all(r.is_contiguous() for r in result)
    return list(result)


def formula(op: str, arguments: list[Any]) -> list[Tensor]:
    return list(getattr(ops, f"{op}_backward_reference")(*arguments, EPS))


def changed(change: Any, arguments: list[Any]) -> list[Any]:
    """Of a weight, which has one dimension, the row of a matrix."""
    return [a if a is None else change(a) if a.dim() > 1 else change(a.unsqueeze(0))[0] for a in arguments]


def is_whole(op: str, dims: tuple[int, int]) -> bool:
    return dims[0] % 32 == 0 and (op == "rms_norm" or dims[1] % 32 == 0)


@kernels
@pytest.mark.parametrize(
    "case",
    grid(rows=[0, 1, 70, 300], dims=DIMS, x=NARROW, weight=[*NARROW, None], layout=["contiguous", "strided"]),
)
def test_equals_the_formula(op: str, implementation: str, case: dict[str, Any]) -> None:
    """Both sum in float64 and round once, so that few results differ, and by one unit."""
    if op == "kv_norm_rope" and case["weight"] is None:
        case = {**case, "weight": torch.float32}
    arguments = draw(op, case["rows"], case["dims"], case["x"], case["weight"])
    given = changed(strided, arguments) if case["layout"] == "strided" else arguments
    found = run(op, implementation, given, is_whole(op, case["dims"]))
    expected = formula(op, arguments)
    assert [(r.shape, r.dtype) for r in found] == [(r.shape, r.dtype) for r in expected]
    assert found[1].numel() == (case["dims"][0] if case["weight"] is not None else 0)
    if case["rows"] == 0:
        assert not found[1].any()
    for own, other in zip(found, expected, strict=True):
        if own.numel() == 0 or case["dims"][0] == 1:  # a row of one dim: the gradient is eps and rounding alone
            continue
        near = other.float().abs() > 1e-3 * other.float().abs().max()
        assert not (ulp_distance(own, other) > 1)[near].any()
        assert (own != other)[near].sum() <= 1 + 0.01 * own.numel()
        torch.testing.assert_close(own.float(), other.float(), rtol=0.01, atol=1e-5 * float(other.float().abs().max()))


@kernels
@pytest.mark.parametrize("x", NARROW)
@pytest.mark.parametrize("weight", NARROW)
def test_reached_through_autograd(op: str, implementation: str, x: torch.dtype, weight: torch.dtype) -> None:
    grad, *inputs = draw(op, 70, (128, 64), x, weight)
    leaves = [value.clone().requires_grad_() for value in inputs[:2]]
    with max_isa(implementation):
        found = torch.autograd.grad(getattr(ops, op)(*leaves, *inputs[2:], EPS), leaves, grad)
    assert _library.last_implementation(f"{op}_backward") == implementation
    for own, other in zip(found, run(op, implementation, [grad, *inputs]), strict=True):
        assert_same_bits(own, other)
    wide = [value.double().requires_grad_() for value in inputs[:2]]
    plain = [value.clone().requires_grad_() for value in inputs[:2]]
    turns = inputs[2:]

    def eager(a: Tensor, w: Tensor) -> Tensor:
        y = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + EPS) * w.to(a.dtype)
        if not turns:
            return y
        cos, sin = turns[0].to(a.dtype).unbind(-1)
        passed, even, odd = y[:, :-64], y[:, -64::2], y[:, -63::2]
        return torch.cat((passed, torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(1)), 1)

    exact = torch.autograd.grad(eager(*wide), wide, grad.double())
    baseline = torch.autograd.grad(eager(*plain), plain, grad)
    for own, other, truth in zip(found, baseline, exact, strict=True):
        assert_no_worse(own, other, truth)


@pytest.mark.parametrize("implementation", implementation_cases("rms_norm_backward"))
@pytest.mark.parametrize("x", NARROW)
def test_any_leading_dimensions_and_no_weight(implementation: str, x: torch.dtype) -> None:
    op = "rms_norm"
    grad, rows, weight = draw(op, 12, (64, 0), x, torch.float32)
    expected = run(op, implementation, [grad, rows, weight])
    for shape in ((3, 4, 64), (1, 2, 6, 64)):
        found = run(op, implementation, [grad.view(shape), rows.view(shape), weight])
        assert_same_bits(found[0].flatten(0, -2), expected[0])
        assert_same_bits(found[1], expected[1])
    single = run(op, implementation, [grad[0], rows[0], None])
    assert_same_bits(single[0], run(op, implementation, [grad[:1], rows[:1], None])[0][0])
    leaf = rows.clone().requires_grad_()
    with max_isa(implementation):
        (found,) = torch.autograd.grad(ops.rms_norm(leaf, None, EPS), leaf, grad)
    assert_same_bits(found, run(op, implementation, [grad, rows, None])[0])


@kernels
@pytest.mark.parametrize("x", NARROW)
def test_rows_threads_and_memory(op: str, implementation: str, x: torch.dtype) -> None:
    """A row's gradient depends on nothing else; the weight's on the rows, not on the threads."""
    arguments = draw(op, 301, (512, 64), x, torch.float32)
    expected = run(op, implementation, arguments)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for own, other in zip(run(op, implementation, arguments), expected, strict=True):
                assert_same_bits(own, other)
    finally:
        torch.set_num_threads(before)
    for rows in ([0], [300], [7, 5, 200], list(range(100))):
        some = [a if a.dim() == 1 else a[rows] for a in arguments]
        assert_same_bits(run(op, implementation, some)[0], expected[0][rows])
    guards = [Guarded(a) for a in arguments]
    for own, other in zip(run(op, implementation, [g.tensor for g in guards]), expected, strict=True):
        assert_same_bits(own, other)
    for guard, value in zip(guards, arguments, strict=True):
        guard.check()
        assert_same_bits(guard.tensor, value)


@kernels
@pytest.mark.parametrize("x", NARROW)
def test_nan_reaches_its_own_row_and_the_weight(op: str, implementation: str, x: torch.dtype) -> None:
    arguments = draw(op, 9, (96, 32), x, torch.float32)
    before = run(op, implementation, arguments)
    arguments[0][1, 5], arguments[1][4, 7] = float("nan"), float("inf")
    after = run(op, implementation, arguments)
    assert after[0][[1, 4]].isnan().any(-1).all()
    others = [0, 2, 3, 5, 6, 7, 8]
    assert_same_bits(after[0][others], before[0][others])
    assert after[1][[5, 7]].isnan().all()


@pytest.mark.parametrize("dtype", NARROW)
def test_op_registration(dtype: torch.dtype) -> None:
    arguments = draw("kv_norm_rope", 3, (32, 32), dtype, torch.float32)
    wide = [a.double() for a in arguments]
    check_op(torch.ops.dsv4.kv_norm_rope_backward, *arguments)
    check_op(torch.ops.dsv4._kv_norm_rope_backward_reference, *wide)
    check_op(torch.ops.dsv4.rms_norm_backward, *arguments[:3])
    check_op(torch.ops.dsv4._rms_norm_backward_reference, *wide[:3])
    check_op(torch.ops.dsv4.rms_norm_backward, torch.ones(2, 32), torch.ones(2, 32))


def test_compiles_without_a_break() -> None:
    grad, kv, weight, rope = draw("kv_norm_rope", 20, (64, 32), torch.float32, torch.float32)

    def step(x: Tensor, w: Tensor) -> Tensor:
        return (ops.kv_norm_rope(ops.rms_norm(x, w, EPS), w, rope, EPS) * grad).sum()

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [kv.clone().requires_grad_(), weight.clone().requires_grad_()]
        found.append(torch.autograd.grad(function(*leaves), leaves))
    for own, other in zip(*found, strict=True):
        assert_same_bits(own, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_rope_is_refused(dtype: torch.dtype) -> None:
    _, kv, weight, rope = draw("kv_norm_rope", 2, (8, 4), dtype, dtype)
    y = ops.kv_norm_rope(kv, weight, rope.requires_grad_())
    with pytest.raises(RuntimeError, match=r"^kv_norm_rope: rope has no gradient; detach it$"):
        y.sum().backward()


X, WEIGHT, ROPE, FLOATS = torch.zeros(3, 8), torch.zeros(8), torch.zeros(3, 2, 2), "bfloat16 or float32 or float64"
BAD: dict[str, list[tuple[dict[str, Tensor], str]]] = {
    "rms_norm": [
        ({"x": X.half()}, f"x must be {FLOATS} [..., n], got float16 [3, 8]"),
        ({"x": X.int()}, f"x must be {FLOATS} [..., n], got int32 [3, 8]"),
        ({"grad": X.bfloat16()}, "grad must be float32 [3, 8], got bfloat16 [3, 8]"),
        ({"grad": X[:2]}, "grad must be float32 [3, 8], got float32 [2, 8]"),
        ({"grad": X.unsqueeze(0)}, "grad must be float32 [3, 8], got float32 [1, 3, 8]"),
        ({"grad": X.to("meta")}, "grad must be on cpu as x is, got meta"),
        ({"weight": X}, f"weight must be {FLOATS} [8], got float32 [3, 8]"),
        ({"weight": WEIGHT[:7]}, f"weight must be {FLOATS} [8], got float32 [7]"),
        ({"weight": WEIGHT.half()}, f"weight must be {FLOATS} [8], got float16 [8]"),
    ],
    "kv_norm_rope": [
        ({"kv": X[0]}, f"kv must be {FLOATS} [tokens, head_dim], got float32 [8]"),
        ({"kv": X.half()}, f"kv must be {FLOATS} [tokens, head_dim], got float16 [3, 8]"),
        ({"grad": X.bfloat16()}, "grad must be float32 [3, 8], got bfloat16 [3, 8]"),
        ({"grad": X[:2]}, "grad must be float32 [3, 8], got float32 [2, 8]"),
        ({"weight": WEIGHT[:7]}, f"weight must be {FLOATS} [8], got float32 [7]"),
        ({"weight": WEIGHT.half()}, f"weight must be {FLOATS} [8], got float16 [8]"),
        ({"rope": ROPE[:2]}, "rope must be float32 or float64 [3, rope_dim / 2, 2], got float32 [2, 2, 2]"),
        ({"rope": ROPE.bfloat16()}, "rope must be float32 or float64 [3, rope_dim / 2, 2], got bfloat16 [3, 2, 2]"),
        ({"rope": torch.zeros(3, 5, 2)}, "rope must have at most 4 pairs, got 5"),
        ({"rope": ROPE.to("meta")}, "rope must be on cpu as kv is, got meta"),
    ],
}


@pytest.mark.parametrize(
    ("op", "changes", "message"), [(op, *fault) for op, faults in BAD.items() for fault in faults], ids=lambda v: None
)
def test_rejects(op: str, changes: dict[str, Tensor], message: str) -> None:
    valid = (
        {"grad": X, "x": X, "weight": WEIGHT}
        if op == "rms_norm"
        else {"grad": X, "kv": X, "weight": WEIGHT, "rope": ROPE}
    )
    for name in (f"{op}_backward", f"_{op}_backward_reference"):
        if "meta" in message and not name.startswith("_"):
            continue  # torch itself chooses the fake kernel then
        assert_rejects(getattr(torch.ops.dsv4, name), valid, f"{op}_backward: {message}", **changes)
