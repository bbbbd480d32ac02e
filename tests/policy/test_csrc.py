"""Nothing in csrc ends the process or prints; only the bindings throw."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from repository import CSRC, name, sources

ENDS_OR_PRINTS = re.compile(
    r"(?<![\w.>])(?:std\s*::\s*)?(exit|_exit|quick_exit|abort|terminate|assert|__trap|printf|fprintf|vprintf|puts|putchar|perror)"
    r"\s*\(|\b(?:std\s*::\s*)?(cout|cerr|clog)\b"
)
THROWS = re.compile(r"\bthrow\b")


def code(source: str) -> str:
    """Without comments and string literals, so that words in them do not count; lines stay lines."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match.group().count("\n") or " "

    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, source, flags=re.DOTALL)


def matches(pattern: re.Pattern[str], source: str) -> list[str]:
    return [line.strip() for line in code(source).splitlines() if pattern.search(line)]


FILES = sources(".h", ".cpp", ".cu", ".cuh", under=CSRC)


def faults(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    return [f"{name(path)}: {line}" for path in files for line in matches(pattern, path.read_text())]


def test_nothing_ends_or_prints() -> None:
    assert faults(ENDS_OR_PRINTS, FILES) == []


def test_only_bindings_throw() -> None:
    assert faults(THROWS, [path for path in FILES if path.relative_to(CSRC).parts[0] != "torch"]) == []


@pytest.mark.parametrize(
    "line",
    [
        "exit(1);",
        "std::abort();",
        'printf("x");',
        "if (x) std::exit (2);",
        "std::cerr << 1;",
        "assert(x);",
        "__trap();",
    ],
)
def test_end_or_print_is_noticed(line: str) -> None:
    assert len(matches(ENDS_OR_PRINTS, f"void f() {{\n  {line}\n}}\n")) == 1


@pytest.mark.parametrize(
    "line", ["// exit(1) would end it", 'Status::error("exit(1)");', "static_assert(N > 0);", "vsnprintf(a, b, c, d);"]
)
def test_harmless_line_passes(line: str) -> None:
    assert matches(ENDS_OR_PRINTS, line) == []
