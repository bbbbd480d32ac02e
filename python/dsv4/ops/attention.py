"""Sparse attention over a window of raw rows and a set of compressed entries, with a sink and the inverse rotation of the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.ops._check import Check
from dsv4.ops._registry import register
from dsv4.ops.layout import check_row_pages, locate, owners, read_rows

__all__ = ["sparse_attention", "sparse_attention_reference"]

# Elements of the largest temporary of a block of rows (float64): it bounds memory, never changes a result.
_BLOCK_ELEMENTS = 1 << 22
# Elements of the largest copy of one sequence's entries that is kept while its rows are worked on.
_DECODED_ELEMENTS = 1 << 26
_ROPE_DIM = 64
_QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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

    Keys and values are the same rows (one key-value head), all `head_dim` of them. With s_j = scale * query . key_j over the row's keys:
    `lse = log sum_j exp(s_j)`, `out = sum_j exp(s_j) key_j / (exp(sink) + sum_j exp(s_j))`, rounded to query's dtype; then the
    rotation of `rope` is undone on the last dims of `out`, rounded again. Where query is bfloat16 or float16 the numerators `exp(s_j - max s)` are rounded to that dtype before the
    product with the values, as a tensor core needs them; the denominator is not.

    The keys of row t: raw positions `position[t] - window + 1 ... position[t]` (from 0) and the compressed entries named by
    `indices[t]` that lie in `0 <= i < lengths[t]`; without `indices`, all entries below `lengths[t]`. What is stored nowhere (table entry -1, or past
    the table) is left out, and memory that is not a key of the row is never used, whatever it holds. A row without any key
    gives out 0 and lse +inf. sink -inf changes nothing, +inf gives out 0; the sink never enters lse.

    Args:
        query: [tokens, heads, head_dim] bfloat16, float16, float32 or float64, already rotated.
        window_pages: pool of raw rows (see layout), [pages, window_page_size, head_dim] float or uint8 [pages, stride].
        window_table: int32 [sequences, blocks], physical page of each `window_page_size` positions, -1 = not stored.
        compressed_pages: pool of compressed rows, as window_pages with `page_size`; None = no compressed entries.
        compressed_table: int32 [sequences, blocks], page of each `page_size` entries, -1 = not stored; None with compressed_pages.
        sequence: int32 [tokens], the table row of each query row.
        position: int32 [tokens], absolute position of each query row.
        indices: int32 [tokens, k] entry numbers in any order, each at most once, or None.
        lengths: int32 [tokens], visible entries of each row; None with compressed_pages.
        sink: [heads] float32 or float64, logit of the sink.
        rope: [tokens, rope_dim / 2, 2] float32 or float64 (cos, sin) at each row's position, or None to leave `out` rotated.
        window: raw positions a row sees, itself included; at least 1.
        scale: factor on the scores, usually head_dim ** -0.5.
        window_page_size, page_size: rows of a page of either pool.
        rope_dim: bfloat16 dims at the end of an FP8 row; default that of `rope`, or 64.
    Returns: out [tokens, heads, head_dim] in query's dtype; lse [tokens, heads] float32 (float64 with a float64 query), natural log.
    Raises: RuntimeError naming the argument, what it must be and what it was; also where a sequence is not a row of the table.
    Differentiable with respect to query, sink and pools of a float dtype, through out and lse.
    Source: DeepSeek-V4 report, 2.3; the official inference code (sparse_attn); FlashMLA for lse and empty rows.
    """
    return torch.ops.dsv4.sparse_attention(
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


class _Pool(NamedTuple):
    """A pool of rows and how to address it."""

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
    """Keys of a block of rows: either shared by its rows, [n, head_dim], or each row's own, [rows, n, head_dim]; float64."""

    keys: Tensor
    valid: Tensor  # bool [rows, n]
    page: Tensor  # [n] or [rows, n]; where the keys lie
    offset: Tensor

    @property
    def shared(self) -> bool:
        return self.keys.dim() == 2


def _own(pool: _Pool, page: Tensor, offset: Tensor, valid: Tensor) -> _Keys:
    """Each row's own keys [rows, n, head_dim], zeros where not valid: zero times a masked NaN would be NaN."""
    page = torch.where(valid, page, -1)
    return _Keys(pool.read(page, offset, torch.float64), page >= 0, page, offset)


def _shared(pool: _Pool, page: Tensor, offset: Tensor, valid: Tensor) -> _Keys:
    """Keys [n, head_dim] read once for all rows of a block, unless a non-finite one could leak into a row that must not see it."""
    keys = pool.read(page, offset, torch.float64)
    valid = valid & (page >= 0)
    if valid.shape[0] > 1 and not torch.isfinite(keys.detach()).all():
        return _own(pool, page.expand_as(valid), offset.expand_as(valid), valid)
    seen = valid.any(0)
    return _Keys(torch.where(seen.unsqueeze(-1), keys, 0), valid, page, offset)


def _window_keys(pool: _Pool, sequence: int, position: Tensor, window: int) -> _Keys:
    position = position.long()
    first = max(int(position[0]) - window + 1, 0)
    consecutive = torch.equal(position, position[0] + torch.arange(position.numel(), device=position.device))
    if consecutive:
        entry = torch.arange(first, int(position[-1]) + 1, device=position.device)
        valid = (entry <= position.unsqueeze(1)) & (entry > position.unsqueeze(1) - window)
        return _shared(pool, *pool.place(sequence, entry), valid)
    entry = position.unsqueeze(1) - torch.arange(window - 1, -1, -1, device=position.device)
    return _own(pool, *pool.place(sequence, entry), entry >= 0)


def _listed_keys(pool: _Pool, sequence: int, indices: Tensor, lengths: Tensor, decoded: Tensor | None) -> _Keys:
    valid = (indices >= 0) & (indices < lengths.unsqueeze(1))
    entry = torch.where(valid, indices, -1).long()
    page, offset = pool.place(sequence, entry)
    if decoded is None:
        return _own(pool, page, offset, valid)
    valid = page >= 0
    keys = torch.where(valid.unsqueeze(-1), decoded[entry.clamp_min(0)], 0).double()
    return _Keys(keys, valid, page, offset)


def _all_keys(pool: _Pool, sequence: int, lengths: Tensor) -> _Keys:
    count = min(max(int(lengths.max()), 0), pool.table.shape[1] * pool.page_size)
    entry = torch.arange(count, device=lengths.device)
    return _shared(pool, *pool.place(sequence, entry), entry < lengths.unsqueeze(1))


def _decode(pool: _Pool, sequence: int, indices: Tensor, lengths: Tensor) -> Tensor | None:
    """All visible entries of a sequence, decoded once, where its rows would otherwise decode at least as many."""
    count = min(max(int(lengths.max()), 0), pool.table.shape[1] * pool.page_size)
    if not 0 < count <= indices.numel() or count * pool.head_dim > _DECODED_ELEMENTS:
        return None
    return pool.read(*pool.place(sequence, torch.arange(count, device=indices.device)))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[rows, heads, a] x ([a, b] or [rows, a, b]) -> [rows, heads, b]."""
    return torch.matmul(left.flatten(0, 1), right).unflatten(0, left.shape[:2]) if right.dim() == 2 else left @ right


def _rotate(x: Tensor, rope: Tensor, inverse: bool) -> Tensor:
    """Rotate the interleaved pairs of the last dims of x [rows, heads, head_dim] by rope [rows, rope_dim / 2, 2]."""
    rope = rope.to(x.dtype).unsqueeze(1)
    cos, sin = rope[..., 0], -rope[..., 1] if inverse else rope[..., 1]
    kept, turned = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((kept, turned), dim=-1)


def _scores(query: Tensor, sources: list[_Keys], scale: float) -> Tensor:
    """Masked scores [rows, heads, keys], -inf where a key is not the row's."""
    scores = [
        (_product(query, s.keys.transpose(-1, -2)) * scale).masked_fill(~s.valid.unsqueeze(1), float("-inf"))
        for s in sources
    ]
    return torch.cat(scores, dim=-1)


def _attend(
    query: Tensor, sources: list[_Keys], sink: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out, lse) float64 of a block of rows, query float64 [rows, heads, head_dim]; numerators are rounded to a 16-bit `dtype`."""
    scores = _scores(query, sources, scale)
    some = torch.cat([s.valid for s in sources], dim=-1).any(-1).view(-1, 1, 1)
    top = torch.where(some, scores.detach().amax(-1, keepdim=True), 0)
    weight = torch.exp(scores - top)
    total = torch.where(some, weight.sum(-1, keepdim=True), 1)
    if dtype.itemsize == 2:
        # Straight through: the gradient is that of the unrounded weights.
        weight = weight + (weight.to(dtype).double() - weight).detach()
    parts = weight.split([s.valid.shape[1] for s in sources], dim=-1)
    values = sum(_product(part, s.keys) for part, s in zip(parts, sources, strict=True))
    lse = top + total.log()
    out = values / total * torch.sigmoid(lse - sink.view(1, -1, 1))
    return torch.where(some, out, 0), torch.where(some, lse, float("inf")).squeeze(-1)


class _Sources(NamedTuple):
    """Where the keys of every row come from."""

    window: int
    window_pool: _Pool
    pool: _Pool | None
    indices: Tensor | None
    lengths: Tensor | None

    def blocks(self, sequence: Tensor, position: Tensor, heads: int) -> Iterator[tuple[Tensor, list[_Keys]]]:
        """(rows, keys) for blocks of rows of one sequence, small enough for the largest temporary."""
        for owner in owners("sparse_attention", sequence, self.window_pool.table):
            mine = (sequence == owner).nonzero().squeeze(1)
            decoded = None
            if self.indices is not None:
                decoded = _decode(self.pool, owner, self.indices[mine], self.lengths[mine])
            for rows in mine.split(self._rows_per_block(mine, heads)):
                keys = [_window_keys(self.window_pool, owner, position[rows], self.window)]
                if self.indices is not None:
                    keys.append(_listed_keys(self.pool, owner, self.indices[rows], self.lengths[rows], decoded))
                elif self.pool is not None:
                    keys.append(_all_keys(self.pool, owner, self.lengths[rows]))
                yield rows, keys

    def _rows_per_block(self, rows: Tensor, heads: int) -> int:
        # A block shares window + rows - 1 raw rows, so more than `window` rows would mostly compute masked scores.
        most = min(max(self.window, 64), 512)
        elements = heads * (self.window + most)
        if self.indices is not None:
            elements += self.indices.shape[1] * (heads + self.window_pool.head_dim)
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
    """sparse_attention in plain torch: accumulated in float64."""
    tokens, heads, head_dim = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if tokens == 0:
        return query.new_zeros(query.shape), query.new_zeros((0, heads), dtype=lse_dtype)
    if rope_dim is None:
        rope_dim = 2 * rope.shape[1] if rope is not None else _ROPE_DIM
    pool = None
    if compressed_pages is not None:
        pool = _Pool(compressed_pages, compressed_table, page_size, head_dim, rope_dim)
    window_pool = _Pool(window_pages, window_table, window_page_size, head_dim, rope_dim)
    sources = _Sources(window, window_pool, pool, indices, lengths)
    outs, lses, order = [], [], []
    for rows, keys in sources.blocks(sequence, position, heads):
        out, lse = _attend(query[rows].double(), keys, sink.double(), scale, query.dtype)
        out = out.to(query.dtype)
        if rope is not None:
            out = _rotate(out.double(), rope[rows], inverse=True).to(query.dtype)
        outs.append(out)
        lses.append(lse.to(lse_dtype))
        order.append(rows)
    back = torch.cat(order).argsort()
    return torch.cat(outs)[back], torch.cat(lses)[back]


def _check(
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
) -> None:
    check = Check("sparse_attention")
    tokens, heads, head_dim = check.tensor("query", query, _QUERY_DTYPES, ("tokens", "heads", "head_dim"))
    check.tensor("sequence", sequence, (torch.int32,), (tokens,))
    check.tensor("position", position, (torch.int32,), (tokens,))
    check.tensor("sink", sink, (torch.float32, torch.float64), (heads,))
    check.that(window >= 1, f"window must be at least 1, got {window}")
    if rope is not None:
        pairs = check.tensor("rope", rope, (torch.float32, torch.float64), (tokens, "rope_dim / 2", 2))[1]
        check.that(2 * pairs <= head_dim, f"rope must have at most {head_dim // 2} pairs, got {pairs}")
        check.that(rope_dim in (None, 2 * pairs), f"rope_dim must be that of rope, {2 * pairs}, got {rope_dim}")
        rope_dim = 2 * pairs
    rope_dim = _ROPE_DIM if rope_dim is None else rope_dim
    check_row_pages(check, "window_pages", window_pages, window_page_size, head_dim, rope_dim)
    sequences = check.tensor("window_table", window_table, (torch.int32,), ("sequences", "blocks"))[0]
    for name, value in (("compressed_table", compressed_table), ("lengths", lengths)):
        given, needed = value is not None, compressed_pages is not None
        check.that(given == needed, f"{name} must be given with compressed_pages and only then")
    check.that(indices is None or compressed_pages is not None, "indices must be None without compressed_pages")
    if compressed_pages is None:
        return
    check_row_pages(check, "compressed_pages", compressed_pages, page_size, head_dim, rope_dim)
    check.tensor("compressed_table", compressed_table, (torch.int32,), (sequences, "blocks"))
    check.optional("indices", indices, (torch.int32,), (tokens, "k"))
    check.tensor("lengths", lengths, (torch.int32,), (tokens,))


def _fake(query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=lse_dtype)


register(
    "sparse_attention(Tensor query, Tensor window_pages, Tensor window_table, Tensor? compressed_pages, "
    "Tensor? compressed_table, Tensor sequence, Tensor position, Tensor? indices, Tensor? lengths, Tensor sink, "
    "Tensor? rope, int window, float scale, int window_page_size=256, int page_size=64, int? rope_dim=None) "
    "-> (Tensor, Tensor)",
    sparse_attention_reference,
    check=_check,
    fake=_fake,
)
