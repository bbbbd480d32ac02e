"""Calls of sparse_attention, its definition in loops, and its implementations."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from dsv4 import _library
from dsv4.ops import sparse_attention
from dsv4.testing import implementation_cases, max_isa, ulp_distance

NAN = float("nan")
_NAMES = list(inspect.signature(sparse_attention).parameters)


def make(
    runs: tuple[tuple[int, int], ...] = ((250, 9), (0, 3), (61, 5)),
    heads: int = 3,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float64,
    source: str = "indices",
    window: int = 7,
    window_page_size: int = 16,
    page_size: int = 4,
    ratio: int = 4,
    k: int = 6,
    rope_dim: int | None = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """A call with one sequence for each (first position, rows) of `runs`. Slots that no row reads hold NaN.

    `source`: "window", "indices" (some -1, beyond the length, or far out of range) or "lengths".
    """
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sequence = torch.cat([torch.full((n,), s) for s, (_, n) in enumerate(runs)]).int()
    position = torch.cat([torch.arange(start, start + n) for start, n in runs]).int()
    tokens, sequences = len(position), len(runs)
    last = max(start + n for start, n in runs)
    arguments: dict[str, Any] = {
        "query": torch.randn(tokens, heads, head_dim, generator=g, dtype=wide).to(dtype),
        "compressed_pages": None,
        "compressed_table": None,
        "sequence": sequence,
        "position": position,
        "indices": None,
        "lengths": None,
        "sink": torch.randn(heads, generator=g, dtype=wide),
        "rope": None,
        "window": window,
        "scale": head_dim**-0.5,
        "window_page_size": window_page_size,
        "page_size": page_size,
        "rope_dim": None,
    }
    if rope_dim is not None:
        arguments["rope"] = torch.randn(tokens, rope_dim // 2, 2, generator=g, dtype=wide)

    def pool(size: int, entries: int) -> tuple[Tensor, Tensor]:
        blocks = entries // size + 1
        order = torch.randperm(sequences * blocks + 2, generator=g)[: sequences * blocks]
        pages = torch.full((sequences * blocks + 2, size, head_dim), NAN, dtype=dtype)
        return pages, order.int().view(sequences, blocks)

    def fill(pages: Tensor, table: Tensor, row: int, entry: int) -> None:
        size = pages.shape[1]
        pages[table[sequence[row], entry // size], entry % size] = torch.randn(head_dim, generator=g).to(dtype)

    pages, table = pool(window_page_size, last)
    for row in range(tokens):
        for p in range(max(int(position[row]) - window + 1, 0), int(position[row]) + 1):
            fill(pages, table, row, p)
    arguments["window_pages"], arguments["window_table"] = pages, table
    if source == "window":
        return arguments
    lengths = (position + 1) // ratio
    pages, table = pool(page_size, last // ratio + 1)
    arguments.update(compressed_pages=pages, compressed_table=table, lengths=lengths)
    wanted = [torch.arange(int(n)) for n in lengths]
    if source == "indices":
        indices = torch.full((tokens, k), -1, dtype=torch.int32)
        for row, n in enumerate(lengths.tolist()):
            wanted[row] = torch.randperm(n, generator=g)[: k - 2]
            bad = torch.tensor([n, -1, 2**31 - 1, -(2**31), n + 1, -2])[torch.randperm(6, generator=g)]
            mixed = torch.cat((wanted[row], bad, bad.new_full((k,), -1)))[:k]
            indices[row] = mixed[torch.randperm(k, generator=g)].int()
        arguments["indices"] = indices
    for row in range(tokens):
        for entry in wanted[row].tolist():
            fill(pages, table, row, entry)
    return arguments


def keys_of(a: dict[str, Any], row: int) -> list[Tensor]:
    """The keys of a row by the definition, one lookup after the other."""

    def look_up(pages: Tensor, table: Tensor, size: int, entry: int) -> list[Tensor]:
        block = entry // size
        page = int(table[int(a["sequence"][row]), block]) if block < table.shape[1] else -1
        return [pages[page, entry % size].double()] if page >= 0 else []

    at = int(a["position"][row])
    found = []
    for p in range(max(at - a["window"] + 1, 0), at + 1):
        found += look_up(a["window_pages"], a["window_table"], a["window_page_size"], p)
    if a["compressed_pages"] is not None:
        length = int(a["lengths"][row])
        listed = range(length) if a["indices"] is None else a["indices"][row].tolist()
        for entry in listed:
            if 0 <= entry < length:
                found += look_up(a["compressed_pages"], a["compressed_table"], a["page_size"], entry)
    return found


def brute_force(a: dict[str, Any], rounded: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Loops over rows and heads in float64. `rounded`: dtype of the numerators and of the result before rotation."""
    tokens, heads, head_dim = a["query"].shape
    out = torch.zeros(tokens, heads, head_dim, dtype=torch.float64)
    lse = torch.full((tokens, heads), math.inf, dtype=torch.float64)

    def cut(x: Tensor) -> Tensor:
        return x if rounded is None else x.to(rounded).double()

    for row in range(tokens):
        found = keys_of(a, row)
        if not found:
            continue
        keys = torch.stack(found)
        for head in range(heads):
            scores = keys @ a["query"][row, head].double() * a["scale"]
            top = scores.max()
            numerators = (scores - top).exp()
            lse[row, head] = top + numerators.sum().log()
            with_sink = numerators.sum() + (a["sink"][head].double() - top).exp()
            out[row, head] = cut((cut(numerators).unsqueeze(1) * keys).sum(0) / with_sink)
    if a["rope"] is not None:
        width = 2 * a["rope"].shape[1]
        turn = torch.view_as_complex(a["rope"].double().contiguous()).conj().unsqueeze(1)
        pairs = torch.view_as_complex(out[..., -width:].unflatten(-1, (-1, 2)).contiguous())
        out[..., -width:] = torch.view_as_real(pairs * turn).flatten(-2)
    return out, lse


