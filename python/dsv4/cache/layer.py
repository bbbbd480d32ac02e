"""Shapes and bytes of a cache: what one layer stores, and how much a cache of given lengths takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model.config import Config
from dsv4.ops import layout

BLOCK = 256
"""Raw positions covered by one column of every page table."""

QUANTIZATIONS = ("checkpoint", "off")
INDEX_FORMATS = ("fp4", "fp8")


@dataclass(frozen=True)
class Settings:
    """What fixes the shapes of a cache, apart from its lengths.

    Attributes:
        config: of the model.
        quantization: "checkpoint" (FP8 rows, index keys in `index_format`) or "off" (rows and keys in `dtype`).
        dtype: of rows and keys in mode "off".
        index_format: "fp4" or "fp8", of index keys in mode "checkpoint".
        rollback: tokens that may be taken back without running the model again.
    Raises:
        ValueError: an unknown quantization or index_format, a dtype that is not floating point, a negative rollback.
    """

    config: Config
    quantization: str = "checkpoint"
    dtype: torch.dtype = torch.bfloat16
    index_format: str = "fp4"
    rollback: int = 8

    def __post_init__(self) -> None:
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"cache: quantization must be one of {QUANTIZATIONS}, got {self.quantization!r}")
        if self.index_format not in INDEX_FORMATS:
            raise ValueError(f"cache: index_format must be one of {INDEX_FORMATS}, got {self.index_format!r}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"cache: dtype must be a floating-point type, got {self.dtype}")
        if not isinstance(self.rollback, int) or self.rollback < 0:
            raise ValueError(f"cache: rollback must be an integer >= 0, got {self.rollback!r}")

    @property
    def row_format(self) -> str:
        return "fp8" if self.quantization == "checkpoint" else "plain"

    @property
    def key_format(self) -> str:
        return self.index_format if self.quantization == "checkpoint" else "plain"

    @property
    def state_dtype(self) -> torch.dtype:
        """Compressor tails are float32, whatever the model computes in; float64 models keep float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def ratios(self) -> tuple[int, ...]:
        """Compression ratio of every layer; MTP blocks have no part in a cache."""
        return self.config.compress_ratios[: self.config.num_hidden_layers]

    def overlaps(self, ratio: int) -> bool:
        """Whether entries of this ratio pool two blocks of tokens, which comes with an index (CSA)."""
        return ratio > 0 and ratio == self.config.csa_ratio

    def _rows(self, page_size: int) -> tuple[int, int, int, str, torch.dtype]:
        return page_size, self.config.head_dim, self.config.qk_rope_head_dim, self.row_format, self.dtype

    def _keys(self, page_size: int) -> tuple[int, int, str, torch.dtype]:
        return page_size, self.config.index_head_dim, self.key_format, self.dtype

    def window_page_bytes(self) -> int:
        """Bytes of one window page of one layer."""
        return layout.page_bytes(*self._rows(BLOCK))

    def compressed_page_bytes(self, ratio: int) -> int:
        """Bytes of one compressed page of one layer, its page of index keys included; 0 where the layer has neither."""
        if not ratio:
            return 0
        size = layout.page_bytes(*self._rows(entries_per_page(ratio)))
        return size + (layout.key_page_bytes(*self._keys(entries_per_page(ratio))) if self.overlaps(ratio) else 0)

    def window_pages(self, count: int, device: torch.device | str) -> Tensor:
        return layout.allocate_pages(count, *self._rows(BLOCK), device=device)

    def compressed_pages(self, ratio: int, count: int, device: torch.device | str) -> Tensor:
        return layout.allocate_pages(count, *self._rows(entries_per_page(ratio)), device=device)

    def index_pages(self, ratio: int, count: int, device: torch.device | str) -> Tensor:
        return layout.allocate_key_pages(count, *self._keys(entries_per_page(ratio)), device=device)

    def ring(self, ratio: int) -> int:
        """Slots of a compressor tail.

        A step that starts at position p completes entries that pool tokens from p - (ratio - 1) on, one block earlier
        still where blocks overlap; taking back `rollback` tokens moves p back by as much.
        """
        return ratio * (2 if self.overlaps(ratio) else 1) + self.rollback

    def state_shape(self, ratio: int) -> tuple[int, int, int] | None:
        """[ring, 2, c * head_dim] of one sequence: (projected values, gate + position bias) of the last tokens."""
        return (self.ring(ratio), 2, self.config.head_dim * (1 + self.overlaps(ratio))) if ratio else None

    def index_state_shape(self, ratio: int) -> tuple[int, int, int] | None:
        return (self.ring(ratio), 2, 2 * self.config.index_head_dim) if self.overlaps(ratio) else None

    def states(self, ratio: int, sequences: int, device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
        """Zeroed tails of one layer: of its entries and of its index keys."""
        shapes = self.state_shape(ratio), self.index_state_shape(ratio)
        state, index_state = (
            torch.zeros(sequences, *shape, dtype=self.state_dtype, device=device) if shape else None for shape in shapes
        )
        return state, index_state

    def state_bytes(self) -> int:
        """Bytes of all compressor tails of one sequence."""
        shapes = [shape(ratio) for ratio in self.ratios for shape in (self.state_shape, self.index_state_shape)]
        return sum(a * b * c for a, b, c in filter(None, shapes)) * self.state_dtype.itemsize

    def first_window_block(self, length: int) -> int:
        """First block of window rows that is kept at a length: the one `sliding_window + rollback` positions back."""
        return max(0, length - self.config.sliding_window - self.rollback) // BLOCK

    def first_entry_block(self, position: int) -> int:
        """First column of the compressed table that a step from this position on may write to.

        That is position // 256 for ratios that divide 256. With others, pages hold entries of a few positions more, and
        the entry of a position can stand in an earlier column than the position itself.
        """
        columns = (position // ratio // entries_per_page(ratio) for ratio in {*self.ratios} - {0})
        return min(columns, default=position // BLOCK)


def entries_per_page(ratio: int) -> int:
    """Entries of one column of a page table: those that end within 256 positions, rounded up for ratios in between."""
    return -(-BLOCK // ratio) if ratio else 1


def blocks_of(length: int) -> int:
    """Columns of a page table that `length` positions need."""
    return -(-length // BLOCK)


def bytes_in_use(settings: Settings, lengths: Sequence[int], window_pages: int, compressed_pages: int) -> int:
    """Bytes of a cache: pages in use, compressor tails, two table entries a block, and four bytes a kept token id."""
    pages = window_pages * settings.window_page_bytes() * settings.config.num_hidden_layers
    pages += compressed_pages * sum(map(settings.compressed_page_bytes, settings.ratios))
    tables = sum(2 * 4 * blocks_of(length) for length in lengths)
    return pages + tables + 4 * sum(lengths) + len(lengths) * settings.state_bytes()


def cache_bytes(
    config: Config,
    length: int | Sequence[int],
    batch_size: int = 1,
    quantization: str = "checkpoint",
    dtype: torch.dtype = torch.bfloat16,
    index_format: str = "fp4",
    rollback: int = 8,
) -> int:
    """`KVCache.nbytes` of a cache that sequences were appended to, without making one.

    Args:
        length: tokens of every one of `batch_size` sequences, or a list with the length of each.
        others: as for `KVCache`.
    Raises:
        ValueError: as `Settings`; a negative length.
    """
    lengths = [length] * batch_size if isinstance(length, int) else list(length)
    if any(n < 0 for n in lengths):
        raise ValueError(f"cache_bytes: length must be >= 0, got {length}")
    settings = Settings(config, quantization, dtype, index_format, rollback)
    window = sum(blocks_of(n) - settings.first_window_block(n) for n in lengths)
    return bytes_in_use(settings, lengths, window, sum(map(blocks_of, lengths)))


class LayerCache:
    """The tensors of one layer, as the ops take them. Pages are shared by all sequences; tails have one row a sequence.

    Not a dataclass: torch.distributed takes those apart, and copies of tensors of another dtype would be written.

    Attributes:
        ratio: tokens a compressed entry; 0 = window rows only, and the fields below that are None.
        window_pages: uint8 [pages, bytes] or dtype [pages, 256, head_dim]; row of position p at table[p // 256], p %
            256.
        pages: compressed entries, uint8 [pages, bytes] or dtype [pages, page_size, head_dim]; or None.
        state: compressor tail, float32 (float64) [sequences, ring, 2, c * head_dim]; position p in slot p % ring; or
            None.
        index_pages: index keys of a CSA layer, uint8 [pages, bytes] or dtype [pages, page_size, index_head_dim]; or
            None.
        index_state: tail of the index compressor, [sequences, ring, 2, 2 * index_head_dim]; or None.
    """

    def __init__(
        self,
        ratio: int,
        window_pages: Tensor,
        pages: Tensor | None = None,
        state: Tensor | None = None,
        index_pages: Tensor | None = None,
        index_state: Tensor | None = None,
    ):
        self.ratio, self.window_pages = ratio, window_pages
        self.pages, self.state = pages, state
        self.index_pages, self.index_state = index_pages, index_state

    @property
    def page_size(self) -> int:
        """Entries, and index keys, a page (1 where there are none)."""
        return entries_per_page(self.ratio)

    @classmethod
    def allocate(
        cls,
        config: Config,
        ratio: int,
        sequences: int,
        pages: int,
        quantization: str = "checkpoint",
        dtype: torch.dtype = torch.bfloat16,
        index_format: str = "fp4",
        device: torch.device | str = "cpu",
    ) -> LayerCache:
        """Zeroed storage of a single layer on its own, for `sequences` sequences in `pages` pages of each kind."""
        settings = Settings(config, quantization, dtype, index_format, rollback=0)
        compressed = settings.compressed_pages(ratio, pages, device) if ratio else None
        index = settings.index_pages(ratio, pages, device) if settings.overlaps(ratio) else None
        state, index_state = settings.states(ratio, sequences, device)
        return cls(ratio, settings.window_pages(pages, device), compressed, state, index, index_state)
