"""One layer: attention and experts, each between hyper-connections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.cache import LayerCache
from dsv4.model.config import Config
from dsv4.nn.attention import attention
from dsv4.nn.hyper_connection import MIXES, MixingSettings, add_mixing_parameters, mixing_weights
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
            add_mixing_parameters(self, site, config.hidden_size, MIXES, 3, mixing_dtype, trainable)

    def forward(self, streams: Tensor, rows: Rows, layer: LayerCache | None) -> Tensor:
        """streams [tokens, 4, hidden] -> the same; appends the rows to the layer's cache."""
        before = mixing_weights(self, "hc_attn", streams.dtype)
        between = mixing_weights(self, "hc_ffn", streams.dtype)
        x, post, comb = self.mixing.pre(streams, before, self.attn_norm.weight)
        attended = self.attn(x, rows, layer)
        streams, x, post, comb = self.mixing.post_pre(attended, streams, post, comb, between, self.ffn_norm.weight)
        return self.mixing.post(self.ffn(x, rows.token_ids), streams, post, comb)
