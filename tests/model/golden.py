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
from dsv4.nn import Rows

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


def phases(run: Run) -> list[tuple[str, int, int]]:
    """(phase, first position, tokens) of the run's recorded calls."""
    steps = [(f"decode{index}", position, 1) for index, position in enumerate(range(run.prompt, run.length))]
    return [("prefill", 0, run.prompt), *steps]


def feed_forward_errors(shipped: dsv4.Transformer, run: Run) -> list[Tensor]:
    """Of each layer: relative errors of the rows of recorded calls whose routing is the recorded one."""
    recorded = tensors(run.case, "intermediates_quant")
    errors = []
    for layer, block in enumerate(shipped.layers):
        compared = []
        for phase, start, count in phases(run):
            key = f"{run.name}.{phase}.layers.{layer}"
            if f"{key}.ffn.in" not in recorded:
                continue
            ids = run.ids[:, start : start + count].reshape(-1).to(shipped.device)
            x = recorded[f"{key}.ffn.in"].flatten(0, 1).to(shipped.device)
            same = torch.ones(len(x), dtype=torch.bool)
            if f"{key}.gate.indices" in recorded:
                indices = block.ffn.gate(x, ids)[1].cpu()
                expected_indices = recorded[f"{key}.gate.indices"]
                same = (indices.sort(-1).values == expected_indices.sort(-1).values).all(-1)
            error = rel_rms(block.ffn(x, ids).cpu(), recorded[f"{key}.ffn.out"].flatten(0, 1))
            compared.append(error[same])
        errors.append(torch.cat(compared))
    return errors


Calls = list[tuple[str, Tensor, Tensor | None]]


def attention_calls(shipped: dsv4.Transformer, layer: int, run: Run) -> Calls:
    """The recorded inputs of a layer's attention, fed one after another through its cache: of each call the phase, the
    output and the indexer's selection (None without an indexer), in host memory."""
    recorded, attention = tensors(run.case, "intermediates_quant"), shipped.layers[layer].attn
    cache, calls = shipped.new_cache(run.batch, run.length), []
    for phase, start, count in phases(run):
        key = f"{run.name}.{phase}.layers.{layer}"
        if f"{key}.attn.in" not in recorded:
            break
        step = cache.begin(list(run.ids[:, start : start + count]))
        rows = Rows(shipped.frequencies, *step.tensors())
        selected: list[Tensor] = []
        hook = (
            attention.indexer.register_forward_hook(lambda *a, into=selected: into.append(a[-1].cpu()))
            if attention.indexer
            else None
        )
        x = recorded[f"{key}.attn.in"].flatten(0, 1).to(shipped.device)
        got = attention(x, rows, cache.layers[layer]).cpu()
        cache.commit(step)
        if hook is not None:
            hook.remove()
        calls.append((phase, got, selected[0] if selected else None))
    return calls


def attention_errors(calls: Calls, layer: int, run: Run, window: int) -> Tensor | None:
    """Relative errors of rows whose selection is the recorded one; None where the run recorded nothing."""
    recorded, compared = tensors(run.case, "intermediates_quant"), []
    for phase, got, selected in calls:
        key = f"{run.name}.{phase}.layers.{layer}"
        same = torch.ones(len(got), dtype=torch.bool)
        if selected is not None and f"{key}.indexer.topk_idxs" in recorded:
            offset = run.prompt if phase == "prefill" else window
            expected = recorded[f"{key}.indexer.topk_idxs"].flatten(0, -2).long()
            expected = torch.where(expected < 0, expected, expected - offset)
            same = torch.tensor(
                [set(e.tolist()) - {-1} == set(g.tolist()) - {-1} for e, g in zip(expected, selected, strict=True)]
            )
        assert same.float().mean() >= 0.5
        compared.append(rel_rms(got, recorded[f"{key}.attn.out"].flatten(0, 1))[same])
    return torch.cat(compared) if compared else None
