"""Problems of the experts' gradient, and what its errors are measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.testing import assert_no_worse

NAMES = ("x", "weights", "w1", "w3", "w2", "shared w1", "shared w3", "shared w2")
ORDERS = 4
Problem = dict[str, Any]


def problem(
    tokens: int = 5,
    hidden: int = 48,
    inter: int = 40,
    count: int = 4,
    top_k: int = 2,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    limit: float = 0.0,
) -> Problem:
    """Arguments of moe_experts_backward. One slot of token 1 names nobody, token 2 takes an expert twice; of more than
    one expert the last is left empty."""

    def matrices(*lead: int, inner: int) -> list[Tensor]:
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        return [(torch.randn(*lead, *s) / max(s[1], 1) ** 0.5).to(dtype) for s in shapes]

    indices = torch.rand(tokens, max(count - 1, top_k)).argsort(-1)[:, :top_k].int()
    if tokens > 2 and top_k > 1:
        indices[1, 0] = -1
        indices[2, 1] = indices[2, 0]
    return {
        "grad": torch.randn(tokens, hidden).to(dtype),
        "x": (2 * torch.randn(tokens, hidden)).to(dtype),
        "weights": torch.rand(tokens, top_k) + 0.25,
        "indices": indices,
        **dict(zip(("w1", "w3", "w2"), matrices(count, inner=inter), strict=True)),
        "shared": matrices(inner=inter + 9) if shared else [],
        "swiglu_limit": limit,
    }


def wide(a: Problem) -> Problem:
    """The same in float64."""

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(v) for v in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: cast(value) for name, value in a.items()}


def formula(a: Problem) -> list[Tensor]:
    return ops.moe_experts_backward_reference(**a)


def autograd(function: Callable[..., Tensor], a: Problem) -> list[Tensor]:
    """Gradients of a moe_experts through torch."""
    inputs = (a["x"], a["weights"], a["w1"], a["w3"], a["w2"], *a["shared"])
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    x, weights, w1, w3, w2, *shared = leaves
    out = function(x, weights, a["indices"], w1, w3, w2, shared=shared, swiglu_limit=a["swiglu_limit"])
    out = out + 0 * sum(leaf.sum() for leaf in leaves)  # the graph of a loop lacks what no token reaches
    return list(torch.autograd.grad(out, leaves, a["grad"]))


def in_order(function: Callable[[Problem], list[Tensor]], a: Problem, order: int) -> list[Tensor]:
    """function(a) with its sums taken in another order: tokens, hidden and inner values change places, and back."""
    if order == 0:
        return function(a)
    generator = torch.Generator().manual_seed(order)
    tokens, hidden = (torch.randperm(n, generator=generator) for n in a["x"].shape)
    inner = [torch.randperm(w.shape[-2], generator=generator) for w in (a["w1"], *a["shared"][:1])]

    def matrices(values: Sequence[Tensor], inner: Tensor, hidden: Tensor) -> list[Tensor]:
        w1, w3, w2 = values
        return [*(w[..., inner, :][..., hidden] for w in (w1, w3)), w2[..., hidden, :][..., inner]]

    w1, w3, w2 = matrices((a["w1"], a["w3"], a["w2"]), inner[0], hidden)
    moved = {
        **a,
        **{name: a[name][tokens][:, hidden] for name in ("x", "grad")},
        **{name: a[name][tokens] for name in ("weights", "indices")},
        "w1": w1,
        "w3": w3,
        "w2": w2,
        "shared": matrices(a["shared"], inner[1], hidden) if a["shared"] else [],
    }
    x, weights, *found = function(moved)
    tokens, hidden, *inner = (places.argsort() for places in (tokens, hidden, *inner))
    parts = [found[3 * i : 3 * i + 3] for i in range(len(found) // 3)]
    back = [value for part, places in zip(parts, inner, strict=True) for value in matrices(part, places, hidden)]
    return [x[tokens][:, hidden], weights[tokens], *back]


def assert_no_worse_than(
    baseline: Callable[[Problem], list[Tensor]],
    problems: Sequence[Problem],
    found: Sequence[Sequence[Tensor]],
    exact: Sequence[Sequence[Tensor]],
) -> None:
    """Each gradient is no worse than that of `baseline` in one of four orders of its sums. The problems are draws of
    one size, judged together: of few values the largest error says little."""
    left = list(range(len(found[0])))
    for order in range(ORDERS):
        others = [in_order(baseline, a, order) for a in problems]
        for i in tuple(left):
            try:
                assert_no_worse(*(torch.cat([draw[i].flatten() for draw in draws]) for draws in (found, others, exact)))
                left.remove(i)
            except AssertionError as error:
                if order == ORDERS - 1:
                    raise AssertionError(f"gradient of {NAMES[i]}: {error}") from error
        if not left:
            return
