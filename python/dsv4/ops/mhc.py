"""Manifold-constrained hyper-connections (mHC): 4 residual streams, mixed before and after every sublayer.

Source: DeepSeek-V4 report, 2.2; arXiv 2512.24880; the official inference code. All of the arithmetic is float32
(float64 in the references when the streams are), with one rounding where a result has the dtype of the streams.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.ops._exact import exact_matmul
from dsv4.ops._mhc_checks import (
    STREAMS,
    check_head,
    check_head_backward,
    check_post,
    check_post_backward,
    check_post_pre,
    check_pre,
    check_pre_backward,
    head_backward_fake,
    head_backward_products,
    head_fake,
    post_backward_fake,
    post_backward_products,
    post_fake,
    post_pre_fake,
    post_pre_products,
    post_products,
    pre_backward_fake,
    pre_backward_products,
    pre_fake,
    pre_products,
)
from dsv4.ops._mhc_gradient import (
    mhc_head_backward_reference,
    mhc_post_backward_reference,
    mhc_pre_backward_reference,
)
from dsv4.ops._registry import no_gradient, register

__all__ = [
    "mhc_head",
    "mhc_head_backward_reference",
    "mhc_head_reference",
    "mhc_post",
    "mhc_post_backward_reference",
    "mhc_post_pre",
    "mhc_post_pre_reference",
    "mhc_post_reference",
    "mhc_pre",
    "mhc_pre_backward_reference",
    "mhc_pre_reference",
    "mhc_weights_reference",
]


def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iterations: int = 20,
    rms_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sublayer's input from the residual streams, and the weights that mix its output back into them.

    m = fn r / sqrt(mean(r^2) + norm_eps), where r is all 4 streams of a token in a row, and logits = m * scale + base,
    with scale[0] for the first 4 mixes, scale[1] for the next 4 and scale[2] for the last 16. Then

        pre  = sigmoid(logits[0:4]) + hc_eps        input = sum_i pre[i] * streams[i]
        post = 2 * sigmoid(logits[4:8])
        comb = sinkhorn(logits[8:24] as [4, 4]):    softmax over the last axis + hc_eps, then columns / (sum + hc_eps);
                                                    (sinkhorn_iterations - 1) more rounds of rows, then columns, alike.

    A column is summed over the first axis of comb. Column sums come out at 1 within about 1e-6; row sums as far as the
    rounds have converged.

    Args:
        streams: [tokens, 4, hidden] bfloat16 or float32.
        fn: [24, 4 * hidden] float32. scale: [3] float32. base: [24] float32.
        norm_weight: [hidden], dtype of the streams or float32. If given, the input is cast to the dtype of the streams
            and then leaves as its RMSNorm (rms_eps) times this weight: the norm that precedes every sublayer.
    Returns:
        input [tokens, hidden] in the dtype of the streams, post [tokens, 4] float32, comb [tokens, 4, 4] float32.
    Raises:
        RuntimeError: a shape, dtype or device does not fit, an eps is negative, sinkhorn_iterations not in [1, 2^20].

    Differentiable in all tensor arguments. A token's result does not depend on the tokens beside it.
    float64 streams: mhc_pre_reference.
    """
    return torch.ops.dsv4.mhc_pre(streams, fn, scale, base, norm_weight, norm_eps, hc_eps, sinkhorn_iterations, rms_eps)


