"""What every benchmark needs: timing with cold caches, the machine's own peaks, and one form of result."""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4 import _library
from dsv4.checkpoint import memory
from dsv4.model.recording import NotRecordable, Recording
from dsv4.ops import rms_norm

Precision = Literal["float32", "bfloat16", "none"]

# Larger than any cache, so that what a run finds in one is only what it put there itself.
_FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Comparison:
    """An output beside the float64 truth: `result` of the op, `eager` of the same maths in torch in the same dtype."""

    result: Tensor
    eager: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: the registered op, whose implementation is reported.
        shape: in words: the model it belongs to, and its sizes.
        run: computes it once.
        baseline: what a user would otherwise call, and `run_baseline` calls it; None where it cannot be run here, for a
            reason that `baseline` names.
        compare: results beside the truth, on as many rows as can be afforded.
        flops, nbytes: of the maths, and the fewest that must move.
        precision: of the operands: decides the peak FLOPs are held against. "none": there are hardly any.
        floor: error of a float32 output that is admitted whatever eager torch reaches; why, its family's module says.
    """

    op: str
    shape: str
    run: Callable[[], Any]
    baseline: str
    run_baseline: Callable[[], Any] | None
    compare: Callable[[], Sequence[Comparison]]
    flops: float
    nbytes: float
    precision: Precision
    floor: float = 1e-6

    @property
    def is_gradient(self) -> bool:
        """Whether it is a backward pass; all others are timed in inference mode, as the model runs them."""
        return self.op.endswith("_backward")


@dataclass(frozen=True)
class Timing:
    """Median of the runs, half the distance between their quartiles, and the fastest run, in microseconds."""

    us: float
    spread: float
    fastest: float


class Clock:
    """Times functions on a device, each run with its data out of the caches.

    On a CPU that takes the interpreter and torch's dispatcher out too, and its threads fall asleep, which adds some
    200 us that no running model pays. So a small op of ours and one of torch come before each run.
    """

    def __init__(self, device: torch.device, quick: bool):
        self.device, self.quick = device, quick
        if device.type == "cpu":
            memory.keep_freed()
        self._flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._small = torch.ones(256, 512)

    def time(self, run: Callable[[], Any]) -> Timing:
        """Runs 3 times; unless quick, on until there are 9 runs and half a second, or the runs have taken 4 seconds. On
        a GPU, whose runs differ less, a tenth of a second and 1 second."""
        run()
        least, seconds, most = (9, 0.5, 4.0) if self.device.type == "cpu" else (9, 0.1, 1.0)
        if self.quick:
            least, seconds, most = 3, 0.0, 0.0
        samples: list[float] = []

        def wanted() -> bool:
            taken = sum(samples) / 1e6
            return len(samples) < 3 or (taken < most and (len(samples) < least or taken < seconds))

        while wanted() and len(samples) < 200:
            samples.append(self._once(run))
        quartiles = statistics.quantiles(samples, n=4)
        return Timing(statistics.median(samples), (quartiles[2] - quartiles[0]) / 2, min(samples))

    def time_recorded(self, run: Callable[[], Any]) -> Timing | None:
        """The same of what `run` calls, as a decoding model repeats it: without Python and torch's dispatcher, from the
        first kernel to the end of the last. None where it cannot be repeated so. Gradients must be off.

        Raises: RuntimeError where what is repeated gives other values than `run`.
        """

        def result() -> Tensor:
            value = run()
            if value is None:
                raise NotRecordable("nothing that shows it ran")
            return value if isinstance(value, Tensor) else value[0]

        with contextlib.suppress(NotRecordable):
            recording = Recording(result)
            recording.result.zero_()
            if not torch.equal(recording(), result()):
                raise RuntimeError("a recorded call gives other values than the call itself")
            return self.time(recording)
        return None

    def _once(self, run: Callable[[], Any]) -> float:
        self._flush.add_(1)
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            return begin.elapsed_time(end) * 1e3
        F.linear(rms_norm(self._small, self._small[0]), self._small)
        started = time.perf_counter()
        inside = run.time_kernels() if isinstance(run, Recording) else run()
        outside = (time.perf_counter() - started) * 1e6
        return inside if isinstance(run, Recording) and inside is not None else outside


@dataclass(frozen=True)
class Peaks:
    """What this machine was measured to do: bytes read plus written by a large copy, FLOPs of large matrix products in
    torch, and on a CPU FLOP/s of the units themselves, from registers. The larger one is the peak.

    The fastest run counts: a peak is what the machine can do, not what it does while others use it.
    """

    copy: Timing
    copy_bytes: float
    float32: Timing
    bfloat16: Timing
    matrix_flops: float
    units: dict[str, float] | None = None

    @property
    def bytes_per_us(self) -> float:
        return self.copy_bytes / self.copy.fastest

    def flops_per_us(self, precision: Precision) -> float:
        """float32 operands may be split into two bfloat16 ones, which is faster wherever BF16 is over twice as fast."""
        bfloat16, float32 = self.matrix_flops / self.bfloat16.fastest, self.matrix_flops / self.float32.fastest
        if self.units is not None:
            bfloat16, float32 = max(bfloat16, self.units["bfloat16"] / 1e6), max(float32, self.units["float32"] / 1e6)
        return max(bfloat16, float32) if precision == "bfloat16" else max(float32, bfloat16 / 2)

    def roof_us(self, case: Case) -> float:
        """The least time the shape can take: its FLOPs or its bytes at peak, whichever is longer."""
        return max(case.flops / self.flops_per_us(case.precision), case.nbytes / self.bytes_per_us)


def measure_peaks(clock: Clock) -> Peaks:
    """Measured in this process, with torch's threads: a roof nobody has to take on trust."""
    size = (64 if clock.quick else 256) << 20
    source, target = (torch.ones(size, dtype=torch.uint8, device=clock.device) for _ in range(2))
    copies: list[Callable[[], Any]] = [lambda: target.copy_(source)]
    if clock.device.type == "cpu":
        copies.append(lambda: _threaded_copy(source.numpy(), target.numpy(), torch.get_num_threads()))
    copy = min((clock.time(run) for run in copies), key=lambda timing: timing.fastest)
    side = 1024 if clock.quick else 2048 if clock.device.type == "cpu" else 8192

    def product(dtype: torch.dtype) -> Timing:
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        return clock.time(lambda: a @ b)

    # Twice, seconds apart: another program that runs in one of these half seconds halves what the units seem to do.
    before = _unit_peaks(clock)
    products = product(torch.float32), product(torch.bfloat16)
    after = _unit_peaks(clock)
    units = {name: max(before[name], after[name]) for name in before} or None
    return Peaks(copy, 2.0 * size, *products, 2.0 * side**3, units)


