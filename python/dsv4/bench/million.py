"""`dsv4 bench --million`: a million real tokens through one small model in one process.

The model: the first four layers of nano (two of sliding-window attention, one CSA, one HCA), random weights, mode
checkpoint. The tokens: the sources of Python's standard library, one token a byte, files in the order of their names.

What is printed: tokens/s of the last sixteenth before 64K, 256K and 1M tokens beside the planner's FLOPs of a token
there; then cache bytes, which must be the plan's, peak memory, and the decoding that follows. The digest is of the
logits of the last prompt token and of every decoded one: equal digests, equal bits.

With a folder the cache is saved there every half minute and at an interrupt, which the step in progress delays until it
is whole; a second interrupt ends the run at once, with the save before it. A run that finds a save continues it: same
digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import signal
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from dsv4.bench.measure import report
from dsv4.cache import KVCache, cache_bytes
from dsv4.checkpoint import init
from dsv4.checkpoint.loader import BUNDLED
from dsv4.checkpoint.progress import terminal_bar
from dsv4.console import say, size
from dsv4.environment import environment
from dsv4.generation import Tokenizer
from dsv4.model.config import Config
from dsv4.model.recording import RecordedModel
from dsv4.model.transformer import Transformer
from dsv4.planner import format_context, plan

#: Of the prompt, and where its speed is shown.
TOKENS = 1 << 20
MARKS = (1 << 16, 1 << 18, 1 << 20)
#: Decoded after them, each the likeliest; tokens a step; seconds between saves.
NEW_TOKENS = 64
CHUNK = 2048
SAVE_SECONDS = 30.0

_LAYERS = 4
_NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def model_config() -> Config:
    """The first four layers of nano: SWA, SWA, CSA, HCA."""
    nano = Config.preset("nano")
    return dataclasses.replace(nano, num_hidden_layers=_LAYERS, compress_ratios=nano.compress_ratios[:_LAYERS])


def text_tokens(count: int, folder: Path | None = None) -> Tensor:
    """The first `count` bytes of the standard library's sources as tokens of nano's vocabulary, int64 [count].

    Raises: ValueError: fewer bytes than that.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    text = bytearray()
    for name in names:
        if len(text) >= count:
            break
        if not _NOT_TEXT.intersection(name.split("/")):
            text += (root / name).read_bytes()
    if len(text) < count:
        raise ValueError(f"the sources in {root} have {len(text):,} bytes, --tokens asks for {count:,}")
    table = np.array(Tokenizer(BUNDLED / "nano").byte_tokens(), dtype=np.int64)
    return torch.from_numpy(table[np.frombuffer(bytes(text[:count]), dtype=np.uint8)])


class Step(NamedTuple):
    """Tokens so far after a step of the prefill, and what the step took: seconds, and seconds of all threads' work."""

    end: int
    seconds: float
    cpu_seconds: float


