"""Gradients of the gate, of plain experts and of plain grouped linears, which are taken by formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from moe_backward_cases import assert_no_worse_than, autograd, problem, wide
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4 import ops
from dsv4.testing import assert_no_worse, assert_same_bits, grid, strided

DTYPES = [torch.bfloat16, torch.float32]


def experts_problem(
    tokens: int, top_k: int, dtype: torch.dtype, shared: bool, hidden: int = 48, inter: int = 40, count: int = 6
) -> tuple[list[Tensor], Tensor]:
    """The leaves x, weights, w1, w3, w2, the shared matrices; and the indices, which leave the last expert empty, name
    nobody in one slot and one expert twice in a token."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    leaves = [2 * draw(tokens, hidden), draw(tokens, top_k).sigmoid()]
    leaves += [draw(count, *shape) / shape[1] ** 0.5 for shape in shapes]
    if shared:
        shapes = ((inter + 9, hidden), (inter + 9, hidden), (hidden, inter + 9))
        leaves += [draw(*shape) / shape[1] ** 0.5 for shape in shapes]
    leaves = [leaf if i == 1 else leaf.to(dtype) for i, leaf in enumerate(leaves)]
    indices = torch.rand(tokens, count - 1, generator=generator).argsort(-1)[:, :top_k].int()
    if tokens > 2 and top_k > 1:
        indices[1, 0] = -1
        indices[2, 1] = indices[2, 0]
    return leaves, indices


def gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    found = torch.autograd.grad(function(*leaves), leaves, grad)
    for value, leaf in zip(found, leaves, strict=True):
        assert value.dtype == leaf.dtype and value.shape == leaf.shape
    return list(found)


def through(op: Callable[..., Tensor], indices: Tensor, limit: float) -> Callable[..., Tensor]:
    def function(x: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, *shared: Tensor) -> Tensor:
        return op(x, weights, indices, w1, w3, w2, shared=list(shared), swiglu_limit=limit)

    return function


CASES = grid(tokens=[0, 1, 3, 7, 23], top_k=[1, 2, 5], limit=[0.0, 0.5], shared=[False, True])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_no_worse_than_autograd(dtype: torch.dtype, case: dict[str, Any]) -> None:
    draws = 12 // (case["tokens"] * case["top_k"]) if case["tokens"] else 0
    problems = [problem(**case, count=6, dtype=dtype) for _ in range(max(draws, 1))]
    found = [autograd(ops.moe_experts, a) for a in problems]
    exact = [autograd(ops.moe_experts_reference, wide(a)) for a in problems]
    assert_no_worse_than(lambda a: autograd(ops.moe_experts_reference, a), problems, found, exact)
    for matrix in found[0][2:5]:
        assert not matrix[5].any()  # no token chose it


