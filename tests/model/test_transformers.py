"""Random models of transformers, saved by it and loaded here, against its own logits in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from golden import feed, random_cuts
from torch import Tensor
from transformers_models import MODELS, save_transformers_model

import dsv4

LENGTH = 300


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
