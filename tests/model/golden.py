"""Readers of the golden cases in tests/data/golden, and the ways a run is fed to a model."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import dsv4

ROOT = Path(__file__).parent.parent / "data" / "golden"
CASES = ("dev_a", "dev_b", "dev_c")


@dataclass(frozen=True)
class Run:
    """One run of a case: token ids [batch, length], the first `prompt` of which are the prompt."""

    case: str
    name: str
    prompt: int
    length: int
    batch: int

    @property
    def ids(self) -> Tensor:
        return tensors(self.case, "inputs")[f"{self.name}.input_ids"].long()

    def __str__(self) -> str:
        return f"{self.case}-{self.name}"


@cache
def tensors(case: str, name: str) -> dict[str, Tensor]:
    return load_file(ROOT / case / f"{name}.safetensors")


@cache
def model(case: str, quantization: str, dtype: torch.dtype) -> dsv4.Transformer:
    return dsv4.load(ROOT / case, quantization=quantization, dtype=dtype)


def runs() -> list[Run]:
    found = []
    for case in CASES:
        for name, run in json.loads((ROOT / case / "meta.json").read_text())["runs"].items():
            found.append(Run(case, name, run["prompt_len"], run["total_len"], run["batch"]))
    return found


def random_cuts(length: int, seed: int) -> list[int]:
    """Chunk lengths that add up to `length`, most short, some long."""
    generator, chunks = random.Random(seed), []
    while length:
        chunks.append(min(length, generator.choice([1, 2, 3, 5, 8, 17, 64, 131])))
        length -= chunks[-1]
    return chunks


def feed(model: dsv4.Transformer, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits of all positions, fed through a cache in these chunks."""
    cache = model.new_cache(ids.shape[0], max_seq_len=ids.shape[1])
    pieces = [model(piece, cache=cache) for piece in ids.split(chunks, dim=1)]
    assert cache.length == ids.shape[1]
    return torch.cat(pieces, dim=1)


def rel_rms(got: Tensor, expected: Tensor) -> Tensor:
    """rms(got - expected) / rms(expected) over the last axis."""
    got, expected = got.double(), expected.double()
    return (got - expected).pow(2).mean(-1).sqrt() / expected.pow(2).mean(-1).sqrt().clamp_min(1e-30)
