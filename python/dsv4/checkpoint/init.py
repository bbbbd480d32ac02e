"""Random weights in the formats of the release."""

import hashlib

import torch
from torch import Tensor

from dsv4.checkpoint.formats import FormatSource
from dsv4.checkpoint.loader import RANDOM, build
from dsv4.model.config import Config
from dsv4.model.transformer import Transformer

# Standard deviations around a mean, by the last parts of a name; matrices without an entry have 1 / sqrt(inputs), which
# keeps the size of what passes through them. The head's gives logits a deviation near 1.5.
_SPREAD = {
    "embed.weight": (0.0, 1.0),
    "norm.weight": (1.0, 0.1),
    "attn_sink": (0.0, 1.0),
    "ape": (0.0, 0.5),
    "gate.bias": (0.0, 0.05),
    "base": (0.0, 0.5),
    "hc_scale": (0.7, 0.1),
}
_HEAD_GAIN = 1.5


def init(
    config: Config,
    seed: int = 0,
    quantization: str = "checkpoint",
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> Transformer:
    """A model with random weights, ready to run: logits of deviation near 1.5, experts chosen evenly.

    The weights depend on `config`, `seed` and their names alone; mode "off" gets the values that the formats of mode
    "checkpoint" hold, so both modes are the same model. A config whose expert_dtype is "bf16" is left unquantised.

    Raises: ValueError on an unknown mode or dtype, "checkpoint" for an unquantised config, odd widths of FP4 experts.
    """
    for name in ("hidden_size", "moe_intermediate_size"):
        size = getattr(config, name)
        if quantization == "off" and config.expert_dtype == "fp4" and size % 2:
            raise ValueError(f"config: {name} {size} must be even for values of FP4 experts; use expert_dtype='bf16'")
    return build(RandomSource(config, seed), device, quantization, dtype, title="random weights", place="dsv4.init")


class RandomSource(FormatSource):
    """Random tensors of a checkpoint of `config`, under released names, each made when asked for."""

    def __init__(self, config: Config, seed: int = 0):
        super().__init__(config, RANDOM)
        self.seed = seed

    def whole(self, key: str, shape: tuple[int, ...]) -> Tensor:
        # The first experts of a random order: valid, different from each other, and evenly spread.
        order = torch.rand((shape[0], self.config.n_routed_experts), generator=self._generator(key)).argsort(-1)
        return order[:, : shape[1]].contiguous()

    def plain(self, key: str, shape: tuple[int, ...]) -> Tensor:
        mean, deviation = _spread(key, shape)
        return torch.randn(shape, generator=self._generator(key)) * deviation + mean

    def _generator(self, key: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _spread(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if key == "head.weight":
        return 0.0, _HEAD_GAIN * shape[1] ** -0.5
    if key.endswith("_scale"):
        return _SPREAD["hc_scale"]
    for ending, spread in _SPREAD.items():
        if key.endswith(ending):
            return spread
    if len(shape) == 1:  # the remaining norms of a multi-token prediction block: enorm, hnorm
        return _SPREAD["norm.weight"]
    return 0.0, shape[1] ** -0.5
