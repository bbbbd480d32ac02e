"""What torch has from libraries for products of quantised weights and of experts: _scaled_mm and _grouped_mm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4 import ops

_SCALED, _GROUPED = "torch._scaled_mm", "torch._grouped_mm bf16"
_BLOCK = 128
# Of another implementation's values; both round to bfloat16, and grouped experts do not quantise their rows.
_NEAR = {_SCALED: 0.01, _GROUPED: 0.1}


def _tried(name: str, run: Callable[[], Tensor], expected: Callable[[], Tensor]) -> dict[str, Any]:
    """`baseline` and `run_baseline` of a case: the latter None where torch refuses, or gives other values."""
    try:
        result = run().double()
    except (RuntimeError, ValueError) as refused:
        why = (str(refused).strip() or type(refused).__name__).splitlines()[0]
        return {"baseline": f"{name} not run: {why}", "run_baseline": None}
    exact = expected().double()
    difference = float((result - exact).norm() / exact.norm())
    if not difference <= _NEAR[name]:
        return {"baseline": f"{name} not run: differs by {difference:.1e}", "run_baseline": None}
    return {"baseline": name, "run_baseline": run}


def against_scaled_mm(x: Tensor, weight: Tensor, scale: Tensor, expected: Callable[[], Tensor]) -> dict[str, Any]:
    """`baseline` and `run_baseline` of a case of fp8_linear: the product alone, of rows that are quantised already.

    cuBLAS takes scales of 1 x 128 and 128 x 128 from CUDA 12.9 on, on Hopper.

    Args:
        x: [rows, in]. weight: e4m3 [out, in]. scale: e8m0 or float32 [out / 128, in / 128].
        expected: [rows, out], the op's.
    """
    codes, row_scale = ops.quantize_fp8(x, _BLOCK)
    # A column of row scales lies together; rows of the weight's are padded to multiples of four.
    row_scale = row_scale.float().mT.contiguous().mT
    blocks = scale.shape[1]
    weight_scale = F.pad(scale.float(), (0, -blocks % 4))[:, :blocks]

    def run() -> Tensor:
        return torch._scaled_mm(codes, weight.mT, row_scale, weight_scale.mT, out_dtype=torch.bfloat16)

    return _tried(_SCALED, run, expected)


def against_grouped_mm(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    matrices: tuple[Tensor, Tensor],
    limit: float,
    expected: Callable[[], Tensor],
) -> dict[str, Any]:
    """`baseline` and `run_baseline` of a case of moe_experts: rows sorted by expert, two grouped products.

    Args:
        x: bfloat16 [tokens, hidden]. weights, indices: [tokens, top_k].
        matrices: gate and up [experts, 2 inter, hidden], down [experts, hidden, inter], bfloat16.
        limit: of SwiGLU.
        expected: [tokens, hidden], the op's.
    """
    gate_up, down = (matrix.mT for matrix in matrices)
    top_k = indices.shape[1]

    def run() -> Tensor:
        owner, order = indices.flatten().sort(stable=True)
        experts = torch.arange(len(gate_up), dtype=owner.dtype, device=x.device)
        ends = torch.searchsorted(owner, experts, right=True, out_int32=True)
        gate, up = torch._grouped_mm(x[order // top_k], gate_up, offs=ends).chunk(2, -1)
        hidden = F.silu(gate.clamp_max(limit)) * up.clamp(-limit, limit)
        rows = torch._grouped_mm(hidden, down, offs=ends) * weights.flatten()[order].unsqueeze(1)
        return torch.zeros(x.shape, device=x.device).index_add_(0, order // top_k, rows).to(x.dtype)

    return _tried(_GROUPED, run, expected)
