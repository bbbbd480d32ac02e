"""`dsv4 bench --million` at a small scale: what it prints and saves, and that a resumed run gives the same bits."""

import json
import os
import signal

import pytest
import torch

import dsv4
from dsv4 import cli
from dsv4.bench import million
from dsv4.bench.million import Step, last_steps, model_config, text_tokens
from dsv4.checkpoint.loader import BUNDLED
from dsv4.generation import Tokenizer

TOKENS = 6000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(million, "NEW_TOKENS", 6)
    monkeypatch.setattr(million, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(million, "MARKS", (3000, 1 << 16))


@pytest.fixture
def run(capsys, tmp_path):
    """Runs it: (exit code, JSON objects, standard output, standard error)."""

    def call(*arguments, tokens=TOKENS):
        file = tmp_path / "results.jsonl"
        code = cli.main(["bench", "--million", "--tokens", str(tokens), "--json", str(file), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in file.read_text().splitlines()], out, err

    return call


def interrupt_after(monkeypatch, steps):
    calls = []

    def update(bar, done, rate):
        calls.append(done)
        if len(calls) == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(million.Bar, "update", update)


def test_resumed_run_gives_the_same_bits(run, monkeypatch, tmp_path):
    code, results, out, _ = run()
    assert code == 0
    assert [(result["what"], result.get("context")) for result in results] == [
        ("prefill", 3000), ("prefill", TOKENS), ("decode", TOKENS), ("summary", None),
    ]  # fmt: skip
    whole = results[-1]
    assert whole["cache_bytes"] == whole["plan_bytes"] == dsv4.plan(model_config(), TOKENS).cache_bytes
    assert whole["peak_rss_bytes"] > 1 << 26
    assert results[1]["mflop_per_token"] * 1e6 == dsv4.plan(model_config(), TOKENS).flops.raw
    assert results[1]["seconds"] == pytest.approx(whole["prefill_seconds"])
    assert whole["digest"][:16] in out

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        code, results, _, err = run("--resume", folder)
    # Of the two steps the first was saved; the second was interrupted before its save.
    assert (code, results) == (130, [])
    assert "interrupted after 3,000 of 6,000 tokens; 2,048 are saved; to continue: dsv4 bench --million" in err
    assert f"--tokens 6000 --resume {folder}" in err

    code, results, _, err = run("--resume", folder)
    assert code == 0
    assert "continuing from 2,048 tokens" in err
    assert results[-1]["digest"] == whole["digest"]
    assert results[-1]["resumed_at"] == 2048
    assert [result["what"] for result in results] == ["prefill", "prefill", "decode", "summary"]

    # The folder now holds the whole prompt: only the decoding is left.
    code, results, _, _ = run("--resume", folder)
    assert (code, results[-1]["resumed_at"], results[-1]["digest"]) == (0, TOKENS, whole["digest"])
    assert [result["context"] for result in results[:2]] == [3000, TOKENS]


def signal_at(monkeypatch, module, name, call):
    """SIGINT, as from a terminal, at this call of a function."""
    original, calls = getattr(module, name), []

    def signalled(*arguments, **named):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, signalled)


def test_an_interrupt_saves_what_is_done(run, monkeypatch, tmp_path):
    monkeypatch.setattr(million, "SAVE_SECONDS", 1e9)
    handler = signal.getsignal(signal.SIGINT)  # a shell has it ignored in what it starts in the background
    whole = run()[1][-1]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, million.Transformer, "forward", 2)  # in the middle of the second step, from 2,048 to 3,000
        code, _, _, err = run("--resume", folder)
    assert code == 130
    assert "this step is finished and saved first" in err
    assert "interrupted after 3,000 of 6,000 tokens; 3,000 are saved" in err

    # A second interrupt, in the middle of the save: the one before it stays, and nothing else.
    saved = (folder / "cache.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        signal_at(patch, million.Transformer, "forward", 1)
        signal_at(patch, os, "fsync", 1)
        code, _, _, err = run("--resume", folder)
    assert code == 130
    assert "interrupted after 5,048 of 6,000 tokens; 3,000 are saved" in err
    assert (folder / "cache.safetensors").read_bytes() == saved
    assert {path.name for path in folder.iterdir()} == {"cache.safetensors", "times.json"}

    assert signal.getsignal(signal.SIGINT) is handler
    code, results, _, _ = run("--resume", folder)
    assert (code, results[-1]["resumed_at"], results[-1]["digest"]) == (0, 3000, whole["digest"])


def test_interrupt_without_a_folder(run, monkeypatch):
    interrupt_after(monkeypatch, 1)
    code, _, _, err = run()
    assert code == 130
    assert "nothing is saved: --resume FOLDER saves as it goes" in err


def test_digest_sees_the_cache(run, monkeypatch):
    """One page of one sequence changed after the prefill gives another digest."""
    expected = run(tokens=600)[1][-1]["digest"]
    finish = million._finish

    def damaged(model, cache, *rest):
        layer = cache.layers[3]
        layer.pages.view(torch.uint8)[:, 64] ^= 1
        return finish(model, cache, *rest)

    monkeypatch.setattr(million, "_finish", damaged)
    assert run(tokens=600)[1][-1]["digest"] != expected


def test_other_bytes_than_planned(run, monkeypatch):
    planned = million.cache_bytes
    monkeypatch.setattr(million, "cache_bytes", lambda config, length: planned(config, length) + 1)
    code, results, out, _ = run(tokens=600)
    assert (code, results) == (1, [])
    assert out.startswith("FAILED: the cache holds ")
    assert "tokens/s" not in out


def test_saves_that_do_not_fit(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert run("--resume", folder, tokens=600)[0] == 0
    (folder / "times.json").write_text("[[512, 1")
    code, _, _, err = run("--resume", folder, tokens=600)
    assert (code, err.count("\n")) == (2, 1)
    assert "times.json is missing or damaged; name an empty folder" in err
    code, _, _, err = run("--resume", folder, tokens=599)
    assert code == 2
    assert "holds 600 tokens of another run or Python; name an empty folder" in err
    monkeypatch.setattr(million, "text_tokens", lambda count: text_tokens(count).flip(0))
    assert run("--resume", folder, tokens=600)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--million", "--quick"], "--million takes --tokens, --resume and --json, and no other option"),
        (["--million", "--op", "mhc_pre"], "--million takes --tokens, --resume and --json, and no other option"),
        (["--tokens", "1K"], "--tokens and --resume belong to --million"),
        (["--resume", "x"], "--tokens and --resume belong to --million"),
        (["--million", "--tokens", "1000M"], "bytes, --tokens asks for 1,048,576,000"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert cli.main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_text_is_the_sources_in_order(tmp_path):
    for name, text in {"b.py": "bé\n", "a/z.py": "az", "a.py": "A", "a/test/x.py": "no", "b.txt": "no"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    expected = "A" + "az" + "bé\n"
    tokens = text_tokens(len(expected.encode()), tmp_path)
    assert Tokenizer(BUNDLED / "nano").decode(tokens.tolist()) == expected
    with pytest.raises(ValueError, match="have 7 bytes, --tokens asks for 8"):
        text_tokens(8, tmp_path)


def test_last_sixteenth():
    times = [Step(end, 1.0, 2.0) for end in range(100, 1700, 100)]
    assert last_steps(times, 1600) == (100, 1.0, 2.0)
    assert last_steps(times, 400) == (100, 1.0, 2.0)
    many = [Step(end, 0.5, 1.0) for end in range(10, 1601, 10)]
    assert last_steps(many, 1600) == (100, 5.0, 10.0)
    assert last_steps([Step(7, 3.0, 1.0)], 7) == (7, 3.0, 1.0)
