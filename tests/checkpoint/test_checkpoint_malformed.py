"""Broken checkpoints: each is refused with one line that says what is wrong, and never by another exception."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    TINY,
    base_release_state,
    edit_config,
    edit_header,
    read_index,
    released_state,
    write,
    write_index,
    write_sharded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.checkpoint import CheckpointError, inspect, load
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.writer import write_safetensors

STATE = released_state()
MODEL = "model.safetensors"
NORM = "layers.1.attn_norm.weight"


def refused(folder: Path, *fragments: str, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} not in {message!r}"
    return caught.value


# ---- folders and config.json


def test_link_to_nothing(tmp_path: Path) -> None:
    write(tmp_path, STATE)
    (tmp_path / MODEL).rename(tmp_path / "elsewhere")
    (tmp_path / MODEL).symlink_to(tmp_path / "nowhere")
    refused(tmp_path, f"{MODEL}: ")


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def only_config(folder: Path) -> None:
    (folder / MODEL).unlink()


def only_weights(folder: Path) -> None:
    (folder / "config.json").unlink()


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def only_pickles(folder: Path) -> None:
    (folder / MODEL).rename(folder / "pytorch_model.bin")


def stray_shard(folder: Path) -> None:
    (folder / MODEL).rename(folder / "model-00001-of-00002.safetensors")


def config_text(text: str | bytes) -> Callable[[Path], None]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / "config.json").write_bytes(data) and None


def config_value(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


FOLDERS = {
    "no folder": (nothing, ["no such folder"]),
    "empty folder": (emptied, ["no config.json"]),
    "no weights": (only_config, ["neither model.safetensors nor model.safetensors.index.json"]),
    "no config": (only_weights, ["no config.json"]),
    "pickles": (only_pickles, ["pytorch_model.bin", "convert the weights to safetensors"]),
    "shard without index": (stray_shard, ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]),
    "config not JSON": (config_text("{'a': 1}"), ["config.json", "not readable as JSON"]),
    "config cut short": (config_text('{"model_type": "deepseek_v4",'), ["config.json", "not readable as JSON"]),
    "config empty": (config_text(""), ["config.json", "not readable as JSON"]),
    "config not UTF-8": (config_text(b"\xff\xfe\x00"), ["config.json", "not readable as JSON"]),
    "config a list": (config_text("[]"), ["must hold a JSON object"]),
    "config nested without end": (config_text("[" * 200_000), ["not readable as JSON"]),
    "config huge number": (config_text('{"a": ' + "9" * 5000 + "}"), ["not readable as JSON"]),
    "wrong model_type": (config_value(model_type="deepseek_v3"), ["model_type", "'deepseek_v4'", "'deepseek_v3'"]),
    "no model_type": (config_value(model_type=...), ["model_type", "None"]),
    "size missing": (config_value(hidden_size=..., head_dim=...), ["missing", "hidden_size", "head_dim"]),
    "size a string": (config_value(hidden_size="96"), ["hidden_size", "'96'"]),
    "size negative": (config_value(num_attention_heads=-4), ["num_attention_heads", "-4"]),
    "size boundless": (config_value(n_routed_experts=10**30), ["n_routed_experts"]),
    "NaN": (config_value(rms_norm_eps=float("nan")), ["rms_norm_eps", "nan"]),
    "ratios too few": (config_value(compress_ratios=[0, 4]), ["compress_ratios has 2 entries, needs 4"]),
    "ratio impossible": (config_value(compress_ratios=[0, 4, 1]), ["compress_ratios[2]", "at least 2"]),
    "MTP block that compresses": (config_value(compress_ratios=[0, 4, 128, 4]), ["compress_ratios[3]", "MTP block"]),
    "groups uneven": (config_value(o_groups=3), ["multiple of o_groups 3"]),
    "other scoring": (config_value(scoring_func="softmax"), ["scoring_func", "'sqrtsoftplus'", "'softmax'"]),
    "other rope scaling": (config_value(rope_scaling={"type": "longrope"}), ["rope_scaling", "'longrope'"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_that_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", STATE)
    load(folder)
    change, fragments = FOLDERS[name]
    change(folder)
    refused(folder, str(folder), *fragments)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, STATE)
    refused(folder / MODEL, "is a file; give the folder")


def test_unknown_name_lists_the_bundled_models() -> None:
    refused(Path("no-such-model"), "no-such-model", "nano")


# ---- safetensors files


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_header(folder / MODEL, edit)


def entry(**changes: Any) -> Callable[[Path], None]:
    return header(lambda values: values[NORM].update(changes))


def raw(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / MODEL).write_bytes(edit((folder / MODEL).read_bytes())) and None


def duplicated(values: dict[str, Any]) -> bytes:
    text = json.dumps(values)
    return (text[:-1] + f', "{NORM}": ' + json.dumps(values[NORM]) + "}").encode()


def moved(shift: int) -> Callable[[dict[str, Any]], None]:
    """Shifts one tensor's place, size kept."""

    def edit(values: dict[str, Any]) -> None:
        start, stop = values[NORM]["data_offsets"]
        values[NORM]["data_offsets"] = [start + shift, stop + shift]

    return edit


