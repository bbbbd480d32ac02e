"""Memory of this process: what the kernel counts, and what the C library does with freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
from pathlib import Path

from dsv4.ops import huge_pages

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
# Of the heap, in huge pages: the results of some thousands of tokens in a layer of V4-Flash, and below the threshold
# from which free memory would go back.
_HEAP_BYTES = 1 << 30


def resident() -> int:
    """Bytes of this process in memory now (RSS)."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes of this process in memory since `reset_peak`, or since it began where that is not to be had."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Give freed memory back, and let `peak` begin anew from what is left."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)


def keep_freed() -> None:
    """Let the C library hand out freed memory again from now on, as torch does on a GPU.

    Otherwise glibc takes every large result as new memory, which the kernel clears page by page: for an op bound by
    bandwidth that takes longer than the op. What the heap grows by next, up to _HEAP_BYTES, is cleared 2 MiB at a time:
    the first results take new memory in any case. Nothing changes with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.malloc.restype = ctypes.c_void_p
        heap = libc.malloc(ctypes.c_size_t(_HEAP_BYTES))  # reserved, not touched
        if heap is not None:
            huge_pages.ask(heap, _HEAP_BYTES)
            libc.free(ctypes.c_void_p(heap))


def available() -> int | None:
    """Bytes that the machine could give to a program now; None where it does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found.group(1)) << 10 if found else None
    return None


def _status(field: str) -> int:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} bytes"


def parse_size(text: str) -> int:
    """Bytes: digits with K, M, G or T for powers of 1024 ("8G", "512M", "1.5GiB", "1048576").

    Raises: ValueError for anything else, or less than one byte.
    """
    found = re.fullmatch(r"(\d{1,100}(?:\.\d{1,100})?)([kmgt]?)(?:i?b)?", text.strip().lower(), re.ASCII)
    count = int(float(found.group(1)) * (1 << 10 * " kmgt".index(found.group(2) or " "))) if found else 0
    if count < 1:
        raise ValueError(f"{text!r} is no amount of memory; write 8G or 512M")
    return count
