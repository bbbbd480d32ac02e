"""Sparse attention over a window of raw rows and a set of compressed entries, under one softmax with a sink."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4.ops._check import ANY_FLOATS, FLOAT32_OR_64, KERNEL_FLOATS, Check
from dsv4.ops._registry import no_gradient, register
from dsv4.ops.layout import check_row_pages, count_visible, locate, owners, read_rows
from dsv4.ops.norm_rope import apply_rope_reference, check_rope, refuse_rope

__all__ = ["sparse_attention", "sparse_attention_reference"]

# Elements of the largest temporary of a block of rows (float64): it bounds memory, never changes a result.
_BLOCK_ELEMENTS = 1 << 22
# Elements of the largest copy of one sequence's entries that is kept while its rows are worked on.
_DECODED_ELEMENTS = 1 << 26
_ROPE_DIM = 64
_TENSORS = 11  # arguments of the op that are tensors; they come first


def sparse_attention(
    query: Tensor,
    window_pages: Tensor,
    window_table: Tensor,
    compressed_pages: Tensor | None,
    compressed_table: Tensor | None,
    sequence: Tensor,
    position: Tensor,
    indices: Tensor | None,
    lengths: Tensor | None,
    sink: Tensor,
    rope: Tensor | None,
    window: int,
    scale: float,
    window_page_size: int = 256,
    page_size: int = 64,
    rope_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from each row to its sequence's last `window` raw rows and to compressed entries, under one softmax.

    Keys and values are the same rows (one key-value head), all `head_dim` of them. With s_j = scale * query . key_j
    over the row's keys: `lse = log sum_j exp(s_j)` and `out = sum_j exp(s_j) key_j / (exp(sink) + sum_j exp(s_j))`,
    rounded to query's dtype; then the rotation of `rope` is undone on the last dims of `out` and the result rounded
    again. Where query is bfloat16 or float16, the numerators `exp(s_j - max s)` are rounded to that dtype before the
    product with the values, as tensor cores need them; the denominator sums unrounded ones.

    The keys of row t are the raw positions `position[t] - window + 1 ... position[t]` (from 0 on) and the compressed
    entries in `indices[t]` that lie in `0 <= i < lengths[t]`; without `indices`, all entries below `lengths[t]`. What
    is not stored (table entry -1, or past the table) is left out, and memory that is no key of the row has no
    influence, whatever it holds. A row without any key gives out 0 and lse +inf. A sink of -inf changes nothing, one
    of +inf gives out 0; the sink never enters lse.

    Args:
        query: [tokens, heads, head_dim] bfloat16, float16, float32 or float64, rotated.
        window_pages: pool of raw rows (see layout), [pages, window_page_size, head_dim] float or uint8 [pages, stride].
        window_table: int32 [sequences, blocks], page of each `window_page_size` positions, -1 = not stored.
        compressed_pages: pool of compressed rows, as window_pages with `page_size`; None = no compressed entries.
        compressed_table: int32 [sequences, blocks], page of each `page_size` entries, -1 = not stored.
        sequence: int32 [tokens], the table row of each query row.
        position: int32 [tokens], absolute position of each query row; below 0 it sees no raw rows.
        indices: int32 [tokens, k] entry numbers in any order, each at most once, or None.
        lengths: int32 [tokens], visible entries of each row. Given, like compressed_table, with compressed_pages only.
        sink: [heads] float32 or float64, logit of the sink.
        rope: [tokens, rope_dim / 2, 2] float32 or float64, (cos, sin) of each row; None leaves `out` rotated.
        window: raw positions a row sees, itself included; at least 1.
        scale: factor on the scores, usually head_dim ** -0.5.
        window_page_size, page_size: rows of a page of either pool.
        rope_dim: bfloat16 dims at the end of an FP8 row; default that of `rope`, or 64.
    Returns: out [tokens, heads, head_dim] in query's dtype; lse [tokens, heads], natural logarithm, float32 (float64
        with a float64 query).
    Raises: RuntimeError naming the argument, what it must be and what it was; also where a sequence is not a row of the
        tables (the CUDA kernel, which cannot ask the host, treats such a row as one without keys), or a gradient of
        rope is wanted.
    Differentiable through out and lse with respect to query, sink and pools of a float dtype. The gradient takes the
    numerators for unrounded; like the results it does not depend on the number of threads, and a sequence's rows get
    the same bits alone and in a batch.
    Source: DeepSeek-V4 report, 2.3; the official inference code (sparse_attn); FlashMLA for lse and empty rows.
    """
    pools = (window_pages,) if compressed_pages is None else (window_pages, compressed_pages)
    op = _op(query, pools, (sink,) if rope is None else (sink, rope))
    return op(
        query,
        window_pages,
        window_table,
        compressed_pages,
        compressed_table,
        sequence,
        position,
        indices,
        lengths,
        sink,
        rope,
        window,
        scale,
        window_page_size,
        page_size,
        rope_dim,
    )


