"""The full model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4._compiling import between_graphs
from dsv4.cache import KVCache, LayerCache, Step
from dsv4.model.block import Block
from dsv4.model.config import Config
from dsv4.nn.hyper_connection import STREAMS, MixingSettings, add_mixing_parameters, mixing_weights
from dsv4.nn.linear import Linear, RMSNorm, StoredWeights, check_mode, empty_parameter, linear
from dsv4.nn.rows import RopeFrequencies, Rows

_ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Transformer(StoredWeights):
    """DeepSeek-V4: embedding, layers over 4 residual streams, head, and the multi-token prediction blocks.

    Args:
        config: of the model.
        quantization: "checkpoint": weights as released (FP8, FP4), activations and cache rounded where the checkpoint
            was trained with it. "off": plain weights and cache of `dtype`; differentiable; equals transformers'
            implementation to rounding.
        dtype: of activations and, in mode "off", of weights and cache: bfloat16, float32 or float64.
    Raises:
        ValueError: unknown quantization or dtype.
    """

    note: str = ""
    """What the checkpoint says of itself, e.g. that its weights are random."""

    # `dsv4.generate` and `dsv4.generate_batch`, which stand above the model: the package sets them.
    generate: Callable[..., Iterator[int]]
    generate_batch: Callable[..., Iterator[list[int | None]]]

    def __init__(self, config: Config, quantization: str = "checkpoint", dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        exact = check_mode(quantization, dtype) == "checkpoint"
        trainable = not exact
        self.config, self.quantization = config, quantization
        self._activations = dtype
        self.frequencies = RopeFrequencies(config)
        self.mixing = MixingSettings.of(config)
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype, trainable)
        self.layers = nn.ModuleList(
            Block(config, config.layer_ratio(index), config.is_hash_layer(index), quantization, dtype)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, trainable)
        self.head = Linear(config.hidden_size, config.vocab_size, dtype, wide=True, exact=exact, trainable=trainable)
        mixing_dtype = dtype if trainable else torch.float32
        add_mixing_parameters(self, "hc_head", config.hidden_size, STREAMS, 1, mixing_dtype, trainable)
        self.mtp = nn.ModuleList(
            MultiTokenPrediction(config, config.layer_ratio(config.num_hidden_layers + index), quantization, dtype)
            for index in range(config.num_nextn_predict_layers)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; in mode "off" also of weights and cache, so `to` changes it."""
        return self.embed.weight.dtype if self.quantization == "off" else self._activations

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def new_cache(self, batch_size: int = 1, max_seq_len: int = 1 << 20, **options: Any) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `max_seq_len` tokens; options as of `dsv4.KVCache`."""
        return KVCache(
            self.config,
            batch_size,
            max_seq_len,
            quantization=self.quantization,
            dtype=self.dtype,
            device=self.device,
            **options,
        )

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        *,
        num_tokens: Sequence[int] | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits of a chunk of tokens, which the cache, if given, then holds.

        Args:
            input_ids: integer [batch, seq]. The batch is the cache's; seq is any length.
            cache: continues the sequences it holds; None: whole sequences from position 0, nothing kept.
            num_tokens: how many tokens of each row count, from its left (for sequences of different lengths); the rest
                is padding, neither stored nor seen, and its logits are 0. None: all.
            logits_to_keep: compute logits for the last so many columns alone; 0: for all.
        Returns: float32 [batch, seq or logits_to_keep, vocab] (float64 where the model is). Differentiable in mode
            "off" without a cache; a cache is written in place, so with one the logits have no gradient.
        Raises:
            ValueError: ids not integer [batch, seq] or out of range; batch or num_tokens not fitting; past max_seq_len;
                logits_to_keep below 0.
        """
        ids, counts = self.check_ids(input_ids, cache, num_tokens, logits_to_keep)
        if cache is None:
            flat = self._layers(self._whole_sequences(ids), None)  # padding stands to the right, where nothing sees it
            if counts is not None:
                flat = flat[_used(counts, ids.shape[1]).flatten().nonzero().squeeze(1).to(flat.device)]
            return self._logits(flat, counts, ids.shape, logits_to_keep)
        with torch.no_grad():
            step = self.begin(ids, counts, cache)
            return self._logits(self._run(step, cache), counts, ids.shape, logits_to_keep)

    @between_graphs
    def begin(self, ids: Tensor, counts: Sequence[int] | None, cache: KVCache) -> Step:
        """The step that feeds checked ids to the cache, after any steps that the cache needs first."""
        for step in cache.pending():
            self._run(step, cache)
        return cache.begin([row if counts is None else row[: counts[number]] for number, row in enumerate(ids)])

    def _run(self, step: Step, cache: KVCache) -> Tensor:
        with torch.inference_mode():  # the dispatcher need not ask every op for its gradient
            streams = self._layers(Rows(self.frequencies, *step.tensors()), cache.layers)
        cache.commit(step)
        return streams

    def _layers(self, rows: Rows, storage: Sequence[LayerCache] | None) -> Tensor:
        assert rows.token_ids is not None
        rows.fill({self.config.layer_ratio(index) for index in range(len(self.layers))})
        streams = self._embed(rows.token_ids).unsqueeze(1).repeat(1, STREAMS, 1)
        layers: Sequence[LayerCache | None] = storage or [None] * len(self.layers)
        for block, layer in zip(self.layers, layers, strict=True):
            streams = block(streams, rows, layer)
        return streams

    def step_logits(self, rows: Rows, storage: Sequence[LayerCache], batch: torch.Size, keep: int) -> Tensor:
        """Logits of a step in which every row of a batch [sequences, seq] counts. It looks at no value of a tensor, so
        that it can be recorded."""
        return self._logits(self._layers(rows, storage), None, batch, keep)

    def _embed(self, token_ids: Tensor) -> Tensor:
        return self.embed(token_ids).to(self.dtype)

    def _logits(self, flat: Tensor, counts: Sequence[int] | None, batch: torch.Size, keep: int) -> Tensor:
        """flat [sum(counts), 4, hidden] -> [batch, keep or length, vocab]; 0 where a sequence has no token."""
        keep = min(keep, batch[1]) or batch[1]
        if counts is None:
            streams = flat.unflatten(0, batch)[:, -keep:]
            return self.head(self.norm(_collapse(self, streams.flatten(0, 1)))).unflatten(0, streams.shape[:2])
        used = _used(counts, batch[1])
        kept = used.clone()
        kept[:, :-keep] = False
        rows, places = (mask.nonzero().to(flat.device) for mask in (kept[used], used[:, -keep:]))
        logits = self.head(self.norm(_collapse(self, flat[rows.squeeze(1)])))
        out = logits.new_zeros(batch[0], keep, logits.shape[-1])
        out[places[:, 0], places[:, 1]] = logits
        return out

    def hidden_streams(self, input_ids: Tensor) -> Tensor:
        """Residual streams after the last layer, [batch, seq, 4, hidden]: what multi-token prediction starts from."""
        ids, _ = self.check_ids(input_ids, None)
        return self._layers(self._whole_sequences(ids), None).unflatten(0, ids.shape)

    def predict_next(self, streams: Tensor, next_ids: Tensor, block: int = 0) -> Tensor:
        """Logits of the token after next, by a multi-token prediction block.

        Args:
            streams: [batch, seq, 4, hidden], row t the streams after the last layer at position t.
            next_ids: integer [batch, seq], row t the token at position t + 1.
            block: which of the model's `mtp` blocks.
        Returns: float32 [batch, seq, vocab], row t for position t + 2.
        Raises: ValueError: no such block, or next_ids that do not fit.
        """
        if not 0 <= block < len(self.mtp):
            raise ValueError(f"the model has {len(self.mtp)} multi-token prediction blocks, asked for number {block}")
        ids, _ = self.check_ids(next_ids, None)
        if streams.shape[:2] != ids.shape:
            raise ValueError(f"next_ids must be {list(streams.shape[:2])} like the streams, got {list(ids.shape)}")
        module = self.mtp[block]
        assert isinstance(module, MultiTokenPrediction)
        hidden = module(streams.flatten(0, 1), self._embed(ids.flatten()), self._whole_sequences(ids))
        return self.head(hidden).unflatten(0, ids.shape)

    def _whole_sequences(self, ids: Tensor) -> Rows:
        batch, length = ids.shape
        return Rows.whole_sequences(batch, length, self.frequencies, ids.device, ids.flatten())

    def _check_cache(self, cache: KVCache) -> None:
        theirs = (cache.settings.config, cache.settings.quantization, cache.settings.dtype)
        if theirs != (self.config, self.quantization, self.dtype):
            raise ValueError("the cache belongs to another model: make one with this model's new_cache")
        if (cache.device.type, cache.device.index or 0) != (self.device.type, self.device.index or 0):
            raise ValueError(f"the cache is on {cache.device}, the model on {self.device}: load it with device=")

    @between_graphs
    def check_ids(
        self,
        input_ids: Tensor,
        cache: KVCache | None,
        num_tokens: Sequence[int] | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, list[int] | None]:
        """(ids int64, in host memory for a cache; how many of each row count, or None: all), or ValueError as `forward`
        says."""
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be 0 (all) or a number of columns, got {logits_to_keep}")
        if not isinstance(input_ids, Tensor):
            raise ValueError(f"input_ids must be an integer tensor [batch, seq], got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or input_ids.dtype not in _ID_DTYPES:
            raise ValueError(f"input_ids must be integer [batch, seq], got {input_ids.dtype} {list(input_ids.shape)}")
        ids = input_ids.to(device=self.device if cache is None else "cpu", dtype=torch.int64)
        # torch.export and the meta device have no values; in an exported program the embedding refuses.
        known = ids.numel() > 0 and not ids.is_meta and not torch.compiler.is_exporting()
        low, high = (int(end) for end in ids.aminmax()) if known else (0, 0)
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"input_ids must lie in [0, {self.config.vocab_size}), got {low} to {high}")
        if cache is not None:
            self._check_cache(cache)
        if cache is not None and cache.batch_size != ids.shape[0]:
            raise ValueError(f"the cache holds {cache.batch_size} sequences, input_ids has {ids.shape[0]} rows")
        if num_tokens is None:
            return ids, None
        counts = list(num_tokens)
        fits = all(hasattr(count, "__index__") and 0 <= count <= ids.shape[1] for count in counts)
        if len(counts) != ids.shape[0] or not fits:
            raise ValueError(f"num_tokens must be {ids.shape[0]} counts of 0 to {ids.shape[1]}, got {counts}")
        full = all(count == ids.shape[1] for count in counts)
        return ids, None if full else [operator.index(count) for count in counts]


