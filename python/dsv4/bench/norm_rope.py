"""Norm, rotation, pooling and the stores into the cache against eager torch that writes bfloat16 pages, and entries
without a cache against eager torch.

`context` counts rows at once, the first of a sequence. These ops are bound by bytes: each input once, and what is
stored. The check of a store reads the pages back, and holds them against unquantised float64; the limit is twice the
error of eager torch with the same quantiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.pages import ratio_of, rows_of, shuffled_table
from dsv4.cache import BLOCK, entries_per_page
from dsv4.model.config import Config
from dsv4.ops.layout import ROW_BLOCK, allocate_pages, locate, row_bytes, row_scale_bytes

#: Ops of this family, and the rows at once unless told otherwise.
OPS = ("query_norm_rope", "store_window", "compress", "compress_entries")
CONTEXTS = (4096,)
QUICK_CONTEXTS = (256,)

_MOST_ROWS = 4096
_CHECKED_ROWS = 64


def eager_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """RMS norm over the last dim, in the dtype of x."""
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return x if weight is None else x * weight


def eager_rope(x: Tensor, rope: Tensor, inverse: bool = False) -> Tensor:
    """The rotation of the last pairs of the last dim, in the dtype of x; a row of rope for each of x."""
    rope = rope if x.dim() == 2 else rope.unsqueeze(1)
    cos, sin = rope.to(x.dtype).unbind(-1)
    if inverse:
        sin = -sin
    a, b = x[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((x[..., : -turned.shape[-1]], turned), -1)


def eager_norm_rope(x: Tensor, weight: Tensor | None, rope: Tensor) -> Tensor:
    return eager_rope(eager_norm(x, weight), rope)


def eager_entries(kv: Tensor, gate: Tensor, ape: Tensor, weight: Tensor, rope: Tensor) -> Tensor:
    """Entries of a sequence from position 0, [tokens // ratio, head_dim] in weight's dtype; `rope` of each entry."""
    ratio, head_dim = len(ape), len(weight)
    kv, gate = (x[: len(x) // ratio * ratio].unflatten(0, (-1, ratio)) for x in (kv, gate))
    gate = gate + ape
    if kv.shape[2] == 2 * head_dim:
        kv, gate = (
            torch.cat(
                (torch.cat((x.new_full((1, ratio, head_dim), first), x[:-1, :, :head_dim])), x[..., head_dim:]), 1
            )
            for x, first in ((kv, 0.0), (gate, float("-inf")))
        )
    return eager_norm_rope((kv * gate.softmax(1)).sum(1).to(weight.dtype), weight, rope)


def _quantised(rows: Tensor, rope_dim: int) -> Tensor:
    """bfloat16 rows as FP8 pages hold them."""
    rows = rows.bfloat16()
    nope = rows.shape[1] - rope_dim
    return torch.cat((ops.fp8_round_trip(rows[:, :nope].contiguous(), ROW_BLOCK), rows[:, nope:]), 1)


def rope_of(config: Config, position: Tensor) -> Tensor:
    return ops.rope_rows(position, ops.rope_frequencies(config.qk_rope_head_dim, config.rope_theta))


def _query_case(name: str, config: Config, tokens: int, device: torch.device) -> Case:
    heads, head_dim = config.num_attention_heads, config.head_dim
    query = torch.randn(tokens, heads, head_dim).bfloat16().to(device)
    rope = rope_of(config, torch.arange(tokens)).to(device)

    def compare() -> list[Comparison]:
        some, turns = query[:_CHECKED_ROWS], rope[:_CHECKED_ROWS]
        exact = eager_norm_rope(some.double(), None, turns.double())
        result = ops.query_norm_rope(query, rope)[:_CHECKED_ROWS]
        return [Comparison(result, eager_norm_rope(some, None, turns), exact)]

    return Case(
        "query_norm_rope", f"{name} rows={tokens} heads={heads} head_dim={head_dim} bf16",
        lambda: ops.query_norm_rope(query, rope), "eager torch bf16", lambda: eager_norm_rope(query, None, rope),
        compare, 4.0 * query.numel(), 2.0 * query.nbytes + rope.nbytes, "none",
    )  # fmt: skip


def _store_case(
    op: str,
    shape: str,
    config: Config,
    page_size: int,
    tokens: int,
    store: Callable[[Tensor, Tensor], None],
    rows: Callable[[torch.dtype], Tensor],
    nbytes: float,
    device: torch.device,
) -> Case:
    """A store of `tokens` rows or entries: `store(pages, table)`; `rows(dtype)` in eager torch."""
    blocks, rope_dim = -(-tokens // page_size), config.qk_rope_head_dim
    table = shuffled_table(max(blocks, 1)).to(device)
    size = table.shape[1], page_size, config.head_dim, rope_dim
    pages = allocate_pages(*size, "fp8", device=device)
    plain = allocate_pages(*size, "plain", device=device)
    page, offset = locate(table, table.new_zeros(()), torch.arange(tokens, device=device), page_size)
    narrow = torch.bfloat16 if op == "store_window" else torch.float32  # the dtype of the inputs

    def run_baseline() -> None:
        plain[page, offset] = rows(narrow).bfloat16()

    def compare() -> list[Comparison]:
        store(pages, table)
        result = rows_of(config, pages, table, 0, tokens, page_size)
        return [Comparison(result, _quantised(rows(narrow), rope_dim), rows(torch.float64))]

    stored = row_bytes(config.head_dim, rope_dim) + row_scale_bytes(config.head_dim, rope_dim)
    return Case(
        op, f"{shape} head_dim={config.head_dim} fp8", lambda: store(pages, table), "eager torch bf16", run_baseline,
        compare, 0.0, nbytes + tokens * stored, "none",
    )  # fmt: skip


def _window_case(name: str, config: Config, tokens: int, device: torch.device) -> Case:
    kv = torch.randn(tokens, config.head_dim).bfloat16().to(device)
    weight = (torch.rand(config.head_dim) + 0.5).bfloat16().to(device)
    position = torch.arange(tokens, dtype=torch.int32, device=device)
    rope, sequence = rope_of(config, position.cpu()).to(device), torch.zeros_like(position)

    def store(pages: Tensor, table: Tensor) -> None:
        ops.store_window(kv, weight, rope, pages, table, sequence, position, page_size=BLOCK)

    def rows(dtype: torch.dtype) -> Tensor:
        return eager_norm_rope(kv.to(dtype), weight.to(dtype), rope)

    return _store_case(
        "store_window", f"{name} rows={tokens}", config, BLOCK, tokens, store, rows, kv.nbytes + rope.nbytes, device
    )


def _compress_case(op: str, name: str, config: Config, kind: str, tokens: int, device: torch.device) -> Case:
    ratio, sets = ratio_of(config, kind), 2 if kind == "csa" else 1
    width, page_size = sets * config.head_dim, entries_per_page(ratio)
    kv, gate = (torch.randn(tokens, width).to(device) for _ in range(2))
    ape = torch.randn(ratio, width).to(device)
    weight = (torch.rand(config.head_dim) + 0.5).bfloat16().to(device)
    position = torch.arange(tokens, dtype=torch.int32, device=device)
    rope = rope_of(config, position.cpu() // ratio * ratio).to(device)
    state = torch.zeros(1, sets * ratio, 2, width, device=device)
    sequence, entries = torch.zeros_like(position), tokens // ratio
    starts = rope[: entries * ratio : ratio]

    def store(pages: Tensor, table: Tensor) -> None:
        ops.compress(
            kv, gate, ape, weight, rope, state, pages, table, sequence, position, ratio, page_size=page_size
        )  # fmt: skip

    def rows(dtype: torch.dtype) -> Tensor:
        return eager_entries(*(x.to(dtype) for x in (kv, gate, ape, weight, starts)))

    def entries_of(dtype: torch.dtype) -> Tensor:
        scale = weight.to(dtype) if dtype == torch.float64 else weight
        return eager_entries(kv.to(dtype), gate.to(dtype), ape.to(dtype), scale, starts)

    nbytes = kv.nbytes + gate.nbytes + ape.nbytes + starts.nbytes
    text = f"{name} {kind} rows={tokens} ratio={ratio}"
    if op == "compress":
        return _store_case(op, text, config, page_size, entries, store, rows, nbytes + state.nbytes, device)

    def make() -> Tensor:
        return ops.compress_entries(kv, gate, ape, weight, starts, ratio)

    def compare() -> list[Comparison]:
        return [Comparison(make(), entries_of(torch.float32), entries_of(torch.float64))]

    return Case(
        op, f"{text} head_dim={config.head_dim} bf16", make, "eager torch bf16", lambda: entries_of(torch.float32),
        compare, 0.0, nbytes + 2.0 * entries * config.head_dim, "none",
    )  # fmt: skip


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, on `context` rows at once (4096 at most: prompts come in chunks)."""
    torch.manual_seed(0)
    config, tokens = Config.preset(shape), min(context, _MOST_ROWS)
    if op == "query_norm_rope":
        yield _query_case(shape, config, tokens, device)
    elif op == "store_window":
        yield _window_case(shape, config, tokens, device)
    else:
        for kind in ("csa", "hca"):
            if tokens >= ratio_of(config, kind):  # else there is no entry to store
                yield _compress_case(op, shape, config, kind, tokens, device)
