"""mHC's arguments, the same maths in eager torch, and what it means to be as accurate as that."""

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


def shuffled(names, values, tokens, hidden):
    """The values with tokens and hidden elements in another order: the same problem, other orders of summation."""

    def one(name, x):
        if x is None or name in ("scale", "base"):
            return x
        if name == "fn":
            return x.unflatten(1, (4, -1))[..., hidden].flatten(1)
        if name == "norm_weight":
            return x[hidden]
        return x[tokens] if name in ("post", "comb") else x[tokens][..., hidden]

    return [one(name, x) for name, x in zip(names, values, strict=True)]


OUTPUTS = {
    "mhc_pre": ("input", "post", "comb"),
    "mhc_post": ("streams",),
    "mhc_post_pre": ("streams", "input", "post", "comb"),
    "mhc_head": ("input",),
}


def eager_draws(op, names, values, compute):
    """compute(shuffle) of the eager op in four orders of summation, results in the original order.

    The error of one order may be small by luck; to be as good as torch is to be as good as one of them.
    """
    tokens, hidden = (torch.arange(size) for size in (values[0].shape[0], values[0].shape[-1]))
    for draw in range(4):
        if draw:
            tokens, hidden = torch.randperm(len(tokens)), torch.randperm(len(hidden))
        result_names, result = compute(lambda n, v, t=tokens, h=hidden: shuffled(n, v, t, h))
        yield shuffled(result_names, result, tokens.argsort(), hidden.argsort())


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


def assert_accurate(implementation, actual, baseline, exact, factor):
    """assert_no_worse; the tiles' bfloat16 high + low adds up to 4e-6 to float32 results."""
    if implementation == "amx" and actual.dtype == torch.float32:
        assert torch.isfinite(actual).all()
        assert (actual - exact).abs().max() <= factor * (baseline - exact).abs().max() + 4e-6 * exact.abs().max()
    else:
        assert_no_worse(actual, baseline, exact, factor)


def nearly_exact(implementation, actual, exact):
    """Within two float32 roundings of the largest value; a few more where fewer than 8 elements may all be small."""
    eps, floor = (torch.finfo(actual.dtype).eps, 1e-5 if implementation == "amx" else 2e-6)
    if actual.numel() < 8:
        return bool(((actual - exact).abs() <= floor + max(eps, 2e-6) * exact.abs()).all())
    return actual.dtype == torch.float32 and bool((actual - exact).abs().max() <= 2.4e-7 * exact.abs().max())


def assert_one_draw(implementation, actual, draws, exact, factor=2.0):
    """Every result is nearly exact, or no worse than in one of the draws."""
    left = list(range(len(actual)))
    for number, baseline in enumerate(draws):
        for index in tuple(left):
            a, b, e = actual[index], baseline[index], exact[index]
            assert a.dtype == b.dtype
            try:
                if not nearly_exact(implementation, a, e):
                    assert_accurate(implementation, a, b, e, factor)
                left.remove(index)
            except AssertionError:
                if number == 3:
                    raise
        if not left:
            return
