"""FP8 and FP4 block quantisers, their inverses, and the Hadamard rotation.

A block of consecutive values shares one power-of-two scale, stored as e8m0 (byte b is 2^(b - 127), 255 is NaN).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.ops._check import FLOATS, KERNEL_FLOATS, Check
from dsv4.ops._registry import no_gradient, register

__all__ = [
    "dequantize_fp4",
    "dequantize_fp4_reference",
    "dequantize_fp8",
    "dequantize_fp8_reference",
    "dequantize_weight",
    "dequantize_weight_reference",
    "fp4_round_trip",
    "fp8_round_trip",
    "hadamard",
    "hadamard_reference",
    "quantize_fp4",
    "quantize_fp4_reference",
    "quantize_fp8",
    "quantize_fp8_reference",
]

E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
SCALES = (E8M0, torch.float32)
PACKED = (torch.uint8, torch.int8)

_MOST_CUDA_DIMS = 8192  # of a row that the Hadamard kernel holds in shared memory

_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_FP8_FLOOR = 1e-4
_FP4_FLOOR = 6.0 * 2.0**-126
# Midpoints between neighbouring e2m1 magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6. A tie goes to the even code: upwards where
# the lower code is odd.
_E2M1_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_E2M1_TIES_UP = (0.75, 1.75, 3.5)
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def ceil_div(count: int, block: int) -> int:
    return (count + block - 1) // block


def quantize_fp8(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Quantise blocks along the last dimension to e4m3 with one e8m0 scale each.

    scale = 2^ceil(log2(max(amax, 1e-4) * fl32(1/448))); code = e4m3(clamp(x / scale, +-448)), nearest, ties to even.
    The last block may be shorter. A block that holds an infinity or a NaN gets scale NaN and NaN codes.

    Args:
        x:     [..., n] bfloat16, float32 or float64 (read as float32).
        block: values that share a scale; 128 for activations, 64 for rows of the KV cache.
    Returns: codes float8_e4m3fn [..., n], scale float8_e8m0fnu [..., ceil(n / block)].
    Raises: RuntimeError on another dtype, a scalar x, or block < 1.
    Not differentiable.
    Source: the activation quantiser of the official inference code.
    """
    op = torch.ops.dsv4.quantize_fp8 if x.dtype in KERNEL_FLOATS else torch.ops.dsv4._quantize_fp8_reference
    return op(x, block)


