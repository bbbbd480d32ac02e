"""Buffers that notice a write outside of the tensor they hold."""

from __future__ import annotations

import torch
from torch import Tensor

_BAND = 4096
_PATTERN = 0xA5


class Guarded:
    """A tensor with 4,096 patterned bytes before and after it.

    `tensor` holds a copy of the values given; `check()` fails if a byte of either band has changed.
    """

    def __init__(self, values: Tensor) -> None:
        size = values.numel() * values.element_size()
        self._memory = torch.full((2 * _BAND + size,), _PATTERN, dtype=torch.uint8, device=values.device)
        self.tensor = self._memory[_BAND : _BAND + size].view(values.dtype).view(values.shape)
        self.tensor.copy_(values)

    def check(self) -> None:
        for name, band in (("before", self._memory[:_BAND]), ("after", self._memory[-_BAND:])):
            changed = (band != _PATTERN).nonzero().flatten()
            if len(changed):
                raise AssertionError(f"{len(changed)} bytes {name} the tensor were written, first at {int(changed[0])}")
