"""Operands whose offsets are no 32-bit numbers, results that no memory holds, dtypes that only the definitions take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4 import _library, ops
from dsv4.ops import layout
from dsv4.testing import assert_same_bits, implementation_cases, max_isa

FAR = (1 << 32) + (1 << 20)  # bytes
HEADS, DIM, ROPE, TOKENS, PAGES = 3, 128, 64, 70, 2


def far_pages(stride: int) -> tuple[Tensor, Tensor]:
    """A pool that reaches beyond 2^32 bytes, and a table of its last pages. What nobody touches takes no memory."""
    count = FAR // stride + 2
    return torch.empty(count, stride, dtype=torch.uint8), torch.tensor([[count - 1, count - 2]], dtype=torch.int32)


def near_pages(stride: int) -> tuple[Tensor, Tensor]:
    return torch.empty(PAGES, stride, dtype=torch.uint8), torch.tensor([[0, 1]], dtype=torch.int32)


def attend(pools: tuple[tuple[Tensor, Tensor], ...]) -> list[Tensor]:
    """Rows stored and compressed, keys chosen, and attention over both."""
    torch.manual_seed(0)
    (window, window_table), (pages, table), (keys, key_table) = pools
    sequence, position = torch.zeros(TOKENS, dtype=torch.int32), torch.arange(TOKENS, dtype=torch.int32)
    rope = ops.rope_rows(position, ops.rope_frequencies(ROPE, 1e4))
    norm = torch.ones(DIM, dtype=torch.bfloat16)
    ops.store_window(torch.randn(TOKENS, DIM), norm, rope, window, window_table, sequence, position, page_size=64)
    for pool, places, rotate in ((pages, table, False), (keys, key_table, True)):
        kv, gate = torch.randn(2, TOKENS, 2 * DIM)
        state = torch.zeros(1, 16, 2, 2 * DIM)
        places = (pool, places, sequence, position)
        ops.compress(kv, gate, torch.randn(4, 2 * DIM), norm, rope, state, *places, 4, page_size=16, rotate=rotate)
    query, lengths = torch.randn(2, TOKENS, HEADS, DIM).bfloat16(), (position + 1) // 4
    chosen = ops.index_topk(query[0], torch.rand(TOKENS, HEADS), keys, key_table, sequence, lengths, 5, page_size=16)
    found = ops.sparse_attention(
        query[1], window, window_table, pages, table, sequence, position, chosen, lengths, torch.zeros(HEADS), rope,
        32, DIM**-0.5, window_page_size=64, page_size=16,
    )  # fmt: skip
    return [chosen, *found]


@pytest.mark.parametrize("implementation", implementation_cases("sparse_attention"))
def test_pages_beyond_32_bits(implementation: str) -> None:
    strides = (
        layout.page_bytes(64, DIM, ROPE, "fp8"),
        layout.page_bytes(16, DIM, ROPE, "fp8"),
        layout.key_page_bytes(16, DIM, "fp4"),
    )
    with max_isa(implementation):
        near = attend(tuple(near_pages(stride) for stride in strides))
        far = attend(tuple(far_pages(stride) for stride in strides))
    assert near[1].float().abs().max() > 0
    for a, b in zip(far, near, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("form", ["fp4", "fp8", "plain"])
@pytest.mark.parametrize("implementation", implementation_cases("moe_experts"))
def test_experts_beyond_32_bits(implementation: str, form: str) -> None:
    """The last two of so many; the others are never touched."""
    hidden, inter = 512, 256
    each = {"fp4": inter * hidden // 2, "fp8": inter * hidden, "plain": 2 * inter * hidden}[form]
    count = FAR // each + 2
    shapes = {"w1": (inter, hidden), "w3": (inter, hidden), "w2": (hidden, inter)}
    far: dict[str, Any] = {}
    near: dict[str, Any] = {}
    for name, (out, size) in shapes.items():
        width = size * each // (inter * hidden)
        bytes_ = torch.empty(count, out, width, dtype=torch.uint8)
        values = torch.randn(2, out, size) / size**0.5
        if form == "plain":
            bytes_[-2:] = values.bfloat16().view(torch.uint8)
            far[name] = bytes_.view(torch.bfloat16)
        else:
            bytes_[-2:] = torch.randint(0, 96, (2, out, width), dtype=torch.uint8)
            far[name] = bytes_ if form == "fp4" else bytes_.view(torch.float8_e4m3fn)
            scales = (out, size // 32) if form == "fp4" else (-(-out // 128), -(-size // 128))
            scale = torch.empty(count, *scales, dtype=torch.uint8)
            scale[-2:] = 120
            far[f"{name}_scale"] = scale.view(torch.float8_e8m0fnu)
    for name, matrix in far.items():
        near[name] = matrix.view(torch.uint8)[-2:].clone().view(matrix.dtype)
    x, weights = torch.randn(3, hidden).bfloat16(), torch.rand(3, 2)
    indices = torch.tensor([[0, 1], [1, 0], [1, 1]])
    with max_isa(implementation):
        expected = ops.moe_experts(x, weights, indices, **near)
        assert expected.float().abs().max() > 0
        assert_same_bits(ops.moe_experts(x, weights, indices + count - 2, **far), expected)


@pytest.mark.skipif(not _library.kernel_implementations(), reason="not run: this machine has no op library")
def test_a_result_that_no_memory_holds() -> None:
    pages, table = torch.zeros(1, 64, 32), torch.zeros(1, 1, dtype=torch.int32)
    row = torch.zeros(1, dtype=torch.int32)
    message = r"^dsv4: no memory for int32 \[1, 1125899906842624\]; pass fewer rows at once$"
    with pytest.raises(RuntimeError, match=message):
        ops.index_topk(torch.ones(1, 1, 32), torch.ones(1, 1), pages, table, row, row, 1 << 50)


@pytest.mark.skipif(not _library.kernel_implementations(), reason="not run: this machine has no op library")
def test_a_dtype_of_the_definition_alone_names_where_it_is_taken() -> None:
    x = torch.ones(2, 8)
    assert ops.hadamard(x.double()).dtype == torch.float64
    for wrong, message in (
        (x.double(), r"x must be bfloat16 or float32 \[\.\.\., n\], got float64 \[2, 8\]; dsv4\.ops takes that too"),
        (x.half(), r"x must be bfloat16 or float32 or float64 \[\.\.\., n\], got float16 \[2, 8\]"),
    ):
        with pytest.raises(RuntimeError, match=f"^hadamard: {message}$"):
            torch.ops.dsv4.hadamard(wrong)
    with pytest.raises(RuntimeError, match=r"fp4_linear: x must .*, got float64 .*; dsv4\.ops takes that too"):
        torch.ops.dsv4.fp4_linear(x.double(), torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 1))
