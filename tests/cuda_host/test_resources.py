"""What nvcc makes of the CUDA kernels: the compiler's resource report and the instructions in the machine code.

No GPU is needed. Without nvcc nothing here runs, without nvdisasm the machine code is not read; both say so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted((CUDA / "sm80").glob("*.cu"))
ARCHITECTURES = ["80", "90", "120"]

# What a kernel's header claims, as instructions that must be there. Kernels by name, without the architecture's prefix.
TENSOR_CORES = ["HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.E.BYPASS", "LDG.E.128", "BAR.SYNC"]
CLAIMS = {
    "bf16_mhc_pre_mix": TENSOR_CORES,
    "bf16_mhc_post_pre_mix": [*TENSOR_CORES, "STG.E.128"],
    "bf16_mhc_head_mix": TENSOR_CORES,
    "f32_mhc_pre_mix": ["LDGSTS.E.BYPASS", "LDS.128", "FFMA"],
    "f32_mhc_post_pre_mix": ["LDGSTS.E.BYPASS", "LDS.128", "FFMA", "STG.E.128"],
    "f32_mhc_head_mix": ["LDGSTS.E.BYPASS", "LDS.128", "FFMA"],
    "bf16_sparse_attention_16": [*TENSOR_CORES, "LDSM.16.MT88.4", "LDS.128", "STG.E.128"],
    "bf16_sparse_attention_32": [*TENSOR_CORES, "LDSM.16.MT88.4", "LDS.128", "STG.E.128"],
    "bf16_sparse_attention_combine": ["LDG.E.128"],
    "bf16_index_scores": TENSOR_CORES,
    "bf16_index_scores_plain": ["FFMA"],
    "f32_index_scores_plain": ["FFMA"],
    **{
        f"{form}_linear_{tile}": ["HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC", "LDGDEPBAR"]
        for form in ("fp8", "fp4", "fp4_wide", "bf16", "f32")
        for tile in ("few", "some", "many")
    },
    **{
        f"{form}_moe_{op}_{tile}": ["HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC", *stores]
        for form in ("fp8", "fp4", "fp4_wide", "bf16", "f32")
        for op, stores in (("gate_up", ["STG.E.128", "MUFU.EX2"]), ("down", []))
        for tile in ("few", "many")
    },
    "bf16_moe_prepare": ["LDG.E.128", "STG.E.128", "SHFL.BFLY"],
    "f32_moe_prepare": ["LDG.E.128", "STG.E.128", "SHFL.BFLY"],
    "i32_moe_map": ["REDUX.SUM", "VOTE.ANY", "POPC", "BAR.SYNC"],
    "bf16_moe_combine": ["LDG.E.128", "STG.E.128"],
    "f32_moe_combine": ["LDG.E.128", "STG.E.128"],
    "f32_moe_gate": ["SHFL.BFLY", "MUFU.EX2"],
    "bf16_linear_prepare": ["LDG.E.128", "STG.E.128", "SHFL.BFLY"],
    "f32_linear_prepare": ["LDG.E.128", "STG.E.128", "SHFL.BFLY"],
    "f32_index_select": ["REDUX.SUM", "VOTE.ANY", "POPC", "BAR.SYNC"],
    **{
        f"{dtype}_{op}": ["LDG.E.128", "STG.E.128", "SHFL.BFLY", "VOTE.ANY"]
        for dtype in ("bf16", "f32")
        for op in ("query_norm_rope", "store_window", "kv_norm_rope", "rms_norm")
    },
    **{
        f"{dtype}_{op}": claims
        for dtype in ("bf16", "f32")
        for op, claims in (
            ("apply_rope", ["LDG.E.128", "STG.E.128"]),
            ("rms_norm_long", ["LDG.E.128", "STG.E.128", "SHFL.BFLY", "BAR.SYNC"]),
            ("index_query_1", ["LDG.E.128", "STG.E.128", "SHFL.BFLY"]),
            ("index_query_4", ["LDG.E.128", "STG.E.128", "SHFL.BFLY"]),
            ("quantize_fp8", ["LDG.E.128", "STG.E.64", "SHFL.BFLY"]),
            ("dequantize", ["LDG.E", "STG.E.128"]),
            ("quantize_fp4", ["LDG.E.128", "STG.E", "SHFL.BFLY"]),
        )
    },
    "f32_rope_rows": ["DFMA"],
    **{
        f"{dtype}_hadamard_{steps}": ["LDG.E.128", "STG.E.128", "SHFL.BFLY"]
        for dtype in ("bf16", "f32")
        for steps in (1, 4)
    },
    **{
        f"{dtype}_compress_{what}": ["LDG.E.128", "MUFU.EX2", "SHFL.BFLY", "BAR.SYNC", "STG.E.64"]
        for dtype in ("bf16", "f32")
        for what in ("rows", "keys_1", "keys_4")
    },
    "f32_compress_state": ["LDG.E.128", "STG.E.128"],
    "bf16_hadamard_long": ["LDS", "STS", "BAR.SYNC"],
    "f32_hadamard_long": ["LDS", "STS", "BAR.SYNC"],
    **{
        f"{dtype}_mhc_{op}": ["LDG.E.128", "STG.E.128"]
        for dtype in ("bf16", "f32")
        for op in ("post", "pre_apply", "head_apply")
    },
}


def find_nvcc() -> str | None:
    folders = [os.environ.get(name, "") + "/bin" for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda/bin"]
    found = shutil.which("nvcc")
    return found or next((f"{folder}/nvcc" for folder in folders if os.access(f"{folder}/nvcc", os.X_OK)), None)


def find_nvdisasm() -> str | None:
    """On PATH, beside nvcc, or from the nvidia-cuda-nvdisasm package."""
    nvcc = find_nvcc()
    places = [Path(nvcc).resolve().parent] if nvcc else []
    try:
        import nvidia  # a namespace package that CUDA's wheels share

        places += [path for root in nvidia.__path__ for path in Path(root).glob("*/bin")]
    except ImportError:
        pass
    found = shutil.which("nvdisasm")
    return found or next((str(place / "nvdisasm") for place in places if (place / "nvdisasm").exists()), None)


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="not run: no nvcc")
needs_nvdisasm = pytest.mark.skipif(find_nvdisasm() is None, reason="not run: no nvdisasm (pip: nvidia-cuda-nvdisasm)")


@dataclass(frozen=True)
class Kernel:
    registers: int
    stack: int
    spills: int


def kernel_name(symbol: str) -> str:
    """Of a mangled `dsv4::<arch>::<arch>_<dtype>_<op>`, without the architecture."""
    match = re.fullmatch(r"_ZN4dsv44sm\d\d\d+sm\d\d_([a-z0-9_]+)E\w*", symbol)
    assert match, f"kernel symbols carry <arch>_<dtype>_<op>: {symbol}"
    return match.group(1)


def parse_report(report: str) -> dict[str, Kernel]:
    kernels = {}
    for part in report.split("Compiling entry function")[1:]:
        symbol = re.search(r"'(\w+)'", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert symbol, part
        assert frame, part
        assert registers, part
        spills = int(frame.group(2)) + int(frame.group(3))
        kernels[kernel_name(symbol.group(1))] = Kernel(int(registers.group(1)), int(frame.group(1)), spills)
    return kernels


def parse_disassembly(text: str) -> dict[str, set[str]]:
    """The instructions of each kernel, with their modifiers."""
    kernels: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+),", line)
        if section:
            current = kernels.setdefault(kernel_name(section.group(1)), set())
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if instruction:
            current.add(instruction.group(1))
    return kernels


@cache
def compiled(source: Path, architecture: str, folder: Path) -> tuple[dict[str, Kernel], Path]:
    nvcc = find_nvcc()
    assert nvcc
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if f"sm_{architecture}" not in known:
        pytest.skip(f"not run: this nvcc does not know sm_{architecture}")
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin"]
    done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return parse_report(done.stderr), cubin


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubin")


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_nothing_spills(source: Path, architecture: str, folder: Path) -> None:
    kernels, _ = compiled(source, architecture, folder)
    assert kernels
    assert {name: kernel for name, kernel in kernels.items() if kernel.spills or kernel.stack} == {}
    assert max(kernel.registers for kernel in kernels.values()) <= 255


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_holds_what_is_claimed(architecture: str, folder: Path) -> None:
    nvdisasm = find_nvdisasm()
    assert nvdisasm
    kernels: dict[str, set[str]] = {}
    for source in SOURCES:
        _, cubin = compiled(source, architecture, folder)
        text = subprocess.run([nvdisasm, cubin], capture_output=True, text=True, check=True).stdout
        kernels.update(parse_disassembly(text))
    assert kernels.keys() == CLAIMS.keys()
    for name, instructions in kernels.items():
        local = {i for i in instructions if i.startswith(("LDL", "STL"))}
        assert local == set(), f"{name} uses local memory"
        missing = [claim for claim in CLAIMS[name] if not any(i.startswith(claim) for i in instructions)]
        assert missing == [], f"{name} has {sorted(instructions)}"


def code(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


def test_kernels_use_the_wrappers_alone() -> None:
    """Raw instructions would run on a GPU only: the host model would not see them."""
    raw = re.compile(r"\basm\b|\b__[a-z]\w*|\bthreadIdx\b|\bblockIdx\b|<<<|\b(?:atomic\w+|printf)\s*\(")
    files = [path for path in CUDA.rglob("*") if path.suffix in {".cu", ".h"} and path.parent.name != "common"]
    assert files
    assert {path.name: raw.findall(code(path)) for path in files if raw.search(code(path))} == {}


def test_every_wrapper_is_tested_on_a_gpu() -> None:
    wrappers = set(re.findall(r"^DSV4_DEVICE [\w:]+ (\w+)\(", code(CUDA / "common" / "ptx.h"), re.MULTILINE))
    assert len(wrappers) > 20
    used = set(re.findall(r"\bptx::(\w+)", (ROOT / "tests" / "cuda_host" / "test_ptx.cu").read_text()))
    assert wrappers - used - {"shared_base"} == set()


def test_reports_are_understood() -> None:
    report = (
        "ptxas info : Compiling entry function '_ZN4dsv44sm8018sm80_bf16_mhc_postENS0_13PostArgumentsE' for 'sm_80'\n"
        "    64 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 80 registers, used 0 barriers, 632 bytes cmem[0]\n"
    )
    assert parse_report(report) == {"bf16_mhc_post": Kernel(80, 64, 12)}
    text = (
        '\t.section\t.text._ZN4dsv44sm8018sm80_bf16_mhc_postENS0_13PostArgumentsE,"ax",@progbits\n'
        "        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;\n"
        "        /*0010*/              @!P0 STL.128 [R1], R8 ;\n"
    )
    assert parse_disassembly(text) == {"bf16_mhc_post": {"IMAD.MOV.U32", "STL.128"}}
