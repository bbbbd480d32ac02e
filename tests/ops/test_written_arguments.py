"""Ops that write their arguments: as autograd sees them, writing is counted and has no gradient; and each element has
memory of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4 import ops
from dsv4.testing import assert_rejects, assert_same_bits

TOKENS, DIM = 6, 32
WRITTEN = {"store_window": ("pages",), "compress": ("state", "pages")}
RUNS = [
    pytest.param(dtype, reference, id=f"{dtype}-{'reference' if reference else 'own'}".removeprefix("torch."))
    for dtype, reference in ((torch.float32, False), (torch.float32, True), (torch.float64, False))
]


def arguments(op: str, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    places = {
        "rope": draw(TOKENS, 8, 2),
        "pages": torch.zeros(2, 4, DIM, dtype=dtype),
        "table": torch.tensor([[1, 0]], dtype=torch.int32),
        "sequence": torch.zeros(TOKENS, dtype=torch.int32),
        "position": torch.arange(TOKENS, dtype=torch.int32),
        "page_size": 4,
    }
    if op == "store_window":
        return {"kv": draw(TOKENS, DIM), "weight": draw(DIM), **places}
    inputs = {"kv": draw(TOKENS, DIM), "gate": draw(TOKENS, DIM), "ape": draw(2, DIM), "norm_weight": draw(DIM)}
    return {**inputs, **places, "state": torch.zeros(1, 2, 2, DIM, dtype=dtype), "ratio": 2}


def runner(reference: bool) -> Callable[[], contextlib.AbstractContextManager[None]]:
    return ops.use_reference if reference else contextlib.nullcontext


@pytest.mark.parametrize("op", WRITTEN)
@pytest.mark.parametrize(("dtype", "reference"), RUNS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_writing_is_counted(op: str, dtype: torch.dtype, reference: bool, mode: Callable[[], Any]) -> None:
    a = arguments(op, dtype)
    before = {name: value._version for name, value in a.items() if isinstance(value, Tensor)}
    with mode(), runner(reference)():
        getattr(ops, op)(**a)
    for name, version in before.items():
        assert (a[name]._version > version) == (name in WRITTEN[op]), name


@pytest.mark.parametrize("op", WRITTEN)
def test_a_backward_pass_finds_what_it_saved_overwritten(op: str) -> None:
    a = arguments(op, torch.float32)
    factor = torch.ones(DIM, requires_grad=True)
    y = a["pages"] * factor
    getattr(ops, op)(**a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", WRITTEN)
@pytest.mark.parametrize(("dtype", "reference"), RUNS)
def test_a_gradient_is_refused(op: str, dtype: torch.dtype, reference: bool) -> None:
    a = arguments(op, dtype)
    for name in ("kv", "rope", "pages"):
        wanted = {**a, name: a[name].clone().requires_grad_()}
        message = rf"^{op}: has no gradient; detach {name} or call it in torch.no_grad\(\)$"
        with runner(reference)(), pytest.raises(RuntimeError, match=message):
            getattr(ops, op)(**wanted)
        assert a["pages"].count_nonzero() == 0
    with torch.no_grad(), runner(reference)():
        getattr(ops, op)(**{**a, "kv": a["kv"].clone().requires_grad_()})
    assert a["pages"].count_nonzero() > 0
    assert not a["pages"].requires_grad


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in WRITTEN.items() for name in names])
@pytest.mark.parametrize(("dtype", "reference"), RUNS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_elements_that_share_memory_are_refused(
    op: str, name: str, dtype: torch.dtype, reference: bool, axis: int
) -> None:
    a = arguments(op, dtype)
    if (op, name, axis) == ("compress", "state", 0):  # of one sequence
        a["table"], a["state"] = a["table"].expand(2, -1), a["state"].expand(2, -1, -1, -1).clone()
    shared = a[name].narrow(axis, 0, 1).expand_as(a[name])
    with runner(reference)():
        message = f"{op}: {name} must not be expanded, since it is written; clone it"
        assert_rejects(getattr(ops, op), a, message, **{name: shared})


@pytest.mark.parametrize("op", WRITTEN)
def test_inference_mode_and_compiled(op: str) -> None:
    expected, inferred, compiled = (arguments(op, torch.float32) for _ in range(3))
    getattr(ops, op)(**expected)
    with torch.inference_mode():
        getattr(ops, op)(**inferred)
    torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")(**compiled)
    for name in WRITTEN[op]:
        assert_same_bits(inferred[name], expected[name])
        assert_same_bits(compiled[name], expected[name])
