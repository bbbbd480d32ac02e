"""Op libraries that are not there, or not made for this torch and this Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4 import _library


def test_what_does_not_load_names_the_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "_loaded", {})
    monkeypatch.setattr(_library, "_folders", lambda: [tmp_path])
    with pytest.raises(ImportError, match=r"libdsv4_cpu\.so not found; build it: pip install"):
        _library.load()
    (tmp_path / "libdsv4_cpu.so").write_bytes(b"no library")
    with pytest.raises(ImportError, match=r"cannot load .*libdsv4_cpu\.so .*; torch 2\.11 or newer is needed") as error:
        _library.load()
    assert "\n" not in str(error.value)


def test_a_native_module_of_another_python_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The op libraries work without it."""
    (tmp_path / "_native.py").write_text("raise ImportError('built for another Python')\n")
    monkeypatch.setattr(_library, "_folders", lambda: [tmp_path])
    assert _library.unit_peaks(1) is None
    assert _library.build_info()["native"] is None
