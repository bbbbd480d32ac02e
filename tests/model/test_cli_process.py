"""The command line as a process of its own: interrupts, and streams that end or are full."""

import functools
import os
import signal
import subprocess
import sys

import pytest


def start(*arguments, **options):
    command = [sys.executable, "-m", "dsv4", *map(str, arguments)]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


def test_interrupt_of_a_process():
    # A job that a shell started in the background ignores interrupts, and so would what it starts.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    arguments = ("generate", "nano", "--prompt", "x", "--raw", "--ignore-eos", "--max-new-tokens", 100_000)
    process = start(*arguments, preexec_fn=listen)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert b"Traceback" not in err


def test_interrupt_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    script = tmp_path / "dsv4"
    script.write_text("import sys\nfrom dsv4.cli import main\nsys.exit(main())")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    for command in (["-m", "dsv4"], [script]):
        done = subprocess.run([sys.executable, *command, "plan", "nano"], capture_output=True, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
    # To a program that imports the package its interrupt belongs.
    program = "try:\n    import dsv4\nexcept KeyboardInterrupt:\n    print('mine')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"mine\n")


def test_reader_that_leaves():
    process = start("plan", "nano")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert err == b""


@pytest.mark.parametrize("command", [("plan", "nano"), ("generate", "nano", "--tokens", "1", "--max-new-tokens", 1)])
def test_streams_that_are_closed_or_full(command):
    process = start(*command, preexec_fn=lambda: os.closerange(1, 3))
    process.communicate(timeout=120)
    assert process.returncode == 0
    with open("/dev/full", "wb") as full:
        process = start(*command, stdout=full)
        err = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 2
    assert err.splitlines()[-1] == f"dsv4 {command[0]}: No space left on device; make room or write elsewhere"


@pytest.mark.parametrize("command", ["plan", "inspect", "env"])
def test_what_is_still_in_a_buffer_at_the_end(command):
    """Short output reaches a stream that is full, or that nobody reads, only when it is flushed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    arguments = (command, *(() if command == "env" else ("nano",)))
    with open("/dev/full", "wb") as full:
        process = start(*arguments, stdout=full, env=environment)
        err = process.communicate(timeout=120)[1].decode()
    message = f"dsv4 {command}: No space left on device; make room or write elsewhere\n"
    assert (process.returncode, err) == (2, message)
    process = start(*arguments, env=environment)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=120), err) == (0, b"")


def test_standard_input_that_is_closed():
    process = start("generate", "nano", "--prompt-file", "-", preexec_fn=lambda: os.close(0))
    err = process.communicate(timeout=120)[1].decode()
    assert (process.returncode, err) == (2, "dsv4 generate: standard input is closed; name a file\n")
