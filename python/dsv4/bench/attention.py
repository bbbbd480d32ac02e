"""sparse_attention on FP8 pages against gather, product and softmax in eager torch on bfloat16 rows.

One sequence of `context` tokens. decode: its last token; prefill: its last rows. csa: entries as an indexer picks them
(here at random, which is the worst for a cache), hca: all entries. FLOPs: 4 head_dim a head and key; bytes: every
stored row that is touched, once, and queries, outputs, indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.pages import prefill_rows, row_pages, rows_of, shuffled_table, spread
from dsv4.cache import BLOCK, entries_per_page
from dsv4.model.config import Config
from dsv4.ops.layout import row_bytes, row_scale_bytes

#: Ops of this family, and the lengths of the sequence unless told otherwise.
OPS = ("sparse_attention",)
CONTEXTS = (4096, 65536, 1 << 20)
QUICK_CONTEXTS = (1024,)

_HCA_RATIO = 128
_CHECKED_ROWS = 16
# Rows that eager torch takes at once: enough for its products, few enough for its gathered keys.
_EAGER_ROWS = 64


@dataclass(frozen=True)
class _Plain:
    """What eager torch works on: plain rows in the order of their positions and entries."""

    query: Tensor  # [tokens, heads, head_dim]
    raw: Tensor  # [positions, head_dim], from position `first` on
    first: int
    entries: Tensor  # [entries, head_dim]
    position: Tensor
    indices: Tensor | None
    lengths: Tensor
    sink: Tensor
    rope: Tensor
    window: int

    def rows(self, index: Tensor | slice) -> _Plain:
        some = None if self.indices is None else self.indices[index]
        values = (value[index] for value in (self.query, self.position, self.lengths, self.rope))
        query, position, lengths, rope = values
        return _Plain(
            query, self.raw, self.first, self.entries, position, some, lengths, self.sink, rope, self.window
        )  # fmt: skip

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> _Plain:
        """Everything moved; the floating tensors cast."""

        def move(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        return _Plain(**{name: move(value) for name, value in vars(self).items()})  # type: ignore[arg-type]


def eager_attention(data: _Plain) -> Tensor:
    """sparse_attention, [tokens, heads, head_dim]."""
    parts = [_eager_block(data.rows(slice(at, at + _EAGER_ROWS))) for at in range(0, len(data.query), _EAGER_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _eager_block(data: _Plain) -> Tensor:
    keys, valid = _shared_keys(data) if data.indices is None else _listed_keys(data, data.indices)
    if keys.dim() == 2:
        scores = (data.query.flatten(0, 1) @ keys.t()).unflatten(0, data.query.shape[:2])
    else:
        scores = data.query @ keys.transpose(1, 2)
    scores = (scores * data.query.shape[2] ** -0.5).masked_fill_(~valid.unsqueeze(1), float("-inf"))
    sink = data.sink.to(scores.dtype).view(1, -1, 1).expand(len(scores), -1, 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    out = (weights.flatten(0, 1) @ keys).view_as(data.query) if keys.dim() == 2 else weights @ keys
    cos, sin = data.rope.to(out.dtype).unsqueeze(1).unbind(-1)
    a, b = out[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2)
    return torch.cat((out[..., : -turned.shape[-1]], turned), -1)


def _shared_keys(data: _Plain) -> tuple[Tensor, Tensor]:
    """Keys [keys, head_dim] that all rows share, and which of them a row sees [tokens, keys]."""
    low, high = (int(value) for value in data.position.aminmax())
    low = max(low - data.window + 1, 0)
    entries = data.entries[: int(data.lengths.max())]
    raw = torch.arange(low, high + 1, device=data.position.device)
    at = data.position.unsqueeze(1)
    in_window = (raw <= at) & (raw > at - data.window)
    visible = torch.arange(len(entries), device=raw.device) < data.lengths.unsqueeze(1)
    keys = torch.cat((data.raw[low - data.first : high + 1 - data.first], entries))
    return keys, torch.cat((in_window, visible), 1)


def _listed_keys(data: _Plain, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [tokens, keys, head_dim] of each row, and which of them count."""
    raw = data.position.unsqueeze(1) - torch.arange(data.window, device=data.position.device)
    keys = torch.cat((data.raw[(raw - data.first).clamp_min(0)], data.entries[indices.clamp_min(0)]), 1)
    return keys, torch.cat((raw >= 0, indices >= 0), 1)


