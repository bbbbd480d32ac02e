"""The layout of transformers: as save_pretrained writes it, and with the names its modules have in memory."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import edit_header
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers_models import MODELS, save_transformers_model

from dsv4.checkpoint import CheckpointError, inspect, load
from dsv4.model.config import Config
from dsv4.model.transformer import Transformer

IN_MEMORY = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.attn_sink": "self_attn.sinks",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.experts.w2": "mlp.experts.down_proj",
}


def in_memory(state: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of transformers' model that ours of this name must equal."""
    if name in IN_MEMORY:
        return state[IN_MEMORY[name]]
    _, layer, rest = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if rest in ("ffn.experts.w1", "ffn.experts.w3"):
        gate, up = state[prefix + "mlp.experts.gate_up_proj"].chunk(2, 1)
        return gate if rest.endswith("w1") else up
    return state[prefix + LAYER[rest]]


def assert_loaded(model: Transformer, state: dict[str, Tensor]) -> None:
    ours = model.state_dict()
    for name, tensor in ours.items():
        assert torch.equal(tensor, in_memory(state, name).to(tensor.dtype)), name
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in state.values())


def saved(tmp_path: Path, name: str = "narrow", **options: Any) -> tuple[Path, dict[str, Tensor]]:
    model = save_transformers_model(name, tmp_path, **options)
    return tmp_path, model.state_dict()


def save_in_memory_names(folder: Path, state: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_lands_where_it_belongs(name: str, tmp_path: Path) -> None:
    folder, state = saved(tmp_path, name)
    assert_loaded(load(folder, quantization="off", dtype=torch.float32), state)
    assert inspect(folder).layout == "transformers"


@pytest.mark.parametrize("name", MODELS)
def test_names_of_the_modules(name: str, tmp_path: Path) -> None:
    folder, state = saved(tmp_path, name)
    save_in_memory_names(folder, state)
    assert_loaded(load(folder, quantization="off", dtype=torch.float32), state)


@pytest.mark.parametrize("name", MODELS)
def test_config_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, name)
    found = inspect(folder).config
    values = json.loads((folder / "config.json").read_text())
    assert found == dataclasses.replace(
        Config.from_dict(values), num_nextn_predict_layers=0, compress_ratios=found.compress_ratios
    )
    kinds = {"swa": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
    assert [kinds[found.layer_kind(layer)] for layer in range(found.num_hidden_layers)] == values["layer_types"]
    for layer, kind in enumerate(values["layer_types"]):
        assert found.layer_ratio(layer) == values["compress_rates"].get(kind, 0)
        assert found.is_hash_layer(layer) == (values["mlp_layer_types"][layer] == "hash_moe")
    assert found.qk_rope_head_dim == found.head_dim * values["partial_rotary_factor"]


def test_bfloat16_with_parts_kept_in_float32(tmp_path: Path) -> None:
    """transformers keeps norms and mixing weights in float32 beside BF16 projections."""
    folder, state = saved(tmp_path, dtype=torch.bfloat16)
    file = folder / "model.safetensors"
    stored = load_file(file)
    stored = {key: t.float() if "norm" in key or "hc_" in key else t for key, t in stored.items()}
    file.unlink()
    save_file(stored, file)
    assert_loaded(load(folder, quantization="off", dtype=torch.float32), state)


def test_sharded(tmp_path: Path) -> None:
    model = save_transformers_model("narrow", tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(inspect(tmp_path / "sharded").files) > 3
    assert_loaded(load(tmp_path / "sharded", quantization="off", dtype=torch.float32), model.state_dict())


def test_rotary_tables_are_ignored(tmp_path: Path) -> None:
    folder, state = saved(tmp_path)
    save_in_memory_names(folder, state | {"model.rotary_emb.main_inv_freq": torch.ones(12)})
    assert_loaded(load(folder, quantization="off", dtype=torch.float32), state)


def test_mode_checkpoint_needs_quantised_weights(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match="not quantised; load them with quantization='off'"):
        load(folder)


def rewritten(folder: Path, change: Any) -> tuple[str, ...]:
    file = folder / "model.safetensors"
    stored = load_file(file)
    change(stored)
    file.unlink()
    save_file(stored, file)
    with pytest.raises(CheckpointError) as caught:
        load(folder, quantization="off")
    assert "\n" not in str(caught.value)
    return caught.value.problems


def test_faults_carry_the_names_of_the_file(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)

    def change(stored: dict[str, Tensor]) -> None:
        stored["model.layers.0.attn.norm.weight"] = torch.ones(7)
        stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"].double()
        stored["model.layers.0.ffn.experts.7.w1.weight"] = torch.ones(72, 80)
        stored["model.extra"] = torch.ones(1)
        del stored["model.layers.1.attn.wkv.weight"]

    assert sorted(rewritten(folder, change)) == [
        "missing layers.1.attn.wkv.weight",
        "model.embed_tokens.weight has dtype F64, needs BF16 or F16 or F32",
        "model.layers.0.attn.norm.weight has shape [7], needs [48]",
        "surplus model.extra",
        "surplus model.layers.0.ffn.experts.7.w1.weight",
    ]


@pytest.mark.parametrize("shape", [(7, 143, 80), (6, 144, 80), (7, 144), (7, 144, 79)])
def test_stack_of_experts_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder, state = saved(tmp_path)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    save_in_memory_names(folder, state)
    problems = rewritten(folder, lambda stored: stored.update({key: torch.zeros(shape)}))
    assert problems
    assert all(key in problem or problem.startswith("missing layers.0.ffn.experts.") for problem in problems)
    assert any(key in problem for problem in problems)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    folder, state = saved(tmp_path)
    key = "model.layers.0.self_attn.q_a_proj.weight"
    problems = rewritten(folder, lambda stored: stored.update({key: state[key].clone()}))
    assert len(problems) == 1
    assert key in problems[0]
    assert "model.layers.0.attn.wq_a.weight" in problems[0]
    assert problems[0].endswith("are the same tensor")


def test_damage_is_found_in_this_layout_too(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    edit_header(folder / "model.safetensors", lambda header: header["model.norm.weight"].update(dtype="F13"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has unknown dtype 'F13'"):
        load(folder, quantization="off")
