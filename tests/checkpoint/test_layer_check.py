"""Layer by layer: the figures of a sound checkpoint, and that a fault is found in the layer and part it lies in."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import TINY, base_release_state, released_state, write, write_sharded
from torch import Tensor

import dsv4
from dsv4 import cli
from dsv4.checkpoint import Checkpoint, CheckpointError, memory
from dsv4.checkpoint.layer_check import Difference, LayerCheck, LayerReport
from dsv4.checkpoint.layers import Layers, parse_layers, ranges
from dsv4.ops import _registry

STATE = released_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("models") / "tiny", STATE)


def changed(folder: Path, key: str, change: Callable[[Tensor], None]) -> Path:
    """The checkpoint with one tensor changed."""
    tensor = STATE[key].clone()
    change(tensor)
    return write_sharded(folder / "changed", {**STATE, key: tensor})


def reports(path: Any, **options: Any) -> list[LayerReport]:
    return list(LayerCheck(path, **options).run())


def numbers(found: list[LayerReport]) -> list[tuple[Any, ...]]:
    """What does not depend on time and memory."""
    return [(r.layer, r.rms, r.largest, r.not_finite, r.differences, r.faults) for r in found]


@pytest.mark.parametrize("tokens", [4, 5, 130, 300])
def test_sound_checkpoint(folder: Path, tokens: int) -> None:
    check = LayerCheck(folder, tokens=tokens)
    found = list(check.run())
    assert [(r.layer, r.kind, r.routing) for r in found] == [
        (0, "swa", "hash"),
        (1, "csa", "scored"),
        (2, "hca", "scored"),
    ]
    for report in found:
        keys = [key for key in STATE if key.startswith(f"layers.{report.layer}.")]
        assert report.stored_bytes == sum(STATE[key].nbytes for key in keys)
        assert (report.faults, report.not_finite) == ((), 0)
        assert set(report.differences) == {"attention", "experts", "mixing"}
        assert all(d.within_limits_of(part) for part, d in report.differences.items())
        assert min(report.load_seconds, report.kernel_seconds, report.reference_seconds) > 0
    with torch.no_grad():
        streams = dsv4.load(folder).hidden_streams(check.token_ids.unsqueeze(0)).float()
    assert found[-1].rms == float(streams.square().mean().sqrt())
    assert found[-1].largest == float(streams.abs().max())


def test_same_figures_every_time(folder: Path) -> None:
    assert numbers(reports(folder, tokens=40)) == numbers(reports(folder, tokens=40))


UNSIGNED = {key: t.view(torch.uint8) if t.dtype == torch.int8 else t for key, t in STATE.items()}


@pytest.mark.parametrize("state", [base_release_state(STATE), UNSIGNED], ids=["fp8", "uint8"])
def test_other_formats(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = write(tmp_path, state)
    assert all(report.faults == () for report in reports(path, tokens=20))
    layers = Layers(Checkpoint(path))
    for number in range(TINY.num_hidden_layers):
        with layers.layer(number) as block:
            tensors = [*block.parameters(), *block.buffers()]
            assert layers.held_bytes(number) == sum(tensor.nbytes for tensor in tensors)


def test_unquantised_checkpoint_runs_plain(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, expert_dtype="bf16")
    path = write(tmp_path, released_state(config), config)
    check = LayerCheck(path, tokens=20)
    assert check.source.quantization == "off"
    assert all(report.faults == () for report in check.run())
    assert check.source.held_bytes(0) == check.source.stored_bytes(0)


def test_layer_is_freed(folder: Path) -> None:
    layers = Layers(Checkpoint(folder))
    read: list[int] = []
    with layers.layer(1, read.append) as block:
        weight = block.ffn.experts.w1
        assert weight.shape == (4, 64, 48)
    assert sum(read) == layers.stored_bytes(1)
    assert all(tensor.is_meta for tensor in (*block.parameters(), *block.buffers()))


def nan_scale(scale: Tensor) -> None:
    scale.view(torch.uint8)[0, 0] |= 0x80
    scale.view(torch.uint8)[0, 0] |= 0x7F


def nan_code(weight: Tensor) -> None:
    weight.view(torch.uint8)[3, 5] |= 0x7F


def infinite(weight: Tensor) -> None:
    weight[0] = torch.inf


def wrong_expert(table: Tensor) -> None:
    table[9, 1] = 4


@pytest.mark.parametrize(
    ("key", "change", "fault"),
    [
        ("layers.1.attn.wq_b.scale", nan_scale,
         "layer 1: layers.1.attn.wq_b.scale holds 1 scales that are NaN, infinite or negative"),
        ("layers.2.ffn.experts.3.w2.scale", nan_scale,
         "layer 2: layers.2.ffn.experts.3.w2.scale holds 1 scales that are NaN, infinite or negative"),
        ("layers.0.ffn.gate.tid2eid", wrong_expert,
         "layer 0: layers.0.ffn.gate.tid2eid names experts 0 to 4, there are 4"),
        ("layers.1.attn.wkv.weight", nan_code, "first of token 0, first in attention"),
        ("layers.2.attn_norm.weight", infinite, "first of token 0, first in the mixing before attention"),
        ("layers.2.ffn_norm.weight", infinite, "first of token 0, first in the mixing before the experts"),
        ("layers.0.ffn.shared_experts.w1.weight", nan_code, "first of token 0, first in the experts"),
    ],
)  # fmt: skip
def test_damaged_weight_is_named_by_layer(
    tmp_path: Path, key: str, change: Callable[[Tensor], None], fault: str
) -> None:
    found = reports(changed(tmp_path, key, change), tokens=40)
    damaged = int(key.split(".")[1])
    for report in found:
        if report.layer != damaged:
            assert report.faults == (), "the layers behind a damaged one are judged by themselves"
            assert len(report.differences) == 3
            continue
        assert len(report.faults) == 1
        assert report.faults[0].startswith(f"layer {damaged}: ")
        assert report.faults[0].endswith(fault)
        assert report.differences == {}


def test_damaged_embedding(tmp_path: Path) -> None:
    path = changed(tmp_path, "embed.weight", lambda weight: weight.fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"embed\.weight holds NaN or infinity in row \d+$"):
        reports(path, tokens=8)


OPS = [
    ("sparse_attention", "attention"), ("query_norm_rope", "attention"), ("grouped_linear", "attention"),
    ("moe_gate", "experts"), ("moe_experts", "experts"), ("mhc_pre", "mixing"), ("mhc_post_pre", "mixing"),
    ("mhc_post", "mixing"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "part"), OPS)
def test_difference_is_found_in_its_part(folder: Path, monkeypatch: pytest.MonkeyPatch, op: str, part: str) -> None:
    """A reference that is off by 10 % in its first result stands for a kernel that is."""
    reference = _registry._references[f"dsv4::{op}"]

    def off(*args: Any, **kwargs: Any) -> Any:
        result = reference(*args, **kwargs)
        return (result[0] * 1.1, *result[1:]) if isinstance(result, tuple) else result * 1.1

    monkeypatch.setitem(_registry._references, f"dsv4::{op}", off)
    limit = {"attention": 0.02, "experts": 0.01, "mixing": 0.01}[part]
    for report in reports(folder, tokens=40):
        (fault,) = report.faults
        assert re.fullmatch(
            rf"layer {report.layer}: {part} on kernels differs from its reference by [\d.e-]+ rms \(limit {limit}\), "
            r"[\d.e-]+ at most \(limit 0\.05\)",
            fault,
        )
        assert report.differences[part].rms > limit


@pytest.mark.parametrize("op", ["store_window", "compress", "index_topk"])
def test_what_the_cache_holds_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """The sampled rows of the references append to the cache themselves; here they leave it out, or select nothing."""
    reference = _registry._references[f"dsv4::{op}"]

    def lacking(*args: Any, **kwargs: Any) -> Any:
        return torch.full_like(reference(*args, **kwargs), -1) if op == "index_topk" else None

    monkeypatch.setitem(_registry._references, f"dsv4::{op}", lacking)
    affected = {"store_window": [0, 1, 2], "compress": [1], "index_topk": [1]}[op]
    assert [report.layer for report in reports(folder, tokens=40) if report.faults] == affected


def test_not_a_number_is_never_within_the_limit() -> None:
    one = torch.ones(2, 2)
    assert Difference.of(one, one) == Difference(0.0, 0.0)
    assert not Difference.of(one * torch.nan, one).within_limits_of("attention")
    assert not Difference.of(one, one * 0).within_limits_of("experts")
    assert Difference.of(one * 0, one * 0).within_limits_of("mixing")
    assert Difference(0.02, 0.05).within_limits_of("attention")
    assert not Difference(0.02, 0.05).within_limits_of("experts")
    assert not Difference(0.01, 0.051).within_limits_of("experts")
    assert Difference.of(one * 1.5, one) == Difference(0.5, 0.5)
    single = one.clone()
    single[0, 0] = 2
    assert Difference.of(single, one) == Difference(0.5, 1.0)


def test_selected_layers_take_the_streams_of_those_before(folder: Path) -> None:
    whole, first = reports(folder, tokens=40), reports(folder, tokens=40, layers="0-1")
    assert numbers(first) == numbers(whole)[:2]
    gap = reports(folder, tokens=40, layers="2,0")
    assert numbers(gap)[0] == numbers(whole)[0]
    check = LayerCheck(folder, tokens=40)
    with torch.no_grad():
        model = dsv4.load(folder)
        model.layers = torch.nn.ModuleList([model.layers[0], model.layers[2]])
        streams = model.hidden_streams(check.token_ids.unsqueeze(0)).float()
    assert (gap[1].layer, gap[1].rms) == (2, float(streams.square().mean().sqrt()))


@pytest.mark.parametrize(
    ("text", "expected"), [("0", [0]), ("7", [7]), ("0-3,7", [0, 1, 2, 3, 7]), ("7, 2-3,3", [2, 3, 7]), ("5-5", [5])]
)
def test_parse_layers(text: str, expected: list[int]) -> None:
    assert parse_layers(text, 8) == expected
    assert parse_layers(ranges(expected), 8) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no selection of layers; write 0-3,7"),
        ("1,", "'1,' is no selection of layers; write 0-3,7"),
        ("-1", "'-1' is no selection of layers; write 0-3,7"),
        ("1-2-3", "'1-2-3' is no selection of layers; write 0-3,7"),
        ("a", "'a' is no selection of layers; write 0-3,7"),
        ("0,8", "'8' must lie in 0-7, lower number first: the model has 8 layers"),
        ("3-1", "'3-1' must lie in 0-7, lower number first: the model has 8 layers"),
    ],
)
def test_parse_layers_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_layers(text, 8)


def test_budget_names_the_value_that_does(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^layer \d needs \S+ .iB: .* are allowed: give --memory \d+M or fewer"
    ) as error:
        LayerCheck(folder, tokens=300, budget=50 << 20)
    value = re.search(r"--memory (\S+)", str(error.value))
    assert value is not None
    check = LayerCheck(folder, tokens=300, budget=memory.parse_size(value.group(1)) + (8 << 20))
    assert max(report.peak_bytes for report in check.run()) <= check.needed <= check.budget


def test_budget_that_is_passed_ends_the_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = LayerCheck(folder, tokens=20)
    monkeypatch.setattr(check, "budget", 1 << 20)
    run = check.run()
    assert next(run).layer == 0
    with pytest.raises(ValueError, match=r"^layer 0 took \S+ .iB, more than the 1\.00 MiB allowed$"):
        next(run)


def test_larger_layers_and_longer_sequences_need_more(folder: Path) -> None:
    short, long = LayerCheck(folder, tokens=64), LayerCheck(folder, tokens=4096)
    assert long.layer_bytes(1) > short.layer_bytes(1)
    assert short.layer_bytes(1) > short.layer_bytes(0), "index keys and compressors come on top"
    assert short.largest_layer == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [("8G", 8 << 30), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("64kb", 64 << 10), ("1T", 1 << 40), (" 77 ", 77)],
)
def test_parse_size(text: str, count: int) -> None:
    assert memory.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "G", "8X", "-1", "0", "0.0001", "1e9", "1 2"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory; write 8G or 512M"):
        memory.parse_size(text)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command line: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main(["inspect", *map(str, arguments)])
        except SystemExit as leave:
            code = int(leave.code or 0)
        return code, *capsys.readouterr()

    return call


def test_command(run: Any, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "layers.jsonl"
    code, out, err = run(folder, "--check-layers", "--memory", "64G", "--tokens", 40, "--json", file)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "checking   all 3 layers, 40 tokens; references on the last 4"
    assert re.fullmatch(r"memory     [\d.,]+ .iB needed \(layer 1\), 64\.00 GiB allowed", lines[1])
    assert lines[2] == "limits     rms: attention 0.02, experts 0.01, mixing 0.01; largest: 0.05"
    assert [line[:12] for line in lines[4:]] == ["0 SWA hash  ", "1 CSA scored", "2 HCA scored"]
    values = [json.loads(line) for line in file.read_text().splitlines()]
    assert [value["layer"] for value in values] == [0, 1, 2]
    assert values[0]["differences"]["attention"]["rms_limit"] == 0.02
    assert set(values[0]["differences"]["mixing"]) == {"rms", "rms_limit", "largest", "largest_limit"}


def test_command_with_a_damaged_layer(run: Any, tmp_path: Path) -> None:
    path = changed(tmp_path, "layers.1.attn.wo_b.scale", nan_scale)
    code, out, err = run(path, "--check-layers", "--tokens", 20)
    assert code == 1
    expected = "layer 1: layers.1.attn.wo_b.scale holds 1 scales that are NaN, infinite or negative"
    assert err == f"dsv4 inspect: {expected}\n"
    assert re.search(r"^1 CSA scored .*not compared", out, re.MULTILINE)
    code, out, err = run(path, "--check-layers", "--tokens", 20, "--layers", "0,2")
    assert (code, err) == (0, "")
    assert "checking   layers 0,2 of 3" in out
    assert "streams    pass unchanged where a layer is left out" in out


def test_interrupt_says_how_far_it_came(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = LayerCheck._layer

    def interrupted(self: LayerCheck, layer: int, *others: Any) -> Any:
        if layer == 2:
            raise KeyboardInterrupt
        return attempt(self, layer, *others)

    monkeypatch.setattr(LayerCheck, "_layer", interrupted)
    file = tmp_path / "layers.jsonl"
    code, _, err = run(folder, "--check-layers", "--tokens", 20, "--json", file)
    assert code == 130
    assert err == "dsv4 inspect: interrupted; checked layers 0-1\n"
    assert len(file.read_text().splitlines()) == 2


def test_interrupt_of_a_process(folder: Path) -> None:
    # A job that a shell started in the background ignores interrupts, and so would what it starts.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "dsv4", "inspect", str(folder), "--check-layers", "--tokens", "4K"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("0 SWA hash"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.fullmatch(r"dsv4 inspect: interrupted; checked layers 0(-1)?\n", err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check-layers", "--memory", "20M"], "are allowed: give --memory"),
        (["--check-layers", "--memory", "much"], "'much' is no amount of memory; write 8G or 512M"),
        (["--check-layers", "--layers", "3"], "'3' must lie in 0-2, lower number first: the model has 3 layers"),
        (["--check-layers", "--layers", "x"], "'x' is no selection of layers"),
        (["--check-layers", "--tokens", "3"], "tokens must be 4 to 1048576, got 3"),
        (["--check-layers", "--json", "/nowhere/layers.jsonl"], "/nowhere/layers.jsonl"),
        (["--layers", "0"], "--layers belongs to --check-layers"),
        (["--memory", "8G"], "--memory belongs to --check-layers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Any, folder: Path, arguments: list[str], words: str) -> None:
    code, _, err = run(folder, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert words in err


def test_missing_tensor_is_no_checkpoint(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path, {key: tensor for key, tensor in STATE.items() if key != "layers.1.attn.wq_a.weight"})
    code, out, err = run(path, "--check-layers")
    assert (code, out) == (2, "")
    assert "missing layers.1.attn.wq_a.weight" in err


_LARGE = """
import dataclasses, json, pathlib, sys
from dsv4.bench.layer import layer_config, write
from dsv4.checkpoint import memory
from dsv4.checkpoint.layer_check import LayerCheck
config = dataclasses.replace(
    layer_config("nano"), hidden_size=1024, moe_intermediate_size=256, n_routed_experts=128, num_hidden_layers=6,
    compress_ratios=(0, 4, 128) * 2, num_hash_layers=1,
)
folder = pathlib.Path(sys.argv[1]) / "large"
stored = write(config, folder)
memory.reset_peak()
check = LayerCheck(folder, tokens=136)
found = list(check.run())
values = {"stored": stored, "base": check.needed - check.layer_bytes(check.largest_layer), "needed": check.needed}
print(json.dumps(values | {"peaks": [r.peak_bytes for r in found], "faults": [f for r in found for f in r.faults]}))
"""


def test_checkpoint_larger_than_the_budget(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LARGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert len(found["peaks"]) == 6
    assert found["stored"] > 300e6
    assert found["base"] < max(found["peaks"]) <= found["needed"]
    assert max(found["peaks"]) < found["base"] + 0.5 * found["stored"]
