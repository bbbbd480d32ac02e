"""What torch.utils.flop_counter.FlopCounterMode counts of the ops: 2 FLOPs a multiply-add of their products.

From shapes alone, as torch counts its own, so where values decide, the most that the shapes leave room for: every
expert that a routing names exists, every row of `index_topk` scores all entries that its table has pages for, every row
of `sparse_attention` has a full window and as many entries as `indices` has columns, or as the table has pages for
without. Norms, softmax, rotations and what `compress` pools are no products.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_products: dict[str, Callable[..., int]] = {}


def count_products(op: str, products: Callable[..., int]) -> None:
    """Has `op` counted. `products` takes the op's arguments, with shapes in place of tensors, and returns
    multiply-adds."""
    _products[op] = products
    if _COUNTER in sys.modules:
        _add(op)


def _add(op: str) -> None:
    def flops(*arguments: Any, out_shape: Any = None, **named: Any) -> int:
        return 2 * _products[op](*arguments, **named)

    sys.modules[_COUNTER].register_flop_formula(getattr(torch.ops.dsv4, op))(flops)


class _WhenImported(MetaPathFinder):
    """Adds the ops to torch's counter as soon as a program imports it. To import it here would import triton, a quarter
    of a second, in every program on a machine that has one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            for op in _products:
                _add(op)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WhenImported())
