"""Mixture of experts: the router's gate and the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.ops._check import FLOAT32_OR_64, FLOATS, INTEGERS, KERNEL_FLOATS, Check
from dsv4.ops._exact import exact_matmul
from dsv4.ops._moe_gradient import (
    experts_backward,
    experts_backward_fake,
    gate_backward,
    moe_experts_backward_reference,
    save_experts,
    save_gate,
    sqrt_softplus,
)
from dsv4.ops._registry import no_gradient, register
from dsv4.ops.linear import quantized_activation
from dsv4.ops.quantize import check_quantized_weight, dequantize_weight_reference

__all__ = [
    "moe_experts",
    "moe_experts_backward_reference",
    "moe_experts_reference",
    "moe_gate",
    "moe_gate_reference",
    "moe_map",
    "moe_map_reference",
]


def moe_gate(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    route_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose top_k experts a token, and their weights.

    score = sqrt(softplus(x W^T)). The experts are those of the top_k largest score + bias, ties to the lower index, a
    NaN last; or, on hash layers, tid2eid[token]. Their weights are the scores without bias, divided by their sum, times
    route_scale. Scores and weights are float32 whatever the dtype of x (float64 for float64).

    Args:
        x:         [tokens, hidden] bfloat16, float32 or float64.
        weight:    [experts, hidden] bfloat16, float32 or float64.
        top_k:     1 to experts.
        bias:      [experts] float32 or float64, for the choice alone; it gets no gradient. Not with tid2eid.
        token_ids: [tokens] int32 or int64. With tid2eid.
        tid2eid:   [vocabulary, top_k] int32 or int64, the experts of each token id. With token_ids.
        route_scale: factor of the weights.
    Returns: weights float32 [tokens, top_k], indices int32 [tokens, top_k]; by falling score + bias, or in the order of
        tid2eid. Differentiable in x and weight.
    Raises: RuntimeError where a shape, dtype or device differs from the above, or a token id or an expert in tid2eid is
        out of range.
    Source: DeepSeek-V4 report, 2.1; the official inference code.
    """
    kernel = x.dtype in KERNEL_FLOATS and weight.dtype in KERNEL_FLOATS
    kernel = kernel and (bias is None or bias.dtype == torch.float32)
    op = torch.ops.dsv4.moe_gate if kernel else torch.ops.dsv4._moe_gate_reference
    return op(x, weight, top_k, bias, token_ids, tid2eid, route_scale)


