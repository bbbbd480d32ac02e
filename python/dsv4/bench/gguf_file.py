"""A model of ours as a GGUF file of llama.cpp's architecture deepseek4, without a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.model.config import Config

_ARCHITECTURE = "deepseek4"
_SQRT_SOFTPLUS = 4
_RATIOS = (0, 4, 128)
_TOP = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
# By the part of our name behind `layers.N.`: llama.cpp's behind `blk.N.`.
_LAYER = {
    **{f"hc_{site}_{part}": f"hc_{site}_{part}.weight" for site in ("attn", "ffn") for part in ("fn", "base", "scale")},
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.experts.w1": "ffn_gate_exps.weight",
    "ffn.experts.w3": "ffn_up_exps.weight",
    "ffn.experts.w2": "ffn_down_exps.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
}
_INNER = re.compile(r"layers\.(\d+)\.(.+)")
# Matrices that stay float32 in any file: llama.cpp's own converter keeps them so.
_FLOAT32 = re.compile(r"hc_|output_hc_|compressor_ape")


def tensor_name(name: str) -> str:
    """llama.cpp's name of a tensor of ours.

    Raises: ValueError: it has none.
    """
    inner = _INNER.fullmatch(name)
    if name in _TOP:
        return _TOP[name]
    if inner is None or inner[2] not in _LAYER:
        raise ValueError(f"{name}: llama.cpp has no such tensor")
    return f"blk.{inner[1]}.{_LAYER[inner[2]]}"


def settings(config: Config) -> Iterator[tuple[str, Any]]:
    """The metadata llama.cpp's loader asks for, under their names behind the architecture's.

    Raises: ValueError: a ratio it does not know.
    """
    c = config
    ratios = list(c.compress_ratios[: c.num_hidden_layers])
    if not set(ratios) <= set(_RATIOS):
        raise ValueError(f"llama.cpp knows compression ratios 0, 4 and 128, the model has {sorted(set(ratios))}")
    yield from {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "embedding_length_out": c.hidden_size * c.hc_mult,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.moe_intermediate_size,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": _SQRT_SOFTPLUS,
        "swiglu_clamp_exp": [float(c.swiglu_limit)] * c.num_hidden_layers,
        "swiglu_clamp_shexp": [float(c.swiglu_limit)] * c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window,
        "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk,
        "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.compress_ratios": ratios,
        "attention.compress_rope_freq_base": float(c.compress_rope_theta),
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hyper_connection.epsilon": float(c.hc_eps),
        "hash_layer_count": c.num_hash_layers,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": float(c.rope_theta),
    }.items()
    if c.rope_scaling is not None:
        yield from {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(c.rope_scaling.factor),
            "rope.scaling.original_context_length": c.rope_scaling.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(c.rope_scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(c.rope_scaling.beta_slow),
        }.items()


def write_gguf(state: Mapping[str, Tensor], config: Config, path: Path, dtype: torch.dtype) -> None:
    """Writes a model of mode "off": matrices as `dtype` (float32 or bfloat16), vectors and mixing weights float32.

    Args:
        state: state dict of the model.
        config: of the model.
        path: the file.
        dtype: of the matrices.
    Raises: ValueError: a tensor or a size that llama.cpp does not know. ImportError: no gguf package.
    """
    import gguf

    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    writer.add_tokenizer_model("none")
    for key, value in settings(config):
        _add(writer, f"{_ARCHITECTURE}.{key}", value)
    for name, tensor in state.items():
        target = tensor_name(name)
        if not tensor.is_floating_point():
            writer.add_tensor(target, tensor.int().numpy())
        elif dtype == torch.bfloat16 and tensor.dim() > 1 and not _FLOAT32.search(target):
            bits = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(target, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
