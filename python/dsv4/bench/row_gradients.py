"""The gradients of norms, rotations and pooling against autograd through eager torch.

`context` counts rows at once. Both run the backward pass of one forward pass; the check takes fewer rows, and float64.
Bytes: each input of the backward pass and each gradient once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.norm_rope import eager_entries, eager_norm, eager_norm_rope, rope_of
from dsv4.bench.pages import ratio_of
from dsv4.model.config import Config

#: Ops of this family, and the rows at once unless told otherwise.
OPS = ("query_norm_rope_backward", "rms_norm_backward", "kv_norm_rope_backward", "compress_entries_backward")
CONTEXTS = (4096,)
QUICK_CONTEXTS = (256,)

_MOST_ROWS = 4096
_CHECKED_ROWS = 64
_CHECKED_ENTRIES = 4

Function = Callable[[Sequence[Tensor], Tensor], Tensor]  # of the leaves and of the rope of their rows


def _case(
    op: str,
    sizes: str,
    ours: Function,
    eager: Function,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    rope: Tensor,
    checked: int,
    checked_rope: int,
    flops: float = 0.0,
) -> Case:
    """Gradients in `rows`, of which the check takes the first `checked` (of `rope` the first `checked_rope`), and in
    what all rows share."""

    def gradient(function: Function, whole: bool, wide: bool) -> Callable[[], tuple[Tensor, ...]]:
        """The backward pass of one forward pass, to be run any number of times."""
        some = rows if whole else [row[:checked] for row in rows]
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in (*some, *shared)]
        turns = rope if whole else rope[:checked_rope]
        out = function(leaves, turns.double() if wide else turns)
        generator = torch.Generator().manual_seed(1)
        seed = torch.randn(out.shape, generator=generator).bfloat16().to(out)
        return lambda: torch.autograd.grad(out, leaves, seed, retain_graph=True)

    def compare() -> list[Comparison]:
        runs = ((ours, False), (eager, False), (eager, True))
        found = (gradient(function, False, wide)() for function, wide in runs)
        return [Comparison(*triple) for triple in zip(*found, strict=True)]

    out_bytes = ours([*rows, *shared], rope).nbytes
    moved = 2 * sum(x.nbytes for x in (*rows, *shared)) + rope.nbytes + out_bytes
    return Case(
        op, sizes, gradient(ours, True, False), "eager autograd bf16", gradient(eager, True, False), compare, flops,
        float(moved), "none",
    )  # fmt: skip


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, on `context` rows at once (4096 at most)."""
    torch.manual_seed(0)
    config, tokens = Config.preset(shape), min(context, _MOST_ROWS)

    def normal(*size: int) -> Tensor:
        return torch.randn(size).to(device)

    heads, head_dim = config.num_attention_heads, config.head_dim
    weight = (torch.rand(config.hidden_size if op == "rms_norm_backward" else head_dim) + 0.5).bfloat16().to(device)
    rope = rope_of(config, torch.arange(tokens)).to(device)
    if op == "query_norm_rope_backward":
        yield _case(
            op, f"{shape} rows={tokens} heads={heads} head_dim={head_dim} bf16",
            lambda x, turns: ops.query_norm_rope(x[0], turns), lambda x, turns: eager_norm_rope(x[0], None, turns),
            [normal(tokens, heads, head_dim).bfloat16()], [], rope, _CHECKED_ROWS, _CHECKED_ROWS,
            8.0 * tokens * heads * head_dim,
        )  # fmt: skip
    elif op == "rms_norm_backward":
        yield _case(
            op, f"{shape} rows={tokens} hidden={config.hidden_size} bf16",
            lambda x, turns: ops.rms_norm(x[0], x[1]), lambda x, turns: eager_norm(x[0], x[1]),
            [normal(tokens, config.hidden_size).bfloat16()], [weight], rope[:, :0], _CHECKED_ROWS, _CHECKED_ROWS,
        )  # fmt: skip
    elif op == "kv_norm_rope_backward":
        yield _case(
            op, f"{shape} rows={tokens} head_dim={head_dim} bf16",
            lambda x, turns: ops.kv_norm_rope(x[0], x[1], turns), lambda x, turns: eager_norm_rope(x[0], x[1], turns),
            [normal(tokens, head_dim).bfloat16()], [weight], rope, _CHECKED_ROWS, _CHECKED_ROWS,
        )  # fmt: skip
    else:
        for kind in ("csa", "hca"):
            if tokens >= ratio_of(config, kind):  # else there is no entry
                yield _entries_case(op, shape, config, kind, tokens, weight, device)


def _entries_case(
    op: str, shape: str, config: Config, kind: str, tokens: int, weight: Tensor, device: torch.device
) -> Case:
    ratio = ratio_of(config, kind)
    width = config.head_dim * (2 if kind == "csa" else 1)
    kv, gate, ape = (torch.randn(rows, width).to(device) for rows in (tokens, tokens, ratio))
    rope = rope_of(config, torch.arange(tokens // ratio) * ratio).to(device)
    return _case(
        op, f"{shape} {kind} rows={tokens} ratio={ratio} head_dim={config.head_dim} bf16",
        lambda x, turns: ops.compress_entries(x[0], x[1], x[2], x[3], turns, ratio),
        lambda x, turns: eager_entries(x[0], x[1], x[2], x[3], turns),
        [kv, gate], [ape, weight], rope, _CHECKED_ENTRIES * ratio, _CHECKED_ENTRIES,
    )  # fmt: skip
