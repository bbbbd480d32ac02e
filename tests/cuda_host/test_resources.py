"""What nvcc makes of the CUDA kernels: stack frames and instructions of the machine code, as nvdisasm shows them.

For the architectures that the op library is built for that is its own machine code. Newer GPUs get theirs from the
driver; here nvcc compiles for one of them. No GPU is needed. What is missing, library, nvcc or nvdisasm, is said.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dsv4 import _library

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted((CUDA / "sm80").glob("*.cu"))
BUILT, NEWER = (80, 89, 90, 120), 100

# What a kernel's header claims, as instructions that must be there. Kernels by name, without the architecture's prefix.
TENSOR_CORES = ["HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.E.BYPASS", "LDG.E.128", "BAR.SYNC"]
CLAIMS = {
    "bf16_mhc_pre_mix": TENSOR_CORES,
    "bf16_mhc_post_pre_mix": [*TENSOR_CORES, "STG.E.128"],
    "bf16_mhc_head_mix": TENSOR_CORES,
    **{
        f"bf16_mhc_{op}_mix_few": [*(claim for claim in TENSOR_CORES if claim != "LDG.E.128"), "LDS.64"]
        for op in ("pre", "post_pre", "head")
    },
    "bf16_mhc_pre_backward_mix": [*TENSOR_CORES, "FFMA"],
    "bf16_mhc_head_backward_mix": [*TENSOR_CORES, "FFMA"],
    **{
        f"bf16_mhc_{op}_backward_streams": [claim for claim in TENSOR_CORES if claim != "LDG.E.128"]
        + ["LDSM.16.MT88.4", "LDS.128", "STG.E.128"]
        for op in ("pre", "head")
    },
    **{f"f32_mhc_{op}_backward_streams": ["FFMA", "LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC"] for op in ("pre", "head")},
    "f32_mhc_backward_sums": ["LDG.E.128", "STG.E.128"],
    **{
        f"sm90_{form}_linear_many": [
            *("HGMMA.64", "WARPGROUP.DEPBAR", "FENCE.VIEW.ASYNC"),
            *("LDGSTS.E.BYPASS", "LDS", "BAR.SYNC", "LDGDEPBAR"),
        ]
        for form in ("fp8", "fp4")
    },
    "sm90_bf16_index_scores": [
        *("HGMMA.64", "WARPGROUP.DEPBAR", "FENCE.VIEW.ASYNC"),
        *("LDSM.16.M88.4", "LDGSTS.E.BYPASS", "LDG.E.128", "BAR.SYNC"),
    ],
    "f32_mhc_pre_backward_mix": ["LDGSTS.E.BYPASS", "LDS.128", "FFMA"],
    "f32_mhc_head_backward_mix": ["LDGSTS.E.BYPASS", "LDS.128", "FFMA"],
    "f32_mhc_pre_mix": ["LDGSTS.E.BYPASS", "LDS.128", "FFMA"],
    "f32_mhc_post_pre_mix": ["LDGSTS.E.BYPASS", "LDS.128", "FFMA", "STG.E.128"],
    "f32_mhc_head_mix": ["LDGSTS.E.BYPASS", "LDS.128", "FFMA"],
    "bf16_sparse_attention_16": [*TENSOR_CORES, "LDSM.16.MT88.4", "LDS.128", "STG.E.128"],
    "bf16_sparse_attention_32": [*TENSOR_CORES, "LDSM.16.MT88.4", "LDS.128", "STG.E.128"],
    "bf16_sparse_attention_f32_rows": ["FFMA", "LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC", "SHFL.BFLY", "STG.E.64"],
    "f32_sparse_attention": ["FFMA", "LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC", "SHFL.BFLY", "STG.E.64"],
    "bf16_sparse_attention_combine": ["LDG.E.128"],
    "f32_sparse_attention_combine": ["LDG.E.128"],
    **{
        f"bf16_sparse_attention_backward_{heads}": [*TENSOR_CORES, "LDSM.16.MT88.4", "LDS.128", "SHFL.BFLY", "MUFU.EX2"]
        for heads in (16, 32)
    },
    **{
        name: ["FFMA", "LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC", "SHFL.BFLY", "STG.E.128", "MUFU.EX2"]
        for name in ("bf16_sparse_attention_backward_f32_rows", "f32_sparse_attention_backward")
    },
    "bf16_sparse_attention_backward_keys": [*TENSOR_CORES, "LDSM.16.MT88.4", "LDG.E.64", "STG.E.64"],
    "f32_sparse_attention_backward_keys": ["FFMA", "LDGSTS.E.BYPASS", "LDS.128", "LDG.E.64", "STG.E.64"],
    "i32_sparse_attention_backward_lists": ["VOTE.ANY", "POPC", "REDUX.SUM", "STG.E.128"],
    "i32_sparse_attention_backward_numbers": ["STG.E"],
    "f32_sparse_attention_backward_clear": ["STG.E"],
    "bf16_sparse_attention_backward_narrow": ["LDG.E.128", "STG.E.128"],
    "f32_sparse_attention_backward_sink": ["DADD", "LDS.64", "BAR.SYNC"],
    "bf16_index_scores": TENSOR_CORES,
    "bf16_index_scores_plain": ["FFMA"],
    "f32_index_scores_plain": ["FFMA"],
    **{
        f"{form}_linear_{tile}": ["HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC", "LDGDEPBAR"]
        for form in ("fp8", "fp4", "fp4_wide", "bf16", "f32")
        for tile in ("few", "some", "many")
    },
    **{
        f"{form}_moe_{op}": ["HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC", *stores]
        for form in ("fp8", "fp4", "fp4_wide", "bf16", "f32")
        for op, stores in (
            ("gate_up_many", ["STG.E.128", "MUFU.EX2"]),
            *((op, []) for op in ("product_few", "product_many", "shared_few", "shared_some")),
        )
    },
    "bf16_moe_activate": ["LDG.E.128", "STG.E.128", "SHFL.BFLY", "MUFU.EX2"],
    "f32_moe_activate": ["LDG.E.128", "STG.E.128", "SHFL.BFLY", "MUFU.EX2"],
    "i32_moe_map": ["REDUX.SUM", "VOTE.ANY", "POPC", "BAR.SYNC"],
    "bf16_moe_combine": ["LDG.E.128", "STG.E.128"],
    "f32_moe_combine": ["LDG.E.128", "STG.E.128"],
    **{
        f"{dtype}_moe_backward_{op}_{tile}": ["LDGSTS.E.BYPASS", "LDS.128", "BAR.SYNC", "STG.E.128", *products, *claims]
        for dtype, narrow in (("bf16", True), ("f32", False))
        for op, claims in (("inner", ["LDG.E.128", "MUFU.EX2", "SHFL.BFLY"]), ("inputs", []), ("matrix", []))
        for products in [
            ["HMMA.16816.F32.BF16", "LDSM.16.MT88.4", *(["LDSM.16.M88.4"] if op != "matrix" else [])]
            if narrow
            else ["FFMA"]
        ]
        for tile in ("few", "many")
    },
    "bf16_moe_backward_sum": ["LDG.E.128", "STG.E.128"],
    "f32_moe_backward_sum": ["LDG.E.128", "STG.E.128"],
    "f32_moe_backward_weights": ["FADD"],
    "f32_moe_gate": ["SHFL.BFLY", "MUFU.EX2"],
    "bf16_prepare_activations": ["LDG.E.128", "STG.E.128", "SHFL.BFLY"],
    "f32_prepare_activations": ["LDG.E.128", "STG.E.128", "SHFL.BFLY"],
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
            ("dequantize_fp8", ["LDG.E.64", "STG.E.128"]),
            ("dequantize_fp4", ["LDG.E", "STG.E.128"]),
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
    **{
        f"{dtype}_{op}{steps}": ["LDG.E.128", "STG.E.128", "SHFL.BFLY", "VOTE.ANY", *barriers]
        for dtype in ("bf16", "f32")
        for op, barriers in (("query_norm_rope_backward", []), ("norm_rope_backward", ["BAR.SYNC", "STS.128"]))
        for steps in ("", "_1", "_2")
    },
    "f32_add_pieces": ["LDG.E.128", "STS.128", "BAR.SYNC"],
    **{
        f"{dtype}_compress_backward_pool": ["LDG.E.128", "MUFU.EX2", "STS.128", "BAR.SYNC"] for dtype in ("bf16", "f32")
    },
    "f32_compress_backward_rows": ["LDG.E.128", "STG.E.128", "MUFU.EX2"],
    "bf16_hadamard_long": ["LDS", "STS", "BAR.SYNC"],
    "f32_hadamard_long": ["LDS", "STS", "BAR.SYNC"],
    **{f"{dtype}_mhc_post": ["LDG.E.128", "STG.E.128"] for dtype in ("bf16", "f32")},
    **{
        f"{dtype}_mhc_{op}_apply": ["LDGSTS.E.BYPASS", "LDS.128", "STG.E.128"]
        for dtype in ("bf16", "f32")
        for op in ("pre", "head")
    },
    **{
        f"{dtype}_mhc_{op}": ["LDG.E.128", "SHFL.BFLY", "BAR.SYNC", *stores]
        for dtype in ("bf16", "f32")
        for op, stores in (
            ("post_backward", ["STG.E.128"]),
            ("pre_backward_tokens", []),
            ("head_backward_tokens", []),
        )
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


def kernel_name(symbol: str) -> str:
    """Of a mangled `dsv4::<arch>::<arch>_<dtype>_<op>`, without sm80, which goes without saying."""
    match = re.fullmatch(r"_ZN4dsv44sm\d\d\d+(sm\d\d_[a-z0-9_]+)E\w*", symbol)
    assert match, f"kernel symbols carry <arch>_<dtype>_<op>: {symbol}"
    return match.group(1).removeprefix("sm80_")


class MachineCode(NamedTuple):
    """Of kernels and the functions that nvcc adds: the instructions, with their modifiers, and bytes of stack."""

    instructions: dict[str, set[str]]
    frames: dict[str, int]


def parse_disassembly(text: str) -> MachineCode:
    found = MachineCode({}, {})
    current: set[str] = set()
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+),", line)
        if section:
            current = found.instructions.setdefault(kernel_name(section.group(1)), set())
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if instruction:
            current.add(instruction.group(1))
    for frame in re.finditer(r"EIATTR_FRAME_SIZE\n(?:.*\n){6}.*index@\((\S+)\)\n.*\.word\s+0x(\w+)", text):
        found.frames[frame.group(1)] = int(frame.group(2), 16)
    return found


def cubins(binary: bytes) -> Iterator[tuple[int, bytes]]:
    """(architecture, cubin) of every fat binary in a library: a header, then entries that each have their own."""
    magic, elf = struct.pack("<I", 0xBA55ED50), 2
    at = binary.find(magic)
    while at >= 0:
        header, size = struct.unpack_from("<6xHQ", binary, at)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, own, bytes_, architecture = struct.unpack_from("<H2xIQ12xI", binary, entry)
            if kind == elf:
                yield architecture, binary[entry + own : entry + own + bytes_]
            entry += own + bytes_
        at = binary.find(magic, end)


def disassembled(cubin: Path) -> MachineCode:
    nvdisasm = find_nvdisasm()
    assert nvdisasm
    return parse_disassembly(subprocess.run([nvdisasm, cubin], capture_output=True, text=True, check=True).stdout)


def assert_holds_what_is_claimed(code: MachineCode) -> None:
    assert code.instructions
    assert len(code.frames) >= len(code.instructions)
    assert {name: size for name, size in code.frames.items() if size} == {}, "stack, or spilled registers"
    for name, instructions in code.instructions.items():
        local = {i for i in instructions if i.startswith(("LDL", "STL"))}
        assert local == set(), f"{name} uses local memory"
        missing = [claim for claim in CLAIMS[name] if not any(i.startswith(claim) for i in instructions)]
        assert missing == [], f"{name} has {sorted(instructions)}"


def test_machine_code_is_made_for_all_of_these_unless_told_otherwise() -> None:
    """A build for fewer, which leaves out cases above, is somebody's choice."""
    defaults = re.findall(
        r"(?:set|list)\((?:APPEND )?DSV4_SM80_ARCHITECTURES ([^\")]+)\)", (ROOT / "CMakeLists.txt").read_text()
    )
    assert tuple(map(int, re.findall(r"\d+", " ".join(defaults)))) == BUILT


