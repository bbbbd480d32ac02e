"""The lightning indexer: queries in the form of the keys, a score for every visible entry, the best k kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.ops._check import ANY_FLOATS, FLOAT32_OR_64, FLOATS, KERNEL_FLOATS, Check
from dsv4.ops._registry import no_gradient, register
from dsv4.ops.layout import FP4_BLOCK, check_key_pages, count_visible, locate, owners, read_keys
from dsv4.ops.norm_rope import apply_rope_reference, check_rope
from dsv4.ops.quantize import dequantize_fp4_reference, hadamard_reference, quantize_fp4_reference

__all__ = ["index_query", "index_query_reference", "index_topk", "index_topk_reference"]

# Elements of the largest temporary of a block of rows and keys; it bounds memory, never changes a result.
_BLOCK_ELEMENTS = 1 << 22
_KEYS_PER_BLOCK = 8192
_MOST_QUERY_DIMS = 1024


def index_query(query: Tensor, rope: Tensor) -> Tensor:
    """Queries as index keys are stored: the rotary embedding, a Hadamard rotation, and rounding to FP4.

    Each of apply_rope, hadamard and fp4_round_trip (blocks of 32) rounds to the dtype of query, in this order.

    Args:
        query: [tokens, heads, dim] bfloat16, float32 or float64; dim a power of two from 2 to 1024.
        rope:  [tokens, rope_dim / 2, 2] float32 or float64, (cos, sin), for the last rope_dim dims.
    Returns: like query. A block of 32 that holds an infinity or a NaN gives NaN.
    Raises: RuntimeError where a shape, dtype or device differs from the above.
    Not differentiable.
    Source: the official inference code (Indexer).
    """
    kernel = query.dtype in KERNEL_FLOATS and rope.dtype == torch.float32
    op = torch.ops.dsv4.index_query if kernel else torch.ops.dsv4._index_query_reference
    return op(query, rope)


def index_query_reference(query: Tensor, rope: Tensor) -> Tensor:
    turned = hadamard_reference(apply_rope_reference(query, rope))
    return dequantize_fp4_reference(*quantize_fp4_reference(turned, FP4_BLOCK), FP4_BLOCK, query.dtype)


def _check_query(query: Tensor, rope: Tensor) -> None:
    check = Check("index_query")
    tokens, _, dim = check.tensor("query", query, FLOATS, ("tokens", "heads", "dim"))
    check_rope(check, rope, tokens, dim)
    check.that(
        2 <= dim <= _MOST_QUERY_DIMS and dim & (dim - 1) == 0,
        f"dim must be a power of two from 2 to {_MOST_QUERY_DIMS}, got {dim}",
    )


def index_topk(
    query: Tensor,
    weights: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    k: int,
    page_size: int = 64,
) -> Tensor:
    """The k compressed entries of each row's sequence with the highest index scores.

    `score[t, j] = sum_h weights[t, h] * relu(query[t, h] . key_j)`. The definition accumulates in float64 and rounds
    to float32 (not where query is float64); kernels accumulate in float32, in an order that depends on the row and the
    key alone, so entries whose scores are that close may change places. The selection is exact: of equal scores the
    lower entry wins. An entry whose score is NaN is never taken, nor one that is not stored (table entry -1, or past
    the table) or not below `lengths[t]`; the memory of those has no influence, whatever it holds.

    Args:
        query: [tokens, index_heads, dim] float, rotated (rope, then Hadamard) and, in mode checkpoint, rounded to FP4.
        weights: [tokens, index_heads] float32 or float64, all constant factors included.
        pages: pool of index keys (see layout): [pages, page_size, dim] float, or uint8 [pages, bytes] in FP4 or FP8.
        table: int32 [sequences, blocks], page of each `page_size` entries, -1 = not stored.
        sequence: int32 [tokens], the table row of each query row.
        lengths: int32 [tokens], visible entries: (position + 1) // ratio.
        k: entries to keep, at least 1; a row may have fewer.
        page_size: entries of a page.
    Returns: int32 [tokens, k], the entry numbers in ascending order, then -1.
    Raises: RuntimeError naming the argument, what it must be and what it was; also where a sequence is not a
        row of the table (the CUDA kernel, which cannot ask the host, treats such a row as one without entries).
    Not differentiable.
    Source: DeepSeek-V4 report, 2.3.1; the official inference code (Indexer), whose scores are bfloat16;
        ties are rarer here.
    """
    floats = query.dtype in KERNEL_FLOATS and weights.dtype == torch.float32
    kernel = floats and pages.dtype in (*KERNEL_FLOATS, torch.uint8)
    op = torch.ops.dsv4.index_topk if kernel else torch.ops.dsv4._index_topk_reference
    return op(query, weights, pages, table, sequence, lengths, k, page_size)


def index_topk_reference(
    query: Tensor,
    weights: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    k: int,
    page_size: int = 64,
) -> Tensor:
    """index_topk in plain torch: a sequence's keys are read once, its rows are scored in blocks."""
    tokens, heads, dim = query.shape
    chosen = torch.full((tokens, k), -1, dtype=torch.int32, device=query.device)
    for owner in owners("index_topk", sequence, table):
        mine = (sequence == owner).nonzero().squeeze(1)
        count = count_visible(lengths[mine], table, page_size)
        if count == 0:
            continue
        entry = torch.arange(count, device=query.device)
        page, offset = locate(table, torch.tensor(owner, device=query.device), entry, page_size)
        keys = read_keys(pages, page, offset, page_size, dim)
        width = max(count, heads * min(count, _KEYS_PER_BLOCK))
        for rows in mine.split(max(1, min(256, _BLOCK_ELEMENTS // width))):
            visible = max(0, min(count, int(lengths[rows].max())))
            score = _scores(query[rows], weights[rows], keys[:visible])
            valid = (entry[:visible] < lengths[rows].unsqueeze(1)) & (page[:visible] >= 0)
            chosen[rows] = _best(score, valid, k)
    return chosen


def _scores(query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """[rows, keys]: sum_h weights[r, h] * relu(query[r, h] . keys[j])."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, weights = query.double(), weights.double().unsqueeze(1)
    parts = []
    for block in keys.split(_KEYS_PER_BLOCK):
        products = (query.flatten(0, 1) @ block.double().t()).unflatten(0, query.shape[:2])
        parts.append((weights @ products.relu_()).squeeze(1).to(dtype))
    return torch.cat(parts, dim=1) if parts else query.new_zeros((query.shape[0], 0), dtype=dtype)


def _best(score: Tensor, valid: Tensor, k: int) -> Tensor:
    """int32 [rows, k]: the columns of the k highest valid scores in ascending order, then -1."""
    rows, columns = score.shape
    valid = valid & ~score.isnan()
    score = torch.where(valid, score, float("-inf"))
    if columns > k:
        # All above the k-th highest score, then the first of those equal to it.
        cut = score.topk(k, dim=1, sorted=True).values[:, -1:]
        above = score > cut
        level = (score == cut) & valid
        room = k - above.sum(1, keepdim=True)
        valid = above | (level & (level.cumsum(1) <= room))
    chosen = torch.full((rows, k), -1, dtype=torch.int32, device=score.device)
    row, column = valid.nonzero(as_tuple=True)
    rank = valid.cumsum(1)[row, column] - 1
    chosen[row, rank] = column.int()
    return chosen


def _check(
    query: Tensor,
    weights: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    k: int,
    page_size: int = 64,
) -> None:
    check = Check("index_topk")
    tokens, heads, dim = check.tensor("query", query, ANY_FLOATS, ("tokens", "index_heads", "dim"))
    check.tensor("weights", weights, FLOAT32_OR_64, (tokens, heads))
    check_key_pages(check, "pages", pages, page_size, dim)
    check.tensor("table", table, (torch.int32,), ("sequences", "blocks"))
    check.tensor("sequence", sequence, (torch.int32,), (tokens,))
    check.tensor("lengths", lengths, (torch.int32,), (tokens,))
    check.that(k >= 1, f"k must be at least 1, got {k}")


def _fake(
    query: Tensor,
    weights: Tensor,
    pages: Tensor,
    table: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    k: int,
    page_size: int = 64,
) -> Tensor:
    return query.new_empty((query.shape[0], k), dtype=torch.int32)


def _products(
    query: Sequence[int],
    weights: Sequence[int],
    pages: Sequence[int],
    table: Sequence[int],
    sequence: Sequence[int],
    lengths: Sequence[int],
    k: int,
    page_size: int = 64,
) -> int:
    """Of the queries with every entry that there are pages for, and of the weights with the scores."""
    tokens, heads, dim = query
    return tokens * heads * (dim + 1) * table[1] * page_size


_backward, _setup_context = no_gradient("index_query", "detach query")

for _name in ("index_query", "_index_query_reference"):
    register(
        f"{_name}(Tensor query, Tensor rope) -> Tensor",
        index_query_reference,
        check=_check_query,
        backward=_backward,
        setup_context=_setup_context,
    )

_backward, _setup_context = no_gradient("index_topk", "detach query and weights")

for _name in ("index_topk", "_index_topk_reference"):  # the second takes float16 and float64, which kernels do not
    register(
        f"{_name}(Tensor query, Tensor weights, Tensor pages, Tensor table, Tensor sequence, Tensor lengths, int k, "
        "int page_size=64) -> Tensor",
        index_topk_reference,
        check=_check,
        fake=_fake,
        backward=_backward,
        setup_context=_setup_context,
        products=_products,
    )
