"""Page formats of the key-value cache: how rows and index keys lie in memory.

A pool of pages is one tensor. A row is addressed by (page, offset); the tables that map a sequence's positions or
entries to pages are the caller's. Formats, for pages of `b` rows:

* Plain rows or keys: [pages, b, head_dim] of any float dtype.
* FP8 rows (FlashMLA's V4 layout): uint8 [pages, stride]. First b rows of `nope + 2 * rope` bytes: `nope` e4m3 codes,
  then `rope` bfloat16 values, the last dims of a head, already rotated. Then b groups of scale bytes: one e8m0
  exponent for every 64 codes, padded to a multiple of 8 bytes. The stride is padded to a multiple of the row's bytes.
  At head_dim 512 and rope 64 that is 576-byte rows, 8 scale bytes (the last unused), and strides of 1,728, 37,440 and
  149,760 bytes at b = 2, 64 and 256.
* FP8 index keys (DeepGEMM's layout): uint8 [pages, b * (dim + 4)]. First b rows of `dim` e4m3 codes, then b float32
  scales. The writer here uses the power-of-two scale of all other quantisers; a reader takes any.
* FP4 index keys: uint8 [pages, b * (dim / 2 + dim / 32)]. First b rows of packed e2m1 codes (even element in the low
  nibble), then b groups of e8m0 scales, one for every 32 codes. 68 bytes a key at dim 128.

Sources: FlashMLA's test quantiser (9241ae3), DeepGEMM's paged index kernels (54e2261).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops._check import ANY_FLOATS, Check, describe
from dsv4.ops.huge_pages import zeros
from dsv4.ops.quantize import (
    ceil_div,
    dequantize_fp4_reference,
    dequantize_fp8_reference,
    quantize_fp4_reference,
    quantize_fp8_reference,
)

__all__: list[str] = []  # not a family of ops: import from this module

ROW_BLOCK = 64  # codes that share one scale in an FP8 row
FP4_BLOCK = 32  # codes that share one scale in an FP4 key

ROW_FORMATS = ("fp8", "plain")
KEY_FORMATS = ("fp4", "fp8", "plain")


def _round_up(value: int, multiple: int) -> int:
    return ceil_div(value, multiple) * multiple


def row_bytes(head_dim: int, rope_dim: int) -> int:
    """Bytes of one FP8 row without its scales: e4m3 codes, then bfloat16 rope dims."""
    if not 0 <= rope_dim < head_dim:
        raise ValueError(f"page layout: rope_dim must lie in [0, head_dim), got {rope_dim} of {head_dim}")
    return head_dim - rope_dim + 2 * rope_dim


def row_scale_bytes(head_dim: int, rope_dim: int) -> int:
    """Bytes of one FP8 row's scales, padding included."""
    return _round_up(ceil_div(head_dim - rope_dim, ROW_BLOCK), 8)


