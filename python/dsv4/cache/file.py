"""Caches on disk: one safetensors file, described in docs/cache_format.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4.cache.layer import BLOCK, blocks_of
from dsv4.model.config import Config

if TYPE_CHECKING:
    from dsv4.cache.cache import KVCache

FORMAT = "dsv4.cache"
VERSION = 1
_CHUNK_BYTES = 1 << 24
_DTYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_ROW_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES if dtype.is_floating_point}
_TABLES = ("window_table", "compressed_table")
# Values of config.json that neither shape the state nor change what is in it.
_FREE = ("architectures", "bos_token_id", "eos_token_id", "max_position_embeddings", "torch_dtype")


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: rows `index` of `tensor`, or all of it."""

    name: str
    tensor: Tensor
    index: list[int] | None = None

    @property
    def shape(self) -> list[int]:
        rows = self.tensor.shape[0] if self.index is None else len(self.index)
        return [rows, *self.tensor.shape[1:]]

    @property
    def row_bytes(self) -> int:
        return self.tensor[:1].numel() * self.tensor.element_size()

    def chunks(self) -> Iterator[Tensor]:
        """The rows as host memory, a few at a time."""
        rows, step = self.shape[0], max(1, _CHUNK_BYTES // max(1, self.row_bytes))
        for first in range(0, rows, step):
            if self.index is None:
                yield self.tensor[first : first + step].cpu().contiguous()
            else:
                yield self.tensor[self.index[first : first + step]].cpu()


def save_cache(cache: KVCache, path: str | Path) -> None:
    """Writes the committed state of all sequences; see `KVCache.save`."""
    path = Path(os.path.realpath(path))  # what a link names is replaced, not the link
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is there and no file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it first")
    entries = _entries(cache)
    config = _fingerprint_fields(cache.config)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(cache.config.to_dict(), sort_keys=True),
        "config_hash": _fingerprint(config),
        "quantization": cache.quantization,
        "dtype": str(cache.dtype).removeprefix("torch."),
        "index_format": cache.index_format,
        "rollback": str(cache.rollback),
        "max_seq_len": str(cache.max_seq_len),
        "sequences": json.dumps([[p.length, p.high, p.floor] for p in cache._progress]),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        end = offset + entry.shape[0] * entry.row_bytes
        header[entry.name] = {
            "dtype": _DTYPES[entry.tensor.dtype],
            "shape": entry.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # A file of that name is either the old one or the whole new one: never a part.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for entry in entries:
                for chunk in entry.chunks():
                    file.write(chunk.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _entries(cache: KVCache) -> list[_Entry]:
    """Everything there is to write. Pages are numbered anew, in the order in which the tables name them."""
    entries = [_Entry(f"ids.{s}", cache.token_ids(s).int()) for s in range(cache.batch_size)]
    pages = []
    for name, table in zip(_TABLES, cache._stored_tables(), strict=True):
        stored = [page for page in dict.fromkeys(table.flatten().tolist()) if page >= 0]
        number = {page: place for place, page in enumerate(stored)} | {-1: -1}
        renamed = [number[page] for page in table.flatten().tolist()]
        entries.append(_Entry(name, torch.tensor(renamed, dtype=torch.int32).view(table.shape)))
        pages.append(stored)
    for number_of_layer, layer in enumerate(cache.layers):
        for name, tensor, index in (
            ("window_pages", layer.window_pages, pages[0]),
            ("pages", layer.pages, pages[1]),
            ("index_pages", layer.index_pages, pages[1]),
            ("state", layer.state, None),
            ("index_state", layer.index_state, None),
        ):
            if tensor is not None:
                entries.append(_Entry(f"layers.{number_of_layer}.{name}", tensor, index))
    return entries


def load_cache(
    kind: type[KVCache],
    path: str | Path,
    config: Config | None,
    device: torch.device | str,
    max_seq_len: int | None,
) -> KVCache:
    """Reads what `save_cache` wrote; see `KVCache.load`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such cache file")
    if not path.is_file():
        raise ValueError(f"{path}: not a cache file; KVCache.save writes one")
    try:
        with safe_open(str(path), framework="pt") as file:
            return _read(kind, path, file, config, device, max_seq_len)
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a whole cache file ({reason}); save it again") from None


def _read(
    kind: type[KVCache],
    path: Path,
    file: Any,
    config: Config | None,
    device: torch.device | str,
    max_seq_len: int | None,
) -> KVCache:
    cache, progress = _empty_cache(kind, path, file.metadata() or {}, config, device, max_seq_len)
    names = set(file.keys())

    def fetch(name: str, like: Tensor, rows: int | None = None) -> Tensor:
        """A tensor of the file, checked to have the dtype and shape of `like` (with `rows` rows)."""
        if name not in names:
            raise ValueError(f"{path}: lacks the tensor {name}; save the cache again")
        part = file.get_slice(name)
        wanted = [like.shape[0] if rows is None else rows, *like.shape[1:]]
        if part.get_dtype() != _DTYPES[like.dtype] or part.get_shape() != wanted:
            raise ValueError(
                f"{path}: {name} must be {_DTYPES[like.dtype]} {wanted}, "
                f"got {part.get_dtype()} {part.get_shape()}; save the cache again"
            )
        return file.get_tensor(name)

    ids = []
    for sequence, (length, _, _) in enumerate(progress):
        ids.append(fetch(f"ids.{sequence}", torch.empty(0, dtype=torch.int32), length))
        if length and not (int(ids[-1].min()) >= 0 and int(ids[-1].max()) < cache.config.vocab_size):
            raise ValueError(f"{path}: ids.{sequence} holds tokens outside the vocabulary; save the cache again")
    columns = max((blocks_of(length) for length, _, _ in progress), default=0)
    like = torch.empty(len(progress), columns, dtype=torch.int32)
    tables = [fetch(name, like) for name in _TABLES]
    _check_tables(path, cache, tables, progress)
    cache._restore(progress, ids, tables)
    pages = [int(table.max()) + 1 if table.numel() else 0 for table in tables]
    for number, layer in enumerate(cache.layers):
        for name, tensor, count in (
            ("window_pages", layer.window_pages, pages[0]),
            ("pages", layer.pages, pages[1]),
            ("index_pages", layer.index_pages, pages[1]),
        ):
            if tensor is not None:
                tensor[:count].copy_(fetch(f"layers.{number}.{name}", tensor, count))
        for name, tensor in (("state", layer.state), ("index_state", layer.index_state)):
            if tensor is not None:
                tensor.copy_(fetch(f"layers.{number}.{name}", tensor))
    return cache


def _empty_cache(
    kind: type[KVCache],
    path: Path,
    metadata: Mapping[str, str],
    config: Config | None,
    device: torch.device | str,
    max_seq_len: int | None,
) -> tuple[KVCache, list[tuple[int, int, int]]]:
    """A cache as the metadata describes it, and (length, high, floor) of its sequences."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a cache file; KVCache.save writes one")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path}: cache format version {metadata.get('version')}, this program reads {VERSION}; "
            "run the prompt again and save its cache with this version"
        )
    try:
        saved = Config.from_dict(json.loads(metadata["config"]), str(path))
        fields = _fingerprint_fields(saved)
        if metadata["config_hash"] != _fingerprint(fields):
            raise ValueError("config_hash does not fit config")
        dtype, sequences = _ROW_DTYPES[metadata["dtype"]], json.loads(metadata["sequences"])
        index = operator.index
        progress = [(index(length), index(high), index(floor)) for length, high, floor in sequences]
        longest = max(length for length, _, _ in progress)
        settings = (metadata["quantization"], dtype, device, metadata["index_format"], int(metadata["rollback"]))
        room = int(metadata["max_seq_len"]) if max_seq_len is None else max_seq_len
        if any(not (0 <= length <= high and 0 <= floor <= high) for length, high, floor in progress):
            raise ValueError("impossible lengths")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: the description of the cache is damaged ({reason}); save it again") from None
    if longest > room:
        raise ValueError(f"{path}: holds {longest} tokens, max_seq_len is {room}; ask for a larger one")
    if config is not None:
        other = _fingerprint_fields(config)
        differing = sorted(name for name in {*fields, *other} if fields.get(name) != other.get(name))
        if differing:
            raise ValueError(
                f"{path}: made for another model ({', '.join(differing)} differ); load it with the model that made it"
            )
    try:
        return kind(saved if config is None else config, len(progress), room, *settings), progress
    except (ValueError, RuntimeError, AssertionError) as error:  # no memory, no such device
        raise ValueError(f"{path}: no such cache can be made on {device} ({str(error).splitlines()[0]})") from None


def _check_tables(path: Path, cache: KVCache, tables: list[Tensor], progress: list[tuple[int, int, int]]) -> None:
    """ValueError unless every entry up to a sequence's length names a page as `KVCache` would have it."""
    window, compressed = tables
    for sequence, (length, high, floor) in enumerate(progress):
        blocks = blocks_of(length)
        rows = window[sequence].tolist(), compressed[sequence].tolist()
        # What the next step reads has to be there, unless a replay rebuilds it first.
        ready = high - length <= cache.rollback and floor <= max(0, length - cache.config.sliding_window + 1)
        first = max(0, length - cache.config.sliding_window + 1) // BLOCK if ready else blocks
        whole = all(page >= 0 for page in rows[1][:blocks]) and all(page >= 0 for page in rows[0][first:blocks])
        beyond = [page for row in rows for page in row[blocks:]]
        # Pages are numbered without gaps, so a number tells how much memory to ask for.
        sound = all(-1 <= page < window.numel() for row in rows for page in row)
        if not (whole and sound) or any(page >= 0 for page in beyond):
            raise ValueError(f"{path}: the page tables of sequence {sequence} are damaged; save the cache again")


def _fingerprint_fields(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _FREE}


def _fingerprint(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
