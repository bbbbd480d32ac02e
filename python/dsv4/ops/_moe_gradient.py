"""Gradients of the gate and of plain experts: autograd registration, and the formulas that define them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.ops._check import KERNEL_FLOATS
from dsv4.ops.linear import dense_linear

SOFTPLUS_THRESHOLD = 20.0
# Below this softplus(z) equals exp(z) in float64 too, and its root is better taken as exp(z / 2): no underflow, no 0/0
# in the gradient.
SOFTPLUS_TAIL = -40.0


def sqrt_softplus(z: Tensor) -> Tensor:
    root = torch.nn.functional.softplus(z.clamp_min(SOFTPLUS_TAIL), threshold=SOFTPLUS_THRESHOLD).sqrt()
    return torch.where(z < SOFTPLUS_TAIL, (z.clamp_max(SOFTPLUS_TAIL) / 2).exp(), root)


def _sqrt_softplus_slope(z: Tensor, score: Tensor) -> Tensor:
    """ds/dz of score = sqrt(softplus(z)): sigmoid(z) / 2s; s / 2 in the tail, 1 / 2s past the threshold."""
    inner = z.clamp_min(SOFTPLUS_TAIL)
    slope = torch.where(inner > SOFTPLUS_THRESHOLD, 1.0, inner.sigmoid()) / (2 * sqrt_softplus(inner))
    return torch.where(z < SOFTPLUS_TAIL, score / 2, slope)


def save_gate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, _, _, ctx.route_scale = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def gate_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """For the experts that the forward pass chose; neither the choice nor the bias has a gradient.

    With S the sum of the scores s of a token: dL/ds_k = route_scale / S (g_k - sum_j g_j s_j / S).
    """
    x, weight, indices = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    chosen = indices.long()
    z = dense_linear(x, weight, grad.dtype).gather(1, chosen).double()
    score, wide = sqrt_softplus(z), grad.double()
    total, least = score.sum(-1, keepdim=True), torch.finfo(grad.dtype).tiny
    divisor = total.clamp_min(least)
    # Below its least value the divisor is a constant.
    mean = torch.where(total < least, 0.0, (wide * score).sum(-1, keepdim=True) / divisor)
    d_chosen = (wide - mean) / divisor * ctx.route_scale * _sqrt_softplus_slope(z, score)
    d_z = torch.zeros(x.shape[0], weight.shape[0], dtype=grad.dtype, device=grad.device)
    d_z = d_z.scatter_add(1, chosen, d_chosen.to(grad.dtype))  # a row of tid2eid may name an expert twice
    d_x = dense_linear(d_z, weight.mT, x.dtype) if needs_x else None
    d_weight = dense_linear(d_z.mT, x.mT, weight.dtype) if needs_weight else None
    return d_x, d_weight, None, None, None, None, None


def moe_experts_backward_reference(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    shared: Sequence[Tensor],
    swiglu_limit: float,
    needed: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Gradients of plain experts with respect to x, weights, w1, w3, w2 and the shared matrices, in this order, each
    with the shape and dtype of what it is the gradient of. `needed` has a flag for each, None for all of them: what is
    not needed is not computed and comes back empty.

    Of each expert's rows at once, experts ascending, so that the order of every sum is fixed. gate and up are taken
    again from x: between the passes nothing is kept but the arguments.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    experts, top_k = w1.shape[0], weights.shape[1]
    offsets, rows = torch.ops.dsv4.moe_map(indices, max(experts, 1))
    bounds = offsets.tolist()
    pairs = rows[: bounds[-1]].long()
    tokens, factors = pairs // top_k, weights.reshape(-1)[pairs].to(wide)
    needs_x, needs_weights, *needs_matrices = _flags(needed, shared)
    d_x = torch.zeros(x.shape if needs_x else 0, dtype=wide, device=x.device)
    d_weights = weights.new_zeros(weights.shape if needs_weights else 0)
    d_all = [
        w.new_empty(w.shape if wanted else 0) for w, wanted in zip((w1, w3, w2, *shared), needs_matrices, strict=True)
    ]
    for expert in range(experts):
        begin, end = bounds[expert], bounds[expert + 1]
        d_expert = [d[expert] if wanted else None for d, wanted in zip(d_all[:3], needs_matrices, strict=False)]
        if begin == end:
            for total in d_expert:
                if total is not None:
                    total.zero_()
            continue
        token = tokens[begin:end]
        matrices = (w1[expert], w3[expert], w2[expert])
        d_rows, d_factor = _expert_backward(
            grad[token], x[token], matrices, factors[begin:end], swiglu_limit, d_expert, needs_x
        )
        if d_rows is not None:
            d_x.index_add_(0, token, d_rows)
        if needs_weights:
            d_weights.view(-1)[pairs[begin:end]] = d_factor.to(weights.dtype)
    if shared:
        parts = (shared[0], shared[1], shared[2])
        d_shared = [d if wanted else None for d, wanted in zip(d_all[3:], needs_matrices[3:], strict=True)]
        d_rows, _ = _expert_backward(grad, x, parts, None, swiglu_limit, d_shared, needs_x)
        if d_rows is not None:
            d_x += d_rows
    return [d_x.to(x.dtype), d_weights, *d_all]


def _flags(needed: Sequence[bool] | None, shared: Sequence[Tensor]) -> list[bool]:
    return [True] * (5 + len(shared)) if needed is None else list(needed)


def _expert_backward(
    grad: Tensor,
    x: Tensor,
    matrices: tuple[Tensor, Tensor, Tensor],
    factor: Tensor | None,
    limit: float,
    results: Sequence[Tensor | None],
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of one plain expert: rows [rows, hidden] (not yet cast), if needed, and routing weights [rows]; those
    of (w1, w3, w2) go to `results`, where they have a place there."""
    w1, w3, w2 = matrices
    wide = torch.promote_types(x.dtype, torch.float32)
    raw_gate, raw_up = (x @ w1.mT).to(wide), (x @ w3.mT).to(wide)
    gate = raw_gate.clamp_max(limit) if limit > 0 else raw_gate
    up = raw_up.clamp(-limit, limit) if limit > 0 else raw_up
    silu = torch.nn.functional.silu(gate)
    product = silu * up
    d_hidden = (grad @ w2).to(wide)
    d_factor = (d_hidden * product).sum(-1)
    if factor is not None:
        product *= factor.unsqueeze(-1)
        d_hidden *= factor.unsqueeze(-1)
    d_gate, d_up = torch.ops.aten.silu_backward(d_hidden * up, gate), d_hidden * silu
    if limit > 0:
        d_gate.masked_fill_(raw_gate > limit, 0)
        d_up.masked_fill_(raw_up.abs() > limit, 0)
    d_gate, d_up = d_gate.to(x.dtype), d_up.to(x.dtype)
    for left, right, result in zip((d_gate, d_up, grad), (x, x, product.to(x.dtype)), results, strict=True):
        if result is not None:
            torch.mm(left.mT, right, out=result)
    return (d_gate @ w1).to(wide) + (d_up @ w3).to(wide) if needs_x else None, d_factor