def _collapse(module: Transformer | MultiTokenPrediction, streams: Tensor) -> Tensor:
    """[tokens, 4, hidden] -> [tokens, hidden], with the module's head mixing weights."""
    return module.mixing.head(streams, mixing_weights(module, "hc_head", streams.dtype))


def _used(counts: Sequence[int], length: int) -> Tensor:
    """bool [batch, length], in host memory: where the first counts[b] columns of row b are."""
    return torch.tensor(counts)[:, None] > torch.arange(length)


class Embedding(nn.Module):
    """Rows of a table [vocab, hidden] by token id."""

    def __init__(self, vocab_size: int, hidden: int, dtype: torch.dtype, trainable: bool):
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden, dtype=dtype, trainable=trainable)
        if not self.weight.is_meta:
            nn.init.normal_(self.weight)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


class MultiTokenPrediction(Block):
    """A layer that predicts one token further: streams of position t and the embedding of token t + 1.

    Row t stands at rope position t. Source: the official inference code (which ships no driver for it).
    """

    def __init__(self, config: Config, ratio: int, quantization: str, dtype: torch.dtype):
        super().__init__(config, ratio, False, quantization, dtype)
        trainable = quantization == "off"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj = linear(hidden, hidden, quantization, dtype)
        self.h_proj = linear(hidden, hidden, quantization, dtype)
        self.enorm = RMSNorm(hidden, eps, dtype, trainable)
        self.hnorm = RMSNorm(hidden, eps, dtype, trainable)
        self.norm = RMSNorm(hidden, eps, dtype, trainable)
        mixing_dtype = dtype if trainable else torch.float32
        add_mixing_parameters(self, "hc_head", config.hidden_size, STREAMS, 1, mixing_dtype, trainable)

    def forward(self, streams: Tensor, embedded: Tensor, rows: Rows) -> Tensor:  # type: ignore[override]
        """streams [tokens, 4, hidden], embedded [tokens, hidden] -> what the head takes, [tokens, hidden]."""
        mixed = self.e_proj(self.enorm(embedded)).unsqueeze(1) + self.h_proj(self.hnorm(streams))
        return self.norm(_collapse(self, super().forward(mixed, rows, None)))
