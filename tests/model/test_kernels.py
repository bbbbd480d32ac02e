"""No op that a model calls in mode `checkpoint` is left on its reference, on the CPU or on CUDA; nor one that a
training step calls, forward or backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsv4
from dsv4 import _library

pytestmark = pytest.mark.skipif(not _library.kernel_implementations(), reason="not run: this machine has no op library")


class CalledOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dsv4":
            self.names.add(func._schema.name.removeprefix("dsv4::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def called() -> set[str]:
    """Ops of a prefill, a decoded token and a prediction of the token after next."""
    config = dsv4.Config.preset("nano")
    model = dsv4.init(config, seed=0)
    ids = torch.randint(0, config.vocab_size, (1, 300))
    cache = model.new_cache()
    with torch.no_grad(), CalledOps() as calls:
        model(ids, cache=cache)
        model(ids[:, :1], cache=cache)
        model(ids[:, :5])
    return calls.names


def test_every_family_is_called(called: set[str]) -> None:
    assert {
        "compress",
        "dense_linear",
        "fp8_linear",
        "index_query",
        "index_topk",
        "mhc_post_pre",
        "moe_experts",
    } <= called
    assert len(called) >= 15


def test_no_op_runs_its_reference_on_the_cpu(called: set[str]) -> None:
    found = dsv4.ops.implementations()
    assert {op: found[op]["cpu"] for op in called if "reference" in found[op]["cpu"]} == {}
    assert not {op for op in called if op.startswith("_")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_runs_kernels(dtype: torch.dtype) -> None:
    """All layers, over a sequence with entries of either ratio. wo_a, a plain grouped product, is torch's."""
    config = dsv4.Config.preset("nano")
    model = dsv4.init(config, seed=0, quantization="off", dtype=dtype)
    with CalledOps() as calls:
        model(torch.randint(0, config.vocab_size, (1, 140))).float().square().mean().backward()
    found = dsv4.ops.implementations()
    calls.names.discard("_grouped_linear_reference")
    assert {op: found[op]["cpu"] for op in calls.names if "reference" in found[op]["cpu"]} == {}
    cuda = _library.build_info()["libraries"].get("cuda")
    if cuda is not None:  # built, whether or not there is a GPU
        assert {op for op in calls.names if "sm80" not in cuda["built"].get(op, ())} == set()
    assert {
        "compress_entries_backward",
        "kv_norm_rope_backward",
        "mhc_head_backward",
        "mhc_post_backward",
        "mhc_pre_backward",
        "moe_experts_backward",
        "query_norm_rope_backward",
        "rms_norm_backward",
        "sparse_attention_backward",
    } == {op for op in calls.names if op.endswith("_backward")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_of_the_experts_runs_the_kernel_of_their_gradient(dtype: torch.dtype) -> None:
    """With the gradients that the definitions give, to rounding; the routing is the same in both."""
    config = dsv4.Config.preset("nano")
    torch.manual_seed(0)
    module = dsv4.nn.MixtureOfExperts(config, quantization="off", dtype=dtype)
    x, target = (torch.randn(2, 40, config.hidden_size).to(dtype) for _ in range(2))

    def step() -> list[torch.Tensor]:
        module.zero_grad()
        rows = x.clone().requires_grad_()
        (module(rows) - target).float().square().sum().backward()
        gradients = {"x": rows.grad, **{name: p.grad for name, p in module.named_parameters() if p.requires_grad}}
        assert not [name for name, gradient in gradients.items() if gradient is None]
        return [gradient for gradient in gradients.values() if gradient is not None]

    def kernel_calls() -> int:
        return sum(_library.calls()["moe_experts_backward"].values())

    before = kernel_calls()
    with CalledOps() as calls:
        found = step()
    assert {"moe_experts", "moe_experts_backward"} <= calls.names
    assert kernel_calls() == before + 1
    with dsv4.ops.use_reference():
        expected = step()
    assert kernel_calls() == before + 1
    limit = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert len(found) >= 8  # x, the gate, three matrices of the experts and of the shared one
    for value, other in zip(found, expected, strict=True):
        error = (value.double() - other.double()).square().mean().sqrt()
        assert error <= limit * other.double().square().mean().sqrt()


def test_every_op_has_a_cuda_kernel(called: set[str]) -> None:
    """Registered, whether this machine has a GPU or not."""
    library = _library.build_info()["libraries"].get("cuda")
    if library is None:
        pytest.skip("not run: built without nvcc")
    assert {op: library["built"].get(op) for op in called if not library["built"].get(op)} == {}
    assert {op for op in called if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dsv4::{op}", "CUDA")} == set()
