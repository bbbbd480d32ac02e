"""A function of tensors as the kernels it ran, and decoding with it.

A decode step of a small model spends as much time in Python, in torch's dispatcher and on its results' memory as in its
kernels. Which kernels run, and where their operands lie, depends on shapes alone, so both are written down once and the
kernels are run again: what a CUDA graph is to a GPU.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4 import _library
from dsv4.cache import KVCache, LayerCache, Step
from dsv4.model.transformer import Transformer
from dsv4.nn.rows import Rows

MOST_ROWS = 64
"""Rows of a step up to which recording pays; beyond, kernels take the time."""
MOST_BYTES = 256 * 2**20
"""Memory that a recording may hold: every result of every op has its own."""

_COPIES = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten.contiguous)


class NotRecordable(RuntimeError):
    """The function does something that running its kernels again cannot repeat."""


class Recording:
    """What `function(*inputs)` ran, callable with other inputs of the same shapes, dtypes and devices.

    Tensors that are neither inputs nor made by the function (weights, cache pages) are kept by their memory: changes of
    their values are seen, giving them other memory is not. `result` is what the recorded run returned; later runs
    overwrite it. One thread at a time.

    Args:
        function: tensors to one tensor, by torch ops alone. Gradients must be off.
        inputs: its arguments.
    Raises:
        NotRecordable: the function looks at a tensor's values, returns what no op of it made, or needs more than
            MOST_BYTES for its results.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor):
        self._inputs = tuple(value.clone() for value in inputs)
        tape = _Tape(self._inputs)
        with tape:
            self.result = function(*self._inputs)
        if not tape.made(self.result):
            raise NotRecordable("the result is not made by a recorded op")
        self._memory = tape.memory
        self._steps = tape.steps

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, value in zip(self._inputs, inputs, strict=True):
            own.copy_(value)
        for step in self._steps:
            step()
        return self.result

    def time_kernels(self) -> float | None:
        """Runs it again; the microseconds from its first kernel to the end of the last, which is what they add to a
        longer recording. None where ops of torch are among them."""
        if len(self._steps) != 1 or not isinstance(self._steps[0], _Kernels):
            self()
            return None
        return self._steps[0]() / 1e3

    def __len__(self) -> int:
        """How many kernels and ops of torch a run calls."""
        return sum(step.last - step.first if isinstance(step, _Kernels) else 1 for step in self._steps)


