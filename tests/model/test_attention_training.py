"""Training the attention layers: the native gradient is called, and gives what the reference path gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dsv4
from dsv4 import _library
from dsv4.testing import max_isa, relative_rms

NANO = dsv4.Config.preset("nano")
LAYERS = {
    "SWA": dsv4.nn.SlidingWindowAttention,
    "CSA": dsv4.nn.CompressedSparseAttention,
    "HCA": dsv4.nn.HeavilyCompressedAttention,
}
LENGTH = 2 * NANO.sliding_window + 133  # past the window, and past an entry of either ratio


def calls() -> dict[str, int]:
    return dict(_library.calls("cpu").get("sparse_attention_backward", {}))


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One training step's gradients, of the input and of every parameter that it reaches."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    module(x).float().square().mean().backward()
    assert x.grad is not None
    return {"x": x.grad} | {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def layer(kind: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    module = LAYERS[kind](NANO, quantization="off", dtype=dtype)
    with torch.no_grad():
        module.attn_sink.normal_()
    return module, torch.randn(2, LENGTH, NANO.hidden_size).to(dtype)


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("implementation", ["avx512", "scalar"])
def test_a_training_step_has_the_gradients_of_the_reference(kind: str, implementation: str) -> None:
    if implementation not in dsv4.ops.implementations()["sparse_attention_backward"]["cpu"]:
        pytest.skip(f"not run: this machine has no {implementation} for sparse_attention_backward")
    module, x = layer(kind, torch.float32)
    before = calls().get(implementation, 0)
    with max_isa(implementation):
        own = step(module, x)
    assert calls()[implementation] == before + 1
    with dsv4.ops.use_reference():
        expected = step(module, x)
    assert calls()[implementation] == before + 1
    assert own.keys() == expected.keys()
    assert {"x", "attn_sink", "wq_b.weight", "wkv.weight", "wo_a.weight"} <= own.keys()
    assert ("compressor.wkv.weight" in own) == (kind != "SWA")
    for name, gradient in own.items():
        assert float(relative_rms(gradient.flatten(), expected[name].flatten())) < 2e-6, name
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_training_step_in_bfloat16(kind: str) -> None:
    """Close to that of the same weights in float32; how close, rounding activations everywhere decides."""
    module, x = layer(kind, torch.bfloat16)
    own = step(module, x)
    expected = step(module.float(), x.float())
    for name, gradient in own.items():
        assert float(relative_rms(gradient.float().flatten(), expected[name].flatten())) < 0.05, name
