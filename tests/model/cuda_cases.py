"""Calls of ops for the device that the host plays (cuda_device.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from dsv4.ops.layout import allocate_pages, write_rows

DTYPES = (torch.bfloat16, torch.float32)


def attention_case(
    query: torch.dtype, window: torch.dtype, entries: torch.dtype, head_dim: int = 80, rope_dim: int = 16
) -> dict[str, Any]:
    """Rows 20 to 24 of two sequences; uint8 stands for FP8 rows."""
    generator = torch.Generator().manual_seed(4)

    def pages(dtype: torch.dtype, size: int) -> Tensor:
        rows = torch.randn(8 * size, head_dim, generator=generator)
        if dtype != torch.uint8:
            return rows.view(8, size, head_dim).to(dtype)
        bytes_, where = allocate_pages(8, size, head_dim, rope_dim, "fp8"), torch.arange(8 * size)
        write_rows(bytes_, rows.bfloat16(), where // size, where % size, size, rope_dim)
        return bytes_

    position = torch.arange(20, 25, dtype=torch.int32).repeat(2)
    wide = torch.float64 if query == torch.float64 else torch.float32
    return {
        "query": torch.randn(10, 5, head_dim, generator=generator).to(query),
        "window_pages": pages(window, 16),
        "window_table": torch.tensor([[3, 0], [5, 6]], dtype=torch.int32),
        "compressed_pages": pages(entries, 4),
        "compressed_table": torch.tensor([[1, 7], [2, -1]], dtype=torch.int32),
        "sequence": torch.tensor([0, 1], dtype=torch.int32).repeat_interleave(5),
        "position": position,
        "indices": torch.tensor([4, -1, 0, 5, 2, 9], dtype=torch.int32).repeat(10, 1),
        "lengths": (position + 1) // 4,
        "sink": torch.randn(5, generator=generator, dtype=wide),
        "rope": torch.randn(10, rope_dim // 2, 2, generator=generator, dtype=wide),
        "window": 7,
        "scale": head_dim**-0.5,
        "window_page_size": 16,
        "page_size": 4,
    }


def on_device(case: dict[str, Any]) -> dict[str, Any]:
    return _pytree.tree_map_only(Tensor, lambda value: value.to("cuda"), case)
