"""CPU memory in huge pages, where Linux gives them on request (MADV_HUGEPAGE)."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

__all__: list[str] = []  # not a family of ops: import from this module

_HUGE = 2 << 20  # bytes of a huge page on x86
_MADV_HUGEPAGE = 14  # sys/mman.h of Linux


def ask(address: int, nbytes: int) -> None:
    """Requests huge pages for `nbytes` of memory from `address` on, but not for its ends, where a huge page would hold
    other memory as well. Where the system refuses, or has no such call, the pages stay small."""
    begin, end = -(-address // _HUGE) * _HUGE, (address + nbytes) // _HUGE * _HUGE
    if begin < end:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch.zeros, on a CPU in huge pages; in a graph of torch.compile, which has no addresses, without.

    The rows that an indexer selects lie scattered over a pool of hundreds of megabytes. In pages of 4 KiB every one has
    its own, whose address takes about as long to translate as its row takes to fetch.
    """
    pages = torch.empty(shape, dtype=dtype, device=device)
    if pages.device.type == "cpu" and not torch.compiler.is_compiling():
        ask(pages.data_ptr(), pages.nbytes)
    return pages.zero_()
