"""The planner against published figures, and against what a real model and a real cache occupy."""

import dataclasses
import sys

import pytest
import torch

from dsv4.cache import KVCache
from dsv4.checkpoint.expected import Storage, expected_tensors
from dsv4.model.config import Config
from dsv4.planner import FLOP_WEIGHT, baseline, format_context, kv_bytes_per_token, parse_context, plan, plot

M = 1 << 20


@pytest.mark.parametrize(("name", "bytes_per_token", "share"), [("v4-pro", 5031, 0.105), ("v4-flash", 3514, 0.073)])
def test_kv_bytes_of_the_report(name, bytes_per_token, share):
    got = plan(Config.preset(name), M)
    assert int(got.kv_bytes_per_token) == bytes_per_token
    assert got.v32.kv_bytes_per_token == 48068
    assert got.kv_ratio == pytest.approx(share, abs=5e-4)
    assert got.kv_bytes == round(got.kv_bytes_per_token * M)
    # What is really held adds the window, the compressors' tails and the tables: a few MB.
    assert got.kv_bytes < got.cache_bytes < got.kv_bytes * 1.03


@pytest.mark.parametrize("context", [M, 10**6])
@pytest.mark.parametrize(("name", "share"), [("v4-pro", 0.27), ("v4-flash", 0.10)])
def test_flops_of_the_report(name, share, context):
    assert plan(Config.preset(name), context).flops_ratio == pytest.approx(share, abs=0.008)


@pytest.mark.parametrize(("name", "index", "attention"), [("v4-pro", 128.8, 76.7), ("v4-flash", 90.2, 23.6)])
def test_terms_at_a_million(name, index, attention):
    terms = {what: (flops / 1e9, precision) for what, flops, precision in plan(Config.preset(name), M).flops.terms}
    assert terms["index scores"] == (pytest.approx(index, abs=0.05), "fp4")
    assert terms["attention"] == (pytest.approx(attention, abs=0.05), "bf16")


def test_terms_of_the_baseline():
    terms = {what: flops / 1e9 for what, flops, _ in baseline(M).flops.terms}
    assert terms["index scores"] == pytest.approx(1048, abs=1)
    assert terms["attention"] == pytest.approx(34.8, abs=0.05)
    assert terms["weights, FP8"] + terms["weights, BF16"] == pytest.approx(2 * 37, rel=0.02)  # 37e9 active parameters


def test_weighting():
    flops = plan(Config.preset("v4-pro"), M).flops
    assert FLOP_WEIGHT == {"fp4": 0.5, "fp8": 1.0, "bf16": 2.0}
    by_hand = sum(count * {"fp4": 0.5, "fp8": 1, "bf16": 2}[precision] for _, count, precision in flops.terms)
    assert flops.weighted == by_hand
    assert flops.raw == sum(count for _, count, _ in flops.terms)


@pytest.mark.parametrize(
    ("name", "total", "active", "size"), [("v4-flash", 284e9, 13e9, 159.6e9), ("v4-pro", 1600e9, 49e9, None)]
)
def test_published_sizes(name, total, active, size):
    got = plan(Config.preset(name))
    assert got.parameters == pytest.approx(total, rel=0.03)  # the release's totals leave out the prediction block
    assert got.active_parameters == pytest.approx(active, rel=0.03)
    if size:
        assert got.weight_bytes == pytest.approx(size, rel=1e-3)


BITS = {"F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F32": 32, "I64": 64, "I8": 8}


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro", "nano"])
@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_weight_bytes_are_those_of_the_checkpoint(name, expert_dtype):
    """Summed from the list of tensors a checkpoint must hold, which the loader enforces."""
    config = dataclasses.replace(Config.preset(name), expert_dtype=expert_dtype)
    tensors = expected_tensors(config, Storage(experts=expert_dtype)).values()
    stored = sum(torch.Size(tensor.shape).numel() * BITS[tensor.dtypes[0]] // 8 for tensor in tensors)
    assert plan(config).weight_bytes == stored


@pytest.mark.parametrize("length", [1, 127, 128, 129, 600, 1024])
def test_cache_bytes_are_those_of_a_cache(length):
    config = Config.preset("nano")
    cache = KVCache(config)
    for start in range(0, length, 100):
        step = cache.begin([torch.zeros(min(100, length - start), dtype=torch.int64)])
        cache.commit(step)
    assert plan(config, length).cache_bytes == cache.nbytes


def test_short_contexts_are_bounded_by_the_context():
    config = Config.preset("nano")
    one, window, beyond = ({w: f for w, f, _ in plan(config, n).flops.terms} for n in (1, 128, 4 * 64))
    assert one["index scores"] == 0
    assert one["attention"] == 8 * 4 * 8 * 128  # 8 layers see one key each
    hca, csa = 3 * 1, 3 * 32
    assert window["attention"] == (8 * 128 + csa + hca) * 4 * 8 * 128
    # 64 index keys are visible and top 64 takes them all; beyond that the choice is bounded.
    assert beyond["attention"] == (8 * 128 + 3 * 64 + 3 * 2) * 4 * 8 * 128
    assert kv_bytes_per_token(config) == 3 * (200 + 68) / 4 + 3 * 200 / 128


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "1M"])
def test_bad_context(bad):
    with pytest.raises(ValueError, match="context must be an integer >= 1"):
        plan(Config.preset("nano"), bad)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1M", M), ("1m", M), ("64K", 65536), ("1.5k", 1536), ("131072", 131072), ("131,072", 131072), ("0.5M", M // 2)],
)
def test_parse_context(text, tokens):
    assert parse_context(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "1G", "-1K", "0", "1.0001K", "nan", "1e6", "99999999999999M", "1K5", "٣"])
def test_parse_context_faults(text):
    with pytest.raises(ValueError, match="number of tokens") as caught:
        parse_context(text)
    assert "\n" not in str(caught.value)
    assert repr(text) in str(caught.value)


def test_format_context():
    assert [format_context(n) for n in (M, 65536, 1024, 1000, 3 * M)] == ["1M", "64K", "1K", "1,000", "3M"]


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot([("nano", Config.preset("nano"))], tmp_path / "x.png")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    models = [(name, Config.preset(name)) for name in ("v4-pro", "v4-flash")]
    plot(models, tmp_path / "plan.svg")
    picture = (tmp_path / "plan.svg").read_text()
    assert picture.count("<svg") == 1
    assert len(picture) > 10_000
    with pytest.raises(ValueError, match="cannot write"):
        plot(models, tmp_path / "no" / "plan.svg")
    with pytest.raises(ValueError, match="cannot write"):
        plot(models, tmp_path / "plan.what")
