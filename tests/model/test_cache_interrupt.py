"""Interrupts anywhere in a cache's own code: it and its copies go on exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from dependencies import CONFIGS, expected, filled, poison, run, tokens

from dsv4 import KVCache
from dsv4.cache import cache as cache_module
from dsv4.cache import pool as pool_module

CODE = {cache_module.__file__, pool_module.__file__}
CONFIG, IDS, NEW = CONFIGS["all kinds"], tokens(500), tokens(300, seed=1)


def interrupted(function: Callable[[], object], line: int) -> bool:
    """Whether the call got as far as the cache's line of this number, which a key press stopped."""
    passed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if frame.f_code.co_filename not in CODE:
            return None
        passed += event == "line"
        if event == "line" and passed == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def append(made: KVCache) -> None:
    run(made, [NEW])


def crop_far_and_append(made: KVCache) -> None:
    made.crop(150)
    run(made, [NEW[:10]])


@pytest.mark.parametrize("action", [append, crop_far_and_append])
def test_interrupts(action: Callable[[KVCache], None]) -> None:
    """A cache and its snapshot share pages, of which neither may give back the other's."""
    other = filled(CONFIG, IDS)
    line = 1
    while True:
        made = other.snapshot()
        if not interrupted(lambda made=made: action(made), line):
            break
        for pool in other._tables.pools:
            for tensor in pool.tensors:
                tensor[pool._free] = torch.nan
        kept = made.token_ids().tolist()
        assert kept in (IDS, IDS[:150], IDS + NEW, IDS[:150] + NEW[:10])
        got = run(made, [NEW[:20]])[0]  # past the end of an entry
        assert np.array_equal(got, expected(CONFIG, kept + NEW[:20])[len(kept) :]), line
        del made
        for kind, pool in enumerate(other._tables.pools):
            assert all(pool._holders[page] >= 1 for page in other._tables.pages(kind)), line
        line += 1
    assert line > 100
    again = other.snapshot()
    poison(again)
    assert np.array_equal(run(again, [NEW])[0], expected(CONFIG, IDS + NEW)[500:])
