"""A CUDA device for machines without one: tensors that say they are on "cuda" and lie in host memory, and the package's
own CUDA kernels, as the PTX that nvcc made of them on a machine for it, or as C++ on the host model (tests/cuda_host).

Within `with CudaOnHost() as device:` the usual calls work, `dsv4.load(path, device="cuda")` first. What torch itself
computes, it computes on the CPU; the ops of dsv4 reach the kernels that a GPU would run, chosen by the same list, or
the reference where a GPU has none. As on a GPU, tensors of two devices do not mix; what makes the host wait is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4 import _library
from dsv4.ops import _registry

MACHINE, HOST_MODEL = "libdsv4_cuda_machine.so", "libdsv4_cuda_host_model.so"  # the first: built where there is nvcc
_ROOT = Path(__file__).parents[2]
_KEY = torch._C.DispatchKey.PrivateUse1  # where the library registers its kernels
_DEVICE = torch.device("cuda", 0)

aten = torch.ops.aten
_WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal, aten.is_nonzero)
_PINNED = (aten.is_pinned, aten._pin_memory)
_ANY_DEVICE = (aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_)


def library() -> Path | None:
    """The machine of the newest build, else its host model; None where nothing is built."""
    built = [folder for name in ("build", "build/make") if (folder := _ROOT / name / "lib" / HOST_MODEL).is_file()]
    newest = max(built, key=lambda path: path.stat().st_mtime, default=None)
    machine = newest.with_name(MACHINE) if newest else None
    return machine if machine and machine.is_file() else newest


class DeviceTensor(Tensor):
    """Says that it is on the device; its values lie in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=_DEVICE,
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def tolist(self) -> Any:  # torch's own takes no subclass
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: a tensor of CudaOnHost outside of it")


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class CudaOnHost(TorchDispatchMode):
    """The device, while it is entered.

    Attributes:
        waits: name of an op that the host had to wait for -> how often.
        references: op of dsv4 that ran on its reference -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.references: Counter[str] = Counter()
        path = library()
        if path is None:
            raise RuntimeError(f"{HOST_MODEL} is not built: configure with -DDSV4_NATIVE=ON")
        torch.ops.load_library(path)
        self._patches: list[Any] = []

    def __enter__(self) -> CudaOnHost:
        if not self._patches:  # torch would look for a driver
            self._patches = [
                mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
                mock.patch.object(torch.cuda, "device_count", return_value=1),
            ]
            for patch in self._patches:
                patch.start()
            self._depth, self._lifts = 0, torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes it here and moves it
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            torch._C._set_only_lift_cpu_tensors(self._lifts)
            while self._patches:
                self._patches.pop().stop()

    @staticmethod
    def calls(implementation: str = "sm80") -> dict[str, int]:
        """{op: times its CUDA kernel ran in this process}."""
        report = json.loads(torch.ops.dsv4._host_model_library())
        return {op: entry["calls"].get(implementation, 0) for op, entry in report["ops"].items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in _pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        ours = [value for value in tensors if isinstance(value, DeviceTensor)]
        if func.namespace == "dsv4":
            return self._own_op(func, args, kwargs, len(ours), len(tensors))
        if func._can_decompose():  # in inference mode whole compositions come here
            with self:
                return func.decompose(*args, **kwargs)
        if func._overloadpacket in _PINNED and not ours:  # memory that a device reads: the host's is
            return args[0] if func._overloadpacket is aten._pin_memory else False
        target = kwargs.get("device")
        if not ours and not _is_cuda(target):
            return func(*args, **kwargs)
        self._check_devices(func, args, tensors, ours)
        self._count_waits(func, args, ours, target)
        if _is_cuda(target):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        args, kwargs = _pytree.tree_map_only(DeviceTensor, lambda value: value.host, (list(args), kwargs))
        result = func(*args, **kwargs)
        if (target is not None and not _is_cuda(target)) or (func._overloadpacket is aten.copy_ and not ours):
            return result
        return _wrapped(result, ours, tensors)

    def _own_op(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], ours: int, tensors: int) -> Any:
        if not ours:
            return func(*args, **kwargs)
        if ours != tensors:
            raise RuntimeError(f"{func}: {tensors - ours} of {tensors} tensors are not on the device")
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "PrivateUse1"):
            args, kwargs = _pytree.tree_map_only(DeviceTensor, lambda value: value.host, (list(args), kwargs))
            result = func.redispatch(torch._C.DispatchKeySet(_KEY), *args, **kwargs)
            return _pytree.tree_map_only(Tensor, DeviceTensor, result)
        self.references[func._overloadpacket.__name__] += 1
        with self:
            return _registry._references[func.name()](*args, **kwargs)

    def _check_devices(self, func: Any, args: Sequence[Any], tensors: list[Tensor], ours: list[DeviceTensor]) -> None:
        strangers = [value for value in tensors if not isinstance(value, DeviceTensor)]
        if not strangers or not ours or func._overloadpacket in _ANY_DEVICE:
            return
        if any(value.dim() for value in strangers):
            raise RuntimeError(f"{func}: tensors are on cuda:0 and on {strangers[0].device}")

    def _count_waits(self, func: Any, args: Sequence[Any], ours: list[DeviceTensor], target: Any) -> None:
        packet = func._overloadpacket
        masks = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            isinstance(index, DeviceTensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        down = packet is aten.copy_ and ours and not isinstance(args[0], DeviceTensor)
        leaves = packet is aten._to_copy and ours and target is not None and not _is_cuda(target)
        sizes = func is aten.repeat_interleave.Tensor
        if ours and (packet in _WAITS or masks or down or leaves or sizes):
            self.waits[packet.__name__] += 1


class Gpu(TorchDispatchMode):
    """A GPU, with what the tests ask of CudaOnHost; waits are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.references: Counter[str] = Counter()

    @staticmethod
    def calls(implementation: str = "sm80") -> dict[str, int]:
        return {op: by_name.get(implementation, 0) for op, by_name in _library.calls("cuda").items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("dsv4::")
        if func.namespace == "dsv4" and name.endswith("_reference"):
            self.references[name] += 1
        return func(*args, **(kwargs or {}))


Device = Gpu | CudaOnHost
GPU = torch.cuda.is_available()
NO_DEVICE = not GPU and library() is None
WHY_NOT = f"not run: no CUDA device, and {HOST_MODEL} is not built (DSV4_NATIVE=ON)"
# Tensor cores cut off where the host model rounds; the machine does as they do.
PLAYED_BY_MACHINE = not GPU and (library() or Path()).name == MACHINE
CUTS_OFF = GPU or PLAYED_BY_MACHINE
HOPPER = PLAYED_BY_MACHINE or (GPU and torch.cuda.get_device_capability()[0] == 9)


def cuda_device() -> Device:
    """The machine's own, else one that the host plays."""
    return Gpu() if GPU else CudaOnHost()


def _wrapped(result: Any, ours: list[DeviceTensor], tensors: list[Tensor]) -> Any:
    """Results on the device; an argument that an op returns is itself."""
    known = {id(value.host): value for value in ours}
    plain = {id(value) for value in tensors}

    def wrap(value: Tensor) -> Tensor:
        if id(value) in known:
            return known[id(value)]
        return value if id(value) in plain else DeviceTensor(value)

    return _pytree.tree_map_only(Tensor, wrap, result)
