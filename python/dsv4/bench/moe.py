"""moe_experts on FP4 weights against a loop over experts with bfloat16 products in eager torch, and on lines of their
own against torch's grouped product (bench/library_products) and transformers' experts module
(bench/transformers_cores) on the same bfloat16 weights, and kt-kernel's experts on the same FP4 weights
(bench/kt_kernel).

`context` counts tokens at once. As many of the model's experts as leave room for their bfloat16 copies: all, on large
GPUs. FLOPs: 6 hidden inter a token and expert; bytes: the stored weights of the experts that are touched, rows,
outputs.

moe_experts_backward, on bfloat16 weights, against autograd through the same loop. FLOPs: 16 hidden inter a token and
expert, gate and up being taken again from x; bytes: weights read and their gradients written once, three rows a token.
A second line has the experts frozen: 10 hidden inter, and no gradients of weights.

moe_map, of all the model's experts, against a stable sort and a count in eager torch; both are whole numbers, so that
nothing but equality passes. Bytes: indices, rows, offsets.

moe_gate against eager torch in float32, which the definition asks for: the weights of all experts, 0 of those that were
not chosen. FLOPs: 2 hidden a token and expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4 import ops
from dsv4.bench.kt_kernel import against_kt_kernel
from dsv4.bench.library_products import against_grouped_mm
from dsv4.bench.linear import draw_weight, most_rows
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.pages import spread
from dsv4.bench.transformers_cores import against_transformers, prepare_experts
from dsv4.environment import free_bytes
from dsv4.model.config import Config

#: Ops of this family, and the tokens at once unless told otherwise.
OPS = ("moe_map", "moe_gate", "moe_experts", "moe_experts_backward")
CONTEXTS = (1, 8, 64, 2048)
QUICK_CONTEXTS = (1, 64)

Matrices = Tensor | Sequence[Tensor]  # of all experts
_NO_ERROR = 1e-9  # far below what one wrong number of any size measured here makes
# The gradient of the routing weights: a product of two rows in bfloat16 each, so few of them say little about eager's.
_FEW_NUMBERS = 2.0**-7
_CHECKED_ROWS = 3
_CHECKED_GRADIENT_ROWS = 48  # gradients of the matrices sum over them
_MOST_GRADIENT_ROWS = 512
_COPY_BYTES = 3 << 29  # 1.5 GiB
_SHARE_OF_A_GPU = 0.4


def eager_experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    matrices: tuple[Matrices, Matrices, Matrices],
    limit: float,
    quantise: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """moe_experts with plain matrices (w1, w3, w2) [experts, out, in]; `quantise` is applied to the rows first."""
    w1, w3, w2 = matrices
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    rows = quantise(x)
    for expert in indices.unique().tolist():
        token, slot = torch.where(indices == expert)
        gate = F.linear(rows[token], w1[expert].to(x.dtype)).clamp_max(limit)
        up = F.linear(rows[token], w3[expert].to(x.dtype)).clamp(-limit, limit)
        hidden = (F.silu(gate) * up * weights[token, slot].unsqueeze(1)).to(x.dtype)
        out.index_add_(0, token, F.linear(quantise(hidden), w2[expert].to(x.dtype)).to(out.dtype))
    return out.to(x.dtype)


def _room(device: torch.device) -> int:
    """Bytes for the experts' bfloat16 copies."""
    if device.type == "cpu":
        return _COPY_BYTES
    return int(_SHARE_OF_A_GPU * (free_bytes(device) or 0))


