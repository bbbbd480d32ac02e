"""`dsv4 bench --end-to-end`: nano beside other programs that run it, same weights, same tokens, same run, same threads.

Prefill: a prompt from nothing, median of up to three. Decode: the tokens that follow it, one at a time, as the text has
them, so that every program sees the same; median of their times. Text as in `dsv4 bench --million`.

The check: logits of the prompt's last token and of all decoded ones against ours in mode "off", float32; per token
rms(difference) / rms(logits), the median of which has to stay below the limit of the precision; no time is shown
otherwise. The limits allow for what nano's random weights amplify: with 4 index heads many index scores are exactly
zero, the choice among them is each program's own, and caches of half precision choose other entries. Mode "checkpoint"
is held to a limit that shows no more than that it is the same model: its rounding is a different computation.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.bench.measure import report
from dsv4.bench.million import text_tokens
from dsv4.bench.peers import MISSING, Engine, LlamaEngine, TransformersEngine, installed
from dsv4.checkpoint import init
from dsv4.console import say, size
from dsv4.environment import free_bytes
from dsv4.model.config import Config
from dsv4.model.recording import RecordedModel
from dsv4.planner import format_context

CONTEXTS = (1024, 4096, 16384, 65536)
NEW_TOKENS = 32
#: The other programs.
PEERS = ("transformers", "llama.cpp")
#: Most seconds that a prompt may be expected to take, as the square of its length.
MOST_SECONDS = 900.0
LIMITS = {"float32": 0.05, "bfloat16": 0.15, "checkpoint": 0.4}
#: The fields of one result, in order.
KEYS = (
    "bench", "what", "engine", "precision", "context", "tokens_per_s", "us", "spread", "cpu_us", "error", "error_limit",
    "ratio", "cpu_ratio", "threads", "note",
)  # fmt: skip

_CHUNK = 2048
_PIECE = 512
_REPEATS, _REPEAT_SECONDS = 3, 10.0
_PROFILED = 8


class OwnEngine:
    """This package."""

    name = "dsv4"

    def __init__(self, config: Config, precision: str, room: int):
        self.precision = precision
        if precision == "checkpoint":
            self.model = init(config)
        else:
            self.model = init(config, quantization="off", dtype=getattr(torch, precision))
        self._room = room
        self._call = RecordedModel(self.model)  # as `generate` does
        self.reset()

    def reset(self) -> None:
        self.cache = self.model.new_cache(max_seq_len=self._room)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        for part in ids.split(_CHUNK):
            logits = self._call(part.unsqueeze(0), cache=self.cache, logits_to_keep=1)
        return logits[0, -1].float()

    def bytes_needed(self, tokens: int) -> int:
        """A cache of plain rows is the largest."""
        return tokens * self.model.config.num_hidden_layers * self.model.config.head_dim * 4


def run(
    contexts: Sequence[int] | None = None,
    json_file: str | None = None,
    shape: str = "nano",
    beside: Sequence[str] | None = None,
) -> int:
    """Run all programs that are installed; print a line a result, and write one JSON object a line to `json_file`.

    Args:
        contexts: lengths of the prompt; None: CONTEXTS.
        json_file: the file.
        shape: preset to run.
        beside: which of PEERS to run; None: all.
    Returns: the exit code: 1 where logits were beyond their limit.
    Raises: ValueError, in one line: too little text. OSError: the file cannot be written.
    """
    chosen = sorted(contexts or CONTEXTS)
    config, text = Config.preset(shape), text_tokens(max(chosen) + NEW_TOKENS)
    failed = 0
    with ExitStack() as stack:
        out = stack.enter_context(open(json_file, "w", encoding="utf-8")) if json_file else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        expected: dict[int, Tensor] = {}
        own: dict[tuple[str, int], dict[str, Any]] = {}
        for make in _engines(config, folder, len(text) + _PROFILED, beside or PEERS):
            engine, missing = make()
            for result in _not_run(missing, chosen) if engine is None else _results(engine, text, chosen, expected):
                key = (result["what"], result["context"])
                if result["engine"] == "dsv4" and result["precision"] == "checkpoint":
                    own[key] = result
                if result["cpu_us"] and key in own and own[key]["cpu_us"]:
                    result["ratio"] = result["us"] / own[key]["us"]
                    result["cpu_ratio"] = result["cpu_us"] / own[key]["cpu_us"]
                failed += result["error"] is not None and result["us"] is None
                report(line(result), result, out)
            del engine
    if failed:
        say(f"{failed} failed their check")
    return 1 if failed else 0


_Made = tuple[Engine | None, tuple[str, str]]


def _engines(config: Config, folder: Path, room: int, beside: Sequence[str]) -> Iterator[Callable[[], _Made]]:
    """Each a function that makes an engine, or says which (name, precision) is not installed. Ours in float32 first."""
    for precision in ("float32", "checkpoint", "bfloat16"):
        yield partial(_make_own, config, precision, room)
    for dtype in (torch.float32, torch.bfloat16) if "transformers" in beside else ():
        for piece in (None, _PIECE):
            yield partial(_make_transformers, config, dtype, piece)
    for dtype in (torch.float32, torch.bfloat16) if "llama.cpp" in beside else ():
        yield partial(_make_llama, config, dtype, folder, room)


def _make_own(config: Config, precision: str, room: int) -> _Made:
    return OwnEngine(config, precision, room), ("dsv4", precision)


def _make_transformers(config: Config, dtype: torch.dtype, piece: int | None) -> _Made:
    named = ("transformers", str(dtype).removeprefix("torch."))
    if not installed("transformers"):
        return None, named
    return TransformersEngine(_weights(config), config, dtype, piece), named


def _make_llama(config: Config, dtype: torch.dtype, folder: Path, room: int) -> _Made:
    named = ("llama.cpp", str(dtype).removeprefix("torch."))
    if not installed("llama_cpp", "gguf"):
        return None, named
    return LlamaEngine(_weights(config), config, dtype, folder, room), named


def _weights(config: Config) -> dict[str, Tensor]:
    return init(config, quantization="off", dtype=torch.float32).state_dict()


def _result(what: str, engine: str, precision: str, context: int, /, **values: Any) -> dict[str, Any]:
    known = {"bench": "end-to-end", "what": what, "engine": engine, "precision": precision, "context": context}
    return dict.fromkeys(KEYS) | known | {"threads": torch.get_num_threads()} | values


def _not_run(missing: tuple[str, str], contexts: Sequence[int]) -> Iterator[dict[str, Any]]:
    for context in contexts:
        for what in ("prefill", "decode"):
            yield _result(what, *missing, context, note=MISSING)


def _results(
    engine: Engine, text: Tensor, contexts: Sequence[int], expected: dict[int, Tensor]
) -> Iterator[dict[str, Any]]:
    """Prefill and decode of one engine at all contexts; the first engine of a run fills `expected` with its logits."""
    limit = LIMITS[engine.precision]
    before = (0, 0.0)
    for context in contexts:
        named = (engine.name, engine.precision, context)
        reason = _refusal(engine, context, *before)
        if reason is not None:
            for what in ("prefill", "decode"):
                yield _result(what, *named, note=reason)
            continue
        prefill, first = _time_prefill(engine, text[:context])
        before = (context, prefill["us"] / 1e6)
        steps, logits = [], [first]
        for token in text[context : context + NEW_TOKENS].split(1):
            taken, result = _timed(engine, token)
            steps.append(taken)
            logits.append(result)
        found = torch.stack(logits).double()
        error = _error(found, expected.setdefault(context, found))
        decode = _times(steps, 1)
        for what, times in (("prefill", prefill), ("decode", decode)):
            shown: dict[str, Any] = dict(times) if error <= limit else {}
            yield _result(what, *named, error=error, error_limit=limit, **shown)
        if isinstance(engine, OwnEngine) and context == contexts[0] and error <= limit:
            yield _result("decode step", *named, us=decode["us"], note=_profile(engine, text[:_PROFILED]))


def _refusal(engine: Engine, context: int, before: int, seconds: float) -> str | None:
    """Why a prompt is not run: it would take too much memory, or, by the last one, too long."""
    needed, free = engine.bytes_needed(context), free_bytes()
    if free is not None and needed > 0.9 * free:
        return f"not run: needs about {size(needed)}, {size(free)} are free"
    expected = seconds * (context / before) ** 2 if before else 0.0
    if expected > MOST_SECONDS:
        return f"not run: would take up to {expected:,.0f} s"
    return None


def _timed(engine: Engine, ids: Tensor) -> tuple[tuple[float, float], Tensor]:
    """((seconds, CPU seconds), logits)."""
    started, cpu = time.perf_counter(), time.process_time()
    logits = engine.feed(ids)
    return (time.perf_counter() - started, time.process_time() - cpu), logits


def _time_prefill(engine: Engine, ids: Tensor) -> tuple[dict[str, float], Tensor]:
    """(times, logits); the last of the repeats stays in the engine's memory."""
    taken: list[tuple[float, float]] = []
    while len(taken) < _REPEATS and sum(seconds for seconds, _ in taken) < _REPEAT_SECONDS:
        engine.reset()
        step, logits = _timed(engine, ids)
        taken.append(step)
    return _times(taken, len(ids)), logits


