"""The cases of `dsv4 bench` on a CUDA device, which the host plays where there is none (cuda_device.py): that each is
made there, runs and passes its check. What is timed is the machine's own business."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_device import GPU, NO_DEVICE, WHY_NOT, Device, cuda_device

from dsv4 import bench
from dsv4.bench.measure import judge

pytestmark = pytest.mark.skipif(NO_DEVICE, reason=WHY_NOT)

FAMILIES = bench.families()
# torch's autograd does not start on the device that the host plays.
GRADIENTS = [op for op in FAMILIES if op.endswith("_backward")]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if not GPU:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=None: (1 << 33, 1 << 34))
        for name in ("memory_reserved", "memory_allocated"):
            monkeypatch.setattr(f"torch.cuda.{name}", lambda device=None: 0)
    with cuda_device() as device:
        yield device


@pytest.mark.parametrize("op", [op for op in FAMILIES if GPU or op not in GRADIENTS])
def test_case_passes_its_check(op: str, device: Device) -> None:
    found = list(FAMILIES[op].cases(op, "nano", 33, torch.device("cuda")))
    assert found
    for case in found:
        with torch.no_grad() if not case.is_gradient else torch.enable_grad():
            before = device.calls().get(op, 0)
            device.waits.clear()
            case.run()
            assert device.calls().get(op, 0) > before
            assert not device.waits
        error, limit = judge(case)
        assert error <= limit, case.shape


@pytest.mark.parametrize("op", GRADIENTS)
def test_gradient_is_made(op: str, device: Device) -> None:
    """With its forward pass, on the device."""
    assert list(FAMILIES[op].cases(op, "nano", 33, torch.device("cuda")))
