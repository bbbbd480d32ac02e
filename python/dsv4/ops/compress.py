"""The KV compressor: every `ratio` raw positions become one entry, in compressed sparse attention with an overlap."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.ops._check import FLOAT32_OR_64, FLOATS, KERNEL_FLOATS, Check
from dsv4.ops._registry import register
from dsv4.ops.layout import check_key_pages, check_row_pages, locate, owners, write_keys, write_rows
from dsv4.ops.norm_rope import apply_rope_reference, check_rope, norm_gradient, refuse_rope, rms_norm_reference
from dsv4.ops.quantize import hadamard_reference

__all__ = [
    "compress",
    "compress_entries",
    "compress_entries_backward_reference",
    "compress_entries_reference",
    "compress_reference",
]

# Elements of the largest temporary of a block of entries; it bounds memory, never changes a result.
_BLOCK_ELEMENTS = 1 << 22
# What the CUDA kernel holds of an entry, and of a key.
_MOST_CUDA_DIMS, _MOST_CUDA_KEY_DIMS = 8192, 1024


def compress(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    state: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    position: Tensor,
    ratio: int,
    eps: float = 1e-6,
    page_size: int = 64,
    rotate: bool = False,
) -> None:
    """Take in rows of any number of sequences, in chunks of any length; write each entry that a row completes.

    Entry j of a sequence covers the raw positions `ratio * j ... ratio * j + ratio - 1`; the row at the last of them
    writes it. Channel by channel it is `sum_p softmax_p(gate[p] + ape[p % ratio]) * kv[p]`. Without overlap (c = 1),
    p runs over the entry's own positions. With overlap (c = 2), kv and gate have two sets of head_dim channels, and p
    runs over the previous entry's positions with the first set and over the own ones with the second; entry 0 has no
    previous ones. The sum is accumulated in float64, cast to norm_weight's dtype, RMS-normalised, rotated by `rope`,
    then by the Hadamard matrix if `rotate`, and stored as the pool's format says. An entry whose table entry is -1,
    or past the table, is not written.

    `state` keeps the last rows of each sequence: slot p % ring holds kv and gate + ape of position p. After the older
    ones have been read, the call's rows replace the slots of its last `ring` positions.

    Args:
        kv, gate: [tokens, c * head_dim] float32 or float64, c = 1 or 2. Sequences one after another, positions
            ascending by one.
        ape: [ratio, c * head_dim] in kv's dtype, the position bias of the gate.
        norm_weight: [head_dim] bfloat16, float32 or float64.
        rope: [tokens, rope_dim / 2, 2] float32 or float64: (cos, sin) at the first position of the block that
            each row belongs to, `position // ratio * ratio`.
        state: [sequences, ring, 2, c * head_dim] in kv's dtype, written. ring >= c * ratio.
        pages: pool of rows, or with `rotate` of index keys (see layout), written.
        table: int32 [sequences, blocks], page of each `page_size` entries, -1 = not stored.
        sequence, position: int32 [tokens].
        ratio: raw positions an entry stands for.
        page_size: entries of a page.
        rotate: index keys: Hadamard rotation, and the pool's format is one of keys.
    Raises: RuntimeError naming the argument, what it must be and what it was, or where a gradient of one is wanted:
        compress_entries has them.
    Source: DeepSeek-V4 report, 2.3; the official inference code (Compressor).
    """
    kernel = _has_kernel(kv, norm_weight, rope, ratio, rotate) and pages.dtype in (torch.uint8, *KERNEL_FLOATS)
    op = torch.ops.dsv4.compress if kernel else torch.ops.dsv4._compress_reference
    op(kv, gate, ape, norm_weight, rope, state, pages, table, sequence, position, ratio, eps, page_size, rotate)


def _has_kernel(kv: Tensor, norm_weight: Tensor, rope: Tensor, ratio: int, rotate: bool) -> bool:
    most = _MOST_CUDA_KEY_DIMS if rotate else _MOST_CUDA_DIMS
    held = not kv.is_cuda or (norm_weight.shape[-1:].numel() <= most and ratio <= 1 << 24)
    return held and kv.dtype == torch.float32 and norm_weight.dtype in KERNEL_FLOATS and rope.dtype == torch.float32


def compress_entries(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    ratio: int,
    eps: float = 1e-6,
    rotate: bool = False,
) -> Tensor:
    """The entries of one whole sequence from position 0, unquantised: what `compress` writes, as a differentiable
    function.

    Args:
        kv, gate: [tokens, c * head_dim] float32 or float64, c = 1 or 2. A remainder of tokens % ratio rows gives no
            entry.
        ape: [ratio, c * head_dim] in kv's dtype.
        norm_weight: [head_dim] bfloat16, float32 or float64.
        rope: [entries, rope_dim / 2, 2] float32 or float64, (cos, sin) at `ratio * j`; entries = tokens // ratio.
    Returns: [entries, head_dim] in norm_weight's dtype. Differentiable in kv, gate, ape and norm_weight.
    Raises: RuntimeError naming the argument, what it must be and what it was, or where a gradient of rope is wanted.
    """
    kernel = _has_kernel(kv, norm_weight, rope, ratio, rotate)
    op = torch.ops.dsv4.compress_entries if kernel else torch.ops.dsv4._compress_entries_reference
    return op(kv, gate, ape, norm_weight, rope, ratio, eps, rotate)


def compress_entries_reference(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    ratio: int,
    eps: float = 1e-6,
    rotate: bool = False,
) -> Tensor:
    pooled = _pool(*_windows(kv, gate, ape, norm_weight.shape[0], ratio))
    return _finish(pooled, norm_weight, rope, eps, rotate)


def compress_entries_backward_reference(
    grad: Tensor,
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    ratio: int,
    eps: float = 1e-6,
    rotate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of compress_entries in kv, gate, ape and norm_weight, for which rounding is the identity but for
    that of the pooled row before the norm."""
    values, gates = (x.double() for x in _windows(kv, gate, ape, norm_weight.shape[0], ratio))
    weights = gates.softmax(dim=1)
    pooled = (weights * values).sum(dim=1, keepdim=True)
    turned = hadamard_reference(grad.double()) if rotate else grad.double()
    turned = apply_rope_reference(turned, rope, inverse=True)
    grad_pooled, grad_norm = norm_gradient(turned, pooled.squeeze(1).to(norm_weight.dtype), norm_weight, eps)
    grad_values = weights * grad_pooled.unsqueeze(1)
    tokens, entries = kv.shape[0], grad.shape[0]  # len() would make a number of a symbol
    grad_kv = _from_windows(grad_values, tokens, ratio)
    grad_gate = _from_windows(grad_values * (values - pooled), tokens, ratio)
    grad_ape = grad_gate[: entries * ratio].unflatten(0, (entries, ratio)).sum(0)
    return grad_kv.to(kv.dtype), grad_gate.to(kv.dtype), grad_ape.to(kv.dtype), grad_norm.to(norm_weight.dtype)


