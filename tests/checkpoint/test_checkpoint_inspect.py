"""Inspection: counts and bytes against the tensors themselves, and nothing loaded."""

from pathlib import Path

import pytest
import torch
from checkpoint_cases import TINY, released_state, write, write_sharded

from dsv4.checkpoint import CheckpointError, init, inspect, save_released

STATE = released_state()


def test_counts(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, STATE))
    weights = {key: t for key, t in STATE.items() if not key.endswith((".scale", "tid2eid"))}
    values = {key: t.numel() * (2 if t.dtype == torch.int8 else 1) for key, t in weights.items()}
    routed = {key: count for key, count in values.items() if ".experts." in key}
    per_token = sum(
        count for key, count in values.items() if not key.startswith(("mtp.", "embed.")) and key not in routed
    ) + sum(count for key, count in routed.items() if not key.startswith("mtp.") and int(key.split(".")[4]) < 2)
    assert found.parameters == sum(values.values())
    assert found.expert_parameters == sum(routed.values())
    assert found.active_parameters == per_token
    assert found.nbytes == sum(t.nbytes for t in STATE.values())
    assert found.bytes_by_dtype["I8"] == sum(t.nbytes for t in STATE.values() if t.dtype == torch.int8)
    assert list(found.bytes_by_dtype.values()) == sorted(found.bytes_by_dtype.values(), reverse=True)
    assert (found.layout, found.config, found.problems, found.random) == ("released", TINY, (), False)


def test_shards_are_listed(tmp_path: Path) -> None:
    found = inspect(write_sharded(tmp_path, STATE))
    assert [file.name for file in found.files] == ["model-0.safetensors", "model-1.safetensors", "model-2.safetensors"]
    assert found.nbytes == sum(t.nbytes for t in STATE.values())


def test_random_weights_are_known_as_such(tmp_path: Path) -> None:
    save_released(init(TINY), tmp_path)
    assert inspect(tmp_path).random


def test_bundled_model() -> None:
    found = inspect("nano")
    assert not found.random and "knows how code looks" in found.note
    assert found.problems == ()
    text = "\n".join(found.config_lines())
    for fragment in ("8 (2 SWA, 3 CSA, 3 HCA)", "16 top-2", "window 128", "4 heads x 128, top 64", "YaRN 16 x 65536"):
        assert fragment in text


def test_problems_are_listed_not_raised(tmp_path: Path) -> None:
    state = {key: t for key, t in STATE.items() if key != "norm.weight"}
    assert inspect(write(tmp_path, state)).problems == ("missing norm.weight",)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect(tmp_path)
