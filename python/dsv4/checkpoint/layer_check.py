"""Runs a checkpoint layer by layer, in the memory of one, and holds the kernels of each to the references.

The kernels run a layer on all tokens. The references then run its last rows again, each part on the very inputs that
the kernels gave it, so that a rounding that falls the other way in one part does not travel into the next:
  attention  the output of the attention sublayer; of what the rows before left in the cache, the kernels wrote it
  experts    the output of the mixture of experts, its router included
  mixing     the inputs of both and the layer's streams: hyper-connections and norms
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.cache import LayerCache
from dsv4.cache.layer import blocks_of
from dsv4.checkpoint import memory
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.layers import Layers, parse_layers, ranges
from dsv4.checkpoint.loader import resolve
from dsv4.checkpoint.memory import size
from dsv4.checkpoint.progress import byte_bar
from dsv4.checkpoint.reader import REMAP_BYTES, Checkpoint
from dsv4.model.block import Block
from dsv4.model.config import Config
from dsv4.nn.hyper_connection import STREAMS
from dsv4.nn.rows import RopeFrequencies, Rows

TOKENS, SAMPLE_ROWS = 512, 4
RMS_LIMITS, LARGEST_LIMIT = {"attention": 2e-2, "experts": 1e-2, "mixing": 1e-2}, 5e-2
"""What a part may differ by: root mean square over that of the reference; largest difference over largest magnitude."""
PARTS = tuple(RMS_LIMITS)

# First use of an op brings in pages of its library and of torch, which have nothing to do with a layer's size.
_LIBRARY_BYTES = 128 << 20


@dataclass(frozen=True)
class Difference:
    """Kernels against references on the sampled rows: rms over rms, largest over largest."""

    rms: float
    largest: float

    @classmethod
    def of(cls, kernel: Tensor, reference: Tensor) -> Difference:
        kernel, reference = kernel.double(), reference.double()
        if torch.equal(kernel, reference):
            return cls(0.0, 0.0)
        apart = kernel - reference
        return cls(
            float(apart.square().mean().sqrt() / reference.square().mean().sqrt()),
            float(apart.abs().max() / reference.abs().max()),
        )

    def within_limits_of(self, part: str) -> bool:
        return self.rms <= RMS_LIMITS[part] and self.largest <= LARGEST_LIMIT  # false for NaN

    def worse(self, other: Difference) -> Difference:
        return Difference(max(self.rms, other.rms), max(self.largest, other.largest))


@dataclass
class LayerReport:
    """What came of one layer.

    Attributes:
        layer: number. kind: "swa", "csa" or "hca". routing: "hash" or "scored".
        stored_bytes: of its tensors in the files.
        load_seconds, kernel_seconds, reference_seconds: loading, the kernels on all rows, the references on the sample.
        rms, largest, not_finite: of the streams that left it; how many values are NaN or infinite.
        differences: {part: Difference}; none where the layer was not run or its streams are not finite.
        peak_bytes: most memory of the process while the layer was loaded and run.
        faults: what is wrong, one line each.
    """

    layer: int
    kind: str
    routing: str
    stored_bytes: int
    load_seconds: float = 0.0
    kernel_seconds: float = 0.0
    reference_seconds: float = 0.0
    rms: float = 0.0
    largest: float = 0.0
    not_finite: int = 0
    differences: dict[str, Difference] = field(default_factory=dict)
    peak_bytes: int = 0
    faults: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        differences = {
            part: {"rms": d.rms, "rms_limit": RMS_LIMITS[part], "largest": d.largest, "largest_limit": LARGEST_LIMIT}
            for part, d in self.differences.items()
        }
        return asdict(self) | {"differences": differences, "faults": list(self.faults)}


class LayerCheck:
    """A checkpoint ready to be checked; `run()` does it.

    Args:
        path: folder or bundled name.
        layers: as `parse_layers` takes them, "0-3,7"; None: all. A layer that is left out passes the streams on
            unchanged, so one that follows a gap gets what the last layer before it gave (the embedding, where there was
            none): streams of the right form, not those of the whole model.
        tokens: in the one sequence that runs, at least SAMPLE_ROWS. Its ids are drawn with a fixed seed.
        budget: bytes that the process may take; None: what the machine has to give.
    Raises:
        CheckpointError: no whole checkpoint. ValueError: a layer needs more than `budget`, in one line with the value
            that would do.
    """

    def __init__(self, path: Any, layers: str | None = None, tokens: int = TOKENS, budget: int | None = None) -> None:
        checkpoint = Checkpoint(resolve(path))
        checkpoint.validate()
        self.config: Config = checkpoint.config
        if not SAMPLE_ROWS <= tokens <= self.config.max_position_embeddings:
            raise ValueError(f"tokens must be {SAMPLE_ROWS} to {self.config.max_position_embeddings}, got {tokens}")
        self.source = Layers(checkpoint)
        count = self.config.num_hidden_layers
        self.layers = list(range(count)) if layers is None else parse_layers(layers, count)
        self.tokens = tokens
        self.frequencies = RopeFrequencies(self.config)
        generator = torch.Generator().manual_seed(0)
        self.token_ids = torch.randint(self.config.vocab_size, (tokens,), generator=generator)
        self._check_budget(budget)

    def _check_budget(self, budget: int | None) -> None:
        with ops.use_reference():  # imports parts of torch, whose pages are not a layer's
            ops.rms_norm(torch.ones(1, 1), None, 1.0)
        base = memory.resident()
        needs = {layer: base + self.layer_bytes(layer) for layer in self.layers}
        self.largest_layer = max(needs, key=lambda layer: needs[layer])
        self.needed = needs[self.largest_layer]
        free = memory.available()
        self.budget = budget if budget is not None else self.needed if free is None else base + free
        if self.needed > self.budget:
            held = self.source.held_bytes(self.largest_layer)
            raise ValueError(
                f"layer {self.largest_layer} needs {size(self.needed)}: {size(held)} stored, "
                f"{size(self.needed - held - base)} to run {self.tokens} tokens, {size(base)} the program itself; "
                f"{size(self.budget)} are "
                + ("allowed" if budget is not None else "free")
                + f": give --memory {_round_up(self.needed)} or fewer --tokens"
            )

    def layer_bytes(self, layer: int) -> int:
        """Upper bound of what loading and running a layer adds to the memory of the process."""
        reading = min(self.source.stored_bytes(layer), REMAP_BYTES + self.source.largest_read(layer))
        running = kernel_bytes(self.config, layer, self.tokens, self.source.dtype.itemsize)
        running += reference_bytes(self.config, layer)
        return self.source.held_bytes(layer) + max(reading, running) + _LIBRARY_BYTES

    def run(self) -> Iterator[LayerReport]:
        """Checks layer after layer. A layer at fault passes the streams on unchanged, so that those behind it are
        judged by themselves.

        Raises: ValueError: a layer took more memory than the budget.
        """
        streams = self.source.embed(self.token_ids).unsqueeze(1).repeat(1, STREAMS, 1)
        for layer in self.layers:
            with byte_bar(f"layer {layer}", self.source.stored_bytes(layer)) as advance:
                report, streams = self._layer(layer, streams, advance)
            yield report
            if report.peak_bytes > self.budget:
                raise ValueError(
                    f"layer {layer} took {size(report.peak_bytes)}, more than the {size(self.budget)} allowed"
                )

    @torch.no_grad()
    def _layer(self, layer: int, streams: Tensor, advance: Callable[[int], None]) -> tuple[LayerReport, Tensor]:
        memory.reset_peak()
        routing = "hash" if self.config.is_hash_layer(layer) else "scored"
        report = LayerReport(layer, self.config.layer_kind(layer), routing, self.source.stored_bytes(layer))
        started = time.perf_counter()
        try:
            with self.source.layer(layer, advance) as block:
                report.load_seconds = time.perf_counter() - started
                after = self._run_kernels(block, streams, report)
        except CheckpointError as error:
            if not error.problems:
                raise
            report.faults = tuple(f"layer {layer}: {problem}" for problem in error.problems)
            after = streams
        report.peak_bytes = memory.peak()
        return report, after

    def _run_kernels(self, block: Block, streams: Tensor, report: LayerReport) -> Tensor:
        """Fills the report; returns the streams for the next layer."""
        ratio = self.config.layer_ratio(report.layer)
        started = time.perf_counter()
        with _recorded(block) as seen:
            out = block(streams, self._rows(0, self.tokens), self._cache(ratio))
        report.kernel_seconds = time.perf_counter() - started
        wide = out.float()
        finite = torch.isfinite(wide)
        report.rms, report.largest = float(wide.square().mean().sqrt()), float(wide.abs().max())
        report.not_finite = int((~finite).sum())
        if report.not_finite:
            where = int((~finite).flatten(1).any(1).nonzero()[0])
            report.faults = (
                f"layer {report.layer}: {report.not_finite} of {out.numel()} values are NaN or infinite, "
                f"first of token {where}, first in {_first_not_finite(seen)}",
            )
            return streams
        started = time.perf_counter()
        report.differences = self._compare(block, ratio, streams, seen, out)
        report.reference_seconds = time.perf_counter() - started
        report.faults = tuple(
            f"layer {report.layer}: {part} on kernels differs from its reference by {d.rms:.1e} rms "
            f"(limit {RMS_LIMITS[part]:g}), "
            f"{d.largest:.1e} at most (limit {LARGEST_LIMIT:g})"
            for part, d in report.differences.items()
            if not d.within_limits_of(part)
        )
        return streams if report.faults else out

    def _compare(
        self, block: Block, ratio: int, streams: Tensor, seen: dict[str, Tensor], out: Tensor
    ) -> dict[str, Difference]:
        first = self.tokens - SAMPLE_ROWS
        cache = self._cache(ratio)
        if first:
            block.attn(seen["attn input"][:first], self._rows(0, first), cache)
        sample = {name: value[first:] for name, value in seen.items()}
        with ops.use_reference(), _recorded(block, sample) as reference:
            reference_out = block(streams[first:], self._rows(first, self.tokens), cache)
        found = {
            name: Difference.of(sample[name], reference[name])
            for name in ("attn input", "attn output", "ffn input", "ffn output")
        }
        mixing = found["attn input"].worse(found["ffn input"]).worse(Difference.of(out[first:], reference_out))
        return dict(zip(PARTS, (found["attn output"], found["ffn output"], mixing), strict=True))

    def _cache(self, ratio: int) -> LayerCache:
        pages = blocks_of(self.tokens)
        return LayerCache.allocate(self.config, ratio, 1, pages, self.source.quantization, self.source.dtype)

    def _rows(self, start: int, stop: int) -> Rows:
        """Rows of the one sequence, from position `start` to `stop`."""
        table = torch.arange(blocks_of(self.tokens), dtype=torch.int32).unsqueeze(0)
        position = torch.arange(start, stop, dtype=torch.int32)
        sequence = torch.zeros_like(position)
        return Rows(self.frequencies, sequence, position, table, table, table, self.token_ids[start:stop])


@contextmanager
def _recorded(block: Block, replay: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Keeps inputs and outputs of both sublayers; with `replay`, goes on with those values in place of them."""
    seen: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            seen[f"{name} input"] = args[0]
            return None if replay is None else (replay[f"{name} input"], *args[1:])

        return hook

    def after(name: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Any:
            seen[f"{name} output"] = output
            return None if replay is None else replay[f"{name} output"]

        return hook

    with ExitStack() as stack:
        for name in ("attn", "ffn"):
            module = block.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before(name)).remove)
            stack.callback(module.register_forward_hook(after(name)).remove)
        yield seen