def _windows(kv: Tensor, gate: Tensor, ape: Tensor, head_dim: int, ratio: int) -> tuple[Tensor, Tensor]:
    """(kv, gate + ape) [entries, c * ratio, head_dim] that the entries of one whole sequence pool, oldest first."""
    entries = kv.shape[0] // ratio

    def windows(x: Tensor, before: float) -> Tensor:
        x = x[: entries * ratio].unflatten(0, (entries, ratio))
        if x.shape[2] == head_dim:
            return x
        previous = torch.cat((x.new_full((1, ratio, head_dim), before), x[:, :, :head_dim]))[:entries]
        return torch.cat((previous, x[:, :, head_dim:]), dim=1)

    biased = gate + ape.repeat(entries + 1, 1)[: gate.shape[0]]
    return windows(kv, 0.0), windows(biased, float("-inf"))


def _from_windows(x: Tensor, tokens: int, ratio: int) -> Tensor:
    """[tokens, c * head_dim], the transpose of `_windows`: what an entry has of each row; 0 of what no entry pools."""
    own = x[:, -ratio:]
    if x.shape[1] > ratio:
        own = torch.cat((torch.cat((x[1:, :ratio], torch.zeros_like(x[:1, :ratio]))), own), dim=-1)
    rows = own.flatten(0, 1)
    return torch.cat((rows, rows.new_zeros(tokens - rows.shape[0], rows.shape[1])))