def quantize_fp8_reference(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    blocks = _blocks(x.float(), block)
    scale, byte = _power_of_two_scale(blocks, _FP8_FLOOR, _E4M3_MAX)
    scaled = (blocks / scale.unsqueeze(-1)).clamp(-_E4M3_MAX, _E4M3_MAX)
    codes = torch.where(scaled.isnan(), torch.nan, scaled).to(E4M3)  # one NaN, whatever its sign was
    return _unblock(codes, x), byte.view(E8M0)


def _check_quantize_fp8(x: Tensor, block: int = 128) -> None:
    check = Check("quantize_fp8")
    check.tensor("x", x, FLOATS, (..., "n"))
    check.that(block >= 1, f"block must be at least 1, got {block}")


def quantize_fp4(x: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    """Quantise blocks along the last dimension to e2m1 with one e8m0 scale each.

    scale = 2^ceil(log2(max(amax, 6 * 2^-126) * fl32(1/6))); code = e2m1(clamp(x / scale, +-6)), nearest, ties to even;
    the sign of a zero is kept. The last block may be shorter. A block that holds an infinity or a NaN gets scale NaN
    and codes 0.

    Args:
        x:     [..., n] bfloat16, float32 or float64 (read as float32); n even.
        block: values that share a scale; even.
    Returns: codes uint8 [..., n / 2], the even value in the low nibble; scale float8_e8m0fnu [..., ceil(n / block)].
    Raises: RuntimeError on another dtype, a scalar x, odd n, or block not even and positive.
    Not differentiable.
    Source: the index quantiser of the official inference code.
    """
    op = torch.ops.dsv4.quantize_fp4 if x.dtype in KERNEL_FLOATS else torch.ops.dsv4._quantize_fp4_reference
    return op(x, block)


def quantize_fp4_reference(x: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    blocks = _blocks(x.float(), block)
    scale, byte = _power_of_two_scale(blocks, _FP4_FLOOR, _E2M1_MAX)
    scaled = (blocks / scale.unsqueeze(-1)).nan_to_num(nan=0.0)
    magnitude = scaled.abs()
    codes = torch.signbit(scaled).to(torch.uint8) << 3
    for midpoint in _E2M1_TIES_DOWN:
        codes = codes + (magnitude > midpoint).to(torch.uint8)
    for midpoint in _E2M1_TIES_UP:
        codes = codes + (magnitude >= midpoint).to(torch.uint8)
    codes = _unblock(codes, x)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), byte.view(E8M0)


def _check_quantize_fp4(x: Tensor, block: int = 32) -> None:
    check = Check("quantize_fp4")
    shape = check.tensor("x", x, FLOATS, (..., "n"))
    check.that(shape[-1] % 2 == 0, f"the last dimension of x must be even, got {shape[-1]}")
    check.that(block >= 2 and block % 2 == 0, f"block must be even and at least 2, got {block}")


def dequantize_fp8(codes: Tensor, scale: Tensor, block: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values of codes that share a scale along the last dimension: code * scale, rounded once to `dtype`.

    Args:
        codes: [..., n] float8_e4m3fn.
        scale: [..., ceil(n / block)] float8_e8m0fnu or float32.
        block: values that share a scale.
        dtype: bfloat16, float32 or float64. With e8m0 scales all three are exact short of under- and overflow.
    Returns: [..., n] dtype.
    Raises: RuntimeError where a shape or dtype differs from the above.
    Not differentiable.
    """
    op = torch.ops.dsv4.dequantize_fp8 if dtype in KERNEL_FLOATS else torch.ops.dsv4._dequantize_fp8_reference
    return op(codes, scale, block, dtype)


def dequantize_fp8_reference(
    codes: Tensor, scale: Tensor, block: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    return _scaled(_blocks(codes.to(_wide_for(dtype)), block), scale, codes, dtype)


def _check_dequantize_fp8(codes: Tensor, scale: Tensor, block: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
    check = Check("dequantize_fp8")
    shape = check.tensor("codes", codes, (E4M3,), (..., "n"))
    check.that(block >= 1, f"block must be at least 1, got {block}")
    check.tensor("scale", scale, SCALES, (*shape[:-1], ceil_div(shape[-1], block)))
    _check_result_dtype(check, dtype)


def dequantize_fp4(codes: Tensor, scale: Tensor, block: int = 32, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values of packed e2m1 codes that share a scale along the last dimension: value * scale, rounded once to `dtype`.

    Args:
        codes: [..., n / 2] uint8 or int8, the even value in the low nibble.
        scale: [..., ceil(n / block)] float8_e8m0fnu or float32.
        block: values that share a scale.
        dtype: bfloat16, float32 or float64.
    Returns: [..., n] dtype.
    Raises: RuntimeError where a shape or dtype differs from the above.
    Not differentiable.
    """
    op = torch.ops.dsv4.dequantize_fp4 if dtype in KERNEL_FLOATS else torch.ops.dsv4._dequantize_fp4_reference
    return op(codes, scale, block, dtype)


def dequantize_fp4_reference(
    codes: Tensor, scale: Tensor, block: int = 32, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    values = unpack_fp4(codes, _wide_for(dtype))
    return _scaled(_blocks(values, block), scale, values, dtype)


def _check_dequantize_fp4(codes: Tensor, scale: Tensor, block: int = 32, dtype: torch.dtype = torch.bfloat16) -> None:
    check = Check("dequantize_fp4")
    shape = check.tensor("codes", codes, PACKED, (..., "n / 2"))
    check.that(block >= 2 and block % 2 == 0, f"block must be even and at least 2, got {block}")
    check.tensor("scale", scale, SCALES, (*shape[:-1], ceil_div(2 * shape[-1], block)))
    _check_result_dtype(check, dtype)


def dequantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A released weight in a plain dtype: 128 x 128 blocks of e4m3, or rows of packed e2m1 in blocks of 32.

    Args:
        weight: [..., out, in] float8_e4m3fn, or [..., out, in / 2] uint8 or int8 with the even input in the low nibble.
        scale:  float8_e8m0fnu or float32, [..., ceil(out / 128), ceil(in / 128)] for e4m3, [..., out, ceil(in / 32)]
            for e2m1.
        dtype:  bfloat16, float32 or float64.
    Returns: [..., out, in] dtype.
    Raises: RuntimeError where a shape or dtype differs from the above.
    Not differentiable.
    """
    kernel = dtype in KERNEL_FLOATS
    op = torch.ops.dsv4.dequantize_weight if kernel else torch.ops.dsv4._dequantize_weight_reference
    return op(weight, scale, dtype)


def dequantize_weight_reference(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if weight.dtype != E4M3:
        return dequantize_fp4_reference(weight, scale, 32, dtype)
    rows = scale.repeat_interleave(128, -2)[..., : weight.shape[-2], :]
    table = torch.arange(256, dtype=torch.uint8, device=weight.device).view(E4M3).to(_wide_for(dtype))
    return _scaled(_blocks(_look_up(table, weight), 128), rows, weight, dtype)


def _check_dequantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    check = Check("dequantize_weight")
    check_quantized_weight(check, "weight", weight, "scale", scale)
    _check_result_dtype(check, dtype)


def check_quantized_weight(check: Check, name: str, weight: Tensor, scale_name: str, scale: Tensor) -> tuple[int, int]:
    """Checks a released weight and its scale; returns (out, in)."""
    shape = check.tensor(name, weight, (E4M3, *PACKED), (..., "out", "in"))
    if weight.dtype == E4M3:
        blocks = (ceil_div(shape[-2], 128), ceil_div(shape[-1], 128))
        check.tensor(scale_name, scale, SCALES, (*shape[:-2], *blocks))
        return shape[-2], shape[-1]
    check.tensor(scale_name, scale, SCALES, (*shape[:-1], ceil_div(2 * shape[-1], 32)))
    return shape[-2], 2 * shape[-1]


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dimension by the Sylvester Hadamard matrix over sqrt(n), which is its own inverse.

    Args:
        x: [..., n] bfloat16, float32 or float64; n a power of two.
    Returns: like x; computed in float64, rounded once.
    Raises: RuntimeError on another dtype or n.
    Source: rotate_activation of the official inference code (index queries and keys).
    """
    kernel = x.dtype in KERNEL_FLOATS and not (x.is_cuda and x.shape[-1:].numel() > _MOST_CUDA_DIMS)
    op = torch.ops.dsv4.hadamard if kernel else torch.ops.dsv4._hadamard_reference
    return op(x)


def hadamard_reference(x: Tensor) -> Tensor:
    size = x.shape[-1]
    y = x.double().unsqueeze(-1)
    while y.shape[-2] > 1:
        even, odd = y[..., 0::2, :], y[..., 1::2, :]
        y = torch.cat((even + odd, even - odd), -1)
    return (y.reshape(x.shape) * size**-0.5).to(x.dtype)


def _check_hadamard(x: Tensor) -> None:
    check = Check("hadamard")
    size = check.tensor("x", x, FLOATS, (..., "n"))[-1]
    check.that(size > 0 and size & (size - 1) == 0, f"the last dimension of x must be a power of two, got {size}")


def fp8_round_trip(x: Tensor, block: int = 128) -> Tensor:
    """x after quantize_fp8 and dequantize_fp8: [..., n] bfloat16, float32 or float64, which the result is too.

    Raises: as quantize_fp8, in its name. Not differentiable.
    """
    codes, scale = quantize_fp8(x, block)
    return dequantize_fp8(codes, scale, block, x.dtype)


def fp4_round_trip(x: Tensor, block: int = 32) -> Tensor:
    """x after quantize_fp4 and dequantize_fp4: [..., n] bfloat16, float32 or float64, which the result is too; n even.

    Raises: as quantize_fp4, in its name. Not differentiable.
    """
    codes, scale = quantize_fp4(x, block)
    return dequantize_fp4(codes, scale, block, x.dtype)


def unpack_fp4(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The e2m1 values of packed codes, low nibble first: [..., n / 2] -> [..., n]."""
    values = torch.tensor(_E2M1_VALUES, dtype=dtype, device=codes.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)  # [byte, (low, high)]
    return _look_up(pairs, codes).flatten(-2)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[byte] of every 8-bit code. On a CPU several times faster than converting the codes, or than indexing."""
    found = table.index_select(0, codes.contiguous().view(torch.uint8).flatten().int())
    return found.view(*codes.shape, *table.shape[1:])


def _check_result_dtype(check: Check, dtype: torch.dtype) -> None:
    check.that(dtype in FLOATS, f"dtype must be bfloat16, float32 or float64, got {dtype}")


def _wide_for(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., n] -> [..., ceil(n / block), block], short blocks filled with zeros, which no amax notices."""
    missing = -x.shape[-1] % block
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (x.shape[-1] // block, block))


def _unblock(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.flatten(-2)[..., : like.shape[-1]].contiguous()


def _scaled(blocks: Tensor, scale: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return _unblock((blocks * scale.to(blocks.dtype).unsqueeze(-1)).to(dtype), like)


def _power_of_two_scale(blocks: Tensor, floor: float, largest: float) -> tuple[Tensor, Tensor]:
    """The scale of each block as float32 and as an e8m0 byte."""
    ratio = blocks.abs().amax(-1).clamp(min=floor) * torch.tensor(1.0 / largest, dtype=torch.float32)
    mantissa, exponent = torch.frexp(ratio)  # ratio = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    finite = torch.isfinite(ratio)
    byte = torch.where(finite, exponent + 127, 255).to(torch.uint8)
    return byte.view(E8M0).float(), byte


def _refused(op: str, mend: str) -> dict[str, Any]:
    backward, setup_context = no_gradient(op, mend)
    return {"backward": backward, "setup_context": setup_context}


for _prefix, _suffix in (("", ""), ("_", "_reference")):  # the second takes float64, which kernels do not
    register(
        f"{_prefix}quantize_fp8{_suffix}(Tensor x, int block=128) -> (Tensor, Tensor)",
        quantize_fp8_reference,
        check=_check_quantize_fp8,
        **_refused("quantize_fp8", "detach x"),
    )
    register(
        f"{_prefix}quantize_fp4{_suffix}(Tensor x, int block=32) -> (Tensor, Tensor)",
        quantize_fp4_reference,
        check=_check_quantize_fp4,
        **_refused("quantize_fp4", "detach x"),
    )
    register(
        f"{_prefix}dequantize_fp8{_suffix}(Tensor codes, Tensor scale, int block=128, ScalarType dtype=15) -> Tensor",
        dequantize_fp8_reference,
        check=_check_dequantize_fp8,
        **_refused("dequantize_fp8", "detach codes and scale"),
    )
    register(
        f"{_prefix}dequantize_fp4{_suffix}(Tensor codes, Tensor scale, int block=32, ScalarType dtype=15) -> Tensor",
        dequantize_fp4_reference,
        check=_check_dequantize_fp4,
        **_refused("dequantize_fp4", "detach scale"),
    )
    register(
        f"{_prefix}dequantize_weight{_suffix}(Tensor weight, Tensor scale, ScalarType dtype=15) -> Tensor",
        dequantize_weight_reference,
        check=_check_dequantize_weight,
        **_refused("dequantize_weight", "detach weight and scale"),
    )
    register(
        f"{_prefix}hadamard{_suffix}(Tensor x) -> Tensor",
        hadamard_reference,
        check=_check_hadamard,
        backward=lambda ctx, grad: hadamard(grad),
        setup_context=lambda ctx, inputs, output: None,
    )