class Saves:
    """A cache in a folder, with the seconds that its tokens took. Both files are replaced whole or not at all."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.length = 0
        self.spent = 0.0
        self._last = time.perf_counter()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, config: Config, tokens: Tensor, room: int) -> tuple[KVCache, list[Step]] | None:
        """What `save` wrote: (cache, times); None where nothing is saved.

        Raises: ValueError: the saved cache is of another text, model or format, or longer than `tokens`.
        """
        if self.folder is None or not (self.folder / "cache.safetensors").exists():
            return None
        cache = KVCache.load(self.folder / "cache.safetensors", config, max_seq_len=room)
        self.length = cache.length
        if self.length > len(tokens) or not torch.equal(cache.token_ids(), tokens[: self.length]):
            raise ValueError(
                f"{self.folder} holds {self.length:,} tokens of another run or Python; name an empty folder"
            )
        try:
            times = json.loads((self.folder / "times.json").read_text(encoding="utf-8"))
            # Times go first: they may reach further than the cache, never less far.
            times = [step for step in (Step(*values) for values in times) if step.end <= self.length]
            if (times[-1].end if times else 0) != self.length:
                raise ValueError
        except (OSError, ValueError, TypeError):
            raise ValueError(f"{self.folder}/times.json is missing or damaged; name an empty folder") from None
        return cache, times

    def save(self, cache: KVCache, times: list[Step], now: bool = False) -> None:
        """Saves when it is time to, or `now`."""
        started = time.perf_counter()
        if self.folder is None or cache.length == self.length or not (now or started - self._last >= SAVE_SECONDS):
            return
        partial = self.folder / "times.json.partial"
        partial.write_text(json.dumps(times), encoding="utf-8")
        os.replace(partial, self.folder / "times.json")
        cache.save(self.folder / "cache.safetensors")
        self.length = cache.length
        self._last = time.perf_counter()
        self.spent += self._last - started


class Interrupts:
    """Keeps the first SIGINT for later, while steps run that are to be saved; a second one interrupts at once."""

    def __init__(self, wait: bool):
        self.asked = False
        # Python gives signals to its main thread alone.
        self._wait = wait and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupts:
        if self._wait:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._wait:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("interrupted: this step is finished and saved first; once more to stop at once")


class Bar:
    """Progress with speed and time to go, on a terminal."""

    def __init__(self, total: int, done: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = terminal_bar(*columns, speed_estimate_period=120)
        self._task = self._bar.add_task("tokens", total=total, completed=done)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, done: int, rate: float) -> None:
        self._bar.update(self._task, completed=done, description=f"{rate:,.0f} tokens/s")


def last_steps(times: list[Step], mark: int) -> tuple[int, float, float]:
    """(tokens, seconds, CPU seconds) of the last sixteenth before `mark`, in whole steps, at least one."""
    done = [step for step in times if step.end <= mark]
    begins = [0, *(step.end for step in done)]
    first = min(next(at for at, end in enumerate(begins) if end >= mark - mark // 16), len(done) - 1)
    chosen = done[first:]
    return (
        done[-1].end - begins[first],
        sum(step.seconds for step in chosen),
        sum(step.cpu_seconds for step in chosen),
    )


def run(tokens: int = TOKENS, folder: str | Path | None = None, json_file: str | None = None) -> int:
    """Prefill and decode; print what the module says, and write one JSON object a line to `json_file`.

    Args:
        tokens: of the prompt.
        folder: where to save, and to continue from what is saved there.
        json_file: the file.
    Returns: the exit code: 1 where the cache has other bytes than the plan.
    Raises: ValueError, in one line: a save that does not fit; too little text. OSError: a file cannot be written.
    """
    config, text = model_config(), text_tokens(tokens)
    saves = Saves(Path(folder) if folder is not None else None)
    with ExitStack() as stack:
        out = stack.enter_context(open(json_file, "w", encoding="utf-8")) if json_file else None

        def show(line: str, result: dict[str, Any]) -> None:
            report(line, {"bench": "million", **result}, out)

        model = init(config, seed=0)
        found = saves.load(config, text, tokens + NEW_TOKENS)
        cache, times = found or (model.new_cache(max_seq_len=tokens + NEW_TOKENS), [])
        resumed = cache.length
        if resumed:
            say(f"continuing from {resumed:,} tokens in {folder}")
        try:
            with torch.no_grad():
                with Bar(tokens, resumed) as bar:
                    logits = _prefill(
                        model, cache, text, times, saves, bar, lambda mark: _mark(cache, times, mark, show)
                    )
                return _finish(model, cache, logits, times, saves, resumed, show)
        except _WrongBytes as error:
            print(f"FAILED: {error}", flush=True)
            return 1
        except KeyboardInterrupt:
            again = f"dsv4 bench --million --tokens {tokens} --resume {folder}"
            kept = f"{saves.length:,} are saved; to continue: {again}" if folder is not None else (
                "nothing is saved: --resume FOLDER saves as it goes")  # fmt: skip
            say(f"interrupted after {cache.length:,} of {tokens:,} tokens; {kept}")
            raise


class _WrongBytes(Exception):
    """The cache has other bytes than the plan."""


def _check_bytes(cache: KVCache) -> int:
    planned = cache_bytes(cache.config, cache.length)
    if cache.nbytes != planned:
        raise _WrongBytes(
            f"the cache holds {cache.nbytes:,} bytes at {cache.length:,} tokens, the plan says {planned:,}"
        )
    return planned


def _prefill(
    model: Transformer,
    cache: KVCache,
    text: Tensor,
    times: list[Step],
    saves: Saves,
    bar: Bar,
    mark: Callable[[int], None],
) -> Tensor:
    """Runs what the cache lacks of the text; the logits of its last token, [vocab]."""
    marks = [*(at for at in MARKS if at < len(text)), len(text)]
    for at in marks:
        if at <= cache.length:
            mark(at)
    if cache.length == len(text):
        # The logits went with the process that had them: take the last token back, which needs no more than itself.
        cache.crop(len(text) - 1)
        return model(text[None, -1:], cache=cache)[0, -1]
    with Interrupts(wait=saves.folder is not None) as interrupts:
        while cache.length < len(text):
            begin = cache.length
            end = min([begin + CHUNK, *(at for at in marks if at > begin)])
            started, cpu = time.perf_counter(), time.process_time()
            logits = model(text[None, begin:end], cache=cache, logits_to_keep=1)
            times.append(Step(end, time.perf_counter() - started, time.process_time() - cpu))
            bar.update(end, (end - begin) / times[-1].seconds)
            saves.save(cache, times, now=end == len(text) or interrupts.asked)
            if interrupts.asked:
                raise KeyboardInterrupt
            if end in marks:
                mark(end)
    return logits[0, -1]


def _mark(cache: KVCache, times: list[Step], mark: int, show: Callable[[str, dict[str, Any]], None]) -> None:
    """Speed before `mark`, beside the planner's FLOPs there."""
    if cache.length == mark:
        _check_bytes(cache)
    count, taken, cpu = last_steps(times, mark)
    rate, flops = count / taken, plan(cache.config, mark).flops.raw
    seconds = sum(step.seconds for step in times if step.end <= mark)
    line = f"prefill {format_context(mark):>7} | {rate:>9,.1f} tokens/s | {flops / 1e6:>8,.1f} MFLOP a token | "
    show(
        f"{line}{rate * flops / 1e9:>7,.1f} GFLOPS | {seconds:>7,.1f} s so far",
        {"what": "prefill", "context": mark, "tokens_per_s": rate, "tokens_per_cpu_s": count / cpu,
         "mflop_per_token": flops / 1e6, "gflops": rate * flops / 1e9, "seconds": seconds},
    )  # fmt: skip


