"""Argument checks of the mHC ops, in the words of csrc/torch/mhc.cpp, their fake kernels, and the multiply-adds that
their products take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.ops._check import KERNEL_FLOATS, Check

STREAMS = 4
MIXES = 2 * STREAMS + STREAMS * STREAMS  # pre, post, comb

_F32 = (torch.float32,)


def _check_streams(check: Check, streams: Tensor) -> tuple[int, int]:
    tokens, _, hidden = check.tensor("streams", streams, KERNEL_FLOATS, ("tokens", STREAMS, "hidden"))
    check.that(hidden >= 1, f"hidden must be at least 1, got {hidden}")
    return tokens, hidden


def _check_post_arguments(check: Check, sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> None:
    tokens, hidden = _check_streams(check, streams)
    check.tensor("sublayer", sublayer, (streams.dtype,), (tokens, hidden))
    check.tensor("post", post, _F32, (tokens, STREAMS))
    check.tensor("comb", comb, _F32, (tokens, STREAMS, STREAMS))


def _check_mixing(
    check: Check,
    hidden: int,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    hc_eps: float,
    head: bool = False,
) -> None:
    mixes, scales = (STREAMS, 1) if head else (MIXES, 3)
    check.tensor("fn", fn, _F32, (mixes, STREAMS * hidden))
    check.tensor("scale", scale, _F32, (scales,))
    check.tensor("base", base, _F32, (mixes,))
    _check_eps(check, "norm_eps", norm_eps)
    _check_eps(check, "hc_eps", hc_eps)


def _check_eps(check: Check, name: str, eps: float) -> None:
    check.that(0 <= eps < float("inf"), f"{name} must be finite and not negative, got {eps:g}")


def _check_norm(
    check: Check, streams: Tensor, norm_weight: Tensor | None, sinkhorn_iterations: int, rms_eps: float
) -> None:
    dtypes = _F32 if streams.dtype == torch.float32 else (streams.dtype, torch.float32)
    check.optional("norm_weight", norm_weight, dtypes, (streams.shape[2],))
    most = 1 << 20
    check.that(
        1 <= sinkhorn_iterations <= most, f"sinkhorn_iterations must be from 1 to {most}, got {sinkhorn_iterations}"
    )
    _check_eps(check, "rms_eps", rms_eps)


def check_pre(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    sinkhorn_iterations: int = 20,
    rms_eps: float = 1e-6,
) -> None:
    check = Check("mhc_pre")
    _, hidden = _check_streams(check, streams)
    _check_mixing(check, hidden, fn, scale, base, norm_eps, hc_eps)
    _check_norm(check, streams, norm_weight, sinkhorn_iterations, rms_eps)


def check_post(sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> None:
    _check_post_arguments(Check("mhc_post"), sublayer, streams, post, comb)


def check_post_pre(
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
) -> None:
    check = Check("mhc_post_pre")
    _check_post_arguments(check, sublayer, streams, post, comb)
    _check_mixing(check, streams.shape[2], fn, scale, base, norm_eps, hc_eps)
    _check_norm(check, streams, norm_weight, sinkhorn_iterations, rms_eps)


def check_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> None:
    check = Check("mhc_head")
    _, hidden = _check_streams(check, streams)
    _check_mixing(check, hidden, fn, scale, base, norm_eps, hc_eps, head=True)


def pre_fake(streams: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _streams, hidden = streams.shape
    return (
        streams.new_empty(tokens, hidden),
        streams.new_empty(tokens, STREAMS, dtype=torch.float32),
        streams.new_empty(tokens, STREAMS, STREAMS, dtype=torch.float32),
    )


def post_fake(sublayer: Tensor, streams: Tensor, *_: Any, **__: Any) -> Tensor:
    return streams.new_empty(streams.shape)


def post_pre_fake(sublayer: Tensor, streams: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (post_fake(sublayer, streams), *pre_fake(streams))


def head_fake(streams: Tensor, *_: Any, **__: Any) -> Tensor:
    return streams.new_empty(streams.shape[0], streams.shape[2])


def check_post_backward(grad_result: Tensor, sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> None:
    check = Check("mhc_post_backward")
    _check_post_arguments(check, sublayer, streams, post, comb)
    check.tensor("grad_result", grad_result, (streams.dtype,), tuple(streams.shape))


def check_pre_backward(
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
) -> None:
    check = Check("mhc_pre_backward")
    tokens, hidden = _check_streams(check, streams)
    check.tensor("grad_input", grad_input, (streams.dtype,), (tokens, hidden))
    check.tensor("grad_post", grad_post, _F32, (tokens, STREAMS))
    check.tensor("grad_comb", grad_comb, _F32, (tokens, STREAMS, STREAMS))
    check.optional("grad_residual", grad_residual, (streams.dtype,), (tokens, STREAMS, hidden))
    _check_mixing(check, hidden, fn, scale, base, norm_eps, hc_eps)
    _check_norm(check, streams, norm_weight, sinkhorn_iterations, rms_eps)


def check_head_backward(
    grad_output: Tensor,
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    hc_eps: float,
    needs_fn: bool = True,
) -> None:
    check = Check("mhc_head_backward")
    tokens, hidden = _check_streams(check, streams)
    check.tensor("grad_output", grad_output, (streams.dtype,), (tokens, hidden))
    _check_mixing(check, hidden, fn, scale, base, norm_eps, hc_eps, head=True)


def post_backward_fake(
    grad_result: Tensor, sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        sublayer.new_empty(sublayer.shape),
        streams.new_empty(streams.shape),
        post.new_empty(post.shape),
        comb.new_empty(comb.shape),
    )


def pre_backward_fake(
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
    return (
        streams.new_empty(streams.shape),
        fn.new_empty(fn.shape if needs_fn else 0),
        scale.new_empty(scale.shape),
        base.new_empty(base.shape),
        fn.new_empty(0 if norm_weight is None else streams.shape[2]),
    )


def head_backward_fake(
    grad_output: Tensor,
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    hc_eps: float,
    needs_fn: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        streams.new_empty(streams.shape),
        fn.new_empty(fn.shape if needs_fn else 0),
        scale.new_empty(scale.shape),
        base.new_empty(base.shape),
    )


def pre_products(streams: Sequence[int], fn: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the streams with fn, and of pre with the streams; the same for mhc_head."""
    return math.prod(streams) * (fn[0] + 1)


