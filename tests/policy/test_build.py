"""What a build is told: read from its plan, without building."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import PACKAGE, ROOT

TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
MISSING = [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=TOOLS) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not run: no {' and '.join(MISSING)}")
def test_a_path_with_spaces_stays_whole(tmp_path: Path) -> None:
    source, build = tmp_path / "a clone", tmp_path / "a build"
    for folder in ("cmake", "csrc", "third_party"):
        shutil.copytree(ROOT / folder, source / folder)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DDSV4_CUDA=OFF"]
    environment = {**os.environ, "PATH": TOOLS}
    configure = ["cmake", "-S", source, "-B", build, "-G", "Ninja", *options]
    for command in (configure, ["ninja", "-C", build, "-t", "commands"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    words = {word for line in done.stdout.splitlines() for word in shlex.split(line)}
    assert f"-Wl,--version-script={source}/cmake/exports.map" in words
    assert [word for word in words if word.startswith(str(tmp_path / "a")) and " " not in word] == []


def test_the_types_reach_a_user() -> None:
    """Without this file a type checker takes the package for untyped; `make lint` checks the types themselves."""
    assert (PACKAGE / "py.typed").is_file()
