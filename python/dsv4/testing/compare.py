"""How far two results are apart, in the measures that the numerics contract uses."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGER_OF_SIZE[x.element_size()]) if x.dim() else _bits(x.reshape(1))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and every bit: 0 and -0 differ, equal NaNs do not."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def assert_same_bits(a: Tensor, b: Tensor, what: str = "result") -> None:
    if same_bits(a, b):
        return
    if a.shape != b.shape or a.dtype != b.dtype:
        raise AssertionError(f"{what}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
    differs = _bits(a) != _bits(b)
    where = tuple(differs.nonzero()[0].tolist()) if a.dim() else 0
    first, second = (a[where], b[where]) if a.dim() else (a, b)
    raise AssertionError(
        f"{what}: {int(differs.sum())} of {a.numel()} differ, first at {where}: {first.item()} against {second.item()}"
    )


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """Number of representable steps between elements of one float dtype (bfloat16, float16, float32), int64.

    Both zeros are one value. A NaN is at distance 0 from a NaN and at 2^40 from anything else.
    """
    if a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"ulp_distance: needs one float dtype of 16 or 32 bits, got {a.dtype} and {b.dtype}")

    def ordered(x: Tensor) -> Tensor:
        bits = _bits(x).long()
        sign = 1 << (8 * x.element_size() - 1)
        return torch.where(bits < 0, -(bits + sign), bits)

    distance = (ordered(a) - ordered(b)).abs()
    both, either = a.isnan() & b.isnan(), a.isnan() | b.isnan()
    return torch.where(both, 0, torch.where(either, 1 << 40, distance)).reshape(a.shape)


def relative_rms(result: Tensor, expected: Tensor) -> Tensor:
    """rms(result - expected) / rms(expected) over the last dimension, float64 [...]. Equal zero rows give 0."""
    error = (result.double() - expected.double()).square().mean(-1).sqrt()
    size = expected.double().square().mean(-1).sqrt()
    return torch.where(error == 0, error, error / size)


def assert_no_worse(result: Tensor, baseline: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Fails where `result` is more than `factor` times as far from the float64 truth as `baseline`, the same maths in
    torch in the same dtype; by root mean square and by the largest element. One rounding is never too far."""
    if exact.dtype != torch.float64:
        raise ValueError(f"assert_no_worse: exact must be float64, got {exact.dtype}")
    if not torch.isfinite(result).all():
        raise AssertionError("result holds a value that is not finite")
    own, other = (result.double() - exact).abs(), (baseline.double() - exact).abs()
    if own.numel() == 0:
        return
    eps = torch.finfo(result.dtype).eps
    once_rms, once_largest = exact.square().mean().sqrt() * eps / 4, exact.abs().max() * eps / 2
    for name, mine, allowed in (
        ("rms", own.square().mean().sqrt(), factor * other.square().mean().sqrt() + once_rms),
        ("largest", own.max(), factor * other.max() + once_largest),
    ):
        if mine > allowed:
            raise AssertionError(f"{name} error {mine:.3e}, allowed {allowed:.3e} ({factor} x the same maths in torch)")
