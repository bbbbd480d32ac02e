"""Gradients of norms and of compress_entries on a CUDA device, which the host plays where there is none
(cuda_device.py): their kernels against the formulas, and against autograd."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_device import NO_DEVICE, WHY_NOT, Device, cuda_device
from torch import Tensor
from torch.utils import _pytree

import dsv4.ops as ops
from dsv4.testing import assert_no_worse, ulp_distance

pytestmark = pytest.mark.skipif(NO_DEVICE, reason=WHY_NOT)

NARROW = [torch.bfloat16, torch.float32]
EPS = 1e-5


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def device() -> Iterator[Device]:
    with cuda_device() as device:
        yield device


def turns(rows: int, rope_dim: int) -> Tensor:
    angle = 100 * torch.randn(rows, rope_dim // 2)
    return torch.stack((angle.cos(), angle.sin()), -1)


def there(values: Any) -> Any:
    return _pytree.tree_map_only(Tensor, lambda value: value.to("cuda"), values)


def run(device: Device, op: str, *arguments: Any) -> list[Tensor]:
    """The op's results on the device, in host memory; that its kernel made them."""
    before, given = device.calls()[op], there(arguments)
    device.waits.clear()
    found = getattr(torch.ops.dsv4, op)(*given)
    assert device.calls()[op] == before + 1 and not device.references and not device.waits
    return [value.cpu() for value in (found if isinstance(found, tuple) else (found,))]


def assert_near(own: Tensor, expected: Tensor) -> None:
    """Both round once; of bfloat16, whose sums float32 holds, few results differ, and by one unit."""
    assert (own.shape, own.dtype) == (expected.shape, expected.dtype)
    size = float(expected.float().abs().max()) if expected.numel() else 0.0
    if own.dtype == torch.bfloat16:
        near = expected.float().abs() > 1e-3 * size
        assert not (ulp_distance(own, expected) > 1)[near].any()
        assert (own != expected)[near].sum() <= 1 + 0.01 * own.numel()
    torch.testing.assert_close(
        own.float(), expected.float(), rtol=0.01 if own.dtype == torch.bfloat16 else 1e-6, atol=1e-6 * size
    )


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dims", [(512, 64), (128, 64), (40, 8), (33, 2)])
def test_queries(dims: tuple[int, int], dtype: torch.dtype, device: Device) -> None:
    grad, q = torch.randn(7, 5, dims[0]).to(dtype), (3 * torch.randn(7, 5, dims[0])).to(dtype)
    case = (grad, q, turns(7, dims[1]), EPS)
    assert_near(run(device, "query_norm_rope_backward", *case)[0], ops.query_norm_rope_backward_reference(*case))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("weight", [*NARROW, None])
@pytest.mark.parametrize("dims", [(512, 64), (96, 32), (1032, 8), (33, 2)])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_norms(
    rows: int, dims: tuple[int, int], weight: torch.dtype | None, dtype: torch.dtype, device: Device
) -> None:
    grad, x = torch.randn(rows, dims[0]).to(dtype), (3 * torch.randn(rows, dims[0])).to(dtype)
    scale = None if weight is None else (1 + 0.3 * torch.randn(dims[0])).to(weight)
    found = run(device, "rms_norm_backward", grad, x, scale, EPS)
    for own, expected in zip(found, ops.rms_norm_backward_reference(grad, x, scale, EPS), strict=True):
        assert_near(own, expected)
    if scale is None:
        return
    case = (grad, x, scale, turns(rows, dims[1]), EPS)
    found = run(device, "kv_norm_rope_backward", *case)
    for own, expected in zip(found, ops.kv_norm_rope_backward_reference(*case), strict=True):
        assert_near(own, expected)


def entries_case(tokens: int, ratio: int, overlap: bool, rotate: bool, weight: torch.dtype) -> dict[str, Any]:
    channels = 128 if overlap else 64
    return {
        "kv": torch.randn(tokens, channels) * torch.randint(-3, 4, (tokens, 1)).exp2(),
        "gate": 4 * torch.randn(tokens, channels),
        "ape": torch.randn(ratio, channels),
        "norm_weight": (1 + 0.2 * torch.randn(64)).to(weight),
        "rope": turns(tokens // ratio, 32),
        "ratio": ratio,
        "eps": EPS,
        "rotate": rotate,
    }


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("weight", NARROW)
@pytest.mark.parametrize(("tokens", "ratio"), [(0, 4), (3, 4), (23, 4), (260, 128)])
def test_entries(tokens: int, ratio: int, weight: torch.dtype, overlap: bool, rotate: bool, device: Device) -> None:
    """To the limits of tests/ops/test_compress_entries.py, but where float32 rounds a pooled value to bfloat16 the
    other way: then the entry moves by as much."""
    a = entries_case(tokens, ratio, overlap, rotate, weight)
    if overlap:  # as between the sequences of a batch: nothing is pooled from these
        a["kv"][:ratio, :64], a["gate"][:ratio, :64] = 0.0, float("-inf")
    grad = torch.randn(tokens // ratio, 64).to(weight)
    found = run(device, "compress_entries_backward", grad, *a.values())
    for own, expected in zip(found, ops.compress_entries_backward_reference(grad, **a), strict=True):
        assert (own.shape, own.dtype) == (expected.shape, expected.dtype)
        size = float(expected.float().abs().max()) if expected.numel() else 0.0
        close = 1e-5 if own.dtype == torch.float32 else 2**-7
        far = (own.float() - expected.float()).abs() > 2e-6 * size + close * expected.float().abs()
        assert far.sum() <= (0 if weight == torch.float32 else 0.1 * far.numel())
        torch.testing.assert_close(own.float(), expected.float(), rtol=2**-7, atol=2**-9 * size)


def test_no_worse_than_autograd_of_the_same_dtype(device: Device) -> None:
    """torch's engine does not know this device: the ops are called as autograd calls them."""
    x, weight, grad = 3 * torch.randn(70, 128), 1 + 0.3 * torch.randn(128), torch.randn(70, 128)

    def gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + EPS) * leaves[1]
        return torch.autograd.grad(y, leaves, grad)

    for dtype in NARROW:
        case = [value.to(dtype) for value in (x, weight, grad)]
        found = run(device, "rms_norm_backward", case[2], case[0], case[1], EPS)
        plain, exact = gradients(*case), gradients(*(value.double() for value in case))
        for own, other, truth in zip(found, plain, exact, strict=True):
            assert_no_worse(own, other, truth)


def test_keys_that_registers_do_not_hold(device: Device) -> None:
    """compress_entries leaves them to its reference, whose gradient is the formula; the kernel's op refuses them."""
    values = [torch.randn(8, 2048), torch.randn(8, 2048), torch.randn(4, 2048), torch.ones(2048), turns(2, 0)]
    ops.compress_entries(*there(values), 4, EPS, True)
    assert device.references == {"_compress_entries_reference": 1}
    with pytest.raises(RuntimeError, match=r"^compress_entries_backward: no implementation for this device"):
        torch.ops.dsv4.compress_entries_backward(*there([torch.randn(2, 2048), *values]), 4, EPS, True)
