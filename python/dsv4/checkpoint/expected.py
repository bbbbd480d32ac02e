"""Every tensor a checkpoint of a configuration holds: released name, shape, and the dtypes it may be stored in.

dtype names are those of the safetensors format. A family of tensors (all linear weights, all expert scales, ...) shares
one storage format; which one is read off the checkpoint, because releases differ: experts in FP4 or FP8, scales in E8M0
or F32, compressor weights with or without a scale.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from dsv4.model.config import Config

FP8, E8M0 = "F8_E4M3", "F8_E8M0"
PLAIN = ("BF16", "F16", "F32")
PACKED = ("I8", "U8")
FP8_BLOCK, FP4_BLOCK = 128, 32


class Stored(Protocol):
    """What validation needs to know of a tensor in a file."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Storage:
    """How the families of a checkpoint are stored. The defaults are the release's.

    linear: "fp8" (128 x 128 blocks) or "plain"; experts: "fp4", "fp8" or "plain"; compressor: "plain", "fp8", or "f32"
    where a release holds these projections dequantised; linear_scale, expert_scale, compressor_scale: F8_E8M0 or F32.
    """

    linear: str = "fp8"
    linear_scale: str = E8M0
    experts: str = "fp4"
    expert_scale: str = E8M0
    compressor: str = "plain"
    compressor_scale: str = "F32"

    @property
    def quantized(self) -> bool:
        return self.linear == "fp8"

    @classmethod
    def of(cls, config: Config) -> "Storage":
        """The format a checkpoint of this configuration is written in."""
        if config.expert_dtype == "bf16":
            return cls(linear="plain", experts="plain")
        return cls(experts=config.expert_dtype)

    @classmethod
    def detect(cls, tensors: Mapping[str, Stored]) -> "Storage":
        """Reads the formats off the tensors; in each family the most frequent dtype decides, the rest are at fault."""
        counts: dict[str, Counter[str]] = {}
        for key, tensor in tensors.items():
            family = _family(key)
            counts.setdefault(family, Counter())[tensor.dtype] += 1

        def most(family: str, kinds: Mapping[str, tuple[str, ...]], default: str) -> str:
            count = counts.get(family, Counter())
            votes = {kind: sum(count[name] for name in names) for kind, names in kinds.items()}
            best = max(votes, key=lambda kind: votes[kind])
            return best if votes[best] else default

        scales = {E8M0: (E8M0,), "F32": ("F32",)}
        linear = most("linear", {"fp8": (FP8,), "plain": PLAIN}, "fp8")
        experts = "fp4" if linear == "fp8" else "plain"
        return cls(
            linear=linear,
            linear_scale=most("linear.scale", scales, E8M0),
            experts=most("experts", {"fp4": PACKED, "fp8": (FP8,), "plain": PLAIN}, experts),
            expert_scale=most("experts.scale", scales, E8M0),
            compressor=most("compressor", {"plain": ("BF16", "F16"), "f32": ("F32",), "fp8": (FP8,)}, "plain"),
            compressor_scale=most("compressor.scale", scales, "F32"),
        )


@dataclass(frozen=True)
class Expected:
    """A tensor a checkpoint must hold. `pair` marks the scale and the weight of a quantised matrix."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    pair: bool = False


def expected_tensors(config: Config, storage: Storage) -> dict[str, Expected]:
    """{released key: shape and allowed dtypes} of a whole checkpoint, in the order of the model."""
    table = _Table(config, storage)
    hidden = config.hidden_size
    table.plain("embed.weight", config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        table.layer(f"layers.{layer}", config.layer_kind(layer), config.layer_ratio(layer), config.is_hash_layer(layer))
    table.head("")
    table.plain("head.weight", config.vocab_size, hidden)
    for block in range(config.num_nextn_predict_layers):
        name = f"mtp.{block}"
        table.layer(name, "swa", 0, False)
        for projection in ("e_proj", "h_proj"):
            table.linear(f"{name}.{projection}", hidden, hidden)
        for norm in ("enorm", "hnorm"):
            table.plain(f"{name}.{norm}.weight", hidden)
        table.head(name + ".")
    return table.tensors


def problems(
    expected: Mapping[str, Expected], tensors: Mapping[str, Stored], names: Mapping[str, str]
) -> Iterator[str]:
    """One line for every missing, surplus, mis-shaped or mis-typed tensor; `names` gives a key's name in the file."""
    for key, want in expected.items():
        have = tensors.get(key)
        if have is None:
            yield f"missing {key}"
            continue
        name = names.get(key, key)
        if have.dtype not in want.dtypes:
            yield f"{name} has dtype {have.dtype}, needs {' or '.join(want.dtypes)}"
        if have.shape != want.shape:
            yield f"{name} has shape {list(have.shape)}, needs {list(want.shape)}"
    for key in tensors:
        if key not in expected:
            yield f"surplus {names.get(key, key)}"


