"""The three attention layers: a sliding window alone, and with sparse or dense attention over compressed entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import BLOCK, LayerCache, entries_per_page
from dsv4.model.config import Config
from dsv4.nn.compressor import Compressor, Indexer
from dsv4.nn.linear import GroupedLinear, RMSNorm, StoredWeights, check_mode, empty_parameter, linear
from dsv4.nn.rows import RopeFrequencies, Rows


class Attention(StoredWeights):
    """Multi-query attention over a window of tokens and, where `ratio` is not 0, compressed entries, in one softmax.

    One row a token serves as key and value of all heads. Queries and outputs go through low-rank projections; an
    attention sink a head enters the denominator; the output is rotated back at the query's position.
    Source: DeepSeek-V4 report, 2.3; the official inference code.

    Args:
        config: of the model.
        ratio: tokens a compressed entry; 0 = window only.
        quantization: "checkpoint" (FP8 weights, activations and cache rows; FP4 index) or "off".
        dtype: of activations and, in mode "off", of the weights: bfloat16, float32 or float64.
    Raises:
        ValueError: unknown quantization or dtype, or a negative ratio.
    """

    def __init__(
        self, config: Config, ratio: int, quantization: str = "checkpoint", dtype: torch.dtype = torch.bfloat16
    ):
        super().__init__()
        self.quantized = check_mode(quantization, dtype) == "checkpoint"
        if ratio < 0:
            raise ValueError(f"attention: ratio must be 0 (window only) or more, got {ratio}")
        trainable = not self.quantized
        self.config, self.ratio = config, ratio
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.window, self.eps, self.groups = config.sliding_window, config.rms_norm_eps, config.o_groups
        self.wq_a = linear(config.hidden_size, config.q_lora_rank, quantization, dtype)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps, dtype, trainable)
        self.wq_b = linear(config.q_lora_rank, self.heads * self.head_dim, quantization, dtype)
        self.wkv = linear(config.hidden_size, self.head_dim, quantization, dtype)
        self.kv_norm = RMSNorm(self.head_dim, self.eps, dtype, trainable)
        self.group_width = self.heads * self.head_dim // self.groups
        self.wo_a = GroupedLinear(self.groups, self.group_width, config.o_lora_rank, quantization, dtype)
        self.wo_b = linear(self.groups * config.o_lora_rank, config.hidden_size, quantization, dtype)
        sink_dtype = torch.float32 if self.quantized else dtype
        self.attn_sink = empty_parameter(self.heads, dtype=sink_dtype, trainable=trainable)
        if not self.attn_sink.is_meta:
            nn.init.zeros_(self.attn_sink)
        if ratio:
            self.compressor = Compressor(
                config, ratio, self.head_dim, rotate=False, quantization=quantization, dtype=dtype
            )
        self.indexer = Indexer(config, quantization=quantization, dtype=dtype) if ratio == config.csa_ratio else None

    def forward(self, x: Tensor, rows: Rows | None = None, layer: LayerCache | None = None) -> Tensor:
        """Attends, appending the rows to the layer's cache.

        Args:
            x: [tokens, hidden] with `rows` and `layer`; or alone, [batch, length, hidden], whole sequences from
                position 0 without a cache (differentiable in mode "off"). bfloat16 or float32; in mode "off" the dtype
                of the weights.
        Returns: the shape and dtype of x.
        Raises:
            ValueError: without `rows`: another shape, or in mode "off" another dtype.
        """
        if rows is None:
            self._check_alone(x)
            batch, length = x.shape[:2]
            rows = Rows.whole_sequences(batch, length, RopeFrequencies(self.config), x.device)
            return self(x.flatten(0, 1), rows).unflatten(0, (batch, length))
        query_latent = self.q_norm(self.wq_a(x))
        query = self.wq_b(query_latent).unflatten(-1, (self.heads, self.head_dim))
        query = ops.query_norm_rope(query, rows.rope(self.ratio > 0), self.eps)
        if layer is None and self.quantized:
            table = rows.window_table
            pages = table.shape[0], table.numel()
            layer = LayerCache.allocate(self.config, self.ratio, *pages, dtype=x.dtype, device=x.device)
        window_pages, compressed_pages, indices = (
            self._append(x, query_latent, rows, layer) if layer else self._rows_alone(x, query_latent, rows)
        )
        out, _ = ops.sparse_attention(
            query,
            window_pages,
            rows.window_table,
            compressed_pages,
            rows.compressed_table if self.ratio else None,
            rows.sequence,
            rows.position,
            indices,
            rows.visible_entries(self.ratio) if self.ratio else None,
            self.attn_sink.to(torch.promote_types(x.dtype, torch.float32)),
            rows.rope(self.ratio > 0),
            window=self.window,
            scale=self.head_dim**-0.5,
            page_size=entries_per_page(self.ratio),
        )
        return self.wo_b(self.wo_a(out.reshape(x.shape[0], self.groups, self.group_width)).flatten(1))

    def _check_alone(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[0] == 0 or x.shape[2] != self.config.hidden_size:
            wanted = f"[batch, length, hidden {self.config.hidden_size}], batch from 1 on"
            raise ValueError(f"attention: x must be {wanted}, got {list(x.shape)}")
        own = self.attn_sink.dtype
        if not self.quantized and x.dtype != own and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"attention: x must be {own} as the weights are, got {x.dtype}")

    def _append(
        self, x: Tensor, query_latent: Tensor, rows: Rows, layer: LayerCache
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Stores the rows in the cache, then selects."""
        ops.store_window(
            self.wkv(x),
            self.kv_norm.weight,
            rows.rope(self.ratio > 0),
            layer.window_pages,
            rows.window_table,
            rows.sequence,
            rows.position,
            eps=self.eps,
        )
        if not self.ratio:
            return layer.window_pages, None, None
        page_size = entries_per_page(self.ratio)
        self.compressor(x, rows, layer.state, layer.pages, page_size)
        if self.indexer is None:
            return layer.window_pages, layer.pages, None
        self.indexer.compressor(x, rows, layer.index_state, layer.index_pages, page_size)
        return layer.window_pages, layer.pages, self.indexer(x, query_latent, rows, layer.index_pages, page_size)

    def _rows_alone(self, x: Tensor, query_latent: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same for whole sequences without a cache: pages that autograd sees through."""
        batch = rows.window_table.shape[0]
        window = ops.kv_norm_rope(self.wkv(x), self.kv_norm.weight, rows.rope(self.ratio > 0), self.eps)
        window_pages = _to_pages(window.unflatten(0, (batch, -1)), rows, BLOCK)
        if not self.ratio:
            return window_pages, None, None
        page_size = entries_per_page(self.ratio)
        pages = _to_pages(self.compressor(x, rows), rows, page_size)
        if self.indexer is None:
            return window_pages, pages, None
        with torch.no_grad():  # a selection has no gradient
            index_pages = _to_pages(self.indexer.compressor(x, rows), rows, page_size)
            indices = self.indexer(x, query_latent, rows, index_pages, page_size)
        return window_pages, pages, indices


def _to_pages(entries: Tensor, rows: Rows, page_size: int) -> Tensor:
    """[batch, entries, width] -> [pages, page_size, width], in the order of `Rows.whole_sequences`' tables."""
    missing = rows.window_table.shape[1] * page_size - entries.shape[1]
    return F.pad(entries, (0, 0, 0, missing)).reshape(-1, page_size, entries.shape[2])


class SlidingWindowAttention(Attention):
    """Attention over the last `sliding_window` tokens alone (`ratio` 0). Arguments as `Attention`'s."""

    def __init__(self, config: Config, quantization: str = "checkpoint", dtype: torch.dtype = torch.bfloat16):
        super().__init__(config, 0, quantization, dtype)


class CompressedSparseAttention(Attention):
    """CSA: every `csa_ratio` (4) tokens make one entry, an indexer picks `index_topk` of them for each query. Arguments
    as `Attention`'s; the ratio is the configuration's."""

    def __init__(self, config: Config, quantization: str = "checkpoint", dtype: torch.dtype = torch.bfloat16):
        super().__init__(config, config.csa_ratio, quantization, dtype)


class HeavilyCompressedAttention(Attention):
    """HCA: every `ratio` tokens (128 in the release) make one entry; a query attends to all of them.

    Args:
        ratio: from 1 on, but not `config.csa_ratio`, which makes CSA; the others as `Attention`'s.
    Raises:
        ValueError: another ratio.
    """

    def __init__(
        self,
        config: Config,
        ratio: int = 128,
        quantization: str = "checkpoint",
        dtype: torch.dtype = torch.bfloat16,
    ):
        if ratio < 1 or ratio == config.csa_ratio:
            raise ValueError(f"attention: HCA's ratio must be from 1 on and not CSA's {config.csa_ratio}, got {ratio}")
        super().__init__(config, ratio, quantization, dtype)


def attention(config: Config, ratio: int, quantization: str, dtype: torch.dtype) -> Attention:
    """The layer for a compression ratio: 0 window only, `csa_ratio` (4) CSA, anything else HCA."""
    if ratio == 0:
        return SlidingWindowAttention(config, quantization, dtype)
    if ratio == config.csa_ratio:
        return CompressedSparseAttention(config, quantization, dtype)
    return HeavilyCompressedAttention(config, ratio, quantization, dtype)
