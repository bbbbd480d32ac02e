"""Loading whole checkpoints: every value lands where it belongs, in both modes, from every layout of files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import TINY, base_release_state, edit_config, released_state, write, write_sharded
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import dsv4
from dsv4.checkpoint import inspect, load, resolve
from dsv4.generation import Tokenizer
from dsv4.model.transformer import Transformer

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
STATE = released_state()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def released(model: Transformer, key: str) -> Tensor:
    """What the model holds of a released tensor; experts are stacked in it."""
    if ".ffn.experts." not in key:
        return model.state_dict()[key]
    prefix, expert, matrix, part = key.rsplit(".", 3)
    return model.state_dict()[f"{prefix}.{matrix}{'_scale' if part == 'scale' else ''}"][int(expert)]


def plain(state: dict[str, Tensor], key: str) -> Tensor:
    """A released weight in float64, by the format's definition."""
    weight, scale = state[key], state.get(key.removesuffix("weight") + "scale")
    if scale is None or not key.endswith(".weight"):
        return weight.double()
    scale = scale.double()
    if weight.dtype == torch.float8_e4m3fn:
        rows, columns = (torch.arange(size) // 128 for size in weight.shape)
        return weight.double() * scale[rows][:, columns]
    codes = weight.view(torch.uint8).long()
    values = E2M1.double()[torch.stack([codes & 15, codes >> 4], -1).flatten(1)]
    return values * scale.repeat_interleave(32, 1)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


def assert_same_model(a: Transformer, b: Transformer) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(bits(left[name]), bits(right[name])), name


@pytest.mark.parametrize("case", ["dev_a", "dev_b", "dev_c"])
def test_golden_weights_are_kept_as_stored(case: str) -> None:
    stored = load_file(GOLDEN / case / "model.safetensors")
    model = load(GOLDEN / case)
    for key, tensor in stored.items():
        held = released(model, key)
        assert held.dtype == tensor.dtype, key
        assert torch.equal(bits(held), bits(tensor)), key
    held_values = sum(tensor.numel() for tensor in model.state_dict().values())
    assert held_values == sum(tensor.numel() for tensor in stored.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("case", ["dev_a", "dev_b", "dev_c"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_golden_weights_dequantised(case: str, dtype: torch.dtype) -> None:
    stored = load_file(GOLDEN / case / "model.safetensors")
    model = load(GOLDEN / case, quantization="off", dtype=dtype)
    for key in stored:
        if key.endswith(".scale"):
            continue
        held = released(model, key)
        if key.endswith("tid2eid"):
            assert torch.equal(held, stored[key])
        else:
            assert torch.equal(held, plain(stored, key).to(held.dtype)), key
            assert held.dtype == dtype or (key.endswith("gate.bias") and held.dtype == torch.float32), key
    assert not any("scale" in name and "hc_" not in name for name in model.state_dict())


def test_sharded_equals_single(tmp_path: Path) -> None:
    single, sharded = write(tmp_path / "single", STATE), write_sharded(tmp_path / "sharded", STATE)
    for quantization, dtype in (("checkpoint", torch.bfloat16), ("off", torch.float32)):
        assert_same_model(load(single, "cpu", quantization, dtype), load(sharded, "cpu", quantization, dtype))


def test_index_takes_precedence_over_a_single_file(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, STATE)
    (folder / "model.safetensors").write_bytes(b"not read")
    load(folder)


def test_fp4_codes_stored_as_unsigned(tmp_path: Path) -> None:
    unsigned = {key: t.view(torch.uint8) if t.dtype == torch.int8 else t for key, t in STATE.items()}
    assert_same_model(load(write(tmp_path / "a", unsigned)), load(write(tmp_path / "b", STATE)))


@pytest.mark.parametrize("silent", [False, True])
def test_base_release(silent: bool, tmp_path: Path) -> None:
    """F32 scales, FP8 experts, FP8 compressor weights: the tensors decide, whatever config.json says or leaves out."""
    state = base_release_state(STATE)
    folder = write(tmp_path, state)
    if silent:
        edit_config(folder, expert_dtype=...)
    model = load(folder)
    assert model.config.expert_dtype == "fp8"
    assert inspect(folder).storage.linear_scale == "F32"
    for key, tensor in state.items():
        if ".compressor.w" in key:
            if key.endswith(".weight"):
                assert torch.equal(released(model, key).double(), plain(state, key)), key
        else:
            assert torch.equal(bits(released(model, key)), bits(tensor)), key
    off = load(folder, quantization="off", dtype=torch.float32)
    for key in state:
        if key.endswith(".weight"):
            assert torch.equal(released(off, key).double(), plain(state, key)), key


def test_scale_dtype_does_not_change_the_result(tmp_path: Path) -> None:
    """A power of two is the same number as F32 and as E8M0."""
    wide = {key: t.float() if key.endswith(".scale") and ".experts." not in key else t for key, t in STATE.items()}
    ids = torch.arange(40)[None] % TINY.vocab_size
    narrow_model, wide_model = load(write(tmp_path / "a", STATE)), load(write(tmp_path / "b", wide))
    assert wide_model.layers[0].attn.wq_a.scale.dtype == torch.float32
    assert torch.equal(narrow_model(ids), wide_model(ids))


def test_base_release_runs(tmp_path: Path) -> None:
    """FP8 experts and F32 scales give the logits of the same weights in mode "off", up to activation rounding."""
    folder = write(tmp_path, base_release_state(STATE))
    ids = torch.arange(40)[None] % TINY.vocab_size
    logits = load(folder)(ids)
    exact = load(folder, quantization="off", dtype=torch.float32)(ids)
    error = (logits - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.3


def test_mode_off_is_trainable_and_frozen_where_it_must_be(tmp_path: Path) -> None:
    model = load(write(tmp_path, STATE), quantization="off", dtype=torch.float32)
    assert model.layers[0].attn.wq_a.weight.requires_grad
    assert not model.layers[0].ffn.gate.tid2eid.requires_grad
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """The file is mapped while reading; what is loaded must be copies, or overwriting the file changes the model."""
    folder = write(tmp_path, STATE)
    model = load(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"\x7f" * (file.stat().st_size // 2))
    for key, tensor in STATE.items():
        assert torch.equal(bits(released(model, key)), bits(tensor)), key


def test_bundled_model_by_name() -> None:
    assert resolve("nano").name == "nano"
    model = load("nano")
    assert model.config == dsv4.Config.preset("nano")
    assert "knows how code looks" in model.note


def test_the_bundled_model_has_learned() -> None:
    """Of Python code that it has not seen it guesses better than the frequencies of the tokens, which have 5 nats."""
    model, tokenizer = load("nano"), Tokenizer(resolve("nano"))
    ids = torch.tensor([tokenizer.encode(Path(__file__).read_text())[:600]])
    with torch.no_grad():
        assert cross_entropy(model(ids)[0, :-1], ids[0, 1:]) < 3.5


_MEMORY = r"""
import re, sys
from dsv4.checkpoint import load, reader

def peak():  # not ru_maxrss, which a child takes over from its parent
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

reader.REMAP_BYTES = 8 << 20
load("nano")  # what every process needs, whatever it loads
before = peak()
model = load(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_never_holds_the_checkpoint_twice(tmp_path: Path) -> None:
    import dataclasses

    from dsv4.checkpoint.expected import Storage, expected_tensors
    from dsv4.checkpoint.writer import _DTYPE_NAMES, write_safetensors

    config = dataclasses.replace(
        TINY, hidden_size=1024, moe_intermediate_size=1024, n_routed_experts=40, vocab_size=16384,
        num_nextn_predict_layers=0, compress_ratios=(0, 4, 128),
    )  # fmt: skip
    dtypes = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
    expected = expected_tensors(config, Storage.of(config))
    state = {key: torch.ones(want.shape).to(dtypes[want.dtypes[0]]) for key, want in expected.items()}
    folder = write(tmp_path, {}, config)
    write_safetensors(folder / "model.safetensors", state)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 250e6
    del state
    result = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(folder)], env=os.environ, capture_output=True, text=True, check=True
    )
    grown = int(result.stdout)
    assert 0.9 * size < grown < 1.2 * size, f"{grown / size:.2f} of the checkpoint's size"