class Attend:
    """One implementation of the op."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.exact = name == "reference"  # sums in float64; kernels sum in float32
        self.wide = torch.float64 if self.exact else torch.float32

    def make(self, **case: Any) -> dict[str, Any]:
        return make(**{"dtype": self.wide, **case})

    def __call__(self, a: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.run(**a)

    def run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.exact:
            return torch.ops.dsv4._sparse_attention_reference(*args, **kwargs)
        with max_isa(self.name):
            result = sparse_attention(*args, **kwargs)
        a = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        # The tiles multiply bfloat16; what is wider goes to the vectors.
        wide = any(
            a[n] is not None and a[n].dtype == torch.float32 for n in ("query", "window_pages", "compressed_pages")
        )
        name = "avx512" if self.name == "amx" and wide else self.name
        assert _library.last_implementation("sparse_attention") == name
        return result


KERNELS = [case for case in implementation_cases("sparse_attention") if "reference" not in case.values]


def assert_matches(attend: Attend, a: dict[str, Any]) -> None:
    out, lse = attend(a)
    dtype = a["query"].dtype
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, expected_lse = brute_force(a, dtype if dtype.itemsize == 2 else None)
    if dtype == torch.float64:
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-13, atol=1e-13)
        return
    if not attend.exact:
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
        size = float(expected.abs().max()) if expected.numel() else 0.0
        close = 1e-6 if dtype == torch.float32 else 2.0**-7  # one step
        torch.testing.assert_close(out.double(), expected, rtol=close, atol=(1e-6 if close == 1e-6 else 1e-4) * size)
        if dtype == torch.bfloat16 and out.numel() >= 1000:
            assert (out != expected.to(dtype)).double().mean() < 5e-3
        return
    assert ulp_distance(lse, expected_lse.float()).max() <= 1
    if dtype == torch.float32:  # rounded before and after the rotation
        torch.testing.assert_close(out, expected.float(), rtol=2e-7, atol=2e-7 * float(expected.abs().max()))
    else:
        assert ulp_distance(out, expected.to(dtype)).max() <= 1
        assert (out != expected.to(dtype)).double().mean() < 1e-3
