"""The configuration of a model: the released config.json, the one transformers writes, and the presets.

Field names are the keys of the released config.json. What the two files say differently (transformers writes
`layer_types`, `mlp_layer_types`, `compress_rates` and `rope_parameters`) is turned into the released form on reading.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPE = "deepseek_v4"
CSA, HCA, SWA = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"

# The attention variants the released model code has no parameter for: a config that asks for another one cannot be run.
_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "hc_sinkhorn_iters",
    "max_position_embeddings", "csa_ratio",
)  # fmt: skip
# Far above any model, low enough that sizes computed from them stay in int64 and tables stay in memory.
_LIMITS = {
    "num_hidden_layers": 4096, "n_routed_experts": 1 << 16, "num_nextn_predict_layers": 64, "index_topk": 1 << 20,
    "hc_sinkhorn_iters": 1 << 10,
}  # fmt: skip
_MAX_SIZE = 1 << 31
_MAX_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies of compressed layers (`rope_scaling` in config.json).

    `attention_factor` multiplies cos and sin. The release has none (1.0); transformers' files may carry one.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if not _is_real(value) or not 1 / _MAX_FLOAT32 <= value <= _MAX_FLOAT32:
                raise ValueError(f"config: rope_scaling.{name} must be a positive number, got {_short(value)}")
            object.__setattr__(self, name, float(value))
        longest = self.original_max_position_embeddings
        if not _is_integer(longest) or not 1 <= longest <= _MAX_SIZE:
            raise ValueError(
                "config: rope_scaling.original_max_position_embeddings must be a positive integer up to 2^31, "
                f"got {longest if not _is_integer(longest) or abs(longest) < 1 << 64 else 'a larger one'}"
            )
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"config: rope_scaling.beta_fast {self.beta_fast} must be above rope_scaling.beta_slow {self.beta_slow}"
            )


@dataclass(frozen=True)
class Config:
    """Everything that fixes the shapes and the maths of a model, checked on construction (ValueError, one line).

    Sizes count elements; `compress_ratios` has one entry a layer, then one an MTP block: 0 = sliding window alone,
    `csa_ratio` (4 in every release) = compressed sparse attention with overlap and index, anything else = heavily
    compressed attention. A length of `num_hidden_layers` is taken too and filled up with 0.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    compress_ratios: tuple[int, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    qk_rope_head_dim: int = 64
    sliding_window: int = 128
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Yarn | None = None
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    n_shared_experts: int = 1
    num_hash_layers: int = 0
    routed_scaling_factor: float = 1.0
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_eps: float = 1e-6
    hc_sinkhorn_iters: int = 20
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 1 << 20
    expert_dtype: str = "fp4"
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    csa_ratio: int = 4

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            self._check_integer(name, 1, _LIMITS.get(name, _MAX_SIZE))
        for name in ("num_hash_layers", "num_nextn_predict_layers"):
            self._check_integer(name, 0, _LIMITS.get(name, _MAX_SIZE))
        for name in ("rope_theta", "compress_rope_theta", "routed_scaling_factor", "hc_eps", "rms_norm_eps"):
            value = getattr(self, name)
            least = 1 if name.endswith("theta") else 0
            if not _is_real(value) or not least < value <= _MAX_FLOAT32:
                kind = f"number above {least}" if least else "positive number"
                raise ValueError(f"config: {name} must be a {kind}, got {_short(value)}")
            object.__setattr__(self, name, float(value))
        if not _is_real(self.swiglu_limit) or not 0 <= self.swiglu_limit <= _MAX_FLOAT32:
            raise ValueError(
                f"config: swiglu_limit must be a number >= 0 (0 = no clamp), got {_short(self.swiglu_limit)}"
            )
        object.__setattr__(self, "swiglu_limit", float(self.swiglu_limit))
        self._check_relations()
        self._check_ratios()
        self._check_tokens()

    def _check_integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or not low <= value <= high:
            raise ValueError(f"config: {name} must be an integer from {low} to {high}, got {_short(value)}")

    def _check_relations(self) -> None:
        rope, experts = self.qk_rope_head_dim, self.n_routed_experts
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"config: num_attention_heads {self.num_attention_heads} must be a multiple of o_groups {self.o_groups}"
            )
        if rope % 2 or rope > self.head_dim:
            raise ValueError(f"config: qk_rope_head_dim must be even and at most head_dim {self.head_dim}, got {rope}")
        if self.num_experts_per_tok > experts:
            raise ValueError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts {experts}"
            )
        if not _is_integer(self.n_shared_experts) or self.n_shared_experts != 1:
            raise ValueError(f"config: n_shared_experts must be 1, got {_short(self.n_shared_experts)}")
        if not _is_integer(self.hc_mult) or self.hc_mult != 4:
            raise ValueError(f"config: hc_mult must be 4, got {_short(self.hc_mult)}")
        if self.expert_dtype not in ("fp4", "fp8", "bf16"):
            raise ValueError(f"config: expert_dtype must be 'fp4', 'fp8' or 'bf16', got {_short(self.expert_dtype)}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Yarn):
            raise ValueError(f"config: rope_scaling must be a Yarn or None, got {type(self.rope_scaling).__name__}")

    def _check_ratios(self) -> None:
        layers, extra = self.num_hidden_layers, self.num_nextn_predict_layers
        ratios = self.compress_ratios
        if not isinstance(ratios, (tuple, list)) or not all(_is_integer(ratio) and ratio >= 0 for ratio in ratios):
            raise ValueError(f"config: compress_ratios must be a list of integers >= 0, got {_short(ratios)}")
        if len(ratios) == layers:
            ratios = (*ratios, *(0,) * extra)
        if len(ratios) != layers + extra:
            raise ValueError(
                f"config: compress_ratios has {len(ratios)} entries, needs {layers + extra} "
                f"({layers} layers + {extra} MTP blocks)"
            )
        for layer, ratio in enumerate(ratios):
            if ratio == 1:
                raise ValueError(f"config: compress_ratios[{layer}] must be 0 or at least 2, got {ratio}")
            if ratio and layer >= layers:
                raise ValueError(f"config: compress_ratios[{layer}] belongs to an MTP block and must be 0, got {ratio}")
        object.__setattr__(self, "compress_ratios", tuple(ratios))
        if self.csa_ratio in ratios and (self.index_head_dim < self.qk_rope_head_dim or self.index_head_dim % 2):
            raise ValueError(
                f"config: index_head_dim must be even and at least qk_rope_head_dim {self.qk_rope_head_dim}, "
                f"got {self.index_head_dim}"
            )

    def _check_tokens(self) -> None:
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if isinstance(value, list) and name == "eos_token_id":
                value = tuple(value)
                object.__setattr__(self, name, value)
            for token in value if isinstance(value, tuple) else (value,):
                if token is not None and (not _is_integer(token) or not 0 <= token < self.vocab_size):
                    raise ValueError(
                        f"config: {name} must be null or a token below vocab_size {self.vocab_size}, "
                        f"got {_short(value)}"
                    )

    def layer_ratio(self, layer: int) -> int:
        """Tokens a compressed entry of this layer stands for, 0 = it has none. MTP blocks follow the layers."""
        return self.compress_ratios[layer]

    def layer_kind(self, layer: int) -> str:
        """One of "swa", "csa" (overlapping compression, index) and "hca"."""
        ratio = self.compress_ratios[layer]
        return "swa" if ratio == 0 else "csa" if ratio == self.csa_ratio else "hca"

    def is_hash_layer(self, layer: int) -> bool:
        """Whether the router of this layer looks experts up by token id. MTP blocks (>= num_hidden_layers) never do."""
        return layer < min(self.num_hash_layers, self.num_hidden_layers)

    def check_quantization(self, quantization: str) -> None:
        """ValueError unless the model can run in this mode: FP4, used in mode "checkpoint", asks for round sizes."""
        if quantization not in ("checkpoint", "off"):
            raise ValueError(f"quantization must be 'checkpoint' or 'off', got {quantization!r}")
        if quantization == "off":
            return
        dim = self.index_head_dim
        if self.csa_ratio in self.compress_ratios and (dim % 32 or dim & (dim - 1)):
            raise ValueError(
                f"config: index_head_dim {dim} must be a power of two from 32 on for FP4 keys; use quantization='off'"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            size = getattr(self, name)
            if self.expert_dtype == "fp4" and size % 32:
                raise ValueError(
                    f"config: {name} {size} must be a multiple of 32 for FP4 experts; use quantization='off'"
                )

    @classmethod
    def preset(cls, name: str) -> "Config":
        """A known model: "v4-flash" and "v4-pro" as released, or "nano" (256 wide, 8 layers, for demonstrations)."""
        if name not in _PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[name]

    @classmethod
    def from_file(cls, path: str | Path) -> "Config":
        """Reads config.json (the file or its folder), as released or as transformers writes it."""
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        return cls.from_dict(read_json(file), str(file))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> "Config":
        """The configuration in a parsed config.json; keys that do not touch the maths are ignored.

        ValueError: another model_type, a missing or impossible value, a variant this model code does not have.
        """
        try:
            return cls(**_fields(values))
        except ValueError as error:
            raise ValueError(f"{source}: {str(error).removeprefix('config: ')}") from None

    def to_dict(self) -> dict[str, Any]:
        """The released form of config.json. `from_dict` gives the same Config back."""
        values: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": MODEL_TYPE}
        for field in dataclasses.fields(self):
            values[field.name] = getattr(self, field.name)
        values["compress_ratios"] = list(self.compress_ratios)
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        del values["csa_ratio"], values["rope_scaling"]
        if self.rope_scaling is not None:
            values["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(self.rope_scaling)}
            if self.rope_scaling.attention_factor == 1.0:
                del values["rope_scaling"]["attention_factor"]
        if self.csa_ratio != 4:
            values["compress_rates"] = {CSA: self.csa_ratio}
        values.update({name: allowed[0] for name, allowed in _FIXED.items() if name != "mlp_bias"})
        values["torch_dtype"] = "bfloat16"
        if self.expert_dtype != "bf16":
            values["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128],
            }
        return values


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line when it is missing, unreadable or something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; a model is a folder with config.json and safetensors files") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object, holds {type(values).__name__}")
    return values


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments from a config.json of either form."""
    model_type = values.get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(f"model_type must be {MODEL_TYPE!r}, got {_short(model_type)}")
    for name, allowed in _FIXED.items():
        if values.get(name) is not None and values[name] not in allowed:
            raise ValueError(f"{name} must be {allowed[0]!r}, got {_short(values[name])}")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    arguments = {name: value for name, value in values.items() if name in fields and name != "csa_ratio"}
    for name in [name for name, value in arguments.items() if value is None and not name.endswith("_token_id")]:
        del arguments[name]
    if values.get("layer_types") is not None:
        arguments["compress_ratios"] = _ratios_of_types(values)
    if values.get("mlp_layer_types") is not None:
        arguments["num_hash_layers"] = _hash_layers(values["mlp_layer_types"])
    arguments["csa_ratio"] = _compress_rates(values)[CSA]
    arguments.update(_rope(values))
    if "swiglu_limit" in values and values["swiglu_limit"] is None:
        arguments["swiglu_limit"] = 0.0
    if "expert_dtype" not in arguments:
        quantized = values.get("quantization_config")
        nested = quantized.get("expert_dtype") if isinstance(quantized, Mapping) else None
        arguments["expert_dtype"] = nested or ("fp4" if quantized else "bf16")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in arguments]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    return arguments


def _compress_rates(values: Mapping[str, Any]) -> dict[str, int]:
    rates = values.get("compress_rates")
    if rates is not None and not isinstance(rates, Mapping):
        raise ValueError(f"compress_rates must be an object, got {_short(rates)}")
    found = {CSA: 4, HCA: 128, **(rates or {})}
    for kind in (CSA, HCA):
        if not _is_integer(found[kind]):
            raise ValueError(f"compress_rates.{kind} must be an integer, got {_short(found[kind])}")
    return found


def _ratios_of_types(values: Mapping[str, Any]) -> list[int]:
    rates, types = _compress_rates(values), values["layer_types"]
    if not isinstance(types, list) or not all(kind in (SWA, CSA, HCA) for kind in types):
        raise ValueError(f"layer_types must be a list of {SWA!r}, {CSA!r} and {HCA!r}, got {_short(types)}")
    if rates[CSA] == rates[HCA] and HCA in types:
        raise ValueError(f"compress_rates of {CSA} and {HCA} must differ, both are {rates[CSA]}")
    return [0 if kind == SWA else rates[kind] for kind in types]


def _hash_layers(types: object) -> int:
    if not isinstance(types, list) or not all(kind in ("hash_moe", "moe") for kind in types):
        raise ValueError(f"mlp_layer_types must be a list of 'hash_moe' and 'moe', got {_short(types)}")
    count = types.count("hash_moe")
    if types[:count].count("hash_moe") != count:
        raise ValueError("mlp_layer_types must have every 'hash_moe' before the first 'moe'")
    return count


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, compress_rope_theta, rope_scaling and qk_rope_head_dim from whichever of the two forms is there."""
    found: dict[str, Any] = {}
    partial = values.get("partial_rotary_factor")
    scaling = values.get("rope_scaling")
    parameters = values.get("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name} must be an object, got {_short(value)}")
    nested = isinstance(parameters, Mapping) and isinstance(parameters.get("compress"), Mapping)
    if isinstance(parameters, Mapping) and nested:
        main, scaling = parameters.get("main"), parameters["compress"]
        if not isinstance(main, Mapping):
            raise ValueError(f"rope_parameters.main must be an object, got {_short(main)}")
        if main.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters.main.rope_type must be 'default', got {_short(main['rope_type'])}")
        partial = scaling.get("partial_rotary_factor", partial)
        if "rope_theta" in main:
            found["rope_theta"] = main["rope_theta"]
        if "rope_theta" in scaling:
            found["compress_rope_theta"] = scaling["rope_theta"]
        if main.get("partial_rotary_factor", partial) != partial:
            raise ValueError("rope_parameters.main and .compress must have the same partial_rotary_factor")
    elif scaling is None:
        scaling = parameters
    if "qk_rope_head_dim" not in values and partial is not None and _is_integer(values.get("head_dim")):
        if not _is_real(partial):
            raise ValueError(f"partial_rotary_factor must be a number, got {_short(partial)}")
        found["qk_rope_head_dim"] = int(values["head_dim"] * partial)
    found["rope_scaling"] = _yarn(scaling, nested) if scaling else None
    return found


def _yarn(scaling: Mapping[str, Any], nested: bool) -> Yarn | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling type must be 'yarn', got {_short(kind)}")
    for name in ("factor", "original_max_position_embeddings"):
        if scaling.get(name) is None:
            raise ValueError(f"rope_scaling of type 'yarn' lacks {name}")
    if scaling.get("truncate", True) is not True:
        raise ValueError(f"rope_scaling.truncate must be true, got {_short(scaling['truncate'])}")
    options = {name: scaling[name] for name in ("beta_fast", "beta_slow") if scaling.get(name) is not None}
    yarn = Yarn(scaling["factor"], scaling["original_max_position_embeddings"], **options)
    attention = scaling.get("attention_factor")
    if attention is None and nested and yarn.factor > 1:
        # transformers injects 1.0 when it builds the nested form from a flat one; a nested form without the key means
        # the factor of the YaRN paper, mscale / mscale_all_dim included.
        log_factor = 0.1 * math.log(yarn.factor)
        above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if above and below:
            if not _is_real(above) or not _is_real(below):
                raise ValueError(f"rope_scaling.mscale and .mscale_all_dim must be numbers, got {above!r}, {below!r}")
            attention = (above * log_factor + 1.0) / (below * log_factor + 1.0)
        else:
            attention = log_factor + 1.0
    return yarn if attention is None else dataclasses.replace(yarn, attention_factor=attention)


_RELEASE_YARN = Yarn(factor=16, original_max_position_embeddings=65536)
_PRESETS = {
    "v4-flash": Config(
        vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, head_dim=512,
        q_lora_rank=1024, o_groups=8, o_lora_rank=1024, compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
        n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048, rope_scaling=_RELEASE_YARN,
        index_topk=512, num_hash_layers=3, routed_scaling_factor=1.5, num_nextn_predict_layers=1,
    ),
    "v4-pro": Config(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, head_dim=512,
        q_lora_rank=1536, o_groups=16, o_lora_rank=1024, compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
        n_routed_experts=384, num_experts_per_tok=6, moe_intermediate_size=3072, rope_scaling=_RELEASE_YARN,
        index_topk=1024, num_hash_layers=3, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
    ),
    "nano": Config(
        vocab_size=512, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, head_dim=128,
        q_lora_rank=128, o_groups=2, o_lora_rank=64, compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128),
        n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=128, rope_scaling=_RELEASE_YARN,
        index_n_heads=4, index_topk=64, num_hash_layers=1, routed_scaling_factor=1.5,
    ),
}  # fmt: skip
