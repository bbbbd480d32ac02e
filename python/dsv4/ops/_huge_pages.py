"""Memory of page pools on a CPU."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page on x86
_MADV_HUGEPAGE = 14  # sys/mman.h of Linux


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch.zeros; on a CPU in huge pages, where the kernel gives them to who asks.

    The rows that an indexer selects lie scattered over a pool of hundreds of megabytes. In pages of 4 KiB every one has
    its own, whose address takes about as long to translate as its row takes to fetch.
    """
    pages = torch.empty(shape, dtype=dtype, device=device)
    if pages.device.type == "cpu" and pages.nbytes >= 2 * _HUGE:
        begin = -(-pages.data_ptr() // _HUGE) * _HUGE
        end = (pages.data_ptr() + pages.nbytes) // _HUGE * _HUGE
        with contextlib.suppress(OSError, AttributeError):  # no such call; a kernel that refuses leaves small pages
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
    return pages.zero_()