class BackwardCalls(TorchDispatchMode):
    """Which results the calls of moe_experts_backward had, of the kernels or of the formula."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[list[bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if "moe_experts_backward" in func.name():
            self.taken.append([value.numel() > 0 for value in found])
        return found


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_frozen_operands_have_no_gradient_and_cost_none(shared: bool, dtype: torch.dtype) -> None:
    """Every set of them: what is left has the bits that it has among all."""
    operands, indices = experts_problem(7, 2, dtype, shared)
    function, grad = through(ops.moe_experts, indices, 0.5), torch.randn(7, 48).to(dtype)
    whole = gradients(function, operands, grad)
    for needed in product((False, True), repeat=len(operands)):
        leaves = [o.detach().clone().requires_grad_(wanted) for o, wanted in zip(operands, needed, strict=True)]
        out = function(*leaves)
        assert out.requires_grad == any(needed)
        if not any(needed):
            continue
        with BackwardCalls() as calls:
            out.backward(grad)
        assert calls.taken == [list(needed)]
        for leaf, value, wanted in zip(leaves, whole, needed, strict=True):
            if wanted:
                assert_same_bits(leaf.grad, value)
            else:
                assert leaf.grad is None


def test_frozen_experts_where_arguments_are_left_at_their_defaults() -> None:
    operands, indices = experts_problem(7, 2, torch.float32, False)
    x, weights, *matrices = operands
    grad = torch.randn(7, 48)
    whole = gradients(through(ops.moe_experts, indices, 0.0), operands, grad)
    for shared in ((), (None, None, None, None), (None, None, None, [])):
        for frozen in (True, False):
            leaf, w2 = x.clone().requires_grad_(), matrices[2].clone().requires_grad_(not frozen)
            with BackwardCalls() as calls:
                torch.ops.dsv4.moe_experts(leaf, weights, indices, *matrices[:2], w2, *shared).backward(grad)
            assert calls.taken == [[True, False, False, False, not frozen]]
            assert_same_bits(leaf.grad, whole[0])
            assert w2.grad is None if frozen else torch.equal(w2.grad, whole[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamped_values_have_a_gradient_at_the_limit_and_none_beyond(dtype: torch.dtype) -> None:
    """One input, one inner value, one output: gate = w1, up = w3."""
    limit = torch.tensor(0.7, dtype=torch.float32).item()
    edge = torch.tensor(limit, dtype=dtype)
    beyond, below = (torch.nextafter(edge, torch.tensor(end, dtype=dtype)) for end in (2.0, 0.0))
    one, indices = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=torch.int32)
    for gate in (edge, beyond, below, -beyond, torch.tensor(-9.0, dtype=dtype)):
        for up in (edge, beyond, below, -edge, -beyond, -below):
            leaves = [one, one.to(torch.promote_types(dtype, torch.float32)), gate.view(1, 1, 1), up.view(1, 1, 1)]
            leaves.append(2 * one.view(1, 1, 1))
            found = gradients(through(ops.moe_experts, indices, limit), leaves, one)
            expected = gradients(through(ops.moe_experts_reference, indices, limit), leaves, one)
            for value, other in zip(found, expected, strict=True):
                torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)
            assert bool(found[2].any()) == bool(gate <= edge)
            assert bool(found[3].any()) == bool(up.abs() <= edge)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_whatever_the_layout_of_the_gradient_and_the_threads(dtype: torch.dtype) -> None:
    leaves, indices = experts_problem(130, 2, dtype, True, hidden=260, inter=136)
    function = through(ops.moe_experts, indices, 1.0)
    grad = torch.randn(leaves[0].shape).to(dtype)
    expected = gradients(function, leaves, grad)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for value, other in zip(gradients(function, leaves, strided(grad)), expected, strict=True):
                assert_same_bits(value, other)
    finally:
        torch.set_num_threads(before)
    ones = torch.ones((), dtype=dtype).expand(grad.shape)
    for value, other in zip(gradients(function, leaves, ones), gradients(function, leaves, +ones), strict=True):
        assert_same_bits(value, other)
    backward = torch.ops.dsv4.moe_experts_backward
    apart = [strided(leaf) for leaf in leaves]
    found = backward(strided(grad), *apart[:2], strided(indices), *apart[2:5], apart[5:], 1.0)
    for value, other in zip(found, expected, strict=True):
        assert_same_bits(value, other)


def test_experts_indices_of_64_bits_and_out_of_range() -> None:
    leaves, indices = experts_problem(9, 3, torch.float32, False)
    indices[4, 1], indices[5, 2] = 6, 1 << 30
    grad = torch.randn(leaves[0].shape)
    expected = gradients(through(ops.moe_experts, indices, 0.0), leaves, grad)
    wide = torch.where(indices == 1 << 30, -(1 << 40), indices.long())
    for value, other in zip(gradients(through(ops.moe_experts, wide, 0.0), leaves, grad), expected, strict=True):
        assert_same_bits(value, other)
    assert not expected[1][4, 1] and not expected[1][5, 2] and expected[1][5, 1]


@pytest.mark.parametrize("case", grid(tokens=[0, 1, 19], top_k=[1, 3, 8], hidden=[7, 96]))
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
def test_gate_is_no_worse_than_autograd(dtypes: tuple[torch.dtype, torch.dtype], case: dict[str, Any]) -> None:
    """Experts as a table gives them, so that every precision takes the same; a row of it names an expert twice. Errors
    of several random problems count as one: those of a single token are too few numbers to compare two orders of
    summation by."""
    problems = [_gate_gradients(dtypes, **case) for _ in range(max(1, 8 // max(case["tokens"], 1)))]
    for parts in zip(*problems, strict=True):
        value, other, truth = (torch.cat(part) for part in zip(*parts, strict=True))
        assert_no_worse(value, other, truth)


def _gate_gradients(
    dtypes: tuple[torch.dtype, torch.dtype], tokens: int, top_k: int, hidden: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ours, autograd's of the same maths in torch, exact) for x and for the weight, of one random problem."""
    x, weight = torch.randn(tokens, hidden).to(dtypes[0]), torch.randn(8, hidden).to(dtypes[1])
    table = torch.stack([torch.randperm(8)[:top_k] for _ in range(5)])
    table[1, -1] = table[1, 0]
    ids, grad = torch.arange(tokens) % 5, torch.randn(tokens, top_k)

    def in_torch(x: Tensor, weight: Tensor) -> Tensor:  # in float32, as a training loop would write it
        score = torch.nn.functional.softplus(x.float() @ weight.float().mT).sqrt().gather(1, table[ids])
        return 1.5 * score / score.sum(-1, keepdim=True)

    def weights_of(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda x, weight: op(x, weight, top_k, None, ids, table, 1.5)[0]

    found = gradients(weights_of(ops.moe_gate), [x, weight], grad)
    apart = gradients(weights_of(ops.moe_gate), [x, weight], strided(grad))
    for value, other in zip(apart, found, strict=True):
        assert_same_bits(value, other)
    baseline = gradients(in_torch, [x, weight], grad)
    exact = gradients(weights_of(ops.moe_gate_reference), [x.double(), weight.double()], grad.double())
    return list(zip(found, baseline, exact, strict=True))


@pytest.mark.parametrize("z", [-1e4, -200.0, -90.0, -40.0, -39.9, -1.0, 0.0, 19.9, 20.1, 1e4])
def test_gate_far_out_equals_autograd(z: float) -> None:
    x, grad = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    weight = torch.tensor([[z], [z - 0.25], [z + 0.5]], dtype=torch.float64)
    found = gradients(lambda x, w: ops.moe_gate(x, w, 3)[0], [x, weight], grad)
    expected = gradients(lambda x, w: ops.moe_gate_reference(x, w, 3)[0], [x, weight], grad)
    for value, other in zip(found, expected, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-15)


def test_gate_gives_the_bias_no_gradient_and_takes_one_operand_alone() -> None:
    x, weight, bias = torch.randn(5, 12), torch.randn(6, 12), torch.randn(6, requires_grad=True)
    grad = torch.randn(5, 2)
    both = gradients(lambda x, w: ops.moe_gate(x, w, 2, bias)[0], [x, weight], grad)
    assert_same_bits(gradients(lambda x: ops.moe_gate(x, weight, 2, bias)[0], [x], grad)[0], both[0])
    assert_same_bits(gradients(lambda w: ops.moe_gate(x, w, 2, bias)[0], [weight], grad)[0], both[1])
    assert torch.autograd.grad(ops.moe_gate(x, weight, 2, bias)[0].sum(), bias, allow_unused=True) == (None,)


@pytest.mark.parametrize("case", grid(tokens=[0, 1, 9], groups=[1, 3], out=[1, 5], size=[4, 33]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear_is_no_worse_than_autograd(dtype: torch.dtype, case: dict[str, Any]) -> None:
    x = torch.randn(case["tokens"], case["groups"], case["size"]).to(dtype)
    weight = torch.randn(case["groups"] * case["out"], case["size"]).to(dtype)
    grad = torch.randn(case["tokens"], case["groups"], case["out"]).to(dtype)
    found = gradients(ops.grouped_linear, [x, weight], grad)
    baseline = gradients(ops.grouped_linear_reference, [x, weight], grad)
    exact = gradients(ops.grouped_linear_reference, [x.double(), weight.double()], grad.double())
    for value, other, truth in zip(found, baseline, exact, strict=True):
        assert_no_worse(value, other, truth)
    for value, other in zip(gradients(ops.grouped_linear, [x, weight], strided(grad)), found, strict=True):
        assert_same_bits(value, other)


def test_grouped_linear_says_that_a_scale_has_no_gradient() -> None:
    codes, scale = torch.randn(4, 8).to(torch.float8_e4m3fn), torch.ones(1, 1, requires_grad=True)
    out = ops.grouped_linear(torch.randn(3, 2, 8), codes, scale)
    with pytest.raises(RuntimeError, match="grouped_linear: scale has no gradient; train with plain weights"):
        out.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_pass_compiles_without_graph_breaks(dtype: torch.dtype, frozen: bool) -> None:
    leaves, _ = experts_problem(11, 2, dtype, True)
    gate, wo, bias = torch.randn(6, 48), torch.randn(10, 24).to(dtype), torch.randn(6)

    def function(gate: Tensor, wo: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, *shared: Tensor) -> Tensor:
        weights, indices = ops.moe_gate(x, gate, 2, bias, route_scale=2.0)
        out = ops.moe_experts(x, weights, indices, w1, w3, w2, shared=list(shared), swiglu_limit=1.0)
        return ops.grouped_linear(out.view(11, 2, 24), wo)

    operands, matrices = [gate, wo, leaves[0]], leaves[2:]
    grad = torch.randn(11, 2, 5).to(dtype)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def of(function: Callable[..., Tensor]) -> list[Tensor]:
        if frozen:
            return gradients(lambda *three: function(*three, *matrices), operands, grad)
        return gradients(function, [*operands, *matrices], grad)

    for value, other in zip(of(compiled), of(function), strict=True):
        torch.testing.assert_close(value, other)
