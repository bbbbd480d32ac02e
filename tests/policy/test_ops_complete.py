"""Every op: a public function with a docstring, a reference or a contract, a test and an opcheck."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

import pytest
import torch
from repository import CSRC, ROOT

import dsv4
from dsv4 import _library
from dsv4.ops import _registry

OPS = _registry.registered_ops()
# A backward op is called by autograd alone: its documentation and tests are those of the op it belongs to.
PUBLIC = [op for op in OPS if not op.endswith("_backward") and not op.startswith("_")]
TESTS = sorted((ROOT / "tests" / "ops").glob("test_*.py"))


def words(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute):
            yield child.attr
        elif isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield from re.findall(r"\w+", child.value)


def checked_by_opcheck(source: str) -> set[str]:
    """Words in functions that call check_op, their decorators included, and in tables that such a function iterates."""
    tree = ast.parse(source)
    tables = {
        target.id: set(words(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "check_op" in set(words(node)):
            own = set(words(node))
            found |= own.union(*(tables[name] for name in own & tables.keys()))
    return found


def test_there_are_ops() -> None:
    assert len(PUBLIC) >= 20


@pytest.mark.parametrize("op", PUBLIC)
def test_public_function_is_documented(op: str) -> None:
    text = inspect.getdoc(getattr(dsv4.ops, op))
    assert text is not None
    assert len(text.splitlines()) >= 3
    assert "[" in text, "the docstring gives shapes in brackets"
    assert "Returns" in text or str(getattr(torch.ops.dsv4, op).default._schema).endswith("-> ()")


@pytest.mark.parametrize("op", PUBLIC)
def test_has_reference(op: str) -> None:
    assert callable(getattr(dsv4.ops, f"{op}_reference"))


@pytest.mark.parametrize("op", sorted(_library.kernel_implementations()))
def test_kernel_has_contract_and_reference(op: str) -> None:
    contracts = "".join(path.read_text() for path in (CSRC / "ops").glob("*.h"))
    assert re.search(rf"^Status {op}\(const \w+&, const Context&\);", contracts, re.MULTILINE)
    assert op in OPS, "a kernel without a reference"


@pytest.mark.parametrize("op", OPS)
def test_has_test_and_opcheck(op: str) -> None:
    covered = set().union(*(checked_by_opcheck(path.read_text()) for path in TESTS))
    assert op in covered, f"no function of tests/ops calls check_op and names {op}"


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("_")])
def test_listed_with_an_implementation(op: str) -> None:
    row = dsv4.ops.implementations()[op]
    assert row["cpu"]
    assert row["cpu"][-1] in ("scalar", "reference")


def test_missing_opcheck_is_noticed() -> None:
    assert "a" in checked_by_opcheck("def test():\n    check_op(torch.ops.dsv4.a, x)\n")
    assert "b" not in checked_by_opcheck("def test():\n    check_op(torch.ops.dsv4.a, x)\ndef other():\n    b()\n")
    assert "c" in checked_by_opcheck("CALLS = {'c': 1}\n@mark(CALLS)\ndef test(op):\n    check_op(op)\n")
