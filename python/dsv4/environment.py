"""What this process runs on and with: versions, hardware, op libraries, and the implementation each op reaches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import dsv4
from dsv4 import _library, ops
from dsv4.checkpoint import memory

#: The one environment variable that changes results: it holds every op to a lower instruction set, for comparisons.
VARIABLE = "DSV4_MAX_ISA"
#: Its values, of the CPU and of the GPU.
LIMITS = ("scalar", "avx2", "avx512", "amx", "sm80", "sm90")


def environment() -> dict[str, Any]:
    """Versions, hardware, op libraries and `dsv4.ops.implementations()`, as plain values (see `dsv4 env --json`)."""
    try:
        build: dict[str, Any] | None = _library.build_info()
    except ImportError:
        build = None
    return {
        "versions": {
            "dsv4": _version("dsv4") or dsv4.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "tokenizers": _version("tokenizers"),
            "safetensors": _version("safetensors"),
        },
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "memory bytes": _memory(),
            "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        },
        VARIABLE: os.environ.get(VARIABLE),
        "build": build,
        "implementations": ops.implementations(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, "") or platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory of a device that this process can still take; None where the system does not say."""
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return torch.cuda.mem_get_info(device)[0] + kept
    return memory.available()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
    }


def environment_lines(found: dict[str, Any]) -> list[str]:
    """`environment()` as text, without the table of ops."""
    versions, hardware, build = found["versions"], found["hardware"], found["build"]
    installed = f", {hardware['memory bytes'] / 2**30:.0f} GiB" if hardware["memory bytes"] else ""
    libraries = (build or {}).get("libraries", {})
    lines = [
        f"dsv4       {versions['dsv4']}, {Path(dsv4.__path__[0])}",
        f"python     {versions['python']}, torch {versions['torch']}, tokenizers {versions['tokenizers']}",
        f"processor  {hardware['processor']}, {hardware['cores']} cores{installed}",
        f"threads    {hardware['torch threads']} of torch",
        f"cpu ops    {_library_line(libraries.get('cpu', {}), True)}",
        f"cuda ops   {_library_line(libraries.get('cuda', {}), bool(hardware['gpus']))}",
        f"{VARIABLE}  {_limit(found[VARIABLE])}",
    ]
    gpus = [
        f"gpu        {gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory bytes'] / 2**30:.0f} GiB"
        for gpu in hardware["gpus"]
    ]
    lines[4:4] = gpus or ["gpu        none" if versions["cuda of torch"] else "gpu        none (torch is a CPU build)"]
    return lines


def _limit(name: str | None) -> str:
    if not name:
        return "not set"
    return name if name in LIMITS else f"{name}: unknown, limits nothing; there are {', '.join(LIMITS)}"


def _library_line(library: dict[str, Any], present: bool) -> str:
    if not library:
        return "no library: every op runs its reference"
    kernels = sum(1 for names in library["built"].values() if names)
    parts = [f"kernels of {kernels} ops, built by {library['compiler']}"]
    if present:
        parts.insert(0, f"instruction set {library['isa']}")
        if library["limit"] != library["isa"]:
            parts.insert(1, f"limited to {library['limit']}")
    else:
        parts.insert(0, "built, no device to run on")
    return ", ".join(parts)


def implementation_lines(found: dict[str, Any]) -> list[str]:
    """The table op x device -> implementation of `environment()`: what a call reaches, and what stands behind it."""
    table = found["implementations"]
    built = ((found["build"] or {}).get("libraries", {}).get("cuda", {})).get("built", {})
    rows = [("op", "cpu", "cuda")]
    for op, row in table.items():
        cells = [
            names[0] + (f" ({', '.join(names[1:])})" if names[1:] else "")
            for names in (row["cpu"], row["cuda"])
            if names
        ]
        if not row["cuda"]:
            cells.append(f"- (built: {', '.join(built[op])})" if built.get(op) else "-")
        rows.append((op, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{op:<{widths[0]}}  {cpu:<{widths[1]}}  {cuda}" for op, cpu, cuda in rows]
    return [*lines, "", "what a call runs (what else is there); reference: plain torch; -: no kernel that can run here"]
