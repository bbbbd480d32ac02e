"""What a configuration costs: KV bytes, FLOPs of one token, and weight bytes; next to DeepSeek-V3.2.

Everything follows from the configuration. A FLOP is weighted by the precision of its operands, relative to FP8 = 1:
BF16 (and wider) = 2, FP4 x FP4 = 0.5. The DeepSeek-V4 report speaks of "equivalent FP8 FLOPs" without defining them;
this weighting is the one that gives its figures (27 % and 10 % of V3.2 at a million tokens), and so an inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv4.cache import cache_bytes
from dsv4.model.config import Config
from dsv4.ops.layout import key_page_bytes, row_bytes, row_scale_bytes

Format = Literal["fp4", "fp8", "bf16", "f32", "i64"]
Precision = Literal["fp4", "fp8", "bf16"]

#: Cost of a FLOP by the precision of its operands, relative to FP8.
FLOP_WEIGHT: dict[Precision, float] = {"fp4": 0.5, "fp8": 1.0, "bf16": 2.0}

_BYTES = {"bf16": 2, "f32": 4, "i64": 8}


@dataclass(frozen=True)
class Weight:
    """Identical weight tensors [rows, columns].

    `count` are stored, `used` multiply one token (in `precision`); tables and vectors have `used` 0.
    """

    name: str
    count: int
    rows: int
    columns: int
    format: Format
    used: int = 0
    precision: Precision = "fp8"

    @property
    def parameters(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """With scales: one byte per 128 x 128 (FP8) or per 32 of a row (FP4)."""
        if self.format == "fp8":
            each = self.rows * self.columns + -(-self.rows // 128) * -(-self.columns // 128)
        elif self.format == "fp4":
            each = self.rows * (self.columns // 2 + self.columns // 32)
        else:
            each = self.rows * self.columns * _BYTES[self.format]
        return self.count * each

    @property
    def flops(self) -> int:
        return 2 * self.used * self.rows * self.columns


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token: `terms` = (what, FLOPs, precision)."""

    terms: tuple[tuple[str, int, Precision], ...]

    @property
    def raw(self) -> int:
        return sum(flops for _, flops, _ in self.terms)

    @property
    def weighted(self) -> float:
        """In FP8 equivalents: sum of FLOPs times `FLOP_WEIGHT`."""
        return sum(flops * FLOP_WEIGHT[precision] for _, flops, precision in self.terms)


@dataclass(frozen=True)
class Baseline:
    """DeepSeek-V3.2 at the same context: what the report compares with."""

    context: int
    kv_bytes_per_token: int
    flops: Flops

    @property
    def kv_bytes(self) -> int:
        return self.kv_bytes_per_token * self.context


@dataclass(frozen=True)
class Plan:
    """Costs of one sequence of `context` tokens.

    Bytes: `kv_bytes_per_token` counts the entries of compressed layers (rows, and index keys), as the report does;
    `kv_bytes` is that times the context. `cache_bytes` is what `KVCache.nbytes` will say: whole pages, the window, the
    compressors' tails, tables and token ids. FLOPs are of one token that follows `context` others.
    """

    config: Config
    context: int
    kv_bytes_per_token: float
    cache_bytes: int
    flops: Flops
    weights: tuple[Weight, ...]
    v32: Baseline

    @property
    def kv_bytes(self) -> int:
        return round(self.kv_bytes_per_token * self.context)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    @property
    def parameters(self) -> int:
        return sum(weight.parameters for weight in self.weights if weight.format != "i64")

    @property
    def active_parameters(self) -> int:
        """Parameters that multiply one token."""
        return sum(weight.used * weight.rows * weight.columns for weight in self.weights)

    @property
    def kv_ratio(self) -> float:
        """KV bytes a token over V3.2's."""
        return self.kv_bytes_per_token / self.v32.kv_bytes_per_token

    @property
    def flops_ratio(self) -> float:
        """Weighted FLOPs of a token over V3.2's."""
        return self.flops.weighted / self.v32.flops.weighted


