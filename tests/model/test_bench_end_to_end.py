"""`dsv4 bench --end-to-end` at a small scale: what is compared, checked, left out and written."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dsv4
from dsv4 import cli
from dsv4.bench import end_to_end, peers
from dsv4.bench.end_to_end import OwnEngine
from dsv4.bench.gguf_file import settings, tensor_name, write_gguf

NANO = dsv4.Config.preset("nano")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(end_to_end, "NEW_TOKENS", 2)
    monkeypatch.setattr(end_to_end, "_REPEATS", 1)


@pytest.fixture
def run(capsys, tmp_path):
    """Runs it: (exit code, JSON objects, standard output)."""

    def call(*contexts, options=()):
        file = tmp_path / "results.jsonl"
        lengths = [f"--context={n}" for n in contexts]
        code = cli.main(["bench", "--end-to-end", *lengths, *options, "--json", str(file)])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in file.read_text().splitlines()], out + err

    return call


def without(monkeypatch, *missing):
    found = peers.installed
    monkeypatch.setattr(end_to_end, "installed", lambda *names: not {*names} & {*missing} and found(*names))


def test_beside_transformers(run, monkeypatch):
    without(monkeypatch, "llama_cpp")
    monkeypatch.setattr(end_to_end, "_PIECE", 40)
    # Three tokens have no median to speak of, but nothing is selected either: float32 has to be exact.
    monkeypatch.setattr(end_to_end, "LIMITS", {"float32": 1e-4, "checkpoint": 0.9, "bfloat16": 0.9})
    code, results, out = run(150, 70)
    assert code == 0
    for result in results:
        assert list(result) == list(end_to_end.KEYS)
    own = [("dsv4", precision) for precision in ("float32", "checkpoint", "bfloat16")]
    theirs = [(name, precision) for precision in ("float32", "bfloat16")
              for name in ("transformers", "transformers, pieces of 40")]  # fmt: skip
    timed = [result for result in results if result["what"] in ("prefill", "decode") and result["us"]]
    assert [(r["engine"], r["precision"], r["context"], r["what"]) for r in timed] == [
        (*engine, context, what) for engine in own + theirs for context in (70, 150) for what in ("prefill", "decode")
    ]
    for result in timed:
        assert 0 <= result["error"] <= result["error_limit"] == end_to_end.LIMITS[result["precision"]]
        assert (result["error"] == 0) == (result["engine"] == "dsv4" and result["precision"] == "float32")
        tokens = result["context"] if result["what"] == "prefill" else 1
        assert result["tokens_per_s"] == pytest.approx(tokens / result["us"] * 1e6)
        assert result["cpu_us"] > 0
    base = {(r["what"], r["context"]): r for r in timed if r["precision"] == "checkpoint"}
    last = timed[-1]
    assert last["ratio"] == pytest.approx(last["us"] / base["decode", 150]["us"])
    assert last["cpu_ratio"] == pytest.approx(last["cpu_us"] / base["decode", 150]["cpu_us"])
    steps = [result for result in results if result["what"] == "decode step"]
    assert [(r["precision"], r["context"]) for r in steps] == [(precision, 70) for _, precision in own]
    assert all("in Python and dispatch of" in result["note"] for result in steps)
    absent = [result for result in results if result["engine"] == "llama.cpp"]
    assert len(absent) == 8
    assert all(r["note"] == "not run: install dsv4[peers]" and r["us"] is r["tokens_per_s"] is None for r in absent)
    assert out.count("not run: install dsv4[peers]") == 8


def test_logits_of_transformers_are_ours_to_rounding():
    """At 70 tokens nothing is selected, so nothing can be selected differently."""
    pytest.importorskip("transformers", reason="not run: no transformers")
    state = dsv4.init(NANO, quantization="off", dtype=torch.float32).state_dict()
    theirs = peers.TransformersEngine(state, NANO, torch.float32, None)
    ours = OwnEngine(NANO, "float32", 100)
    ids = torch.arange(20, 90)
    for part in (ids[:69], ids[69:]):
        assert end_to_end._error(theirs.feed(part)[None].double(), ours.feed(part)[None].double()) < 1e-4
    theirs.reset()
    ours.reset()
    assert end_to_end._error(theirs.feed(ids)[None].double(), ours.feed(ids)[None].double()) < 1e-4


def test_no_time_where_the_check_failed(run, monkeypatch):
    without(monkeypatch, "transformers", "llama_cpp")
    monkeypatch.setattr(end_to_end, "LIMITS", {"float32": 0.05, "checkpoint": 1e-4, "bfloat16": 0.1})
    code, results, out = run(70)
    assert code == 1, out
    wrong = [result for result in results if result["precision"] == "checkpoint"]
    assert [result["what"] for result in wrong] == ["prefill", "decode"]
    assert all(result["us"] is result["tokens_per_s"] is result["cpu_us"] is None for result in wrong)
    assert out.count("FAILED its check") == 2
    assert all(result["ratio"] is None for result in results)


def test_nan_fails():
    assert end_to_end._error(torch.full((2, 3), torch.nan), torch.ones(2, 3)) != 0
    assert not end_to_end._error(torch.full((2, 3), torch.nan), torch.ones(2, 3)) <= 1e9


class Slow:
    """Needs a tebibyte from 100 tokens on, and a second a token."""

    name, precision = "slow", "float32"

    def reset(self):
        pass

    def feed(self, ids):
        return torch.ones(4)

    def bytes_needed(self, tokens):
        return 1 << 40 if tokens >= 100 else 0


def test_too_large_and_too_long_are_not_run(monkeypatch):
    monkeypatch.setattr(end_to_end, "_timed", lambda engine, ids: ((float(len(ids)), 1.0), engine.feed(ids)))
    results = list(end_to_end._results(Slow(), torch.zeros(200, dtype=torch.int64), [20, 90, 110], {}))
    assert [(r["what"], r["context"], r["note"] is None) for r in results] == [
        ("prefill", 20, True), ("decode", 20, True), ("prefill", 90, True), ("decode", 90, True),
        ("prefill", 110, False), ("decode", 110, False),
    ]  # fmt: skip
    assert results[-1]["note"].startswith("not run: needs about 1,024.00 GiB, ")
    monkeypatch.setattr(end_to_end, "MOST_SECONDS", 400)
    results = list(end_to_end._results(Slow(), torch.zeros(200, dtype=torch.int64), [20, 90], {}))
    assert results[-1]["note"] == "not run: would take up to 405 s"
    assert results[-1]["us"] is None


class Writer:
    """gguf.GGUFWriter as far as it is used; keeps what it is given."""

    def __init__(self, path, architecture):
        self.fields, self.tensors, self.done = {}, {}, []
        Writer.last = self
        assert architecture == "deepseek4"

    def __getattr__(self, name):
        if name.startswith("write_") or name == "close":
            return lambda: self.done.append(name)
        assert name.startswith("add_")
        return lambda key, value=None: self.fields.update({key: (name, value)})

    def add_tensor(self, name, data, raw_dtype=None):
        self.tensors[name] = (data, raw_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_file(monkeypatch, tmp_path, dtype):
    monkeypatch.setitem(
        sys.modules, "gguf", SimpleNamespace(GGUFWriter=Writer, GGMLQuantizationType=SimpleNamespace(BF16="bf16"))
    )
    state = dsv4.init(NANO, quantization="off", dtype=torch.float32).state_dict()
    write_gguf(state, NANO, tmp_path / "x.gguf", dtype)
    written = Writer.last
    assert written.done == ["write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"]
    assert len(written.tensors) == len(state)
    experts, kind = written.tensors["blk.3.ffn_up_exps.weight"]
    if dtype == torch.bfloat16:
        assert kind == "bf16"
        values = torch.from_numpy(experts).view(torch.bfloat16).float()
    else:
        values = torch.from_numpy(experts)
    assert torch.equal(values, state["layers.3.ffn.experts.w3"])
    table, _ = written.tensors["blk.0.ffn_gate_tid2eid.weight"]
    assert table.dtype == np.int32
    for name in ("blk.2.attn_compressor_ape.weight", "blk.1.hc_attn_fn.weight", "output_norm.weight"):
        assert written.tensors[name][0].dtype == np.float32
    assert written.fields["deepseek4.attention.compress_ratios"] == ("add_array", [0, 0, 4, 128, 4, 128, 4, 128])
    assert written.fields["deepseek4.expert_weights_norm"] == ("add_bool", True)
    assert written.fields["deepseek4.rope.scaling.type"] == ("add_string", "yarn")
    assert written.fields["deepseek4.attention.key_length"] == ("add_uint32", 128)
    assert written.fields["none"] == ("add_tokenizer_model", None)


def test_models_that_llama_does_not_know():
    with pytest.raises(ValueError, match=r"mtp.0.norm.weight: llama.cpp has no such tensor"):
        tensor_name("mtp.0.norm.weight")
    odd = dsv4.Config.from_dict(NANO.to_dict() | {"compress_ratios": [0, 0, 4, 64, 4, 64, 4, 64]})
    with pytest.raises(
        ValueError, match=r"llama.cpp knows compression ratios 0, 4 and 128, the model has \[0, 4, 64\]"
    ):
        dict(settings(odd))


def test_beside_llama(tmp_path):
    """Where it is installed: its logits are ours up to a cache of half precision, token by token and in one piece."""
    pytest.importorskip("llama_cpp", reason="not run: no llama-cpp-python")
    pytest.importorskip("gguf", reason="not run: no gguf")
    state = dsv4.init(NANO, quantization="off", dtype=torch.float32).state_dict()
    theirs = peers.LlamaEngine(state, NANO, torch.float32, tmp_path, 256)
    ours = OwnEngine(NANO, "float32", 256)
    ids = torch.arange(20, 150)
    for part in (ids[:128], ids[128:129], ids[129:]):
        assert end_to_end._error(theirs.feed(part)[None].double(), ours.feed(part)[None].double()) < 1e-3
    theirs.close()


@pytest.mark.parametrize("option", ["--quick", "--op=mhc_pre", "--tokens=5", "--resume=x", "--shape=nano"])
def test_options_that_do_not_apply(capsys, option):
    assert cli.main(["bench", "--end-to-end", option]) == 2
    assert capsys.readouterr().err.endswith("--end-to-end takes --context, --beside and --json, and no other option\n")


@pytest.mark.parametrize("beside", [[], ["llama.cpp"], ["transformers"], ["llama.cpp", "transformers"]])
def test_beside(run, monkeypatch, beside):
    monkeypatch.setattr(end_to_end, "installed", lambda *packages: False)
    code, results, _ = run(40, options=[f"--beside={name}" for name in beside])
    assert code == 0
    assert {result["engine"] for result in results} == {"dsv4", *(beside or end_to_end.PEERS)}


@pytest.mark.parametrize("other", [["--op=mhc_pre"], ["--million"], ["--layer"], []])
def test_beside_belongs_to_end_to_end(capsys, other):
    assert cli.main(["bench", "--beside=llama.cpp", *other]) == 2
    assert capsys.readouterr().err.count("\n") == 1
