"""What the documents show runs, and what they link to is there."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
from repository import ROOT, name, sources

from dsv4.cli import _parser

DOCUMENTS = sources(".md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"`(dsv4 [a-z]+ [^`]*)`|^(dsv4 [^#\n]*)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """Command lines of dsv4, in blocks of their own or inside a sentence; not those that are abbreviated."""
    found = [" ".join("".join(groups).split()) for groups in COMMAND.findall(text)]
    return [line for line in found if "..." not in line]


def test_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks((ROOT / "README.md").read_text(), "python")
    assert len(found) >= 6
    variables: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for code in found:
            exec(compile(code, "README.md", "exec"), variables)  # one after another, as they are read


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_and_links(document: Path) -> None:
    text = document.read_text()
    for command in commands(text):
        _parser().parse_args(shlex.split(command)[1:])  # leaves with 2 and its reason
    missing = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert missing == []


def test_the_test_finds_them() -> None:
    text = "`dsv4 env --json`, `dsv4 plan`, [x](a.md#part), [y](https://x.org/b)\n```sh\ndsv4 plan nano   # why\n```\n"
    assert commands(text) == ["dsv4 env --json", "dsv4 plan nano"]
    assert LINK.findall(text) == ["a.md"]
    assert blocks(text, "sh") == ["dsv4 plan nano   # why\n"]
