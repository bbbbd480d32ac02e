"""A model of mode "off" in the formats of the release."""

from dataclasses import replace

import pytest
import torch

import dsv4
from dsv4.checkpoint import load, quantize, save_released

CONFIG = dsv4.Config(
    vocab_size=300, hidden_size=160, num_hidden_layers=3, num_attention_heads=2, head_dim=128, q_lora_rank=128,
    o_groups=1, o_lora_rank=128, compress_ratios=(0, 4, 128), n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=96, index_n_heads=2, index_topk=4, sliding_window=8, num_hash_layers=1,
    num_nextn_predict_layers=1,
)  # fmt: skip
IDS = torch.arange(2 * 40).view(2, 40) * 7 % 300


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_values_that_the_formats_hold_come_back(experts):
    """`init` gives both modes the same numbers: rounded again, they are what they were."""
    config = replace(CONFIG, expert_dtype=experts)
    wide = {"dtype": torch.float32}
    expected, plain = dsv4.init(config, **wide), dsv4.init(config, quantization="off", **wide)
    found = quantize(plain)
    assert found.quantization == "checkpoint" and found.config == config and found.note == plain.note
    assert found.state_dict().keys() == expected.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(found(IDS), expected(IDS), rtol=0, atol=0)


def test_trained_weights_are_rounded_once_and_can_be_written(tmp_path):
    plain = dsv4.init(CONFIG, quantization="off", dtype=torch.float32)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.is_floating_point():
                parameter += 0.01 * torch.randn_like(parameter)
    plain.note = ""
    rounded = quantize(plain)
    save_released(rounded, tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    assert again.note == ""
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), rounded(IDS), rtol=0, atol=0)
        far = load(tmp_path, quantization="off", dtype=torch.float32)(IDS) - plain(IDS)
    assert 0 < far.square().mean().sqrt() < 0.5 * plain(IDS).std()


def test_what_cannot_be_rounded_is_named():
    with pytest.raises(ValueError, match='quantize takes a model of quantization="off", got "checkpoint"'):
        quantize(dsv4.init(CONFIG))
    with pytest.raises(ValueError, match='expert_dtype is "fp4" or "fp8", got "bf16"'):
        quantize(dsv4.init(replace(CONFIG, expert_dtype="bf16"), quantization="off"))
