"""No file names a path of somebody's machine or a package registry's host; files and functions stay readable."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from repository import ROOT, name, sources, tracked

MACHINE_PATH = re.compile(r"(?<![\w.)}/-])/(?:home|root|Users|work|mnt|workspace|scratch)/[\w.-]+")
# Spelt in two halves, so that this file passes its own test.
REGISTRY = re.compile(
    "|".join((r"pypi\.org", r"pytho" r"nhosted\.org", r"download\.pytorch\.org", r"anaconda\.org", r"/opt/" r"wheels"))
)
TEXT = {
    ".py",
    ".md",
    ".h",
    ".cpp",
    ".cu",
    ".cuh",
    ".txt",
    ".toml",
    ".json",
    ".cmake",
    ".sh",
    ".yaml",
    ".yml",
    ".cfg",
    "",
}
LONGEST_FILE = 600
LONGEST_FUNCTION = 80
SOURCES = sources(".py", ".h", ".cpp", ".cu", ".cuh")


def text_files() -> list[Path]:
    return [p for p in tracked() if p.suffix in TEXT and p != Path(__file__).resolve() and p.stat().st_size < 1 << 20]


def test_no_machine_paths_or_registry_hosts() -> None:
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{name(path)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize("text", ["see /home/anna/x", "path=/work/x", '"/root/.cache"'])
def test_machine_path_is_noticed(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["a/home/x", "${ROOT}/work/x", "$(ROOT)/work/x", "/usr/local/cuda/bin", "https://x.org/root/y"]
)
def test_other_paths_pass(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_file_length() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {file: lines for file, lines in lengths.items() if lines > LONGEST_FILE} == {}


def python_functions(source: str) -> list[tuple[str, int]]:
    """(name, lines of the body without its docstring) of each function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            start = (first.end_lineno or first.lineno) + 1 if documented else first.lineno
            found.append((node.name, node.end_lineno - start + 1))
    return found


def c_functions(source: str) -> list[tuple[str, int]]:
    """(first line, lines) of each unindented block that is not a namespace or a type; clang-format keeps them so."""
    found, start, head = [], 0, ""
    for number, line in enumerate(source.splitlines()):
        if re.match(r"[A-Za-z_].*\{$|[^\s#/}].*\) (const )?\{$", line) and not re.match(
            r"namespace|struct|class|enum|extern|constexpr", line
        ):
            start, head = number, line
        elif line.startswith("}") and head:
            found.append((head, number - start + 1))
            head = ""
    return found


def test_function_length() -> None:
    found = []
    for path in SOURCES:
        measure = python_functions if path.suffix == ".py" else c_functions
        found += [f"{name(path)}: {head} {n}" for head, n in measure(path.read_text()) if n > LONGEST_FUNCTION]
    assert found == []


def test_long_functions_are_noticed() -> None:
    long_python = "def f():\n    '''Text.'''\n" + "    x = 1\n" * 81
    assert python_functions(long_python) == [("f", 81)]
    assert c_functions("namespace a {\n\nint f(int x) {\n" + "  ++x;\n" * 79 + "}\n\n}  // namespace a\n") == [
        ("int f(int x) {", 81)
    ]


def test_agents_page_is_short() -> None:
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) <= 60


def test_readme_starts_with_the_demo() -> None:
    commands = re.findall(
        r"^(?:\$ )?(make \S+|pip install .*|python .*)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert commands[0] == "make demo"
