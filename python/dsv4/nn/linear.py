"""Linear layers: released FP8 weights as stored, or plain ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4 import ops
from dsv4.ops.linear import few_rows

FP8_BLOCK = 128


DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_mode(quantization: str, dtype: torch.dtype) -> str:
    """The quantization. ValueError where layers have none of that name, or no such dtype of activations and weights."""
    if quantization not in ("checkpoint", "off"):
        raise ValueError(f'quantization must be "checkpoint" or "off", got {quantization!r}')
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    return quantization


def empty_parameter(*shape: int, dtype: torch.dtype, trainable: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=trainable and dtype.is_floating_point)


@torch.no_grad()
def fill_normal(weight: Tensor) -> None:
    """Normal values of standard deviation 1 / sqrt(inputs); nothing to do on the meta device."""
    if not weight.is_meta:
        weight.copy_(torch.randn(weight.shape, device=weight.device) * weight.shape[-1] ** -0.5)


@torch.no_grad()
def fill_fp8(weight: Tensor, scale: Tensor) -> None:
    """The same distribution as FP8 codes under one power-of-two scale."""
    if weight.is_meta:
        return
    exponent = math.floor(math.log2(weight.shape[-1] ** -0.5 / 64))
    values = torch.randn(weight.shape, device=weight.device) * (weight.shape[-1] ** -0.5 / 2.0**exponent)
    weight.copy_(values.clamp(-448, 448))
    scale.copy_(torch.full(scale.shape, 2.0**exponent, device=scale.device))


def _fp8_pair(outputs: int, inputs: int, scale_dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    """Codes [outputs, inputs] and their scales, one for each block of 128 x 128."""
    weight = empty_parameter(outputs, inputs, dtype=torch.float8_e4m3fn, trainable=False)
    blocks = (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK))
    scale = empty_parameter(*blocks, dtype=scale_dtype, trainable=False)
    fill_fp8(weight, scale)
    return weight, scale


_STORED = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


class StoredWeights(nn.Module):
    """A module some of whose weights may be codes and their scales, which mean nothing in another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeights:
        codes = next((p for p in self.parameters() if p.dtype in _STORED), None)
        if codes is not None and fn(codes.detach()[:0]).dtype != codes.dtype:
            raise ValueError(
                "weights as stored have no other dtype: load or make the model with dtype=, or in mode 'off'"
            )
        return super()._apply(fn, recurse)


def as_taken(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain weight in the dtype of activations, which autocast or mixed precision may have made another; codes as
    they are."""
    return weight.to(dtype) if weight.dtype.itemsize > 1 else weight


class Linear(nn.Module):
    """`y = x W^T` with a plain weight, in the input's dtype.

    Args:
        in_features, out_features: widths.
        dtype: of the weight.
        wide: products of float32 operands, float32 result (compressor, index weights, logits); float64 stays float64.
        exact: through `ops.dense_linear`, so that a row's result does not depend on the rows beside it.
        trainable: whether the weight has a gradient.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        *,
        wide: bool = False,
        exact: bool = False,
        trainable: bool = True,
    ):
        super().__init__()
        self.weight = empty_parameter(out_features, in_features, dtype=dtype, trainable=trainable)
        self.wide = wide
        self.exact = exact
        fill_normal(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], a float dtype -> [..., out_features]. RuntimeError: another width."""
        dtype = torch.promote_types(x.dtype, torch.float32) if self.wide else x.dtype
        if self.exact or few_rows(x, math.prod(x.shape[:-1])):
            return ops.dense_linear(x, self.weight, dtype)
        device = "cpu" if x.is_meta else x.device.type  # torch.autocast knows no meta
        with torch.autocast(device, enabled=False):  # the result has the dtype that the ops after it take
            return F.linear(x.to(dtype), self.weight.to(dtype))


class Fp8Linear(StoredWeights):
    """`y = quantize(x) dequantize(W)^T`: weight e4m3 [out, in] with one scale per 128 x 128 block, as released.

    Args:
        in_features, out_features: widths; the last blocks may be partial.
        scale_dtype: float8_e8m0fnu, as released, or float32.
    """

    def __init__(self, in_features: int, out_features: int, scale_dtype: torch.dtype = torch.float8_e8m0fnu):
        super().__init__()
        self.weight, self.scale = _fp8_pair(out_features, in_features, scale_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in its dtype; dtypes and errors of `ops.fp8_linear`."""
        return ops.fp8_linear(x, self.weight, self.scale)


class GroupedLinear(StoredWeights):
    """One weight a group of heads: x [tokens, groups, in] -> [tokens, groups, out]. Activations are never quantised.

    Args:
        groups, in_features, out_features: the weight is [groups * out_features, in_features].
        quantization: "checkpoint" (FP8 codes with scales of 128 x 128 blocks) or "off".
        dtype: of the weight in mode "off".
    Raises:
        ValueError: unknown quantization or dtype.
    """

    def __init__(self, groups: int, in_features: int, out_features: int, quantization: str, dtype: torch.dtype):
        super().__init__()
        self.scale: nn.Parameter | None = None
        if check_mode(quantization, dtype) == "checkpoint":
            self.weight, self.scale = _fp8_pair(groups * out_features, in_features, torch.float8_e8m0fnu)
        else:
            self.weight = empty_parameter(groups * out_features, in_features, dtype=dtype, trainable=True)
            fill_normal(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, groups, in_features] -> [tokens, groups, out_features]; errors of `ops.grouped_linear`."""
        return ops.grouped_linear(x, as_taken(self.weight, x.dtype), self.scale)


def linear(in_features: int, out_features: int, quantization: str, dtype: torch.dtype) -> nn.Module:
    """The layer that a weight released as an FP8 pair becomes in this mode."""
    if quantization == "checkpoint":
        return Fp8Linear(in_features, out_features)
    return Linear(in_features, out_features, dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight over the last axis: `ops.rms_norm`.

    Args:
        width: of the last axis.
        eps: added to the mean of the squares.
        dtype: of the weight.
        trainable: whether it has a gradient.
    """

    def __init__(self, width: int, eps: float, dtype: torch.dtype, trainable: bool = True):
        super().__init__()
        self.weight = empty_parameter(width, dtype=dtype, trainable=trainable)
        self.eps = eps
        if not self.weight.is_meta:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same; dtypes and errors of `ops.rms_norm`."""
        return ops.rms_norm(x, self.weight, self.eps)
