"""Writing: what is saved loads back bit for bit, in files any safetensors reader opens."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import TINY, base_release_state, released_state, write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import dsv4
from dsv4.checkpoint import CheckpointError, init, load, save_released, writer
from dsv4.model.transformer import Transformer


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(bits(a[name]), bits(b[name])), name


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
def test_round_trip(expert_dtype: str, shard_bytes: int, tmp_path: Path) -> None:
    import dataclasses

    config = dataclasses.replace(TINY, expert_dtype=expert_dtype)
    model = init(config, seed=3)
    save_released(model, tmp_path / "saved", shard_bytes)
    back = load(tmp_path / "saved")
    assert back.config == config
    assert_same(model.state_dict(), back.state_dict())
    ids = torch.arange(30)[None]
    assert torch.equal(model(ids), back(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_plain_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = init(TINY, quantization="off", dtype=dtype)
    save_released(model, tmp_path)
    back = load(tmp_path, quantization="off", dtype=dtype)
    assert_same(model.state_dict(), back.state_dict())
    assert back.config.expert_dtype == "bf16"
    with pytest.raises(CheckpointError, match="quantization='off'"):
        load(tmp_path)


def test_round_trip_of_a_base_release(tmp_path: Path) -> None:
    """F32 scales and FP8 experts stay; compressor weights, dequantised on loading, come back as F32."""
    model = load(write(tmp_path / "base", base_release_state(released_state())))
    save_released(model, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert_same(model.state_dict(), back.state_dict())
    assert back.config == model.config


def test_both_modes_hold_the_same_weights(tmp_path: Path) -> None:
    save_released(init(TINY, seed=1), tmp_path)
    from_file = load(tmp_path, quantization="off", dtype=torch.float32)
    assert_same(init(TINY, 1, "off", torch.float32).state_dict(), from_file.state_dict())


def test_shards_keep_to_their_size_and_index(tmp_path: Path) -> None:
    state = released_state()
    save_released(state, tmp_path, 60_000, config=TINY)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name in files:
        shard = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 60_000 or len(shard) == 1
        assert_same(shard, {key: state[key] for key, file in index["weight_map"].items() if file == name})
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json", *files, "model.safetensors.index.json"]  # fmt: skip


def test_file_is_aligned_and_marked(tmp_path: Path) -> None:
    write(tmp_path, released_state())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    width = {"I64": 8, "F32": 4, "BF16": 2}
    for key, value in header.items():
        if key != "__metadata__":
            assert value["data_offsets"][0] % width.get(value["dtype"], 1) == 0, key


def test_note_is_kept(tmp_path: Path) -> None:
    model = init(TINY)
    assert model.note == "random weights"
    save_released(model, tmp_path / "a")
    assert load(tmp_path / "a").note == "random weights"
    save_released(model, tmp_path / "b", note="trained on nothing")
    assert load(tmp_path / "b").note == "trained on nothing"
    save_released(model, tmp_path / "c", note="")
    assert load(tmp_path / "c").note == ""
    config = tmp_path / "c" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dsv4_note": None}))
    assert load(tmp_path / "c").note == ""


def test_a_dtype_without_a_name_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch\.float64, which a checkpoint cannot hold"):
        save_released(init(TINY, quantization="off", dtype=torch.float64), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    save_released(init(TINY), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        save_released(init(TINY, seed=1), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"model": {"norm.weight": torch.ones(3)}}, "needs config="),
        ({"model": {"norm.weight": torch.ones(3).double()}, "config": TINY}, "norm.weight is torch.float64"),
        ({"model": {"norm.weight": torch.ones(3)}, "config": TINY, "shard_bytes": 0}, "shard_bytes must be positive"),
    ],
)
def test_refuses_what_cannot_be_written(arguments: dict, fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=fragment):
        save_released(path=tmp_path, **arguments)


def test_interrupted_write_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    state = dict(released_state())
    state["norm.weight"] = Broken(state["norm.weight"])
    with pytest.raises(RuntimeError, match="unplugged"):
        save_released(state, tmp_path, config=TINY)
    assert not list(tmp_path.iterdir())


class Broken(Tensor):
    """A tensor on a device that fails when it is read."""

    def detach(self) -> Tensor:
        raise RuntimeError("unplugged")


def test_public_names() -> None:
    assert dsv4.load is load
    assert dsv4.init is init
    assert isinstance(init(TINY), Transformer)


@pytest.mark.parametrize(("function", "last"), [("write_safetensors", "model-00002"), ("_write_json", "config.json")])
def test_a_disk_that_fills_leaves_nothing_behind(
    function: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file, model = getattr(writer, function), init(TINY)

    def full(file: Path, *arguments: Any) -> None:
        if file.name.startswith(last):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, function, full)
        with pytest.raises(OSError, match="No space"):
            save_released(model, tmp_path, 60_000)
    assert list(tmp_path.iterdir()) == []
    save_released(model, tmp_path, 60_000)
