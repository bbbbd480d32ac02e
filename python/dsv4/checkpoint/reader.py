"""Reads a checkpoint folder: safetensors files, one or several with an index, mapped into memory and never executed.

Headers are parsed here, so that a damaged file is described before a byte of weights is touched; data is read through
safetensors' memory map, one tensor at a time.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4.checkpoint import expected, names
from dsv4.checkpoint.errors import CheckpointError
from dsv4.model.config import Config, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NOTE = "dsv4_note"
"""Key of config.json that says what a checkpoint is where its weights do not: "random weights"."""

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "F4": 4, "C64": 64,
}  # fmt: skip
_MAX_HEADER = 100_000_000
# Mapped pages count as this process's memory until the map is closed; closing it this often keeps that share small.
REMAP_BYTES = 256 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. `part` = (expert, start, stop) selects rows of one expert of a tensor that stacks them."""

    file: Path
    source: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    part: tuple[int, int, int] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS.get(self.dtype, 8) // 8


class Checkpoint:
    """An opened checkpoint folder: its configuration and where every tensor lies.

    Attributes: folder; config; layout ("released" or "transformers"); storage (formats found); note (of config.json, or
    ""); files (safetensors files read); tensors {released key: Entry}.
    """

    def __init__(self, path: str | Path):
        """Reads config.json and all headers. CheckpointError: no checkpoint, a damaged file, an impossible config."""
        self.folder = _folder(Path(path))
        values, config = _config(self.folder)
        self.note = str(values.get(NOTE) or "")
        self._faults: list[str] = []
        self.files, found = self._headers()
        self.layout = "transformers" if names.is_transformers(list(found)) else "released"
        self._names: dict[str, str] = {}
        self.tensors = dict(self._released(found, config))
        self.storage = expected.Storage.detect(self.tensors)
        self.config = self._adjusted(config)
        self._open: dict[Path, Any] = {}
        self._read = 0

    def _adjusted(self, config: Config) -> Config:
        """The tensors decide what config.json may get wrong: expert format; MTP blocks, which transformers drops."""
        experts = self.storage.experts
        config = dataclasses.replace(config, expert_dtype="bf16" if experts == "plain" else experts)
        if self.layout == "transformers" and not any(key.startswith("mtp.") for key in self.tensors):
            ratios = config.compress_ratios[: config.num_hidden_layers]
            config = dataclasses.replace(config, num_nextn_predict_layers=0, compress_ratios=ratios)
        return config

    def _headers(self) -> tuple[list[Path], dict[str, Entry]]:
        index = self.folder / INDEX
        if index.exists() or index.is_symlink():
            return self._sharded(index)
        single = self.folder / SINGLE
        if single.exists() or single.is_symlink():
            return [single], dict(read_header(single))
        shards = sorted(file.name for file in self.folder.glob("*.safetensors"))
        if shards:
            raise CheckpointError(f"{self.folder}: holds {_some(shards)} but neither {SINGLE} nor {INDEX}")
        pickles = sorted(file.name for pattern in _PICKLES for file in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder}: holds {_some(pickles)}; pickles are never opened, convert the weights to safetensors"
            )
        raise CheckpointError(f"{self.folder}: holds neither {SINGLE} nor {INDEX}")

    def _sharded(self, index: Path) -> tuple[list[Path], dict[str, Entry]]:
        try:
            weight_map = read_json(index).get("weight_map")
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must be an object of tensor names and file names")
        for key, name in weight_map.items():
            if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
                raise CheckpointError(
                    f"{index}: weight_map[{key!r}] must be a .safetensors file of this folder, got {name!r}"
                )
        files = [self.folder / name for name in sorted(set(weight_map.values()))]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise CheckpointError(f"{self.folder}: lacks {_some(lost)}, named in {INDEX}; fetch the missing files")
        found: dict[str, Entry] = {}
        for file in files:
            for key, entry in read_header(file):
                if key in found:
                    self._faults.append(f"{key} is both in {found[key].file.name} and in {file.name}")
                elif key not in weight_map:
                    self._faults.append(f"{key} is in {file.name} but not in {INDEX}")
                elif weight_map[key] != file.name:
                    self._faults.append(f"{key} is in {file.name}, {INDEX} says {weight_map[key]}")
                found.setdefault(key, entry)
        self._faults += [
            f"{key} is not in {name}, where {INDEX} has it" for key, name in weight_map.items() if key not in found
        ]
        return files, found

    def _released(self, found: dict[str, Entry], config: Config) -> Iterator[tuple[str, Entry]]:
        """Entries under released names; stacks of experts taken apart."""
        seen: dict[str, str] = {}
        for source, entry in found.items():
            key = source if self.layout == "released" else names.released_name(source)
            if key is None:
                continue
            stacked = names.stacked_experts(key) if self.layout == "transformers" else None
            if stacked is None:
                parts = [(key, entry)]
            else:
                parts = list(_unstack(stacked, entry, config))
                if not parts:
                    self._faults.append(
                        f"{source} has shape {list(entry.shape)}, needs [{config.n_routed_experts}, out, in]"
                    )
            for name, part in parts:
                if name in seen:
                    self._faults.append(f"{source} and {seen[name]} are the same tensor")
                    continue
                seen[name] = source
                if source != name:
                    self._names[name] = source
                yield name, part

    def problems(self) -> list[str]:
        """One line for every tensor that is missing, surplus, mis-shaped, mis-typed or misplaced."""
        wanted = expected.expected_tensors(self.config, self.storage)
        return [*self._faults, *expected.problems(wanted, self.tensors, self._names)]

    def validate(self) -> None:
        """CheckpointError naming every tensor at fault."""
        problems = self.problems()
        if problems:
            raise CheckpointError(f"{self.folder}: not a whole {self.layout} checkpoint of its config.json", problems)

    def ordered_keys(self) -> list[str]:
        """Released keys in the order of the files, so that reading them goes through each file once."""
        return sorted(self.tensors, key=lambda key: (self.tensors[key].file, self.tensors[key].offset, key))

    def nbytes(self, key: str) -> int:
        """Bytes of a tensor as stored."""
        return self.tensors[key].nbytes

    def name(self, key: str) -> str:
        """The name in the file of a tensor with this released name."""
        return self._names.get(key, key)

    def get(self, key: str) -> Tensor:
        """A tensor by released key, on the CPU, mapped: copy it before keeping it."""
        entry = self.tensors[key]
        if self._read > REMAP_BYTES:
            self.close()
        self._read += entry.nbytes
        try:
            handle = self._open.get(entry.file)
            if handle is None:
                handle = self._open[entry.file] = safe_open(entry.file, framework="pt", device="cpu")
            tensor = handle.get_tensor(entry.source)
        except (SafetensorError, OSError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{entry.file}: {entry.source} cannot be read ({str(error).splitlines()[0]})"
            ) from None
        if entry.part is not None:
            expert, start, stop = entry.part
            tensor = tensor[expert, start:stop]
        return tensor

    def close(self) -> None:
        """Unmaps all files; reading on maps them again."""
        self._open.clear()
        self._read = 0


