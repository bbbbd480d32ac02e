"""The key-value cache: the only owner of a sequence's state."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from dsv4._compiling import between_graphs
from dsv4.cache.file import load_cache, save_cache
from dsv4.cache.layer import BLOCK, LayerCache, Settings, blocks_of, bytes_in_use
from dsv4.cache.pool import PagePool
from dsv4.cache.replay import plan_replay
from dsv4.model.config import Config

REPLAY_ROWS = 1024
"""Rows of one step of a replay."""

_Function = TypeVar("_Function", bound=Callable)


def _integer(value: Any) -> int | None:
    """A number as a plain int, also NumPy's or a tensor's; None: a sequence."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _plain_tensors(function: _Function) -> _Function:
    """Runs it outside of inference_mode: a tensor made inside could not be written outside of it later."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@dataclass(frozen=True)
class Step:
    """Rows that the model is about to run, and where their state goes. T rows, sequences one after another.

    Attributes:
        sequence: int32 [T], slot of the cache.
        position: int32 [T], absolute, from 0.
        token_ids: int64 [T].
        window_table: int32 [batch_size, blocks], physical page of every 256 positions of window rows, -1 = not stored.
        compressed_table: int32 [batch_size, blocks], the same for compressed entries and index keys, to read.
        write_table: int32 [batch_size, blocks], where new compressed entries go; all -1 in a replay.
        replay: the rows were run before; run them for their state alone.
        spans: (sequence, first position, rows) of every sequence that has rows.
    """

    sequence: Tensor
    position: Tensor
    token_ids: Tensor
    window_table: Tensor
    compressed_table: Tensor
    write_table: Tensor
    replay: bool
    spans: tuple[tuple[int, int, int], ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """What a model needs to know of the step."""
        tables = self.window_table, self.compressed_table, self.write_table
        return self.sequence, self.position, *tables, self.token_ids


@dataclass
class _Progress:
    """Where a sequence stands.

    Attributes:
        length: tokens committed.
        high: one past the highest position written since the tails were last rebuilt. Rings hold what a sequence of
            high - rollback tokens needs: below that length, the model runs again.
        floor: window rows from here to `length` are exact in every layer.
    """

    length: int = 0
    high: int = 0
    floor: int = 0


_WINDOW, _COMPRESSED = 0, 1  # kinds of pages
_MOST_POSITIONS = 2**31 - 1  # which kernels take as int32


class _Tables:
    """Page tables of all sequences and the pages they hold, in host memory. The pages go back when the tables do.

    Attributes:
        pools: of window and compressed pages; elsewhere one of the two is named by its place, its `kind`.
        page_of: int32 [sequences, blocks] of each kind, the page of every 256 positions; -1 = not stored.
    """

    def __init__(self, pools: tuple[PagePool, PagePool], batch_size: int, blocks: int = 4):
        self.pools = pools
        self.page_of = tuple(np.full((batch_size, blocks), -1, np.int32) for _ in pools)

    def widen(self, blocks: int) -> None:
        """Room for so many blocks, and some more."""
        old = self.page_of[0].shape[1]
        if blocks > old:
            extra = max(blocks, old + old // 2) - old
            self.page_of = tuple(np.pad(table, ((0, 0), (0, extra)), constant_values=-1) for table in self.page_of)

    def pages(self, kind: int, sequence: int | slice = slice(None), blocks: slice = slice(None)) -> list[int]:
        """Pages held by the given sequences and blocks; one that several of them share comes as often."""
        entries = self.page_of[kind][sequence, blocks]
        return entries[entries >= 0].tolist()

    def drop(self, kind: int, sequence: int, blocks: slice) -> None:
        pages = self.pages(kind, sequence, blocks)
        # First out of the table: an interrupt in between loses pages, else it would give them back twice.
        self.page_of[kind][sequence, blocks] = -1
        self.pools[kind].drop(pages)

    def missing(self, kind: int, sequence: int, blocks: range) -> int:
        """At most this many free pages make the blocks writable."""
        entries = self.page_of[kind][sequence, blocks.start : blocks.stop].tolist()
        return sum(page < 0 or self.pools[kind].shared(page) for page in entries)

    def make_writable(self, kind: int, sequence: int, blocks: range) -> None:
        pool, row = self.pools[kind], self.page_of[kind][sequence, blocks.start : blocks.stop]
        for column, page in enumerate(row.tolist()):
            if page < 0:
                row[column] = pool.take()
            elif pool.shared(page):
                row[column] = pool.copy(page)
                pool.drop((page,))  # as in drop: when the table no longer names it

    def select(self, sequences: Sequence[int]) -> _Tables:
        """Tables of a copy of these sequences, holding the same pages."""
        copy = _Tables(self.pools, len(sequences))
        copy.page_of = tuple(table[list(sequences)] for table in self.page_of)
        for kind, pool in enumerate(self.pools):
            pool.hold(copy.pages(kind))
        return copy

    def release(self) -> None:
        for kind, pool in enumerate(self.pools):
            pool.drop(self.pages(kind))


class KVCache:
    """State of a batch of sequences: window rows, compressed entries, index keys, compressor tails, token ids.

    Window rows and compressed entries lie in pages of 256 raw positions, in the formats of `dsv4.ops.layout`. Copies
    made by `snapshot` and `fork` share pages until one of them writes. Window pages out of reach are given back.

    A step is `step = cache.begin(token_ids)`, the model running its rows through all layers, `cache.commit(step)`. If
    something fails in between, the cache still has the old lengths. The steps of `pending()` come before `begin`: there
    are some after a crop beyond `rollback` tokens and after a step that was not committed. Not thread-safe.

    Args:
        config: of the model.
        batch_size: sequences.
        max_seq_len: longest length of any of them; memory grows with what is stored, not with this.
        quantization: "checkpoint" (FP8 rows, index keys in `index_format`) or "off" (rows and keys in `dtype`).
        dtype: of rows and keys in mode "off".
        device: where pages and tails are.
        index_format: "fp4" (68 bytes a key at 128 dims) or "fp8" (132), in mode "checkpoint".
        rollback: tokens that `crop` takes back without a replay, as speculative decoding does.
    Raises:
        ValueError: a size below 1, and as `Settings`.
    """

    @_plain_tensors
    def __init__(
        self,
        config: Config,
        batch_size: int = 1,
        max_seq_len: int = 1 << 20,
        quantization: str = "checkpoint",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        index_format: str = "fp4",
        rollback: int = 8,
    ):
        for name, value in (("batch_size", batch_size), ("max_seq_len", max_seq_len)):
            if not hasattr(value, "__index__") or not 1 <= value <= _MOST_POSITIONS:
                raise ValueError(f"cache: {name} must be an integer from 1 to {_MOST_POSITIONS}, got {value!r}")
        self.settings = Settings(config, quantization, dtype, index_format, rollback)
        self.device = torch.empty(0, device=device).device  # with the number of a GPU, whichever is current later
        self._setup(operator.index(batch_size), operator.index(max_seq_len), None)

    def _setup(self, batch_size: int, max_seq_len: int, tables: _Tables | None) -> None:
        """Everything but settings and device; `tables` when they are a copy's."""
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self._tables = tables or _Tables(_make_pools(self.settings, self.device), batch_size)
        # Copies share pools: what a cache holds has to be given back when the cache goes.
        weakref.finalize(self, self._tables.release).atexit = False
        self._progress = [_Progress() for _ in range(batch_size)]
        self._ids = [np.empty(0, np.int32) for _ in range(batch_size)]
        self._open: Step | None = None
        self._states = [self.settings.states(ratio, batch_size, self.device) for ratio in self.settings.ratios]
        self._layers: tuple[tuple[int, int], tuple[LayerCache, ...]] | None = None

    # What there is

    @property
    def config(self) -> Config:
        return self.settings.config

    @property
    def quantization(self) -> str:
        return self.settings.quantization

    @property
    def dtype(self) -> torch.dtype:
        return self.settings.dtype

    @property
    def index_format(self) -> str:
        return self.settings.index_format

    @property
    def rollback(self) -> int:
        return self.settings.rollback

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sequence."""
        return tuple(progress.length for progress in self._progress)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def token_ids(self, sequence: int = 0) -> Tensor:
        """The tokens of a sequence, int64 [length], in host memory."""
        sequence = self._slot(sequence)
        return torch.from_numpy(self._ids[sequence][: self._progress[sequence].length]).long()

    @property
    def nbytes(self) -> int:
        """Bytes in use: pages this cache holds (each counted once, shared or not), tails, tables, token ids.

        For sequences that were only appended to, the figure of `cache_bytes`. `allocated_nbytes` is what memory was
        asked for.
        """
        held = [len(set(self._tables.pages(kind))) for kind in (_WINDOW, _COMPRESSED)]
        return bytes_in_use(self.settings, self.lengths, *held)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the page pools, free pages and those of snapshots included, and of this cache's tails."""
        tensors = [tensor for pool in self._tables.pools for tensor in pool.tensors]
        tensors += [state for pair in self._states for state in pair if state is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    @between_graphs
    def layers(self) -> tuple[LayerCache, ...]:
        """Storage of every layer. Growing replaces tensors: ask again after every `begin`."""
        version = self._tables.pools[_WINDOW].version, self._tables.pools[_COMPRESSED].version
        if self._layers is None or self._layers[0] != version:
            window, compressed = (pool.tensors for pool in self._tables.pools)
            rest = iter(compressed)
            made = []
            for layer, (ratio, states) in enumerate(zip(self.settings.ratios, self._states, strict=True)):
                pages = next(rest) if ratio else None
                index_pages = next(rest) if self.settings.overlaps(ratio) else None
                made.append(LayerCache(ratio, window[layer], pages, states[0], index_pages, states[1]))
            self._layers = version, tuple(made)
        return self._layers[1]

    # Appending

    @_plain_tensors
    def begin(self, token_ids: Sequence[Tensor]) -> Step:
        """Rows for new tokens, with memory to write their state to.

        Args:
            token_ids: one integer tensor [n] a sequence, any n, 0 included.
        Returns: the step to run and to `commit`.
        Raises:
            ValueError: not one tensor a sequence, a token outside the vocabulary, a sequence past max_seq_len. The
                cache is as before.
            RuntimeError: the steps of `pending()` have not been run.
        """
        rows = self._checked_tokens(token_ids)
        behind = [s for s in range(self.batch_size) if self._is_behind(s)]
        if behind:
            raise RuntimeError(f"cache: run and commit the steps of pending() first; sequence {behind[0]} needs them")
        self._abandon()
        for sequence, new in enumerate(rows):
            self._keep_ids(sequence, new)
        spans = [(s, self._progress[s].length, len(new)) for s, new in enumerate(rows) if len(new)]
        return self._open_step(spans, replay=False)

    def pending(self, rows: int = REPLAY_ROWS) -> Iterator[Step]:
        """Steps to run before the next `begin`, in order: commit each before asking for the next. Usually none.

        They rebuild window rows and tails that a crop or an abandoned step lost; their logits are of no use.

        Args:
            rows: most rows of a step.
        """
        self._abandon()
        todo = {}
        for sequence, progress in enumerate(self._progress):
            if not self._is_behind(sequence):
                continue
            plan = plan_replay(self.settings, progress.length, progress.floor)
            if not plan.reuses_window:
                self._tables.drop(_WINDOW, sequence, slice(None))
                progress.floor = progress.length
            todo[sequence] = plan
        at = {sequence: plan.start for sequence, plan in todo.items()}
        while todo:
            spans, room = [], rows
            for sequence in todo:
                count = min(room, self._progress[sequence].length - at[sequence])
                if count:
                    spans.append((sequence, at[sequence], count))
                    room -= count
            if spans:
                step = self._open_step(spans, replay=True)
                yield step
                if self._open is step:
                    raise RuntimeError("cache: commit every step of pending() before asking for the next")
            for sequence, start, count in spans:
                at[sequence] = start + count
            for sequence in [s for s in todo if at[s] == self._progress[s].length]:
                progress, plan = self._progress[sequence], todo.pop(sequence)
                progress.high = progress.length
                progress.floor = max(plan.floor, self.settings.first_window_block(progress.length) * BLOCK)

    @between_graphs
    def commit(self, step: Step) -> None:
        """Takes the rows of a step over: lengths grow, window pages out of reach go back.

        Raises:
            ValueError: the step is not the one begun last, or the cache was changed since.
        """
        if step is not self._open:
            raise ValueError("cache: commit takes the step that begin returned last, once, before any other change")
        self._open = None
        for sequence, start, count in step.spans:
            progress = self._progress[sequence]
            # What lay further back went when earlier rows were committed.
            first, last = (self.settings.first_window_block(at) for at in (start, start + count))
            progress.floor = max(progress.floor, last * BLOCK)  # first, should anything fail from here on
            if first < last:
                self._tables.drop(_WINDOW, sequence, slice(first, last))
            if not step.replay:
                progress.length = start + count

    # Copies and cuts

    def snapshot(self) -> KVCache:
        """An independent copy of all sequences; pages are shared until one of the two writes to them. `copy.copy` and
        `copy.deepcopy` make one too."""
        return self.fork(range(self.batch_size))

    def __copy__(self) -> KVCache:
        return self.snapshot()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        return self.snapshot()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cache: a KVCache cannot be pickled; write it with save and read it with KVCache.load")

    @_plain_tensors
    def fork(self, sequence: int | Sequence[int]) -> KVCache:
        """An independent cache whose sequences are copies of the given one or ones (repeats allowed); pages are shared.

        Raises:
            ValueError: no such sequence, or none at all.
        """
        one = _integer(sequence)
        chosen = [self._slot(operator.index(s)) for s in (sequence if one is None else [one])]  # type: ignore[union-attr]
        if not chosen:
            raise ValueError("cache: fork needs at least one sequence")
        copy = KVCache.__new__(KVCache)
        copy.settings, copy.device = self.settings, self.device
        copy._setup(len(chosen), self.max_seq_len, self._tables.select(chosen))
        copy._progress = [replace(self._progress[s]) for s in chosen]
        copy._ids = [self._ids[s][: self._progress[s].length].copy() for s in chosen]
        for mine, theirs in zip(copy._states, self._states, strict=True):
            for to, source in zip(mine, theirs, strict=True):
                if to is not None and source is not None:
                    to.copy_(source[chosen])
        copy._trim()
        return copy

    def crop(self, length: int | Sequence[int]) -> None:
        """Cuts sequences back to earlier lengths.

        Within `rollback` tokens of the longest length since, that is all. Further back, the model runs part of the
        sequence again before the next step (see `pending`): up to rollback + layers * (window - 1) tokens, fewer
        where window rows are still stored.

        Args:
            length: for all sequences that are longer, or a list with one for each sequence.
        Raises:
            ValueError: negative, not one a sequence, or beyond a sequence's length (of a list's entry). The cache is
                as before.
        """
        lengths = self.lengths
        one = _integer(length)
        if one is not None:
            if not 0 <= one <= self.length:
                raise ValueError(f"cache: crop to {one}, but lengths go from 0 to {self.length}")
            targets = [min(one, current) for current in lengths]
        else:
            targets = [operator.index(target) for target in length]  # type: ignore[union-attr]
            if len(targets) != self.batch_size:
                raise ValueError(f"cache: crop needs {self.batch_size} lengths, got {len(targets)}")
            for sequence, (target, current) in enumerate(zip(targets, lengths, strict=True)):
                if not 0 <= target <= current:
                    raise ValueError(f"cache: crop of sequence {sequence} to {target}, but it has {current} tokens")
        for progress, target in zip(self._progress, targets, strict=True):
            progress.length = target
            if target == 0:
                progress.high = progress.floor = 0
        self._open = None
        self._trim()

    def clear(self) -> None:
        """Cuts all sequences back to nothing."""
        self.crop(0)

    def save(self, path: str | Path) -> None:
        """Writes the committed state of all sequences to one safetensors file (docs/cache_format.md), or nothing.

        Raises:
            OSError: the file cannot be written; one of that name is as it was.
        """
        save_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: Config | None = None,
        device: torch.device | str = "cpu",
        max_seq_len: int | None = None,
    ) -> KVCache:
        """The cache that `save` wrote.

        Args:
            config: of the model that will use it, to make sure that it fits; None: take the file's word. Weights are
                not compared: only the model that filled a cache can make sense of it.
            device: where to put it.
            max_seq_len: instead of the one it was made with.
        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, damaged, no cache, another format version, another configuration, longer than
                max_seq_len.
        """
        return load_cache(cls, path, config, device, max_seq_len)

    # Inside

    def _stored_tables(self) -> tuple[Tensor, Tensor]:
        """(window, compressed) tables of the committed tokens, [batch_size, blocks]."""
        blocks = blocks_of(self.length)
        tables = tuple(torch.from_numpy(table[:, :blocks].copy()) for table in self._tables.page_of)
        for sequence, length in enumerate(self.lengths):
            for table in tables:
                table[sequence, blocks_of(length) :] = -1
        return tables[_WINDOW], tables[_COMPRESSED]

    @_plain_tensors
    def _restore(
        self, progress: Sequence[tuple[int, int, int]], ids: Sequence[Tensor], tables: Sequence[Tensor]
    ) -> None:
        """Makes an unused cache stand where another stood; pages 0 .. max(table) are to be filled by the caller."""
        self._progress = [_Progress(*entry) for entry in progress]
        self._ids = [part.numpy().copy() for part in ids]
        self._tables.widen(tables[0].shape[1])
        for kind, (pool, table) in enumerate(zip(self._tables.pools, tables, strict=True)):
            count = int(table.max()) + 1 if table.numel() else 0
            pool.reserve(count)
            taken = [pool.take() for _ in range(count)]
            place = np.array([*taken, -1], np.int32)
            self._tables.page_of[kind][:, : table.shape[1]] = place[table.numpy()]
            # A page is held once by every entry that names it; taking it counted one holder too many.
            pool.hold(self._tables.pages(kind))
            pool.drop(taken)

    def _slot(self, sequence: int) -> int:
        if not 0 <= sequence < self.batch_size:
            raise ValueError(f"cache: no sequence {sequence}, the cache has {self.batch_size}")
        return sequence

    def _is_behind(self, sequence: int) -> bool:
        """Whether rows have to run again first: more than `rollback` positions were taken back from `high`."""
        progress = self._progress[sequence]
        return progress.high - progress.length > self.settings.rollback and progress.length > 0

    def _abandon(self) -> None:
        """Forgets a step that was not committed. What it wrote lies past the lengths, except in rings: see `high`."""
        if self._open is not None:
            self._open = None
            self._trim()

    def _trim(self) -> None:
        """Gives back pages past the lengths."""
        for sequence, progress in enumerate(self._progress):
            for kind in (_WINDOW, _COMPRESSED):
                self._tables.drop(kind, sequence, slice(blocks_of(progress.length), None))
            if progress.length == 0:
                progress.high = progress.floor = 0

    def _checked_tokens(self, token_ids: Sequence[Tensor]) -> list[np.ndarray]:
        if len(token_ids) != self.batch_size:
            raise ValueError(f"cache: begin needs one tensor a sequence, {self.batch_size}, got {len(token_ids)}")
        rows = []
        for sequence, ids in enumerate(token_ids):
            if not isinstance(ids, Tensor):
                raise ValueError(f"cache: token ids must be tensors, got {type(ids).__name__}")
            if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
                raise ValueError(f"cache: token ids must be integer [tokens], got {ids.dtype} {list(ids.shape)}")
            total = self._progress[sequence].length + len(ids)
            if total > self.max_seq_len:
                raise ValueError(
                    f"cache: sequence {sequence} would have {total} tokens, max_seq_len is {self.max_seq_len}; "
                    "make the cache with a larger one"
                )
            new = ids.detach().cpu().numpy()
            low, high = (int(new.min()), int(new.max())) if len(new) else (0, 0)
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"cache: token ids must lie in [0, {self.config.vocab_size}), got {low} to {high}")
            rows.append(new)
        return rows

    def _keep_ids(self, sequence: int, new: np.ndarray) -> None:
        length, ids = self._progress[sequence].length, self._ids[sequence]
        total = length + len(new)
        if total > len(ids):
            larger = np.empty(max(total, len(ids) + len(ids) // 2), np.int32)
            larger[:length] = ids[:length]
            ids = self._ids[sequence] = larger
        ids[length:total] = new

    @_plain_tensors
    def _open_step(self, spans: list[tuple[int, int, int]], replay: bool) -> Step:
        """Makes the pages of these rows writable and describes the step."""
        tables = self._tables
        tables.widen(max((blocks_of(start + count) for _, start, count in spans), default=0))
        first_block = {_WINDOW: lambda start: start // BLOCK, _COMPRESSED: self.settings.first_entry_block}
        # A replay stores no compressed entries.
        written = [
            (kind, sequence, range(first_block[kind](start), blocks_of(start + count)))
            for kind in ((_WINDOW,) if replay else (_WINDOW, _COMPRESSED))
            for sequence, start, count in spans
        ]
        # Memory first, so that a shortage leaves the tables as they were.
        limit = self.batch_size * blocks_of(self.max_seq_len)
        for kind, pool in enumerate(tables.pools):
            pool.reserve(sum(tables.missing(*where) for where in written if where[0] == kind), limit)
        for where in written:
            tables.make_writable(*where)
        if not replay:
            for sequence, start, count in spans:
                self._progress[sequence].high = max(self._progress[sequence].high, start + count)
        stored = max([1, *map(blocks_of, self.lengths), *(blocks.stop for _, _, blocks in written)])
        window, compressed = (self._on_device(table[:, :stored].copy()) for table in tables.page_of)
        write = torch.full_like(compressed, -1) if replay else compressed
        self._open = Step(*self._rows(spans), window, compressed, write, replay, tuple(spans))
        return self._open

    def _rows(self, spans: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """(sequence, position, token_ids) of all rows, on the device."""
        sequence = [np.full(count, s, np.int32) for s, _, count in spans]
        position = [np.arange(start, start + count, dtype=np.int32) for _, start, count in spans]
        ids = [self._ids[s][start : start + count].astype(np.int64) for s, start, count in spans]
        none = np.empty(0, np.int32)  # a step may have no row at all
        rows = [self._on_device(np.concatenate(part or [none])) for part in (sequence, position, ids)]
        return rows[0], rows[1], rows[2].long()

    def _on_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)  # else the host would wait for all before it


def _make_pools(settings: Settings, device: torch.device) -> tuple[PagePool, PagePool]:
    """(window pages, compressed pages with index keys) of all layers."""
    window = [lambda count: settings.window_pages(count, device) for _ in settings.ratios]
    compressed = []
    for ratio in filter(None, settings.ratios):
        compressed.append(lambda count, ratio=ratio: settings.compressed_pages(ratio, count, device))
        if settings.overlaps(ratio):
            compressed.append(lambda count, ratio=ratio: settings.index_pages(ratio, count, device))
    return PagePool(window), PagePool(compressed)
