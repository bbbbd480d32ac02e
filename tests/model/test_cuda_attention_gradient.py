"""Attention's gradient on a CUDA device, which the host plays where there is none (cuda_device.py): the package's
CUDA kernels against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_cases import DTYPES, attention_case
from cuda_device import NO_DEVICE, WHY_NOT, Device, cuda_device
from golden import rel_rms
from torch import Tensor
from torch.utils import _pytree

pytestmark = pytest.mark.skipif(NO_DEVICE, reason=WHY_NOT)


@pytest.fixture
def device() -> Iterator[Device]:
    with torch.no_grad(), cuda_device() as device:
        yield device


def both(device: Device, op: str, *args: Any) -> list[tuple[Tensor, Tensor]]:
    """Results of an op on the device, by its kernel, and on the CPU."""
    function = getattr(torch.ops.dsv4, op)
    before = device.calls()[op]
    device.waits.clear()
    got = function(*_pytree.tree_map_only(Tensor, lambda value: value.to("cuda"), args))
    assert device.calls()[op] == before + 1 and not device.references and not device.waits
    expected = function(*args)
    if isinstance(expected, Tensor):
        got, expected = (got,), (expected,)
    return [(mine.cpu(), theirs) for mine, theirs in zip(got, expected, strict=True)]


@pytest.mark.parametrize("query", DTYPES)
@pytest.mark.parametrize("window", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("entries", [*DTYPES, torch.uint8])
def test_attention(query: torch.dtype, window: torch.dtype, entries: torch.dtype, device: Device) -> None:
    case = attention_case(query, window, entries)
    out, lse = torch.ops.dsv4.sparse_attention(**case)
    generator = torch.Generator().manual_seed(6)
    seeds = torch.randn(out.shape, generator=generator).to(out.dtype), torch.randn(lse.shape, generator=generator)
    names = [argument.name for argument in torch.ops.dsv4.sparse_attention.default._schema.arguments]
    arguments = [case[name] for name in names if name in case]
    for mine, theirs in both(device, "sparse_attention_backward", *seeds, lse, *arguments):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if mine.numel() > 0:
            limit = 2**-21 if mine.dtype == query == torch.float32 else 2**-8
            assert rel_rms(mine.flatten().unsqueeze(0), theirs.flatten().unsqueeze(0)) <= limit