def _unstack(stacked: tuple[str, str], entry: Entry, config: Config) -> Iterator[tuple[str, Entry]]:
    prefix, kind = stacked
    if (
        len(entry.shape) != 3
        or entry.shape[0] != config.n_routed_experts
        or (kind == "gate_up_proj" and entry.shape[1] % 2)
    ):
        return
    rows, columns = entry.shape[1:]
    half = rows // 2
    parts = (("w1", 0, half), ("w3", half, rows)) if kind == "gate_up_proj" else (("w2", 0, rows),)
    for expert in range(entry.shape[0]):
        for matrix, start, stop in parts:
            yield (
                f"{prefix}.{expert}.{matrix}.weight",
                dataclasses.replace(entry, shape=(stop - start, columns), part=(expert, start, stop)),
            )


def read_header(file: Path) -> Iterator[tuple[str, Entry]]:
    """(name, Entry) of every tensor of a safetensors file, after checking that the file is whole and consistent."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{file}: not a safetensors file, or truncated: {size} bytes, header of {length}")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the safetensors header is damaged ({str(error).splitlines()[0]})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is damaged (not a JSON object)")
    header.pop("__metadata__", None)
    spans = []
    for key, value in header.items():
        start, stop, entry = _header_entry(file, key, value)
        spans.append((start, stop, key))
        yield key, entry
    end = 0
    for start, stop, key in sorted(spans):
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise CheckpointError(f"{file}: the safetensors header is damaged ({key} {what})")
        end = stop
    if 8 + length + end != size:
        state = "truncated" if 8 + length + end > size else "longer than its header says"
        raise CheckpointError(f"{file}: {state}: {size} bytes, the header describes {8 + length + end}; fetch it again")


def _header_entry(file: Path, key: str, value: Any) -> tuple[int, int, Entry]:
    damaged = f"{file}: the safetensors header is damaged ({key}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{damaged} is not an object)")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(f"{damaged} has unknown dtype {dtype!r})")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{damaged} has shape {shape}, data_offsets {offsets})")
    entry = Entry(file, key, dtype, tuple(shape), offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(f"{damaged} takes {offsets[1] - offsets[0]} bytes, {dtype} {shape} needs {entry.nbytes})")
    return offsets[0], offsets[1], entry


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} stands there twice")
    return values


def _folder(path: Path) -> Path:
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; give the folder that holds config.json and the safetensors files")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path}: no checkpoint: there is no config.json in this folder")
    return path


def _config(folder: Path) -> tuple[dict[str, Any], Config]:
    try:
        values = read_json(folder / "config.json")
        return values, Config.from_dict(values, str(folder / "config.json"))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
