"""Every test draws the same random numbers each time, whatever ran before it."""

import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
