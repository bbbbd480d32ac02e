"""RMS norm, rotary embedding, and the store of window rows.

The last `rope_dim` dims of a head are rotated, in interleaved pairs (x[2i], x[2i + 1]). A table `rope` holds (cos, sin)
of each row: [tokens, rope_dim / 2, 2].
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4.ops._check import FLOAT32_OR_64, FLOATS, INTEGERS, KERNEL_FLOATS, Check
from dsv4.ops._registry import register
from dsv4.ops.layout import check_row_pages, locate, owners, write_rows

__all__ = [
    "Yarn",
    "apply_rope",
    "apply_rope_reference",
    "kv_norm_rope",
    "kv_norm_rope_backward_reference",
    "kv_norm_rope_reference",
    "query_norm_rope",
    "query_norm_rope_backward_reference",
    "query_norm_rope_reference",
    "rms_norm",
    "rms_norm_backward_reference",
    "rms_norm_reference",
    "rope_frequencies",
    "rope_rows",
    "rope_rows_reference",
    "store_window",
    "store_window_reference",
]


class Yarn(Protocol):
    """Context extension by YaRN: what `rope_frequencies` reads of a configuration."""

    @property
    def factor(self) -> float: ...
    @property
    def original_max_position_embeddings(self) -> int: ...
    @property
    def beta_fast(self) -> float: ...
    @property
    def beta_slow(self) -> float: ...


def rope_frequencies(rope_dim: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """Angle a position adds to each pair: theta^(-2i / rope_dim), float32 [rope_dim / 2] on the CPU.

    YaRN divides by `factor` the frequencies that turn fewer than `beta_slow` times within
    `original_max_position_embeddings`, keeps those that turn more than `beta_fast` times, and blends linearly between.
    Its attention factor is not applied: V4 has none.

    Raises: ValueError when rope_dim is not even and positive.
    Source: YaRN (Peng et al., 2023), as in the official inference code.
    """
    if rope_dim < 2 or rope_dim % 2:
        raise ValueError(f"rope_frequencies: rope_dim must be even and positive, got {rope_dim}")
    inverse = 1.0 / (theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32, device="cpu") / rope_dim))
    if yarn is None:
        return inverse

    def dim_of(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope_dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), rope_dim - 1)
    width = max(high - low, 0.001)
    blend = ((torch.arange(rope_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    keep = 1 - blend
    return inverse / yarn.factor * (1 - keep) + inverse * keep


def rope_rows(position: Tensor, inv_freq: Tensor) -> Tensor:
    """(cos, sin) of each position, the table `rope` of the other ops.

    The angle is position * inv_freq rounded to the dtype of inv_freq, as the official tables have it; cos and sin are
    computed in float64 and rounded once.

    Args:
        position: [tokens] int32 or int64.
        inv_freq: [rope_dim / 2] float32 or float64, see rope_frequencies.
    Returns: [tokens, rope_dim / 2, 2] in the dtype of inv_freq.
    Raises: RuntimeError where a shape, dtype or device differs from the above.
    """
    op = torch.ops.dsv4.rope_rows if inv_freq.dtype == torch.float32 else torch.ops.dsv4._rope_rows_reference
    return op(position, inv_freq)


def rope_rows_reference(position: Tensor, inv_freq: Tensor) -> Tensor:
    angle = (position.to(inv_freq.dtype).unsqueeze(-1) * inv_freq).double()
    return torch.stack((angle.cos(), angle.sin()), -1).to(inv_freq.dtype)


def _check_rope_rows(position: Tensor, inv_freq: Tensor) -> None:
    check = Check("rope_rows")
    check.tensor("position", position, INTEGERS, ("tokens",))
    check.tensor("inv_freq", inv_freq, FLOAT32_OR_64, ("rope_dim / 2",))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; float64 inside, one rounding to the dtype of x.

    Args:
        x:      [..., n] bfloat16, float32 or float64.
        weight: [n] bfloat16, float32 or float64, or None.
    Returns: like x. Differentiable.
    Raises: RuntimeError where a shape, dtype or device differs from the above.
    """
    kernel = x.dtype in KERNEL_FLOATS and (weight is None or weight.dtype in KERNEL_FLOATS)
    op = torch.ops.dsv4.rms_norm if kernel else torch.ops.dsv4._rms_norm_reference
    return op(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    wide = x.double()
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y if weight is None else y * weight.double()).to(x.dtype).contiguous()


