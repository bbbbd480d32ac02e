"""Matrix products of the references: exact enough that the order of summation does not show."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_matmul(x: Tensor, w_t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x @ w_t, accumulated in float64 and rounded once to `dtype` (default: that of x).

    torch's float32 product changes its order of summation with the shapes, so a row's bits depend on the rows beside
    it. Products of FP8, FP4 and BF16 operands are exact in float64 and their sums all but exact, so that after the one
    rounding the row's result depends on the row alone.

    Args:
        x: [..., n]. w_t: [n, m] or [..., n, m] (a weight transposed). dtype: of the result.
    Returns: [..., m] dtype.
    """
    return (x.double() @ w_t.double()).to(dtype or x.dtype)