def compress_reference(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    state: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    position: Tensor,
    ratio: int,
    eps: float = 1e-6,
    page_size: int = 64,
    rotate: bool = False,
) -> None:
    """compress in plain torch."""
    if kv.shape[0] == 0:
        return
    head_dim = norm_weight.shape[0]
    owners("compress", sequence, table)
    sequence, position = sequence.long(), position.long()
    first_row, rows_left = _runs(sequence, position)
    biased = gate + ape[position % ratio]
    ends = ((position + 1) % ratio == 0).nonzero().squeeze(1)
    for last in ends.split(max(1, _BLOCK_ELEMENTS // (ratio * ape.shape[1]))):
        window = _gather(kv, biased, state, sequence, position, first_row, last, ratio, head_dim)
        entry = _finish(_pool(*window), norm_weight, rope[last], eps, rotate)
        page, offset = locate(table, sequence[last], position[last] // ratio, page_size)
        if rotate:
            write_keys(pages, entry, page, offset, page_size)
        else:
            write_rows(pages, entry, page, offset, page_size, 2 * rope.shape[1])
    ring = state.shape[1]
    kept = (rows_left < ring).nonzero().squeeze(1)
    state[sequence[kept], position[kept] % ring] = torch.stack((kv[kept], biased[kept]), dim=1)


def _runs(sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """(first row of each row's sequence, rows of that sequence after it), both [tokens]."""
    rows = torch.arange(sequence.numel(), device=sequence.device)
    starts = torch.cat((sequence.new_ones(1, dtype=torch.bool), sequence[1:] != sequence[:-1]))
    if int(starts.sum()) != torch.unique(sequence).numel():
        raise RuntimeError("compress: the rows of a sequence must stand together")
    if not bool((starts[1:] | (position[1:] == position[:-1] + 1)).all()) or int(position.min()) < 0:
        raise RuntimeError("compress: position must ascend by one within a sequence, from 0 or later")
    run = starts.cumsum(0) - 1
    first = starts.nonzero().squeeze(1)
    length = torch.bincount(run)
    return first[run], (first + length)[run] - 1 - rows


def _gather(
    kv: Tensor,
    biased: Tensor,
    state: Tensor,
    sequence: Tensor,
    position: Tensor,
    first_row: Tensor,
    last: Tensor,
    ratio: int,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """(kv, gate + ape) [entries, c * ratio, head_dim] of the entries that rows `last` complete, from rows or state."""
    sets, ring = kv.shape[1] // head_dim, state.shape[1]
    values, gates = [], []
    for half in range(sets):
        step = torch.arange(ratio, device=kv.device) + 1 - (sets - half) * ratio
        row = last.unsqueeze(1) + step
        at = position[last].unsqueeze(1) + step
        here = (row >= first_row[last].unsqueeze(1)).unsqueeze(-1)
        real = (at >= 0).unsqueeze(-1)
        channels = slice(half * head_dim, (half + 1) * head_dim)
        older = state[sequence[last].unsqueeze(1), at % ring][..., channels]
        row = row.clamp_min(0)
        value = torch.where(here, kv[:, channels][row], older[:, :, 0])
        bias = torch.where(here, biased[:, channels][row], older[:, :, 1])
        values.append(torch.where(real, value, 0))
        gates.append(torch.where(real, bias, float("-inf")))
    return torch.cat(values, dim=1), torch.cat(gates, dim=1)


def _pool(values: Tensor, gates: Tensor) -> Tensor:
    """float64 [entries, head_dim]: values weighted by the softmax of gates over dim 1, channel by channel."""
    return (gates.double().softmax(dim=1) * values.double()).sum(dim=1)


def _finish(pooled: Tensor, norm_weight: Tensor, rope: Tensor, eps: float, rotate: bool) -> Tensor:
    entry = apply_rope_reference(rms_norm_reference(pooled.to(norm_weight.dtype), norm_weight, eps), rope)
    return hadamard_reference(entry) if rotate else entry


def _check_inputs(check: Check, kv: Tensor, gate: Tensor, ape: Tensor, norm_weight: Tensor, ratio: int) -> int:
    check.that(ratio >= 1, f"ratio must be at least 1, got {ratio}")
    tokens, channels = check.tensor("kv", kv, FLOAT32_OR_64, ("tokens", "c * head_dim"))
    check.tensor("gate", gate, (kv.dtype,), (tokens, channels))
    check.tensor("ape", ape, (kv.dtype,), (ratio, channels))
    head_dim = check.tensor("norm_weight", norm_weight, FLOATS, ("head_dim",))[0]
    check.that(
        channels in (head_dim, 2 * head_dim), f"kv must have {head_dim} or {2 * head_dim} channels, got {channels}"
    )
    return head_dim


def _check_rope(check: Check, rope: Tensor, rows: int, head_dim: int, rotate: bool) -> None:
    check_rope(check, rope, rows, head_dim)
    power = head_dim & (head_dim - 1) == 0
    check.that(power or not rotate, f"head_dim must be a power of two to be rotated, got {head_dim}")


def _check(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    state: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    position: Tensor,
    ratio: int,
    eps: float = 1e-6,
    page_size: int = 64,
    rotate: bool = False,
) -> None:
    check = Check("compress")
    head_dim = _check_inputs(check, kv, gate, ape, norm_weight, ratio)
    tokens, channels = kv.shape
    _check_rope(check, rope, tokens, head_dim, rotate)
    sequences = check.tensor("table", table, (torch.int32,), ("sequences", "blocks"))[0]
    ring = check.tensor("state", state, (kv.dtype,), (sequences, "ring", 2, channels))[1]
    least = channels // head_dim * ratio
    check.that(ring >= least, f"state must have a ring of at least {least} positions, got {ring}")
    check.written("state", state)
    if rotate:
        check_key_pages(check, "pages", pages, page_size, head_dim)
    else:
        check_row_pages(check, "pages", pages, page_size, head_dim, 2 * rope.shape[1])
    check.written("pages", pages)
    check.tensor("sequence", sequence, (torch.int32,), (tokens,))
    check.tensor("position", position, (torch.int32,), (tokens,))


def _check_entries(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    ratio: int,
    eps: float = 1e-6,
    rotate: bool = False,
) -> None:
    check = Check("compress_entries")
    head_dim = _check_inputs(check, kv, gate, ape, norm_weight, ratio)
    _check_rope(check, rope, kv.shape[0] // ratio, head_dim, rotate)


def _check_entries_backward(
    grad: Tensor,
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: Tensor,
    ratio: int,
    eps: float = 1e-6,
    rotate: bool = False,
) -> None:
    check = Check("compress_entries_backward")
    head_dim = _check_inputs(check, kv, gate, ape, norm_weight, ratio)
    _check_rope(check, rope, kv.shape[0] // ratio, head_dim, rotate)
    check.tensor("grad", grad, (norm_weight.dtype,), (kv.shape[0] // ratio, head_dim))


def _entries_backward(op: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_rope("compress_entries", ctx, 4)
    return *getattr(torch.ops.dsv4, op)(grad, *ctx.saved_tensors, *ctx.others), None, None, None, None


def _entries_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.others = inputs[5:]


for _prefix, _suffix in (("", ""), ("_", "_reference")):  # the second takes float64, which kernels do not
    register(
        f"{_prefix}compress{_suffix}(Tensor kv, Tensor gate, Tensor ape, Tensor norm_weight, Tensor rope, "
        "Tensor(a!) state, Tensor(b!) pages, Tensor table, Tensor sequence, Tensor position, int ratio, "
        "float eps=1e-06, int page_size=64, bool rotate=False) -> ()",
        compress_reference,
        check=_check,
        fake=lambda *args, **kwargs: None,
    )
    register(
        f"{_prefix}compress_entries{_suffix}(Tensor kv, Tensor gate, Tensor ape, Tensor norm_weight, Tensor rope, "
        "int ratio, float eps=1e-06, bool rotate=False) -> Tensor",
        compress_entries_reference,
        check=_check_entries,
        backward=partial(_entries_backward, f"{_prefix}compress_entries_backward{_suffix}"),
        setup_context=_entries_context,
    )
    register(
        f"{_prefix}compress_entries_backward{_suffix}(Tensor grad, Tensor kv, Tensor gate, Tensor ape, "
        "Tensor norm_weight, Tensor rope, int ratio, float eps=1e-06, bool rotate=False) -> "
        "(Tensor, Tensor, Tensor, Tensor)",
        compress_entries_backward_reference,
        check=_check_entries_backward,
        recompute=True,
    )
