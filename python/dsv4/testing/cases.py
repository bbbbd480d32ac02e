"""Case lists and inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grid(**axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes as pytest parameters: one dict each, named like `tokens=7-hidden=64`."""
    import pytest

    cases = []
    for values in itertools.product(*axes.values()):
        case = dict(zip(axes, values, strict=True))
        cases.append(pytest.param(case, id="-".join(f"{name}={value}" for name, value in case.items())))
    return cases


def strided(x: Tensor) -> Tensor:
    """The same values in memory with gaps: neighbours in the last dimension lie two elements apart, rows further."""
    wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1] + 3), dtype=torch.uint8).to(x.dtype)
    view = wide[..., 1 : 2 * x.shape[-1] + 1 : 2]
    view.copy_(x)
    return view
