"""`dsv4 bench --layer`: one full layer in the released format, written to disk, loaded and run.

A CSA layer of the model's true widths with all of its experts (FP4 weights of V4-Flash: 3.2 GiB), random weights; the
vocabulary alone is shortened, since embedding and head are no part of a layer. Reported are the time to load it, one
token at a context, prompts in one piece, and the memory of the process: stored bytes plus activations, nothing
dequantised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4 import checkpoint
from dsv4.cache import LayerCache
from dsv4.cache.layer import blocks_of
from dsv4.checkpoint import memory
from dsv4.checkpoint.init import RandomSource
from dsv4.checkpoint.layer_check import LayerCheck, kernel_bytes
from dsv4.checkpoint.layers import Layers
from dsv4.checkpoint.loader import RANDOM
from dsv4.checkpoint.memory import size
from dsv4.environment import environment
from dsv4.model.block import Block
from dsv4.model.config import Config
from dsv4.nn.hyper_connection import STREAMS
from dsv4.nn.rows import RopeFrequencies, Rows

PREFILL = (512, 2048)
CONTEXT = 4096
_DECODE_STEPS = 9
_VOCABULARY = 1024
_POOL_BYTES = 64 << 20
_E2M1_DEVIATION, _E4M3_DEVIATION = 2.93, 64.0
_LOADED_SLACK = 64 << 20  # of the allocator, and of what Python keeps of 1,600 tensors


def layer_config(shape: str, ratio: int | None = None) -> Config:
    """A model of one layer with the widths of a preset, CSA unless another ratio is given."""
    config = Config.preset(shape)
    return dataclasses.replace(
        config,
        vocab_size=min(config.vocab_size, _VOCABULARY),
        num_hidden_layers=1,
        compress_ratios=(config.csa_ratio if ratio is None else ratio,),
        num_hash_layers=0,
        num_nextn_predict_layers=0,
    )


class PooledSource(RandomSource):
    """Random tensors whose quantised matrices are windows into one random pool: made in no time and no memory.

    Windows start at different places, so that experts differ. Codes and scales are spread as those of RandomSource.
    """

    def __init__(self, config: Config, seed: int = 0):
        super().__init__(config, seed)
        generator = torch.Generator().manual_seed(seed)
        largest = max(super(PooledSource, self).nbytes(key) for key, found in self.table.items() if found.pair)
        size = _POOL_BYTES + largest
        self._bytes = torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator)
        normal = torch.randn(_POOL_BYTES >> 4, generator=generator).mul_(_E4M3_DEVIATION).clamp_(-448, 448)
        self._codes = normal.to(torch.float8_e4m3fn).view(torch.uint8).repeat(-(-size // len(normal)))
        self._steps = torch.randint(-1, 2, (size >> 4,), dtype=torch.int8, generator=generator)
        self._next = 0

    def get(self, key: str) -> Tensor:
        found = self.table[key]
        if not found.pair:
            return super().get(key)
        stem, _, part = key.rpartition(".")
        weight = self.table[stem + ".weight"]
        packed = weight.dtypes[0] == "I8"
        if part == "weight":
            pool, dtype = (self._bytes, torch.int8) if packed else (self._codes, torch.float8_e4m3fn)
            return self._window(pool, found.shape).view(dtype)
        inputs = weight.shape[1] * (2 if packed else 1)
        deviation = _E2M1_DEVIATION if packed else _E4M3_DEVIATION
        exponent = round(math.log2(inputs**-0.5 / deviation))
        # e8m0 holds 2^(byte - 127); half the steps up and half down keep the mean near 2^exponent.
        return (self._window(self._steps, found.shape) + (127 + exponent)).view(torch.uint8).view(torch.float8_e8m0fnu)

    def _window(self, pool: Tensor, shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        self._next = (self._next + 7919 * 64) % (len(pool) - count + 1)
        return pool[self._next : self._next + count].view(shape)


def write(config: Config, folder: Path, seed: int = 0) -> int:
    """Writes a random checkpoint; returns its bytes. Memory: the pool and what is not quantised, never the model."""
    source = PooledSource(config, seed)
    state = {key: source.get(key) for key in source.ordered_keys()}
    checkpoint.save_released(state, folder, config=config, note=RANDOM)
    return sum(tensor.nbytes for tensor in state.values())


def drop_from_page_cache(folder: Path) -> None:
    """Lets the next reader of the files find them on the disk."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError, AttributeError), file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Runner:
    """One sequence through one layer."""

    def __init__(self, config: Config, block: Block, capacity: int):
        self.config, self.block, self.capacity = config, block, capacity
        self.frequencies = RopeFrequencies(config)
        self.table = torch.arange(blocks_of(capacity), dtype=torch.int32).unsqueeze(0)
        self.clear()

    def clear(self) -> None:
        ratio = self.config.layer_ratio(0)
        self.cache = LayerCache.allocate(self.config, ratio, 1, self.table.shape[1])
        self.length = 0

    def streams(self, count: int) -> Tensor:
        """Random ones of `count` tokens."""
        return torch.randn(count, STREAMS, self.config.hidden_size).bfloat16()

    @torch.no_grad()
    def append(self, streams: Tensor) -> Tensor:
        """Runs more tokens, whose streams these are."""
        count = len(streams)
        position = torch.arange(self.length, self.length + count, dtype=torch.int32)
        tables = (self.table,) * 3
        rows = Rows(self.frequencies, torch.zeros_like(position), position, *tables, torch.zeros(count).long())
        self.length += count
        return self.block(streams, rows, self.cache)


