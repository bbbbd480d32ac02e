"""Caches on disk: what is saved goes on exactly, and what is damaged is refused in one line that names the mend."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dependencies import CONFIGS, expected, filled, run, tokens, toy_cache

from dsv4 import Config, KVCache

NANO = Config.preset("nano")


@pytest.mark.parametrize("name", CONFIGS)
def test_file_round_trip(name: str, tmp_path: Path) -> None:
    config, ids = CONFIGS[name], [tokens(700), tokens(3, 1), []]
    made = toy_cache(config, batch_size=3, max_seq_len=2000, rollback=5)
    run(made, ids)
    made.crop([650, 3, 0])
    made.save(tmp_path / "cache")
    got = KVCache.load(tmp_path / "cache", config)
    assert (got.lengths, got.max_seq_len, got.rollback, got.dtype) == (made.lengths, 2000, 5, torch.float64)
    assert got.nbytes == made.nbytes
    new = [tokens(200, 2), tokens(200, 3), tokens(200, 4)]
    for out, mine, old, more in zip(run(got, new), run(made, new), (ids[0][:650], ids[1], []), new, strict=True):
        assert np.array_equal(out, expected(config, old + more)[len(old) :])
        assert np.array_equal(out, mine)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_file_keeps_sharing(tmp_path: Path) -> None:
    made = filled(CONFIGS["all kinds"], tokens(700)).fork([0, 0, 0])
    made.save(tmp_path / "cache")
    got = KVCache.load(tmp_path / "cache")
    assert got.nbytes == made.nbytes
    assert [pool.used for pool in got._tables.pools] == [1, 3]
    run(got, [[1], [2], [3]])
    for place, out in enumerate(run(got, [[4], [5], [6]])):
        assert np.array_equal(out, expected(made.config, [*tokens(700), place + 1, place + 4])[701:])


def test_file_of_byte_pages(tmp_path: Path) -> None:
    """Every page format, bit for bit."""
    for options in ({}, {"index_format": "fp8"}, {"quantization": "off", "dtype": torch.bfloat16}):
        made = KVCache(NANO, **options)
        made.commit(made.begin([torch.arange(300)]))
        generator = torch.Generator().manual_seed(0)
        for pool in made._tables.pools:
            for tensor in pool.tensors:
                bits = tensor.view(torch.uint8)
                bits.copy_(torch.randint(256, bits.shape, generator=generator, dtype=torch.uint8))
        made.save(tmp_path / "cache")
        got = KVCache.load(tmp_path / "cache", NANO)
        assert (got.quantization, got.index_format, got.dtype) == (made.quantization, made.index_format, made.dtype)
        for mine, theirs in zip(made.layers, got.layers, strict=True):
            for name in ("window_pages", "pages", "index_pages"):
                one, other = getattr(mine, name), getattr(theirs, name)
                if one is not None:
                    table = made._tables.page_of[name != "window_pages"][0, :2]
                    place = got._tables.page_of[name != "window_pages"][0, :2]
                    assert torch.equal(one[table].view(torch.uint8), other[place].view(torch.uint8))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made = filled(CONFIGS["all kinds"], tokens(270))
    made.save(tmp_path / "cache")
    return tmp_path / "cache"


def _edit(path: Path, change: dict[str, str | None], tensor: str | None = None, value: int = 0) -> None:
    """Rewrites the metadata of a cache file, or the first element of an int32 tensor."""
    data = bytearray(path.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for name, text in change.items():
        if text is None:
            del header["__metadata__"][name]
        else:
            header["__metadata__"][name] = text
    body = data[8 + size :]
    if tensor is not None:
        at = header[tensor]["data_offsets"][0]
        body[at : at + 4] = struct.pack("<i", value)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "version 2.*reads 1"),
        ({"version": None}, "version None"),
        ({"format": "other"}, "not a cache file"),
        ({"config": "{}"}, "damaged"),
        ({"config": "no json"}, "damaged"),
        ({"config_hash": "0"}, "damaged"),
        ({"dtype": "no_such"}, "damaged"),
        ({"dtype": "nn"}, "damaged"),
        ({"dtype": "float8_e4m3fn"}, "damaged"),
        ({"sequences": "[[270, Infinity, 0]]"}, "damaged"),
        ({"sequences": "[[270.5, 271, 0]]"}, "damaged"),
        ({"sequences": "[[270, 270, 5000]]"}, "damaged"),
        ({"config": "[" * 100000}, "damaged"),
        ({"rollback": str(10**13)}, "no such cache can be made on cpu"),
        ({"dtype": "float32"}, "must be F32"),
        ({"quantization": "other"}, "quantization"),
        ({"rollback": None}, "damaged"),
        ({"rollback": "9"}, "must be F64"),
        ({"sequences": "[[271, 271, 0]]"}, "must be I32 \\[271\\]"),
        ({"sequences": "[[600, 600, 0]]"}, "must be I32 \\[600\\]"),
        ({"sequences": "[[270, 269, 0]]"}, "damaged"),
        ({"sequences": "[]"}, "damaged"),
        ({"max_seq_len": "269"}, "holds 270 tokens"),
    ],
)
def test_load_refuses_a_changed_description(saved: Path, metadata: dict, message: str) -> None:
    _edit(saved, metadata)
    _refused(saved, message)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("window_table", -2, "tables of sequence 0"),
        ("window_table", -1, "tables of sequence 0"),
        ("compressed_table", 1 << 30, "tables of sequence 0"),
        ("compressed_table", -1, "tables of sequence 0"),
        ("ids.0", 97, "vocabulary"),
        ("ids.0", -1, "vocabulary"),
    ],
)
def test_load_refuses_changed_numbers(saved: Path, tensor: str, value: int, message: str) -> None:
    _edit(saved, {}, tensor, value)
    _refused(saved, message)


def test_load_refuses_every_truncation(saved: Path) -> None:
    whole = saved.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1]:
        saved.write_bytes(whole[:size])
        _refused(saved, "not a whole cache file")
    saved.write_bytes(whole + b"x")
    _refused(saved, "not a whole cache file")


def test_load_refuses_other_models_and_files(saved: Path, tmp_path: Path) -> None:
    config = CONFIGS["all kinds"]
    _refused(saved, "another model .*sliding_window differ", replace(config, sliding_window=17))
    assert KVCache.load(saved, replace(config, eos_token_id=5)).length == 270  # says nothing about the state
    with pytest.raises(FileNotFoundError, match="no such cache file"):
        KVCache.load(tmp_path / "missing")
    with pytest.raises((OSError, ValueError)) as error:
        KVCache.load(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="max_seq_len is 100"):
        KVCache.load(saved, max_seq_len=100)


def _refused(path: Path, message: str, config: Config | None = None) -> None:
    with pytest.raises(ValueError, match=message) as error:
        KVCache.load(path, config)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or "quantization" in message


def test_save_keeps_links_and_permissions(saved: Path, tmp_path: Path) -> None:
    cache = KVCache.load(saved)
    link = tmp_path / "link"
    link.symlink_to(saved)
    saved.chmod(0o600)
    cache.save(link)
    assert link.is_symlink() and saved.stat().st_mode & 0o777 == 0o600
    assert KVCache.load(link).lengths == cache.lengths
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FileExistsError, match="is there and no file"):
            cache.save(other)
    with pytest.raises(ValueError, match="not a cache file"):
        KVCache.load(tmp_path)


def test_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    made = filled(CONFIGS["all kinds"], tokens(400))

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dsv4.cache.file.os.fsync", fail)
        with pytest.raises(OSError, match="no space"):
            made.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["cache"]
    with pytest.raises(FileNotFoundError, match=r"/missing: no such folder; make it first$"):
        made.save(saved.parent / "missing" / "cache")
