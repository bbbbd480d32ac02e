"""Compression of tokens to entries, and the lightning indexer that selects among them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.model.config import Config
from dsv4.nn.linear import Linear, RMSNorm, empty_parameter, linear
from dsv4.nn.rows import Rows


class Compressor(nn.Module):
    """Pools every `ratio` tokens to one entry: softmax over the window of gate + position bias, weighting the values.

    The pooled row is normalised, rotated at the window's first position and stored. Projections and pooling are
    float32.
    Source: DeepSeek-V4 report, 2.3; the official inference code.

    Args:
        config: of the model.
        ratio: tokens an entry. At the configuration's `csa_ratio` windows overlap: they span twice the ratio, so that
            each token lies in two of them.
        head_dim: width of an entry.
        rotate: apply a Hadamard transform before storing (index keys).
        quantization: "checkpoint" or "off".
        dtype: of activations and, in mode "off", of the weights.
    """

    def __init__(
        self, config: Config, ratio: int, head_dim: int, *, rotate: bool, quantization: str, dtype: torch.dtype
    ):
        super().__init__()
        exact = quantization == "checkpoint"
        width = head_dim * (2 if ratio == config.csa_ratio else 1)
        self.ratio = ratio
        self.rotate = rotate
        self.wkv = Linear(config.hidden_size, width, dtype, wide=True, exact=exact, trainable=not exact)
        self.wgate = Linear(config.hidden_size, width, dtype, wide=True, exact=exact, trainable=not exact)
        ape_dtype = torch.float32 if exact else dtype
        self.ape = empty_parameter(ratio, width, dtype=ape_dtype, trainable=not exact)
        self.norm = RMSNorm(head_dim, config.rms_norm_eps, dtype, trainable=not exact)
        if not self.ape.is_meta:
            nn.init.normal_(self.ape, std=0.02)

    def forward(
        self, x: Tensor, rows: Rows, state: Tensor | None = None, pages: Tensor | None = None, page_size: int = 0
    ) -> Tensor | None:
        """Appends tokens, x [tokens, hidden]: completed entries go to `pages`, the rest to `state`, as `ops.compress`
        has them. Without these: the entries of whole sequences, differentiable, [batch, length // ratio, head_dim]."""
        if state is None or pages is None:
            return self._entries(x, rows)
        kv, gate = self.wkv(x), self.wgate(x)
        ops.compress(
            kv,
            gate,
            self.ape.to(kv.dtype),
            self.norm.weight,
            rows.entry_rope(self.ratio),
            state,
            pages,
            rows.write_table,
            rows.sequence,
            rows.position,
            ratio=self.ratio,
            eps=self.norm.eps,
            page_size=page_size,
            rotate=self.rotate,
        )
        return None

    def _entries(self, x: Tensor, rows: Rows) -> Tensor:
        """All sequences as one, so that one graph of a compiler serves every batch size."""
        batch, width = rows.window_table.shape[0], self.norm.weight.shape[0]
        kv, gate = (p.unflatten(0, (batch, -1)) for p in (self.wkv(x), self.wgate(x)))
        completed = slice(self.ratio - 1, None, self.ratio)
        rope = rows.entry_rope(self.ratio).unflatten(0, (batch, -1))[0, completed].repeat(batch, 1, 1)
        if batch > 1:
            # A remainder makes no entry; where windows overlap, the next sequence's first entry would pool the first
            # channels of the last block. Slices would guard a graph by whether they leave something out.
            whole = torch.arange(kv.shape[1] // self.ratio * self.ratio, device=x.device)
            channel = torch.arange(kv.shape[2], device=x.device)
            unused = (whole >= whole.numel() - self.ratio).unsqueeze(1) & (channel < kv.shape[2] - width)
            kv = kv.index_select(1, whole).masked_fill_(unused, 0)
            gate = gate.index_select(1, whole).masked_fill_(unused, float("-inf"))
        made = ops.compress_entries(
            *(p.flatten(0, 1) for p in (kv, gate)),
            self.ape.to(kv.dtype),
            self.norm.weight,
            rope,
            self.ratio,
            self.norm.eps,
            self.rotate,
        )
        return made.unflatten(0, (batch, -1)).to(x.dtype)


class Indexer(nn.Module):
    """Lightning indexer: scores every visible entry with a few cheap heads and keeps the best.

    score[t, j] = sum_h weights[t, h] * relu(query[t, h] . key[j]). Queries and keys are rotated by RoPE and, in mode
    `checkpoint`, by a Hadamard transform and rounded to FP4.
    Source: DeepSeek-V4 report, 2.3.1; the official inference code.

    Args:
        config: of the model (`index_n_heads`, `index_head_dim`, `index_topk`, `q_lora_rank`, `csa_ratio`).
        quantization: "checkpoint" or "off".
        dtype: of activations and, in mode "off", of the weights.
    """

    def __init__(self, config: Config, *, quantization: str, dtype: torch.dtype):
        super().__init__()
        self.quantized = quantization == "checkpoint"
        self.heads, self.head_dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.ratio = config.csa_ratio
        self.wq_b = linear(config.q_lora_rank, self.heads * self.head_dim, quantization, dtype)
        self.weights_proj = Linear(
            config.hidden_size, self.heads, dtype, wide=True, exact=self.quantized, trainable=not self.quantized
        )
        self.compressor = Compressor(
            config, self.ratio, self.head_dim, rotate=self.quantized, quantization=quantization, dtype=dtype
        )
        self.scale = self.head_dim**-0.5 * self.heads**-0.5

    def query(self, query_latent: Tensor, rows: Rows) -> Tensor:
        """[tokens, q_lora_rank] -> [tokens, index_heads, index_head_dim]."""
        query = self.wq_b(query_latent).unflatten(-1, (self.heads, self.head_dim))
        rope = rows.rope(True)
        return ops.index_query(query, rope) if self.quantized else ops.apply_rope(query, rope)

    def forward(self, x: Tensor, query_latent: Tensor, rows: Rows, pages: Tensor, page_size: int) -> Tensor:
        """x [tokens, hidden], query_latent [tokens, q_lora_rank] -> entry numbers of the selection, int32
        [tokens, topk], ascending, then -1."""
        return ops.index_topk(
            self.query(query_latent, rows),
            self.weights_proj(x) * self.scale,
            pages,
            rows.compressed_table,
            rows.sequence,
            rows.visible_entries(self.ratio),
            self.topk,
            page_size,
        )
