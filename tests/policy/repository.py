"""The files that the policy tests read."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "dsv4"


@cache
def tracked() -> tuple[Path, ...]:
    """The files of the repository; outside a clone, such as an unpacked archive, every file that is not built."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        names = [name for name in listing.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        built = {"build", "dist", ".venv", "__pycache__", ".git"}
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if not built & set(p.relative_to(ROOT).parts)]
    return tuple(sorted(ROOT / name for name in names if (ROOT / name).is_file()))


def sources(*suffixes: str, under: Path = ROOT) -> list[Path]:
    found = [path for path in tracked() if path.suffix in suffixes and path.is_relative_to(under)]
    assert found, f"no {suffixes} under {under}"
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))
