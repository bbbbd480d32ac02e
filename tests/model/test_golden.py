"""The whole model against the outputs of the official program."""

from __future__ import annotations

import json

import pytest
import torch
from golden import (
    CASES,
    ROOT,
    Run,
    attention_calls,
    attention_errors,
    feed,
    feed_forward_errors,
    model,
    random_cuts,
    rel_rms,
    runs,
    tensors,
)
from torch import Tensor

RUNS = runs()
SCHEDULES = {
    "stateless": None,
    "prefill": lambda run: [run.length],
    "prefill+steps": lambda run: [run.prompt] + [1] * (run.length - run.prompt),
    "chunks0": lambda run: random_cuts(run.length, 0),
    "chunks1": lambda run: random_cuts(run.length, 1),
    "chunks2": lambda run: random_cuts(run.length, 2),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("run", RUNS, ids=str)
@torch.no_grad()
def test_strict_logits(run: Run, schedule: str) -> None:
    strict = model(run.case, "off", torch.float32)
    chunks = SCHEDULES[schedule]
    got = strict(run.ids) if chunks is None else feed(strict, run.ids, chunks(run))
    expected = tensors(run.case, "expected_fp32")[f"{run.name}.logits"]
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("run", [run for run in RUNS if run.batch > 1], ids=str)
@torch.no_grad()
def test_strict_logits_alone(run: Run) -> None:
    strict = model(run.case, "off", torch.float32)
    expected = tensors(run.case, "expected_fp32")[f"{run.name}.logits"]
    for row in range(run.batch):
        got = feed(strict, run.ids[row : row + 1], random_cuts(run.length, row))
        assert (got[0] - expected[row]).abs().max() <= 1e-4


def selections(run: Run) -> list[tuple[str, int]]:
    """(intermediate's name, layer) of every selection of this run that the case recorded at prefill."""
    found = []
    for key in tensors(run.case, "intermediates_fp32"):
        name, phase, _, layer, *what = key.split(".")
        if name == run.name and phase == "prefill" and ".".join(what) in ("gate.indices", "indexer.topk_idxs"):
            found.append((".".join(what), int(layer)))
    return found


@pytest.mark.parametrize("run", [run for run in RUNS if selections(run)], ids=str)
@torch.no_grad()
def test_strict_selections(run: Run) -> None:
    strict = model(run.case, "off", torch.float32)
    taken: dict[tuple[str, int], list] = {}
    hooks = []
    for what, layer in selections(run):
        block = strict.layers[layer]
        module = block.ffn.gate if what == "gate.indices" else block.attn.indexer
        found = taken[what, layer] = []
        hooks.append(module.register_forward_hook(lambda _m, _i, output, found=found: found.append(output)))
    cache = strict.new_cache(run.batch, run.length)
    strict(run.ids[:, : run.prompt], cache=cache)
    for hook in hooks:
        hook.remove()
    for (what, layer), outputs in taken.items():
        expected = tensors(run.case, "intermediates_fp32")[f"{run.name}.prefill.layers.{layer}.{what}"]
        got = outputs[0][1] if what == "gate.indices" else outputs[0]
        expected = expected.flatten(0, -2).long()
        if what == "indexer.topk_idxs":  # recorded with an offset of the prompt's length
            expected = torch.where(expected < 0, expected, expected - run.prompt)
        for row in range(len(expected)):
            assert set(expected[row].tolist()) - {-1} == set(got[row].tolist()) - {-1}, (what, layer, row)


def full_run(case: str) -> Run:
    return next(run for run in RUNS if run.case == case and run.name == "full")


@torch.no_grad()
def test_multi_token_prediction() -> None:
    run = full_run("dev_a")
    strict = model("dev_a", "off", torch.float32)
    expected = tensors("dev_a", "expected_fp32")
    got = strict.predict_next(expected["full.mtp.h_in"], run.ids[:, 1:])
    assert (got - expected["full.mtp.logits"]).abs().max() <= 1e-4
    streams = strict.hidden_streams(run.ids[:, :-1])
    assert rel_rms(streams, expected["full.mtp.h_in"]).max() <= 1e-4


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_feed_forward_pairs(case: str) -> None:
    run = full_run(case)
    for layer, errors in enumerate(feed_forward_errors(model(case, "checkpoint", torch.bfloat16), run)):
        assert len(errors) >= run.prompt // 2, layer
        assert errors.median() <= 0.01 and errors.max() <= 0.03, layer


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_attention_pairs(case: str) -> None:
    """Sublayer inputs of the recorded calls, fed one after another through each layer's cache."""
    shipped = model(case, "checkpoint", torch.bfloat16)
    for run in (run for run in RUNS if run.case == case):
        for layer in range(len(shipped.layers)):
            calls = attention_calls(shipped, layer, run)
            errors = attention_errors(calls, layer, run, shipped.config.sliding_window)
            if errors is not None:
                assert errors.median() <= 0.02 and errors.max() <= 0.05, (run, layer)


def pooled_errors(case: str, quantization: str, expected: str, stable: bool) -> Tensor:
    errors = []
    for run in (run for run in RUNS if run.case == case):
        shipped = model(case, quantization, torch.bfloat16)
        got = feed(shipped, run.ids, [run.prompt] + [1] * (run.length - run.prompt))
        error = rel_rms(got, tensors(case, expected)[f"{run.name}.logits"])
        if stable:
            error = error[tensors(case, expected)[f"{run.name}.noise_env"] < 0.15]
        errors.append(error.flatten())
    return torch.cat(errors)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_as_shipped_logits(case: str) -> None:
    """A sanity check: rounding flips are amplified, so only the bulk can be compared."""
    assert pooled_errors(case, "checkpoint", "expected_quant", False).median() <= 0.10
    errors = pooled_errors(case, "checkpoint", "expected_quant", True)
    assert (errors <= 0.15).float().mean() >= 0.90


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bfloat16_logits(case: str) -> None:
    """bfloat16 arithmetic without quantisation stays near the float32 logits."""
    errors = pooled_errors(case, "off", "expected_fp32", False)
    assert errors.median() <= 0.015
    assert (errors <= 0.05).float().mean() >= 0.90


def test_cases_are_complete() -> None:
    assert sorted(path.name for path in ROOT.iterdir() if (path / "meta.json").exists()) == list(CASES)
    assert all(json.loads((ROOT / case / "config.json").read_text())["model_type"] == "deepseek_v4" for case in CASES)
    assert len(RUNS) == 14
