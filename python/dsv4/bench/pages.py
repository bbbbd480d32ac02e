"""Caches to measure on: pools of pages in the order a used cache has them, and the same rows as a plain tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.model.config import Config
from dsv4.ops.layout import allocate_key_pages, allocate_pages, locate, read_keys, read_rows, write_rows

HCA_RATIO = 128

_MOST_ROWS = 2048
_MOST_FLOPS = 2**36
# Up to this length a whole prefill step is wanted, though a run may then take seconds.
_WHOLE_STEP_CONTEXT = 1 << 16
_MOST_BATCH_BYTES = 5 << 30
_DRAWN_ROWS = 4096
_READ_ROWS = 1 << 14


def ratio_of(config: Config, kind: str) -> int:
    """Tokens an entry, of layers of a kind: "csa" or "hca"."""
    return config.csa_ratio if kind == "csa" else HCA_RATIO


def prefill_rows(context: int, flops: float) -> int:
    """Rows of a prefill step that end a sequence of `context` tokens: 2048; in long sequences fewer, where a row of so
    many FLOPs would let one run take seconds."""
    rows = min(_MOST_ROWS, context)
    while context > _WHOLE_STEP_CONTEXT and rows > 2 and rows * flops > _MOST_FLOPS:
        rows //= 2
    return rows


def steps(device: torch.device) -> tuple[int | None, ...]:
    """What is measured on a device: decoding of so many sequences at once, and a step of a prefill (None)."""
    return (1, 8, None) if device.type == "cpu" else (1, 8, 64, None)


def batch(wanted: int | None, nbytes: float) -> int:
    """Sequences of `nbytes` bytes for a step: one in a prefill; otherwise so many, none where memory would not hold
    over a quarter of them."""
    sequences = wanted or 1
    while sequences > 2 and sequences * nbytes > _MOST_BATCH_BYTES:
        sequences //= 2
    return sequences if wanted is None or 4 * sequences >= wanted else 0


def shuffled_table(blocks: int, first: int = 0, sequences: int = 1, device: torch.device | None = None) -> Tensor:
    """int32 [sequences, blocks]: pages in random order; the blocks before `first` are not stored."""
    table = torch.full((sequences, blocks), -1, dtype=torch.int32)
    stored = blocks - first
    table[:, first:] = torch.randperm(sequences * stored, dtype=torch.int32).view(sequences, stored)
    return table.to(device)


def row_pages(config: Config, count: int, page_size: int, device: torch.device) -> Tensor:
    """FP8 pages of normal rows. At most some thousands of rows are drawn and then repeated, in memory of their own."""
    drawn = min(count, -(-_DRAWN_ROWS // page_size))
    pages = allocate_pages(drawn, page_size, config.head_dim, config.qk_rope_head_dim, "fp8")
    row = torch.arange(drawn * page_size)
    rows = torch.randn(len(row), config.head_dim).bfloat16()
    write_rows(pages, rows, row // page_size, row % page_size, page_size, config.qk_rope_head_dim)
    pages = pages.to(device)
    if drawn == count:
        return pages
    pool = allocate_pages(count, page_size, config.head_dim, config.qk_rope_head_dim, "fp8", device=device)
    return torch.index_select(pages, 0, torch.randint(drawn, (count,)).to(device), out=pool)


def key_pages(config: Config, count: int, page_size: int, device: torch.device) -> Tensor:
    """FP4 pages of index keys: any code, scales from 1/4 to 2."""
    dim = config.index_head_dim
    pages = allocate_key_pages(count, page_size, dim, "fp4", device=device)
    scales_at = page_size * dim // 2
    pages[:, :scales_at].random_(0, 256)
    pages[:, scales_at:].random_(125, 129)
    return pages


def rows_of(config: Config, pages: Tensor, table: Tensor, begin: int, end: int, page_size: int) -> Tensor:
    """Rows `begin` to `end` of the one sequence of `table`, bfloat16 [rows, head_dim]; every value as it is stored."""

    def read(page: Tensor, offset: Tensor) -> Tensor:
        return read_rows(pages, page, offset, page_size, config.head_dim, config.qk_rope_head_dim, torch.bfloat16)

    parts = [read(*at) for at in _places(table, begin, end, page_size)]
    return torch.cat(parts) if parts else torch.empty(0, config.head_dim, dtype=torch.bfloat16)


def keys_of(config: Config, pages: Tensor, table: Tensor, end: int, page_size: int) -> Tensor:
    """Index keys 0 to `end` of the one sequence of `table`, bfloat16 [keys, dim]; every value as it is stored."""
    dim = config.index_head_dim
    parts = [read_keys(pages, *at, page_size, dim, torch.bfloat16) for at in _places(table, 0, end, page_size)]
    return torch.cat(parts) if parts else torch.empty(0, dim, dtype=torch.bfloat16)


def _places(table: Tensor, begin: int, end: int, page_size: int) -> list[tuple[Tensor, Tensor]]:
    """(page, offset) of the rows, in parts that bound the memory of reading them."""
    return [
        locate(table, table.new_zeros(()), torch.arange(at, min(at + _READ_ROWS, end), device=table.device), page_size)
        for at in range(begin, end, _READ_ROWS)
    ]


def spread(tokens: int, most: int) -> Tensor:
    """At most `most` row numbers, spread over all."""
    return torch.linspace(0, tokens - 1, min(most, tokens)).long()