def _experts(config: Config, room: int) -> int:
    """Of the model's experts, those whose bfloat16 copies fit."""
    expert = 2 * 3 * config.hidden_size * config.moe_intermediate_size
    return max(min(config.n_routed_experts, room // expert), config.num_experts_per_tok)


def _experts_cases(shape: str, config: Config, tokens: int, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    hidden, inter, limit = config.hidden_size, config.moe_intermediate_size, config.swiglu_limit
    experts, top_k = _experts(config, _room(device)), config.num_experts_per_tok
    sizes = ((inter, hidden), (inter, hidden), (hidden, inter))
    stored = [draw_weight("fp4", experts, *size, device=device) for size in sizes]
    gate_up = torch.empty(experts, 2 * inter, hidden, dtype=torch.bfloat16, device=device)
    dense = (gate_up[:, :inter], gate_up[:, inter:], gate_up.new_empty(experts, hidden, inter))
    for (codes, scale), matrices in zip(stored, dense, strict=True):
        _dequantize(codes, scale, matrices)
    x = torch.randn(tokens, hidden).bfloat16().to(device)
    indices = torch.rand(tokens, experts).topk(top_k).indices.int().to(device)
    weights = torch.rand(tokens, top_k).softmax(1).to(device) * config.routed_scaling_factor

    def run() -> Tensor:
        codes, scales = zip(*stored, strict=True)
        return ops.moe_experts(x, weights, indices, *codes, *scales, swiglu_limit=limit)

    def compare() -> list[Comparison]:
        index = spread(tokens, _CHECKED_ROWS).to(device)
        some = (x[index], weights[index], indices[index])
        eager = eager_experts(*some, dense, limit, ops.fp8_round_trip)
        exact = eager_experts(some[0].double(), *some[1:], dense, limit, ops.fp8_round_trip)
        return [Comparison(run()[index], eager, exact)]

    expert_bytes = sum(value.nbytes for pair in stored for value in pair) // experts
    case = Case(
        "moe_experts", f"{shape} tokens={tokens} hidden={hidden} inter={inter} experts={experts} top_k={top_k} fp4",
        run, "eager torch bf16", lambda: eager_experts(x, weights, indices, dense, limit), compare,
        6.0 * hidden * inter * top_k * tokens, len(indices.unique()) * expert_bytes + 2.0 * x.nbytes, "bfloat16",
    )  # fmt: skip
    yield case
    yield replace(case, **against_grouped_mm(x, weights, indices, (gate_up, dense[2]), limit, run))
    # Its rows, gate and up of one expert at a time.
    needed = 2 * tokens * top_k * (2 * hidden + 3 * inter)
    prepare = partial(prepare_experts, x, weights, indices, gate_up, dense[2], limit)
    yield replace(case, **against_transformers(needed, device, prepare))
    yield replace(case, **against_kt_kernel(x, weights, indices, stored, limit))


def _backward_case(shape: str, config: Config, tokens: int, device: torch.device, frozen: bool) -> Case:
    hidden, inter, limit = config.hidden_size, config.moe_intermediate_size, config.swiglu_limit
    # Beside the weights lie their gradients and, for the check, both in float64.
    experts, top_k = _experts(config, _COPY_BYTES // 12), config.num_experts_per_tok
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.bfloat16).to(device)

    sizes = ((inter, hidden), (inter, hidden), (hidden, inter))
    matrices = tuple(normal(experts, *size) / size[1] ** 0.5 for size in sizes)
    x, seed = normal(tokens, hidden), normal(tokens, hidden)
    indices = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.int().to(device)
    weights = torch.rand(tokens, top_k, generator=generator).softmax(1).to(device) * config.routed_scaling_factor

    def gradients(function: Callable[..., Tensor], index: Tensor | None, dtype: torch.dtype) -> Callable[[], Any]:
        """The backward pass of one forward pass over some rows, to be run any number of times."""
        rows = [t if index is None else t[index] for t in (x, weights, indices, seed)]
        wide = weights.dtype if dtype == torch.bfloat16 else dtype
        leaves = [rows[0].to(dtype), rows[1].to(wide), *(w.to(dtype) for w in matrices)]
        leaves = [leaf.detach() for leaf in leaves]
        asked = [leaf.requires_grad_() for leaf in leaves[: 2 if frozen else None]]
        out = function(leaves[0], leaves[1], rows[2], tuple(leaves[2:]), limit)
        return lambda: torch.autograd.grad(out, asked, rows[3].to(dtype), retain_graph=True)

    def ours(x: Tensor, weights: Tensor, indices: Tensor, w: tuple[Tensor, ...], limit: float) -> Tensor:
        return ops.moe_experts(x, weights, indices, *w, swiglu_limit=limit)

    def eager(x: Tensor, weights: Tensor, indices: Tensor, w: tuple[Tensor, ...], limit: float) -> Tensor:
        # Indexing the stacked weights would give each expert a gradient of the size of all.
        w1, w3, w2 = (matrix.unbind(0) for matrix in w)
        return eager_experts(x, weights, indices, (w1, w3, w2), limit)

    def compare() -> list[Comparison]:
        index = spread(tokens, _CHECKED_GRADIENT_ROWS).to(device)
        found, other = (gradients(function, index, torch.bfloat16)() for function in (ours, eager))
        exact = gradients(eager, index, torch.float64)()
        return [Comparison(*triple) for triple in zip(found, other, exact, strict=True)]

    expert_bytes = sum(w.nbytes for w in matrices)
    return Case(
        "moe_experts_backward",
        f"{shape} tokens={tokens} hidden={hidden} inter={inter} experts={experts} top_k={top_k} bf16"
        + " frozen" * frozen,
        gradients(ours, None, torch.bfloat16), "eager autograd", gradients(eager, None, torch.bfloat16), compare,
        (10.0 if frozen else 16.0) * hidden * inter * top_k * tokens,
        (1.0 if frozen else 2.0) * expert_bytes + 3.0 * x.nbytes, "bfloat16", _FEW_NUMBERS,
    )  # fmt: skip


def eager_map(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """moe_map for indices that are all in range."""
    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=experts)
    return F.pad(counts.cumsum(0), (1, 0)).int(), flat.argsort(stable=True).int()


def _map_case(shape: str, config: Config, tokens: int, device: torch.device) -> Case:
    torch.manual_seed(0)
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    indices = torch.rand(tokens, experts).topk(top_k).indices.int()
    owners = indices.flatten().tolist()
    pairs = sorted(range(len(owners)), key=owners.__getitem__)
    begins = [sum(owner < expert for owner in owners) for expert in range(experts + 1)]
    indices = indices.to(device)

    def compare() -> list[Comparison]:
        found, eager = ops.moe_map(indices, experts), eager_map(indices, experts)
        exact = (torch.tensor(values, dtype=torch.float64, device=device) for values in (begins, pairs))
        return [Comparison(a.float(), b.float(), c) for a, b, c in zip(found, eager, exact, strict=True)]

    return Case(
        "moe_map", f"{shape} tokens={tokens} experts={experts} top_k={top_k}", lambda: ops.moe_map(indices, experts),
        "eager torch", lambda: eager_map(indices, experts), compare, 0.0,
        8.0 * indices.numel() + 4.0 * (experts + 1), "none", _NO_ERROR,
    )  # fmt: skip


def _gate_case(shape: str, config: Config, tokens: int, device: torch.device) -> Case:
    torch.manual_seed(0)
    hidden, experts, top_k = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    x = torch.randn(tokens, hidden).bfloat16().to(device)
    weight = (torch.randn(experts, hidden) / hidden**0.5).bfloat16().to(device)
    bias = (0.1 * torch.randn(experts)).to(device)

    def eager(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        score = F.softplus(F.linear(x.to(dtype), weight.to(dtype))).sqrt()
        indices = (score + bias).topk(top_k).indices
        chosen = score.gather(1, indices)
        return chosen / chosen.sum(-1, keepdim=True) * config.routed_scaling_factor, indices

    def of_all(weights: Tensor, indices: Tensor) -> Tensor:
        return weights.new_zeros(tokens, experts).scatter_(1, indices.long(), weights)

    def run() -> tuple[Tensor, Tensor]:
        return ops.moe_gate(x, weight, top_k, bias, route_scale=config.routed_scaling_factor)

    def compare() -> list[Comparison]:
        return [Comparison(of_all(*run()), of_all(*eager(torch.float32)), of_all(*eager(torch.float64)))]

    return Case(
        "moe_gate", f"{shape} tokens={tokens} hidden={hidden} experts={experts} top_k={top_k} bf16", run,
        "eager torch float32", lambda: eager(torch.float32), compare, 2.0 * hidden * experts * tokens,
        float(x.nbytes + weight.nbytes + bias.nbytes) + 8.0 * tokens * top_k, "float32",
    )  # fmt: skip


def _dequantize(codes: Tensor, scale: Tensor, to: Tensor) -> None:
    """All experts as bfloat16, one after another: the way there is four times as wide."""
    for expert in range(len(codes)):
        to[expert] = ops.dequantize_weight(codes[expert], scale[expert], torch.bfloat16)


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, on `context` tokens at once: at most a chunk of a prompt, 512 for
    gradients."""
    config, tokens = Config.preset(shape), min(context, most_rows(device))
    if op == "moe_map":
        yield _map_case(shape, config, tokens, device)
    elif op == "moe_gate":
        yield _gate_case(shape, config, tokens, device)
    elif op == "moe_experts":
        yield from _experts_cases(shape, config, tokens, device)
    else:
        for frozen in (False, True):
            yield _backward_case(shape, config, min(tokens, _MOST_GRADIENT_ROWS), device, frozen)
