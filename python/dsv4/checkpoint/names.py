"""Names and layouts other than the released one: what transformers' save_pretrained writes, mapped to released names.

transformers 5.23.0 writes released names inside the layers, `attn.norm` for kv_norm and a `model.` prefix; files of
other versions may hold the names its modules carry in memory (`self_attn.q_a_proj`, stacked `experts.gate_up_proj`).
"""

import re

_TOP = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
# Applied in order to the part of a name behind `layers.N.`; a later rule sees what an earlier one wrote.
_LAYER = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^self_attn\.", "attn."),
        (r"^mlp\.", "ffn."),
        (r"^input_layernorm\.", "attn_norm."),
        (r"^post_attention_layernorm\.", "ffn_norm."),
        (r"^(attn|ffn)_hc\.(fn|base|scale)$", r"hc_\1_\2"),
        (r"\.compressor\.indexer\.scorer\.weights_proj\.", ".indexer.weights_proj."),
        (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"^attn\.norm\.", "attn.kv_norm."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.position_bias$", ".ape"),
        (r"^attn\.sinks$", "attn.attn_sink"),
        (r"\.q_a_proj\.", ".wq_a."),
        (r"\.q_b_proj\.", ".wq_b."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.o_a_proj\.", ".wo_a."),
        (r"\.o_b_proj\.", ".wo_b."),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"(experts(?:\.\d+)?)\.gate_proj\.", r"\1.w1."),
        (r"(experts(?:\.\d+)?)\.up_proj\.", r"\1.w3."),
        (r"(experts(?:\.\d+)?)\.down_proj\.", r"\1.w2."),
        (r"\.weight_scale_inv$", ".scale"),
    )
)
_STACKED = re.compile(r"^((?:layers|mtp)\.\d+\.ffn\.experts)\.(gate_up_proj|down_proj)$")
_INNER = re.compile(r"^((?:layers|mtp)\.\d+)\.(.+)$")
# Tables computed from the configuration; some versions store them.
_DERIVED = re.compile(r"(^|\.)rotary_emb\..*inv_freq$")


def is_transformers(keys: list[str]) -> bool:
    """Whether these names come from save_pretrained: it prefixes everything but the head with `model.`."""
    return any(key.startswith("model.") or key == "lm_head.weight" for key in keys)


def released_name(key: str) -> str | None:
    """The released name of a tensor in a transformers file; None for one that carries no weights."""
    if _DERIVED.search(key):
        return None
    key = key.removeprefix("model.")
    if key in _TOP:
        return _TOP[key]
    inner = _INNER.match(key)
    if inner is None:
        return key
    rest = inner.group(2)
    for pattern, replacement in _LAYER:
        rest = pattern.sub(replacement, rest)
    return f"{inner.group(1)}.{rest}"


def stacked_experts(key: str) -> tuple[str, str] | None:
    """(prefix, "gate_up_proj" | "down_proj") where a released name, as mapped, is a stack of all experts of a layer."""
    match = _STACKED.match(key)
    return (match.group(1), match.group(2)) if match else None
