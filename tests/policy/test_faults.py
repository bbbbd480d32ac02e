"""The planted faults of tests/faults still fit the sources, and name tests that exist."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from repository import ROOT

FOLDER = ROOT / "tests" / "faults"
FAULTS = json.loads((FOLDER / "faults.json").read_text())


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault['op']}: {fault['fault']}" for fault in FAULTS])
def test_fault_can_be_planted(fault: dict[str, Any]) -> None:
    specification = importlib.util.spec_from_file_location("plant", FOLDER / "plant.py")
    assert specification is not None and specification.loader is not None
    plant = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(plant)
    assert plant.planted((ROOT / fault["file"]).read_text(), fault) != (ROOT / fault["file"]).read_text()
    test = fault["test"]
    native = test.removeprefix("cuda_host_").removeprefix("ptx_")
    folder = "cuda_host" if native != test else "native"
    assert (ROOT / (test if test.endswith(".py") else f"tests/{folder}/{native}.cpp")).is_file()