def _check_rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> None:
    check = Check("rms_norm")
    shape = check.tensor("x", x, FLOATS, (..., "n"))
    check.optional("weight", weight, FLOATS, (shape[-1],))


def norm_gradient(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight of an RMS norm without its rounding, in float64; that of no weight is
    empty."""
    wide, weighted = x.double(), grad.double() if weight is None else grad.double() * weight.double()
    square = wide.square().mean(-1, keepdim=True) + eps
    along = (weighted * wide).mean(-1, keepdim=True) * square.pow(-1.5)
    grad_x = weighted * square.rsqrt() - wide * along
    if weight is None:
        return grad_x, wide.new_empty(0)
    return grad_x, (grad.double() * wide * square.rsqrt()).unsqueeze(0).flatten(0, -2).sum(0)


def rms_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The gradients of rms_norm in x and weight (empty where there is none), for which rounding is the identity."""
    grad_x, grad_weight = norm_gradient(grad, x, weight, eps)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(x.dtype if weight is None else weight.dtype)


def _check_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> None:
    check = Check("rms_norm_backward")
    shape = check.tensor("x", x, FLOATS, (..., "n"))
    check.tensor("grad", grad, (x.dtype,), tuple(shape))
    check.optional("weight", weight, FLOATS, (shape[-1],))


def apply_rope(x: Tensor, rope: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last 2 * rope.shape[1] dims of each row, or of each head of each row; the other dims pass.

    Args:
        x:       [tokens, head_dim] or [tokens, heads, head_dim] bfloat16, float32 or float64.
        rope:    [tokens, rope_dim / 2, 2] float32 or float64, (cos, sin).
        inverse: rotate back.
    Returns: like x, rounded once. Differentiable in x.
    Raises: RuntimeError where a shape, dtype or device differs from the above, or a gradient of rope is wanted.
    """
    kernel = x.dtype in KERNEL_FLOATS and rope.dtype == torch.float32 and x.dim() in (2, 3)
    op = torch.ops.dsv4.apply_rope if kernel else torch.ops.dsv4._apply_rope_reference
    return op(x, rope, inverse)


def apply_rope_reference(x: Tensor, rope: Tensor, inverse: bool = False) -> Tensor:
    width = 2 * rope.shape[1]
    cos, sin = rope.double().unbind(-1)
    if inverse:
        sin = -sin
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    passed, rotated = x.split((x.shape[-1] - width, width), -1)
    even, odd = rotated.double().unflatten(-1, (width // 2, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((passed, turned.to(x.dtype)), -1)


def _check_apply_rope(x: Tensor, rope: Tensor, inverse: bool = False) -> None:
    check = Check("apply_rope")
    check.that(x.dim() in (2, 3), f"x must be [tokens, head_dim] or [tokens, heads, head_dim], got {list(x.shape)}")
    shape = check.tensor("x", x, FLOATS, (..., "head_dim"))
    check_rope(check, rope, shape[0], shape[-1])


def query_norm_rope(q: Tensor, rope: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS norm of each head without a weight, then the rotary embedding.

    The norm follows the official program step by step: squares, their mean, its inverse root and the product are each
    rounded to the dtype of q. In bfloat16 that moves a head by up to 0.6 %, more than any other rounding on its way, so
    the steps are part of the definition.

    Args:
        q:    [tokens, heads, head_dim] bfloat16, float32 or float64.
        rope: [tokens, rope_dim / 2, 2] float32 or float64, (cos, sin).
    Returns: like q. Differentiable in q.
    Raises: RuntimeError where a shape, dtype or device differs from the above, or a gradient of rope is wanted.
    Source: the official inference code.
    """
    kernel = q.dtype in KERNEL_FLOATS and rope.dtype == torch.float32
    op = torch.ops.dsv4.query_norm_rope if kernel else torch.ops.dsv4._query_norm_rope_reference
    return op(q, rope, eps)


def query_norm_rope_reference(q: Tensor, rope: Tensor, eps: float = 1e-6) -> Tensor:
    def rounded(value: Tensor) -> Tensor:
        return value.to(q.dtype).double()

    wide = q.double()
    mean = rounded(rounded(wide.square()).mean(-1, keepdim=True))
    inverse_root = rounded(rounded(mean + eps).rsqrt())
    return apply_rope_reference((wide * inverse_root).to(q.dtype), rope)


def _check_query_norm_rope(q: Tensor, rope: Tensor, eps: float = 1e-6) -> None:
    check = Check("query_norm_rope")
    tokens, _, head_dim = check.tensor("q", q, FLOATS, ("tokens", "heads", "head_dim"))
    check_rope(check, rope, tokens, head_dim)


def query_norm_rope_backward_reference(grad: Tensor, q: Tensor, rope: Tensor, eps: float = 1e-6) -> Tensor:
    """The gradient of query_norm_rope, for which every rounding is the identity."""

    def rounded(value: Tensor) -> Tensor:
        return value.to(q.dtype).double()

    wide = q.double()
    mean = rounded(rounded(rounded(wide.square()).mean(-1, keepdim=True)) + eps)
    turned = apply_rope_reference(grad.double(), rope, inverse=True)
    along = (turned * wide).mean(-1, keepdim=True) * mean.pow(-1.5)
    return (turned * rounded(mean.rsqrt()) - wide * along).to(q.dtype)


def _check_query_norm_rope_backward(grad: Tensor, q: Tensor, rope: Tensor, eps: float = 1e-6) -> None:
    check = Check("query_norm_rope_backward")
    tokens, heads, head_dim = check.tensor("q", q, FLOATS, ("tokens", "heads", "head_dim"))
    check.tensor("grad", grad, (q.dtype,), (tokens, heads, head_dim))
    check_rope(check, rope, tokens, head_dim)


def kv_norm_rope(kv: Tensor, weight: Tensor, rope: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS norm with a weight, rounded to the dtype of kv, then the rotary embedding: the rows that attention reads.

    Args:
        kv:     [tokens, head_dim] bfloat16, float32 or float64.
        weight: [head_dim] bfloat16, float32 or float64.
        rope:   [tokens, rope_dim / 2, 2] float32 or float64, (cos, sin).
    Returns: like kv. Differentiable in kv and weight.
    Raises: RuntimeError where a shape, dtype or device differs from the above, or a gradient of rope is wanted.
    Source: the official inference code.
    """
    kernel = kv.dtype in KERNEL_FLOATS and weight.dtype in KERNEL_FLOATS and rope.dtype == torch.float32
    op = torch.ops.dsv4.kv_norm_rope if kernel else torch.ops.dsv4._kv_norm_rope_reference
    return op(kv, weight, rope, eps)


def kv_norm_rope_reference(kv: Tensor, weight: Tensor, rope: Tensor, eps: float = 1e-6) -> Tensor:
    return apply_rope_reference(rms_norm_reference(kv, weight, eps), rope)


def _check_kv_norm_rope(kv: Tensor, weight: Tensor, rope: Tensor, eps: float = 1e-6) -> None:
    _check_kv(Check("kv_norm_rope"), kv, weight, rope)


def kv_norm_rope_backward_reference(
    grad: Tensor, kv: Tensor, weight: Tensor, rope: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The gradients of kv_norm_rope in kv and weight, for which rounding is the identity."""
    grad_kv, grad_weight = norm_gradient(apply_rope_reference(grad.double(), rope, inverse=True), kv, weight, eps)
    return grad_kv.to(kv.dtype), grad_weight.to(weight.dtype)


def _check_kv_norm_rope_backward(grad: Tensor, kv: Tensor, weight: Tensor, rope: Tensor, eps: float = 1e-6) -> None:
    check = Check("kv_norm_rope_backward")
    tokens, head_dim = _check_kv(check, kv, weight, rope)
    check.tensor("grad", grad, (kv.dtype,), (tokens, head_dim))


def store_window(
    kv: Tensor,
    weight: Tensor,
    rope: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    position: Tensor,
    eps: float = 1e-6,
    page_size: int = 256,
) -> None:
    """Write kv_norm_rope(kv, weight, rope, eps) into the window's pages, in place.

    Row t goes to page table[sequence[t], position[t] // page_size], offset position[t] % page_size. Where the table
    says -1, or has no such column, the row is dropped. uint8 pages quantise the dims before rope to e4m3 in blocks of
    64 (`dsv4.ops.layout` has the bytes); others store the row in their dtype.

    Args:
        kv:       [tokens, head_dim] bfloat16, float32 or float64.
        weight:   [head_dim] bfloat16, float32 or float64.
        rope:     [tokens, rope_dim / 2, 2] float32 or float64, (cos, sin).
        pages:    uint8 [pages, bytes] or float [pages, page_size, head_dim]; written.
        table:    [sequences, blocks] int32, physical pages.
        sequence: [tokens] int32, row of the table; int64 too, by the definition alone.
        position: [tokens] likewise; the row of one below 0 is dropped.
        page_size: rows of a page.
    Raises: RuntimeError where a shape, dtype or device differs from the above, pages is expanded, a sequence is not a
        row of the table, or a gradient of an argument is wanted: nothing can be differentiated through what is stored.
    """
    kernel = (
        kv.dtype in KERNEL_FLOATS
        and weight.dtype in KERNEL_FLOATS
        and rope.dtype == torch.float32
        and pages.dtype in (torch.uint8, *KERNEL_FLOATS)
        and sequence.dtype == torch.int32
        and position.dtype == torch.int32
    )
    op = torch.ops.dsv4.store_window if kernel else torch.ops.dsv4._store_window_reference
    op(kv, weight, rope, pages, table, sequence, position, eps, page_size)


def store_window_reference(
    kv: Tensor,
    weight: Tensor,
    rope: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    position: Tensor,
    eps: float = 1e-6,
    page_size: int = 256,
) -> None:
    rows = kv_norm_rope_reference(kv, weight, rope, eps)
    owners("store_window", sequence, table)
    page, offset = locate(table, sequence, position, page_size)
    write_rows(pages, rows, page, offset, page_size, 2 * rope.shape[1])


def _check_store_window(
    kv: Tensor,
    weight: Tensor,
    rope: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    position: Tensor,
    eps: float = 1e-6,
    page_size: int = 256,
) -> None:
    check = Check("store_window")
    tokens, head_dim = _check_kv(check, kv, weight, rope)
    check_row_pages(check, "pages", pages, page_size, head_dim, 2 * rope.shape[1])
    check.written("pages", pages)
    check.tensor("table", table, (torch.int32,), ("sequences", "blocks"))
    check.tensor("sequence", sequence, INTEGERS, (tokens,))
    check.tensor("position", position, INTEGERS, (tokens,))


def _check_kv(check: Check, kv: Tensor, weight: Tensor, rope: Tensor) -> tuple[int, int]:
    tokens, head_dim = check.tensor("kv", kv, FLOATS, ("tokens", "head_dim"))
    check.tensor("weight", weight, FLOATS, (head_dim,))
    check_rope(check, rope, tokens, head_dim)
    return tokens, head_dim


def check_rope(check: Check, rope: Tensor, tokens: int, head_dim: int) -> None:
    pairs = check.tensor("rope", rope, FLOAT32_OR_64, (tokens, "rope_dim / 2", 2))[1]
    check.that(2 * pairs <= head_dim, f"rope must have at most {head_dim // 2} pairs, got {pairs}")


def refuse_rope(op: str, ctx: Any, argument: int) -> None:
    if ctx.needs_input_grad[argument]:
        raise RuntimeError(f"{op}: rope has no gradient; detach it")


def _rms_norm_backward(op: str, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = getattr(torch.ops.dsv4, op)(grad, x, weight, ctx.eps)
    return grad_x, None if weight is None else grad_weight, None


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _kv_backward(op: str, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    refuse_rope("kv_norm_rope", ctx, 2)
    return *getattr(torch.ops.dsv4, op)(grad, *ctx.saved_tensors, ctx.eps), None, None


def _kv_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    kv, weight, rope, ctx.eps = inputs
    ctx.save_for_backward(kv, weight, rope)


def _query_backward(op: str, ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    refuse_rope("query_norm_rope", ctx, 1)
    return getattr(torch.ops.dsv4, op)(grad, *ctx.saved_tensors, ctx.eps), None, None


def _query_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, rope, ctx.eps = inputs
    ctx.save_for_backward(q, rope)


def _apply_rope_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    refuse_rope("apply_rope", ctx, 1)
    (rope,) = ctx.saved_tensors
    return apply_rope(grad, rope, not ctx.inverse), None, None


def _apply_rope_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rope, ctx.inverse = inputs
    ctx.save_for_backward(rope)


for _prefix, _suffix in (("", ""), ("_", "_reference")):  # the second takes float64, which kernels do not
    register(
        f"{_prefix}rms_norm{_suffix}(Tensor x, Tensor? weight=None, float eps=1e-06) -> Tensor",
        rms_norm_reference,
        check=_check_rms_norm,
        backward=partial(_rms_norm_backward, f"{_prefix}rms_norm_backward{_suffix}"),
        setup_context=_rms_norm_context,
    )
    register(
        f"{_prefix}rms_norm_backward{_suffix}(Tensor grad, Tensor x, Tensor? weight=None, float eps=1e-06) -> "
        "(Tensor, Tensor)",
        rms_norm_backward_reference,
        check=_check_rms_norm_backward,
        recompute=True,
    )
    register(
        f"{_prefix}rope_rows{_suffix}(Tensor position, Tensor inv_freq) -> Tensor",
        rope_rows_reference,
        check=_check_rope_rows,
        recompute=True,
    )
    register(
        f"{_prefix}apply_rope{_suffix}(Tensor x, Tensor rope, bool inverse=False) -> Tensor",
        apply_rope_reference,
        check=_check_apply_rope,
        backward=_apply_rope_backward,
        setup_context=_apply_rope_context,
    )
    register(
        f"{_prefix}query_norm_rope{_suffix}(Tensor q, Tensor rope, float eps=1e-06) -> Tensor",
        query_norm_rope_reference,
        check=_check_query_norm_rope,
        backward=partial(_query_backward, f"{_prefix}query_norm_rope_backward{_suffix}"),
        setup_context=_query_context,
    )
    register(
        f"{_prefix}query_norm_rope_backward{_suffix}(Tensor grad, Tensor q, Tensor rope, float eps=1e-06) -> Tensor",
        query_norm_rope_backward_reference,
        check=_check_query_norm_rope_backward,
        recompute=True,
    )
    register(
        f"{_prefix}kv_norm_rope{_suffix}(Tensor kv, Tensor weight, Tensor rope, float eps=1e-06) -> Tensor",
        kv_norm_rope_reference,
        check=_check_kv_norm_rope,
        backward=partial(_kv_backward, f"{_prefix}kv_norm_rope_backward{_suffix}"),
        setup_context=_kv_context,
    )
    register(
        f"{_prefix}kv_norm_rope_backward{_suffix}(Tensor grad, Tensor kv, Tensor weight, Tensor rope, "
        "float eps=1e-06) -> (Tensor, Tensor)",
        kv_norm_rope_backward_reference,
        check=_check_kv_norm_rope_backward,
        recompute=True,
    )
    register(
        f"{_prefix}store_window{_suffix}(Tensor kv, Tensor weight, Tensor rope, Tensor(a!) pages, Tensor table, "
        "Tensor sequence, Tensor position, float eps=1e-06, int page_size=256) -> ()",
        store_window_reference,
        check=_check_store_window,
        fake=lambda *args, **kwargs: None,
    )
