"""A function of tensors as the list of ops it ran, and decoding with it.

A decode step of a small model spends as much time in Python (modules, attributes, argument parsing) as in its kernels.
The ops of a step and the order of their operands depend on shapes alone, so they are written down once and run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.cache import KVCache, LayerCache, Step
from dsv4.model.transformer import Transformer
from dsv4.nn.rows import Rows

MOST_ROWS = 64
"""Rows of a step up to which recording pays; beyond, kernels take the time."""


class NotRecordable(RuntimeError):
    """The function does something that a list of ops cannot repeat."""


class _Call(NamedTuple):
    """values[results] = op(*gather(values)); the spent values are not needed afterwards."""

    op: Callable[..., Any]
    gather: Callable[[list[Any]], tuple[Any, ...]]
    results: tuple[int, ...]
    single: bool
    spent: tuple[int, ...]


class Recording:
    """The ops that `function(*inputs)` ran, callable with other inputs of the same shapes, dtypes and devices.

    Tensors that are neither inputs nor made by the function (weights, cache pages) are kept by reference: changes of
    their values are seen, replacing them is not. `result` is what the recorded run returned.

    Args:
        function: tensors to one tensor, by torch ops alone. Gradients must be off.
        inputs: its arguments.
    Raises:
        NotRecordable: the function looks at a tensor's values, or returns what no recorded op made.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor):
        tape = _Tape(inputs)
        with tape:
            self.result = function(*inputs)
        self._inputs = len(inputs)
        self._values, self._calls, self._result = tape.program(self.result)

    def __call__(self, *inputs: Tensor) -> Tensor:
        values = self._values.copy()
        values[: self._inputs] = inputs
        for op, gather, results, single, spent in self._calls:
            if single:
                values[results[0]] = op(*gather(values))
            else:
                for slot, value in zip(results, op(*gather(values)) or (), strict=True):
                    values[slot] = value
            for slot in spent:
                values[slot] = None
        return values[self._result]

    def __len__(self) -> int:
        return len(self._calls)


