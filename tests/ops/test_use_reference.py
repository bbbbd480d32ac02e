"""`use_reference`: the definitions of the ops in place of their kernels, everywhere and only within."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import dsv4
from dsv4 import _library, ops
from dsv4.ops import _registry
from dsv4.testing import assert_same_bits

HIDDEN = 64


def kernel_calls() -> dict[str, int]:
    return {op: sum(by_name.values()) for op, by_name in _library.calls("cpu").items()}


def mhc_arguments() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(5, 4, HIDDEN).bfloat16(), torch.randn(24, 4 * HIDDEN) / 16, torch.ones(3), torch.zeros(24)


def gate_arguments() -> tuple[torch.Tensor, torch.Tensor, int]:
    torch.manual_seed(1)
    return torch.randn(7, HIDDEN).bfloat16(), torch.randn(16, HIDDEN).bfloat16(), 4


def test_model_runs_on_definitions_alone() -> None:
    model = dsv4.load("nano")
    ids = torch.arange(130).remainder(512).unsqueeze(0)
    before = kernel_calls()
    with ops.use_reference():
        referenced = model(ids)
    assert kernel_calls() == before
    on_kernels = model(ids)
    ran = {op for op, count in kernel_calls().items() if count > before[op]}
    assert {"mhc_pre", "mhc_post_pre", "sparse_attention", "index_topk", "compress", "moe_experts", "moe_gate"} <= ran
    assert torch.isfinite(referenced).all()
    assert not torch.equal(referenced, on_kernels), "float32 and float64 sums cannot agree in every logit"


def test_results_are_those_of_the_reference_functions() -> None:
    streams, *weights = mhc_arguments()
    x, gate, top_k = gate_arguments()
    with ops.use_reference():
        mixed = ops.mhc_pre(streams, *weights)
        routed = ops.moe_gate(x, gate, top_k)
        direct = torch.ops.dsv4.moe_gate(x, gate, top_k, None, None, None, 1.0)
    for found, expected in zip(mixed, ops.mhc_pre_reference(streams, *weights), strict=True):
        assert_same_bits(found, expected)
    for found, also, expected in zip(routed, direct, ops.moe_gate_reference(x, gate, top_k), strict=True):
        assert_same_bits(found, expected)
        assert_same_bits(also, expected)


def store(pages: torch.Tensor) -> None:
    torch.manual_seed(2)
    table, position = torch.zeros(1, 1, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    rope = torch.randn(3, 16, 2)
    ops.store_window(
        torch.randn(3, 96), torch.ones(96), rope, pages, table, torch.zeros_like(position), position, eps=1e-6
    )


def test_arguments_are_written() -> None:
    pages = torch.zeros(1, 256, 96)
    before = kernel_calls()
    with ops.use_reference():
        store(pages)
    assert kernel_calls() == before
    assert pages[0, :3].abs().min() > 0
    again = torch.zeros_like(pages)
    store(again)
    torch.testing.assert_close(pages, again)


def test_ops_that_references_call_are_references_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, seen = _registry._references["dsv4::quantize_fp8"], []
    monkeypatch.setitem(
        _registry._references, "dsv4::quantize_fp8", lambda *a, **k: (seen.append(1), inner(*a, **k))[1]
    )
    monkeypatch.setitem(_registry._references, "dsv4::hadamard", lambda x: ops.quantize_fp8(x, 128)[0].float())
    with ops.use_reference():
        ops.hadamard(torch.ones(1, 128))
    assert seen == [1]


def test_gradients() -> None:
    streams, *weights = mhc_arguments()

    def gradient() -> torch.Tensor:
        leaf = streams.float().requires_grad_()
        ops.mhc_pre(leaf, *weights)[0].sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    before = kernel_calls()
    with ops.use_reference():
        referenced = gradient()
    assert kernel_calls() == before
    torch.testing.assert_close(gradient(), referenced, rtol=1e-4, atol=1e-5)
    assert kernel_calls()["mhc_pre_backward"] == before["mhc_pre_backward"] + 1


def test_it_ends_with_the_block() -> None:
    x, gate, top_k = gate_arguments()
    before = kernel_calls()["moe_gate"]
    message = "moe_gate: top_k must be 1 to 16, the number of experts, got 17"
    with pytest.raises(RuntimeError, match=message), ops.use_reference():
        ops.moe_gate(x, gate, 17)
    with ops.use_reference(), ops.use_reference():
        ops.moe_gate(x, gate, top_k)
    assert kernel_calls()["moe_gate"] == before
    ops.moe_gate(x, gate, top_k)
    assert kernel_calls()["moe_gate"] == before + 1


def test_it_holds_for_its_thread() -> None:
    x, gate, top_k = gate_arguments()
    before = kernel_calls()["moe_gate"]
    with ops.use_reference():
        other = threading.Thread(target=ops.moe_gate, args=(x, gate, top_k))
        other.start()
        other.join()
    assert kernel_calls()["moe_gate"] == before + 1


def test_it_does_not_wait_for_the_compiler() -> None:
    """Importing torch._dynamo takes a second, which a call of one small op should not."""
    program = """
import sys, torch, dsv4
with dsv4.ops.use_reference():
    dsv4.ops.hadamard(torch.ones(2, 8))
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_compiled_functions_run_on_definitions_too() -> None:
    x, gate, top_k = gate_arguments()

    def route(rows: torch.Tensor) -> torch.Tensor:
        return ops.moe_gate(2 * rows, gate, top_k)[0] + 1

    with ops.use_reference():
        expected = route(x)
    before = kernel_calls()["moe_gate"]
    compiled = torch.compile(route, backend="aot_eager")
    with ops.use_reference():
        assert_same_bits(compiled(x), expected)
    assert kernel_calls()["moe_gate"] == before
