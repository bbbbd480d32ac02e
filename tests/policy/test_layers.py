"""One way down: cli, generation, model, nn, ops in Python; torch, ops, cpu or cuda, common in csrc."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from repository import CSRC, PACKAGE, name, sources

# Lower first; a module imports from its own layer and those below. The longest matching name counts.
LAYERS = (
    ("_library", "_compiling"),
    ("ops",),
    ("model.config",),
    ("cache",),
    ("nn",),
    ("model",),
    ("checkpoint",),
    ("generation", "planner", "environment", "testing"),
    ("bench", "console"),
    ("cli", "demo", "__main__"),
)


def layer(module: str) -> int | None:
    """The layer of a module named without the leading `dsv4.`; None: it belongs to none yet."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for index, names in enumerate(LAYERS):
            if prefix in names:
                return index
    return None


def imported(source: str, module: str) -> list[tuple[int, str]]:
    """(line, module) of each import from the package, names resolved as far as layers need them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["dsv4", *module.split(".")][: -node.level] + ([base] if base else []))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(node.lineno, full[len("dsv4.") :]) for full in names if full.startswith("dsv4.")]
    return found


def upward(source: str, module: str) -> list[str]:
    own = layer(module)
    assert own is not None, f"python/dsv4/{module}: give it a layer in {Path(__file__).name}"
    lines = []
    for line, other in imported(source, module):
        target = layer(other)
        if target is None or target > own:
            lines.append(f"line {line} imports dsv4.{other}")
    return lines


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [
    path
    for path in sources(".py", under=PACKAGE)
    if path.parent != PACKAGE or path.name not in ("__init__.py", "__main__.py")
]


def test_python_imports_point_down() -> None:
    faults = [f"{name(path)} {fault}" for path in MODULES for fault in upward(path.read_text(), module_of(path))]
    assert faults == []


def test_upward_import_is_noticed() -> None:
    assert upward("from dsv4.cli import main", "ops.mhc") == ["line 1 imports dsv4.cli.main"]
    assert upward("from .. import nn", "ops.mhc") == ["line 1 imports dsv4.nn"]
    assert upward("def f():\n    import dsv4.model.block", "nn.moe") == ["line 2 imports dsv4.model.block"]
    assert upward("from dsv4.model.config import Config\nfrom dsv4 import ops", "nn.moe") == []


# What a folder of csrc may include of csrc: beginnings of paths.
C_INCLUDES = {
    "common": ("common/",),
    "cpu": ("cpu/", "common/", "ops/"),
    "cuda": ("cuda/", "common/", "ops/"),
    "ops": ("ops/", "cpu/", "cuda/", "common/"),
    "torch": ("torch/", "ops/", "common/"),
    "module.cpp": ("common/",),
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
TORCH = re.compile(r"^(torch/(csrc|headeronly|extension|all|torch|library)|ATen/|c10/|Python\.h|pybind11/)")
CUDA = re.compile(r"^(cuda\.h|cuda_|cooperative_groups|mma\.h|cub/|thrust/|cute/|cutlass/)")


def bad_includes(source: str, folder: str) -> list[str]:
    lines = []
    for quote, header in INCLUDE.findall(source):
        if TORCH.match(header):
            allowed = folder == "torch" or (folder == "module.cpp" and header.startswith("pybind11/"))
        elif CUDA.match(header):
            allowed = folder == "cuda"
        elif quote == '"':
            allowed = header.startswith(C_INCLUDES[folder])
            # Kernels know the contract that they fulfil, not the list that chooses among them.
            allowed = allowed and not (folder in ("cpu", "cuda") and header == "ops/candidates.h")
        else:
            allowed = True
        if not allowed:
            lines.append(f"includes {header}")
    return lines


def test_c_includes_point_down() -> None:
    faults = [
        f"{name(path)} {fault}"
        for path in sources(".h", ".cpp", ".cu", ".cuh", under=CSRC)
        for fault in bad_includes(path.read_text(), path.relative_to(CSRC).parts[0])
    ]
    assert faults == []


def test_bad_include_is_noticed() -> None:
    assert bad_includes("#include <torch/csrc/stable/tensor.h>", "ops") == ["includes torch/csrc/stable/tensor.h"]
    assert bad_includes("# include <ATen/ATen.h>", "cpu") == ["includes ATen/ATen.h"]
    assert bad_includes("#include <cuda_runtime.h>", "common") == ["includes cuda_runtime.h"]
    assert bad_includes('#include "ops/mhc.h"', "common") == ["includes ops/mhc.h"]
    assert bad_includes('#include "torch/glue.h"', "ops") == ["includes torch/glue.h"]
    assert bad_includes('#include "ops/candidates.h"', "cuda") == ["includes ops/candidates.h"]
    assert bad_includes('#include <torch/csrc/stable/tensor.h>\n#include "torch/glue.h"', "torch") == []


def test_native_programs_do_not_use_torch() -> None:
    roots = [
        CSRC.parent / "tests" / "native",
        CSRC.parent / "tests" / "cuda_host",
        CSRC.parent / "benchmarks" / "native",
    ]
    for root in roots:
        for path in sources(".h", ".cpp", under=root):
            headers = [header for _, header in INCLUDE.findall(path.read_text()) if TORCH.match(header)]
            assert headers == [], name(path)