def page_bytes(page_size: int, head_dim: int, rope_dim: int, format: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of one page of rows, format "fp8" or "plain" (`dtype` matters for "plain" alone)."""
    if format == "plain":
        return page_size * head_dim * dtype.itemsize
    if format != "fp8":
        raise ValueError(f"page layout: row format must be one of {ROW_FORMATS}, got {format!r}")
    row = row_bytes(head_dim, rope_dim)
    return _round_up(page_size * (row + row_scale_bytes(head_dim, rope_dim)), row)


def key_page_bytes(page_size: int, dim: int, format: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of one page of index keys, format "fp4", "fp8" or "plain" (`dtype` matters for "plain" alone)."""
    if format == "plain":
        return page_size * dim * dtype.itemsize
    if format == "fp8":
        return page_size * (dim + 4)
    if format != "fp4":
        raise ValueError(f"page layout: key format must be one of {KEY_FORMATS}, got {format!r}")
    if dim % FP4_BLOCK:
        raise ValueError(f"page layout: FP4 keys need a dim divisible by {FP4_BLOCK}, got {dim}")
    return page_size * (dim // 2 + dim // FP4_BLOCK)


def allocate_pages(
    count: int,
    page_size: int,
    head_dim: int,
    rope_dim: int,
    format: str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A zeroed pool of row pages: uint8 [count, stride] for "fp8", `dtype` [count, page_size, head_dim] for "plain"."""
    stride = page_bytes(page_size, head_dim, rope_dim, format, dtype)
    if format == "plain":
        return zeros(count, page_size, head_dim, dtype=dtype, device=device)
    return zeros(count, stride, dtype=torch.uint8, device=device)


def allocate_key_pages(
    count: int,
    page_size: int,
    dim: int,
    format: str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A zeroed pool of index key pages: uint8 [count, bytes], or `dtype` [count, page_size, dim] for "plain"."""
    stride = key_page_bytes(page_size, dim, format, dtype)
    if format == "plain":
        return zeros(count, page_size, dim, dtype=dtype, device=device)
    return zeros(count, stride, dtype=torch.uint8, device=device)


def check_row_pages(check: Check, name: str, pages: Tensor, page_size: int, head_dim: int, rope_dim: int) -> None:
    """Fails unless `pages` is a pool of rows, in FP8 or in any float dtype."""
    check.that(page_size >= 1, f"the page size of {name} must be at least 1, got {page_size}")
    if pages.dtype != torch.uint8:
        check.tensor(name, pages, ANY_FLOATS, ("pages", page_size, head_dim))
        return
    check.that(0 <= rope_dim < head_dim, f"rope_dim must lie in [0, {head_dim}) for FP8 rows, got {rope_dim}")
    check.tensor(name, pages, (torch.uint8,), ("pages", page_bytes(page_size, head_dim, rope_dim, "fp8")))


def check_key_pages(check: Check, name: str, pages: Tensor, page_size: int, dim: int) -> None:
    """Fails unless `pages` is a pool of index keys, in FP4, FP8 or any float dtype."""
    check.that(page_size >= 1, f"the page size of {name} must be at least 1, got {page_size}")
    if pages.dtype != torch.uint8:
        check.tensor(name, pages, ANY_FLOATS, ("pages", page_size, dim))
        return
    if key_format(pages, page_size, dim) is None:
        fp8 = key_page_bytes(page_size, dim, "fp8")
        fp4 = f"{key_page_bytes(page_size, dim, 'fp4')} or " if dim % FP4_BLOCK == 0 else ""
        check.fail(f"{name} must be uint8 [pages, {fp4}{fp8}], got {describe(pages)}")
    check.tensor(name, pages, (torch.uint8,), ("pages", "bytes"))  # the device


def key_format(pages: Tensor, page_size: int, dim: int) -> str | None:
    """Format of a pool of index keys ("fp4", "fp8", "plain"), or None when its shape or dtype fits none."""
    if pages.dtype == torch.uint8:
        for format in ("fp4", "fp8"):
            fits = format == "fp8" or dim % FP4_BLOCK == 0
            if fits and pages.dim() == 2 and pages.shape[1] == key_page_bytes(page_size, dim, format):
                return format
        return None
    plain = pages.is_floating_point() and pages.dim() == 3 and pages.shape[1:] == (page_size, dim)
    return "plain" if plain else None


def owners(op: str, sequence: Tensor, table: Tensor) -> list[int]:
    """The sequences that rows belong to, ascending. RuntimeError where one is not a row of the table."""
    found: list[int] = torch.unique(sequence).tolist()
    if found and (found[0] < 0 or found[-1] >= table.shape[0]):
        wrong = found[0] if found[0] < 0 else found[-1]
        raise RuntimeError(f"{op}: sequence must lie in [0, {table.shape[0]}), the rows of the table, got {wrong}")
    return found


def locate(table: Tensor, sequence: Tensor, entry: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(page, offset) int64 of each entry; page -1 where the entry is negative, past the table, or not stored.

    Args:
        table: int32 [sequences, blocks], physical page of each block of `page_size` entries, -1 = not stored.
        sequence: integer [...], broadcastable to entry.
        entry: integer [...].
    """
    entry = entry.long()
    block = entry.div(page_size, rounding_mode="floor")
    stored = (entry >= 0) & (block < table.shape[1])
    if table.numel() == 0:
        return torch.full_like(entry, -1), torch.zeros_like(entry)
    page = table[sequence.long().expand_as(entry), block.clamp(0, table.shape[1] - 1)].long()
    return torch.where(stored, page, -1), torch.where(stored, entry % page_size, 0)


def count_visible(lengths: Tensor, table: Tensor, page_size: int) -> int:
    """Entries that any row of a sequence can see: the greatest of `lengths`, as far as the table reaches."""
    return min(max(int(lengths.max()), 0), table.shape[1] * page_size)


def _byte_planes(pages: Tensor, page_size: int, value_bytes: int, scale_bytes: int) -> tuple[Tensor, Tensor]:
    """Views [pages, page_size, bytes] of the values and of the scales of byte pages."""
    scales_at = page_size * value_bytes
    values = pages[:, :scales_at].unflatten(1, (page_size, value_bytes))
    scales = pages[:, scales_at : scales_at + page_size * scale_bytes].unflatten(1, (page_size, scale_bytes))
    return values, scales


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def write_rows(pages: Tensor, rows: Tensor, page: Tensor, offset: Tensor, page_size: int, rope_dim: int) -> None:
    """Store rows [n, head_dim] at (page, offset), integer [n] each, in place.

    A uint8 pool quantises the dims before rope in blocks of 64 and casts the rope dims to bfloat16; a plain pool
    casts to its dtype. A row whose page is negative is skipped. Which of two rows with one address wins is undefined.
    """
    head_dim = rows.shape[-1]
    keep = page >= 0
    rows, page, offset = rows[keep], page[keep].long(), offset[keep].long()
    if len(rows) == 0:
        return
    if pages.dtype != torch.uint8:
        pages[page, offset] = rows.to(pages.dtype)
        return
    nope = head_dim - rope_dim
    values, scales = _byte_planes(pages, page_size, row_bytes(head_dim, rope_dim), row_scale_bytes(head_dim, rope_dim))
    codes, exponents = quantize_fp8_reference(rows[:, :nope], ROW_BLOCK)
    values[page, offset] = torch.cat((_bytes(codes), _bytes(rows[:, nope:].to(torch.bfloat16))), dim=1)
    scales[:, :, : exponents.shape[1]][page, offset] = _bytes(exponents)


def read_rows(
    pages: Tensor,
    page: Tensor,
    offset: Tensor,
    page_size: int,
    head_dim: int,
    rope_dim: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows [..., head_dim] at (page, offset), integer [...] each; zeros where the page is negative.

    `dtype` defaults to the pool's own, float32 for FP8 pages (an e4m3 code times a power of two is exact in float32
    and in bfloat16). Differentiable with respect to a plain pool.
    """
    stored = page >= 0
    if dtype is None:
        dtype = torch.float32 if pages.dtype == torch.uint8 else pages.dtype
    if pages.shape[0] == 0 or page.numel() == 0:
        return torch.zeros(*page.shape, head_dim, dtype=dtype, device=pages.device)
    page, offset = page.long().clamp_min(0), offset.long()
    if pages.dtype != torch.uint8:
        rows = pages[page, offset].to(dtype)
    else:
        nope = head_dim - rope_dim
        values, scales = _byte_planes(
            pages, page_size, row_bytes(head_dim, rope_dim), row_scale_bytes(head_dim, rope_dim)
        )
        stored_bytes = values[page, offset]
        blocks = ceil_div(nope, ROW_BLOCK)
        codes = stored_bytes[..., :nope].contiguous().view(torch.float8_e4m3fn)
        exponents = scales[:, :, :blocks][page, offset].view(torch.float8_e8m0fnu)
        rope = stored_bytes[..., nope:].contiguous().view(torch.bfloat16)
        rows = torch.cat(
            (dequantize_fp8_reference(codes, exponents, ROW_BLOCK, torch.float32), rope.float()), dim=-1
        ).to(dtype)
    return torch.where(stored.unsqueeze(-1), rows, 0)


def _stored_format(pages: Tensor, page_size: int, dim: int) -> str:
    format = key_format(pages, page_size, dim)
    if format is None:
        raise ValueError(f"page layout: {describe(pages)} holds no pages of {page_size} index keys of {dim}")
    return format


def write_keys(pages: Tensor, keys: Tensor, page: Tensor, offset: Tensor, page_size: int) -> None:
    """Store index keys [n, dim] at (page, offset), integer [n] each, in place, quantised as the pool's format says.

    A key whose page is negative is skipped.
    """
    keep = page >= 0
    keys, page, offset = keys[keep], page[keep].long(), offset[keep].long()
    dim = keys.shape[-1]
    format = _stored_format(pages, page_size, dim)
    if len(keys) == 0:
        return
    if format == "plain":
        pages[page, offset] = keys.to(pages.dtype)
    elif format == "fp8":
        values, scales = _byte_planes(pages, page_size, dim, 4)
        codes, exponents = quantize_fp8_reference(keys, dim)
        values[page, offset] = _bytes(codes)
        scales[page, offset] = _bytes(exponents.float())
    else:
        values, scales = _byte_planes(pages, page_size, dim // 2, dim // FP4_BLOCK)
        codes, exponents = quantize_fp4_reference(keys, FP4_BLOCK)
        values[page, offset] = _bytes(codes)
        scales[page, offset] = _bytes(exponents)


def read_keys(
    pages: Tensor, page: Tensor, offset: Tensor, page_size: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Index keys [..., dim] at (page, offset), integer [...] each; zeros where the page is negative.

    `dtype` defaults to the pool's own, float32 for byte pages.
    """
    format = _stored_format(pages, page_size, dim)
    stored = page >= 0
    if dtype is None:
        dtype = pages.dtype if format == "plain" else torch.float32
    if pages.shape[0] == 0 or page.numel() == 0:
        return torch.zeros(*page.shape, dim, dtype=dtype, device=pages.device)
    page, offset = page.long().clamp_min(0), offset.long()
    if format == "plain":
        keys = pages[page, offset].to(dtype)
    elif format == "fp8":
        values, scales = _byte_planes(pages, page_size, dim, 4)
        codes = values[page, offset].view(torch.float8_e4m3fn).float()
        keys = (codes * scales[page, offset].view(torch.float32)).to(dtype)
    else:
        values, scales = _byte_planes(pages, page_size, dim // 2, dim // FP4_BLOCK)
        exponents = scales[page, offset].view(torch.float8_e8m0fnu)
        keys = dequantize_fp4_reference(values[page, offset], exponents, FP4_BLOCK, torch.float32).to(dtype)
    return torch.where(stored.unsqueeze(-1), keys, 0)