def _unit_peaks(clock: Clock) -> dict[str, float]:
    return _library.unit_peaks(torch.get_num_threads()) or {} if clock.device.type == "cpu" else {}


def _threaded_copy(source: np.ndarray, target: np.ndarray, threads: int) -> None:
    """The C library's copy, a part a thread, this one among them; it may write past the caches where torch's does not.

    Raises: ValueError, in one line, where a thread cannot be started.
    """
    own, *others = zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
    workers = [threading.Thread(target=np.copyto, args=part) for part in others]
    try:
        for worker in workers:
            worker.start()
    except RuntimeError as error:
        mend = "raise the limit of processes (ulimit -u), or set OMP_NUM_THREADS=1"
        raise ValueError(f"cannot work on {threads} threads ({error}); {mend}") from None
    np.copyto(*own)
    for worker in workers:
        worker.join()


def judge(case: Case) -> tuple[float, float]:
    """(error, limit) of the output that comes closest to its limit, or exceeds it furthest.

    The error is rms(result - exact) / rms(exact). The limit is twice that of eager torch in the same dtype, and at
    least `case.floor` (a sixteenth of a rounding step for outputs narrower than float32).
    """
    found: list[tuple[float, float]] = []
    for index, output in enumerate(case.compare()):
        if output.exact.dtype != torch.float64:
            raise TypeError(f"{case.op}: the truth of output {index} must be float64, is {output.exact.dtype}")
        floor = case.floor if output.result.dtype == torch.float32 else torch.finfo(output.result.dtype).eps / 16
        limit = max(2 * _relative_error(output.eager, output.exact), floor)
        found.append((_relative_error(output.result, output.exact), limit))
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))


def _relative_error(result: Tensor, exact: Tensor) -> float:
    size = exact.square().mean().sqrt()
    error = (result.to(torch.float64) - exact).square().mean().sqrt()
    return float(error) if size == 0 else float(error / size)


def report(text: str, result: dict[str, Any], out: TextIO | None) -> None:
    """Shows a result as text, and writes it as a JSON object of one line."""
    print(text, flush=True)
    if out is not None:
        out.write(json.dumps(result) + "\n")
        out.flush()
