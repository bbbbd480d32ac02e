"""What the documents show runs, and what they link to is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from repository import ROOT, name, sources

from dsv4.cli import _parser

DOCUMENTS = sources(".md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"`(dsv4 [a-z]+ [^`]*)`|^(dsv4 [^#\n]*)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
NAME = re.compile(r"(?<![\w.])dsv4(?:\.[A-Za-z_]\w*)+(?![\w.]*\.(?:md|py|so)\b)")
# In a process of its own: tests have imported modules that a program has not.
UNKNOWN = """
import functools, sys
import dsv4
unknown = []
for name in sys.argv[1:]:
    try:
        functools.reduce(getattr, name.split(".")[1:], dsv4)
    except AttributeError:
        unknown.append(name)
modules = {"dsv4.testing"}  # to be imported by its name
print(*sorted(set(unknown) - modules))
"""


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """Command lines of dsv4, in blocks of their own or inside a sentence; not those that are abbreviated."""
    found = [" ".join("".join(groups).split()) for groups in COMMAND.findall(text)]
    return [line for line in found if "..." not in line]


@pytest.mark.parametrize(("document", "least"), [("README.md", 6), ("docs/from_other_libraries.md", 3)])
def test_python_of_documents_runs(document: str, least: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks((ROOT / document).read_text(), "python")
    assert len(found) >= least
    variables: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for code in found:
            exec(compile(code, document, "exec"), variables)  # one after another, as they are read


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_and_links(document: Path) -> None:
    text = document.read_text()
    for command in commands(text):
        _parser().parse_args(shlex.split(command)[1:])  # leaves with 2 and its reason
    missing = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert missing == []


def unknown_names(names: set[str]) -> list[str]:
    done = subprocess.run([sys.executable, "-c", UNKNOWN, *names], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_names_are_there_after_import() -> None:
    names = {name for document in DOCUMENTS for name in NAME.findall(document.read_text())}
    assert len(names) >= 15
    assert unknown_names(names) == []


def test_the_test_finds_them() -> None:
    text = "`dsv4 env --json`, `dsv4 plan`, [x](a.md#part), [y](https://x.org/b)\n```sh\ndsv4 plan nano   # why\n```\n"
    assert commands(text) == ["dsv4 env --json", "dsv4 plan nano"]
    assert LINK.findall(text) == ["a.md"]
    assert blocks(text, "sh") == ["dsv4 plan nano   # why\n"]
    assert NAME.findall("`dsv4.nn.X(1)`, torch.ops.dsv4.mhc_pre, dsv4.load") == ["dsv4.nn.X", "dsv4.load"]
    assert unknown_names({"dsv4.load", "dsv4.checkpoint.memory.keep"}) == ["dsv4.checkpoint.memory.keep"]
