"""Writes a model in the released layout, one tensor at a time."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv4.checkpoint.progress import byte_bar
from dsv4.checkpoint.reader import INDEX, NOTE, SINGLE
from dsv4.model.config import Config

_DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_STACKED = re.compile(r"(.+\.ffn\.experts)\.(w[123])(_scale)?")


def save_released(
    model: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    shard_bytes: int = 5_000_000_000,
    *,
    config: Config | None = None,
    note: str | None = None,
) -> None:
    """Writes config.json and model.safetensors, or shards and their index where one file would exceed `shard_bytes`.

    Args:
        model: a Transformer, or a state dict of one (then `config` is needed). Stacked experts are written one by one.
            A model of mode "off" gives an unquantised checkpoint, to be loaded in that mode.
        path: folder; made if need be. It must not hold a checkpoint yet.
        shard_bytes: upper limit of a file's tensor bytes; a tensor larger than that gets a file of its own.
        note: kept as "dsv4_note" in config.json; by default the model's own.
    Raises: ValueError: a checkpoint is there already; no config; a dtype the format of the release has no name for.
    """
    folder = Path(path)
    config = config if config is not None else getattr(model, "config", None)
    if not isinstance(config, Config):
        raise ValueError("save_released: a state dict needs config=, the Config of its model")
    if shard_bytes < 1:
        raise ValueError(f"save_released: shard_bytes must be positive, got {shard_bytes}")
    if (folder / INDEX).exists() or any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: holds a checkpoint already; choose an empty folder")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = dict(released_tensors(state))
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"save_released: {key} is {tensor.dtype}, which a checkpoint cannot hold")
    if not any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values()):
        config = dataclasses.replace(config, expert_dtype="bf16")
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(tensors, shard_bytes))
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    total = sum(tensor.nbytes for tensor in tensors.values())
    try:
        with byte_bar(folder.name, total) as advance:
            for name, keys in zip(names, shards, strict=True):
                write_safetensors(folder / name, {key: tensors[key] for key in keys}, advance)
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        note = note if note is not None else getattr(model, "note", "")
        _write_json(folder / "config.json", config.to_dict() | ({NOTE: note} if note else {}))
    except BaseException:  # part of a checkpoint is none, and would be taken for one at the next try
        for name in (*names, INDEX):
            (folder / name).unlink(missing_ok=True)
        raise


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], advance: Callable[[int], None] = lambda count: None
) -> None:
    """One safetensors file, streamed tensor by tensor, moved into place when whole."""
    # Wide items first keeps every tensor aligned to its own size, as safetensors itself orders them.
    keys = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        tensor = tensors[key]
        header[key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for key in keys:
                data = tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                stream.write(data.numpy().data)
                advance(data.numel())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def released_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict under released names: stacked experts one by one."""
    for name, tensor in state.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            yield name, tensor
            continue
        prefix, matrix, scale = stacked.groups()
        for expert, part in enumerate(tensor):
            yield f"{prefix}.{expert}.{matrix}.{'scale' if scale else 'weight'}", part


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key, tensor in tensors.items():
        if keys and size + tensor.nbytes > limit:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor.nbytes
    yield keys


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_json(file: Path, values: Mapping[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
