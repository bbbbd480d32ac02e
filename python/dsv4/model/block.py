"""One layer: attention and experts, each between hyper-connections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.cache import LayerCache
from dsv4.model.config import Config
from dsv4.nn.attention import attention
from dsv4.nn.hyper_connection import MIXES, MixingSettings, mixing_parameters
from dsv4.nn.linear import RMSNorm
from dsv4.nn.moe import MixtureOfExperts
from dsv4.nn.rows import Rows


class Block(nn.Module):
    """A decoder layer over 4 residual streams. Parameter names are those of the release.

    Args:
        config: of the model.
        ratio: of its attention.
        hash_routing: experts by token id.
    """

    def __init__(self, config: Config, ratio: int, hash_routing: bool, quantization: str, dtype: torch.dtype):
        super().__init__()
        trainable = quantization == "off"
        mixing_dtype = dtype if trainable else torch.float32
        self.mixing = MixingSettings.of(config)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, trainable)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, trainable)
        self.attn = attention(config, ratio, quantization, dtype)
        self.ffn = MixtureOfExperts(config, hash_routing, quantization, dtype)
        for site in ("hc_attn", "hc_ffn"):
            fn, base, scale = mixing_parameters(config.hidden_size, MIXES, 3, mixing_dtype, trainable)
            self.register_parameter(f"{site}_fn", fn)
            self.register_parameter(f"{site}_base", base)
            self.register_parameter(f"{site}_scale", scale)

    def forward(self, streams: Tensor, rows: Rows, layer: LayerCache | None) -> Tensor:
        """streams [tokens, 4, hidden] -> the same; appends the rows to the layer's cache."""
        wide = torch.promote_types(streams.dtype, torch.float32)
        attn_mixing = [p.to(wide) for p in (self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base)]
        ffn_mixing = [p.to(wide) for p in (self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base)]
        x, post, comb = self.mixing.pre(streams, *attn_mixing, self.attn_norm.weight)
        attended = self.attn(x, rows, layer)
        streams, x, post, comb = self.mixing.post_pre(
            attended, streams, post, comb, *ffn_mixing, self.ffn_norm.weight
        )
        return self.mixing.post(self.ffn(x, rows.token_ids), streams, post, comb)