FILES = {
    "empty file": (raw(lambda data: b""), ["truncated"]),
    "five bytes": (raw(lambda data: data[:5]), ["truncated"]),
    "header cut": (raw(lambda data: data[:100]), ["truncated"]),
    "header length beyond the file": (raw(lambda data: (len(data)).to_bytes(8, "little") + data[8:]), ["header of"]),
    "header length 2^63": (raw(lambda data: (1 << 63).to_bytes(8, "little") + data[8:]), ["header of"]),
    "header not JSON": (header(lambda values: b"{]"), ["header is damaged"]),
    "header not UTF-8": (header(lambda values: b"\xff{}"), ["header is damaged"]),
    "header a list": (header(lambda values: []), ["header is damaged", "not a JSON object"]),
    "header nested without end": (header(lambda values: b"[" * 200_000), ["header is damaged"]),
    "name twice": (header(duplicated), [NORM, "twice"]),
    "data cut": (raw(lambda data: data[:-1]), ["truncated", "fetch it again"]),
    "data too long": (raw(lambda data: data + b"\0"), ["longer than its header says"]),
    "tensors overlap": (header(moved(-2)), ["overlaps", "header is damaged"]),
    "gap between tensors": (header(moved(2)), ["header is damaged"]),
    "shape larger than its bytes": (entry(shape=[97]), [NORM, "needs 194"]),
    "unknown dtype": (entry(dtype="BF17"), [NORM, "'BF17'"]),
    "no dtype": (header(lambda values: values[NORM].pop("dtype") and None), [NORM, "None"]),
    "negative size": (entry(shape=[-96]), [NORM, "[-96]"]),
    "fractional size": (entry(shape=[96.0]), [NORM, "[96.0]"]),
    "boolean size": (entry(shape=[True]), [NORM, "[True]"]),
    "size beyond 2^62": (entry(shape=[1 << 70]), [NORM]),
    "offsets reversed": (entry(data_offsets=[192, 0]), [NORM, "[192, 0]"]),
    "three offsets": (entry(data_offsets=[0, 1, 2]), [NORM, "[0, 1, 2]"]),
    "entry not an object": (header(lambda values: values.update({NORM: 3})), [NORM, "not an object"]),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_file(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, STATE)
    change, fragments = FILES[name]
    change(folder)
    refused(folder, str(folder / MODEL), *fragments)


def test_a_directory_in_place_of_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path, STATE)
    (folder / MODEL).unlink()
    (folder / MODEL).mkdir()
    refused(folder, MODEL)


