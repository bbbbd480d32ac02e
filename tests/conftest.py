"""Counts what ran. With --expect-cases, fewer than tests/expected_cases.json says is a failure, so that a suite that
skips, deselects or falls back to a reference cannot look green."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
EXPECTED = HERE / "expected_cases.json"

# Filled from every test report, and, under pytest-xdist, from every worker's process.
_passed: Counter[str] = Counter()
_kernel_calls: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expect-cases", action="store_true", help="fail if fewer cases ran than tests/expected_cases.json says"
    )


def _own_kernel_calls() -> Counter[str]:
    from dsv4 import _library

    counts: Counter[str] = Counter()
    for device in ("cpu", "cuda"):
        for op, by_name in _library.calls(device).items():
            counts.update({f"{op} {name}": times for name, times in by_name.items()})
    return counts


def _usable_kernels() -> set[str]:
    from dsv4 import _library

    table = _library.kernel_implementations()
    return {f"{op} {name}" for op, devices in table.items() for names in devices.values() for name in names}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _passed[report.nodeid.split("/")[1] if "/" in report.nodeid else "other"] += 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:  # pytest-xdist: a worker ended
    _kernel_calls.update(getattr(node, "workeroutput", {}).get("kernel_calls", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--expect-cases"):
        return
    worker_output = getattr(session.config, "workeroutput", None)
    if worker_output is not None:
        worker_output["kernel_calls"] = dict(_own_kernel_calls())
        return
    _kernel_calls.update(_own_kernel_calls())
    if _shortfalls() and session.exitstatus == 0:
        session.exitstatus = 1


def _shortfalls() -> list[str]:
    """One line for each count that is lower than expected."""
    expected = json.loads(EXPECTED.read_text())
    lines = [
        f"tests/{folder}: {_passed[folder]} cases passed, expected at least {least}"
        for folder, least in expected["passed"].items()
        if _passed[folder] < least
    ]
    usable = _usable_kernels()
    known = expected["kernel_calls"]
    for kernel in sorted(usable):
        name = kernel.split()[1]
        if name not in known:
            lines.append(f"{kernel}: no expectation for implementation {name!r} in {EXPECTED.name}")
        elif _kernel_calls[kernel] < known[name]:
            lines.append(f"{kernel}: ran {_kernel_calls[kernel]} times, expected at least {known[name]}")
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--expect-cases"):
        return
    cases = ", ".join(f"{folder} {count}" for folder, count in sorted(_passed.items()))
    terminalreporter.write_line(f"executed cases: {cases or 'none'}")
    calls = ", ".join(f"{kernel} {count}" for kernel, count in sorted(_kernel_calls.items()))
    terminalreporter.write_line(f"kernel calls: {calls or 'none'}")
    for line in _shortfalls():
        terminalreporter.write_line(f"TOO FEW: {line}", red=True)
