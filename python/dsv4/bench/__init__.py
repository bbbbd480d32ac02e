"""`dsv4 bench`: ops checked against float64 and timed against eager torch and the machine's own peaks.

Every module beside this one that has OPS (names) is one family of ops: `cases(op, shape, context, device)` yields what
to check and time, CONTEXTS and QUICK_CONTEXTS are the contexts it is asked for by default.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Any, TextIO

import torch

from dsv4 import _library
from dsv4.bench.measure import Case, Clock, Peaks, Timing, judge, measure_peaks, report
from dsv4.ops import implementations

#: The keys of one result, in order.
KEYS = (
    "op", "impl", "device", "shape", "us", "spread", "recorded_us", "gflop", "mbyte", "roof_us", "roof_fraction",
    "error", "error_limit", "baseline", "baseline_us", "ratio",
)  # fmt: skip

# Calls below this are timed a second time, as a decoding model repeats them.
_RECORDED_US = 10_000.0


def families() -> dict[str, ModuleType]:
    """Benchmarked op -> the module that knows its cases, in the order they run."""
    found: dict[str, ModuleType] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        family = importlib.import_module(f"{__name__}.{module}")
        found.update(dict.fromkeys(getattr(family, "OPS", ()), family))
    return found


def run(
    ops: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    quick: bool = False,
    json_file: str | None = None,
) -> int:
    """Check and time ops; print a line each, and write one JSON object a line to `json_file`.

    Args:
        ops: names; None: all that have a benchmark.
        shapes: models whose sizes to take; None: v4-flash (quick: nano).
        contexts: tokens of the sequence for attention, rows at once for other ops; None: those of the op's family.
        device: where to run.
        quick: few repeats, to see that everything works. Its times are not worth quoting.
    Returns: the exit code: 1 where a check failed.
    Raises: ValueError, in one line, for an op without a benchmark; OSError where the file cannot be written.
    """
    known = families()
    for op in ops or ():
        if op not in known:
            raise ValueError(f"no benchmark of {op!r}; there are {', '.join(known)}")
    place = torch.device(device)
    failed = 0
    with ExitStack() as stack:
        out = stack.enter_context(open(json_file, "w", encoding="utf-8")) if json_file else None
        if place.type == "cuda":
            stack.enter_context(torch.cuda.device(place))  # whose stream the clock's events are on
        clock = Clock(place, quick)
        peaks = measure_peaks(clock)
        for result in _peak_results(peaks, place):
            report(line(result), result, out)
        measure = partial(_measure, clock=clock, peaks=peaks, out=out)
        for op in ops or known:
            family = known[op]
            for shape in shapes or (["nano"] if quick else ["v4-flash"]):
                for context in contexts or (family.QUICK_CONTEXTS if quick else family.CONTEXTS):
                    # Not a loop, whose variable would keep a case's inputs while those of the next are made.
                    results = list(map(measure, family.cases(op, shape, context, place)))
                    failed += sum(result["us"] is None for result in results)
                    if not results:
                        print(f"{op}: nothing to measure for {shape} at context {context}", file=sys.stderr)
    if failed:
        print(f"{failed} failed their check", file=sys.stderr)
    return 1 if failed else 0


def _measure(case: Case, clock: Clock, peaks: Peaks, out: TextIO | None) -> dict[str, Any]:
    """Checks first; a case that fails is given no time. Shows the result."""
    error, limit = judge(case)
    impl = _library.last_implementation(case.op, clock.device.type) if _has_kernels(case.op, clock) else "reference"
    result: dict[str, Any] = dict.fromkeys(KEYS)
    result |= {"op": case.op, "impl": impl, "device": str(clock.device), "shape": case.shape}
    result |= {"gflop": case.flops / 1e9, "mbyte": case.nbytes / 1e6, "roof_us": peaks.roof_us(case)}
    result |= {"error": error, "error_limit": limit, "baseline": case.baseline}
    if error <= limit:
        with torch.inference_mode(not case.is_gradient):
            own = clock.time(case.run)
            recorded = clock.time_recorded(case.run) if _is_short(case, own, clock) else None
            result |= {"us": own.us, "spread": own.spread, "recorded_us": recorded.us if recorded else None}
            result["roof_fraction"] = result["roof_us"] / _kernel_us(result)
            if case.run_baseline is not None:
                other = clock.time(case.run_baseline)
                result |= {"baseline_us": other.us, "ratio": other.us / own.us}
    report(line(result), result, out)
    return result


def _is_short(case: Case, timing: Timing, clock: Clock) -> bool:
    """Whether Python and torch's dispatcher may be a part of a time that a decoding model does not pay."""
    return clock.device.type == "cpu" and not case.is_gradient and timing.us < _RECORDED_US


def _kernel_us(result: dict[str, Any]) -> float:
    return result["recorded_us"] or result["us"]


def _has_kernels(op: str, clock: Clock) -> bool:
    return implementations().get(op, {}).get(clock.device.type, ["reference"]) != ["reference"]


def _peak_results(peaks: Peaks, device: torch.device) -> list[dict[str, Any]]:
    def result(op: str, impl: str, shape: str, timing: Timing, gflop: float, mbyte: float) -> dict[str, Any]:
        found = dict.fromkeys(KEYS) | {"op": op, "impl": impl, "device": str(device), "shape": shape}
        found |= {"us": timing.fastest, "spread": timing.spread, "gflop": gflop, "mbyte": mbyte}
        return found | {"roof_us": timing.fastest, "roof_fraction": 1.0, "error": 0.0, "error_limit": 0.0}

    side = round((peaks.matrix_flops / 2) ** (1 / 3))
    mbyte, gflop = peaks.copy_bytes / 1e6, peaks.matrix_flops / 1e9
    product = f"{side} x {side} x {side}"
    found = [
        result("peak_copy", "torch", f"{mbyte / 2:.0f} MB", peaks.copy, 0.0, mbyte),
        result("peak_float32", "torch", product, peaks.float32, gflop, 0.0),
        result("peak_bfloat16", "torch", product, peaks.bfloat16, gflop, 0.0),
    ]
    for precision, flops in (peaks.units or {}).items():
        us = peaks.matrix_flops / flops * 1e6
        found.append(
            result(
                f"peak_{precision}", "units", f"as many from registers as {product}", Timing(us, 0.0, us), gflop, 0.0
            )
        )
    return found


def line(result: dict[str, Any]) -> str:
    """One result as text."""
    name = f"{result['op']} {result['impl']} {result['device']} {result['shape']}"
    if result["us"] is None:
        return f"{name} | FAILED its check: error {result['error']:.2e}, limit {result['error_limit']:.2e}"
    parts = [f"{result['us']:,.1f} us ±{result['spread']:,.1f}"]
    if result["recorded_us"]:
        parts.append(f"recorded {result['recorded_us']:,.1f} us")
    if result["gflop"]:
        parts.append(f"{result['gflop'] / _kernel_us(result) * 1e6:,.1f} GFLOPS")
    if result["mbyte"]:
        parts.append(f"{result['mbyte'] / _kernel_us(result) * 1e3:,.2f} GB/s")
    if result["baseline"]:
        parts.append(f"{result['roof_fraction']:.0%} of roof")
        compared = f"{result['ratio']:.2f} x " if result["ratio"] else ""
        parts.append(compared + result["baseline"] + (f" ({result['baseline_us']:,.1f} us)" if compared else ""))
        parts.append(f"ok err={result['error']:.1e} limit={result['error_limit']:.1e}")
    return f"{name} | {' | '.join(parts)}"
