"""Small checkpoints written to disk, whole or broken in a chosen way."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoint.formats import quantize_weight_fp8
from dsv4.checkpoint.init import RandomSource
from dsv4.checkpoint.writer import write_safetensors
from dsv4.model.config import Config, Yarn
from dsv4.ops import dequantize_weight

# Every kind of layer, an MTP block, and sizes that leave partial FP8 blocks.
TINY = Config(
    vocab_size=64,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=64,
    q_lora_rank=160,
    o_groups=2,
    o_lora_rank=32,
    compress_ratios=(0, 4, 128, 0),
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    qk_rope_head_dim=32,
    sliding_window=16,
    rope_scaling=Yarn(4, 64),
    index_n_heads=2,
    index_head_dim=64,
    index_topk=4,
    num_hash_layers=1,
    num_nextn_predict_layers=1,
)


def released_state(config: Config = TINY, seed: int = 0) -> dict[str, Tensor]:
    source = RandomSource(config, seed)
    return {key: source.get(key) for key in source.ordered_keys()}


def write(folder: Path, state: Mapping[str, Tensor], config: Config | dict[str, Any] = TINY) -> Path:
    """One file."""
    folder.mkdir(parents=True, exist_ok=True)
    values = config.to_dict() if isinstance(config, Config) else config
    (folder / "config.json").write_text(json.dumps(values))
    write_safetensors(folder / "model.safetensors", state)
    return folder


def write_sharded(folder: Path, state: Mapping[str, Tensor], config: Config = TINY) -> Path:
    """Three shards, keys dealt out in turn, so that weights and scales lie in different files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    names = [f"model-{i}.safetensors" for i in range(3)]
    dealt: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for i, (key, tensor) in enumerate(state.items()):
        dealt[names[i % 3]][key] = tensor
    for name, part in dealt.items():
        write_safetensors(folder / name, part)
    write_index(folder, {key: name for name, part in dealt.items() for key in part})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def edit_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the header of a safetensors file; `edit` changes it in place or returns what stands there instead."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    changed = edit(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; a value of ... removes the key."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for key, value in changes.items():
        if value is ...:
            values.pop(key)
        else:
            values[key] = value
    file.write_text(json.dumps(values))


def base_release_state(state: Mapping[str, Tensor], config: Config = TINY) -> dict[str, Tensor]:
    """The same weights as a base release stores them: F32 scales, FP8 experts, FP8 compressor weights with a scale."""
    found = dict(state)
    for key in [key for key in state if key.endswith(".weight")]:
        stem = key.removesuffix("weight")
        if ".experts." in key:
            weight = dequantize_weight(state[key], state[stem + "scale"], torch.float32)
            found[key], found[stem + "scale"] = quantize_weight_fp8(weight)
        elif ".compressor.w" in key:
            found[key], found[stem + "scale"] = quantize_weight_fp8(state[key].float())
        if stem + "scale" in found:
            found[stem + "scale"] = found[stem + "scale"].float()
    return found
