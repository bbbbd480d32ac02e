"""The gradient of plain experts on a CUDA device, which the host plays where there is none (cuda_device.py): as near
to float64 as the formula in torch, taken by the backward pass, and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_device import CUTS_OFF, NO_DEVICE, WHY_NOT, Device, cuda_device
from moe_backward_cases import Problem, assert_no_worse_than, formula, problem, wide
from torch import Tensor
from torch.utils import _pytree

from dsv4.ops import _moe_gradient
from dsv4.testing import assert_same_bits

pytestmark = pytest.mark.skipif(NO_DEVICE, reason=WHY_NOT)

DTYPES = (torch.bfloat16, torch.float32)
PAIRS = 60  # as tests/ops/test_moe_backward.py


@pytest.fixture
def device() -> Iterator[Device]:
    torch.manual_seed(4)
    with torch.no_grad(), cuda_device() as device:
        yield device


def there(value: Any) -> Any:
    return _pytree.tree_map_only(Tensor, lambda t: t.to("cuda"), value)


def run(device: Device, a: Problem) -> list[Tensor]:
    before = device.calls()["moe_experts_backward"]
    device.waits.clear()
    found = torch.ops.dsv4.moe_experts_backward(**there(a))
    assert device.calls()["moe_experts_backward"] == before + 1 and not device.references and not device.waits
    inputs = [a["x"], a["weights"], a["w1"], a["w3"], a["w2"], *a["shared"]]
    needed = a.get("needed", [True] * len(inputs))
    assert all(value.is_cuda and value.is_contiguous() for value in found)
    shapes = [v.shape if wanted else (0,) for v, wanted in zip(inputs, needed, strict=True)]
    assert [v.shape for v in found] == shapes and [v.dtype for v in found] == [v.dtype for v in inputs]
    return [value.cpu() for value in found]


def without_signs(a: Problem) -> Problem:
    """Sums of it are those of the absolute terms."""
    return _pytree.tree_map_only(Tensor, lambda t: t.abs() if t.is_floating_point() else t, a)


# Of float32 gate and up products below 2^-24 of the largest are left out, as in the forward pass: in sums of a term or
# two that would be twice the error of torch's.
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 0},
        {"tokens": 1, "hidden": 18, "inter": 1},
        {"tokens": 5, "hidden": 33, "inter": 31, "limit": 0.7, "shared": True},
        {"tokens": 19, "hidden": 64, "inter": 129, "shared": True},
        {"tokens": 19, "hidden": 131, "inter": 64, "limit": 0.7},
        {"tokens": 23, "count": 9, "top_k": 8, "hidden": 96, "inter": 72},
        {"tokens": 67, "count": 1, "top_k": 1, "hidden": 65, "inter": 130, "shared": True},
        {"tokens": 130, "count": 3, "top_k": 3, "hidden": 127, "inter": 72, "limit": 1.0},
        {"tokens": 4, "count": 1, "top_k": 1, "hidden": 600, "inter": 520},
        {"tokens": 7, "count": 3, "top_k": 0, "shared": True},
        {"tokens": 7, "count": 0, "top_k": 2, "shared": True},
        {"tokens": 4, "inter": 0},
        {"tokens": 4, "hidden": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_the_formula(dtype: torch.dtype, sizes: dict[str, Any], device: Device) -> None:
    draws = max(PAIRS // max(sizes["tokens"] * sizes.get("top_k", 2), 1), 1) if sizes["tokens"] else 1
    problems = [problem(dtype=dtype, **sizes) for _ in range(draws)]
    found = [run(device, a) for a in problems]
    if CUTS_OFF and dtype == torch.float32 and sizes.get("inter") == 1:  # cut off: a share of the largest term
        for a, own in zip(problems, found, strict=True):
            for mine, exact, terms in zip(own, formula(wide(a)), formula(wide(without_signs(a))), strict=True):
                assert (mine - exact).norm() <= 2**-20 * terms.norm()
        return
    assert_no_worse_than(formula, problems, found, [formula(wide(a)) for a in problems])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_wide_indices(dtype: torch.dtype, device: Device) -> None:
    a = problem(tokens=9, dtype=dtype, shared=True, limit=1.0)
    expected = run(device, a)
    turned = {**a, **{name: a[name].mT.contiguous().mT for name in ("w1", "w3", "w2", "x", "grad")}}
    for other in (turned, {**a, "indices": a["indices"].long()}):
        for value, same in zip(run(device, other), expected, strict=True):
            assert_same_bits(value, same)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_not_needed_come_back_empty(dtype: torch.dtype, device: Device) -> None:
    a = problem(tokens=9, count=3, dtype=dtype, shared=True, limit=0.7)
    whole = run(device, a)
    for needed in ([True, True, *[False] * 6], [False, True, *[True, False] * 3], [True, False, *[False, True] * 3]):
        for value, other, wanted in zip(run(device, {**a, "needed": needed}), whole, needed, strict=True):
            assert_same_bits(value, other if wanted else other.new_empty(0))


def backward(a: Problem) -> list[Tensor]:
    """What autograd runs, which has no engine for this device."""
    saved = [a[name] for name in ("x", "weights", "indices", "w1", "w3", "w2")]
    ctx = SimpleNamespace(
        saved_tensors=there([*saved, *a["shared"]]), quantized=False, limit=a["swiglu_limit"], has_list=True,
        needs_input_grad=(True, True, False, True, True, True, False, False, False, [True] * 3, False),
    )  # fmt: skip
    d_x, d_weights, _, d_w1, d_w3, d_w2, _, _, _, d_shared, _ = _moe_gradient.experts_backward(ctx, there(a["grad"]))
    return [value.cpu() for value in (d_x, d_weights, d_w1, d_w3, d_w2, *d_shared)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_pass_takes_the_kernel(dtype: torch.dtype, device: Device) -> None:
    a = problem(tokens=6, dtype=dtype, shared=True, limit=1.0)
    before = device.calls()["moe_experts_backward"]
    found = backward(a)
    assert device.calls()["moe_experts_backward"] == before + 1 and not device.references
    for value, same in zip(found, run(device, a), strict=True):
        assert_same_bits(value, same)


def test_float64_is_left_to_the_formula(device: Device) -> None:
    a = wide(problem(tokens=4, shared=True))
    before = device.calls()["moe_experts_backward"]
    found = backward(a)
    assert device.calls()["moe_experts_backward"] == before
    assert device.references == {"_moe_experts_backward_reference": 1}
    for value, expected in zip(found, formula(a), strict=True):
        torch.testing.assert_close(value, expected)
