"""Rounding plain weights to the formats of the release."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4 import ops
from dsv4.checkpoint.expected import FP8_BLOCK

_E4M3_MAX = 448.0


def quantize_weight_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 pair of a plain weight [out, in]: codes e4m3 [out, in], scale e8m0 [ceil(out / 128), ceil(in / 128)].

    A block's scale is the smallest power of two that brings its largest magnitude to 448 or below (1 for zeros).
    """
    out, inputs = weight.shape
    padded = F.pad(weight.float(), (0, -inputs % FP8_BLOCK, 0, -out % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    amax = blocks.abs().amax(dim=(1, 3))
    # frexp is exact, a logarithm is not: amax = mantissa * 2^exponent with mantissa in [0.5, 1).
    mantissa, exponent = torch.frexp(amax / _E4M3_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    scale = torch.where(amax > 0, torch.ldexp(torch.ones_like(amax), exponent), torch.ones_like(amax))
    codes = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:out, :inputs]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale.to(torch.float8_e8m0fnu)


def quantize_weight_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 pair of a plain weight [out, in]: codes int8 [out, in / 2], even input low; scale e8m0 [out, in / 32]."""
    codes, scale = ops.quantize_fp4(weight.float())
    return codes.view(torch.int8), scale