def moe_gate_reference(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    route_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Rounding logits and scores to float32 drops the traces that the order of summation leaves in float64.
    score = sqrt_softplus(exact_matmul(x, weight.mT, dtype).double()).to(dtype)
    if tid2eid is not None and token_ids is not None:
        indices = tid2eid[token_ids.long()].long()
    else:
        ranked = score.detach() if bias is None else score.detach() + bias
        ranked = torch.where(ranked.isnan(), -torch.inf, ranked)
        indices = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = score.gather(1, indices).double()
    total = chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    return (chosen / total * route_scale).to(dtype), indices.to(torch.int32)


def _check_moe_gate(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    route_scale: float = 1.0,
) -> None:
    check = Check("moe_gate")
    tokens, hidden = check.tensor("x", x, FLOATS, ("tokens", "hidden"))
    experts = check.tensor("weight", weight, FLOATS, ("experts", hidden))[0]
    check.that(1 <= top_k <= experts, f"top_k must be 1 to {experts}, the number of experts, got {top_k}")
    check.optional("bias", bias, FLOAT32_OR_64, (experts,))
    check.that((token_ids is None) == (tid2eid is None), "token_ids and tid2eid must be given together")
    check.optional("token_ids", token_ids, INTEGERS, (tokens,))
    check.optional("tid2eid", tid2eid, INTEGERS, ("vocabulary", top_k))
    check.that(bias is None or tid2eid is None, "bias must be None where tid2eid chooses the experts")


def _check_moe_gate_values(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    route_scale: float = 1.0,
) -> None:
    if tid2eid is None or token_ids is None or token_ids.numel() == 0:
        return
    vocabulary, experts = tid2eid.shape[0], weight.shape[0]
    for name, values, limit in (("token_ids", token_ids, vocabulary), ("tid2eid", tid2eid, experts)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            Check("moe_gate").fail(f"{name} must lie in [0, {limit}), got {low if low < 0 else high}")


def moe_map(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs (token, slot) of a routing by expert, so that each expert's rows follow one another.

    Nothing here waits for a device: the sizes of the results do not depend on the indices.

    Args:
        indices: [tokens, top_k] int32 or int64, from moe_gate; an index outside 0 ... experts - 1 belongs to nobody.
        experts: how many there are, at least 1.
    Returns: offsets int32 [experts + 1] and rows int32 [tokens * top_k]. rows[offsets[e] : offsets[e + 1]] are the
        pairs token * top_k + slot of expert e, ascending; rows from offsets[experts] on are -1.
    Raises: RuntimeError where the shape or dtype differs from the above, or experts is out of range.
    Source: the permutation of grouped products, as in DeepGEMM's contiguous layout without padding.
    """
    return torch.ops.dsv4.moe_map(indices, experts)


def moe_map_reference(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    flat = indices.flatten().long()
    owner = torch.where((flat < 0) | (flat >= experts), experts, flat)
    owner, rows = owner.sort(stable=True)
    offsets = torch.searchsorted(owner, torch.arange(experts + 1, device=indices.device), out_int32=True)
    return offsets, torch.where(owner < experts, rows, -1).to(torch.int32)


def _check_moe_map(indices: Tensor, experts: int) -> None:
    check = Check("moe_map")
    check.tensor("indices", indices, INTEGERS, ("tokens", "top_k"))
    check.that(1 <= experts < 2**31 - 1, f"experts must be 1 to {2**31 - 2}, got {experts}")


def _moe_map_fake(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return (
        indices.new_empty(experts + 1, dtype=torch.int32),
        indices.new_empty(indices.shape[0] * indices.shape[1], dtype=torch.int32),
    )


def moe_experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    w1_scale: Tensor | None = None,
    w3_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    shared: Sequence[Tensor] | None = None,
    swiglu_limit: float = 0.0,
) -> Tensor:
    """Sum over a token's experts of w2(silu(gate) * up * weight), gate = w1 x, up = w3 x, plus the shared expert.

    gate and up are rounded to the dtype of x; with a limit, gate = min(gate, limit) and up = clamp(up, -limit, limit).
    The product with the routing weight is taken wider and rounded once. Each expert's output is rounded to the dtype
    of x; outputs are summed in float32 (float64 for float64) by ascending expert, then the shared expert's, and cast
    once. A matrix with a scale quantises its input to e4m3 in blocks of 128, and sums its products exactly; one
    without is a plain product in its dtype.

    Args:
        x:       [tokens, hidden] bfloat16, float32 or float64.
        weights: [tokens, top_k] float32 or float64, from moe_gate.
        indices: [tokens, top_k] int32 or int64; an index outside 0 ... experts - 1 contributes nothing.
        w1, w3:  [experts, inter, hidden] in the dtype of x or float8_e4m3fn, or [experts, inter, hidden / 2] packed
            e2m1 in int8 or uint8.
        w2:      [experts, hidden, inter], or [experts, hidden, inter / 2], alike.
        w1_scale, w3_scale, w2_scale: float8_e8m0fnu or float32: [experts, ceil(out / 128), ceil(in / 128)] for e4m3,
            [experts, out, ceil(in / 32)] for e2m1; None for plain weights.
        shared:  the expert that every token passes, weight 1: None, or (w1, w3, w2) or (w1, w1_scale, w3, w3_scale, w2,
            w2_scale), without the experts dimension. Its inter may differ.
        swiglu_limit: 0 for no clamp.
    Returns: [tokens, hidden] in the dtype of x. Differentiable in x, weights and plain weights, unless a matrix is
        quantised; the backward pass computes the gradients that are asked for alone, so frozen experts cost less.
    Raises: RuntimeError where a shape, dtype or device differs from the above, or swiglu_limit is negative.
    Source: DeepSeek-V4 report, 2.1; the official inference code.
    """
    kernel = x.dtype in KERNEL_FLOATS and weights.dtype == torch.float32
    kernel = kernel and indices.dtype in INTEGERS and swiglu_limit >= 0
    op = torch.ops.dsv4.moe_experts if kernel else torch.ops.dsv4._moe_experts_reference
    return op(x, weights, indices, w1, w3, w2, w1_scale, w3_scale, w2_scale, list(shared or ()), swiglu_limit)


def moe_experts_reference(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    w1_scale: Tensor | None = None,
    w3_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    shared: Sequence[Tensor] | None = None,
    swiglu_limit: float = 0.0,
) -> Tensor:
    total = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    matrices = ((w1, w1_scale), (w3, w3_scale), (w2, w2_scale))
    # Quantised once for all experts; each matrix takes the form it was stored for.
    quantized = quantized_activation(x) if w1_scale is not None or w3_scale is not None else None
    for expert in indices.unique().tolist():  # ascending, which fixes the order of the sum
        if not 0 <= expert < w1.shape[0]:
            continue
        token, slot = torch.where(indices == expert)
        gate_up_down = [(w[expert], None if scale is None else scale[expert]) for w, scale in matrices]
        output = _expert(
            x[token],
            None if quantized is None else quantized[token],
            gate_up_down,
            weights[token, slot].unsqueeze(-1),
            swiglu_limit,
        )
        total = total.index_add(0, token, output.to(total.dtype))
    if shared:
        step = len(shared) // 3
        parts = [(shared[i], shared[i + 1] if step == 2 else None) for i in range(0, len(shared), step)]
        if step == 2 and quantized is None:
            quantized = quantized_activation(x)
        total = total + _expert(x, quantized, parts, None, swiglu_limit).to(total.dtype)
    return total.to(x.dtype)


def _expert(
    x: Tensor,
    quantized: Tensor | None,
    gate_up_down: Sequence[tuple[Tensor, Tensor | None]],
    weight: Tensor | None,
    limit: float,
) -> Tensor:
    """One expert on its rows x [rows, hidden]; `quantized` holds the same rows after the quantiser, float64."""
    (w1, w1_scale), (w3, w3_scale), (w2, w2_scale) = gate_up_down
    # silu in float64 where results must not depend on a row's place in a vector register: torch's vectorised and scalar
    # exponentials differ in the last bit of float32.
    wide = torch.promote_types(x.dtype, torch.float32 if w2_scale is None else torch.float64)
    gate = _project(x, quantized, w1, w1_scale).to(wide)
    up = _project(x, quantized, w3, w3_scale).to(wide)
    if limit > 0:
        gate = gate.clamp_max(limit)
        up = up.clamp(-limit, limit)
    hidden = torch.nn.functional.silu(gate) * up
    if weight is not None:
        hidden = hidden * weight.to(wide)
    hidden = hidden.to(x.dtype)
    return _project(hidden, None if w2_scale is None else quantized_activation(hidden), w2, w2_scale)


def _project(x: Tensor, quantized: Tensor | None, weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return x @ weight.mT
    assert quantized is not None
    return exact_matmul(quantized, dequantize_weight_reference(weight, scale, torch.float64).mT, x.dtype)


def _check_moe_experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    w1_scale: Tensor | None = None,
    w3_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    shared: Sequence[Tensor] | None = None,
    swiglu_limit: float = 0.0,
) -> None:
    check = Check("moe_experts")
    scales = (w1_scale, w3_scale, w2_scale)
    shared = shared or ()
    check.that(len(shared) in (0, 3, 6), f"shared must hold 0, 3 or 6 tensors, got {len(shared)}")
    _check_experts(check, x, weights, indices, (w1, w3, w2), scales, shared, swiglu_limit)


def _check_moe_experts_backward(
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
) -> None:
    check = Check("moe_experts_backward")
    check.that(len(shared) in (0, 3), f"shared must hold 0 or 3 tensors, got {len(shared)}")
    flags = 5 + len(shared)
    check.that(needed is None or len(needed) == flags, f"needed must hold {flags} flags, got {len(needed or ())}")
    _check_experts(check, x, weights, indices, (w1, w3, w2), (None, None, None), shared, swiglu_limit)
    check.tensor("grad", grad, (x.dtype,), tuple(x.shape))


def _check_experts(
    check: Check,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    matrices: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shared: Sequence[Tensor],
    swiglu_limit: float,
) -> None:
    tokens, hidden = check.tensor("x", x, FLOATS, ("tokens", "hidden"))
    top_k = check.tensor("weights", weights, FLOAT32_OR_64, (tokens, "top_k"))[1]
    check.tensor("indices", indices, INTEGERS, (tokens, top_k))
    w1 = matrices[0]
    check.that(w1 is not None, "w1 must be [experts, inter, hidden], got None")
    check.that(w1.dim() == 3, f"w1 must be [experts, inter, hidden], got {list(w1.shape)}")
    _check_matrices(check, x.dtype, "", matrices, scales, (w1.shape[0], w1.shape[1], hidden))
    if shared:
        plain = len(shared) == 3
        matrices = shared if plain else shared[0::2]
        scales = (None, None, None) if plain else shared[1::2]
        inter = matrices[0].shape[0] if matrices[0].dim() else 0
        _check_matrices(check, x.dtype, "shared ", matrices, scales, (inter, hidden))
    check.that(swiglu_limit >= 0, f"swiglu_limit must not be negative, got {swiglu_limit}")


def _check_matrices(
    check: Check,
    dtype: torch.dtype,
    prefix: str,
    matrices: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    sizes: tuple[int, ...],
) -> None:
    """Checks (w1, w3, w2) of [*leading, inter, hidden] = sizes, stored plain or quantised."""
    *leading, inter, hidden = sizes
    for name, matrix, scale in zip(("w1", "w3", "w2"), matrices, scales, strict=True):
        out, size = (hidden, inter) if name == "w2" else (inter, hidden)
        if scale is None:
            check.tensor(prefix + name, matrix, (dtype,), (*leading, out, size))
            continue
        check_quantized_weight(check, prefix + name, matrix, f"{prefix}{name}_scale", scale)
        packed = 1 if matrix.dtype == torch.float8_e4m3fn else 2
        check.that(size % packed == 0, f"{prefix}{name} in e2m1 needs an even number of inputs, got {size}")
        check.tensor(prefix + name, matrix, (matrix.dtype,), (*leading, out, size // packed))


def _gate_products(x: Sequence[int], weight: Sequence[int], *others: Any, **named: Any) -> int:
    return x[0] * x[1] * weight[0]


def _experts_products(
    x: Sequence[int],
    weights: Sequence[int],
    indices: Sequence[int],
    w1: Sequence[int],
    w3: Sequence[int],
    w2: Sequence[int],
    w1_scale: Sequence[int] | None = None,
    w3_scale: Sequence[int] | None = None,
    w2_scale: Sequence[int] | None = None,
    shared: Sequence[Sequence[int]] | None = None,
    swiglu_limit: float = 0.0,
) -> int:
    """Of three matrices: with each routed pair, and of the shared expert with each token."""
    rows_times_inter = weights[0] * weights[1] * w1[1] + (x[0] * shared[0][0] if shared else 0)
    return 3 * x[1] * rows_times_inter


def _experts_backward_products(
    grad: Sequence[int],
    x: Sequence[int],
    weights: Sequence[int],
    indices: Sequence[int],
    w1: Sequence[int],
    w3: Sequence[int],
    w2: Sequence[int],
    shared: Sequence[Sequence[int]],
    swiglu_limit: float,
    needed: Sequence[bool] | None = None,
) -> int:
    """Of the rows of an expert: gate and up again, the gradient with w2, one for each matrix that needs its gradient,
    and two into x if that does: at most 8 in place of 3."""
    flags = needed if needed is not None else [True] * (5 + len(shared))
    into_x = 2 * flags[0]
    routed = weights[0] * weights[1] * w1[1] * (3 + sum(flags[2:5]) + into_x)
    return x[1] * (routed + (x[0] * shared[0][0] * (3 + sum(flags[5:]) + into_x) if shared else 0))


# The kernels take bfloat16 and float32; the second of each pair is for the rest.
for _name in ("moe_gate", "_moe_gate_reference"):
    register(
        f"{_name}(Tensor x, Tensor weight, int top_k, Tensor? bias=None, Tensor? token_ids=None, "
        "Tensor? tid2eid=None, float route_scale=1.0) -> (Tensor, Tensor)",
        moe_gate_reference,
        check=_check_moe_gate,
        check_values=_check_moe_gate_values,
        backward=gate_backward,
        setup_context=save_gate,
        products=_gate_products,
    )
register(
    "moe_map(Tensor indices, int experts) -> (Tensor, Tensor)",
    moe_map_reference,
    check=_check_moe_map,
    fake=_moe_map_fake,
)
for _name in ("moe_experts", "_moe_experts_reference"):
    register(
        f"{_name}(Tensor x, Tensor weights, Tensor indices, Tensor w1, Tensor w3, Tensor w2, Tensor? w1_scale=None, "
        "Tensor? w3_scale=None, Tensor? w2_scale=None, Tensor[]? shared=None, float swiglu_limit=0.0) -> Tensor",
        moe_experts_reference,
        check=_check_moe_experts,
        fake=lambda x, *others, **named: torch.empty_like(x, memory_format=torch.contiguous_format),
        backward=experts_backward,
        setup_context=save_experts,
        products=_experts_products,
    )
_backward, _setup_context = no_gradient("moe_experts_backward", "take second derivatives through moe_experts_reference")
for _name in ("moe_experts_backward", "_moe_experts_backward_reference"):
    register(
        f"{_name}(Tensor grad, Tensor x, Tensor weights, Tensor indices, Tensor w1, Tensor w3, Tensor w2, "
        "Tensor[] shared, float swiglu_limit, bool[]? needed=None) -> Tensor[]",
        moe_experts_backward_reference,
        check=_check_moe_experts_backward,
        fake=experts_backward_fake,
        backward=_backward,
        setup_context=_setup_context,
        products=_experts_backward_products,
    )
