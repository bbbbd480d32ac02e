"""The examples do what they say, on little text and for a second."""

import functools
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

import dsv4

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples" / "train.py"


def run(*arguments):
    command = [sys.executable, TRAIN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_train(tmp_path):
    out = tmp_path / "model"
    done = run(out, "--minutes", "0.05", "--text", ROOT / "python", "--batch", "2", "--length", "64")
    assert done.returncode == 0, done.stderr
    before, after, rounded = map(float, re.findall(r"(\d+\.\d{3})", done.stdout))
    assert after < before - 0.1 and rounded < before
    model = dsv4.load(out)
    assert model.note.startswith("learned from") and (out / "tokenizer.json").is_file()
    with torch.no_grad():
        assert model(torch.arange(60).unsqueeze(0)).isfinite().all()
    again = run(out)
    assert again.returncode == 2 and "holds a checkpoint already" in again.stderr


def test_what_was_learned_until_an_interrupt_is_written(tmp_path):
    out = tmp_path / "model"
    command = [sys.executable, TRAIN, out, "--text", ROOT / "python", "--batch", "1", "--length", "32"]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=listen
    ) as process:
        while "step 10:" not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "after an interrupted run" in printed
    assert "an interrupted run" in dsv4.load(out).note


def test_what_cannot_be_written_is_said_before_training(tmp_path):
    (tmp_path / "file").touch()
    done = run(tmp_path / "file" / "model", "--text", ROOT / "python", "--minutes", "0.01", "--length", "32")
    assert done.returncode == 2 and "Not a directory; name another folder" in done.stderr
    assert "before training" not in done.stdout
    done = run(tmp_path / "model", "--minutes", "nan")
    assert done.returncode == 2 and "--minutes must be above 0, got nan" in done.stderr


def test_too_little_text(tmp_path):
    done = run(tmp_path / "model", "--text", tmp_path)
    assert done.returncode != 0 and "0 tokens of Python sources are too few" in done.stderr
    assert not (tmp_path / "model").exists()