def _draw_indices(lengths: Tensor, k: int) -> Tensor:
    """int32 [tokens, k]: of each row's visible entries any k, ascending, then -1."""
    indices = torch.full((len(lengths), k), -1, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        chosen = torch.randperm(length, dtype=torch.int32)[:k].sort().values
        indices[row, : len(chosen)] = chosen
    return indices


def _case(name: str, config: Config, context: int, kind: str, rows: int, device: torch.device) -> Case:
    torch.manual_seed(0)
    ratio = config.csa_ratio if kind == "csa" else _HCA_RATIO
    entries, page_size, blocks = context // ratio, entries_per_page(ratio), -(-context // BLOCK)
    position = torch.arange(context - rows, context, dtype=torch.int32)
    lengths = ((position + 1) // ratio).int()
    first = max(context - rows - config.sliding_window + 1, 0)
    raw_table, table = shuffled_table(blocks, first // BLOCK), shuffled_table(blocks)
    raw_pages = row_pages(config, blocks - first // BLOCK, BLOCK)
    pages = row_pages(config, blocks, page_size)
    pairs = config.qk_rope_head_dim // 2
    plain = _Plain(
        query=torch.randn(rows, config.num_attention_heads, config.head_dim).bfloat16(),
        raw=rows_of(config, raw_pages, raw_table, first, context, BLOCK),
        first=first,
        entries=rows_of(config, pages, table, 0, entries, page_size),
        position=position,
        indices=_draw_indices(lengths, config.index_topk) if kind == "csa" else None,
        lengths=lengths,
        sink=torch.randn(config.num_attention_heads),
        rope=ops.rope_rows(position, ops.rope_frequencies(2 * pairs, config.compress_rope_theta)),
        window=config.sliding_window,
    ).to(device)
    raw_pages, raw_table, pages, table = (value.to(device) for value in (raw_pages, raw_table, pages, table))
    sequence = torch.zeros_like(plain.position)

    def run() -> Tensor:
        return ops.sparse_attention(
            plain.query, raw_pages, raw_table, pages, table, sequence, plain.position, plain.indices, plain.lengths,
            plain.sink, plain.rope, plain.window, config.head_dim**-0.5, BLOCK, page_size,
        )[0]  # fmt: skip

    def compare() -> list[Comparison]:
        index = spread(rows, _CHECKED_ROWS).to(device)
        some = plain.rows(index)
        return [Comparison(run()[index], eager_attention(some), eager_attention(some.to(dtype=torch.float64)))]

    keys = int((position + 1).clamp_max(plain.window).sum())
    if plain.indices is None:
        keys, touched = keys + int(lengths.sum()), entries
    else:
        keys, touched = keys + int((plain.indices >= 0).sum()), int(plain.indices[plain.indices >= 0].unique().numel())
    head_bytes = row_bytes(config.head_dim, 2 * pairs) + row_scale_bytes(config.head_dim, 2 * pairs)
    nbytes = (context - first + touched) * head_bytes + 2 * plain.query.nbytes + plain.rope.nbytes
    nbytes += 0 if plain.indices is None else plain.indices.nbytes
    step = "decode" if rows == 1 else "prefill"
    shape = f"{name} {kind} {step} context={context} rows={rows} heads={config.num_attention_heads}"
    return Case(
        "sparse_attention", f"{shape} head_dim={config.head_dim} fp8", run, "eager torch bf16",
        lambda: eager_attention(plain), compare, 4.0 * config.head_dim * config.num_attention_heads * keys, nbytes,
        "bfloat16",
    )  # fmt: skip


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, in a sequence of `context` tokens: decode and prefill of both kinds."""
    config = Config.preset(shape)
    flops = 4.0 * config.head_dim * config.num_attention_heads
    for kind, entries in (("csa", config.index_topk), ("hca", context // _HCA_RATIO)):
        yield _case(shape, config, context, kind, 1, device)
        rows = prefill_rows(context, flops * (config.sliding_window + entries))
        if rows > 1:
            yield _case(shape, config, context, kind, rows, device)
