"""`dsv4 bench --layer` at a small scale: what is written and reported, and that a wrong layer or a copy of it fails."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4 import checkpoint, cli
from dsv4.bench import layer
from dsv4.checkpoint.init import RandomSource
from dsv4.model.config import Config
from dsv4.ops import _registry


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["bench", "--layer", "--shape", "nano", "--scratch", str(tmp_path), *map(str, arguments)])
        assert not list(tmp_path.glob("dsv4-layer-*")), "the checkpoint is removed, whatever happens"
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("shape", ["v4-flash", "v4-pro"])
def test_layer_has_the_true_widths(shape: str) -> None:
    config, model = layer.layer_config(shape), Config.preset(shape)
    shortened = {"vocab_size", "num_hidden_layers", "compress_ratios", "num_hash_layers", "num_nextn_predict_layers"}
    same = {field.name for field in dataclasses.fields(Config)} - shortened
    assert {name: getattr(config, name) for name in same} == {name: getattr(model, name) for name in same}
    assert (config.num_hidden_layers, config.layer_kind(0)) == (1, "csa")


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_written_checkpoint_is_whole_and_random(tmp_path: Path, expert_dtype: str) -> None:
    config = dataclasses.replace(layer.layer_config("nano"), expert_dtype=expert_dtype)
    stored = layer.write(config, tmp_path / "layer")
    found = checkpoint.inspect(tmp_path / "layer")
    assert (found.problems, found.config, found.random, found.nbytes) == ((), config, True, stored)
    source, reference = layer.PooledSource(config), RandomSource(config)
    for key in source.ordered_keys():
        made, expected = source.get(key), reference.get(key)
        assert (made.dtype, made.shape) == (expected.dtype, expected.shape), key
    model = checkpoint.load(tmp_path / "layer")
    experts = model.layers[0].ffn.experts
    for name in ("w1", "w3", "w2"):
        codes = experts.get_parameter(name).view(torch.uint8).flatten(1)
        assert len({tuple(row[:256].tolist()) for row in codes}) == config.n_routed_experts, "experts differ"
    weight = model.layers[0].attn.wq_b
    wide = weight.weight.float() * weight.scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.isfinite(wide).all()
    inputs = wide.shape[1]
    assert 0.5 < float(wide.std()) * inputs**0.5 < 2


_MEMORY = """
import dataclasses, pathlib, sys
from dsv4.bench import layer
from dsv4.checkpoint import memory
config = dataclasses.replace(
    layer.layer_config("nano"), hidden_size=1024, moe_intermediate_size=1024, n_routed_experts=256
)
layer.write(layer.layer_config("nano"), pathlib.Path(sys.argv[1]) / "warm")
memory.reset_peak()
before = memory.resident()
stored = layer.write(config, pathlib.Path(sys.argv[1]) / "layer")
print(stored, memory.peak() - before)
"""


def test_writing_does_not_hold_the_model(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    stored, grown = map(int, done.stdout.split())
    assert stored > 400e6
    assert grown < 0.6 * stored


def test_report(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "layer.json"
    code, out, err = run("--quick", "--json", file)
    assert (code, err) == (0, "")
    (text,) = file.read_text().splitlines()
    values = json.loads(text)
    assert (values["op"], values["shape"], values["kind"], values["experts"]) == ("layer", "nano", "csa", 16)
    assert values["within_limit"] is True
    assert values["activation_bytes"] == values["run_bytes"] - values["stored_bytes"]
    assert values["loaded_bytes"] <= values["loaded_limit_bytes"] == values["stored_bytes"] + (64 << 20)
    # A token reads everything but 14 of the 16 experts, each of 3 x 256 x 128 codes and a scale for 32 of them.
    assert values["token_bytes"] == values["stored_bytes"] - 14 * 3 * 256 * 128 * 17 // 32
    assert [step["tokens"] for step in values["prefill"]] == [512]
    assert values["decode_ms_best"] <= values["decode_ms"]
    assert set(values["differences"]) == {"attention", "experts", "mixing"}
    assert [line.split()[0] for line in out.splitlines()] == [
        "layer", "machine", "check", "load", "prefill", "decode", "loaded", "running",
    ]  # fmt: skip


def test_copy_of_the_weights_is_noticed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    append = layer.Runner.append

    def wasteful(self: layer.Runner, count: int) -> torch.Tensor:
        copy = torch.ones(200 << 20, dtype=torch.uint8)
        return append(self, count) * copy[0]

    monkeypatch.setattr(layer.Runner, "append", wasteful)
    code, out, _ = run("--quick")
    assert code == 1
    assert out.splitlines()[-1] == "FAILED     more memory than stored bytes plus activations"


def test_nothing_is_timed_where_the_check_fails(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reference = _registry._references["dsv4::moe_experts"]
    monkeypatch.setitem(_registry._references, "dsv4::moe_experts", lambda *a, **k: reference(*a, **k) * 1.1)
    file = tmp_path / "layer.json"
    code, out, _ = run("--quick", "--json", file)
    assert code == 1
    assert "FAILED     layer 0: experts on kernels differs from its reference" in out
    assert "prefill" not in out
    assert "decode_ms" not in json.loads(file.read_text())


def test_full_disk(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = layer.shutil.disk_usage
    monkeypatch.setattr(layer.shutil, "disk_usage", lambda path: usage(path)._replace(free=1 << 20))
    code, _, err = run()
    assert code == 2
    assert "the layer takes 2." in err
    assert err.endswith("1.00 MiB are free; use --scratch\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--op", "mhc_pre"],
        ["--context", "1K"],
        ["--device", "cuda"],
        ["--million"],
        ["--end-to-end"],
        ["--shape", "v4-pro"],
    ],
)
def test_options_that_do_not_go_together(run: Any, arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "--layer takes one --shape, --scratch, --quick and --json, and no other option" in err


def test_scratch_belongs_to_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--scratch", "x"]) == 2
    assert "--scratch belongs to --layer" in capsys.readouterr().err


def test_no_such_scratch_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--layer", "--shape", "nano", "--scratch", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
