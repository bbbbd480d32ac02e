"""What only the kernels of sparse_attention have: parts of long rows, threads, register blocks, decoding, checks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import KERNELS, Attend, assert_matches, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import _library
from dsv4.ops import sparse_attention
from dsv4.ops.layout import allocate_pages, read_rows, write_rows
from dsv4.testing import Guarded, assert_rows_independent, assert_same_bits

pytestmark = pytest.mark.skipif(not KERNELS, reason="not run: the op library has no sparse_attention")
ROW_ARGUMENTS = ("query", "sequence", "position", "rope", "indices", "lengths")


@pytest.fixture(params=KERNELS)
def attend(request: pytest.FixtureRequest) -> Attend:
    return Attend(request.param)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def to_fp8(a: dict[str, Any], name: str, size: int, rope_dim: int) -> dict[str, Any]:
    """The call with one pool in FP8, and the pool of the values that it then holds."""
    pages = a[name]
    count, _, head_dim = pages.shape
    where = torch.arange(count * size)
    stored = allocate_pages(count, size, head_dim, rope_dim, "fp8")
    write_rows(stored, pages.flatten(0, 1), where // size, where % size, size, rope_dim)
    values = read_rows(stored, where // size, where % size, size, head_dim, rope_dim, torch.float32)
    return {**a, name: stored, "_" + name: values.view(count, size, head_dim)}


@pytest.mark.parametrize("heads", [*range(1, 11), 12, 15, 17, 33, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_of_heads(attend: Attend, heads: int, dtype: torch.dtype) -> None:
    assert_matches(attend, make(heads=heads, dtype=dtype, runs=((30, 2),), window=9))


@pytest.mark.parametrize("head_dim", [64, 128, 224, 288, 512, 544])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width(attend: Attend, head_dim: int, dtype: torch.dtype) -> None:
    assert_matches(
        attend, make(heads=2, head_dim=head_dim, rope_dim=48, dtype=dtype, runs=((30, 2),), source="lengths")
    )


@pytest.mark.parametrize("head_dim", [2, 30, 40, 100])
def test_other_widths_are_left_to_the_scalar_kernel(head_dim: int) -> None:
    a = make(head_dim=head_dim, rope_dim=2, dtype=torch.float32)
    sparse_attention(**a)
    assert _library.last_implementation("sparse_attention") == "scalar"
    assert_matches(Attend("scalar"), a)


# Multiples of a group (32), of a tile (128) and of a part (512 at most), and their neighbours.
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 127, 128, 129, 511, 512, 513, 640, 1024, 1025, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_keys(attend: Attend, threads: Any, keys: int, dtype: torch.dtype) -> None:
    a = make(heads=2, runs=((keys - 1, 1),), window=keys, window_page_size=50, source="window", rope_dim=8, dtype=dtype)
    threads(1)
    assert_matches(attend, a)
    expected = attend(a)
    for count in (2, 3):
        threads(count)
        for x, y in zip(attend(a), expected, strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("source", ["indices", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_in_company_and_on_threads(attend: Attend, threads: Any, source: str, dtype: torch.dtype) -> None:
    """Rows of very different lengths, cut into parts or not as the call happens to be."""
    a = make(runs=((2500, 5), (0, 2), (90, 3)), heads=18, window=300, source=source, ratio=2, k=900, dtype=dtype)
    names = [n for n in ROW_ARGUMENTS if a[n] is not None]

    def part(*rows: Tensor) -> tuple[Tensor, Tensor]:
        return attend({**a, **dict(zip(names, rows, strict=True))})

    results = []
    for count in (1, 2):
        threads(count)
        assert_rows_independent(part, [a[n] for n in names], cuts=(1, 7, 2))
        results.append(attend(a))
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("query", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", ["fp8", torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", ["fp8", torch.float32, torch.bfloat16])
def test_pools_of_any_two_formats(attend: Attend, query: torch.dtype, window: Any, entries: Any) -> None:
    a = make(dtype=torch.bfloat16, head_dim=160, rope_dim=32, runs=((40, 4), (3, 2)))
    plain = dict(a)
    for name, size, format in (("window_pages", 16, window), ("compressed_pages", 4, entries)):
        if format == "fp8":
            stored = to_fp8(a, name, size, 32)
            plain[name] = stored.pop("_" + name)
            a[name] = stored[name]
        else:
            plain[name] = a[name] = a[name].to(format)
    for call in (a, plain):
        call["query"] = call["query"].to(query)
    out, lse = attend(a)
    assert_matches(Attend("scalar"), plain)
    expected, expected_lse = Attend("scalar")(plain)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, expected, rtol=1e-6 if query == torch.float32 else 2.0**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0, 1, 9, 10, 11, 100, 127, 128, 200, 246, 247, 254])
def test_every_code_at_every_scale(attend: Attend, scale: int, dtype: torch.dtype) -> None:
    """A row with one key gives that key."""
    head_dim, rope_dim = 352, 32  # 320 codes: 254 that are numbers, then some again; 5 blocks
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F] + list(range(66)), dtype=torch.uint8)
    pages = allocate_pages(1, 3, head_dim, rope_dim, "fp8")
    row = head_dim + rope_dim
    pages[0, row : row + 320] = codes
    pages[0, row + 320 : 2 * row] = torch.randn(rope_dim).bfloat16().view(torch.uint8)
    pages[0, 3 * row + 8 : 3 * row + 13] = scale
    a = {
        "query": torch.zeros(1, 2, head_dim, dtype=dtype),
        "window_pages": pages,
        "window_table": torch.zeros(1, 1, dtype=torch.int32),
        "compressed_pages": None,
        "compressed_table": None,
        "sequence": torch.zeros(1, dtype=torch.int32),
        "position": torch.ones(1, dtype=torch.int32),
        "indices": None,
        "lengths": None,
        "sink": torch.full((2,), -math.inf),
        "rope": None,
        "window": 1,
        "scale": 1.0,
        "window_page_size": 3,
        "page_size": 3,
        "rope_dim": rope_dim,
    }
    out, lse = attend(a)
    one = torch.ones(1, dtype=torch.int64)
    expected = read_rows(pages, 0 * one, one, 3, head_dim, rope_dim, dtype).expand(1, 2, head_dim)
    finite = torch.isfinite(expected)  # zero scores times infinity: no score
    if not finite.all():
        assert out.isnan().all()
        return
    # Vector units take denormal bfloat16 numbers for zero.
    torch.testing.assert_close(
        out, expected.contiguous(), rtol=0, atol=2.0**-126 if dtype == torch.bfloat16 else 2.0**-130
    )
    assert not lse.any()


def test_codes_and_scales_that_are_nan(attend: Attend) -> None:
    base = make(source="window", runs=((40, 12),), head_dim=96, rope_dim=32, window=4, dtype=torch.bfloat16)
    base["window_pages"].nan_to_num_(0.5)
    a = to_fp8(base, "window_pages", 16, 32)
    del a["_window_pages"]
    expected = attend(a)
    page, row = int(a["window_table"][0, 45 // 16]), 96 + 32
    for at in ((45 % 16) * row + 5, 16 * row + (45 % 16) * 8):
        for byte in (0x7F, 0xFF) if at < 16 * row else (0xFF,):
            damaged = a["window_pages"].clone()
            damaged[page, at] = byte
            for x, y in zip(attend({**a, "window_pages": damaged}), expected, strict=True):
                sees = (a["position"] >= 45) & (a["position"] < 49)
                assert x[sees].isnan().all()
                assert_same_bits(x[~sees], y[~sees])


def test_a_page_outside_the_pool_is_not_stored(attend: Attend) -> None:
    a = make(source="lengths", runs=((40, 4),), dtype=torch.float32)
    missing = {**a, "compressed_table": a["compressed_table"].clone()}
    missing["compressed_table"][0, 1] = -1
    outside = {**missing, "compressed_table": missing["compressed_table"].clone()}
    outside["compressed_table"][0, 1] = len(a["compressed_pages"])
    for x, y in zip(attend(outside), attend(missing), strict=True):
        assert_same_bits(x, y)


def test_reads_nothing_else_and_writes_nothing(attend: Attend) -> None:
    a = make(source="indices", runs=((40, 4), (0, 2)), dtype=torch.bfloat16)
    guards = {n: Guarded(x) for n, x in a.items() if isinstance(x, Tensor)}
    before = {n: x.clone() for n, x in a.items() if isinstance(x, Tensor)}
    expected = attend(a)
    for x, y in zip(attend({**a, **{n: g.tensor for n, g in guards.items()}}), expected, strict=True):
        assert_same_bits(x, y)
    for name, guard in guards.items():
        guard.check()
        assert_same_bits(guard.tensor, before[name], name)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from(["window", "indices", "lengths"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    heads=st.integers(1, 9),
    width=st.integers(1, 4),
    window=st.integers(1, 40),
    window_page_size=st.integers(1, 40),
    page_size=st.integers(1, 70),
    ratio=st.sampled_from([1, 2, 4, 128]),
    k=st.integers(2, 50),
    runs=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 4)), min_size=1, max_size=3),
    missing=st.sets(st.integers(0, 20), max_size=8),
    seed=st.integers(0, 1000),
)
def test_any_call(attend: Attend, runs: list[tuple[int, int]], width: int, missing: set[int], **case: Any) -> None:
    """Empty rows, rows without a stored page, more indices than entries; what no row reads holds NaN."""
    a = make(runs=tuple(runs), head_dim=32 * width, **case)
    for name in ("window_table", "compressed_table"):
        if a[name] is not None:
            for place in missing:
                a[name].view(-1)[place % a[name].numel()] = -1
    assert_matches(attend, a)


def test_half_is_refused_by_the_op_with_kernels() -> None:
    message = r"query must be bfloat16 or float32 \[tokens, heads, head_dim\], got float16 .*; dsv4.ops takes that too$"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dsv4.sparse_attention(**make(dtype=torch.float16))
