"""Decoding from a recording: the same bits as without, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dsv4
from dsv4.model.recording import MOST_ROWS, NotRecordable, RecordedModel, Recording

CONSTANT = torch.ones(3)


@pytest.fixture(scope="module")
def model() -> dsv4.Transformer:
    return dsv4.init(dsv4.Config.preset("nano"), seed=3)


def decode(model: Callable[..., Tensor], cache: dsv4.KVCache, count: int, width: int = 1, first: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(first)
    steps = [torch.randint(0, 512, (cache.batch_size, width), generator=generator) for _ in range(count)]
    with torch.no_grad():
        return torch.cat([model(step, cache, logits_to_keep=1) for step in steps])


def filled(model: dsv4.Transformer, lengths: list[int], **options: int) -> dsv4.KVCache:
    cache = model.new_cache(batch_size=len(lengths), **options)
    ids = torch.randint(0, 512, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids, cache=cache, num_tokens=lengths, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("lengths", [[1], [250], [300, 5, 131]])
@pytest.mark.parametrize("width", [1, 3])
def test_the_same_bits_as_the_model(model: dsv4.Transformer, lengths: list[int], width: int) -> None:
    """Across block boundaries, where tables grow, and pools that are replaced by larger ones."""
    recorded = RecordedModel(model)
    expected = decode(model, filled(model, lengths), 12, width)
    assert torch.equal(decode(recorded, filled(model, lengths), 12, width), expected)
    assert recorded._recording is not None and len(recorded._recording) > 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mode_off(dtype: torch.dtype) -> None:
    model = dsv4.init(dsv4.Config.preset("nano"), quantization="off", dtype=dtype, seed=4)
    recorded = RecordedModel(model)
    assert torch.equal(decode(recorded, filled(model, [140]), 6), decode(model, filled(model, [140]), 6))
    assert recorded._recording is not None


def test_crops_snapshots_other_caches_and_prefill_in_between(model: dsv4.Transformer) -> None:
    def session(call: Callable[..., Tensor]) -> Tensor:
        cache, other = filled(model, [260]), filled(model, [33])
        found = [decode(call, cache, 5)]
        kept = cache.snapshot()
        found.append(decode(call, cache, 4, first=8))
        cache.crop(258)
        found.append(decode(call, cache, 4, first=9))
        found.append(decode(call, kept, 4, first=9))
        found.append(decode(call, other, 4))
        cache.crop(20)  # far enough back that the model runs rows again first
        found.append(decode(call, cache, 4))
        with torch.no_grad():
            found.append(call(torch.full((1, MOST_ROWS + 1), 9), cache, logits_to_keep=1))
        found.append(decode(call, cache, 4))
        return torch.cat(found)

    assert torch.equal(session(RecordedModel(model)), session(model))


def test_weights_changed_in_place_are_seen(model: dsv4.Transformer) -> None:
    recorded, cache = RecordedModel(model), filled(model, [40])
    before = decode(recorded, cache, 4)
    bias = model.layers[5].ffn.gate.bias
    assert bias is not None
    saved = bias.clone()
    with torch.no_grad():
        bias.copy_(torch.linspace(1, -1, bias.numel()))
    try:
        cache.crop(40)
        after = decode(recorded, cache, 4)
        cache.crop(40)
        assert torch.equal(after, decode(model, cache, 4)) and not torch.equal(after, before)
    finally:
        with torch.no_grad():
            bias.copy_(saved)


def test_what_is_left_to_the_model(model: dsv4.Transformer) -> None:
    """Gradients on, dispatch modes, hooks, long steps: nothing is recorded, everything is seen."""
    recorded, cache = RecordedModel(model), filled(model, [40])
    for _ in range(3):
        assert not recorded(torch.tensor([[1]]), cache).requires_grad
    with dsv4.ops.use_reference():
        decode(recorded, cache, 3)
    assert recorded._recording is None
    seen = []
    handle = model.layers[2].register_forward_hook(lambda *_: seen.append(1))
    try:
        decode(RecordedModel(model), cache, 5)
    finally:
        handle.remove()
    assert len(seen) == 5


def test_a_failed_step_leaves_the_cache(model: dsv4.Transformer) -> None:
    recorded, cache = RecordedModel(model), filled(model, [40], max_seq_len=44)
    decode(recorded, cache, 4)
    with pytest.raises(ValueError, match="would have 45 tokens, max_seq_len is 44"):
        decode(recorded, cache, 1)
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 512\), got 512 to 512"), torch.no_grad():
        recorded(torch.tensor([[512]]), cache)
    assert cache.length == 44


def test_the_result_is_an_ordinary_tensor(model: dsv4.Transformer) -> None:
    logits = decode(RecordedModel(model), filled(model, [9]), 3)
    assert not logits.is_inference()


def test_generate_uses_it(model: dsv4.Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    call = Recording.__call__
    monkeypatch.setattr(Recording, "__call__", lambda self, *inputs: called.append(1) or call(self, *inputs))
    recorded = list(model.generate([5, 6, 7], 9))
    assert len(called) == 6  # of 8 steps, the first runs, the second is recorded
    cache, expected, logits = model.new_cache(), [], None
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]]), cache)
        for _ in range(9):
            expected.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([expected[-1:]]), cache)
    assert recorded == expected


def test_functions_in_general() -> None:
    """Lists of tensors, several results, views, ops in place, constants and operands returned unchanged."""
    weight, total = torch.randn(4), torch.zeros(4)

    def function(x: Tensor, y: Tensor) -> Tensor:
        low, high = torch.cat([x.reshape(2, 2), y.to(torch.float32)], 1).sort(dim=1)[0].chunk(2, dim=1)
        total.add_(low.flatten() * weight)
        return (high.T.contiguous().view(4) + total).mul_(2)

    with torch.inference_mode():
        x, y = torch.randn(4), torch.randn(2, 2)
        recording = Recording(function, x, y)
        total.zero_()
        assert torch.equal(recording(x, y), recording.result)
        for _ in range(3):
            x, y = torch.randn(4), torch.randn(2, 2)
            total.zero_()
            found = recording(x, y)
            total.zero_()
            assert torch.equal(found, function(x, y))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x * float(x.sum()), id="a value"),
        pytest.param(lambda x: x[x > 0] if bool((x > 0).any()) else x, id="a branch"),
        pytest.param(lambda x: CONSTANT, id="a result that no op made"),
    ],
)
def test_what_cannot_be_recorded(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotRecordable), torch.inference_mode():
        Recording(function, torch.randn(3))