def _op(query: Tensor, pools: tuple[Tensor, ...], wide: tuple[Tensor, ...]) -> Any:
    """The op that takes these arguments: the one with kernels, or the reference for float16 and float64.

    CUDA kernels hold rows of up to 512 dims, in pairs.
    """
    kernel = query.dtype in KERNEL_FLOATS and all(x.dtype == torch.float32 for x in wide)
    if query.is_cuda:
        kernel = kernel and query.dim() == 3 and query.shape[2] % 2 == 0 and query.shape[2] <= 512
    if kernel and all(x.dtype in (*KERNEL_FLOATS, torch.uint8) for x in pools):
        return torch.ops.dsv4.sparse_attention
    return torch.ops.dsv4._sparse_attention_reference


class _Pool(NamedTuple):
    """A pool of rows and how to address it."""

    name: str
    pages: Tensor
    table: Tensor
    page_size: int
    head_dim: int
    rope_dim: int

    def place(self, sequence: int, entry: Tensor) -> tuple[Tensor, Tensor]:
        return locate(self.table, torch.tensor(sequence, device=entry.device), entry, self.page_size)

    def read(self, page: Tensor, offset: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return read_rows(self.pages, page, offset, self.page_size, self.head_dim, self.rope_dim, dtype)


class _Keys(NamedTuple):
    """Keys of a block of rows: shared by its rows, [n, head_dim], or each row's own, [rows, n, head_dim]."""

    pool: _Pool
    keys: Tensor  # float64
    valid: Tensor  # bool [rows, n]
    page: Tensor  # [n] or [rows, n]: where the keys lie
    offset: Tensor


def _own(pool: _Pool, page: Tensor, offset: Tensor, valid: Tensor) -> _Keys:
    """Each row's own keys [rows, n, head_dim], zeros where not valid: zero times a masked NaN would be NaN."""
    page = torch.where(valid, page, -1)
    return _Keys(pool, pool.read(page, offset, torch.float64), page >= 0, page, offset)


def _shared(pool: _Pool, page: Tensor, offset: Tensor, valid: Tensor) -> list[_Keys]:
    """Keys [n, head_dim] read once for all rows of a block.

    One that is not finite would leak, as zero times NaN, into rows that must not see it, so it goes apart as own key.
    """
    keys = pool.read(page, offset, torch.float64)
    valid = valid & (page >= 0)
    odd = ~torch.isfinite(keys.detach()).all(-1)
    if not odd.any():
        return [_Keys(pool, keys, valid, page, offset)]
    seen = valid[:, odd]
    apart = _own(pool, page[odd].expand_as(seen), offset[odd].expand_as(seen), seen)
    return [_Keys(pool, torch.where(odd.unsqueeze(-1), 0, keys), valid & ~odd, page, offset), apart]


def _window_keys(pool: _Pool, sequence: int, position: Tensor, window: int) -> list[_Keys]:
    position = position.long()
    first = max(int(position[0]) - window + 1, 0)
    consecutive = torch.equal(position, position[0] + torch.arange(position.numel(), device=position.device))
    if consecutive:
        entry = torch.arange(first, max(int(position[-1]), first) + 1, device=position.device)
        valid = (entry <= position.unsqueeze(1)) & (entry > position.unsqueeze(1) - window)
        return _shared(pool, *pool.place(sequence, entry), valid)
    reach = min(window, max(int(position.max()), 0) + 1)
    entry = position.unsqueeze(1) - torch.arange(reach - 1, -1, -1, device=position.device)
    return [_own(pool, *pool.place(sequence, entry), entry >= 0)]


def _listed_keys(pool: _Pool, sequence: int, indices: Tensor, lengths: Tensor, decoded: Tensor | None) -> _Keys:
    valid = (indices >= 0) & (indices < lengths.unsqueeze(1))
    entry = torch.where(valid, indices, -1).long()
    page, offset = pool.place(sequence, entry)
    if decoded is None:
        return _own(pool, page, offset, valid)
    valid = page >= 0
    keys = torch.where(valid.unsqueeze(-1), decoded[entry.clamp(0, decoded.shape[0] - 1)], 0).double()
    return _Keys(pool, keys, valid, page, offset)


def _all_keys(pool: _Pool, sequence: int, lengths: Tensor) -> list[_Keys]:
    count = count_visible(lengths, pool.table, pool.page_size)
    entry = torch.arange(count, device=lengths.device)
    return _shared(pool, *pool.place(sequence, entry), entry < lengths.unsqueeze(1))


def _decode(pool: _Pool, sequence: int, indices: Tensor, lengths: Tensor) -> Tensor | None:
    """All visible entries of a sequence, decoded once, where its rows would otherwise decode at least as many."""
    count = count_visible(lengths, pool.table, pool.page_size)
    if not 0 < count <= indices.numel() or count * pool.head_dim > _DECODED_ELEMENTS:
        return None
    return pool.read(*pool.place(sequence, torch.arange(count, device=indices.device)))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[rows, heads, a] x ([a, b] or [rows, a, b]) -> [rows, heads, b]."""
    return torch.matmul(left.flatten(0, 1), right).unflatten(0, left.shape[:2]) if right.dim() == 2 else left @ right


class _Softmax(NamedTuple):
    """The attention of a block of rows before the sink, float64; [rows, heads, ...]."""

    weight: Tensor  # numerators exp(s - max s) [..., keys]
    rounded: Tensor  # the same as multiplied with the values
    total: Tensor  # [..., 1], their sum; 1 in a row without keys
    lse: Tensor  # [..., 1]; finite garbage in a row without keys
    some: Tensor  # bool [rows, 1, 1], whether the row has any key


def _softmax(query: Tensor, sources: list[_Keys], scale: float, dtype: torch.dtype) -> _Softmax:
    scores = [
        (_product(query, s.keys.transpose(-1, -2)) * scale).masked_fill(~s.valid.unsqueeze(1), float("-inf"))
        for s in sources
    ]
    joined = torch.cat(scores, dim=-1)
    some = torch.cat([s.valid for s in sources], dim=-1).any(-1).view(-1, 1, 1)
    top = torch.where(some, joined.detach().amax(-1, keepdim=True), 0)
    weight = torch.exp(joined - top)
    total = torch.where(some, weight.sum(-1, keepdim=True), 1)
    rounded = weight
    if dtype.itemsize == 2:
        # Straight through: the gradient is that of the unrounded weights.
        rounded = weight + (weight.to(dtype).double() - weight).detach()
    return _Softmax(weight, rounded, total, top + total.log(), some)


def _split(x: Tensor, sources: list[_Keys]) -> tuple[Tensor, ...]:
    return x.split([s.valid.shape[1] for s in sources], dim=-1)


def _mix(soft: _Softmax, sources: list[_Keys]) -> Tensor:
    """sum_j p_j key_j [rows, heads, head_dim]."""
    values = torch.zeros((), dtype=torch.float64, device=soft.total.device)
    for part, s in zip(_split(soft.rounded, sources), sources, strict=True):
        values = values + _product(part, s.keys)
    return values / soft.total


class _Call(NamedTuple):
    """The arguments of one call, in the op's order, and the walk over its rows."""

    query: Tensor
    window_pages: Tensor
    window_table: Tensor
    compressed_pages: Tensor | None
    compressed_table: Tensor | None
    sequence: Tensor
    position: Tensor
    indices: Tensor | None
    lengths: Tensor | None
    sink: Tensor
    rope: Tensor | None
    window: int
    scale: float
    window_page_size: int = 256
    page_size: int = 64
    rope_dim: int | None = None

    def pool(self, name: str, pages: Tensor, table: Tensor, page_size: int) -> _Pool:
        rope_dim = self.rope_dim
        if rope_dim is None:
            rope_dim = 2 * self.rope.shape[1] if self.rope is not None else _ROPE_DIM
        return _Pool(name, pages, table, page_size, self.query.shape[2], rope_dim)

    def blocks(self) -> Iterator[tuple[Tensor, list[_Keys]]]:
        """(rows, keys) for blocks of rows of one sequence, small enough for the largest temporary."""
        raw = self.pool("window_pages", self.window_pages, self.window_table, self.window_page_size)
        entries = None
        if self.compressed_pages is not None and self.compressed_table is not None:
            entries = self.pool("compressed_pages", self.compressed_pages, self.compressed_table, self.page_size)
        for owner in owners("sparse_attention", self.sequence, self.window_table):
            mine = (self.sequence == owner).nonzero().squeeze(1)
            decoded = None
            if entries is not None and self.indices is not None and self.lengths is not None:
                decoded = _decode(entries, owner, self.indices[mine], self.lengths[mine])
            for rows in mine.split(self._rows_per_block(mine)):
                keys = _window_keys(raw, owner, self.position[rows], self.window)
                if entries is not None and self.lengths is not None:
                    lengths = self.lengths[rows]
                    if self.indices is None:
                        keys += _all_keys(entries, owner, lengths)
                    else:
                        keys.append(_listed_keys(entries, owner, self.indices[rows], lengths, decoded))
                yield rows, keys

    def _rows_per_block(self, rows: Tensor) -> int:
        # A block shares window + rows - 1 raw rows, so with more than `window` rows most scores would be masked ones.
        most = min(max(self.window, 64), 512)
        heads, head_dim = self.query.shape[1:]
        elements = heads * (min(self.window, int(self.position[rows].max()) + 1) + most)
        if self.indices is not None:
            elements += self.indices.shape[1] * (heads + head_dim)
        elif self.lengths is not None:
            elements += heads * max(int(self.lengths[rows].max()), 0)
        return max(1, min(most, _BLOCK_ELEMENTS // max(elements, 1)))


def sparse_attention_reference(
    query: Tensor,
    window_pages: Tensor,
    window_table: Tensor,
    compressed_pages: Tensor | None,
    compressed_table: Tensor | None,
    sequence: Tensor,
    position: Tensor,
    indices: Tensor | None,
    lengths: Tensor | None,
    sink: Tensor,
    rope: Tensor | None,
    window: int,
    scale: float,
    window_page_size: int = 256,
    page_size: int = 64,
    rope_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """sparse_attention in plain torch, accumulated in float64."""
    call = _Call(
        query,
        window_pages,
        window_table,
        compressed_pages,
        compressed_table,
        sequence,
        position,
        indices,
        lengths,
        sink,
        rope,
        window,
        scale,
        window_page_size,
        page_size,
        rope_dim,
    )
    outs, lses, order = [query.new_zeros((0, *query.shape[1:]))], [_empty_lse(query, 0)], [sequence.new_zeros(0)]
    for rows, keys in call.blocks():
        soft = _softmax(query[rows].double(), keys, scale, query.dtype)
        kept = torch.sigmoid(soft.lse - sink.double().view(1, -1, 1))
        out = torch.where(soft.some, _mix(soft, keys) * kept, 0).to(query.dtype)
        outs.append(out if rope is None else apply_rope_reference(out, rope[rows], inverse=True))
        lse = torch.where(soft.some, soft.lse, float("inf")).squeeze(-1)
        lses.append(lse.to(lses[0].dtype))
        order.append(rows)
    back = torch.cat(order).argsort()
    return torch.cat(outs)[back], torch.cat(lses)[back]


def _empty_lse(query: Tensor, tokens: int) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((tokens, query.shape[1]), dtype=dtype)


def sparse_attention_backward_reference(
    grad_out: Tensor, grad_lse: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, window_pages, compressed_pages and sink; that of a pool of bytes, or of none, is empty, [0].

    `lse` is what the call gave: kernels read the probabilities off it, here it is computed again, in float64. Sums over
    rows and heads are rounded once.

    With p the softmax over a row's keys, u = sum_j p_j key_j, g = sigmoid(lse - sink), so that out = g u, and G the
    gradient of out before its rotation is undone:
    `d lse = grad_lse + (G . u) g (1 - g)`, `d sink = -sum_rows (G . u) g (1 - g)`, `d s_j = p_j (g G . (key_j - u) +
    d lse)`, `d query = scale sum_j d s_j key_j`, `d key_j = scale d s_j query + p_j g G`.
    """
    call = _Call(*arguments)
    grad_query = torch.zeros_like(call.query, memory_format=torch.contiguous_format)
    grad_sink = call.sink.new_zeros(call.sink.shape, dtype=torch.float64)
    pools = {"window_pages": call.window_pages, "compressed_pages": call.compressed_pages}
    pool_sums = {
        name: pages.new_zeros(pages.shape, dtype=torch.float64)
        for name, pages in pools.items()
        if pages is not None and pages.is_floating_point()
    }
    for rows, keys in call.blocks():
        query = call.query[rows].double()
        soft = _softmax(query, keys, call.scale, call.query.dtype)
        grad = grad_out[rows]
        if call.rope is not None:
            grad = apply_rope_reference(grad, call.rope[rows])
        mixed = _mix(soft, keys)
        kept = torch.sigmoid(soft.lse - call.sink.double().view(1, -1, 1))
        grad = torch.where(soft.some, grad.double(), 0)
        along = (grad * mixed).sum(-1, keepdim=True)
        at_gate = along * kept * (1 - kept)
        at_lse = torch.where(soft.some, grad_lse[rows].double().unsqueeze(-1), 0) + at_gate
        grad_sink -= at_gate.sum((0, 2))
        at_mix = grad * kept
        total_query = torch.zeros_like(query)
        parts = zip(keys, _split(soft.weight, keys), _split(soft.rounded, keys), strict=True)
        for source, weight, rounded in parts:
            reach = _product(at_mix, source.keys.transpose(-1, -2)) - kept * along + at_lse
            at_score = weight / soft.total * reach * call.scale
            total_query += _product(at_score, source.keys)
            if source.pool.name in pool_sums:
                at_keys = _outer(at_score, query, source) + _outer(rounded / soft.total, at_mix, source)
                stored = source.page >= 0
                place = source.page[stored], source.offset[stored]
                pool_sums[source.pool.name].index_put_(place, at_keys[stored], accumulate=True)
        grad_query[rows] = total_query.to(grad_query.dtype)
    grads = [
        pool_sums[name].to(pages.dtype) if pages is not None and name in pool_sums else call.query.new_zeros(0)
        for name, pages in pools.items()
    ]
    return grad_query, grads[0], grads[1], grad_sink.to(call.sink.dtype)


def _outer(left: Tensor, right: Tensor, source: _Keys) -> Tensor:
    """sum over heads of left[r, h, n] right[r, h, :], and over rows where they share the keys; the shape of
    source.keys."""
    if source.keys.dim() == 2:
        return left.flatten(0, 1).t() @ right.flatten(0, 1)
    return left.transpose(1, 2) @ right


def _check(*args: Any, **kwargs: Any) -> None:
    _check_call(Check("sparse_attention"), _Call(*args, **kwargs))


def _check_backward(grad_out: Tensor, grad_lse: Tensor, lse: Tensor, *args: Any, **kwargs: Any) -> None:
    call = _Call(*args, **kwargs)
    check = Check("sparse_attention_backward")
    _check_call(check, call)
    wide = _empty_lse(call.query, 0).dtype
    check.tensor("grad_out", grad_out, (call.query.dtype,), tuple(call.query.shape))
    check.tensor("grad_lse", grad_lse, (wide,), tuple(call.query.shape[:2]))
    check.tensor("lse", lse, (wide,), tuple(call.query.shape[:2]))


def _check_call(check: Check, call: _Call) -> None:
    tokens, heads, head_dim = check.tensor("query", call.query, ANY_FLOATS, ("tokens", "heads", "head_dim"))
    check.tensor("sequence", call.sequence, (torch.int32,), (tokens,))
    check.tensor("position", call.position, (torch.int32,), (tokens,))
    check.tensor("sink", call.sink, FLOAT32_OR_64, (heads,))
    check.that(call.window >= 1, f"window must be at least 1, got {call.window}")
    if call.rope is not None:
        check_rope(check, call.rope, tokens, head_dim)
        own = 2 * call.rope.shape[1]
        check.that(call.rope_dim in (None, own), f"rope_dim must be that of rope, {own}, got {call.rope_dim}")
    raw = call.pool("window_pages", call.window_pages, call.window_table, call.window_page_size)
    check_row_pages(check, "window_pages", raw.pages, raw.page_size, head_dim, raw.rope_dim)
    sequences = check.tensor("window_table", raw.table, (torch.int32,), ("sequences", "blocks"))[0]
    if call.compressed_pages is None:
        for name in ("compressed_table", "indices", "lengths"):
            check.that(getattr(call, name) is None, f"{name} must be None without compressed_pages")
        return
    check_row_pages(check, "compressed_pages", call.compressed_pages, call.page_size, head_dim, raw.rope_dim)
    for name, shape in (("compressed_table", (sequences, "blocks")), ("lengths", (tokens,))):
        value = getattr(call, name)
        check.that(value is not None, f"{name} must be given with compressed_pages, got None")
        check.tensor(name, value, (torch.int32,), shape)
    check.optional("indices", call.indices, (torch.int32,), (tokens, "k"))


def _fake(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _empty_lse(query, query.shape[0])


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, lse: Tensor, *arguments: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Call(*arguments, **kwargs)
    pools = [
        call.query.new_empty(0) if pages is None or not pages.is_floating_point() else pages.new_empty(pages.shape)
        for pages in (call.window_pages, call.compressed_pages)
    ]
    return call.query.new_empty(call.query.shape), pools[0], pools[1], call.sink.new_empty(call.sink.shape)


def _room(call: Any) -> tuple[int, int]:
    """(raw rows, entries) that a row has at most; `call` as _Call, with shapes in place of tensors."""
    raw = min(call.window, call.window_table[1] * call.window_page_size)
    if call.compressed_table is None:
        return raw, 0
    entries = call.compressed_table[1] * call.page_size
    return raw, entries if call.indices is None else min(call.indices[1], entries)


def _attention_products(*arguments: Any, **named: Any) -> int:
    """Of the queries and of the weights, with each key."""
    call = _Call(*arguments, **named)
    return 2 * math.prod(call.query) * sum(_room(call))


def _attention_backward_products(grad_out: Any, grad_lse: Any, lse: Any, *arguments: Any, **named: Any) -> int:
    """With each key: of the queries again, of the gradient, and into the queries; and two into a key, which bytes do
    not have."""
    call = _Call(*arguments, **named)
    pools = zip(_room(call), (call.window_pages, call.compressed_pages), strict=True)
    return math.prod(call.query) * sum(keys * (5 if len(pages or ()) == 3 else 3) for keys, pages in pools)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:_TENSORS])
    ctx.numbers = inputs[_TENSORS:]


def _backward(op: str, ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    refuse_rope("sparse_attention", ctx, _Call._fields.index("rope"))
    query, window, compressed, sink = getattr(torch.ops.dsv4, op)(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers)
    grads = {"query": query, "window_pages": window, "compressed_pages": compressed, "sink": sink}
    needed = ctx.needs_input_grad
    return tuple(grads.get(name) if wanted else None for name, wanted in zip(_Call._fields, needed, strict=False))


_ARGUMENTS = (
    "Tensor query, Tensor window_pages, Tensor window_table, Tensor? compressed_pages, Tensor? compressed_table, "
    "Tensor sequence, Tensor position, Tensor? indices, Tensor? lengths, Tensor sink, Tensor? rope, int window, "
    "float scale, int window_page_size=256, int page_size=64, int? rope_dim=None"
)
for _name, _gradient in (
    ("sparse_attention", "sparse_attention_backward"),
    ("_sparse_attention_reference", "_sparse_attention_backward_reference"),
):
    register(
        f"{_name}({_ARGUMENTS}) -> (Tensor, Tensor)",
        sparse_attention_reference,
        check=_check,
        fake=_fake,
        backward=partial(_backward, _gradient),
        setup_context=_setup_context,
        products=_attention_products,
    )
    _refused, _nothing = no_gradient(_gradient, "take second derivatives through sparse_attention_reference")
    register(
        f"{_gradient}(Tensor grad_out, Tensor grad_lse, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
        sparse_attention_backward_reference,
        check=_check_backward,
        fake=_fake_backward,
        backward=_refused,
        setup_context=_nothing,
        products=_attention_backward_products,
    )