def _times(taken: Sequence[tuple[float, float]], tokens: int) -> dict[str, float]:
    """Medians, and half the distance between the quartiles, of (seconds, CPU seconds) for so many tokens."""
    seconds = [wall for wall, _ in taken]
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [0.0] * 3
    median = statistics.median(seconds)
    return {
        "tokens_per_s": tokens / median,
        "us": median * 1e6,
        "spread": (quartiles[2] - quartiles[0]) / 2 * 1e6,
        "cpu_us": statistics.median(cpu for _, cpu in taken) * 1e6,
    }


def _error(found: Tensor, expected: Tensor) -> float:
    """Median over the tokens of rms(difference) / rms(logits); NaN where a logit is."""
    each = (found - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    return float("nan") if bool(each.isnan().any()) else float(each.median())


def _profile(engine: OwnEngine, ids: Tensor) -> str:
    """Where the time of a decode step goes, under the profiler, which makes Python and dispatch look slower."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        for token in ids.split(1):
            engine.feed(token)
        whole = (time.perf_counter() - started) / len(ids) * 1e6
    spent = {"dsv4": 0.0, "aten": 0.0}
    calls = 0
    for event in found.key_averages():
        space = event.key.partition("::")[0]
        if space in spent:
            spent[space] += event.self_cpu_time_total / len(ids)
            calls += event.count
    rest = whole - sum(spent.values())
    return (
        f"profiled {whole:,.0f} us: {spent['dsv4']:,.0f} in dsv4 ops, {spent['aten']:,.0f} in torch ops, "
        f"{rest:,.0f} in Python and dispatch of {calls / len(ids):,.0f} calls"
    )


def line(result: dict[str, Any]) -> str:
    """One result as text."""
    name = f"{result['what']:<8}{format_context(result['context']):>6} {result['engine']} {result['precision']}"
    if result["note"]:
        whole = f"{result['us']:,.0f} us; " if result["us"] else ""
        return f"{name} | {whole}{result['note']}"
    checked = f"err={result['error']:.1e} limit={result['error_limit']:.1e}"
    if result["us"] is None:
        return f"{name} | FAILED its check: {checked}"
    parts = [f"{result['tokens_per_s']:,.1f} tokens/s", f"{result['us']:,.0f} us ±{result['spread']:,.0f}"]
    parts.append(f"{result['cpu_us']:,.0f} us of CPU")
    if result["ratio"]:
        parts.append(f"{result['ratio']:.2f} x the time of dsv4 checkpoint ({result['cpu_ratio']:.2f} x of CPU)")
    return f"{name} | {' | '.join(parts)} | ok {checked}"
