"""torch.compile of a whole model: the bits of the model itself, with and without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import dsv4

CONFIG = replace(dsv4.Config.preset("nano"), num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
IDS = torch.arange(2, 282).view(2, 140)


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    """None of another test's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("quantization", ["checkpoint", "off"])
def test_model(quantization: str) -> None:
    model = dsv4.init(CONFIG, quantization=quantization)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS), model(IDS))
        assert torch.equal(compiled(IDS[:, :77]), model(IDS[:, :77]))
        own, other = model.new_cache(batch_size=2), model.new_cache(batch_size=2)
        for first, end in ((0, 130), (130, 131), (131, 132), (132, 140)):
            assert torch.equal(compiled(IDS[:, first:end], other), model(IDS[:, first:end], own))
    expected = list(model.generate(IDS[0], max_new_tokens=4))
    assert list(dsv4.generate(compiled, IDS[0], max_new_tokens=4)) == expected


def test_wrong_tokens() -> None:
    compiled = torch.compile(dsv4.init(CONFIG), backend="aot_eager")
    with pytest.raises(ValueError, match=r"must lie in \[0, 512\), got 0 to 512"):
        compiled(torch.tensor([[0, 512]]))
