"""A row's result does not depend on the chunks a prompt is cut into, nor on the sequences beside it: to the bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from golden import feed, model, random_cuts, rel_rms
from torch import Tensor

import dsv4
from dsv4.testing import implementation_cases, max_isa

LENGTH = 300


@cache
def deep_model() -> dsv4.Transformer:
    """More layers than the golden cases have, of every kind, with a selection that selects."""
    config = replace(
        dsv4.Config.preset("nano"),
        num_hidden_layers=5,
        compress_ratios=(0, 4, 128, 4, 128),
        index_topk=16,
        num_hash_layers=1,
    )
    return dsv4.init(config, seed=7)


def subject(name: str) -> dsv4.Transformer:
    return deep_model() if name == "deep" else model(name, "checkpoint", torch.bfloat16)


@cache
def whole(name: str) -> tuple[Tensor, Tensor]:
    """Token ids of two sequences and their logits, fed in one piece each."""
    checked = subject(name)
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(checked.config.vocab_size, (2, LENGTH), generator=generator)
    with torch.no_grad():
        return ids, torch.cat([feed(checked, row[None], [LENGTH]) for row in ids])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["dev_a", "dev_b", "dev_c", "deep"])
@torch.no_grad()
def test_chunks(name: str, seed: int) -> None:
    ids, expected = whole(name)
    got = feed(subject(name), ids[:1], random_cuts(LENGTH, seed))
    assert torch.equal(got, expected[:1])


@pytest.mark.parametrize("name", ["dev_a", "dev_b", "dev_c", "deep"])
@torch.no_grad()
def test_single_tokens(name: str) -> None:
    ids, expected = whole(name)
    got = feed(subject(name), ids[:1, :140], [1] * 140)
    assert torch.equal(got, expected[:1, :140])


@pytest.mark.parametrize("name", ["dev_a", "dev_b", "dev_c", "deep"])
@torch.no_grad()
def test_company(name: str) -> None:
    """Two sequences at different lengths, advancing by different amounts, give what each gives alone."""
    checked = subject(name)
    ids, expected = whole(name)
    cache = checked.new_cache(2, LENGTH)
    done = [0, 0]
    for step, counts in enumerate([(130, 1), (0, 140), (5, 3), (1, 1), (100, 2), (0, 60)]):
        width = max(counts)
        chunk = torch.zeros(2, width, dtype=torch.long)
        for row, count in enumerate(counts):
            chunk[row, :count] = ids[row, done[row] : done[row] + count]
        logits = checked(chunk, cache=cache, num_tokens=counts)
        for row, count in enumerate(counts):
            assert torch.equal(logits[row, :count], expected[row, done[row] : done[row] + count]), (step, row)
            assert not logits[row, count:].any()
            done[row] += count
    assert cache.lengths == tuple(done)


@pytest.mark.parametrize("name", ["dev_a", "deep"])
@torch.no_grad()
def test_stateless_batch(name: str) -> None:
    ids, expected = whole(name)
    assert torch.equal(subject(name)(ids), expected)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 127, 128, 129, 200, 255, 256, 257, 290, 299])
@torch.no_grad()
def test_crop_and_continue(length: int) -> None:
    checked = subject("deep")
    ids, expected = whole("deep")
    cache = checked.new_cache(1, LENGTH)
    checked(ids[:1], cache=cache)
    cache.crop(length)
    got = torch.cat([checked(piece, cache=cache) for piece in ids[:1, length:].split(37, dim=1)], dim=1)
    assert torch.equal(got, expected[:1, length:])


@torch.no_grad()
def test_threads() -> None:
    checked = subject("deep")
    ids, expected = whole("deep")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(feed(checked, ids[:1, :150], [131, 1, 1, 17]), expected[:1, :150]), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", implementation_cases("mhc_pre"))
@torch.no_grad()
def test_chunks_on_every_instruction_set(isa: str) -> None:
    """The kernels of a lower instruction set keep the rule too, and stay near the best ones."""
    checked = subject("dev_b")
    ids, best = whole("dev_b")
    with max_isa(isa):
        expected = feed(checked, ids[:1], [LENGTH])
        assert torch.equal(feed(checked, ids[:1], random_cuts(LENGTH, 5)), expected)
    assert rel_rms(expected, best[:1]).median() <= 0.10
