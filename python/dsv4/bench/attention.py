"""sparse_attention on FP8 pages against gather, product and softmax in eager torch on bfloat16 rows.

Sequences of `context` tokens. decode: the last token of one, and of several at once; prefill: the last rows of one.
csa: entries as an indexer picks them (here at random, which is the worst for a cache), hca: all entries. FLOPs: 4
head_dim a head and key; bytes: every stored row that is touched, once, and queries, outputs, indices.

A second line of each shape has transformers' attention between its projections as baseline (bench/transformers_cores).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.norm_rope import eager_rope
from dsv4.bench.pages import batch, prefill_rows, ratio_of, row_pages, rows_of, shuffled_table, spread, steps
from dsv4.bench.transformers_cores import against_transformers, attention_bytes, prepare_attention
from dsv4.cache import BLOCK, entries_per_page
from dsv4.model.config import Config
from dsv4.ops.layout import row_bytes, row_scale_bytes

#: Ops of this family, and the lengths of the sequence unless told otherwise.
OPS = ("sparse_attention",)
CONTEXTS = (4096, 65536, 1 << 20)
QUICK_CONTEXTS = (1024,)

_CHECKED_ROWS = 16
# Rows that eager torch takes at once: enough for its products, few enough for its gathered keys.
_EAGER_ROWS = 64


@dataclass(frozen=True)
class Plain:
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

    def rows(self, index: Tensor | slice) -> Plain:
        some = None if self.indices is None else self.indices[index]
        values = (value[index] for value in (self.query, self.position, self.lengths, self.rope))
        query, position, lengths, rope = values
        return Plain(
            query, self.raw, self.first, self.entries, position, some, lengths, self.sink, rope, self.window
        )  # fmt: skip

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Plain:
        """Everything moved; the floating tensors cast."""

        def move(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        return Plain(**{name: move(value) for name, value in vars(self).items()})  # type: ignore[arg-type]


def eager_attention(data: Plain) -> Tensor:
    """sparse_attention, [tokens, heads, head_dim]."""
    parts = [_eager_block(data.rows(slice(at, at + _EAGER_ROWS))) for at in range(0, len(data.query), _EAGER_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _eager_block(data: Plain) -> Tensor:
    keys, valid = _shared_keys(data) if data.indices is None else _listed_keys(data, data.indices)
    if keys.dim() == 2:
        scores = (data.query.flatten(0, 1) @ keys.t()).unflatten(0, data.query.shape[:2])
    else:
        scores = data.query @ keys.transpose(1, 2)
    scores = (scores * data.query.shape[2] ** -0.5).masked_fill_(~valid.unsqueeze(1), float("-inf"))
    sink = data.sink.to(scores.dtype).view(1, -1, 1).expand(len(scores), -1, 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    out = (weights.flatten(0, 1) @ keys).view_as(data.query) if keys.dim() == 2 else weights @ keys
    return eager_rope(out, data.rope, inverse=True)


def _shared_keys(data: Plain) -> tuple[Tensor, Tensor]:
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


def _listed_keys(data: Plain, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [tokens, keys, head_dim] of each row, and which of them count."""
    raw = data.position.unsqueeze(1) - torch.arange(data.window, device=data.position.device)
    keys = torch.cat((data.raw[(raw - data.first).clamp_min(0)], data.entries[indices.clamp_min(0)]), 1)
    return keys, torch.cat((raw >= 0, indices >= 0), 1)


