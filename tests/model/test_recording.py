"""Decoding from a recording: the same bits as without, whatever happens in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4
from dsv4.model import recording as module
from dsv4.model.recording import MOST_ROWS, NotRecordable, RecordedModel, Recording
from dsv4.testing import max_isa

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


def test_kernels_and_ops_of_torch_in_turns() -> None:
    """Results and scratch memory of kernels, in memory of the recording's own."""
    weight = torch.linspace(0.5, 2, 64)

    def function(x: Tensor) -> Tensor:
        turned = dsv4.ops.hadamard(dsv4.ops.rms_norm(x, weight))
        return dsv4.ops.rms_norm((turned + 1).view(2, 96), None).view(3, 64)[1:]

    with torch.inference_mode():
        recording = Recording(function, torch.randn(3, 64))
        assert len(recording) == 4
        for seed in range(4):
            x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(recording(x), function(x))


def test_more_threads_than_recorded(model: dsv4.Transformer) -> None:
    expected, recorded, cache = decode(model, filled(model, [70]), 8), RecordedModel(model), filled(model, [70])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = [decode(recorded, cache, 4)]
        torch.set_num_threads(4)
        cache.crop(74)
        found.append(decode(recorded, cache, 8)[4:])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(found)[:4], expected[:4])
    cache.crop(70)
    assert torch.equal(decode(recorded, cache, 8), expected)


def test_the_memory_of_weights_is_kept() -> None:
    """Given other memory, a weight's old values go on being used, not what comes to lie there."""
    weight = torch.ones(1 << 16)

    def function(x: Tensor) -> Tensor:
        return dsv4.ops.rms_norm(x, weight)

    with torch.inference_mode():
        x = torch.randn(1, 1 << 16)
        recording = Recording(function, x)
        expected = recording(x).clone()
        weight.data = torch.zeros(4)
        torch.full((1 << 16,), 5.0)
        assert torch.equal(recording(x), expected)


def test_without_room_the_model_runs(model: dsv4.Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 100_000)
    recorded = RecordedModel(model)
    assert torch.equal(decode(recorded, filled(model, [20]), 5), decode(model, filled(model, [20]), 5))
    assert recorded._recording is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(lambda x: x * float(x.sum()), "reads the value of a tensor", id="a value"),
        pytest.param(lambda x: x[x > 0] if bool((x > 0).any()) else x, "reads the value of a tensor", id="a branch"),
        pytest.param(lambda x: CONSTANT, "the result is not made by a recorded op", id="a result that no op made"),
        pytest.param(lambda x: dsv4.ops.rms_norm(x.T, None), "an op copied an operand first", id="a copied operand"),
    ],
)
def test_what_cannot_be_recorded(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(NotRecordable, match=message), torch.inference_mode():
        Recording(function, torch.randn(3, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops: ops._cpu_tape_run(999_999, 0, 1), "tape_run: there is no tape 999999"),
        (lambda ops: ops._cpu_tape_calls(), "tape_calls: nothing is being recorded"),
        (lambda ops: ops._cpu_tape_end(), "tape_end: nothing is being recorded"),
    ],
)
def test_wrong_use_of_a_tape(call: Callable[[object], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.dsv4)


def test_calls_outside_of_a_tape() -> None:
    ops = torch.ops.dsv4
    ops._cpu_tape_begin()
    dsv4.ops.rms_norm(torch.randn(2, 32), None)
    tape = ops._cpu_tape_end()
    for first, last in ((0, 2), (-1, 1), (1, 0)):
        with pytest.raises(RuntimeError, match=rf"calls lie in \[0, 1\], got {first} to {last}"):
            ops._cpu_tape_run(tape, first, last)
    ops._cpu_tape_run(tape, 0, 1)
    ops._cpu_tape_free(tape)
    with pytest.raises(RuntimeError, match="there is no tape"):
        ops._cpu_tape_run(tape, 0, 1)


def test_the_instruction_set_may_change(model: dsv4.Transformer) -> None:
    """Scratch memory is measured at each replay: what ran without may need some now."""
    recorded, cache, plain = RecordedModel(model), filled(model, [140]), filled(model, [140])
    with max_isa("scalar"):
        assert torch.equal(decode(recorded, cache, 3), decode(model, plain, 3))
    decode(recorded, cache, 3, first=3)
    assert cache.length == 146


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_records_for_itself(model: dsv4.Transformer, how: Callable[..., Any]) -> None:
    recorded, cache = RecordedModel(model), filled(model, [140])
    decode(recorded, cache, 4)
    assert recorded._recording is not None
    copied, its_cache = how(recorded), copy.deepcopy(cache)
    assert copied._recording is None
    expected = decode(model, cache.snapshot(), 5, first=8)
    assert torch.equal(decode(copied, its_cache, 5, first=8), expected)
    assert torch.equal(decode(recorded, cache, 5, first=8), expected)