def post_products(sublayer: Sequence[int], streams: Sequence[int], *_: Any, **__: Any) -> int:
    """Of comb with the streams, and of post with the sublayer's output."""
    return math.prod(streams) * (STREAMS + 1)


def post_pre_products(
    sublayer: Sequence[int],
    streams: Sequence[int],
    post: Sequence[int],
    comb: Sequence[int],
    fn: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return post_products(sublayer, streams) + pre_products(streams, fn)


def post_backward_products(grad: Sequence[int], *arguments: Sequence[int]) -> int:
    """Into each of the two factors of each product."""
    sublayer, streams, *_ = arguments
    return 2 * post_products(sublayer, streams)


def pre_backward_products(
    grad_input: Sequence[int],
    grad_post: Sequence[int],
    grad_comb: Sequence[int],
    grad_residual: Sequence[int] | None,
    streams: Sequence[int],
    fn: Sequence[int],
    scale: Sequence[int],
    base: Sequence[int],
    norm_weight: Sequence[int] | None,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iterations: int,
    rms_eps: float,
    needs_fn: bool = True,
) -> int:
    """The mixes again, and the input where it has a norm; then into each of the two factors of both products."""
    again = fn[0] + (norm_weight is not None)
    return math.prod(streams) * (again - (not needs_fn) * fn[0]) + 2 * pre_products(streams, fn)


def head_backward_products(
    grad: Sequence[int],
    streams: Sequence[int],
    fn: Sequence[int],
    scale: Sequence[int],
    base: Sequence[int],
    norm_eps: float,
    hc_eps: float,
    needs_fn: bool = True,
) -> int:
    return math.prod(streams) * needs_fn * fn[0] + 2 * pre_products(streams, fn)