def plan(config: Config, context: int = 1 << 20) -> Plan:
    """KV bytes, FLOPs and weight bytes of a model at a context length, in the released formats.

    Args:
        config: of the model.
        context: tokens of the sequence, from 1 on.
    Raises: ValueError: context below 1.
    Source: DeepSeek-V4 report, 2.3.4 and figure 1; entry formats of FlashMLA and DeepGEMM.
    """
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise ValueError(f"context must be an integer >= 1, got {context!r}")
    weights = tuple(_weights(config))
    index, attention = _attention_flops(config, context)
    flops = Flops(
        (
            ("weights, FP8", sum(weight.flops for weight in weights if weight.precision == "fp8"), "fp8"),
            ("weights, BF16", sum(weight.flops for weight in weights if weight.precision == "bf16"), "bf16"),
            ("attention", attention, "bf16"),
            ("index scores", index, "fp4"),
        )
    )
    return Plan(
        config=config,
        context=context,
        kv_bytes_per_token=kv_bytes_per_token(config),
        cache_bytes=cache_bytes(config, context),
        flops=flops,
        weights=weights,
        v32=baseline(context),
    )


def _layers(config: Config) -> list[int]:
    """Ratios of the layers proper; multi-token prediction blocks store no more than a window."""
    return [config.layer_ratio(layer) for layer in range(config.num_hidden_layers)]


def _indexed(config: Config, ratio: int) -> bool:
    return ratio == config.csa_ratio


def kv_bytes_per_token(config: Config) -> float:
    """Sum over compressed layers of the bytes of an entry (FP8 row, FP4 index key) over the tokens it stands for."""
    row = row_bytes(config.head_dim, config.qk_rope_head_dim) + row_scale_bytes(
        config.head_dim, config.qk_rope_head_dim
    )
    key = key_page_bytes(1, config.index_head_dim, "fp4")
    return sum((row + key if _indexed(config, ratio) else row) / ratio for ratio in _layers(config) if ratio)