def mhc_post(sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Mixes a sublayer's output back into the residual streams.

    result[t, o] = post[t, o] * sublayer[t] + sum_i comb[t, i, o] * streams[t, i]

    Args:
        sublayer: [tokens, hidden] bfloat16 or float32.
        streams: [tokens, 4, hidden], dtype of sublayer.
        post: [tokens, 4] float32.
        comb: [tokens, 4, 4] float32; the first index is the stream read, the second the stream written.
    Returns:
        [tokens, 4, hidden] in the dtype of the streams.
    Raises:
        RuntimeError: a shape, dtype or device does not fit.

    Differentiable in all arguments. A token's result does not depend on the tokens beside it.
    float64 streams: mhc_post_reference.
    """
    return torch.ops.dsv4.mhc_post(sublayer, streams, post, comb)


def mhc_post_pre(
    sublayer: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iterations: int = 20,
    rms_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mhc_post of one sublayer and mhc_pre of the next, in one pass over the streams.

    Equals `mhc_pre(mhc_post(sublayer, streams, post, comb), fn, ...)` bit for bit: the new streams are rounded before
    the next sublayer's weights are taken from them.

    Args: as of mhc_post (sublayer, streams, post, comb) and of mhc_pre (all others).
    Returns:
        new streams [tokens, 4, hidden] and the next input [tokens, hidden] in the dtype of the streams, and the next
        post [tokens, 4] and comb [tokens, 4, 4] in float32.
    Raises:
        RuntimeError: as mhc_post and mhc_pre.

    Differentiable in all tensor arguments. float64 streams: mhc_post_pre_reference.
    """
    return torch.ops.dsv4.mhc_post_pre(
        sublayer,
        streams,
        post,
        comb,
        fn,
        scale,
        base,
        norm_weight,
        norm_eps,
        hc_eps,
        sinkhorn_iterations,
        rms_eps,
    )


def mhc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    """Collapses the streams before the final norm and the output head: the pre weights of mhc_pre alone.

    Args:
        streams: [tokens, 4, hidden] bfloat16 or float32.
        fn: [4, 4 * hidden] float32. scale: [1] float32. base: [4] float32.
    Returns:
        [tokens, hidden] in the dtype of the streams.
    Raises:
        RuntimeError: a shape, dtype or device does not fit, or an eps is negative.

    Differentiable in all tensor arguments. float64 streams: mhc_head_reference.
    """
    return torch.ops.dsv4.mhc_head(streams, fn, scale, base, norm_eps, hc_eps)


def mhc_weights_reference(
    mixes: Tensor, scale: Tensor, base: Tensor, hc_eps: float = 1e-6, sinkhorn_iterations: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and comb from the normalised mixes m of mhc_pre.

    Args: mixes [tokens, 24], scale [3], base [24], of one floating dtype.
    Returns: pre [tokens, 4], post [tokens, 4], comb [tokens, 4, 4] in that dtype.
    """
    sizes = (STREAMS, STREAMS, STREAMS * STREAMS)
    pre, post, comb = (
        m * s + b for m, s, b in zip(mixes.split(sizes, -1), scale.unbind(), base.split(sizes), strict=True)
    )
    comb = comb.unflatten(-1, (STREAMS, STREAMS)).softmax(-1) + hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    for _ in range(sinkhorn_iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    return pre.sigmoid() + hc_eps, 2 * post.sigmoid(), comb


def mhc_pre_reference(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iterations: int = 20,
    rms_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """mhc_pre in plain torch; also takes float64 streams (with float64 fn, scale, base), and then returns float64."""
    mixes = _mixes(streams, fn, norm_eps)
    pre, post, comb = mhc_weights_reference(mixes, scale, base, hc_eps, sinkhorn_iterations)
    mixed = _collapse(streams, pre)
    return (
        mixed if norm_weight is None else _rms_norm(mixed, norm_weight, rms_eps),
        post.contiguous(),
        comb.contiguous(),
    )


def mhc_post_reference(sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """mhc_post in plain torch; also takes float64 streams (with float64 post and comb), and then returns float64."""
    wide = streams.to(comb.dtype)
    result = post.unsqueeze(-1) * sublayer.to(comb.dtype).unsqueeze(-2)
    for read in range(STREAMS):
        result = result + comb[:, read, :, None] * wide[:, read, None, :]
    return result.to(streams.dtype)


def mhc_post_pre_reference(
    sublayer: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iterations: int = 20,
    rms_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mhc_post_pre in plain torch: mhc_post_reference, then mhc_pre_reference."""
    new = mhc_post_reference(sublayer, streams, post, comb)
    return (
        new,
        *mhc_pre_reference(new, fn, scale, base, norm_weight, norm_eps, hc_eps, sinkhorn_iterations, rms_eps),
    )


def mhc_head_reference(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    """mhc_head in plain torch; also takes float64 streams (with float64 fn, scale, base), and then returns float64."""
    pre = (_mixes(streams, fn, norm_eps) * scale + base).sigmoid() + hc_eps
    return _collapse(streams, pre)


def _mixes(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """fn r / rms(r). Sums over the hidden width run in float64, so that a token's bits depend on that token alone."""
    flat = streams.flatten(1)
    mean_square = flat.double().square().mean(-1, keepdim=True).to(fn.dtype)
    return exact_matmul(flat, fn.t(), fn.dtype) * torch.rsqrt(mean_square + norm_eps)


def _collapse(streams: Tensor, pre: Tensor) -> Tensor:
    wide = streams.to(pre.dtype)
    mixed = pre[:, 0, None] * wide[:, 0]
    for read in range(1, STREAMS):
        mixed = mixed + pre[:, read, None] * wide[:, read]
    return mixed.to(streams.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    mean_square = wide.double().square().mean(-1, keepdim=True).to(wide.dtype)
    return (wide * torch.rsqrt(mean_square + eps) * weight.to(wide.dtype)).to(x.dtype)


def _save_pre(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _pre_gradients(
    ctx: Any,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_residual: Tensor | None,
    saved: tuple[Any, ...],
    needs_fn: bool,
) -> tuple[Tensor | None, ...]:
    norm_weight = saved[4]
    streams, fn, scale, base, norm = torch.ops.dsv4.mhc_pre_backward(
        *grads, grad_residual, *saved, *ctx.settings, needs_fn
    )
    return (
        streams, fn if needs_fn else None, scale, base, None if norm_weight is None else norm.to(norm_weight.dtype)
    )  # fmt: skip


def _pre_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _pre_gradients(ctx, grads, None, ctx.saved_tensors, ctx.needs_input_grad[1])  # type: ignore[arg-type]
    return (*gradients, None, None, None, None)


def _save_post(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _post_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ops.dsv4.mhc_post_backward(grad, *ctx.saved_tensors))


def _save_post_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], output[0])
    ctx.settings = inputs[8:]


def _post_pre_backward(
    ctx: Any, grad_new: Tensor, grad_input: Tensor, grad_post: Tensor, grad_comb: Tensor
) -> tuple[Tensor | None, ...]:
    *post_arguments, fn, scale, base, norm_weight, new = ctx.saved_tensors
    grad_new, *others = _pre_gradients(  # type: ignore[assignment]
        ctx, (grad_input, grad_post, grad_comb), grad_new, (new, fn, scale, base, norm_weight), ctx.needs_input_grad[4]
    )
    return (*torch.ops.dsv4.mhc_post_backward(grad_new, *post_arguments), *others, None, None, None, None)


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _head_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_fn = ctx.needs_input_grad[1]
    streams, fn, scale, base = torch.ops.dsv4.mhc_head_backward(grad, *ctx.saved_tensors, *ctx.settings, needs_fn)
    return streams, fn if needs_fn else None, scale, base, None, None


_MIXING = "Tensor fn, Tensor scale, Tensor base"
_PRE_SETTINGS = "float norm_eps=1e-06, float hc_eps=1e-06, int sinkhorn_iterations=20, float rms_eps=1e-06"

register(
    f"mhc_pre(Tensor streams, {_MIXING}, Tensor? norm_weight=None, {_PRE_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    mhc_pre_reference,
    check=check_pre,
    fake=pre_fake,
    backward=_pre_backward,
    setup_context=_save_pre,
    products=pre_products,
)
register(
    "mhc_post(Tensor sublayer, Tensor streams, Tensor post, Tensor comb) -> Tensor",
    mhc_post_reference,
    check=check_post,
    fake=post_fake,
    backward=_post_backward,
    setup_context=_save_post,
    products=post_products,
)
register(
    f"mhc_post_pre(Tensor sublayer, Tensor streams, Tensor post, Tensor comb, {_MIXING}, Tensor? norm_weight=None, "
    f"{_PRE_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    mhc_post_pre_reference,
    check=check_post_pre,
    fake=post_pre_fake,
    backward=_post_pre_backward,
    setup_context=_save_post_pre,
    products=post_pre_products,
)
register(
    f"mhc_head(Tensor streams, {_MIXING}, float norm_eps=1e-06, float hc_eps=1e-06) -> Tensor",
    mhc_head_reference,
    check=check_head,
    fake=head_fake,
    backward=_head_backward,
    setup_context=_save_head,
    products=pre_products,
)


def _register_backward(schema: str, reference: Any, check: Any, fake: Any, products: Any) -> None:
    name = schema.split("(", 1)[0]
    backward, setup_context = no_gradient(name, "take second derivatives through the *_reference functions")
    register(
        schema,
        reference,
        check=check,
        fake=fake,
        backward=backward,
        setup_context=setup_context,
        products=products,
    )


_register_backward(
    "mhc_post_backward(Tensor grad_result, Tensor sublayer, Tensor streams, Tensor post, Tensor comb) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    mhc_post_backward_reference,
    check_post_backward,
    post_backward_fake,
    post_backward_products,
)
_register_backward(
    "mhc_pre_backward(Tensor grad_input, Tensor grad_post, Tensor grad_comb, Tensor? grad_residual, Tensor streams, "
    f"{_MIXING}, Tensor? norm_weight, float norm_eps, float hc_eps, int sinkhorn_iterations, float rms_eps, "
    "bool needs_fn=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    mhc_pre_backward_reference,
    check_pre_backward,
    pre_backward_fake,
    pre_backward_products,
)
_register_backward(
    f"mhc_head_backward(Tensor grad_output, Tensor streams, {_MIXING}, float norm_eps, float hc_eps, "
    "bool needs_fn=True) -> (Tensor, Tensor, Tensor, Tensor)",
    mhc_head_backward_reference,
    check_head_backward,
    head_backward_fake,
    head_backward_products,
)
