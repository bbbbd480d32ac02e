"""torch.func and forward mode: ops have gradients of torch.autograd alone, and say so instead of giving zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsv4 import ops

MESSAGE = r"rms_norm: has gradients of torch.autograd alone; use backward or torch.autograd.grad"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
        lambda f, x: torch.func.vjp(f, x)[1](x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y).sum()))(x),
    ],
)
def test_refused(transform: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match=MESSAGE):
        transform(ops.rms_norm, x)


def test_forward_mode_is_refused() -> None:
    x = torch.randn(3, 8)
    with forward_ad.dual_level():
        assert torch.equal(ops.rms_norm(x), ops.rms_norm_reference(x))  # no tangent, nothing to refuse
        with pytest.raises(RuntimeError, match=MESSAGE):
            ops.rms_norm(forward_ad.make_dual(x, x))


def test_vmap() -> None:
    x = torch.randn(4, 3, 8)
    weight = torch.randn(8, requires_grad=True)
    assert torch.equal(torch.func.vmap(lambda rows: ops.rms_norm(rows, weight))(x), ops.rms_norm(x, weight))