class Bomb:
    """Leaves a mark when unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("file", [MODEL, "pytorch_model.bin", "model.pt"])
def test_pickles_are_never_executed(file: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", STATE)
    (folder / MODEL).unlink()
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), folder / file)
    (folder / "data.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    refused(folder)
    assert not mark.exists()


SMALL = {"model": {"norm.weight": STATE["norm.weight"], "hc_head_base": STATE["hc_head_base"]}}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_header_is_a_checkpoint_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    write(folder, SMALL["model"])
    content = bytearray((folder / MODEL).read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        end = 8 + int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 4), label="bytes")):
            content[data.draw(st.integers(0, end - 1), label="at")] = data.draw(st.integers(0, 255), label="byte")
    (folder / MODEL).write_bytes(content)
    error = refused(folder)  # even an undamaged file lacks most tensors
    assert str(error)
    shutil.rmtree(folder)


# ---- shards


def index_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text) and None


def remapped(edit: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weight_map = read_index(folder)
        edit(weight_map)
        write_index(folder, weight_map)

    return change


def everywhere(name: str) -> Callable[[Path], None]:
    return remapped(lambda weight_map: weight_map.update({NORM: name}))


def lost_shard(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def repeated(folder: Path) -> None:
    home = read_index(folder)[NORM]
    other = next(name for name in ("model-0.safetensors", "model-1.safetensors") if name != home)
    part = {key: STATE[key] for key, name in read_index(folder).items() if name == other}
    write_safetensors(folder / other, part | {NORM: STATE[NORM]})


INDEXES = {
    "index not JSON": (index_text("{"), ["index.json", "not readable as JSON"]),
    "index without weight_map": (index_text("{}"), ["weight_map"]),
    "weight_map a list": (index_text('{"weight_map": [1]}'), ["weight_map"]),
    "weight_map empty": (index_text('{"weight_map": {}}'), ["weight_map"]),
    "file outside the folder": (everywhere("../model-0.safetensors"), [NORM, "../model-0.safetensors"]),
    "absolute file": (everywhere("/model-0.safetensors"), [NORM, "/model-0.safetensors"]),
    "file of another kind": (everywhere("model-0.bin"), [NORM, "model-0.bin"]),
    "file not a name": (remapped(lambda weight_map: weight_map.update({NORM: 7})), [NORM, "7"]),
    "file not there": (everywhere("model-9.safetensors"), ["lacks model-9.safetensors"]),
    "shard lost": (lost_shard, ["lacks model-1.safetensors"]),
    "shard cut": (cut_shard, ["model-2.safetensors", "truncated"]),
    "tensor in two shards": (repeated, [NORM, "both in"]),
    "tensor not in the index": (remapped(lambda weight_map: weight_map.pop(NORM)), [NORM, "but not in"]),
    "index names a tensor no shard has": (
        remapped(lambda weight_map: weight_map.update({"ghost": "model-0.safetensors"})),
        ["ghost is not in model-0.safetensors"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXES)
def test_inconsistent_shards(name: str, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, STATE)
    load(folder)
    change, fragments = INDEXES[name]
    change(folder)
    refused(folder, str(folder), *fragments)


def test_a_file_that_goes_while_it_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, STATE))
    (tmp_path / MODEL).unlink()
    with pytest.raises(CheckpointError, match=f"{MODEL}: {NORM} cannot be read") as caught:
        checkpoint.get(NORM)
    assert "\n" not in str(caught.value)


def test_index_that_sends_a_tensor_to_the_wrong_shard(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, STATE)
    weight_map = read_index(folder)
    home = weight_map[NORM]
    weight_map[NORM] = next(name for name in set(weight_map.values()) if name != home)
    write_index(folder, weight_map)
    assert refused(folder).problems == (f"{NORM} is in {home}, model.safetensors.index.json says {weight_map[NORM]}",)


# ---- tensors

WQ = "layers.0.attn.wq_a"
EXPERT = "layers.2.ffn.experts.3.w2"


def without(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: [state.pop(key) for key in keys] and None


def cast(dtype: torch.dtype, key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: state[key].to(dtype)})


def put(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key.replace("__", "."): tensor for key, tensor in tensors.items()})


def transposed(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({key: state[key].t().contiguous()})


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({new: state.pop(old)})


def surplus_expert(state: dict[str, Tensor]) -> None:
    for key in [key for key in state if key.startswith("layers.2.ffn.experts.3.")]:
        state[key.replace("experts.3", "experts.4")] = state[key]


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], list[str]]] = {
    "embedding missing": (without("embed.weight"), ["missing embed.weight"]),
    "head missing": (without("head.weight"), ["missing head.weight"]),
    "sink missing": (without("layers.1.attn.attn_sink"), ["missing layers.1.attn.attn_sink"]),
    "scale missing": (without(WQ + ".scale"), [f"missing {WQ}.scale"]),
    "weight missing": (without(WQ + ".weight"), [f"missing {WQ}.weight"]),
    "expert missing": (
        without(EXPERT + ".weight", EXPERT + ".scale"), [f"missing {EXPERT}.weight", f"missing {EXPERT}.scale"]),
    "indexer missing": (without("layers.1.attn.indexer.wq_b.weight"), ["missing layers.1.attn.indexer.wq_b.weight"]),
    "MTP norm missing": (without("mtp.0.hnorm.weight"), ["missing mtp.0.hnorm.weight"]),
    "surplus": (put(rotary=torch.zeros(3)), ["surplus rotary"]),
    "surplus layer": (put(layers__3__attn_norm__weight=torch.ones(96)), ["surplus layers.3.attn_norm.weight"]),
    "surplus expert": (
        surplus_expert,
        [f"surplus layers.2.ffn.experts.4.w{w}.{part}" for w in (1, 2, 3) for part in ("weight", "scale")]),
    "surplus compressor in a window layer": (
        put(layers__0__attn__compressor__ape=torch.zeros(4, 128)), ["surplus layers.0.attn.compressor.ape"]),
    "bias in a hash layer": (put(layers__0__ffn__gate__bias=torch.zeros(4)), ["surplus layers.0.ffn.gate.bias"]),
    "table in a scored layer": (
        renamed("layers.1.ffn.gate.bias", "layers.1.ffn.gate.tid2eid"),
        ["missing layers.1.ffn.gate.bias", "surplus layers.1.ffn.gate.tid2eid"]),
    "scale on a plain weight": (put(head__scale=torch.ones(1, 1)), ["surplus head.scale"]),
    "shape": (put(norm__weight=torch.ones(95, dtype=torch.bfloat16)), ["norm.weight has shape [95], needs [96]"]),
    "transposed": (transposed(WQ + ".weight"), [f"{WQ}.weight has shape [96, 160], needs [160, 96]"]),
    "transposed scale": (transposed(WQ + ".scale"), [f"{WQ}.scale has shape [1, 2], needs [2, 1]"]),
    "extra dimension": (
        lambda state: state.update({"hc_head_scale": state["hc_head_scale"][None]}),
        ["hc_head_scale has shape [1, 1]"]),
    "scalar": (put(hc_head_scale=torch.tensor(1.0)), ["hc_head_scale has shape [], needs [1]"]),
    "norm in F32": (cast(torch.float32, "norm.weight"), ["norm.weight has dtype F32, needs BF16"]),
    "norm in F16": (cast(torch.float16, "norm.weight"), ["norm.weight has dtype F16, needs BF16"]),
    "mixing in BF16": (cast(torch.bfloat16, "layers.1.hc_attn_fn"), ["layers.1.hc_attn_fn has dtype BF16, needs F32"]),
    "sink as integers": (cast(torch.int64, "layers.0.attn.attn_sink"), ["attn_sink has dtype I64, needs F32"]),
    "one linear in BF16": (cast(torch.bfloat16, WQ + ".weight"), [f"{WQ}.weight has dtype BF16, needs F8_E4M3"]),
    "one linear scale in F32": (cast(torch.float32, WQ + ".scale"), [f"{WQ}.scale has dtype F32, needs F8_E8M0"]),
    "one expert in FP8": (
        lambda state: state.update({EXPERT + ".weight": torch.zeros(96, 64).to(torch.float8_e4m3fn)}),
        [f"{EXPERT}.weight has dtype F8_E4M3, needs I8 or U8", f"{EXPERT}.weight has shape [96, 64], needs [96, 32]"]),
    "hash table as I32": (cast(torch.int32, "layers.0.ffn.gate.tid2eid"), ["tid2eid has dtype I32, needs I64"]),
    "one compressor weight in F32": (
        cast(torch.float32, "layers.1.attn.compressor.wkv.weight"),
        ["compressor.wkv.weight has dtype F32, needs BF16"]),
}  # fmt: skip


@pytest.fixture
def allow_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer refuses what no release holds; these tests need it on disk."""
    from dsv4.checkpoint import writer

    monkeypatch.setitem(writer._DTYPE_NAMES, torch.int32, "I32")


