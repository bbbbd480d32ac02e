"""The gradients of the mHC ops by formula: the definition of the backward ops, since autograd cannot run inside an op.

Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops._mhc_checks import STREAMS

_SIZES = (STREAMS, STREAMS, STREAMS * STREAMS)  # pre, post, comb
_GROUP = [0] * STREAMS + [1] * STREAMS + [2] * (STREAMS * STREAMS)  # the scale of each mix


def mhc_post_backward_reference(
    grad_result: Tensor, sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mhc_post: of sublayer and streams in their dtype, of post and comb in theirs."""
    grad, wide = grad_result.double(), streams.double()
    grad_sublayer = (post.double().unsqueeze(-1) * grad).sum(1).to(sublayer.dtype)
    grad_post = (grad * sublayer.double().unsqueeze(1)).sum(-1).to(post.dtype)
    grad_comb = (wide @ grad.transpose(1, 2)).to(comb.dtype)
    grad_streams = (comb.double() @ grad).to(streams.dtype)
    return grad_sublayer, grad_streams, grad_post, grad_comb


def mhc_pre_backward_reference(
    grad_input: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    grad_residual: Tensor | None,
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iterations: int,
    rms_eps: float,
    needs_fn: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mhc_pre: of streams in their dtype, with grad_residual added; of all others in the dtype of fn.

    Returns: of streams, fn (empty where it is not needed), scale, base, norm_weight (empty where there is none).
    """
    wide, mixes, rms = _recomputed(streams, fn, norm_eps)
    logits = mixes * scale.double()[_GROUP] + base.double()
    s, half_post = logits[:, : 2 * STREAMS].sigmoid().chunk(2, -1)
    pre = s + hc_eps
    grad_mixed, grad_norm_weight = grad_input.double(), fn.new_empty(0)
    if norm_weight is not None:
        mixed = (pre.unsqueeze(-1) * wide).sum(1).to(streams.dtype).double()
        grad_mixed, grad_norm_weight = _rms_norm_backward(grad_mixed, mixed, norm_weight.double(), rms_eps)

    grad_pre = (wide @ grad_mixed.unsqueeze(-1)).squeeze(-1)
    grad_logits = torch.cat(
        [
            grad_pre * s * (1 - s),
            2 * grad_post.double() * half_post * (1 - half_post),
            _sinkhorn_backward(grad_comb.double(), logits[:, 2 * STREAMS :], hc_eps, sinkhorn_iterations).flatten(1),
        ],
        -1,
    )
    grad_scale = torch.stack([part.sum() for part in (grad_logits * mixes).split(_SIZES, -1)])
    grad_mixes = grad_logits * scale.double()[_GROUP]
    grad_streams, grad_fn = _mixes_backward(grad_mixes, wide, mixes, rms, fn, needs_fn)
    grad_streams = grad_streams + pre.unsqueeze(-1) * grad_mixed.unsqueeze(1)
    if grad_residual is not None:
        grad_streams = grad_streams + grad_residual.double()
    return (
        grad_streams.to(streams.dtype),
        grad_fn.to(fn.dtype),
        grad_scale.to(fn.dtype),
        grad_logits.sum(0).to(fn.dtype),
        grad_norm_weight.to(fn.dtype),
    )


def mhc_head_backward_reference(
    grad_output: Tensor,
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    hc_eps: float,
    needs_fn: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mhc_head: of streams in their dtype; of fn (empty where it is not needed), scale and base in that of
    fn."""
    wide, mixes, rms = _recomputed(streams, fn, norm_eps)
    s = (mixes * scale.double() + base.double()).sigmoid()
    grad = grad_output.double()
    grad_logits = (wide @ grad.unsqueeze(-1)).squeeze(-1) * s * (1 - s)
    grad_scale = (grad_logits * mixes).sum().reshape(1)
    grad_streams, grad_fn = _mixes_backward(grad_logits * scale.double(), wide, mixes, rms, fn, needs_fn)
    grad_streams = grad_streams + (s + hc_eps).unsqueeze(-1) * grad.unsqueeze(1)
    return (
        grad_streams.to(streams.dtype),
        grad_fn.to(fn.dtype),
        grad_scale.to(fn.dtype),
        grad_logits.sum(0).to(fn.dtype),
    )


def _recomputed(streams: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Streams, mixes and 1 / rms in float64."""
    wide = streams.double()
    rms = torch.rsqrt(wide.flatten(1).square().mean(-1, keepdim=True) + norm_eps)
    return wide, wide.flatten(1) @ fn.double().t() * rms, rms


def _mixes_backward(
    grad_mixes: Tensor, wide: Tensor, mixes: Tensor, rms: Tensor, fn: Tensor, needs_fn: bool
) -> tuple[Tensor, Tensor]:
    """Through m = (fn r) rms(r): with n = 4 hidden, d rms / d r = -rms^3 r / n."""
    flat = wide.flatten(1)
    grad_product = grad_mixes * rms
    grad_flat = grad_product @ fn.double()
    grad_flat = grad_flat - (grad_mixes * mixes).sum(-1, keepdim=True) * rms.square() / flat.shape[1] * flat
    return grad_flat.view_as(wide), grad_product.t() @ flat if needs_fn else fn.new_empty(0)


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    weighted = grad * weight
    grad_x = rms * (weighted - x * rms.square() * (weighted * x).mean(-1, keepdim=True))
    return grad_x, (grad * x * rms).sum(0)


def _sinkhorn_backward(grad: Tensor, logits: Tensor, hc_eps: float, sinkhorn_iterations: int) -> Tensor:
    """Gradient of the logits [tokens, 4, 4]. For y = x / (sum(x) + eps): dx = (dy - sum(dy y)) / (sum(x) + eps)."""
    softmax = logits.unflatten(-1, (STREAMS, STREAMS)).softmax(-1)
    comb, steps = softmax + hc_eps, []
    for index in range(2 * sinkhorn_iterations - 1):
        axis = -2 if index % 2 == 0 else -1
        divisor = comb.sum(axis, keepdim=True) + hc_eps
        comb = comb / divisor
        steps.append((axis, divisor, comb))
    for axis, divisor, comb in reversed(steps):
        grad = (grad - (grad * comb).sum(axis, keepdim=True)) / divisor
    return softmax * (grad - (grad * softmax).sum(-1, keepdim=True))