def is_known(architecture: int) -> bool:
    """Whether nvcc, if there is one, compiles for it."""
    nvcc = find_nvcc()
    listed = [nvcc, "--list-gpu-code"]
    known = subprocess.run(listed, capture_output=True, text=True, check=True).stdout if nvcc else ""
    return f"sm_{architecture}" in known.split()


@needs_nvdisasm
@pytest.mark.parametrize("architecture", BUILT)
def test_machine_code_of_the_library(architecture: int, tmp_path: Path) -> None:
    library = _library.build_info()["libraries"].get("cuda")
    if library is None:
        pytest.skip("not run: built without nvcc")
    if not re.search(rf"\b{architecture}\b", library["architectures"]):
        pytest.skip(f"not run: built for {library['architectures']}")
    found = [cubin for built_for, cubin in cubins(Path(library["path"]).read_bytes()) if built_for == architecture]
    assert len(found) >= len(SOURCES)
    kernels: set[str] = set()
    for number, cubin in enumerate(found):
        file = tmp_path / f"{number}.cubin"
        file.write_bytes(cubin)
        code = disassembled(file)
        assert_holds_what_is_claimed(code)
        kernels.update(code.instructions)
    assert kernels == {name for name in CLAIMS if architecture == 90 or not name.startswith("sm90_")}


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_machine_code_for_newer_gpus(source: Path, tmp_path: Path) -> None:
    nvcc = find_nvcc()
    assert nvcc
    if not is_known(NEWER):
        pytest.skip(f"not run: this nvcc does not know sm_{NEWER}")
    cubin = tmp_path / "cubin"
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{NEWER}", "-cubin", "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    assert_holds_what_is_claimed(disassembled(cubin))


