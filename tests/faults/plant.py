"""Plants faults in a copy of the sources, one at a time, and runs the op's own test on each: every fault must be
caught. Prints the table of docs/investigations/planted_faults.md.

    python tests/faults/plant.py [--op OP]... [--jobs N] [--markdown FILE]

faults.json lists them: the op, what is wrong, the file, the text to find (it occurs there once; tests/policy checks
that), what replaces it, further such pairs ("also") where one change makes no fault, and the test that must fail: a
native program (ptx_...: with nvcc), or a file for pytest. What the implementations share, a native program that
compares them cannot see; the Python test knows the definition.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("faults.json")
TIMEOUT_S = 300
NAMED = 3  # cases in the table
OP_LIBRARY = "lib/libdsv4_cpu.so"  # what the Python tests load
SOURCES = ("CMakeLists.txt", "pyproject.toml", "cmake", "csrc", "python", "tests", "benchmarks/native", "third_party")


def planted(text: str, fault: dict[str, Any]) -> str:
    """The source with the fault in it."""
    for find, replace in [(fault["find"], fault["replace"]), *fault.get("also", [])]:
        count = text.count(find)
        if count != 1:
            raise ValueError(f"{fault['file']}: {fault['fault']}: the text to find occurs {count} times, not once")
        text = text.replace(find, replace)
    return text


def run(
    command: list[str], folder: Path, timeout: float | None = None, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(variables or {})}
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end after {timeout} s")


class Copy:
    """A copy of the sources with a build of its own."""

    def __init__(self, folder: Path, jobs: int, cuda: bool):
        self.folder, self.jobs = folder, jobs
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
            else:
                shutil.copy(source, folder / name)
        options = ["-DDSV4_NATIVE=ON", f"-DDSV4_CUDA={'ON' if cuda else 'OFF'}"]
        options += [f"-DPython_EXECUTABLE={sys.executable}"]
        self._must(["cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options])

    def _must(self, command: list[str]) -> None:
        done = run(command, self.folder)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def build(self, test: str) -> None:
        self._must(["ninja", "-C", "build", "-j", str(self.jobs), OP_LIBRARY if test.endswith(".py") else test])

    def failures(self, test: str) -> list[str]:
        """The cases that fail (of a Python test the first); how the test ended, where none is named."""
        if test.endswith(".py"):
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
            done = run(command, self.folder, TIMEOUT_S, {"PYTHONPATH": str(self.folder / "python")})
            named = re.findall(r"^FAILED [^:]+::(\w+)", done.stdout, re.MULTILINE)
        else:
            path = next(path for path in (self.folder / "build").rglob(test) if path.is_file())
            done = run([str(path)], path.parent, TIMEOUT_S)
            named = re.findall(r"^FAILED (\w+)", done.stdout, re.MULTILINE)
        return list(dict.fromkeys(named)) or ([] if done.returncode == 0 else [f"(exit {done.returncode})"])


def outcomes(copy: Copy, faults: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    for fault in faults:
        path = copy.folder / fault["file"]
        sound = path.read_text()
        path.write_text(planted(sound, fault))
        copy.build(fault["test"])
        failed = copy.failures(fault["test"])
        path.write_text(sound)
        yield fault, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only faults of this op; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (default 2)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    faults = [f for f in json.loads(LIST.read_text()) if not arguments.op or f["op"] in arguments.op]
    if not faults:
        parser.error(f"no faults of {', '.join(arguments.op)} in {LIST.name}")
    rows, escaped = ["| op | fault | caught by |", "|---|---|---|"], 0
    with tempfile.TemporaryDirectory(prefix="dsv4-faults-") as folder:
        copy = Copy(Path(folder), arguments.jobs, cuda=any(fault["test"].startswith("ptx_") for fault in faults))
        for program in dict.fromkeys(fault["test"] for fault in faults):
            copy.build(program)
            if failed := copy.failures(program):
                sys.exit(f"{program} fails without any fault: {', '.join(failed)}")
        for number, (fault, failed) in enumerate(outcomes(copy, faults), 1):
            more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
            caught = f"`{fault['test']}`: {', '.join(failed[:NAMED])}{more}" if failed else "**nothing**"
            escaped += not failed
            rows.append(f"| {fault['op']} | {fault['fault']} | {caught} |")
            print(f"[{number}/{len(faults)}] {rows[-1]}", flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(rows) + "\n")
    print(f"{len(faults) - escaped} of {len(faults)} faults caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