@pytest.mark.usefixtures("allow_int32")
@pytest.mark.parametrize("name", TENSORS)
def test_tensor_at_fault_is_named(name: str, tmp_path: Path) -> None:
    state = dict(STATE)
    change, fragments = TENSORS[name]
    change(state)
    error = refused(write(tmp_path, state), str(tmp_path), *fragments)
    assert len(error.problems) == len(fragments)
    assert inspect(tmp_path).problems == error.problems


@pytest.mark.usefixtures("allow_int32")
def test_all_faults_come_in_one_error(tmp_path: Path) -> None:
    names = ["head missing", "surplus", "shape", "mixing in BF16", "expert missing", "hash table as I32"]
    state = dict(STATE)
    fragments = []
    for name in names:
        TENSORS[name][0](state)
        fragments += TENSORS[name][1]
    error = refused(write(tmp_path, state), *fragments)
    assert len(error.problems) == len(fragments) == 7


def test_config_of_another_size_names_every_tensor(tmp_path: Path) -> None:
    folder = write(tmp_path, STATE)
    edit_config(folder, hidden_size=128)
    error = refused(folder)
    narrow = (".scale", "q_norm.weight", "kv_norm.weight", "compressor.norm.weight", "ape", "attn_sink", "gate.bias")
    narrow += ("tid2eid", "_base", "hc_attn_scale", "hc_ffn_scale", "hc_head_scale")
    wrong = {key for key in STATE if not key.endswith(narrow) and ".wq_b." not in key and ".wo_a." not in key}
    # FP8 scales count blocks of 128, as many for 96 as for 128; FP4 scales count 32 inputs or one output.
    wrong |= {key for key in STATE if ".experts." in key and key.endswith("scale")}
    assert {problem.split()[0] for problem in error.problems} == wrong


