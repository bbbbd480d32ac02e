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


def window_case(pages: Tensor, table: Tensor, window: int, page_size: int) -> tuple[Any, ...]:
    """Gradients of the call's results, its lse and its arguments: rows 0 and following of one sequence in `pages`."""
    generator, tokens = torch.Generator().manual_seed(7), pages.shape[0] * pages.shape[1]
    query, grad = (torch.randn(tokens, 4, 64, generator=generator).bfloat16() for _ in range(2))
    position = torch.arange(tokens, dtype=torch.int32)
    sequence, sink = torch.zeros(tokens, dtype=torch.int32), torch.zeros(4)
    call = (query, pages, table, None, None, sequence, position, None, None, sink, None)
    call += (window, 0.125, page_size, 64, None)
    lse = torch.ops.dsv4.sparse_attention(*call)[1]
    return grad, torch.ones_like(lse), lse, *call


def assert_near(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for mine, theirs in pairs:
        if mine.numel() > 0:
            assert rel_rms(mine.flatten().unsqueeze(0), theirs.flatten().unsqueeze(0)) <= 2**-8


def test_pages_of_one_row(device: Device) -> None:
    """An axis of one element may have any stride and counts as contiguous; keys are numbered without it."""
    rows = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(8)).bfloat16()
    pages, table = rows.transpose(0, 1), torch.arange(8, dtype=torch.int32).unsqueeze(0)
    assert pages.stride() == (64, 512, 1) and pages.is_contiguous()
    assert_near(both(device, "sparse_attention_backward", *window_case(pages, table, 4, 1)))


@pytest.mark.parametrize("window", [64, (1 << 31) + 20, 1 << 33, (1 << 63) - 1])
def test_window_longer_than_any_sequence(window: int, device: Device) -> None:
    """Memory is for what the table has places for."""
    pages = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    case = window_case(pages, torch.zeros(1, 1, dtype=torch.int32), window, 40)
    assert_near(both(device, "sparse_attention_backward", *case))
    assert_near(both(device, "sparse_attention", *case[3:]))


def test_table_without_places(device: Device) -> None:
    pages = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    case = window_case(pages, torch.zeros(1, 0, dtype=torch.int32), 4, 8)
    (out, _), (lse, _) = both(device, "sparse_attention", *case[3:])
    assert not out.any() and (lse == torch.inf).all()
    for mine, theirs in both(device, "sparse_attention_backward", *case):
        assert torch.equal(mine, theirs) and not mine.any()