class _Tape(TorchDispatchMode):
    """Writes down every op: kernels of this package by the op library itself, torch's ops as calls into fixed memory.

    Attributes:
        steps: what to call again, in order.
        memory: what the steps read or write and nobody else may hold.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, a second's work, at the first op

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.steps: list[Callable[[], Any]] = []
        self.memory: list[Any] = []
        self._alive: list[Tensor] = list(inputs)  # so that an id names one tensor only
        self._made = {id(tensor) for tensor in inputs}
        self._bytes = 0
        self._kernels = [_KernelTape(library) for library in _library.loaded()]

    def __enter__(self) -> _Tape:
        for kernels in self._kernels:
            kernels.begin()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for kernels in self._kernels:
            kernels.end()
        self._alive.clear()

    def made(self, tensor: Tensor) -> bool:
        """Whether the function made it, or got it."""
        return id(tensor) in self._made

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = list(_tensors((args, tuple(kwargs.values()))))
        results = list(_tensors(result))
        if not results and result is not None and not isinstance(result, torch.dtype):
            if any(self.made(operand) for operand in operands):
                raise NotRecordable(f"{func} reads the value of a tensor")
            return result  # of dtypes and shapes alone: the same at every run
        self.memory.extend(operand.untyped_storage() for operand in operands if not self.made(operand))
        step = next(filter(None, [kernels.take() for kernels in self._kernels]), None)
        if step is not None:
            if not self.steps or not step.extend(self.steps[-1]):
                self.steps.append(step)
        elif func._schema.is_mutable:
            self.steps.append(partial(func, *args, **kwargs))
        elif not _share_memory(results, operands):
            self.steps.append(_into(func, args, kwargs, results))
            self._bytes += sum(value.nbytes for value in results)
        self._alive.extend(results)
        self._made.update(map(id, results))
        if self._bytes + sum(kernels.bytes() for kernels in self._kernels) > MOST_BYTES:
            raise NotRecordable(f"results of more than {MOST_BYTES >> 20} MiB")
        return result


class _KernelTape:
    """The kernels that one op library runs, as csrc/torch/tape.cpp records them."""

    def __init__(self, library: str):
        def op(name: str) -> Any:
            return getattr(torch.ops.dsv4, f"_{library}_tape_{name}").default

        self.begin, self.bytes, self._calls, self._end, self._run, self._free = map(
            op, ("begin", "bytes", "calls", "end", "run", "free")
        )
        self._taken = 0
        self._number = 0

    def take(self) -> _Kernels | None:
        """Those since the last time."""
        count = self._calls()
        if count < 0:
            raise NotRecordable("an op copied an operand first")
        if count == self._taken:
            return None
        taken = _Kernels(self, self._taken, count)
        self._taken = count
        return taken

    def end(self) -> None:
        self._number = self._end()
        weakref.finalize(self, self._free, self._number)

    def run(self, first: int, last: int) -> int:
        """Nanoseconds that it took."""
        return self._run(self._number, first, last)


class _Kernels:
    """Kernels [first, last) of a tape."""

    def __init__(self, tape: _KernelTape, first: int, last: int):
        self.tape, self.first, self.last = tape, first, last

    def __call__(self) -> int:
        return self.tape.run(self.first, self.last)

    def extend(self, before: Callable[[], Any]) -> bool:
        """Whether `before` now runs these as well, having ended where they begin."""
        if not isinstance(before, _Kernels) or before.tape is not self.tape:
            return False
        before.last = self.last
        return True


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _share_memory(results: Sequence[Tensor], operands: Sequence[Tensor]) -> bool:
    """Whether the results are views of operands: where those are written again, so are they."""
    memory = {operand.untyped_storage().data_ptr() for operand in operands}
    return all(result.untyped_storage().data_ptr() in memory for result in results)


def _into(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: list[Tensor]) -> Callable[[], Any]:
    """A call of `func` that leaves its results where they are now."""
    if func.overloadpacket in _COPIES:
        return partial(results[0].copy_, args[0])
    operands = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        candidate = getattr(func.overloadpacket, name)
        arguments = candidate._schema.arguments
        out = [argument.name for argument in arguments if argument.is_out]
        taken = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out]
        if len(out) == len(results) and taken == operands:
            return partial(candidate, *args, **kwargs, **dict(zip(out, results, strict=True)))

    def run() -> None:
        for own, value in zip(results, _tensors(func(*args, **kwargs)), strict=True):
            own.copy_(value)

    return run


class RecordedModel:
    """`model(input_ids, cache, logits_to_keep=n)` for decoding: same results, bit for bit, less time around kernels.

    The second step of equal shapes is recorded, those after it run its kernels. Steps of many rows, calls with
    gradients on or under a torch dispatch mode, and a model with forward hooks go to the model itself. While this is
    used, values of the model's tensors may change, but neither they nor their memory be replaced (as `model.to` does),
    nor hooks be added: make a new one then. For one thread at a time.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self._recordable = not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
        self._key: tuple[Any, ...] | None = None
        self._storage: Sequence[LayerCache] = ()
        self._recording: Recording | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedModel:
        """A recording knows its tensors by their memory, which is not the copy's."""
        return RecordedModel(copy.deepcopy(self.model, memo))

    def __getstate__(self) -> dict[str, Any]:
        return vars(RecordedModel(self.model))

    def __call__(self, input_ids: Tensor, cache: KVCache, *, logits_to_keep: int = 0) -> Tensor:
        """Arguments, result and errors are those of `Transformer.forward`."""
        few = 0 < input_ids.numel() <= MOST_ROWS
        under_a_mode = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0
        if not few or under_a_mode or not self._recordable:
            return self.model(input_ids, cache, logits_to_keep=logits_to_keep)
        ids, counts = self.model.check_ids(input_ids, cache, logits_to_keep=logits_to_keep)
        step = self.model.begin(ids, counts, cache)
        with torch.inference_mode():
            logits = self._run(step, cache.layers, ids.shape, logits_to_keep)
        cache.commit(step)
        return logits.clone()  # outside of inference mode: an ordinary tensor

    def _run(self, step: Step, storage: Sequence[LayerCache], batch: torch.Size, keep: int) -> Tensor:
        operands = step.tensors()

        def run(*operands: Tensor) -> Tensor:
            return self.model.step_logits(Rows(self.model.frequencies, *operands), storage, batch, keep)

        key = (batch, keep, torch.get_num_threads(), *(operand.shape for operand in operands))
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
