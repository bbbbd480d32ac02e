"""torch.compile and torch.export of a whole model, and of its blocks one by one: the bits of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def test_blocks_compiled_one_by_one() -> None:
    """A graph for each kind of layer: none for what another layer has left in the rows that they share."""
    config = replace(CONFIG, num_hidden_layers=6, compress_ratios=(0, 4, 128) * 2, num_hash_layers=0)
    model, compiled = (dsv4.init(config, 0, "off", torch.float32) for _ in range(2))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    for block in compiled.layers:
        block.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IDS), model(IDS))
        assert len(graphs) == 3
        assert torch.equal(compiled(IDS, cache=compiled.new_cache(2)), model(IDS, cache=model.new_cache(2)))
        assert len(graphs) == 6


@pytest.mark.parametrize("quantization", ["checkpoint", "off"])
@torch.no_grad()
def test_export(quantization: str) -> None:
    model = dsv4.init(CONFIG, quantization=quantization)
    exported = torch.export.export(model, (IDS,), strict=False).module()
    assert torch.equal(exported(IDS), model(IDS))
    with pytest.raises(IndexError):
        exported(IDS + CONFIG.vocab_size)


@pytest.mark.parametrize("lengths", [(99, 120), (600, 777)])
@pytest.mark.parametrize("training", [False, True])
def test_marked_sizes(lengths: tuple[int, int], training: bool) -> None:
    """One graph for batches, and for lengths that mean as many pages and entries, as far as 0, 1 and more go: nothing
    asks for the number itself."""
    model = dsv4.init(CONFIG, 0, "off", torch.float32).requires_grad_(training)
    compiled = torch.compile(model, backend="aot_eager")
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for batch, length in zip((2, 3), lengths, strict=True):
        ids = torch.randint(CONFIG.vocab_size, (batch, length))
        torch._dynamo.mark_dynamic(ids, 0)
        torch._dynamo.mark_dynamic(ids, 1)
        logits, expected = compiled(ids), model(ids)
        assert torch.equal(logits, expected)
        if training:
            found, own = (torch.autograd.grad(x.sum(), model.layers[1].attn.wkv.weight) for x in (logits, expected))
            torch.testing.assert_close(found, own)
    assert counters["unique_graphs"] == 1


@torch.no_grad()
def test_export_of_any_size() -> None:
    """Past a page of 256 tokens, where the example is."""
    model = dsv4.init(CONFIG, 0, "off", torch.float32)
    auto = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    example = torch.randint(CONFIG.vocab_size, (2, 600))
    exported = torch.export.export(model, (example,), dynamic_shapes=auto, strict=False).module()
    for batch, length in ((2, 257), (3, 777)):
        ids = torch.randint(CONFIG.vocab_size, (batch, length))
        assert torch.equal(exported(ids), model(ids))


def test_wrong_tokens() -> None:
    compiled = torch.compile(dsv4.init(CONFIG), backend="aot_eager")
    with pytest.raises(ValueError, match=r"must lie in \[0, 512\), got 0 to 512"):
        compiled(torch.tensor([[0, 512]]))
