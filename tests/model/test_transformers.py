"""Random models of transformers, saved by it and loaded here, against its own logits and gradients in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import feed, random_cuts
from torch import Tensor
from transformers_models import MODELS, save_transformers_model

import dsv4
from dsv4.checkpoint.names import released_name, stacked_experts

LENGTH = 300
TRAINED = 150  # past every window but that of "wide", with entries of every ratio


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


@cache
def both(name: str, folder: Path) -> tuple[dsv4.Transformer, Tensor, Tensor]:
    """Our model, token ids [2, LENGTH], and the logits of transformers."""
    theirs = save_transformers_model(name, folder / name)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(theirs.config.vocab_size, (2, LENGTH), generator=generator)
    with torch.no_grad():
        expected = theirs(ids).logits
    return dsv4.load(folder / name, quantization="off", dtype=torch.float32), ids, expected


@pytest.mark.parametrize("way", ["stateless", "one piece", "chunks"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(name: str, way: str, folder: Path) -> None:
    ours, ids, expected = both(name, folder)
    if way == "stateless":
        got = ours(ids)
    else:
        got = feed(ours, ids, [LENGTH] if way == "one piece" else random_cuts(LENGTH, 1))
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 1e-4


def gradients_of_transformers(model: Any) -> dict[str, Tensor]:
    """Its gradients by the names of our parameters, which stack experts as it does, w1 and w3 apart."""
    found = {}
    for key, parameter in model.named_parameters():
        name = released_name(key)
        assert name is not None
        if parameter.grad is None:
            continue
        stacked = stacked_experts(name)
        if stacked is None:
            found[name] = parameter.grad
        elif stacked[1] == "down_proj":
            found[f"{stacked[0]}.w2"] = parameter.grad
        else:
            found[f"{stacked[0]}.w1"], found[f"{stacked[0]}.w3"] = parameter.grad.chunk(2, dim=1)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str, folder: Path) -> None:
    """Of every parameter: of a loss that weights all logits at random. The index has none, there or here."""
    theirs = save_transformers_model(name, folder / name)
    ours = dsv4.load(folder / name, quantization="off", dtype=torch.float32)
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(theirs.config.vocab_size, (2, TRAINED), generator=generator)
    weight = torch.randn(2, TRAINED, theirs.config.vocab_size, generator=generator)
    for model in (theirs, ours):
        logits = model(ids)
        (getattr(logits, "logits", logits) * weight).sum().backward()
    own = {key: parameter.grad for key, parameter in ours.named_parameters() if parameter.grad is not None}
    expected = gradients_of_transformers(theirs)
    assert own.keys() == expected.keys()
    # One expert a token has a weight of 1, whatever the gate says: both gate gradients are rounding errors.
    floor = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
    for key, gradient in own.items():
        assert float((gradient - expected[key]).norm()) <= 1e-5 * float(expected[key].norm()) + floor, key