class _Table:
    def __init__(self, config: Config, storage: Storage):
        self.config, self.storage = config, storage
        self.tensors: dict[str, Expected] = {}
        # A quantised release stores exactly these two; an unquantised checkpoint is of any float.
        self.bf16 = ("BF16",) if storage.quantized else PLAIN
        self.f32 = ("F32",) if storage.quantized else PLAIN

    def plain(self, key: str, *shape: int) -> None:
        self.tensors[key] = Expected(shape, self.bf16)

    def wide(self, key: str, *shape: int) -> None:
        self.tensors[key] = Expected(shape, self.f32)

    def linear(self, name: str, out: int, inputs: int) -> None:
        self._matrix(name, out, inputs, self.storage.linear, self.storage.linear_scale)

    def _matrix(self, name: str, out: int, inputs: int, kind: str, scale: str) -> None:
        if kind in ("plain", "f32"):
            dtypes = ("F32",) if kind == "f32" and self.storage.quantized else self.bf16
            self.tensors[name + ".weight"] = Expected((out, inputs), dtypes)
            return
        if kind == "fp4":
            blocks = (out, inputs // FP4_BLOCK)
            self.tensors[name + ".weight"] = Expected((out, inputs // 2), PACKED, pair=True)
        else:
            blocks = (-(-out // FP8_BLOCK), -(-inputs // FP8_BLOCK))
            self.tensors[name + ".weight"] = Expected((out, inputs), (FP8,), pair=True)
        self.tensors[name + ".scale"] = Expected(blocks, (scale,), pair=True)

    def head(self, prefix: str) -> None:
        config = self.config
        self.plain(f"{prefix}norm.weight", config.hidden_size)
        self.wide(f"{prefix}hc_head_fn", config.hc_mult, config.hc_mult * config.hidden_size)
        self.wide(f"{prefix}hc_head_base", config.hc_mult)
        self.wide(f"{prefix}hc_head_scale", 1)

    def layer(self, name: str, kind: str, ratio: int, hash_routing: bool) -> None:
        config = self.config
        mixes = config.hc_mult * (config.hc_mult + 2)
        for part in ("attn", "ffn"):
            self.plain(f"{name}.{part}_norm.weight", config.hidden_size)
            self.wide(f"{name}.hc_{part}_fn", mixes, config.hc_mult * config.hidden_size)
            self.wide(f"{name}.hc_{part}_base", mixes)
            self.wide(f"{name}.hc_{part}_scale", 3)
        self._attention(f"{name}.attn", kind, ratio)
        self._experts(f"{name}.ffn", hash_routing)

    def _attention(self, name: str, kind: str, ratio: int) -> None:
        config = self.config
        heads = config.num_attention_heads * config.head_dim
        self.wide(f"{name}.attn_sink", config.num_attention_heads)
        self.plain(f"{name}.q_norm.weight", config.q_lora_rank)
        self.plain(f"{name}.kv_norm.weight", config.head_dim)
        self.linear(f"{name}.wq_a", config.q_lora_rank, config.hidden_size)
        self.linear(f"{name}.wq_b", heads, config.q_lora_rank)
        self.linear(f"{name}.wkv", config.head_dim, config.hidden_size)
        self.linear(f"{name}.wo_a", config.o_groups * config.o_lora_rank, heads // config.o_groups)
        self.linear(f"{name}.wo_b", config.hidden_size, config.o_groups * config.o_lora_rank)
        if kind == "swa":
            return
        self._compressor(f"{name}.compressor", ratio, config.head_dim, overlap=kind == "csa")
        if kind == "csa":
            self.linear(f"{name}.indexer.wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
            self.plain(f"{name}.indexer.weights_proj.weight", config.index_n_heads, config.hidden_size)
            self._compressor(f"{name}.indexer.compressor", ratio, config.index_head_dim, overlap=True)

    def _compressor(self, name: str, ratio: int, head_dim: int, overlap: bool) -> None:
        width = head_dim * (2 if overlap else 1)
        hidden, storage = self.config.hidden_size, self.storage
        for projection in ("wkv", "wgate"):
            self._matrix(f"{name}.{projection}", width, hidden, storage.compressor, storage.compressor_scale)
        self.wide(f"{name}.ape", ratio, width)
        self.plain(f"{name}.norm.weight", head_dim)

    def _experts(self, name: str, hash_routing: bool) -> None:
        config = self.config
        hidden, inter = config.hidden_size, config.moe_intermediate_size
        self.plain(f"{name}.gate.weight", config.n_routed_experts, hidden)
        if hash_routing:
            self.tensors[f"{name}.gate.tid2eid"] = Expected((config.vocab_size, config.num_experts_per_tok), ("I64",))
        else:
            self.wide(f"{name}.gate.bias", config.n_routed_experts)
        shapes = {"w1": (inter, hidden), "w3": (inter, hidden), "w2": (hidden, inter)}
        for matrix, shape in shapes.items():
            self.linear(f"{name}.shared_experts.{matrix}", *shape)
        for expert in range(config.n_routed_experts):
            for matrix, shape in shapes.items():
                key = f"{name}.experts.{expert}.{matrix}"
                self._matrix(key, *shape, self.storage.experts, self.storage.expert_scale)


def _family(key: str) -> str:
    """Which tensors a tensor shares its storage format with."""
    parts = key.split(".")
    part = ".scale" if parts[-1] == "scale" else ""
    if len(parts) < 3 or parts[-1] not in ("weight", "scale"):
        return "other"
    if "experts" in parts:
        return "experts" + part
    if "compressor" in parts and parts[-2] in ("wkv", "wgate"):
        return "compressor" + part
    if parts[-2] in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "e_proj", "h_proj") or "shared_experts" in parts:
        return "linear" + part
    return "other"
