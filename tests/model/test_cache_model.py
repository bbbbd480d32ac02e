"""The cache under the real model, mode checkpoint: after a cut, a failure, a copy or a file, logits keep every bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from golden import model
from torch import Tensor

import dsv4
from dsv4 import KVCache
from dsv4.cache import cache_bytes


@cache
def deep_model() -> dsv4.Transformer:
    """So many layers that what a position depends on begins well after the sequence does."""
    config = replace(
        dsv4.Config.preset("nano"), hidden_size=128, num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 128),
        num_attention_heads=2, sliding_window=48, index_topk=16, n_routed_experts=4, num_hash_layers=1,
    )  # fmt: skip
    return dsv4.init(config, seed=7)


def subject(name: str) -> dsv4.Transformer:
    return deep_model() if name == "deep" else model(name, "checkpoint", torch.bfloat16)


def random_ids(checked: dsv4.Transformer, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(checked.config.vocab_size, (1, length), generator=generator)


def spoil(made: KVCache) -> None:
    """All bits set wherever no page is held: NaN, in every page format."""
    for pool in made._tables.pools:
        for tensor in pool.tensors:
            tensor.view(torch.uint8)[pool._free] = 255


def replayed(made: KVCache) -> list[int]:
    """First positions of the steps that the next call of a model will run again."""
    copy, starts = made.snapshot(), []
    for step in copy.pending():
        starts += [start for _, start, _ in step.spans]
        copy.commit(step)
    return starts


# Around the blocks of 4, 128 and 256, and odd places between.
LENGTHS = [1, 4, 5, 63, 127, 128, 129, 200, 255, 256, 257, 283, 300]


@pytest.mark.parametrize("name", ["dev_a", "dev_b", "deep"])
@torch.no_grad()
def test_crop(name: str) -> None:
    """From 45 other tokens later, back to a length, and on: as if the others had never been."""
    checked = subject(name)
    ids, others, new = (random_ids(checked, length, seed) for seed, length in enumerate((300, 45, 9)))
    main = checked.new_cache()
    for length in LENGTHS if name != "deep" else LENGTHS[1::3]:
        checked(ids[:, main.length : length], cache=main)
        straight, cut = main.snapshot(), main.snapshot()
        checked(others, cache=cut)
        cut.crop(length)
        spoil(cut)
        assert replayed(cut)
        assert torch.equal(checked(new, cache=cut), checked(new, cache=straight)), length
        assert cut.token_ids().tolist() == straight.token_ids().tolist()


@torch.no_grad()
def test_crop_far_into_a_sequence() -> None:
    """The replay starts in the middle, its first rows are wrong in the upper layers, and the last are right."""
    checked = deep_model()
    ids, others, new = (random_ids(checked, length, seed) for seed, length in enumerate((900, 600, 130)))
    straight = checked.new_cache()
    checked(ids, cache=straight)
    cut = straight.snapshot()
    checked(others, cache=cut)
    cut.crop(900)
    spoil(cut)
    assert replayed(cut)[0] >= 512
    assert torch.equal(checked(new, cache=cut), checked(new, cache=straight))


@torch.no_grad()
def test_failure_in_a_layer() -> None:
    checked = deep_model()
    ids, new = random_ids(checked, 280, 0), random_ids(checked, 30, 1)
    made = checked.new_cache()
    checked(ids, cache=made)
    straight = made.snapshot()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for layer, count in ((0, 30), (3, 1), (3, 30), (4, 12)):
        handle = checked.layers[layer].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            checked(random_ids(checked, count, layer + 2), cache=made)
        handle.remove()
        assert made.length == 280
    assert torch.equal(checked(new, cache=made), checked(new, cache=straight))


@torch.no_grad()
def test_file_copies_and_bytes(tmp_path: Path) -> None:
    checked = deep_model()
    ids, new = random_ids(checked, 280, 0), random_ids(checked, 30, 1)
    made = checked.new_cache()
    checked(ids, cache=made)
    assert made.nbytes == cache_bytes(checked.config, 280)
    made.save(tmp_path / "cache")
    two = made.fork([0, 0])
    expected = checked(new, cache=made)
    assert torch.equal(checked(new, cache=KVCache.load(tmp_path / "cache", checked.config)), expected)
    both = checked(torch.cat([new, new.flip(1)]), cache=two)
    assert torch.equal(both[:1], expected)
    assert two.lengths == (310, 310)
    fresh = checked.new_cache()
    checked(ids, cache=fresh)
    assert torch.equal(both[1:], checked(new.flip(1), cache=fresh))