def _finish(
    model: Transformer,
    cache: KVCache,
    logits: Tensor,
    times: list[Step],
    saves: Saves,
    resumed: int,
    show: Callable[[str, dict[str, Any]], None],
) -> int:
    """Decodes, then says everything about the whole."""
    length, prefilled = cache.length, _check_bytes(cache)
    digest = hashlib.sha256(logits.numpy().tobytes())
    chosen: list[int] = []
    decode = RecordedModel(model)
    started = time.perf_counter()
    for _ in range(NEW_TOKENS):
        chosen.append(int(logits.argmax()))
        logits = decode(torch.tensor([chosen[-1:]]), cache=cache)[0, -1]
        digest.update(logits.numpy().tobytes())
    decoding = time.perf_counter() - started
    _check_bytes(cache)
    rate = NEW_TOKENS / decoding
    prefill, cpu = sum(step.seconds for step in times), sum(step.cpu_seconds for step in times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = environment()
    show(
        f"decode  {format_context(length):>7} | {rate:>9,.1f} tokens/s | {NEW_TOKENS} tokens",
        {"what": "decode", "context": length, "tokens_per_s": rate, "tokens": NEW_TOKENS, "seconds": decoding},
    )
    whole = f"{prefill + decoding + saves.spent:,.1f} s" + (f", resumed at {resumed:,}" if resumed else "")
    show(
        f"cache {size(prefilled)} ({prefilled:,} bytes, as planned) | peak memory {size(peak)} | {whole} | "
        f"{torch.get_num_threads()} threads | digest {digest.hexdigest()[:16]}",
        {"what": "summary", "tokens": length, "prefill_seconds": prefill, "prefill_cpu_seconds": cpu,
         "save_seconds": saves.spent, "decode_seconds": decoding,
         "cache_bytes": prefilled, "plan_bytes": plan(cache.config, length).cache_bytes,
         "peak_rss_bytes": peak, "digest": digest.hexdigest(), "resumed_at": resumed,
         "threads": torch.get_num_threads(), "load_average": os.getloadavg(), "versions": found["versions"],
         "processor": found["hardware"]["processor"], "cores": found["hardware"]["cores"],
         "date": datetime.now(timezone.utc).date().isoformat()},
    )  # fmt: skip
    return 0
