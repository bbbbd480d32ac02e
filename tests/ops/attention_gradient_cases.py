"""Gradients of sparse_attention: by a kernel, by float64 autograd of the definition, and by autograd of eager torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4 import _library
from dsv4.ops import sparse_attention, sparse_attention_reference
from dsv4.testing import assert_no_worse, implementation_cases, max_isa

WANTED = ("query", "window_pages", "compressed_pages", "sink")
KERNELS = [case for case in implementation_cases("sparse_attention_backward") if "reference" not in case.values]


def wanted(a: dict[str, Any]) -> list[str]:
    """The arguments that take a gradient."""
    return [n for n in WANTED if a[n] is not None and a[n].is_floating_point()]


def seeds(a: dict[str, Any], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse. lse of a row without keys is +inf, whatever comes before: it gets a finite one."""
    g = torch.Generator().manual_seed(seed)
    tokens, heads, _ = a["query"].shape
    return (
        torch.randn(a["query"].shape, generator=g).to(a["query"].dtype),
        torch.randn(tokens, heads, generator=g),
    )


def _leaves(a: dict[str, Any], values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: values[n].detach().clone().requires_grad_() for n in wanted(a)}


class Gradient:
    """One implementation of the backward op, reached as a user reaches it: through autograd."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def dtype(self) -> torch.dtype:
        """float32 where this implementation takes it."""
        return torch.bfloat16 if self.name == "amx" else torch.float32

    def __call__(self, a: dict[str, Any], grads: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        leaves = _leaves(a, a)
        with max_isa(self.name):
            results = sparse_attention(**{**a, **leaves})
            found = torch.autograd.grad(results, list(leaves.values()), grads or seeds(a))
            wide = any(a[n] is not None and a[n].dtype == torch.float32 for n in WANTED[:3])
            name = "avx512" if self.name == "amx" and wide else self.name
            assert _library.last_implementation("sparse_attention_backward") == name
        for n, g in zip(leaves, found, strict=True):
            assert g.dtype == a[n].dtype and g.shape == a[n].shape and g.is_contiguous()
        return dict(zip(leaves, found, strict=True))


def exact(a: dict[str, Any], grads: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """Float64 autograd of the definition, on the same numbers. Memory that no row reads holds zeros here."""
    wide = {
        n: x.double().nan_to_num(0.0) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in a.items()
    }
    leaves = _leaves(a, wide)
    out, lse = sparse_attention_reference(**{**wide, **leaves})
    grad_out, grad_lse = grads or seeds(a)
    some = torch.isfinite(lse)
    found = torch.autograd.grad((out, lse[some]), list(leaves.values()), (grad_out.double(), grad_lse.double()[some]))
    return dict(zip(leaves, found, strict=True))


def places_of(a: dict[str, Any], row: int) -> list[tuple[str, int, int]]:
    """(pool, page, offset) of the keys of a row by the definition, one lookup after the other."""
    found, sequence, at = [], int(a["sequence"][row]), int(a["position"][row])

    def look_up(kind: str, size: int, entry: int) -> None:
        table = a[f"{kind}_table"]
        block = entry // size
        page = int(table[sequence, block]) if block < table.shape[1] else -1
        if page >= 0:
            found.append((f"{kind}_pages", page, entry % size))

    for p in range(max(at - a["window"] + 1, 0), at + 1):
        look_up("window", a["window_page_size"], p)
    if a["compressed_pages"] is not None:
        length = int(a["lengths"][row])
        for entry in range(length) if a["indices"] is None else a["indices"][row].tolist():
            if 0 <= entry < length:
                look_up("compressed", a["page_size"], entry)
    return found


def _turned_back(out: Tensor, rope: Tensor) -> Tensor:
    width = 2 * rope.shape[0]
    cos, sin = rope.to(out.dtype).unbind(-1)
    even, odd = out[:, -width:].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos + odd * sin, odd * cos - even * sin), -1).flatten(-2)
    return torch.cat((out[:, :-width], turned), -1)


def eager(a: dict[str, Any], grads: tuple[Tensor, Tensor] | None = None, draw: int = 0) -> dict[str, Tensor]:
    """Autograd of gather, product and softmax in the dtype of the query, row by row. `draw`: which order of summation;
    0 is the plain one, others permute keys and dims."""
    dtype, g = a["query"].dtype, torch.Generator().manual_seed(draw)
    dims = torch.randperm(a["query"].shape[2], generator=g) if draw else torch.arange(a["query"].shape[2])
    leaves = _leaves(a, {n: a[n].nan_to_num(0.0) for n in wanted(a)})
    outs, lses, rows = [], [], []
    for row in range(len(a["query"])):
        places = places_of(a, row)
        if not places:
            continue
        if draw:
            places = [places[i] for i in torch.randperm(len(places), generator=g).tolist()]
        keys = torch.stack([leaves[pool][page, offset] for pool, page, offset in places]).to(dtype)[:, dims]
        scores = (leaves["query"][row][:, dims] @ keys.t()).float() * a["scale"]
        weights = torch.cat((scores, leaves["sink"].unsqueeze(1)), 1).softmax(1)[:, :-1]
        out = (weights.to(dtype) @ keys)[:, dims.argsort()]
        outs.append(out if a["rope"] is None else _turned_back(out, a["rope"][row]))
        lses.append(scores.logsumexp(1))
        rows.append(row)
    grad_out, grad_lse = grads or seeds(a)
    found = torch.autograd.grad(
        (torch.stack(outs), torch.stack(lses)),
        list(leaves.values()),
        (grad_out[rows], grad_lse[rows]),
        allow_unused=True,
    )
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def _together(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name].flatten() for one in each]) for name in each[0]}


def assert_one_draw(a: dict[str, Any], got: dict[str, Tensor], grads: tuple[Tensor, Tensor] | None = None) -> None:
    """`assert_one_draw_of_all` of a single problem."""
    assert_one_draw_of_all([a], [got], grads)


def assert_one_draw_of_all(
    problems: list[dict[str, Any]], got: list[dict[str, Tensor]], grads: tuple[Tensor, Tensor] | None = None
) -> None:
    """Every gradient has at most twice the error of eager torch in one of four orders of summation, or is float32 and
    within two roundings of its largest value; where nothing is read it is zero. Problems alike are compared as one.

    The error of one order may be small by luck; to be as good as torch is to be as good as one of them. The sink's
    gradient is one sum a head, whose error means little by itself: a few roundings.
    """
    truth, draws = _together([exact(a, grads) for a in problems]), {}
    eps = torch.finfo(problems[0]["query"].dtype).eps
    for name, found in _together(got).items():
        size = float(truth[name].abs().max()) if found.numel() else 0.0
        if name == "sink":
            torch.testing.assert_close(found.double(), truth[name], rtol=0, atol=8 * eps * max(size, 0.1))
            continue
        assert not found[truth[name] == 0].any()
        assert size == 0 or found.any()
        if found.numel() == 0 or (eps < 1e-6 and float((found.double() - truth[name]).abs().max()) <= 2 * eps * size):
            continue
        for draw in range(4):
            if draw not in draws:
                draws[draw] = _together([eager(a, grads, draw) for a in problems])
            try:
                assert_no_worse(found, draws[draw][name], truth[name])
                break
            except AssertionError:
                if draw == 3:
                    raise
