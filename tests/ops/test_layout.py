"""Page formats: where each byte lies, what a read gives back, what a write leaves alone."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4.ops._check import Check
from dsv4.ops.layout import (
    allocate_key_pages,
    allocate_pages,
    check_key_pages,
    check_row_pages,
    key_format,
    key_page_bytes,
    locate,
    owners,
    page_bytes,
    read_keys,
    read_rows,
    row_bytes,
    row_scale_bytes,
    write_keys,
    write_rows,
)
from dsv4.testing import Guarded, grid

OPS = Path(__file__).parent.parent / "data" / "golden" / "ops" / "ops.safetensors"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mapping_flags(address: int) -> str:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.removeprefix("VmFlags:")
    raise LookupError(hex(address))


def test_large_pools_ask_for_huge_pages() -> None:
    """Zeroed like small ones, and advised to be huge, except for the ends that other memory may share."""
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("not run: this kernel has no transparent huge pages")
    count = (9 << 20) // 37440
    for pool in (allocate_pages(count, 64, 512, 64, "fp8"), allocate_key_pages(4 * count, 64, 128, "fp4")):
        assert not pool.any()
        middle = pool.data_ptr() + pool.nbytes // 2
        assert " hg" in mapping_flags(middle)
    assert not allocate_pages(3, 64, 512, 64, "fp8").any()


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def bfloat16(pair: list[int]) -> float:
    return struct.unpack("<f", bytes([0, 0, *pair]))[0]


def rows_of(count: int, head_dim: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = torch.randn(count, head_dim, generator=g).mul(4).exp2()
    return (torch.randn(count, head_dim, generator=g) * scale).bfloat16()


@pytest.mark.parametrize(("page_size", "stride"), [(2, 1728), (64, 37440), (256, 149760)])
def test_release_strides(page_size: int, stride: int) -> None:
    assert row_bytes(512, 64) == 576
    assert row_scale_bytes(512, 64) == 8
    assert page_bytes(page_size, 512, 64, "fp8") == stride
    assert allocate_pages(3, page_size, 512, 64, "fp8").shape == (3, stride)


def test_sizes_of_other_formats() -> None:
    assert page_bytes(64, 512, 64, "plain") == 64 * 512 * 2
    assert page_bytes(64, 512, 64, "plain", torch.float32) == 64 * 512 * 4
    assert key_page_bytes(64, 128, "fp4") == 64 * 68
    assert key_page_bytes(64, 128, "fp8") == 64 * 132
    assert key_page_bytes(64, 128, "plain", torch.float64) == 64 * 128 * 8
    assert row_scale_bytes(8 * 64 + 64, 64) == 8
    assert row_scale_bytes(9 * 64 + 64, 64) == 16
    for pages in (
        allocate_pages(5, 7, 96, 32, "fp8"),
        allocate_pages(5, 7, 96, 32, "plain", torch.float32),
        allocate_key_pages(5, 7, 64, "fp4"),
        allocate_key_pages(5, 7, 64, "fp8"),
        allocate_key_pages(5, 7, 64, "plain"),
    ):
        assert not pages.any()
        assert pages.is_contiguous()
    assert allocate_pages(5, 7, 96, 32, "fp8").nbytes == 5 * page_bytes(7, 96, 32, "fp8")
    assert allocate_key_pages(5, 7, 64, "fp4").nbytes == 5 * key_page_bytes(7, 64, "fp4")


@pytest.mark.parametrize(
    "case", grid(head_dim=[512, 128, 96], rope_dim=[64, 32], page_size=[1, 2, 53, 64]), ids=lambda c: str(c)
)
def test_fp8_row_bytes(case: dict[str, int]) -> None:
    """Decoded by hand from the addresses that FlashMLA's kernels use."""
    head_dim, rope_dim, size = case["head_dim"], case["rope_dim"], case["page_size"]
    nope, width = head_dim - rope_dim, head_dim + rope_dim
    scales = row_scale_bytes(head_dim, rope_dim)
    pages = allocate_pages(3, size, head_dim, rope_dim, "fp8")
    row = rows_of(1, head_dim)
    offset = size - 1
    write_rows(pages, row, torch.tensor([1]), torch.tensor([offset]), size, rope_dim)
    data = pages[1].tolist()
    codes = data[offset * width : offset * width + nope]
    rope = data[offset * width + nope : (offset + 1) * width]
    exponents = data[size * width + offset * scales :][: -(-nope // 64)]
    assert [bfloat16(rope[2 * i : 2 * i + 2]) for i in range(rope_dim)] == row[0, nope:].tolist()
    values = torch.tensor([e4m3(code) * 2.0 ** (exponents[i // 64] - 127) for i, code in enumerate(codes)])
    for start in range(0, nope, 64):
        block, got = row[0, start : min(start + 64, nope)].float(), values[start : start + 64]
        assert got.abs().max() >= 0.94 * block.abs().max()
        assert ((got - block).abs() <= block.abs() / 16 + block.abs().max() * 2.0**-17).all()
    read = read_rows(pages, torch.tensor(1), torch.tensor(offset), size, head_dim, rope_dim)
    assert torch.equal(read, torch.cat((values, row[0, nope:].float())))
    assert torch.equal(read.bfloat16().float(), read)
    assert not pages[0].any()
    assert not pages[2].any()
    touched = torch.zeros_like(pages[1], dtype=torch.bool)
    touched[offset * width : (offset + 1) * width] = True
    touched[size * width + offset * scales :][:scales] = True
    assert not pages[1][~touched].any()


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_fp4_and_fp8_key_bytes(page_size: int) -> None:
    keys = rows_of(1, 128, seed=1)
    offset = page_size - 1
    where = torch.tensor([1]), torch.tensor([offset])
    pages = allocate_key_pages(2, page_size, 128, "fp4")
    write_keys(pages, keys, *where, page_size)
    data = pages[1].tolist()
    packed = data[offset * 64 : (offset + 1) * 64]
    exponents = data[page_size * 64 + 4 * offset :][:4]
    nibbles = [n for byte in packed for n in (byte & 15, byte >> 4)]
    values = [(-1 if n & 8 else 1) * E2M1[n & 7] * 2.0 ** (exponents[i // 32] - 127) for i, n in enumerate(nibbles)]
    got = read_keys(pages, torch.tensor([1]), torch.tensor([offset]), page_size, 128)
    assert torch.equal(got[0], torch.tensor(values))
    blocks = (got - keys.float()).abs().view(4, 32), keys.float().abs().view(4, 32).amax(1, keepdim=True)
    assert (blocks[0] <= blocks[1] / 3).all()  # a step of e2m1 below its largest value is at most 2 of 6
    assert not pages[0].any()

    pages = allocate_key_pages(2, page_size, 128, "fp8")
    write_keys(pages, keys, *where, page_size)
    data = pages[1].tolist()
    (scale,) = struct.unpack("<f", bytes(data[page_size * 128 + 4 * offset :][:4]))
    values = [e4m3(code) * scale for code in data[offset * 128 : (offset + 1) * 128]]
    got = read_keys(pages, torch.tensor([1]), torch.tensor([offset]), page_size, 128)
    assert torch.equal(got[0], torch.tensor(values))
    assert (got - keys.float()).abs().max() <= keys.float().abs().max() / 16
    assert not pages[0].any()


def test_fp8_keys_read_any_scale() -> None:
    pages = allocate_key_pages(1, 2, 128, "fp8")
    pages[0, 128:256] = 0x38  # e4m3 1.0
    pages[0, 256 + 4 : 256 + 8] = torch.tensor([0.3]).view(torch.uint8)
    got = read_keys(pages, torch.tensor([0]), torch.tensor([1]), 2, 128)
    assert torch.equal(got, torch.full((1, 128), 0.3))


def test_golden_round_trips() -> None:
    ops = load_file(OPS)
    x = ops["act_quant128.x"]
    rope = rows_of(len(x), 64)
    where = torch.zeros(len(x), dtype=torch.int32), torch.arange(len(x), dtype=torch.int32)
    pages = allocate_pages(1, 24, 256 + 64, 64, "fp8")
    write_rows(pages, torch.cat((x, rope), dim=1), *where, 24, 64)
    read = read_rows(pages, *where, 24, 256 + 64, 64, torch.bfloat16)
    assert torch.equal(read, torch.cat((ops["act_quant64_inplace.y"], rope), dim=1))
    pages = allocate_key_pages(1, 24, 256, "fp4")
    write_keys(pages, x, *where, 24)
    assert torch.equal(read_keys(pages, *where, 24, 256, torch.bfloat16), ops["fp4_quant32_inplace.y"])


def stores(kind: str, size: int = 5, count: int = 6) -> tuple[Tensor, Any, Any]:
    """(pool, write(pages, rows, page, offset), read(pages, page, offset)) of rows or keys of 128."""
    if kind.startswith("key"):
        pages = allocate_key_pages(count, size, 128, kind.removeprefix("key_"), torch.float32)
        return pages, lambda *a: write_keys(*a, size), lambda *a: read_keys(*a, size, 128)
    pages = allocate_pages(count, size, 128, 64, kind.removeprefix("row_"), torch.float32)
    return pages, lambda *a: write_rows(*a, size, 64), lambda *a: read_rows(*a, size, 128, 64)


KINDS = ("row_fp8", "row_plain", "key_fp4", "key_fp8", "key_plain")


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_at_scattered_places(kind: str) -> None:
    pages, write, read = stores(kind)
    g = torch.Generator().manual_seed(0)
    places = torch.randperm(30, generator=g)[:20]
    rows = rows_of(20, 128)
    write(pages, rows, (places // 5).int(), (places % 5).int())
    together = read(pages, places // 5, places % 5)
    for i, place in enumerate(places.tolist()):
        one, write_one, read_one = stores(kind)
        write_one(one, rows[i : i + 1], torch.tensor([0]), torch.tensor([0]))
        assert torch.equal(read_one(one, torch.tensor(0), torch.tensor(0)), together[i]), place
    shaped = read(pages, places.view(4, 5) // 5, places.view(4, 5) % 5)
    assert torch.equal(shaped.view(20, 128), together)
    if kind.endswith("plain"):
        assert torch.equal(together, rows.float())


@pytest.mark.parametrize("kind", KINDS)
def test_negative_pages_are_skipped_and_read_as_zeros(kind: str) -> None:
    pages, write, read = stores(kind)
    pages.view(torch.uint8).fill_(0xFF)  # NaN in every format
    before = pages.clone()
    rows = rows_of(3, 128)
    write(pages, rows, torch.tensor([-1, -1, -1]), torch.tensor([0, 1, 2]))
    assert torch.equal(pages.view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(read(pages, torch.tensor([-1, -1]), torch.tensor([0, 3])), torch.zeros(2, 128))
    write(pages, rows, torch.tensor([-1, 2, -1]), torch.tensor([0, 1, 2]))
    got = read(pages, torch.tensor([2, -1, 2]), torch.tensor([1, 1, 2]))
    assert torch.isfinite(got[:2]).all()
    assert not got[1].any()
    if not kind.endswith("fp4"):  # e2m1 has no NaN, but its scale does
        assert got[2].isnan().any()
    assert read(pages, torch.tensor(2), torch.tensor(2)).isnan().any()
    empty = pages[:0]
    assert torch.equal(read(empty, torch.tensor([-1]), torch.tensor([0])), torch.zeros(1, 128))
    none = torch.zeros(0, dtype=torch.int32)
    write(pages, rows[:0], none, none)
    assert read(pages, none, none).shape == (0, 128)


@pytest.mark.parametrize("kind", KINDS)
def test_pools_that_are_views(kind: str) -> None:
    """Every second page of a larger pool, and writes that stay inside the tensor."""
    pages, write, read = stores(kind)
    rows = rows_of(30, 128)
    where = torch.arange(30) // 5, torch.arange(30) % 5
    write(pages, rows, *where)
    wide = pages.new_zeros((12, *pages.shape[1:]))
    write(wide[::2], rows, *where)
    assert torch.equal(wide[::2].reshape(pages.shape), pages)
    assert not wide[1::2].any()
    assert torch.equal(read(wide[::2], *where), read(pages, *where))
    guarded = Guarded(torch.zeros_like(pages))
    write(guarded.tensor, rows, *where)
    guarded.check()
    assert torch.equal(guarded.tensor, pages)


def test_result_dtypes() -> None:
    where = torch.tensor([0]), torch.tensor([0])
    for kind, default in (("row_fp8", torch.float32), ("row_plain", torch.float32), ("key_fp4", torch.float32)):
        pages, _, read = stores(kind)
        assert read(pages, *where).dtype == default
    assert read_rows(allocate_pages(1, 1, 96, 32, "plain"), *where, 1, 96, 32).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float64):
        assert read_rows(allocate_pages(1, 1, 96, 32, "fp8"), *where, 1, 96, 32, dtype).dtype == dtype
        assert read_keys(allocate_key_pages(1, 1, 64, "fp8"), *where, 1, 64, dtype).dtype == dtype


def test_reading_a_plain_pool_is_differentiable() -> None:
    pages = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    page, offset = torch.tensor([0, -1, 2, 0]), torch.tensor([1, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda p: read_rows(p, page, offset, 2, 8, 0), pages)
    poisoned = torch.full((3, 2, 8), float("nan"), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(read_rows(poisoned, page, offset, 2, 8, 0).nan_to_num().sum(), poisoned)
    assert torch.isfinite(grad).all()


def test_locate() -> None:
    table = torch.tensor([[7, -1, 3], [2, 5, -1]], dtype=torch.int32)
    entry = torch.tensor([[0, 3, 4, 8, 11, 12, 2**31 - 1, -1, -(2**31)], [0, 3, 4, 8, 11, 12, 2**31 - 1, -1, -4]]).int()
    page, offset = locate(table, torch.tensor([[0], [1]]).int(), entry, 4)
    assert page.tolist() == [[7, 7, -1, 3, 3, -1, -1, -1, -1], [2, 2, 5, -1, -1, -1, -1, -1, -1]]
    assert page.dtype == offset.dtype == torch.int64
    assert offset[page >= 0].tolist() == [0, 3, 0, 3, 0, 3, 0]
    assert ((offset >= 0) & (offset < 4)).all()
    page, _ = locate(table[:, :0], torch.tensor([0, 1]), torch.tensor([0, 5]), 4)
    assert page.tolist() == [-1, -1]


def test_owners() -> None:
    table = torch.zeros(4, 1, dtype=torch.int32)
    assert owners("op", torch.tensor([3, 0, 3]), table) == [0, 3]
    assert owners("op", torch.zeros(0, dtype=torch.int32), table) == []
    for wrong in (-1, 4):
        with pytest.raises(
            RuntimeError, match=rf"^op: sequence must lie in \[0, 4\), the rows of the table, got {wrong}$"
        ):
            owners("op", torch.tensor([0, wrong]), table)


def test_key_formats_are_told_by_their_bytes() -> None:
    for format in ("fp4", "fp8", "plain"):
        assert key_format(allocate_key_pages(2, 64, 128, format), 64, 128) == format
    assert key_format(torch.zeros(2, 64 * 100, dtype=torch.uint8), 64, 128) is None
    assert key_format(torch.zeros(2, 64, 128, dtype=torch.int32), 64, 128) is None
    assert key_format(torch.zeros(2, 32, 128), 64, 128) is None
    assert key_format(allocate_key_pages(2, 3, 8, "fp8"), 3, 8) == "fp8"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: page_bytes(1, 64, 64, "fp8"), "page layout: rope_dim must lie in [0, head_dim), got 64 of 64"),
        (lambda: page_bytes(1, 64, 32, "fp4"), "page layout: row format must be one of ('fp8', 'plain'), got 'fp4'"),
        (
            lambda: key_page_bytes(1, 64, "fp6"),
            "page layout: key format must be one of ('fp4', 'fp8', 'plain'), got 'fp6'",
        ),
        (lambda: key_page_bytes(1, 48, "fp4"), "page layout: FP4 keys need a dim divisible by 32, got 48"),
        (
            lambda: read_keys(torch.zeros(1, 70).byte(), torch.tensor([0]), torch.tensor([0]), 1, 128),
            "page layout: uint8 [1, 70] holds no pages of 1 index keys of 128",
        ),
        (
            lambda: write_keys(torch.zeros(1, 3, 64), torch.zeros(1, 128), torch.tensor([0]), torch.tensor([0]), 3),
            "page layout: float32 [1, 3, 64] holds no pages of 3 index keys of 128",
        ),
    ],
)
def test_misuse(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_checks_of_pools() -> None:
    check = Check("op")
    check_row_pages(check, "pages", allocate_pages(1, 2, 512, 64, "fp8"), 2, 512, 64)
    check_row_pages(check, "pages", allocate_pages(1, 2, 512, 64, "plain"), 2, 512, 64)
    check_key_pages(check, "pages", allocate_key_pages(1, 2, 128, "fp4"), 2, 128)
    check_key_pages(check, "pages", allocate_key_pages(1, 2, 128, "plain"), 2, 128)
    bad = [
        (check_row_pages, (torch.zeros(1, 1700).byte(), 2, 512, 64), "uint8 [pages, 1728], got uint8 [1, 1700]"),
        (check_key_pages, (torch.zeros(1, 99).byte(), 2, 128), "uint8 [pages, 136 or 264], got uint8 [1, 99]"),
        (check_key_pages, (torch.zeros(1, 99).byte(), 2, 24), "uint8 [pages, 56], got uint8 [1, 99]"),
    ]
    for function, arguments, message in bad:
        with pytest.raises(RuntimeError) as caught:
            function(check, "pages", *arguments)
        assert str(caught.value) == f"op: pages must be {message}"
    with pytest.raises(RuntimeError) as caught:
        check_row_pages(check, "pages", torch.zeros(1, 9).byte(), 2, 32, 32)
    assert str(caught.value) == "op: rope_dim must lie in [0, 32) for FP8 rows, got 32"


@pytest.mark.parametrize("format", ["fp4", "fp8", "plain"])
def test_pools_of_keys_are_where_the_call_is(format: str) -> None:
    check = Check("op")
    check.tensor("x", torch.zeros(1), (torch.float32,), (1,))
    with pytest.raises(RuntimeError, match=r"^op: pages must be on cpu as x is, got meta$"):
        check_key_pages(check, "pages", allocate_key_pages(1, 2, 128, format, device="meta"), 2, 128)
