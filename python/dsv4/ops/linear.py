"""Linear layers, on quantised weights and on plain ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.ops._check import FLOATS, KERNEL_FLOATS, Check
from dsv4.ops._exact import exact_matmul
from dsv4.ops._registry import no_gradient, register
from dsv4.ops.quantize import (
    E4M3,
    PACKED,
    SCALES,
    ceil_div,
    check_quantized_weight,
    dequantize_fp8_reference,
    dequantize_weight_reference,
    quantize_fp8_reference,
)

__all__ = [
    "dense_linear",
    "dense_linear_reference",
    "fp4_linear",
    "fp4_linear_reference",
    "fp8_linear",
    "fp8_linear_reference",
    "grouped_linear",
    "grouped_linear_reference",
]

_FEW_ROWS = 64


def few_rows(x: Tensor, rows: int) -> bool:
    """Whether a plain product of `rows` rows, whose rounding nothing prescribes, goes to a kernel and not to torch.

    Kernels are faster for the few rows of a decode step on a CPU: docs/investigations/decode_cpu.md.
    """
    return rows <= _FEW_ROWS and x.device.type == "cpu" and x.dtype in KERNEL_FLOATS


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """y = fp8(x) W^T: activations quantised to e4m3 in blocks of 128, weight e4m3 in blocks of 128 x 128.

    Every product is exact, the sum is rounded once to `out_dtype`. The definition adds in float64, kernels in float32,
    in an order that depends on `in` alone.

    Args:
        x:      [..., in] bfloat16, float32 or float64.
        weight: [out, in] float8_e4m3fn.
        scale:  [ceil(out / 128), ceil(in / 128)] float8_e8m0fnu or float32.
        out_dtype: bfloat16, float32 or float64; default that of x.
    Returns: [..., out] out_dtype. No gradient: train with plain weights.
    Raises: RuntimeError where a shape, dtype or device differs from the above.
    Source: the FP8 linear of the official inference code.
    """
    kernel = _kernel_takes(x, out_dtype)
    op = torch.ops.dsv4.fp8_linear if kernel else torch.ops.dsv4._fp8_linear_reference
    return op(x, weight, scale, out_dtype)


def fp8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return exact_matmul(
        quantized_activation(x), dequantize_weight_reference(weight, scale, torch.float64).mT, out_dtype or x.dtype
    )


def _check_fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> None:
    check = Check("fp8_linear")
    size = check.tensor("x", x, FLOATS, (..., "in"))[-1]
    check.tensor("weight", weight, (E4M3,), ("out", size))
    check_quantized_weight(check, "weight", weight, "scale", scale)
    _check_out_dtype(check, out_dtype)


def fp4_linear(x: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """y = fp8(x) W^T: activations quantised to e4m3 in blocks of 128, weight packed e2m1 in blocks of 32 inputs.

    Every product is exact, the sum is rounded once to `out_dtype`. The definition adds in float64, kernels in float32,
    in an order that depends on `in` alone.

    Args:
        x:      [..., in] bfloat16, float32 or float64; in even.
        weight: [out, in / 2] int8 or uint8, the even input in the low nibble.
        scale:  [out, ceil(in / 32)] float8_e8m0fnu or float32.
        out_dtype: bfloat16, float32 or float64; default that of x.
    Returns: [..., out] out_dtype. No gradient: train with plain weights.
    Raises: RuntimeError where a shape, dtype or device differs from the above.
    Source: the FP4 linear of the official inference code (routed experts).
    """
    kernel = _kernel_takes(x, out_dtype)
    op = torch.ops.dsv4.fp4_linear if kernel else torch.ops.dsv4._fp4_linear_reference
    return op(x, weight, scale, out_dtype)


def fp4_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return fp8_linear_reference(x, weight, scale, out_dtype)


def _check_fp4_linear(x: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> None:
    check = Check("fp4_linear")
    size = check.tensor("x", x, FLOATS, (..., "in"))[-1]
    check.that(size % 2 == 0, f"the last dimension of x must be even, got {size}")
    check.tensor("weight", weight, PACKED, ("out", size // 2))
    check_quantized_weight(check, "weight", weight, "scale", scale)
    _check_out_dtype(check, out_dtype)


def grouped_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """y[:, g] = x[:, g] W_g^T: each group of heads has rows of the weight of its own. Activations are not quantised.

    With a scale the weight is dequantised and the sum rounded once to the dtype of x (kernels add in float32, in an
    order that depends on `in` alone); without, a plain product in that dtype, which torch multiplies where there are
    many tokens.

    Args:
        x:      [tokens, groups, in] bfloat16, float32 or float64.
        weight: [groups * out, in] float8_e4m3fn with a scale; the dtype of x without.
        scale:  [ceil(groups * out / 128), ceil(in / 128)] float8_e8m0fnu or float32, or None.
    Returns: [tokens, groups, out] in the dtype of x. Differentiable in x and in a plain weight.
    Raises: RuntimeError where a shape, dtype or device differs from the above.
    Source: the grouped output projection (wo_a) of the official inference code.
    """
    kernel = x.dtype in KERNEL_FLOATS if scale is not None else few_rows(x, x.shape[0])
    op = torch.ops.dsv4.grouped_linear if kernel else torch.ops.dsv4._grouped_linear_reference
    return op(x, weight, scale)


def grouped_linear_reference(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    groups = x.shape[1]
    wide = weight if scale is None else dequantize_weight_reference(weight, scale, torch.float64)
    per_group = wide.unflatten(0, (groups, wide.shape[0] // groups)).mT  # [groups, in, out]
    rows = x.transpose(0, 1)
    y = torch.matmul(rows, per_group) if scale is None else exact_matmul(rows, per_group, x.dtype)
    return y.transpose(0, 1).contiguous()


def _save_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx[:, g] = dy[:, g] W_g, dW_g = dy[:, g]^T x[:, g]."""
    x, weight, scale = ctx.saved_tensors
    needs_x, needs_weight, *needs_scale = ctx.needs_input_grad
    if any(needs_scale):
        raise RuntimeError("grouped_linear: scale has no gradient; train with plain weights (quantization='off')")
    rows, groups = grad.transpose(0, 1), x.shape[1]  # [groups, tokens, out]
    grad_x = grad_weight = None
    if needs_x:
        wide = weight if scale is None else dequantize_weight_reference(weight, scale, torch.float64)
        per_group = wide.unflatten(0, (groups, wide.shape[0] // groups))
        product = torch.matmul(rows, per_group) if scale is None else exact_matmul(rows, per_group, x.dtype)
        grad_x = product.transpose(0, 1)
    if needs_weight:
        grad_weight = torch.matmul(rows.mT, x.transpose(0, 1)).flatten(0, 1)
    return grad_x, grad_weight, None


def _check_grouped_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> None:
    check = Check("grouped_linear")
    _, groups, size = check.tensor("x", x, FLOATS, ("tokens", "groups", "in"))
    check.that(groups >= 1, f"x must have at least one group, got {groups}")
    rows = check.tensor("weight", weight, (x.dtype,) if scale is None else (E4M3,), ("groups * out", size))[0]
    check.that(rows % groups == 0, f"weight must have a multiple of {groups} rows, one part a group, got {rows}")
    if scale is not None:
        check.tensor("scale", scale, SCALES, (ceil_div(rows, 128), ceil_div(size, 128)))


def dense_linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """y = x W^T with a plain weight, a row's result independent of the rows beside it.

    Operands are taken as they are, whatever their dtypes; the sum is rounded once to `out_dtype`. The definition adds
    in float64, kernels in float32, in an order that depends on `in` alone.

    Args:
        x:      [..., in] bfloat16, float32 or float64.
        weight: [out, in] bfloat16, float32 or float64.
        out_dtype: bfloat16, float32 or float64; default that of x.
    Returns: [..., out] out_dtype. Differentiable in x and weight.
    Raises: RuntimeError where a shape, dtype or device differs from the above.
    Source: the linear layers that the official inference code computes in float32 (compressor, index weights, logits).
    """
    kernel = _kernel_takes(x, out_dtype) and weight.dtype in KERNEL_FLOATS
    op = torch.ops.dsv4.dense_linear if kernel else torch.ops.dsv4._dense_linear_reference
    return op(x, weight, out_dtype)


def dense_linear_reference(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return exact_matmul(x, weight.mT, out_dtype or x.dtype)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _dense_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = dy W, dW = dy^T x: the same products, of transposed operands."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    grad_x = dense_linear(grad, weight.mT, x.dtype) if needs_x else None
    if not needs_weight:
        return grad_x, None, None
    rows = math.prod(x.shape[:-1])
    by_output, by_input = grad.reshape(rows, weight.shape[0]).mT, x.reshape(rows, weight.shape[1]).mT
    return grad_x, dense_linear(by_output, by_input, weight.dtype), None


def _check_dense_linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> None:
    check = Check("dense_linear")
    size = check.tensor("x", x, FLOATS, (..., "in"))[-1]
    check.tensor("weight", weight, FLOATS, ("out", size))
    _check_out_dtype(check, out_dtype)


def quantized_activation(x: Tensor) -> Tensor:
    """x after the FP8 quantiser of activations, float64."""
    codes, scale = quantize_fp8_reference(x, 128)
    return dequantize_fp8_reference(codes, scale, 128, torch.float64)


def _products(x: Sequence[int], weight: Sequence[int], *others: Any, **named: Any) -> int:
    return math.prod(x) * weight[0]


def _grouped_products(x: Sequence[int], weight: Sequence[int], *others: Any, **named: Any) -> int:
    return x[0] * x[2] * weight[0]


def _kernel_takes(x: Tensor, out_dtype: torch.dtype | None) -> bool:
    return x.dtype in KERNEL_FLOATS and (out_dtype is None or out_dtype in KERNEL_FLOATS)


def _check_out_dtype(check: Check, dtype: torch.dtype | None) -> None:
    check.that(dtype is None or dtype in FLOATS, f"out_dtype must be bfloat16, float32 or float64, got {dtype}")


for _name, _reference, _check in (
    ("fp8_linear", fp8_linear_reference, _check_fp8_linear),
    ("fp4_linear", fp4_linear_reference, _check_fp4_linear),
):
    _backward, _setup_context = no_gradient(_name, "train with plain weights (quantization='off')")
    for _op in (_name, f"_{_name}_reference"):  # the second takes float64, which kernels do not
        register(
            f"{_op}(Tensor x, Tensor weight, Tensor scale, ScalarType? out_dtype=None) -> Tensor",
            _reference,
            check=_check,
            backward=_backward,
            setup_context=_setup_context,
            products=_products,
        )
for _op in ("grouped_linear", "_grouped_linear_reference"):  # the second takes float64 and plain weights
    register(
        f"{_op}(Tensor x, Tensor weight, Tensor? scale=None) -> Tensor",
        grouped_linear_reference,
        check=_check_grouped_linear,
        backward=_grouped_linear_backward,
        setup_context=_save_grouped,
        products=_grouped_products,
    )
for _op in ("dense_linear", "_dense_linear_reference"):  # the second takes float64
    register(
        f"{_op}(Tensor x, Tensor weight, ScalarType? out_dtype=None) -> Tensor",
        dense_linear_reference,
        check=_check_dense_linear,
        backward=_dense_linear_backward,
        setup_context=_save_operands,
        products=_products,
    )
