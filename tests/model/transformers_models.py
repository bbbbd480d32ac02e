"""Random DeepseekV4ForCausalLM models of transformers, in configurations unlike the golden ones.

Where the indexer has to choose, it has 32 heads or more: with few heads a score is exactly zero often (ReLU), and
which of several zeros torch.topk takes is arbitrary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def _options(**options: Any) -> dict[str, Any]:
    return options


# What a model differs in from COMMON. Sequences of 300 tokens select in every CSA layer but those of "wide".
MODELS: dict[str, dict[str, Any]] = {
    # No size a power of two; no rope scaling; two hash layers.
    "narrow": _options(
        hidden_size=80, num_attention_heads=6, head_dim=48, partial_rotary_factor=0.5, q_lora_rank=56, o_groups=3,
        o_lora_rank=20, n_routed_experts=7, num_experts_per_tok=3, moe_intermediate_size=72, sliding_window=12,
        layer_types=[CSA, SWA, HCA, CSA], mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"], index_head_dim=40,
        index_topk=6,
    ),
    # YaRN that bends most frequencies, an active clamp, large eps, shorter blocks in HCA.
    "yarn": _options(
        hidden_size=128, num_attention_heads=4, head_dim=96, partial_rotary_factor=0.25, sliding_window=24,
        layer_types=[HCA, CSA, CSA], mlp_layer_types=["moe"] * 3, compress_rates={CSA: 4, HCA: 32}, index_n_heads=40,
        index_topk=16, routed_scaling_factor=2.5, swiglu_limit=0.7, hc_eps=1e-3, rms_norm_eps=1e-4, hc_sinkhorn_iters=5,
        rope_parameters={
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2,
        },
    ),
    # Overlapping blocks of 8, one expert a token, one output group, a window shorter than a block.
    "ratios": _options(
        o_groups=1, n_routed_experts=3, num_experts_per_tok=1, sliding_window=7, layer_types=[SWA, CSA, HCA],
        mlp_layer_types=["hash_moe", "moe", "moe"], compress_rates={CSA: 8, HCA: 64}, index_head_dim=32, index_topk=5,
        rope_theta=500.0, compress_rope_theta=2000.0,
    ),
    # No indexer; every expert for every token; the attention factor that transformers derives where none is given.
    "dense": _options(
        layer_types=[SWA, HCA, HCA], mlp_layer_types=["moe"] * 3, compress_rates={CSA: 4, HCA: 16}, o_groups=4,
        n_routed_experts=4, num_experts_per_tok=4,
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "compress": {"rope_type": "yarn", "rope_theta": 160000.0, "partial_rotary_factor": 0.5, "factor": 4.0,
                         "original_max_position_embeddings": 64},
        },
    ),
    # Blocks of 2, more entries allowed than there are, the whole head rotated, hash tables naming one expert twice.
    "wide": _options(
        vocab_size=1000, num_attention_heads=16, head_dim=32, partial_rotary_factor=1.0, o_groups=8, o_lora_rank=16,
        layer_types=[CSA, CSA], mlp_layer_types=["hash_moe", "moe"], compress_rates={CSA: 2, HCA: 128}, index_n_heads=3,
        index_head_dim=64, index_topk=512, sliding_window=128,
    ),
}  # fmt: skip

COMMON: dict[str, Any] = _options(
    vocab_size=160, hidden_size=64, num_attention_heads=4, head_dim=64, partial_rotary_factor=0.5, q_lora_rank=48,
    o_groups=2, o_lora_rank=24, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, sliding_window=16,
    index_n_heads=32, index_head_dim=64,
)  # fmt: skip


def transformers_model(name: str, seed: int = 0) -> Any:
    """One of MODELS in float32, ready for inference, with weights that make every part matter."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    values = {**COMMON, **MODELS[name]}
    config = DeepseekV4Config(num_hidden_layers=len(values["layer_types"]), **values)
    model = DeepseekV4ForCausalLM(config).eval().to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(_random(key, tensor, config.n_routed_experts, generator, distinct=name != "wide"))
    return model


def save_transformers_model(name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Saves the model with save_pretrained and returns it."""
    model = transformers_model(name, seed).to(dtype)
    model.save_pretrained(folder)
    return model


def _random(key: str, tensor: Tensor, experts: int, generator: torch.Generator, distinct: bool) -> Tensor:
    shape = tensor.shape
    if key.endswith("tid2eid"):
        if not distinct:
            return torch.randint(experts, shape, generator=generator)
        return torch.rand(shape[0], experts, generator=generator).argsort(-1)[:, : shape[1]]
    normal = torch.randn(shape, generator=generator)
    if key.endswith(("norm.weight", "layernorm.weight")):
        return 1 + 0.2 * normal
    if key.endswith(("e_score_correction_bias", ".scale", "hc_scale")):
        return 0.2 * normal + (0.8 if "scale" in key else 0.0)
    if tensor.dim() == 1 or key.endswith(("position_bias", "embed_tokens.weight")):
        return normal
    return normal * (2.0 if key.startswith("lm_head") else 1.0) * shape[-1] ** -0.5