def draw_indices(lengths: Tensor, k: int) -> Tensor:
    """int32 [tokens, k]: of each row's visible entries any k, ascending, then -1."""
    indices = torch.full((len(lengths), k), -1, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        chosen = torch.randperm(length, dtype=torch.int32)[:k].sort().values
        indices[row, : len(chosen)] = chosen
    return indices


def _draw(
    config: Config, context: int, kind: str, rows: int, tables: tuple[Tensor, Tensor], pools: tuple[Tensor, Tensor]
) -> Plain:
    """The last `rows` rows of one sequence whose pages `tables` name, as plain rows."""
    ratio = ratio_of(config, kind)
    position = torch.arange(context - rows, context, dtype=torch.int32)
    lengths = ((position + 1) // ratio).int()
    first = max(context - rows - config.sliding_window + 1, 0)
    return Plain(
        query=torch.randn(rows, config.num_attention_heads, config.head_dim).bfloat16(),
        raw=rows_of(config, pools[0], tables[0], first, context, BLOCK),
        first=first,
        entries=rows_of(config, pools[1], tables[1], 0, context // ratio, entries_per_page(ratio)),
        position=position,
        indices=draw_indices(lengths, config.index_topk) if kind == "csa" else None,
        lengths=lengths,
        sink=torch.randn(config.num_attention_heads, generator=torch.Generator().manual_seed(1)),
        rope=ops.rope_rows(position, ops.rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta)),
        window=config.sliding_window,
    )


def count_keys(plain: Plain) -> tuple[int, int]:
    """How many keys the rows have together, and how many different entries are among them."""
    keys = int((plain.position + 1).clamp_max(plain.window).sum())
    if plain.indices is None:
        return keys + int(plain.lengths.sum()), len(plain.entries)
    chosen = plain.indices[plain.indices >= 0]
    return keys + chosen.numel(), int(chosen.unique().numel())


def _work(config: Config, context: int, plains: Sequence[Plain]) -> tuple[float, float]:
    """FLOPs, and bytes that have to move."""
    stored = row_bytes(config.head_dim, config.qk_rope_head_dim)
    stored += row_scale_bytes(config.head_dim, config.qk_rope_head_dim)
    keys, nbytes = 0, 0
    for plain in plains:
        own, touched = count_keys(plain)
        keys += own
        nbytes += (context - plain.first + touched) * stored + 2 * plain.query.nbytes + plain.rope.nbytes
        nbytes += 0 if plain.indices is None else plain.indices.nbytes
    return 4.0 * config.head_dim * config.num_attention_heads * keys, nbytes


def _cases(
    name: str, config: Config, context: int, kind: str, step: int | None, device: torch.device
) -> Iterator[Case]:
    """Against eager torch, then against transformers. `step`: as `steps` gives it."""
    torch.manual_seed(0)
    ratio = ratio_of(config, kind)
    page_size, blocks = entries_per_page(ratio), -(-context // BLOCK)
    entries = config.index_topk if kind == "csa" else context // ratio
    flops = 4.0 * config.head_dim * config.num_attention_heads * (config.sliding_window + entries)
    rows = prefill_rows(context, flops) if step is None else 1
    sequences = batch(step, context // ratio * config.head_dim * 4)
    if sequences == 0 or (step is None and rows == 1) or (kind == "csa" and context < ratio):  # no entry to select yet
        return
    first_block = max(context - rows - config.sliding_window + 1, 0) // BLOCK
    raw_table, table = (shuffled_table(blocks, first, sequences, device) for first in (first_block, 0))
    raw_pages = row_pages(config, sequences * (blocks - first_block), BLOCK, device)
    pages = row_pages(config, sequences * blocks, page_size, device)
    plains = [
        _draw(config, context, kind, rows, (raw_table[s : s + 1], table[s : s + 1]), (raw_pages, pages)).to(device)
        for s in range(sequences)
    ]
    whole = _joined(plains)
    sequence = torch.arange(sequences, dtype=torch.int32, device=device).repeat_interleave(rows)

    def run() -> Tensor:
        return ops.sparse_attention(
            whole.query, raw_pages, raw_table, pages, table, sequence, whole.position, whole.indices, whole.lengths,
            whole.sink, whole.rope, whole.window, config.head_dim**-0.5, BLOCK, page_size,
        )[0]  # fmt: skip

    def eager() -> list[Tensor]:
        return [eager_attention(plain) for plain in plains]

    def compare() -> list[Comparison]:
        result, found = run(), []
        for at in sorted({0, sequences - 1}):
            index = spread(rows, _CHECKED_ROWS).to(device)
            some = plains[at].rows(index)
            exact = eager_attention(some.to(dtype=torch.float64))
            found.append(Comparison(result[at * rows + index], eager_attention(some), exact))
        return found

    shape = f"{name} {kind} {'prefill' if step is None else 'decode'} context={context} rows={rows * sequences}"
    batched = f" sequences={sequences}" if sequences > 1 else ""
    case = Case(
        "sparse_attention", f"{shape}{batched} heads={config.num_attention_heads} head_dim={config.head_dim} fp8", run,
        "eager torch bf16", eager, compare, *_work(config, context, plains), "bfloat16",
    )  # fmt: skip
    yield case
    yield replace(case, **against_transformers(attention_bytes(plains), device, lambda: prepare_attention(plains)))


def _joined(plains: Sequence[Plain]) -> Plain:
    """The rows of all sequences; what each sequence has of its own stays that of the first."""
    if len(plains) == 1:
        return plains[0]
    query, position, lengths, rope = (
        torch.cat([getattr(plain, name) for plain in plains]) for name in ("query", "position", "lengths", "rope")
    )
    listed = [plain.indices for plain in plains if plain.indices is not None]
    indices = torch.cat(listed) if listed else None
    return replace(plains[0], query=query, position=position, lengths=lengths, rope=rope, indices=indices)


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, in sequences of `context` tokens: decode, a batch of it, and prefill of
    both kinds."""
    config = Config.preset(shape)
    for kind in ("csa", "hca"):
        for step in steps(device):
            yield from _cases(shape, config, context, kind, step, device)