class _Tape(TorchDispatchMode):
    """Writes down every op, with its operands as places in one list of values."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, a second's work, at the first op

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self._values: list[Any] = []
        self._slots: dict[int, int] = {}  # id of a tensor -> its place among the values
        self._alive: list[Tensor] = []  # so that an id names one tensor only
        self._calls: list[tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], bool]] = []
        self._made: set[int] = set()
        for tensor in inputs:
            self._slot(tensor, new=True)
        self._made.update(range(len(inputs)))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else () if result is None else (result,)
        if not all(isinstance(value, Tensor) for value in results):
            if any(self._is_made(value) for value in args) and not isinstance(result, torch.dtype):
                raise NotRecordable(f"{func} reads the value of a tensor")
            return result  # of dtypes and shapes alone: the same at every run
        if isinstance(result, Tensor) and not func._schema.is_mutable and _same(result, args[0]):
            # The operand itself, as of a conversion to the dtype or a reshape to the shape that it has.
            self._slots[id(result)] = self._slot(args[0])
            self._alive.append(result)
            return result
        operands = tuple(self._operand(value) for value in args)
        op = partial(func, **self._constants(func, kwargs)) if kwargs else func
        known = len(self._values)
        slots = tuple(self._slot(value) for value in results)
        self._made.update(slot for slot in slots if slot >= known)  # an op in place returns its operand
        self._calls.append((op, operands, slots, isinstance(result, Tensor)))
        return result

    def program(self, result: Tensor) -> tuple[list[Any], list[_Call], int]:
        """(values before a run, calls, place of the result)."""
        if self._slots.get(id(result)) not in self._made:
            raise NotRecordable("the result is not made by a recorded op")
        last = self._slots[id(result)]
        kept = {last, *range(len(self._values))} - self._made  # operands that no op makes
        spent: list[tuple[int, ...]] = []
        seen = {last}
        for _, operands, slots, _ in reversed(self._calls):
            free = {*operands, *slots} - seen - kept
            seen |= free
            spent.append(tuple(sorted(free)))
        calls = [
            _Call(op, _gather(operands), slots, single, free)
            for (op, operands, slots, single), free in zip(self._calls, reversed(spent), strict=True)
        ]
        return [value if slot in kept else None for slot, value in enumerate(self._values)], calls, last

    def _slot(self, value: Any, new: bool = False) -> int:
        if new or not isinstance(value, Tensor) or id(value) not in self._slots:
            self._values.append(value)
            if not isinstance(value, Tensor):
                return len(self._values) - 1
            self._alive.append(value)
            self._slots[id(value)] = len(self._values) - 1
        return self._slots[id(value)]

    def _operand(self, value: Any) -> int:
        if self._is_made(value) and not isinstance(value, Tensor):  # a list with tensors of this run
            operands = tuple(self._slot(part) for part in value)
            self._calls.append((_list, operands, (self._slot(None),), True))
            self._made.add(self._calls[-1][2][0])
            return self._calls[-1][2][0]
        return self._slot(value)

    def _is_made(self, value: Any) -> bool:
        """Whether an operand is, or holds, a tensor that differs from run to run."""
        if isinstance(value, list | tuple):
            return any(self._is_made(part) for part in value)
        return isinstance(value, Tensor) and self._slots.get(id(value)) in self._made

    def _constants(self, func: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in kwargs.items():
            if self._is_made(value):
                raise NotRecordable(f"{func} takes a tensor by the name {name}")
        return dict(kwargs)


def _same(tensor: Tensor, other: Any) -> bool:
    """Whether both are the same view of the same memory."""
    if tensor is other:
        return True
    return (
        isinstance(other, Tensor)
        and tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and tensor.data_ptr() == other.data_ptr()
        and tensor.numel() > 0
    )


def _list(*values: Any) -> list[Any]:
    return list(values)


def _gather(slots: tuple[int, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(slots) > 1:
        return itemgetter(*slots)
    return (lambda values: (values[slots[0]],)) if slots else (lambda values: ())


class RecordedModel:
    """`model(input_ids, cache, logits_to_keep=n)` for decoding: same results, bit for bit, with less time in Python.

    The second step of equal shapes is recorded, those after it repeat its ops. Steps of many rows, calls with gradients
    on or under a torch dispatch mode, and a model with forward hooks go to the model itself. While this is used, values
    of the model's tensors may change, but tensors must not be replaced nor hooks be added: make a new one then.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self._recordable = not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
        self._key: tuple[Any, ...] | None = None
        self._storage: Sequence[LayerCache] = ()
        self._recording: Recording | None = None

    def __call__(self, input_ids: Tensor, cache: KVCache, *, logits_to_keep: int = 0) -> Tensor:
        """Arguments, result and errors are those of `Transformer.forward`."""
        few = 0 < input_ids.numel() <= MOST_ROWS
        under_a_mode = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0
        if not few or under_a_mode or not self._recordable:
            return self.model(input_ids, cache, logits_to_keep=logits_to_keep)
        ids, counts = self.model.check_ids(input_ids, cache, None)
        step = self.model.begin(ids, counts, cache)
        with torch.inference_mode():
            logits = self._run(step, cache.layers, ids.shape, logits_to_keep)
        cache.commit(step)
        return logits.clone()  # outside of inference mode: an ordinary tensor

    def _run(self, step: Step, storage: Sequence[LayerCache], batch: torch.Size, keep: int) -> Tensor:
        operands = step.tensors()

        def run(*operands: Tensor) -> Tensor:
            return self.model.step_logits(Rows(self.model.frequencies, *operands), storage, batch, keep)

        key = (batch, keep, *(operand.shape for operand in operands))
        if key != self._key or storage is not self._storage:
            self._key, self._storage, self._recording = key, storage, None
            return run(*operands)
        if self._recording is None:
            try:
                self._recording = Recording(run, *operands)
            except NotRecordable:  # by code that a model of one's own brought; a step that is run twice stores the same
                self._recordable = False
                return run(*operands)
            return self._recording.result
        return self._recording(*operands)