def code(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


def test_kernels_use_the_wrappers_alone() -> None:
    """Raw instructions would run on a GPU only, and accesses of several elements at any address on a CPU only: the host
    model would not see them."""
    instructions = r"\basm\b|\b__[a-z]\w*|\bthreadIdx\b|\bblockIdx\b|<<<|\b(?:atomic\w+|printf)\s*\("
    raw = re.compile(rf"{instructions}|\*\s*reinterpret_cast")
    files = [path for path in CUDA.rglob("*") if path.suffix in {".cu", ".h"} and path.parent.name != "common"]
    assert files
    assert {path.name: raw.findall(code(path)) for path in files if raw.search(code(path))} == {}


@pytest.mark.parametrize(
    ("header", "test", "least"), [("ptx.h", "test_ptx.cu", 20), ("wgmma.h", "device/test_wgmma.cu", 8)]
)
def test_every_wrapper_is_tested_on_a_gpu(header: str, test: str, least: int) -> None:
    wrappers = set(re.findall(r"^DSV4_DEVICE [\w:]+ (\w+)\(", code(CUDA / "common" / header), re.MULTILINE))
    assert len(wrappers) >= least
    used = set(re.findall(r"\bptx::(\w+)", (ROOT / "tests" / "cuda_host" / test).read_text()))
    assert wrappers - used - {"shared_base"} == set()


def test_disassembly_is_understood() -> None:
    symbol = "_ZN4dsv44sm8018sm80_bf16_mhc_postENS0_13PostArgumentsE"
    text = (
        "\t//----- nvinfo : EIATTR_FRAME_SIZE\n\t.align\t\t4\n.L_1:\n        /*000c*/ \t.byte\t0x04, 0x11\n"
        "        /*000e*/ \t.short\t(.L_3 - .L_2)\n\t.align\t\t4\n.L_2:\n"
        f"        /*0010*/ \t.word\tindex@({symbol})\n        /*0014*/ \t.word\t0x00000040\n"
        f'\t.section\t.text.{symbol},"ax",@progbits\n'
        "        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;\n"
        "        /*0010*/              @!P0 STL.128 [R1], R8 ;\n"
    )
    code = parse_disassembly(text)
    assert code == ({"bf16_mhc_post": {"IMAD.MOV.U32", "STL.128"}}, {symbol: 64})
    with pytest.raises(AssertionError, match="stack, or spilled registers"):
        assert_holds_what_is_claimed(code)
    with pytest.raises(AssertionError, match="uses local memory"):
        assert_holds_what_is_claimed(code._replace(frames={symbol: 0}))


def test_cubins_are_found() -> None:
    def entry(kind: int, architecture: int, content: bytes) -> bytes:
        return struct.pack("<HHIQIIHHI", kind, 257, 64, len(content), 0, 0, 0, 0, architecture).ljust(64) + content

    entries = entry(2, 80, b"first") + entry(1, 90, b"PTX") + entry(2, 90, b"second")
    binary = b"before" + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    assert list(cubins(binary * 2)) == [(80, b"first"), (90, b"second")] * 2
