"""The gradient of sparse_attention on bfloat16 rows against autograd of gather, product and softmax in eager torch.

The last rows of a sequence of `context` tokens, as in training. csa: entries as an indexer picks them, here at random;
hca: all entries. FLOPs: 10 head_dim a head and key (scores and G . key, d query, two products into the keys); bytes:
queries, gradients of out and of the queries, and every row that is read with its gradient, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.attention import Plain, count_keys, draw_indices, eager_attention
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.pages import ratio_of, shuffled_table, spread
from dsv4.cache import BLOCK, entries_per_page
from dsv4.model.config import Config

#: Ops of this family, and the lengths of the sequence unless told otherwise.
OPS = ("sparse_attention_backward",)
CONTEXTS = (4096,)
QUICK_CONTEXTS = (1024,)

_ROWS = 64
_CHECKED_ROWS = 16
_Gradients = tuple[Tensor, ...]  # of query, raw rows, entries and sink


class _Pages:
    """Plain rows as pages in random order."""

    def __init__(self, rows: Tensor, page_size: int):
        self.page_size, self.count = page_size, len(rows)
        blocks = -(-len(rows) // page_size)
        self.table = shuffled_table(blocks)
        self.pages = rows.new_zeros(blocks, page_size, rows.shape[1])
        for page, part in zip(
            self.table[0].tolist(), rows.split(page_size), strict=False
        ):  # no rows: one part, no page
            self.pages[page, : len(part)] = part

    def rows(self, pages: Tensor) -> Tensor:
        """What lies at the rows' places, in their order."""
        return pages[self.table[0].long()].flatten(0, 1)[: self.count]


def _own(data: Plain, raw: _Pages, entries: _Pages, grad: Tensor) -> Callable[[], _Gradients]:
    """The backward pass of one forward pass, to be run any number of times."""
    leaves = [x.detach().requires_grad_() for x in (data.query, raw.pages, entries.pages, data.sink)]
    query, raw_pages, pages, sink = leaves
    out, _ = ops.sparse_attention(
        query, raw_pages, raw.table, pages, entries.table, torch.zeros_like(data.position), data.position,
        data.indices, data.lengths, sink, data.rope, data.window, query.shape[2] ** -0.5, raw.page_size,
        entries.page_size,
    )  # fmt: skip
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _eager(data: Plain, grad: Tensor) -> Callable[[], _Gradients]:
    leaves = [x.detach().requires_grad_() for x in (data.query, data.raw, data.entries, data.sink)]
    query, raw, entries, sink = leaves
    out = eager_attention(replace(data, query=query, raw=raw, entries=entries, sink=sink))
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _draw(config: Config, context: int, kind: str, rows: int) -> Plain:
    ratio = ratio_of(config, kind)
    position = torch.arange(context - rows, context, dtype=torch.int32)
    lengths = ((position + 1) // ratio).int()
    indices = draw_indices(lengths, config.index_topk) if kind == "csa" else None
    return Plain(
        query=torch.randn(rows, config.num_attention_heads, config.head_dim).bfloat16(),
        raw=torch.randn(context, config.head_dim).bfloat16(),
        first=0,
        entries=torch.randn(context // ratio, config.head_dim).bfloat16(),
        position=position,
        indices=indices,
        lengths=lengths,
        sink=torch.randn(config.num_attention_heads),
        rope=ops.rope_rows(position, ops.rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta)),
        window=config.sliding_window,
    )


def _work(data: Plain) -> tuple[float, float]:
    """FLOPs, and bytes that have to move."""
    rows, heads, head_dim = data.query.shape
    keys, touched = count_keys(data)
    touched += min(data.window + rows - 1, len(data.raw))
    return 10.0 * heads * head_dim * keys, 3 * data.query.nbytes + 4.0 * touched * head_dim


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, for the last rows of a sequence of `context` tokens."""
    config = Config.preset(shape)
    for kind in ("csa", "hca"):
        if kind == "csa" and context < config.csa_ratio:
            continue  # no entry to select yet
        torch.manual_seed(0)
        rows = min(_ROWS, context)
        data = _draw(config, context, kind, rows)
        page_size = entries_per_page(ratio_of(config, kind))
        raw, entries = _Pages(data.raw, BLOCK), _Pages(data.entries, page_size)
        grad = torch.randn(data.query.shape).bfloat16()
        data, grad = data.to(device), grad.to(device)
        for pool in (raw, entries):
            pool.pages, pool.table = pool.pages.to(device), pool.table.to(device)

        def compare(
            data: Plain = data, raw: _Pages = raw, entries: _Pages = entries, grad: Tensor = grad
        ) -> list[Comparison]:
            index = spread(len(grad), _CHECKED_ROWS).to(grad.device)
            some = data.rows(index)
            query, raw_pages, pages, sink = _own(some, raw, entries, grad[index])()
            results = (query, raw.rows(raw_pages), entries.rows(pages), sink)
            exact = _eager(some.to(dtype=torch.float64), grad[index].double())()
            found = zip(results, _eager(some, grad[index])(), exact, strict=True)
            return [Comparison(*three) for three in found if three[0].numel()]  # there may be no entry yet

        name = (
            f"{shape} {kind} context={context} rows={rows} heads={data.query.shape[1]} head_dim={data.query.shape[2]}"
        )
        yield Case(
            op, f"{name} bf16", _own(data, raw, entries, grad), "eager autograd bf16", _eager(data, grad), compare,
            *_work(data), "bfloat16",
        )  # fmt: skip
