"""Argument checks of ops that Python implements, in the words of csrc/torch:

fp8_linear: scale must be float8_e8m0fnu or float32 [2, 2], got bfloat16 [2, 3]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

KERNEL_FLOATS = (torch.bfloat16, torch.float32)
FLOATS = (torch.bfloat16, torch.float32, torch.float64)
ANY_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLOAT32_OR_64 = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: Any) -> str:
    """A tensor as `float32 [2, 3]`, anything else as its type's name."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {_shape_text(tuple(value.shape))}"
    return "None" if value is None else f"{type(value).__name__} {value}"


def _shape_text(shape: Sequence[Any]) -> str:
    return "[" + ", ".join("..." if size is ... else str(size) for size in shape) + "]"


class Check:
    """Checks of one op. A size is an int, a label such as "tokens" that any size satisfies, or ... in front for any
    leading dimensions. Every failure is a RuntimeError, as from torch's own ops and from ours in C++."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._device: tuple[str, torch.device] | None = None

    def fail(self, message: str) -> NoReturn:
        raise RuntimeError(f"{self.op}: {message}")

    def that(self, condition: bool, message: str) -> None:
        if not condition:
            self.fail(message)

    def tensor(self, name: str, value: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[Any]) -> torch.Size:
        """Checks dtype, shape, and that all tensors of a call are on one device; returns the shape."""
        # None too: torch takes it for a tensor.
        if value is None or value.dtype not in dtypes or not _fits(tuple(value.shape), tuple(shape)):
            expected = " or ".join(dtype_name(dtype) for dtype in dtypes)
            self.fail(f"{name} must be {expected} {_shape_text(shape)}, got {describe(value)}")
        if self._device is None:
            self._device = (name, value.device)
        elif value.device != self._device[1]:
            self.fail(f"{name} must be on {self._device[1]} as {self._device[0]} is, got {value.device}")
        return value.shape

    def written(self, name: str, value: Tensor) -> None:
        """Checks of a tensor that the op writes that each element has its own memory."""
        expanded = any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))
        self.that(not expanded, f"{name} must not be expanded, since it is written; clone it")

    def optional(
        self, name: str, value: Tensor | None, dtypes: Sequence[torch.dtype], shape: Sequence[Any]
    ) -> torch.Size | None:
        return None if value is None else self.tensor(name, value, dtypes, shape)


def _fits(actual: tuple[int, ...], expected: tuple[Any, ...]) -> bool:
    if expected and expected[0] is ...:
        expected = expected[1:]
        if len(actual) < len(expected):
            return False
        actual = actual[len(actual) - len(expected) :]
    if len(actual) != len(expected):
        return False
    return all(isinstance(want, str) or want == have for have, want in zip(actual, expected, strict=True))
