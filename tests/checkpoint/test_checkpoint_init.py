"""Random weights: reproducible, in the formats of the release, and lively enough to test with."""

import dataclasses

import pytest
import torch
from checkpoint_cases import TINY

from dsv4.checkpoint.formats import quantize_weight_fp4, quantize_weight_fp8
from dsv4.checkpoint.init import RandomSource, init
from dsv4.model.config import Config
from dsv4.ops import dequantize_weight

NANO = Config.preset("nano")


def test_same_seed_same_weights() -> None:
    a, b, c = init(TINY, seed=5).state_dict(), init(TINY, seed=5).state_dict(), init(TINY, seed=6).state_dict()
    same = [name for name in a if torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))]
    other = [name for name in a if torch.equal(a[name].view(torch.uint8), c[name].view(torch.uint8))]
    assert same == list(a)
    assert all("scale" in name for name in other)  # a block's power of two may well be the same


def test_a_tensor_depends_on_its_name_alone() -> None:
    """Models of different depth share their first layers, and tensors may be made in any order."""
    deeper = dataclasses.replace(TINY, num_hidden_layers=4, compress_ratios=(0, 4, 128, 0, 0))
    a, b = RandomSource(TINY), RandomSource(deeper)
    for key in reversed(a.ordered_keys()):
        if key.startswith("layers.1."):
            assert torch.equal(a.get(key).view(torch.uint8), b.get(key).view(torch.uint8)), key


def test_nano_is_lively() -> None:
    model = init(NANO)
    ids = torch.randint(NANO.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    used = []
    for block in model.layers:
        block.ffn.gate.register_forward_hook(lambda module, args, out: used.append(out[1].unique().numel()))
    logits = model(ids)
    assert 1.0 < logits.std() < 2.0
    assert used == [NANO.n_routed_experts] * NANO.num_hidden_layers
    assert logits.argmax(-1).unique().numel() > 50
    assert bool(logits.isfinite().all())


def test_hash_tables_name_different_experts() -> None:
    table = RandomSource(NANO).get("layers.0.ffn.gate.tid2eid")
    assert table.shape == (512, 2)
    assert bool((table[:, 0] != table[:, 1]).all())
    assert table.unique().tolist() == list(range(16))


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_formats(expert_dtype: str) -> None:
    model = init(dataclasses.replace(TINY, expert_dtype=expert_dtype))
    experts = model.layers[0].ffn.experts
    assert experts.w1.dtype == (torch.int8 if expert_dtype == "fp4" else torch.float8_e4m3fn)
    assert experts.w1_scale.dtype == torch.float8_e8m0fnu
    assert model.layers[0].attn.wo_a.weight.dtype == torch.float8_e4m3fn
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.hc_head_fn.dtype == torch.float32


@pytest.mark.parametrize(("name", "size"), [("hidden_size", 33), ("moe_intermediate_size", 1)])
def test_odd_widths(name: str, size: int) -> None:
    config = dataclasses.replace(TINY, **{name: size})
    with pytest.raises(ValueError, match=f"{name} {size} must be even for values of FP4 experts; use expert_dtype="):
        init(config, quantization="off")
    plain = init(dataclasses.replace(config, expert_dtype="bf16"), quantization="off", dtype=torch.float32)
    assert plain(torch.zeros(1, 9, dtype=torch.int64)).isfinite().all()


def test_unquantised_config_is_for_mode_off() -> None:
    config = dataclasses.replace(TINY, expert_dtype="bf16")
    assert init(config, quantization="off", dtype=torch.float32).layers[0].ffn.experts.w1.dtype == torch.float32
    with pytest.raises(ValueError, match="quantization='off'"):
        init(config)


@pytest.mark.parametrize("shape", [(128, 128), (200, 96), (1, 300), (129, 257)])
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 3e4])
def test_fp8_scale_is_the_smallest_power_of_two_that_fits(shape: tuple[int, int], magnitude: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * magnitude
    codes, scale = quantize_weight_fp8(weight)
    assert scale.shape == ((shape[0] + 127) // 128, (shape[1] + 127) // 128)
    back = dequantize_weight(codes, scale, torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            largest, step = weight[block].abs().max(), scale[i, j].float()
            assert 224 * step < largest <= 448 * step
            # Codes of 4 significant bits: half a step of relative 2^-3, or of the smallest subnormal, 2^-9.
            limit = torch.maximum(weight[block].abs() * 2**-4, step * 2**-10)
            assert bool(((back[block] - weight[block]).abs() <= limit).all())


def test_fp8_boundary_and_zero_blocks() -> None:
    weight = torch.zeros(128, 384)
    weight[5, 130], weight[7, 300] = 448 * 2.0**-3, torch.nextafter(torch.tensor(448.0), torch.tensor(449.0))
    codes, scale = quantize_weight_fp8(weight)
    assert scale.float().tolist() == [[1.0, 2.0**-3, 2.0]]
    assert codes[5, 130].float() == 448
    assert codes[7, 300].float() == 224


def test_fp4_pair_layout() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[0, 1], weight[0, 33], weight[1, 63] = 6.0, -3.0, 0.75, -12.0
    codes, scale = quantize_weight_fp4(weight)
    assert codes.dtype == torch.int8
    assert codes.shape == (2, 32)
    assert codes.view(torch.uint8)[0, 0] == 0x7 | (0xD << 4)
    assert torch.equal(dequantize_weight(codes, scale, torch.float32), weight)