def experts_backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    shared: Sequence[Tensor],
    swiglu_limit: float,
    needed: Sequence[bool] | None = None,
) -> list[Tensor]:
    inputs = (x, weights, w1, w3, w2, *shared)
    return [t.new_empty(t.shape if wanted else 0) for t, wanted in zip(inputs, _flags(needed, shared), strict=True)]


def save_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, indices, w1, w3, w2, *scales, shared, ctx.limit = inputs
    ctx.has_list = shared is not None
    shared = shared or ()
    ctx.quantized = len(shared) == 6 or any(scale is not None for scale in scales)
    ctx.save_for_backward(*(() if ctx.quantized else (x, weights, indices, w1, w3, w2, *shared)))


def experts_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.quantized:
        raise RuntimeError(
            "moe_experts: quantised experts have no gradient; train with plain weights (quantization='off')"
        )
    x, weights, indices, w1, w3, w2, *shared = ctx.saved_tensors
    kernel = x.dtype in KERNEL_FLOATS and weights.dtype == torch.float32
    op = torch.ops.dsv4.moe_experts_backward if kernel else torch.ops.dsv4._moe_experts_backward_reference
    needs = ctx.needs_input_grad  # of the call's arguments: without a list, `shared` may be none of them
    needed = [*needs[:2], *needs[3:6], *(needs[9] if ctx.has_list else ())]
    found = op(grad, x, weights, indices, w1, w3, w2, shared, ctx.limit, needed)
    gradients = [value if wanted else None for value, wanted in zip(found, needed, strict=True)]
    d_x, d_weights, d_w1, d_w3, d_w2, *d_shared = gradients
    return d_x, d_weights, None, d_w1, d_w3, d_w2, None, None, None, d_shared if ctx.has_list else None, None
