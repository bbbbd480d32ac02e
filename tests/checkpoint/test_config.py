"""Configurations: presets, the two forms of config.json, validation."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsv4.model.config import Config, Yarn

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
FLASH = Config.preset("v4-flash")


def test_presets_have_the_released_sizes() -> None:
    pro, nano = Config.preset("v4-pro"), Config.preset("nano")
    assert (FLASH.num_hidden_layers, FLASH.hidden_size, FLASH.num_attention_heads, FLASH.q_lora_rank) == (
        43,
        4096,
        64,
        1024,
    )
    assert (FLASH.n_routed_experts, FLASH.moe_intermediate_size, FLASH.index_topk) == (256, 2048, 512)
    assert (pro.num_hidden_layers, pro.hidden_size, pro.num_attention_heads, pro.q_lora_rank) == (61, 7168, 128, 1536)
    assert (pro.n_routed_experts, pro.moe_intermediate_size, pro.index_topk, pro.o_groups) == (384, 3072, 1024, 16)
    for config in (FLASH, pro):
        assert (config.head_dim, config.qk_rope_head_dim, config.o_lora_rank, config.sliding_window) == (
            512,
            64,
            1024,
            128,
        )
        assert (config.num_experts_per_tok, config.num_hash_layers, config.swiglu_limit) == (6, 3, 10.0)
        assert config.rope_scaling == Yarn(16, 65536, 32, 1)
        assert config.num_nextn_predict_layers == 1
        assert config.compress_ratios[-1] == 0
    kinds = [nano.layer_kind(layer) for layer in range(nano.num_hidden_layers)]
    assert kinds == ["swa", "swa", "csa", "hca", "csa", "hca", "csa", "hca"]
    assert (nano.hidden_size, nano.num_attention_heads, nano.head_dim, nano.qk_rope_head_dim) == (256, 8, 128, 64)
    assert (nano.q_lora_rank, nano.o_groups, nano.o_lora_rank, nano.vocab_size) == (128, 2, 64, 512)
    assert (nano.n_routed_experts, nano.num_experts_per_tok, nano.moe_intermediate_size) == (16, 2, 128)
    assert (nano.index_n_heads, nano.index_head_dim, nano.index_topk, nano.sliding_window) == (4, 128, 64, 128)


@pytest.mark.parametrize(("name", "expected"), [("v4-flash", 3514.25), ("v4-pro", 5031.4375)])
def test_layer_schedule_gives_the_published_cache_bytes(name: str, expected: float) -> None:
    """584 bytes an entry and 68 an index key, per token: the schedule of layers is right to the layer."""
    config = Config.preset(name)
    per_token = 0.0
    for layer in range(config.num_hidden_layers):
        ratio, kind = config.layer_ratio(layer), config.layer_kind(layer)
        per_token += 584 / ratio if ratio else 0
        per_token += 68 / ratio if kind == "csa" else 0
    assert per_token == expected


def test_parameter_counts_match_the_published_ones() -> None:
    from dsv4.checkpoint.expected import Storage, expected_tensors

    for name, total in (("v4-flash", 284e9), ("v4-pro", 1.6e12)):
        config = dataclasses.replace(Config.preset(name), num_nextn_predict_layers=0, expert_dtype="bf16",
                                     compress_ratios=Config.preset(name).compress_ratios[:-1])  # fmt: skip
        table = expected_tensors(config, Storage(linear="plain", experts="plain"))
        count = sum(math.prod(tensor.shape) for tensor in table.values())
        assert count == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro", "nano"])
def test_written_form_reads_back(name: str) -> None:
    config = Config.preset(name)
    values = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(values) == config
    assert values["model_type"] == "deepseek_v4"


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": Yarn(4, 128, 16, 2, 1.25)},
        {"eos_token_id": (1, 7)},
        {"eos_token_id": None},
        {"swiglu_limit": 0.0},
        {"expert_dtype": "fp8"},
        {"expert_dtype": "bf16"},
        {"csa_ratio": 8, "compress_ratios": (8, 128) * 21 + (0, 0)},
    ],
)
def test_unusual_values_read_back(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(FLASH, **changes)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("case", ["dev_a", "dev_b", "dev_c"])
def test_golden_configs(case: str) -> None:
    values = json.loads((GOLDEN / case / "config.json").read_text())
    config = Config.from_file(GOLDEN / case)
    assert config == Config.from_file(GOLDEN / case / "config.json")
    assert list(config.compress_ratios) == values["compress_ratios"]
    for name in ("hidden_size", "hc_eps", "rms_norm_eps", "index_topk", "num_hash_layers", "swiglu_limit"):
        assert getattr(config, name) == values[name]
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == values["rope_scaling"]["factor"]


def test_ratios_without_the_mtp_blocks() -> None:
    config = dataclasses.replace(FLASH, compress_ratios=FLASH.compress_ratios[:-1])
    assert config == FLASH


def test_expert_dtype_where_config_json_is_silent() -> None:
    values = FLASH.to_dict()
    assert values["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }, "as released: other programs read it"  # fmt: skip
    del values["expert_dtype"]
    assert Config.from_dict(values).expert_dtype == "fp4"
    values["quantization_config"]["expert_dtype"] = "fp8"
    assert Config.from_dict(values).expert_dtype == "fp8"
    del values["quantization_config"]
    assert Config.from_dict(values).expert_dtype == "bf16"


def transformers_values(**changes: Any) -> dict[str, Any]:
    values = {name: value for name, value in FLASH.to_dict().items() if name not in ("rope_scaling", "compress_ratios")}
    kinds = {"swa": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
    layers = range(FLASH.num_hidden_layers)
    rope = {"partial_rotary_factor": 0.125}
    yarn = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "attention_factor": 1.0}
    del values["num_hash_layers"]
    return values | {
        "layer_types": [kinds[FLASH.layer_kind(layer)] for layer in layers],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "rope_parameters": {
            "main": rope | {"rope_type": "default", "rope_theta": 10000.0},
            "compress": rope | {"rope_theta": 160000.0} | yarn,
        },
    } | changes  # fmt: skip


def test_transformers_form_equals_the_released_one() -> None:
    values = transformers_values()
    del values["qk_rope_head_dim"], values["rope_theta"], values["compress_rope_theta"]
    assert Config.from_dict(values) == FLASH


def test_transformers_rates_and_rope() -> None:
    values = transformers_values(
        compress_rates={"compressed_sparse_attention": 8, "heavily_compressed_attention": 32},
        rope_parameters={
            "main": {"rope_theta": 5000.0, "partial_rotary_factor": 0.25},
            "compress": {"rope_theta": 70000.0, "partial_rotary_factor": 0.25, "rope_type": "default"},
        },
    )
    del values["qk_rope_head_dim"]
    config = Config.from_dict(values)
    assert config.csa_ratio == 8
    assert config.compress_ratios[2:5] == (8, 32, 8)
    assert [config.layer_kind(layer) for layer in (0, 2, 3)] == ["swa", "csa", "hca"]
    assert (config.rope_theta, config.compress_rope_theta, config.rope_scaling) == (5000.0, 70000.0, None)
    assert config.qk_rope_head_dim == 128


@pytest.mark.parametrize(("head_dim", "words"), [(None, "missing head_dim"), ("512", "head_dim must be")])
def test_a_rotary_part_of_no_width(head_dim: object, words: str) -> None:
    values = transformers_values(head_dim=head_dim)
    del values["qk_rope_head_dim"]
    with pytest.raises(ValueError, match=words):
        Config.from_dict(values)


def test_attention_factor_follows_transformers() -> None:
    """A nested yarn section without the key means the paper's factor, which transformers then applies."""
    values = transformers_values()
    compress = values["rope_parameters"]["compress"]
    for keys, expected in (
        ({"attention_factor": 1.5}, 1.5),
        ({}, 0.1 * math.log(16) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(16) + 1) / (0.1 * math.log(16) + 1)),
    ):
        compress.pop("attention_factor", None)
        yarn = Config.from_dict(
            values | {"rope_parameters": values["rope_parameters"] | {"compress": compress | keys}}
        ).rope_scaling
        assert yarn is not None
        assert yarn.attention_factor == pytest.approx(expected)