@dataclass(frozen=True)
class Times:
    """Seconds on the clock, and of processor time of all threads: the latter tells what a busy machine added."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, run: Callable[[], Any]) -> Times:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return cls(time.perf_counter() - wall, time.process_time() - cpu)


def measure(shape: str, folder: Path, quick: bool = False) -> dict[str, Any]:
    """Writes, checks, loads and runs the layer in an empty folder; the keys of the result are those of `run`'s JSON
    object. Where the check finds a fault, nothing is timed."""
    config = layer_config(shape)
    prefill, context = (PREFILL[:1], PREFILL[0]) if quick else (PREFILL, CONTEXT)
    hardware = environment()["hardware"]
    result: dict[str, Any] = {"op": "layer", "shape": shape, "kind": config.layer_kind(0)}
    result |= {"experts": config.n_routed_experts, "date": time.strftime("%Y-%m-%d")}
    result |= {"processor": hardware["processor"], "cores": hardware["cores"], "threads": torch.get_num_threads()}
    result["load_average_before"] = os.getloadavg()[0]
    result["write_seconds"] = Times.of(lambda: write(config, folder)).wall
    (checked,) = LayerCheck(folder).run()
    result |= {"differences": checked.to_dict()["differences"], "faults": checked.faults}
    if checked.faults:
        return result
    drop_from_page_cache(folder)
    layers = Layers(checkpoint.Checkpoint(folder))
    result["stored_bytes"] = stored = layers.stored_bytes(0)
    routed = sum(layers.checkpoint.nbytes(key) for key in layers.checkpoint.tensors if ".experts." in key)
    result["token_bytes"] = stored - routed + routed * config.num_experts_per_tok // config.n_routed_experts
    memory.reset_peak()
    before = memory.resident()
    started = time.perf_counter()
    with layers.layer(0):
        result["load_seconds"] = time.perf_counter() - started
        result["load_peak_bytes"] = memory.peak() - before
        result["loaded_bytes"] = memory.resident() - before
    started = time.perf_counter()
    with layers.layer(0) as block:
        result["load_cached_seconds"] = time.perf_counter() - started
        runner = Runner(config, block, context + _DECODE_STEPS + 1)
        result["run_bytes"] = _peak_of(runner, prefill) - before
        result |= _run_layer(runner, prefill, context)
    result["activation_bytes"] = result["run_bytes"] - stored
    result["activation_limit_bytes"] = kernel_bytes(config, 0, max(prefill), 2)
    result["loaded_limit_bytes"] = stored + _LOADED_SLACK
    return result


def _peak_of(runner: Runner, prefill: Sequence[int]) -> int:
    """Most bytes of the process in memory with prompts of so many tokens, each given back before the next."""
    memory.reset_peak()
    for count in prefill:
        runner.clear()
        runner.append(runner.streams(count))
    return memory.peak()


def _run_layer(runner: Runner, prefill: Sequence[int], context: int) -> dict[str, Any]:
    """The times, with freed memory kept as `dsv4 generate` keeps it."""
    found: dict[str, Any] = {"prefill": []}
    memory.keep_freed()
    for count in prefill:
        streams = runner.streams(count)
        for _ in range(2):  # the first one also makes memory for the results
            runner.clear()
            taken = Times.of(functools.partial(runner.append, streams))
        found["prefill"].append({"tokens": count, "seconds": taken.wall, "cpu_seconds": taken.cpu})
    while runner.length < context:
        runner.append(runner.streams(min(max(prefill), context - runner.length)))
    runner.append(runner.streams(1))
    tokens = [runner.streams(1) for _ in range(_DECODE_STEPS)]  # of experts of their own
    steps = [Times.of(functools.partial(runner.append, token)) for token in tokens]
    return found | {
        "context": context,
        "decode_ms": statistics.median(step.wall for step in steps) * 1e3,
        "decode_ms_best": min(step.wall for step in steps) * 1e3,
        "decode_cpu_ms": statistics.median(step.cpu for step in steps) * 1e3,
    }


def run(shape: str = "v4-flash", scratch: str | None = None, json_file: str | None = None, quick: bool = False) -> int:
    """Prints the figures of one layer, and writes them as one JSON object to `json_file`.

    Args:
        shape: the model whose widths the layer has.
        scratch: an existing folder to write the checkpoint below, which is removed afterwards; None: the system's.
        quick: fewer tokens.
    Returns: the exit code: 1 where the kernels differ from the references by more than `dsv4 inspect --check-layers`
        allows, or the memory exceeds stored bytes plus the bound on activations.
    Raises: OSError where the checkpoint does not fit or cannot be written.
    """
    source = RandomSource(layer_config(shape))
    needed = int(1.02 * sum(map(source.nbytes, source.ordered_keys())))
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(json_file, "w", encoding="utf-8")) if json_file else None
        if scratch is not None and not Path(scratch).is_dir():
            raise FileNotFoundError(f"{scratch}: no such folder; make it, or name another with --scratch")
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv4-layer-", dir=scratch))
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"{folder}: the layer takes {size(needed)}, {size(free)} are free; use --scratch")
        result = measure(shape, Path(folder) / "layer", quick)
        result["within_limit"] = not result["faults"] and (
            result["loaded_bytes"] <= result["loaded_limit_bytes"]
            and result["activation_bytes"] <= result["activation_limit_bytes"]
        )
        print("\n".join(lines(result)), flush=True)
        if out is not None:
            out.write(json.dumps(result) + "\n")
    return 0 if result["within_limit"] else 1


def lines(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    apart = ", ".join(f"{part} {found['rms']:.1e}" for part, found in result["differences"].items())
    found = [
        f"layer      {result['shape']}, {result['kind'].upper()}, {result['experts']} experts",
        f"machine    {result['processor']}, {result['threads']} of {result['cores']} cores; load average "
        f"{result['load_average_before']:.1f} before",
        f"check      kernels against references, rms: {apart or 'not compared'}",
    ]
    if result["faults"]:
        return [*found, *(f"FAILED     {fault}" for fault in result["faults"])]
    stored, token, decode = result["stored_bytes"], result["token_bytes"], result["decode_ms"]
    found.append(
        f"load       {size(stored)} in {result['load_seconds']:.2f} s from the disk, "
        f"{result['load_cached_seconds']:.2f} s from the page cache; written in {result['write_seconds']:.1f} s"
    )
    for step in result["prefill"]:
        tokens, wall, cpu = step["tokens"], step["seconds"], step["cpu_seconds"]
        found.append(f"prefill    {tokens / wall:,.0f} tokens/s ({tokens:,} in {wall:.2f} s; {cpu:.2f} s of processor)")
    found += [
        f"decode     {decode:.1f} ms a token behind {result['context']:,} others (best {result['decode_ms_best']:.1f}; "
        f"{result['decode_cpu_ms']:.1f} of processor), {size(token)} of weights: {token / decode / 1e6:.1f} GB/s",
        f"loaded     {size(result['loaded_bytes'])} (limit {size(result['loaded_limit_bytes'])}), "
        f"{size(result['load_peak_bytes'])} meanwhile",
        f"running    {size(result['run_bytes'])} = stored + {size(max(result['activation_bytes'], 0))} "
        f"(limit {size(result['activation_limit_bytes'])})",
    ]
    if not result["within_limit"]:
        found.append("FAILED     more memory than stored bytes plus activations")
    return found