# ---- values


def poisoned(state: dict[str, Tensor], key: str, value: Tensor | float) -> dict[str, Tensor]:
    tensor = state[key].clone()
    target = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor
    target.view(-1)[-1] = value
    return {**state, key: tensor}


@pytest.mark.parametrize("quantization", ["checkpoint", "off"])
@pytest.mark.parametrize("key", [WQ + ".scale", EXPERT + ".scale"])
def test_nan_scale_byte(key: str, quantization: str, tmp_path: Path) -> None:
    refused(write(tmp_path, poisoned(STATE, key, 255)), f"{key} holds 1 scales", quantization=quantization)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_impossible_float_scale(value: float, tmp_path: Path) -> None:
    state = poisoned(base_release_state(STATE), WQ + ".scale", value)
    refused(write(tmp_path, state), f"{WQ}.scale holds 1 scales")


@pytest.mark.parametrize("value", [-1, 4])
def test_hash_table_beyond_the_experts(value: int, tmp_path: Path) -> None:
    state = poisoned(STATE, "layers.0.ffn.gate.tid2eid", value)
    refused(write(tmp_path, state), "layers.0.ffn.gate.tid2eid", "there are 4")


# ---- arguments


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"quantization": "fp8"}, "'checkpoint' or 'off'"),
        ({"dtype": torch.float16}, "dtype must be one of"),
        ({"device": "cup"}, "'cup' is not a device"),
        ({"device": "cuda:64"}, "'cuda:64' is not there"),
        ({"device": "meta"}, "'meta' holds no weights"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=fragment):
        load(write(tmp_path, STATE), **options)


def test_unquantised_weights_need_mode_off(tmp_path: Path) -> None:
    plain = {key: t.float() for key, t in STATE.items() if ".experts." not in key and not key.endswith(".scale")}
    experts = {
        key: torch.zeros(96, 64) if ".w2." in key else torch.zeros(64, 96)
        for key in STATE
        if ".experts." in key and key.endswith("weight")
    }
    state = plain | experts | {"layers.0.ffn.gate.tid2eid": STATE["layers.0.ffn.gate.tid2eid"]}
    folder = write(tmp_path, state, TINY)
    refused(folder, "quantization='off'")
    assert load(folder, quantization="off", dtype=torch.float32).dtype == torch.float32