def test_flat_rope_parameters_are_the_compressed_ones() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = Config.from_dict(transformers_values(rope_parameters=yarn))
    assert config.rope_scaling == Yarn(4, 64)
    assert config.rope_theta == 10000.0


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "heads of zero": ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
    "true as a size": ({"hidden_size": True}, "hidden_size must be an integer"),
    "float as a size": ({"hidden_size": 4096.0}, "hidden_size must be an integer"),
    "odd rope": ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
    "rope wider than the head": ({"qk_rope_head_dim": 514}, "at most head_dim 512, got 514"),
    "index narrower than rope": ({"index_head_dim": 32}, "index_head_dim must be even and at least"),
    "more experts a token than there are": ({"num_experts_per_tok": 257}, "exceeds n_routed_experts 256"),
    "two shared experts": ({"n_shared_experts": 2}, "n_shared_experts must be 1, got 2"),
    "iterations beyond the op": ({"hc_sinkhorn_iters": 1025}, "hc_sinkhorn_iters must be an integer from 1 to 1024"),
    "selection beyond memory": ({"index_topk": 1 << 31}, "index_topk must be an integer from 1 to 1048576"),
    "endless text": ({"hidden_size": "1" * 5000}, "got '" + "1" * 76 + "..."),
    "other stream count": ({"hc_mult": 2}, "hc_mult must be 4, got 2"),
    "eps of zero": ({"hc_eps": 0}, "hc_eps must be a positive number"),
    "infinite theta": ({"rope_theta": float("inf")}, "rope_theta must be a number above 1"),
    "theta of one": ({"compress_rope_theta": 1.0}, "compress_rope_theta must be a number above 1"),
    "beyond float32": ({"rms_norm_eps": 1e299}, "rms_norm_eps must be a positive number"),
    "clamp beyond float32": ({"swiglu_limit": 1e299}, "swiglu_limit must be a number >= 0"),
    "yarn beta of nothing": (
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8, "beta_slow": 1e-320}},
        "beta_slow must be a positive number"),
    "yarn of endless positions": (
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 10**400}},
        "original_max_position_embeddings must be"),
    "negative clamp": ({"swiglu_limit": -1}, "swiglu_limit must be a number >= 0"),
    "unknown expert format": ({"expert_dtype": "int4"}, "expert_dtype must be 'fp4', 'fp8' or 'bf16'"),
    "token beyond the vocabulary": ({"eos_token_id": 129280}, "eos_token_id must be null or a token below"),
    "token list with text": ({"eos_token_id": [1, "2"]}, "eos_token_id must be null or a token below"),
    "ratios a number": ({"compress_ratios": 4}, "compress_ratios must be a list"),
    "ratio negative": ({"compress_ratios": [-4] * 43}, "compress_ratios must be a list"),
    "yarn without factor": ({"rope_scaling": {"type": "yarn"}}, "lacks factor"),
    "yarn betas reversed": (
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8, "beta_fast": 1,
                          "beta_slow": 32}}, "beta_fast 1.0 must be above"),
    "yarn factor text": (
        {"rope_scaling": {"type": "yarn", "factor": "4", "original_max_position_embeddings": 8}}, "factor must be"),
    "rope_scaling a list": ({"rope_scaling": [1]}, "rope_scaling must be an object"),
    "tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings must be False, got True"),
    "several key heads": ({"num_key_value_heads": 8}, "num_key_value_heads must be 1, got 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_invalid_values_are_named(name: str) -> None:
    changes, fragment = INVALID[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the fragment is checked below, as text
        Config.from_dict(FLASH.to_dict() | changes, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


INVALID_TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "layer kind": ({"layer_types": ["full_attention"] * 43}, "layer_types must be a list of"),
    "layer count": ({"layer_types": ["sliding_attention"] * 3}, "compress_ratios has 3 entries, needs 44"),
    "router order": ({"mlp_layer_types": ["moe", "hash_moe"] * 21 + ["moe"]}, "every 'hash_moe' before"),
    "router kind": ({"mlp_layer_types": ["dense"]}, "mlp_layer_types must be a list of"),
    "rates alike": (
        {"compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 8}}, "must differ"),
    "rates not numbers": ({"compress_rates": {"compressed_sparse_attention": "4"}}, "must be an integer"),
    "rates a list": ({"compress_rates": [4, 128]}, "compress_rates must be an object"),
    "main rope scaled": (
        {"rope_parameters": {"main": {"rope_type": "yarn"}, "compress": {"rope_type": "default"}}}, "main.rope_type"),
    "two rotary widths": (
        {"rope_parameters": {"main": {"partial_rotary_factor": 0.5}, "compress": {"partial_rotary_factor": 0.25}}},
        "same partial_rotary_factor"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID_TRANSFORMERS)
def test_invalid_transformers_values_are_named(name: str) -> None:
    changes, fragment = INVALID_TRANSFORMERS[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the fragment is checked below, as text
        Config.from_dict(transformers_values(**changes))
    assert fragment in str(caught.value)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no preset 'v5'; there are v4-flash, v4-pro, nano"):
        Config.preset("v5")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [({"index_head_dim": 96}, "power of two"), ({"moe_intermediate_size": 72}, "multiple of 32")],
)
def test_sizes_fp4_cannot_hold_are_for_mode_off(changes: dict[str, Any], fragment: str) -> None:
    config = dataclasses.replace(FLASH, **changes)
    config.check_quantization("off")
    with pytest.raises(ValueError, match=fragment):
        config.check_quantization("checkpoint")
