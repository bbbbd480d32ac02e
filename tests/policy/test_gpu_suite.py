"""benchmarks/gpu_suite.sh, with a GPU, a device test and a Python that are made up: what it calls, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import dsv4
from dsv4 import bench

NVIDIA_SMI = 'case "$*" in *compute_cap*) echo "${CAPABILITY:-8.9}" ;; *) echo "Fake GPU, 580.1" ;; esac'
# Writes down what the suite runs, and a result for every file that a benchmark was to write. Code on the command line
# is the suite's own.
PYTHON = """
case "$1" in
  -c)
    [[ "$2" == *implementations* ]] || exec "$REAL_PYTHON" "$@"
    echo "['sm80']"
    exit "${IMPORT_FAILS:-0}" ;;
  -) exec "$REAL_PYTHON" "$@" ;;
  *)
    echo "$*" >> "$CALLS"
    while [ $# -gt 0 ]; do [ "$1" = --json ] && echo '{"op": "made up"}' > "$2"; shift; done
    echo "5 passed"
    exit "${FAILS:-0}" ;;
esac
"""
STEPS = ("ops", "model", "bench.weights", "bench.attention", "bench.rows")
SANITIZER = 'echo "sanitizer $*" >> "$CALLS"'


class Suite:
    def __init__(self, folder: Path):
        self.folder, self.record_file = folder, folder / "record.json"
        self.programs = folder / "build" / "tests" / "cuda_host" / "device"
        self.program("bin/nvidia-smi", NVIDIA_SMI)
        self.program("bin/compute-sanitizer", SANITIZER)
        self.program("python", PYTHON)

    def program(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)

    def device_test(self, name: str, last_line: str, code: int = 0) -> None:
        program = (self.programs / f"device_test_{name}").relative_to(self.folder)
        self.program(str(program), f'echo "{last_line}"\nexit {code}')

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHON": str(self.folder / "python"),
            "REAL_PYTHON": sys.executable,
            "PYTHONPATH": str(Path(dsv4.__file__).parents[1]),
            "BUILD": str(self.folder / "build"),
            "CALLS": str(self.folder / "calls"),
            "COMMIT": "abc",
        }
        command = [ROOT / "benchmarks" / "gpu_suite.sh", self.record_file]
        return subprocess.run(
            command, env=os.environ | given | environment, text=True, capture_output=True, check=False
        )

    def calls(self) -> list[list[str]]:
        return [line.split() for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def test_steps_and_record(suite: Suite) -> None:
    for name in ("ptx", "mhc"):
        suite.device_test(name, "3 cases passed, 0 failed, 0 not run, 9 checks, 0 parts not run")
    done = suite.run()
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(suite.record_file.read_text())
    assert (record["device"], record["driver"], len(record["benchmarks"])) == ("Fake GPU", "580.1", 3)
    assert record["commit"].split("+")[0] == "abc"
    tools = ("memcheck", "racecheck", "synccheck")
    names = ["build", "import", "device.test_mhc", "device.test_ptx", *STEPS]
    names += [f"{tool}.test_{name}" for tool in tools for name in ("mhc", "ptx")]
    assert [(step["step"], step["result"]) for step in record["steps"]] == [(name, "passed") for name in names]


def test_what_is_measured(suite: Suite) -> None:
    """Every op that has a benchmark, once; every test file that it names is there."""
    suite.device_test("ptx", "3 cases passed, 0 parts not run")
    suite.run()
    calls = suite.calls()
    measured = [word.removeprefix("--op=") for call in calls for word in call if word.startswith("--op=")]
    assert sorted(measured) == sorted(bench.families())
    weights = next(call for call in calls if "--op=moe_experts" in call)
    contexts = [int(word.removeprefix("--context=")) for word in weights if word.startswith("--context=")]
    assert contexts == [1, 8, 64, 256, 2048, 8192]

    suite.run(CAPABILITY="9.0", PARTS="benchmarks")
    again = [word.removeprefix("--op=") for call in suite.calls()[len(calls) :] for word in call if "--op=" in word]
    hopper = ["fp4_linear", "fp8_linear", "grouped_linear", "index_topk"]
    assert sorted(again) == sorted([*bench.families(), *hopper])
    files = [word for call in calls if "pytest" in call for word in call if word.endswith(".py")]
    assert len(files) >= 7 and all((ROOT / file).is_file() for file in files)


def test_what_only_hopper_has(suite: Suite) -> None:
    for name in ("ptx", "wgmma"):
        suite.device_test(name, "3 cases passed, 0 parts not run")
    for capability, result in (("9.0", "passed"), ("8.0", "not run"), ("10.0", "not run")):
        assert suite.run(CAPABILITY=capability, PARTS="tests").returncode == 0
        found = {step["step"]: step["result"] for step in json.loads(suite.record_file.read_text())["steps"]}
        assert (found["device.test_ptx"], found["device.test_wgmma"]) == ("passed", result)


def test_failures_are_kept(suite: Suite) -> None:
    suite.device_test("ptx", "2 cases passed, 1 failed, 0 parts not run", code=1)
    suite.device_test("mhc", "2 cases passed, 0 failed, 1 parts not run")
    done = suite.run(FAILS="1")
    assert done.returncode == 1
    found = {step["step"]: step["result"] for step in json.loads(suite.record_file.read_text())["steps"]}
    assert found["device.test_ptx"] == "failed with 1" and found["device.test_mhc"] == "failed with not-run"
    assert {found[name] for name in STEPS} == {"failed with 1"}


def test_a_library_that_does_not_load_has_failed(suite: Suite) -> None:
    suite.device_test("ptx", "3 cases passed, 0 parts not run")
    assert suite.run(IMPORT_FAILS="1", PARTS="tests").returncode == 1


def test_parts_and_logs(suite: Suite) -> None:
    suite.device_test("ptx", "3 cases passed, 0 parts not run")
    done = suite.run(PARTS="sanitizers", LOGS=str(suite.folder / "logs"))
    assert done.returncode == 0
    steps = [step["step"] for step in json.loads(suite.record_file.read_text())["steps"]]
    assert steps == ["build", "import", "memcheck.test_ptx", "racecheck.test_ptx", "synccheck.test_ptx"]
    assert "sanitizer --tool memcheck" in (suite.folder / "calls").read_text()
    assert {file.stem for file in (suite.folder / "logs").glob("*.log")} == set(steps)


def test_logs_of_an_earlier_run_are_no_results_of_this(suite: Suite) -> None:
    suite.device_test("ptx", "3 cases passed, 0 parts not run")
    assert suite.run(PARTS="benchmarks", LOGS=str(suite.folder / "logs")).returncode == 0
    assert len(json.loads(suite.record_file.read_text())["benchmarks"]) == 3
    assert suite.run(PARTS="tests", LOGS=str(suite.folder / "logs")).returncode == 0
    assert json.loads(suite.record_file.read_text())["benchmarks"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"PARTS": "tests bench"}, "gpu_suite: PARTS: no part bench\n"),
        ({"PYTHON": "./no-python"}, "gpu_suite: PYTHON: ./no-python is not there\n"),
    ],
)
def test_bad_settings(given: dict[str, str], message: str, suite: Suite) -> None:
    done = suite.run(**given)
    assert (done.returncode, done.stderr) == (2, message)
    assert not suite.record_file.exists()


def test_without_a_gpu(suite: Suite) -> None:
    suite.program("bin/nvidia-smi", "exit 9")
    done = suite.run()
    assert (done.returncode, done.stderr) == (2, "gpu_suite: not run: nvidia-smi finds no GPU\n")
    assert not suite.record_file.exists()
