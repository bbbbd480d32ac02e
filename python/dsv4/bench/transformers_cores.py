"""The cores of transformers' attention and index, on the rows that a benchmark drew: what its modules do between their
projections, by its own functions, on caches as they keep them. And its experts, a module of their own.

Attention and index copy keys to every head and score every entry, so a shape of theirs may need far more memory than
the op.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv4.bench.peers import MISSING
from dsv4.environment import free_bytes

if TYPE_CHECKING:
    from dsv4.bench.attention import Plain

_NAME = "transformers"
# Of the free memory, what a baseline may take.
_SHARE = 0.4


def against_transformers(needed: int, device: torch.device, prepare: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """`baseline` and `run_baseline` of a case; the latter None where transformers is missing or memory too small.

    Args:
        needed: bytes that a run takes.
        device: whose memory they are.
        prepare: what is to be timed, made on the first call.
    """
    if importlib.util.find_spec("transformers") is None:
        return {"baseline": f"{_NAME} {MISSING}", "run_baseline": None}
    free = free_bytes(device)
    if free is not None and needed > _SHARE * free:
        return {"baseline": f"{_NAME} not run: needs {needed / 2**30:,.1f} GiB", "run_baseline": None}
    prepared = functools.cache(prepare)
    return {"baseline": _NAME, "run_baseline": lambda: prepared()()}


def attention_bytes(plains: Sequence[Plain]) -> int:
    """Two copies of the keys for every head, and three of the scores in float32."""
    first = plains[0]
    rows, heads, dim = first.query.shape
    keys = len(first.raw) + len(first.entries)
    return len(plains) * heads * keys * (2 * 2 * dim + rows * 4 * 3)


def prepare_attention(plains: Sequence[Plain]) -> Callable[[], Tensor]:
    """transformers' attention over sequences of equal length: bias of the chosen entries, attention, inverse rope.

    Returns: a function that gives [sequences, tokens, heads, head_dim].
    """
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb, eager_attention_forward

    first = plains[0]
    module: Any = SimpleNamespace(
        num_key_value_groups=first.query.shape[1], training=False, sinks=first.sink.bfloat16()
    )
    query = torch.stack([plain.query for plain in plains]).transpose(1, 2)
    raw, entries = (torch.stack([getattr(plain, name) for plain in plains]).unsqueeze(1) for name in ("raw", "entries"))
    cos, sin = torch.stack([plain.rope for plain in plains]).bfloat16().unbind(-1)
    at = first.position.unsqueeze(1)
    stored = torch.arange(first.first, first.first + raw.shape[2], device=at.device)
    seen = (stored <= at) & (stored > at - first.window)
    window_mask = torch.zeros(seen.shape, dtype=query.dtype, device=at.device).masked_fill_(~seen, float("-inf"))
    window_mask = window_mask.expand(len(plains), 1, -1, -1)
    count = entries.shape[2]
    hidden = torch.arange(count, device=at.device) >= first.lengths.unsqueeze(1)
    listed = [plain.indices for plain in plains if plain.indices is not None]
    indices = torch.stack(listed).long().unsqueeze(1) if listed else None

    def bias() -> Tensor:
        rows = (len(plains), 1, query.shape[2])
        if indices is None:
            return query.new_zeros(*rows, count).masked_fill_(hidden, float("-inf"))
        marked = query.new_full((*rows, count + 1), float("-inf"))
        return marked.scatter_(-1, torch.where(indices >= 0, indices, count), 0.0)[..., :count]

    def run() -> Tensor:
        keys = torch.cat([raw, entries], 2)
        mask = torch.cat([window_mask, bias()], -1)
        out = eager_attention_forward(module, query, keys, keys, mask, query.shape[-1] ** -0.5)[0]
        return apply_rotary_pos_emb(out.transpose(1, 2), cos, -sin).transpose(1, 2)

    return run


def index_bytes(query: Tensor, weights: Tensor, keys: Sequence[Tensor], lengths: Tensor, k: int) -> int:
    """The keys in float32, and three copies of every head's scores."""
    rows, heads, dim = query.shape
    return 4 * len(keys[0]) * (len(keys) * dim + 3 * rows * heads)


def prepare_index(
    query: Tensor, weights: Tensor, keys: Sequence[Tensor], lengths: Tensor, k: int
) -> Callable[[], Tensor]:
    """transformers' index over sequences of equal length: its scorer, the causal mask, top-k.

    Returns: a function that gives entries [sequences, tokens, min(k, keys)], -1 where there are fewer.
    """
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4IndexerScorer

    heads, dim = query.shape[1:]
    scorer: Any = DeepseekV4IndexerScorer(DeepseekV4Config(index_n_heads=heads, index_head_dim=dim, hidden_size=heads))
    # Its projection of the hidden rows has been made already, and so have its scales.
    scorer.weights_proj = torch.nn.Identity()
    scorer.softmax_scale = scorer.weights_scaling = 1.0
    queries, hidden, limits = (value.unflatten(0, (len(keys), -1)) for value in (query, weights, lengths))
    stored = torch.stack(list(keys))
    entry = torch.arange(stored.shape[1], device=stored.device)

    def run() -> Tensor:
        future = entry >= limits.unsqueeze(-1)
        scores = scorer(queries, stored, hidden).masked_fill(future, float("-inf"))
        chosen = scores.topk(min(k, stored.shape[1]), dim=-1).indices
        return torch.where(chosen >= limits.unsqueeze(-1), -1, chosen)

    return run


def prepare_experts(
    x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, limit: float
) -> Callable[[], Tensor]:
    """transformers' experts module on these rows, with the matrices as its parameters.

    Args:
        x: [tokens, hidden]. weights, indices: [tokens, top_k].
        gate_up: [experts, 2 inter, hidden]. down: [experts, hidden, inter].
    """
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    experts, hidden, inter = down.shape
    config = DeepseekV4Config(hidden_size=hidden, swiglu_limit=limit)
    config.num_local_experts, config.intermediate_size = experts, inter
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = DeepseekV4Experts(config)
    for name, matrix in (("gate_up_proj", gate_up), ("down_proj", down)):
        setattr(module, name, torch.nn.Parameter(matrix, requires_grad=False))
    chosen, shares = indices.long(), weights.to(x.dtype)
    return lambda: module(x, chosen, shares)
