"""A stand-in for the model that reads and writes a cache where the layers do, with hashes for numbers.

Every output is a hash of all that it may depend on: a row, an entry or a tail slot that is lost, stale, or read from
the wrong place changes it. `expected` computes the same from the token ids alone, in a few lines and without a cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from dsv4 import Config
from dsv4.cache import KVCache, LayerCache, Step

_MASK = np.uint64((1 << 48) - 1)  # float64 holds such integers exactly


def toy_config(ratios: Sequence[int], window: int, csa_ratio: int = 4) -> Config:
    return Config(
        vocab_size=97, hidden_size=8, num_hidden_layers=len(ratios), num_attention_heads=1, head_dim=2, q_lora_rank=2,
        o_groups=1, o_lora_rank=2, compress_ratios=tuple(ratios), n_routed_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=2, qk_rope_head_dim=2, index_head_dim=2, sliding_window=window, csa_ratio=csa_ratio,
    )  # fmt: skip


# Overlapping, heavy, alone; a ratio that does not divide 256; one above it; a window of one token.
CONFIGS = {
    "all kinds": toy_config((0, 4, 128, 4), 16),
    "no plain layer": toy_config((128, 4), 8),
    "window alone": toy_config((0, 0, 0), 20),
    "odd ratios": toy_config((4, 100, 3, 300), 5),
    "overlap of 8": toy_config((8, 16, 0), 1, csa_ratio=8),
}


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=count)


def toy_cache(config: Config, batch_size: int = 1, **options: int) -> KVCache:
    return KVCache(config, batch_size, quantization="off", dtype=torch.float64, **options)


def filled(config: Config, ids: list[int], **options: int) -> KVCache:
    made = toy_cache(config, **options)
    run(made, [ids])
    return made


def _mix(*parts: np.ndarray | int) -> np.ndarray:
    """A hash of integers, element by element."""
    total = np.uint64(0x243F6A8885A308D3)
    with np.errstate(over="ignore"):
        for part in parts:
            total = (np.asarray(part).astype(np.uint64) ^ total) * np.uint64(0x9E3779B97F4A7C15)
            total = total ^ (total >> np.uint64(29))
    return total & _MASK


def _total(parts: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return parts.sum(axis, dtype=np.uint64)


def _running(parts: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ... parts."""
    with np.errstate(over="ignore"):
        return np.concatenate([np.zeros(1, np.uint64), parts.cumsum(dtype=np.uint64)])


def _reach(config: Config, ratio: int) -> int:
    """Tokens an entry pools."""
    return ratio * (2 if ratio == config.csa_ratio else 1)


