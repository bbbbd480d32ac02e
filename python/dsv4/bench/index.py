"""index_topk on FP4 pages against product, ReLU, weighted sum and topk in eager torch on bfloat16 keys.

Sequences of `context` tokens; decode: the last token of one, and of several at once; prefill: the last rows of one.
FLOPs: 2 dim + 2 a head and visible key; bytes: every stored key once, and queries, weights, indices. A second line of
each shape has transformers' scorer and top-k as baseline (bench/transformers_cores).

The check holds the scores of what was chosen, in float64, against the best there are; the limit is what the same maths
in float32 reaches, since bfloat16 scores choose other entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.pages import batch, key_pages, keys_of, prefill_rows, shuffled_table, spread, steps
from dsv4.bench.transformers_cores import against_transformers, index_bytes, prepare_index
from dsv4.cache import BLOCK, entries_per_page
from dsv4.model.config import Config
from dsv4.ops.layout import FP4_BLOCK

#: Ops of this family, and the lengths of the sequence unless told otherwise.
OPS = ("index_topk",)
CONTEXTS = (4096, 65536, 1 << 20)
QUICK_CONTEXTS = (1024,)

_CHECKED_ROWS = 4
# Elements of the products that eager torch holds at once.
_EAGER_ELEMENTS = 1 << 26


def eager_scores(query: Tensor, weights: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    """Scores [tokens, keys], -inf where a row does not see the key."""
    products = (query.flatten(0, 1) @ keys.t()).relu_().unflatten(0, query.shape[:2])
    scores = (weights.unsqueeze(1) @ products).squeeze(1)
    if int(lengths.min()) == len(keys):
        return scores
    hidden = torch.arange(len(keys), device=keys.device) >= lengths.unsqueeze(1)
    return scores.masked_fill_(hidden, float("-inf"))


def eager_topk(query: Tensor, weights: Tensor, keys: Tensor, lengths: Tensor, k: int) -> Tensor:
    """Entries of the highest scores, [tokens, min(k, keys)] in no order that matters."""
    rows = max(1, _EAGER_ELEMENTS // max(query.shape[1] * len(keys), 1))
    parts = zip(query.split(rows), weights.split(rows), lengths.split(rows), strict=True)
    best = [eager_scores(q, w, keys, n).topk(min(k, len(keys)), sorted=False).indices for q, w, n in parts]
    return torch.cat(best)


def _taken(scores: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
    """The scores of the `count` best of the chosen entries of each row, falling, then 0; NaN where there are fewer."""
    found = torch.where(chosen >= 0, scores.gather(1, chosen.clamp_min(0).long()), float("-inf"))
    found = found.sort(1, descending=True).values
    beyond = torch.arange(chosen.shape[1], device=chosen.device) >= count.unsqueeze(1)
    return found.masked_fill(found.isneginf(), float("nan")).masked_fill(beyond, 0)


def _is_selection(chosen: Tensor, count: Tensor) -> bool:
    """Whether each row holds `count` entries in ascending order, then -1."""
    filled = torch.arange(chosen.shape[1], device=chosen.device) < count.unsqueeze(1)
    rising = (chosen[:, 1:] > chosen[:, :-1]) | ~filled[:, 1:]
    return bool(rising.all()) and bool(((chosen >= 0) == filled).all())


def _cases(name: str, config: Config, context: int, step: int | None, device: torch.device) -> Iterator[Case]:
    """Against eager torch, then against transformers. `step`: as `steps` gives it."""
    torch.manual_seed(0)
    heads, dim, ratio = config.index_n_heads, config.index_head_dim, config.csa_ratio
    entries, page_size, blocks = context // ratio, entries_per_page(ratio), -(-context // BLOCK)
    key_bytes = dim // 2 + dim // FP4_BLOCK
    rows = prefill_rows(context, 2.0 * dim * heads * entries) if step is None else 1
    sequences = batch(step, entries * (key_bytes + 2 * dim))
    if sequences == 0 or (step is None and rows == 1) or entries == 0:
        return
    pages = key_pages(config, sequences * blocks, page_size, device)
    table = shuffled_table(blocks, 0, sequences, device)
    keys = [keys_of(config, pages, row, entries, page_size) for row in table.split(1)]
    query = ops.fp4_round_trip(torch.randn(sequences * rows, heads, dim).bfloat16()).to(device)
    weights = (torch.randn(sequences * rows, heads) / heads).to(device)
    lengths = ((torch.arange(context - rows, context) + 1) // ratio).int().repeat(sequences).to(device)
    sequence = torch.arange(sequences, dtype=torch.int32, device=device).repeat_interleave(rows)
    k, narrow = config.index_topk, weights.bfloat16()

    def run() -> Tensor:
        return ops.index_topk(query, weights, pages, table, sequence, lengths, k, page_size)

    def eager() -> list[Tensor]:
        parts = zip(query.split(rows), narrow.split(rows), keys, lengths.split(rows), strict=True)
        return [eager_topk(*part, k) for part in parts]

    def compare() -> list[Comparison]:
        whole = run()
        return [_compare(whole, query, weights, keys[at], lengths, at * rows, rows, k) for at in {0, sequences - 1}]

    visible = float(lengths.sum())
    batched = f" sequences={sequences}" if sequences > 1 else ""
    shape = f"{name} {'prefill' if step is None else 'decode'} context={context} rows={rows * sequences}{batched}"
    case = Case(
        "index_topk", f"{shape} heads={heads} dim={dim} k={k} fp4", run, "eager torch bf16", eager, compare,
        (2.0 * dim + 2) * heads * visible,
        sequences * entries * key_bytes + query.nbytes + weights.nbytes + 4.0 * rows * sequences * k, "bfloat16",
    )  # fmt: skip
    yield case
    prepared = (query, narrow, keys, lengths, k)
    yield replace(case, **against_transformers(index_bytes(*prepared), device, lambda: prepare_index(*prepared)))


def _compare(
    result: Tensor, query: Tensor, weights: Tensor, keys: Tensor, lengths: Tensor, first: int, rows: int, k: int
) -> Comparison:
    """Some of the `rows` rows from `first` on, which see these keys."""
    index = first + spread(rows, _CHECKED_ROWS).to(query.device)
    q, w, visible = query[index], weights[index], lengths[index]
    scores = eager_scores(q.double(), w.double(), keys.double(), visible)
    others = eager_topk(q.float(), w, keys.float(), visible, k)
    count = visible.clamp_max(k)
    best = scores.topk(others.shape[1]).indices
    chosen = result[index]
    if not _is_selection(chosen, count):
        chosen = torch.full_like(chosen, -1)
    own, eager, exact = (_taken(scores, entry, count) for entry in (chosen[:, : best.shape[1]], others, best))
    return Comparison(own.float(), eager.float(), exact)


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, in sequences of `context` tokens: decode, a batch of it, prefill."""
    config = Config.preset(shape)
    for step in steps(device):
        yield from _cases(shape, config, context, step, device)
