"""Norms, rotations, quantisers, store_window and compress through torch on a GPU: the bits of the definitions. And
the gradients of norms and of compress_entries, and calls of every family in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4.ops as ops
from dsv4 import _library
from dsv4.ops.layout import allocate_key_pages, allocate_pages
from dsv4.testing import assert_same_bits

DEVICE = "cuda"
NARROW = [torch.bfloat16, torch.float32]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device")


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def check(op: str, function: Callable[..., Any], reference: Callable[..., Any], *args: Any) -> None:
    got, expected = function(*map(there, args)), reference(*args)
    assert _library.last_implementation(op, DEVICE) == "sm80"
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for own, wanted in pairs:
        assert_same_bits(own.cpu(), wanted)


def turns(tokens: int, rope_dim: int) -> Tensor:
    angle = 100 * torch.randn(tokens, rope_dim // 2)
    return torch.stack((angle.cos(), angle.sin()), -1)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dims", [(512, 64), (128, 64), (40, 8), (33, 2)])
def test_heads(dims: tuple[int, int], dtype: torch.dtype) -> None:
    q, rope = torch.randn(37, 5, dims[0]).to(dtype), turns(37, dims[1])
    check("query_norm_rope", ops.query_norm_rope, ops.query_norm_rope_reference, q, rope, 1e-5)
    check("apply_rope", ops.apply_rope, ops.apply_rope_reference, q, rope, True)
    if dims[0] == 128:
        check("index_query", ops.index_query, ops.index_query_reference, q, rope)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dim", [40, 512, 1536, 7168])
def test_norms(dim: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(19, dim).to(dtype), torch.randn(dim)
    check("rms_norm", ops.rms_norm, ops.rms_norm_reference, x, weight, 1e-5)
    check("rms_norm", ops.rms_norm, ops.rms_norm_reference, x, None, 1e-5)
    check("kv_norm_rope", ops.kv_norm_rope, ops.kv_norm_rope_reference, x, weight, turns(19, 16), 1e-5)


def test_tables() -> None:
    position = torch.tensor([0, 1, 77, 65536, 1 << 20, 2**31 - 1])
    for dtype in (torch.int32, torch.int64):
        frequencies = ops.rope_frequencies(64, 10000.0)
        check("rope_rows", ops.rope_rows, ops.rope_rows_reference, position.to(dtype), frequencies)


@pytest.mark.parametrize("dtype", NARROW)
def test_codes(dtype: torch.dtype) -> None:
    x = (torch.randn(9, 3, 512) * torch.randint(-9, 9, (9, 3, 1)).exp2()).to(dtype)
    check("quantize_fp8", ops.quantize_fp8, ops.quantize_fp8_reference, x, 128)
    check("quantize_fp4", ops.quantize_fp4, ops.quantize_fp4_reference, x, 32)
    check("hadamard", ops.hadamard, ops.hadamard_reference, x)
    fp8, fp4 = ops.quantize_fp8_reference(x, 128), ops.quantize_fp4_reference(x, 32)
    check("dequantize_fp8", ops.dequantize_fp8, ops.dequantize_fp8_reference, *fp8, 128, dtype)
    check("dequantize_fp4", ops.dequantize_fp4, ops.dequantize_fp4_reference, *fp4, 32, dtype)


def check_gradients(op: str, *args: Any) -> None:
    """Sums are float32 there, float64 here; of bfloat16 entries a pooled value may be rounded the other way."""
    found = getattr(torch.ops.dsv4, f"{op}_backward")(*map(there, args))
    assert _library.last_implementation(f"{op}_backward", DEVICE) == "sm80"
    expected = getattr(ops, f"{op}_backward_reference")(*args)
    for own, wanted in zip(*([r] if isinstance(r, Tensor) else r for r in (found, expected)), strict=True):
        close = 2**-7 if torch.bfloat16 in (args[0].dtype, wanted.dtype) else 1e-5
        size = float(wanted.float().abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(own.cpu().float(), wanted.float(), rtol=close, atol=close / 5 * size)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dim", [40, 512, 1536, 7168])
def test_gradients_of_norms(dim: int, dtype: torch.dtype) -> None:
    grad, x, weight, rope = (
        torch.randn(300, dim).to(dtype),
        torch.randn(300, dim).to(dtype),
        torch.randn(dim),
        turns(300, 16),
    )
    check_gradients("rms_norm", grad, x, weight, 1e-5)
    check_gradients("rms_norm", grad, x, None, 1e-5)
    check_gradients("kv_norm_rope", grad, x, weight, rope, 1e-5)
    check_gradients("query_norm_rope", grad.unflatten(0, (60, 5)), x.unflatten(0, (60, 5)), rope[:60], 1e-5)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (128, False)])
def test_gradients_of_entries(ratio: int, overlap: bool, rotate: bool, dtype: torch.dtype) -> None:
    channels, entries = (2 if overlap else 1) * 512, 600 // ratio
    rows = [torch.randn(count, channels) for count in (600, 600, ratio)]
    weight, rope = torch.randn(512).to(dtype), turns(entries, 64)
    check_gradients("compress_entries", torch.randn(entries, 512).to(dtype), *rows, weight, rope, ratio, 1e-5, rotate)


def run_both(op: str, a: dict[str, Any], written: tuple[str, ...]) -> list[tuple[Tensor, Tensor]]:
    """What the op wrote on the device, and its definition on the CPU."""
    own = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in a.items()}
    own.update({name: a[name].clone().to(DEVICE) for name in written})
    expected = {**a, **{name: a[name].clone() for name in written}}
    getattr(ops, op)(**own)
    getattr(ops, f"{op}_reference")(**expected)
    assert _library.last_implementation(op, DEVICE) == "sm80"
    return [(own[name].cpu(), expected[name]) for name in written]


@pytest.mark.parametrize("format", ["fp8", *NARROW])
def test_windows(format: Any) -> None:
    pages = allocate_pages(8, 4, 512, 64, "fp8") if format == "fp8" else torch.zeros(8, 4, 512, dtype=format)
    a = {
        "kv": torch.randn(17, 512).bfloat16(),
        "weight": torch.randn(512),
        "rope": turns(17, 64),
        "pages": pages,
        "table": torch.tensor([[3, 0, -1, 5], [1, 2, 4, 7]], dtype=torch.int32),
        "sequence": torch.tensor([0] * 9 + [1] * 8, dtype=torch.int32),
        "position": torch.cat((torch.arange(3, 12), torch.arange(8))).int(),
        "page_size": 4,
    }
    for own, expected in run_both("store_window", a, ("pages",)):
        assert_same_bits(own, expected)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (128, False)])
def test_entries(ratio: int, overlap: bool, rotate: bool) -> None:
    """Gates that choose, so that pooling is exact: then pages are, too."""
    dim = 128 if rotate else 512
    channels, tokens = (2 if overlap else 1) * dim, 300
    pages = allocate_key_pages(8, 64, dim, "fp4") if rotate else allocate_pages(8, 64, dim, 64, "fp8")
    a = {
        "kv": torch.randint(1, 9, (tokens, channels)).float(),
        "gate": 2000.0 * torch.randint(0, 2, (tokens, channels)),
        "ape": torch.zeros(ratio, channels),
        "norm_weight": torch.randn(dim).bfloat16(),
        "rope": turns(tokens, 64),
        "state": torch.zeros(2, channels // dim * ratio + 1, 2, channels),
        "pages": pages,
        "table": torch.tensor([[3, 0], [1, 2]], dtype=torch.int32),
        "sequence": torch.tensor([0] * 200 + [1] * 100, dtype=torch.int32),
        "position": torch.cat((torch.arange(200), torch.arange(28, 128))).int(),
        "ratio": ratio,
        "rotate": rotate,
    }
    for own, expected in run_both("compress", a, ("pages", "state")):
        assert_same_bits(own, expected)


def graphed_calls() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """A call of each family, whose first argument a graph's next run finds changed."""
    torch.manual_seed(0)
    x = torch.randn(5, 256).bfloat16()
    weight, scale = torch.randn(256, 256).to(torch.float8_e4m3fn), torch.ones(2, 2).to(torch.float8_e8m0fnu)
    codes, scales = ops.quantize_fp4(torch.randn(4, 256, 256))
    routing = torch.rand(5, 2), torch.rand(5, 4).argsort(-1)[:, :2].int()
    places = torch.zeros(5, dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    table, heads = torch.zeros(1, 1, dtype=torch.int32), torch.randn(5, 4, 128).bfloat16()
    window, keys = torch.randn(1, 256, 128).bfloat16(), torch.randn(1, 64, 128).bfloat16()
    visible = torch.full((5,), 9, dtype=torch.int32)
    return {
        "mhc_pre": (
            ops.mhc_pre,
            [x.view(5, 1, 256).repeat(1, 4, 1), torch.randn(24, 1024), torch.ones(3), torch.zeros(24)],
        ),
        "fp8_linear": (ops.fp8_linear, [x, weight, scale]),
        "moe_gate": (ops.moe_gate, [x, torch.randn(4, 256), 2]),
        "moe_experts": (ops.moe_experts, [x, *routing, codes, codes, codes, scales, scales, scales]),
        "index_topk": (ops.index_topk, [heads, torch.rand(5, 4), keys, table, places[0], visible, 3]),
        "sparse_attention": (
            ops.sparse_attention,
            [heads, window, table, keys, table, *places, None, visible, torch.zeros(4), turns(5, 64), 128, 0.1],
        ),
        "rms_norm": (ops.rms_norm, [x, torch.ones(256)]),
        "quantize_fp8": (lambda x: ops.quantize_fp8(x)[0].view(torch.uint8), [x]),
    }


@pytest.mark.parametrize("op", graphed_calls())
def test_a_graph_repeats_a_call(op: str) -> None:
    function, arguments = graphed_calls()[op]
    arguments = [there(value) for value in arguments]

    def call() -> list[Tensor]:
        found = function(*arguments)
        return list(found) if isinstance(found, tuple) else [found]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # what is done once, such as loading the kernel, is no part of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(3):
        arguments[0].copy_(torch.randn(arguments[0].shape))
        graph.replay()
        for own, wanted in zip(results, call(), strict=True):
            assert_same_bits(own.cpu(), wanted.cpu())