def _attention_flops(config: Config, context: int) -> tuple[int, int]:
    """(index scores, attention) of one token: 2 FLOPs a multiply-add, keys that are values count twice."""
    index = attention = 0
    for ratio in _layers(config):
        keys = min(config.sliding_window, context)
        if _indexed(config, ratio):
            index += 2 * config.index_n_heads * config.index_head_dim * (context // ratio)
            keys += min(config.index_topk, context // ratio)
        elif ratio:
            keys += context // ratio
        attention += 4 * config.num_attention_heads * config.head_dim * keys
    return index, attention


def _weights(config: Config) -> list[Weight]:
    c, layers = config, config.num_hidden_layers
    found = [
        Weight("embedding", 1, c.vocab_size, c.hidden_size, "bf16"),
        Weight("head", 1, c.vocab_size, c.hidden_size, "bf16", 1, "bf16"),
        Weight("norm", 1, 1, c.hidden_size, "bf16"),
        Weight("head mixing", 1, c.hc_mult, c.hc_mult * c.hidden_size, "f32", 1, "bf16"),
        Weight("head mixing base and scale", 1, 1, c.hc_mult + 1, "f32"),
    ]
    for layer in range(layers):
        found += _layer_weights(c, c.layer_ratio(layer), hashed=c.is_hash_layer(layer), used=1)
    for block in range(c.num_nextn_predict_layers):
        found += _layer_weights(c, c.layer_ratio(layers + block), hashed=False, used=0)
        found += [
            Weight("prediction projections", 2, c.hidden_size, c.hidden_size, "fp8"),
            Weight("prediction norms", 3, 1, c.hidden_size, "bf16"),
            Weight("prediction mixing", 1, c.hc_mult, c.hc_mult * c.hidden_size, "f32"),
            Weight("prediction mixing base and scale", 1, 1, c.hc_mult + 1, "f32"),
        ]
    return found


def _layer_weights(c: Config, ratio: int, hashed: bool, used: int) -> list[Weight]:
    width, query_width = c.hidden_size, c.num_attention_heads * c.head_dim
    output_width, mixes = c.o_groups * c.o_lora_rank, (2 + c.hc_mult) * c.hc_mult
    expert: Format = c.expert_dtype  # type: ignore[assignment]  # Config admits these three
    plain = c.expert_dtype == "bf16"  # a checkpoint without quantised weights
    dense: Format = "bf16" if plain else "fp8"
    compute: Precision = "bf16" if plain else "fp8"
    found = [
        Weight("query down", 1, c.q_lora_rank, width, dense, used, compute),
        Weight("query up", 1, query_width, c.q_lora_rank, dense, used, compute),
        Weight("key-value", 1, c.head_dim, width, dense, used, compute),
        Weight("output groups", 1, output_width, query_width // c.o_groups, dense, used, "bf16"),
        Weight("output up", 1, width, output_width, dense, used, compute),
        Weight("attention sink", 1, 1, c.num_attention_heads, "f32"),
        Weight("norms", 1, 1, 2 * width + c.q_lora_rank + c.head_dim, "bf16"),
        Weight("mixing", 2, mixes, c.hc_mult * width, "f32", 2 * used, "bf16"),
        Weight("mixing base and scale", 2, 1, mixes + 3, "f32"),
        Weight("router", 1, c.n_routed_experts, width, "bf16", used, "bf16"),
        Weight("routed experts up", 2 * c.n_routed_experts, c.moe_intermediate_size, width, expert,
               2 * used * c.num_experts_per_tok, compute),
        Weight("routed experts down", c.n_routed_experts, width, c.moe_intermediate_size, expert,
               used * c.num_experts_per_tok, compute),
        Weight("shared expert up", 2 * c.n_shared_experts, c.moe_intermediate_size, width, dense,
               2 * used * c.n_shared_experts, compute),
        Weight("shared expert down", c.n_shared_experts, width, c.moe_intermediate_size, dense,
               used * c.n_shared_experts, compute),
    ]  # fmt: skip
    if hashed:
        found.append(Weight("hash routing table", 1, c.vocab_size, c.num_experts_per_tok, "i64"))
    else:
        found.append(Weight("router bias", 1, 1, c.n_routed_experts, "f32"))
    if ratio:
        found += _compressor_weights("compressor", c.head_dim, width, ratio, _indexed(c, ratio), used)
    if ratio and _indexed(c, ratio):
        found += _compressor_weights("index compressor", c.index_head_dim, width, ratio, True, used)
        found += [
            Weight("index query", 1, c.index_n_heads * c.index_head_dim, c.q_lora_rank, dense, used, compute),
            Weight("index head weights", 1, c.index_n_heads, width, "bf16", used, "bf16"),
        ]
    return found


def _compressor_weights(name: str, dim: int, width: int, ratio: int, overlaps: bool, used: int) -> list[Weight]:
    rows = dim * (2 if overlaps else 1)
    return [
        Weight(name, 2, rows, width, "bf16", 2 * used, "bf16"),
        Weight(f"{name} position bias", 1, ratio, rows, "f32"),
        Weight(f"{name} norm", 1, 1, dim, "bf16"),
    ]


# DeepSeek-V3.2, from its config.json: 61 layers (3 dense), hidden 7168, 128 heads of 128 + 64 (rotary), value 128;
# query rank 1536, key-value rank 512; index of 64 heads x 128 over every position, 2048 chosen; 8 + 1 of 256 experts.
_V32_LAYERS, _V32_DENSE, _V32_WIDTH, _V32_HEADS = 61, 3, 7168, 128
_V32_QUERY, _V32_LATENT, _V32_ROPE, _V32_NOPE, _V32_VALUE = 1536, 512, 64, 128, 128
_V32_INDEX_HEADS, _V32_INDEX_DIM, _V32_TOPK = 64, 128, 2048
_V32_EXPERTS, _V32_USED, _V32_INTER, _V32_DENSE_INTER, _V32_VOCAB = 256, 8 + 1, 2048, 18432, 129280
# A row of FlashMLA's V3.2 cache (512 E4M3 + 4 FP32 scales + 64 BF16) and an FP8 index key (128 E4M3 + 1 FP32 scale).
_V32_ROW_BYTES, _V32_KEY_BYTES = 512 + 16 + 128, 128 + 4


def baseline(context: int) -> Baseline:
    """DeepSeek-V3.2's KV bytes, and the FLOPs of one token in its absorbed (decoding) form."""
    width, heads = _V32_WIDTH, _V32_HEADS
    attention_fp8 = (
        width * (_V32_QUERY + _V32_LATENT + _V32_ROPE)
        + _V32_QUERY * heads * (_V32_NOPE + _V32_ROPE)
        + heads * _V32_VALUE * width
        + _V32_QUERY * _V32_INDEX_HEADS * _V32_INDEX_DIM
        + width * _V32_INDEX_DIM
    )
    attention_bf16 = heads * _V32_LATENT * (_V32_NOPE + _V32_VALUE) + width * _V32_INDEX_HEADS
    expert_layers = _V32_LAYERS - _V32_DENSE
    fp8 = _V32_LAYERS * attention_fp8 + 3 * width * (
        _V32_DENSE * _V32_DENSE_INTER + expert_layers * _V32_USED * _V32_INTER
    )
    bf16 = _V32_LAYERS * attention_bf16 + expert_layers * width * _V32_EXPERTS + width * _V32_VOCAB
    index = 2 * _V32_INDEX_HEADS * _V32_INDEX_DIM * context * _V32_LAYERS
    attention = 2 * heads * (2 * _V32_LATENT + _V32_ROPE) * min(_V32_TOPK, context) * _V32_LAYERS
    terms: tuple[tuple[str, int, Precision], ...] = (
        ("weights, FP8", 2 * fp8, "fp8"),
        ("weights, BF16", 2 * bf16, "bf16"),
        ("attention", attention, "bf16"),
        ("index scores", index, "fp8"),
    )
    return Baseline(context, _V32_LAYERS * (_V32_ROW_BYTES + _V32_KEY_BYTES), Flops(terms))


def parse_context(text: str) -> int:
    """A number of tokens: digits, with K or M for 2^10 or 2^20 ("64K", "1M", "1.5m", "131072").

    Raises: ValueError for anything else, or less than one token.
    """
    cleaned = text.strip().replace(",", "").replace("_", "").lower()
    scale = {"k": 1 << 10, "m": 1 << 20}.get(cleaned[-1:], 1)
    digits = cleaned if scale == 1 else cleaned[:-1]
    try:
        if not digits.replace(".", "", 1).isdecimal() or not digits.isascii() or len(digits) > 100:
            raise ValueError
        tokens = float(digits) * scale
    except ValueError:
        raise ValueError(f"{text!r} is no number of tokens; write 131072, 64K or 1M") from None
    if tokens != int(tokens) or not 1 <= tokens <= 1 << 40:
        raise ValueError(f"{text!r} must be a whole number of tokens from 1 to 2^40")
    return int(tokens)


def plot(models: Sequence[tuple[str, Config]], file: str | Path, longest: int = 1 << 20) -> None:
    """Draw KV bytes and weighted FLOPs of one token over the context length, for `models` and DeepSeek-V3.2.

    Args:
        models: (label, configuration).
        file: the picture; its ending says the format (.png, .svg, .pdf).
        longest: the right end of the axis.
    Raises: ValueError, in one line, where matplotlib is missing or cannot write the file, or its name has no ending.
    """
    if not Path(file).suffix:  # matplotlib would write another file
        raise ValueError(f"{file}: the ending says the format; name it {file}.png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
    contexts = [1 << 10]
    while contexts[-1] * 2 < longest:
        contexts.append(contexts[-1] * 2)
    contexts = sorted({*contexts, longest})
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    curves = [("DeepSeek-V3.2", [(b.kv_bytes, b.flops.weighted) for b in map(baseline, contexts)], "#6b7280", "--")]
    for (label, config), colour in zip(models, ("#2563eb", "#c2410c", "#15803d", "#7c3aed"), strict=False):
        plans = [plan(config, context) for context in contexts]
        curves.append((label, [(p.kv_bytes, p.flops.weighted) for p in plans], colour, "-"))
    titles = (("KV cache of one sequence", "GiB", 2**30), ("FLOPs of one token", "FP8-equivalent GFLOP", 10**9))
    for panel, (axes, (title, unit, scale)) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
        for label, points, colour, style in curves:
            values = [point[panel] / scale for point in points]
            axes.plot(contexts, values, style, color=colour, label=label, linewidth=1.8)
            last = f"{values[-1]:,.0f}" if values[-1] >= 100 else f"{values[-1]:.3g}"
            axes.annotate(last, (contexts[-1], values[-1]), xytext=(4, 0), textcoords="offset points",
                          va="center", color=colour, fontsize=9)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        ticks = [context for context in contexts if context.bit_length() % 2 == contexts[-1].bit_length() % 2]
        axes.set_xticks(ticks, [format_context(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(unit)
        axes.grid(True, color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.09)
    figure.axes[0].legend(frameon=False, fontsize=9)
    try:
        figure.savefig(str(file), dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write {file}: {str(error).splitlines()[0]}") from None


def format_context(tokens: int) -> str:
    """65536 -> "64K"; numbers that are no multiple of 1024 as they are."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"
