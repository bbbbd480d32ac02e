"""A call keeps nothing: memory does not grow over the steps of a model, decoding or training."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv4
from dsv4 import _library

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="not run: memory is read from Linux"),
    pytest.mark.skipif(not _library.kernel_implementations(), reason="not run: this machine has no op library"),
]


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def decoding() -> Callable[[], None]:
    model = dsv4.load("nano")
    ids = torch.arange(12).unsqueeze(0)
    cache = model.new_cache(max_seq_len=256)

    def step() -> None:
        with torch.no_grad():
            model(ids, cache=cache)
            copy = cache.snapshot()
            model(ids[:, :1], cache=copy)
            copy.crop(3)
            cache.crop(0)

    return step


def generating() -> Callable[[], None]:
    model = dsv4.load("nano")
    return lambda: [*model.generate([1, 2, 3], max_new_tokens=4)] and None


def training() -> Callable[[], None]:
    config = replace(dsv4.Config.preset("nano"), num_hidden_layers=3, compress_ratios=(0, 4, 128))
    model = dsv4.init(config, quantization="off", dtype=torch.float32)
    ids = torch.arange(8).unsqueeze(0)

    def step() -> None:
        model.zero_grad()
        model(ids).square().mean().backward()

    return step


@pytest.mark.parametrize(("kind", "steps"), [(decoding, 65), (generating, 25), (training, 12)])
def test_no_step_leaves_memory_behind(kind: Callable[[], Callable[[], None]], steps: int) -> None:
    """Decoding and generating: 1,000 calls of an op that each layer has, every time."""
    step = kind()
    grown = []
    for _ in range(3):  # the first warms up; what the allocator still takes after it, it does not take every time
        before = resident()
        for _ in range(steps):
            step()
        grown.append(resident() - before)
    assert min(grown[1:]) < 1 << 20, f"{steps} steps take {grown[1:]} bytes each time"
