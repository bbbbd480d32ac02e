"""Finds and loads the op libraries, and says what they contain.

`libdsv4_cpu.so` brings every schema and the CPU kernels; `libdsv4_cuda.so`, where the package was built with nvcc, the
CUDA kernels. Both load on a machine without a GPU.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

_FILES = {"cpu": "libdsv4_cpu.so", "cuda": "libdsv4_cuda.so"}
_loaded: dict[str, Path] = {}  # by device


def _folders() -> list[Path]:
    """Where a library may lie: the package (an editable install has two folders), then the build tree of a checkout."""
    import dsv4

    folders = [Path(entry) for entry in dsv4.__path__]
    for folder in list(folders):
        root = folder.parent.parent
        if (root / "CMakeLists.txt").is_file():
            folders.append(root / "build" / "lib")
    return folders


def _find(name: str) -> Path | None:
    return next((folder / name for folder in _folders() if (folder / name).is_file()), None)


def load() -> None:
    """Load the op libraries; once.

    Raises:
        ImportError: they were not built, or this torch cannot load them; one line that names the mend.
    """
    if _loaded:
        return
    found = {device: path for device, file in _FILES.items() if (path := _find(file)) is not None}
    if "cpu" not in found:
        raise ImportError(
            f"dsv4: {_FILES['cpu']} not found; build it: pip install --no-build-isolation . (in the dsv4 checkout)"
        )
    for device, path in found.items():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise ImportError(
                f"dsv4: torch {torch.__version__} cannot load {path} ({str(error).splitlines()[0]}); "
                "torch 2.11 or newer is needed: upgrade torch or rebuild dsv4 with pip install --no-build-isolation ."
            ) from None
        _loaded[device] = path


def loaded() -> list[str]:
    """The op libraries in this process, by device: their own ops are named `_<device>_...`."""
    return list(_loaded)


def _report(device: str) -> dict[str, Any]:
    load()
    if device not in _loaded:
        return {"ops": {}}
    return json.loads(getattr(torch.ops.dsv4, f"_{device}_library")())


def kernel_implementations() -> dict[str, dict[str, list[str]]]:
    """{op: {"cpu": [...], "cuda": [...]}}, best first: the C++ implementations that this process can run.

    Names what the libraries contain, the hardware has and the environment variable DSV4_MAX_ISA (read at each call)
    admits. An op without a C++ library is not listed. "cuda" is empty where there is no GPU or no CUDA build of torch.
    """
    result: dict[str, dict[str, list[str]]] = {}
    for device in ("cpu", "cuda"):
        present = device == "cpu" or torch.cuda.is_available()
        for op, entry in _report(device)["ops"].items():
            result.setdefault(op, {"cpu": [], "cuda": []})[device] = entry["usable"] if present else []
    return dict(sorted(result.items()))


def last_implementation(op: str, device: str = "cpu") -> str | None:
    """The name of the implementation of `op` that ran last in this process on `device`; None before the first call."""
    entry = _report(device)["ops"].get(op)
    return entry["last"] if entry else None


def calls(device: str = "cpu") -> dict[str, dict[str, int]]:
    """{op: {implementation: times it ran in this process on `device`}}, for every implementation in the library."""
    return {op: entry["calls"] for op, entry in sorted(_report(device)["ops"].items())}


def build_info() -> dict[str, Any]:
    """How the libraries were built and what they found: for `dsv4 env` and for bug reports.

    Returns:
        {"libraries": {"cpu"|"cuda": {path, compiler, architectures, isa, limit, devices, built: {op: [names]}}},
        "native": what the pybind11 module says (version, torch whose headers were used, nvcc, hardware), or None where
        that module does not fit this Python; the op libraries work without it}.
    """
    load()
    libraries = {}
    for device, path in _loaded.items():
        report = _report(device)
        ops = report.pop("ops")
        built = {op: ops[op]["built"] for op in sorted(ops)}
        libraries[device] = {"path": str(path), **report, "built": built}
    return {"libraries": libraries, "native": _native_info()}


def unit_peaks(threads: int) -> dict[str, float] | None:
    """FLOP/s of the CPU's units on so many threads, measured from registers in half a second: {"float32", "bfloat16"}.
    None where the pybind11 module does not fit this Python."""
    native = _native()
    return None if native is None else native.unit_peaks(threads)


def _native_info() -> dict[str, Any] | None:
    native = _native()
    return None if native is None else {**native.build_info(), **native.hardware()}


def _native() -> Any:
    """The pybind11 module; None where there is none for this Python."""
    for folder in _folders():
        spec = importlib.machinery.PathFinder.find_spec("_native", [str(folder)])
        if spec is None or spec.loader is None:
            continue
        try:
            native = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(native)
        except ImportError:  # built for another Python
            continue
        return native
    return None