def expected(config: Config, ids: Sequence[int]) -> np.ndarray:
    """Outputs of the stand-in for a sequence, [len(ids)]."""
    x = _mix(np.array(ids, dtype=np.int64), 1)
    position = np.arange(len(x))
    for layer, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
        window = position[:, None] - np.arange(config.sliding_window)
        rows = _mix(x[window.clip(0)], layer, 2)
        seen = _total(np.where(window >= 0, _mix(rows, window), 0), 1)
        entries = np.zeros(len(x), np.uint64)
        for kind in range(0 if not ratio else 2 if ratio == config.csa_ratio else 1):
            last = np.arange(ratio - 1, len(x), ratio)
            pooled = last[:, None] - np.arange(_reach(config, ratio))
            parts = np.where(pooled >= 0, _mix(_mix(x[pooled.clip(0)], layer, 3 + kind), pooled), 0)
            entry = _mix(_total(parts, 1))
            entries = _mix(entries, _running(_mix(entry, np.arange(len(entry))))[(position + 1) // ratio])
        x = _mix(x, seen, entries)
    return x


def run(cache: KVCache, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Appends tokens to every sequence, pending steps first; outputs of the new rows, by sequence."""
    for step in cache.pending():
        run_step(cache, step)
        cache.commit(step)
    step = cache.begin([torch.tensor(new, dtype=torch.int64) for new in ids])
    out = run_step(cache, step)
    cache.commit(step)
    ends = np.cumsum([len(new) for new in ids])
    return np.split(out, ends[:-1])


def run_step(cache: KVCache, step: Step, layers: int | None = None) -> np.ndarray:
    """Outputs of a step's rows, after the first `layers` layers."""
    x = _mix(step.token_ids.numpy(), 1)
    for number, layer in enumerate(cache.layers[:layers]):
        done = []
        first = 0
        for sequence, start, count in step.spans:
            done.append(_layer(cache.config, number, layer, step, sequence, start, x[first : first + count]))
            first += count
        x = np.concatenate(done) if done else x
    return x


def _layer(
    config: Config, number: int, layer: LayerCache, step: Step, sequence: int, start: int, x: np.ndarray
) -> np.ndarray:
    position = np.arange(start, start + len(x))
    window_table, table = step.window_table[sequence].numpy(), step.compressed_table[sequence].numpy()
    _put(layer.window_pages, window_table, position, 256, _mix(x, number, 2))
    window = position[:, None] - np.arange(config.sliding_window)
    rows, there = _get(layer.window_pages, window_table, window, 256)
    seen = _total(np.where(there, _mix(rows, window), 0), 1)
    entries = np.zeros(len(x), np.uint64)
    if layer.ratio:
        stores = [(layer.state, layer.pages, layer.page_size)]
        if layer.index_pages is not None:
            stores.append((layer.index_state, layer.index_pages, layer.page_size))
        for kind, (state, pages, size) in enumerate(stores):
            made = _compress(config, layer.ratio, state[sequence], start, _mix(x, number, 3 + kind))
            first = start // layer.ratio
            _put(pages, step.write_table[sequence].numpy(), np.arange(first, first + len(made)), size, made)
            visible = np.arange((start + len(x)) // layer.ratio)
            entry, there = _get(pages, table, visible, size)
            entry = np.where(there, _mix(entry, visible), 0)
            entries = _mix(entries, _running(entry)[(position + 1) // layer.ratio])
    return _mix(x, seen, entries)


def _compress(config: Config, ratio: int, state: torch.Tensor, start: int, x: np.ndarray) -> np.ndarray:
    """Entries that the rows complete; the tail moves on."""
    ring, slots = state.shape[0], state[:, 0, 0].numpy()
    before = np.arange(start - ring, start)
    old = np.where(before >= 0, np.nan_to_num(slots[before % ring]), 0).astype(np.uint64)
    rows, position = np.concatenate([old, x]), np.arange(start - ring, start + len(x))
    last = np.arange(start // ratio * ratio + ratio - 1, start + len(x), ratio)
    pooled = last[:, None] - np.arange(_reach(config, ratio))
    parts = np.where(pooled >= 0, _mix(rows[pooled - (start - ring)], pooled), 0)
    keep = min(ring, len(x))
    slots[position[-keep:] % ring] = rows[-keep:].astype(np.float64)
    return _mix(_total(parts, 1))


def _put(pages: torch.Tensor, table: np.ndarray, at: np.ndarray, size: int, values: np.ndarray) -> None:
    page = table[at // size]
    keep = page >= 0
    pages[:, :, 0].numpy()[page[keep], at[keep] % size] = values[keep].astype(np.float64)


def _get(pages: torch.Tensor, table: np.ndarray, at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, whether they are stored). NaN reads as 0, which is wrong enough."""
    page = np.where(at >= 0, table[at.clip(0) // size], -1)
    values = np.nan_to_num(pages[:, :, 0].numpy()[page.clip(0), at % size]).astype(np.uint64)
    return values, page >= 0


def poison(cache: KVCache) -> None:
    """NaN wherever a cache holds nothing: free pages, rows past the lengths, tail slots of no row."""
    for pool in cache._tables.pools:
        for page in pool._free:
            for tensor in pool.tensors:
                tensor[page] = torch.nan
    for sequence, progress in enumerate(cache._progress):
        tables = [table[sequence] for table in cache._tables.page_of]
        for layer in cache.layers:
            beyond = np.arange(progress.length, len(tables[0]) * 256)
            _put_nan(layer.window_pages, tables[0], beyond, 256)
            if layer.ratio == 0:
                continue
            beyond = np.arange(progress.length // layer.ratio, len(tables[1]) * layer.page_size)
            for pages, state in ((layer.pages, layer.state), (layer.index_pages, layer.index_state)):
                if pages is None:
                    continue
                _put_nan(pages, tables[1], beyond, layer.page_size)
                ring = state.shape[1]
                held = {p % ring for p in range(max(0, progress.high - ring), progress.length)}
                state[sequence, [slot for slot in range(ring) if slot not in held]] = torch.nan


def _put_nan(pages: torch.Tensor, table: np.ndarray, at: np.ndarray, size: int) -> None:
    page = table[at // size]
    pages[:, :, 0].numpy()[page[page >= 0], at[page >= 0] % size] = np.nan