def _first_not_finite(seen: dict[str, Tensor]) -> str:
    names = {"attn input": "the mixing before attention", "attn output": "attention",
             "ffn input": "the mixing before the experts", "ffn output": "the experts"}  # fmt: skip
    return next((names[key] for key, value in seen.items() if not torch.isfinite(value).all()), "the streams")


def kernel_bytes(config: Config, layer: int, tokens: int, itemsize: int) -> int:
    """Upper bound of the memory that a layer on kernels takes beside its weights: for each token its streams, queries,
    index queries and the hidden rows of its experts, in as many copies as live at once; and the rows that it caches."""
    query = config.num_attention_heads * config.head_dim
    row = 4 * STREAMS * config.hidden_size * itemsize + 3 * query * itemsize
    row += config.num_experts_per_tok * config.moe_intermediate_size * (2 * itemsize + 1) + 8 * config.hidden_size
    row += 2 * config.head_dim * itemsize
    if config.layer_kind(layer) == "csa":
        row += 2 * config.index_n_heads * config.index_head_dim * 4
    return tokens * row + (64 << 20)


def reference_bytes(config: Config, layer: int) -> int:
    """Upper bound of what the references take more on the sample: they widen a matrix at a time to float64, and hold
    up to three such copies of it."""
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    matrices = [
        query * config.q_lora_rank,
        config.o_groups * config.o_lora_rank * max(hidden, query // config.o_groups),
        hidden * config.moe_intermediate_size,
        2 * hidden * config.head_dim,
    ]
    if config.layer_kind(layer) == "csa":
        matrices.append(config.index_n_heads * config.index_head_dim * config.q_lora_rank)
    return 3 * 8 * max(matrices)


def heading(check: LayerCheck) -> list[str]:
    """What is going to be done, as text."""
    count = check.config.num_hidden_layers
    chosen = f"layers {ranges(check.layers)} of {count}" if len(check.layers) < count else f"all {count} layers"
    lines = [
        f"checking   {chosen}, {check.tokens} tokens; references on the last {SAMPLE_ROWS}",
        f"memory     {size(check.needed)} needed (layer {check.largest_layer}), {size(check.budget)} allowed",
        f"limits     rms: {', '.join(f'{part} {limit:g}' for part, limit in RMS_LIMITS.items())}; "
        f"largest: {LARGEST_LIMIT:g}",
    ]
    if len(check.layers) < count:
        lines.append("streams    pass unchanged where a layer is left out: not those of the whole model")
    lines.append(
        f"{'layer':<16}{'load':>9}{'kernels':>10}{'rms':>9}{'max |x|':>10}{'not finite':>12}"
        + "".join(f"{part:>20}" for part in PARTS)
        + f"{'peak RSS':>12}"
    )
    return lines


def line(report: LayerReport) -> str:
    """One layer as text, under `heading`."""
    cells = [f"{report.layer} {report.kind.upper()} {report.routing}".ljust(16), f"{report.load_seconds:>7.2f} s"]
    if report.kernel_seconds:
        cells.append(f"{report.kernel_seconds * 1e3:>7.0f} ms{report.rms:>9.3g}{report.largest:>10.3g}")
        cells.append(f"{report.not_finite:>12}")
    for part in PARTS if report.differences else ():
        found = report.differences[part]
        cells.append(f"{found.rms:>10.1e} {found.largest:>8.1e}".rjust(20))
    if not report.differences:
        cells.append("   not compared")
    return "".join((*cells, f"{size(report.peak_bytes):>12}"))


def _round_up(count: int) -> str:
    """A little more, as --memory takes it: in whole MiB, from 10 GiB on in whole GiB."""
    unit, shift = ("M", 20) if count < 10 << 30 else ("G", 30)
    return f"{(count >> shift) + 1}{unit}"
