"""mHC against the same maths in eager torch: float32, as a user would write it.

FLOPs and bytes a token (D = hidden width): pre 208 D and 10 D + 80, post 40 D and 18 D + 80, both fused 248 D and
20 D + 160, head 48 D and 10 D; backward of post 80 D and 28 D + 160, of pre 608 D and 18 D + 160; BF16 streams, mixing
weights read (and their gradients written) once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4 import ops
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.pages import spread
from dsv4.model.config import Config

_MIXES = 24
# mHC kernels may hold fn as the sum of two BF16 numbers: 16 bits of it, which moves the float32 weights by up to this.
_FLOOR = 1e-5
_CHECKED_ROWS = 48
_MOST_ROWS = 4096


def eager_pre(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mhc_pre with the defaults of the release."""
    wide = streams.to(fn.dtype)
    flat = wide.flatten(1)
    mixes = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    pre = torch.sigmoid(mixes[:, :4] * scale[0] + base[:4]) + 1e-6
    post = 2 * torch.sigmoid(mixes[:, 4:8] * scale[1] + base[4:8])
    comb = (mixes[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(-1) + 1e-6
    comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    return (pre.unsqueeze(-1) * wide).sum(1).to(streams.dtype), post, comb


def eager_post(sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """mhc_post."""
    mixed = torch.matmul(comb.transpose(-1, -2), streams.to(comb.dtype))
    return (post.unsqueeze(-1) * sublayer.unsqueeze(-2) + mixed).to(streams.dtype)


def eager_post_pre(
    sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mhc_post_pre, the new streams rounded to their dtype before the next weights are taken from them."""
    new = eager_post(sublayer, streams, post, comb)
    return (new, *eager_pre(new, fn, scale, base))


def eager_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """mhc_head."""
    wide = streams.to(fn.dtype)
    flat = wide.flatten(1)
    mixes = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    pre = torch.sigmoid(mixes * scale + base) + 1e-6
    return (pre.unsqueeze(-1) * wide).sum(1).to(streams.dtype)


class _Entry(NamedTuple):
    """An op (of a backward op: the one whose gradient it is), and its FLOPs and bytes a token, per unit of width."""

    call: Callable[..., Any]
    eager: Callable[..., Any]
    flops: int
    nbytes: int
    more_bytes: int  # a token, whatever the width


class _Inputs:
    """Inputs of one shape; the mixing weights as in a trained model: small, and not symmetric."""

    def __init__(self, config: Config, tokens: int, device: torch.device):
        self.tokens, self.hidden = tokens, config.hidden_size
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.streams = normal(tokens, 4, self.hidden).bfloat16()
        self.sublayer = normal(tokens, self.hidden).bfloat16()
        self.post = torch.sigmoid(normal(tokens, 4)) * 2
        self.comb = torch.softmax(normal(tokens, 4, 4), -1)
        self.fn = normal(_MIXES, 4 * self.hidden) / (4 * self.hidden) ** 0.5
        self.scale = torch.tensor([1.0, 0.9, 1.1], device=device)
        self.base = normal(_MIXES) / 2
        self.head = (self.fn[:4].contiguous(), self.scale[:1], self.base[:4])

    @property
    def mixing(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.fn, self.scale, self.base

    def arguments(self, op: str) -> tuple[Tensor, ...]:
        before = (self.sublayer, self.streams, self.post, self.comb)
        return {
            "mhc_pre": (self.streams, *self.mixing),
            "mhc_post": before,
            "mhc_post_pre": (*before, *self.mixing),
            "mhc_head": (self.streams, *self.head),
        }[op]


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _rows(arguments: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The arguments for some rows, spread over all of them; what has no rows stays whole."""
    index = spread(tokens, _CHECKED_ROWS).to(arguments[0].device)
    return [value[index] if value.shape[0] == tokens and value.dim() > 1 else value for value in arguments]


def _forward_case(op: str, entry: _Entry, name: str, data: _Inputs) -> Case:
    call, eager = entry.call, entry.eager
    arguments = data.arguments(op)
    weights = sum(value.nbytes for value in arguments if value.shape[0] != data.tokens)

    def compare() -> list[Comparison]:
        some = _rows(arguments, data.tokens)
        outputs = (_tuple(call(*arguments)), _tuple(eager(*some)), _tuple(eager(*(value.double() for value in some))))
        return [
            Comparison(_rows([result], data.tokens)[0], other, exact)
            for result, other, exact in zip(*outputs, strict=True)
        ]

    return Case(
        op, _shape(name, data), lambda: call(*arguments), "eager torch", lambda: eager(*arguments), compare,
        entry.flops * data.hidden * data.tokens, _bytes(entry, data) + weights, "float32", _FLOOR,
    )  # fmt: skip


def _backward_case(op: str, entry: _Entry, name: str, data: _Inputs) -> Case:
    call, eager = entry.call, entry.eager
    arguments = data.arguments(op.removesuffix("_backward"))
    weights = sum(2 * value.nbytes for value in arguments if value.shape[0] != data.tokens)

    def gradients(function: Callable[..., Any], values: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """The backward pass of one forward pass, to be run any number of times."""
        leaves = [value.detach().requires_grad_() for value in values]
        outputs = _tuple(function(*leaves))
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)

    def compare() -> list[Comparison]:
        # Gradients of the mixing weights sum over the tokens, so the check is a backward pass of its own.
        some = _rows(arguments, data.tokens)
        results, others = gradients(call, some)(), gradients(eager, some)()
        # The same seeds, rounded as the outputs of the narrow run round them.
        exact = _exact_gradients(eager, some)
        return [Comparison(*triple) for triple in zip(results, others, exact, strict=True)]

    return Case(
        op, _shape(name, data), gradients(call, arguments), "eager autograd", gradients(eager, arguments), compare,
        entry.flops * data.hidden * data.tokens, _bytes(entry, data) + weights, "float32", _FLOOR,
    )  # fmt: skip


def _exact_gradients(eager: Callable[..., Any], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    narrow = _tuple(eager(*values))
    leaves = [value.detach().double().requires_grad_() for value in values]
    outputs = _tuple(eager(*leaves))
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype).double() for out in narrow]
    return torch.autograd.grad(outputs, leaves, seeds)


def _bytes(entry: _Entry, data: _Inputs) -> int:
    return (entry.nbytes * data.hidden + entry.more_bytes) * data.tokens


def _shape(name: str, data: _Inputs) -> str:
    return f"{name} tokens={data.tokens} hidden={data.hidden} bf16"


_FORWARD = {
    "mhc_pre": _Entry(ops.mhc_pre, eager_pre, 208, 10, 80),
    "mhc_post": _Entry(ops.mhc_post, eager_post, 40, 18, 80),
    "mhc_post_pre": _Entry(ops.mhc_post_pre, eager_post_pre, 248, 20, 160),
    "mhc_head": _Entry(ops.mhc_head, eager_head, 48, 10, 0),
}
_BACKWARD = {
    "mhc_pre_backward": _Entry(ops.mhc_pre, eager_pre, 608, 18, 160),
    "mhc_post_backward": _Entry(ops.mhc_post, eager_post, 80, 28, 160),
}

#: Ops of this family, in the order they are shown, and the rows at once unless told otherwise.
OPS = (*_FORWARD, *_BACKWARD)
CONTEXTS = (4096,)
QUICK_CONTEXTS = (256,)


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, on `context` rows at once (4096 at most: prompts come in chunks)."""
    data = _Inputs(Config.preset(shape), min(context, _MOST_ROWS), device)
    if op in _FORWARD:
        yield _forward_case(op, _FORWARD[op], shape, data)
    else:
        yield _backward_case(op, _BACKWARD[op], shape, data)
