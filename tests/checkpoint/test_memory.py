"""Memory of the process: what `keep_freed` changes."""

import subprocess
import sys
from pathlib import Path

import pytest

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FAULTS = """
import resource, sys, torch
from dsv4.checkpoint import memory

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.full((64 << 20,), 1, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults(1)
if "keep" in sys.argv:
    memory.keep_freed()
    memory.keep_freed()
first = faults(1)
print(plain, first, faults(3), memory.resident())
"""


def run(*arguments: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return [int(word) for word in done.stdout.split()]


@pytest.fixture
def huge_pages() -> str:
    """When the kernel gives them."""
    mode = THP.read_text() if THP.exists() else "[never]"
    if "[always]" in mode:
        pytest.skip("not run: this kernel gives huge pages without being asked")
    return mode


def test_freed_memory_is_handed_out_again(huge_pages: str) -> None:
    plain, _, again, kept = run("keep")
    assert plain > 1000, "64 MiB in pages of 4 KiB"
    assert again < plain / 20
    assert kept < run()[3] + (512 << 20), "most of what is reserved is not touched"


def test_new_memory_comes_in_huge_pages(huge_pages: str) -> None:
    if "[never]" in huge_pages:
        pytest.skip("not run: this kernel gives no huge pages")
    plain, first, _, _ = run("keep")
    assert first < plain / 20
