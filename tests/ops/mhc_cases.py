"""mHC's arguments, the same maths in eager torch, and what it means to be as accurate as that."""

import zlib
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

import dsv4.ops as ops
from dsv4.testing import assert_no_worse, strided

X = torch.bfloat16


# The same maths in eager torch, in the dtype of the streams: what the error of a kernel is measured against.


def eager_mixes(streams, fn, norm_eps):
    flat = streams.flatten(1).to(fn.dtype)
    return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def eager_pre(streams, fn, scale, base, norm_weight=None, norm_eps=1e-6, hc_eps=1e-6, rounds=20, rms_eps=1e-6):
    mixes = eager_mixes(streams, fn, norm_eps)
    pre, post, comb = ops.mhc_weights_reference(mixes, scale, base, hc_eps, rounds)
    mixed = (pre.unsqueeze(-1) * streams.to(fn.dtype)).sum(1).to(streams.dtype)
    if norm_weight is not None:
        wide = mixed.to(fn.dtype)
        mixed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + rms_eps) * norm_weight.to(fn.dtype)
    return mixed.to(streams.dtype), post, comb


def eager_post(sublayer, streams, post, comb):
    mixed = comb.transpose(1, 2) @ streams.to(comb.dtype)
    return (post.unsqueeze(-1) * sublayer.unsqueeze(1).to(comb.dtype) + mixed).to(streams.dtype)


def eager_post_pre(sublayer, streams, post, comb, *mixing):
    new = eager_post(sublayer, streams, post, comb)
    return (new, *eager_pre(new, *mixing))


def eager_head(streams, fn, scale, base, norm_eps=1e-6, hc_eps=1e-6):
    pre = (eager_mixes(streams, fn, norm_eps) * scale + base).sigmoid() + hc_eps
    return (pre.unsqueeze(-1) * streams.to(fn.dtype)).sum(1).to(streams.dtype)


EAGER = {"mhc_pre": eager_pre, "mhc_post": eager_post, "mhc_post_pre": eager_post_pre, "mhc_head": eager_head}


def arguments(op, tokens, hidden, dtype=X, norm=None):
    """Random arguments of an op by name, in the order of its signature; norm: dtype of the norm weight."""
    mixes, scales = (4, 1) if op == "mhc_head" else (24, 3)
    mixing = {
        "fn": torch.randn(mixes, 4 * hidden) / (4 * hidden) ** 0.5,
        "scale": torch.rand(scales) + 0.5,
        "base": torch.randn(mixes) * 0.5,
    }
    before = {
        "sublayer": torch.randn(tokens, hidden).to(dtype),
        "streams": torch.randn(tokens, 4, hidden).to(dtype),
        "post": 2 * torch.rand(tokens, 4),
        "comb": torch.rand(tokens, 4, 4),
    }
    if op == "mhc_post":
        return before
    if op == "mhc_head":
        return {"streams": before["streams"], **mixing}
    mixing["norm_weight"] = None if norm is None else (torch.rand(hidden) + 0.5).to(norm)
    return {**before, **mixing} if op == "mhc_post_pre" else {"streams": before["streams"], **mixing}


def double(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


def results(value):
    return value if isinstance(value, tuple) else (value,)


def padded(x):
    """The same values, every row followed by NaN that no kernel may read."""
    if x.dim() < 2:
        return x
    memory = torch.full((*x.shape[:-1], x.shape[-1] + 37), torch.nan).to(x.dtype)
    view = memory[..., : x.shape[-1]]
    view.copy_(x)
    return view


LAYOUTS = {"contiguous": lambda x: x, "padded": padded, "strided": strided}
NORMS = [None, "own", torch.float32]


def norm_dtype(norm, dtype):
    return dtype if norm == "own" else norm


def gradients(function, values, grads):
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in values]
    out = results(function(*leaves))
    wanted = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(out, wanted, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])


class Problem(NamedTuple):
    values: list
    grads: list
    eager: tuple
    exact: tuple


@lru_cache(maxsize=8)
def problems(op, tokens, hidden, dtype, norm=None, backward=False, settings=(), draw=0):
    """Some problems of one size, with what the eager op and the float64 definition give: results, or gradients.

    Several, because the error of a few elements is large or small by luck: they are compared as one.
    """
    eager, reference = EAGER[op], getattr(ops, f"{op}_reference")
    made = []
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(repr((op, tokens, hidden, dtype, norm, backward, settings, draw)).encode()))
        for _ in range(max(4, -(-48 // tokens)) if tokens else 1):
            values = list(arguments(op, tokens, hidden, dtype, norm).values())
            out = results(eager(*values, *settings))
            if not backward:
                made.append(Problem(values, [], out, results(reference(*double(values), *settings))))
                continue
            grads = [torch.randn_like(o) for o in out]
            exact = gradients(lambda *v: reference(*v, *settings), double(values), double(grads))
            made.append(Problem(values, grads, gradients(lambda *v: eager(*v, *settings), values, grads), exact))
    return made


def assert_as_accurate_as_torch(problems, actual, fn_in_parts=False):
    """Every result of these problems, taken as one, has at most twice the eager op's error; actual: one tuple each."""
    sides = (actual, [p.eager for p in problems], [p.exact for p in problems])
    for parts in zip(*(zip(*side, strict=True) for side in sides), strict=True):
        a, eager, exact = (torch.cat([x.flatten() for x in xs]) for xs in parts)
        assert a.dtype == eager.dtype
        if fn_in_parts and a.dtype == torch.float32:
            # the tiles' bfloat16 high + low of fn adds up to 4e-6 to float32 results
            assert torch.isfinite(a).all()
            own, other = (a - exact).abs(), (eager - exact).abs()
            assert a.numel() == 0 or own.max() <= 2 * other.max() + 4e-6 * exact.abs().max()
        else:
            assert_no_worse(a, eager, exact)


def assert_gradients_as_accurate(op, made, actual):
    """All gradients but those of scale and base. Each is divided by the power of two above its largest value, or the
    problem with the largest would be the only one of its size that counts."""
    names = [name for name, value in zip(arguments(op, 1, 1), made[0].values, strict=True) if value is not None]

    def relative(grads, problem):
        return [
            g / e.abs().max().log2().ceil().exp2().to(g.dtype) if e.any() else g
            for name, g, e in zip(names, grads, problem.exact, strict=True)
            if name not in ("scale", "base")
        ]

    actual = [relative(grads, p) for p, grads in zip(made, actual, strict=True)]
    assert_as_accurate_as_torch(
        [p._replace(eager=relative(p.eager, p), exact=relative(p.exact, p)) for p in made], actual
    )


def assert_sums_as_accurate(op, made, actual):
    """The gradients of scale and base."""
    first = list(arguments(op, 1, 1)).index("scale")

    def sums(grads, problem):
        return (torch.cat(list(grads[first : first + 2])) / problem.values[0].shape[0] ** 0.5,)

    actual = [sums(grads, p) for p, grads in zip(made, actual, strict=True)]
    assert_as_accurate_as_torch([p._replace(eager=sums(p.eager, p), exact=sums(p.exact, p)) for p in made], actual)
