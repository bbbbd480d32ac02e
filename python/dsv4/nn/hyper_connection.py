"""Manifold-constrained hyper-connections around a sublayer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.model.config import Config
from dsv4.nn.linear import empty_parameter

STREAMS = 4
MIXES = 2 * STREAMS + STREAMS * STREAMS  # pre, post, comb


class MixingWeights(NamedTuple):
    """fn [mixes, 4 hidden], scale, base [mixes]: float32, or float64 with float64 streams."""

    fn: Tensor
    scale: Tensor
    base: Tensor


@dataclass(frozen=True)
class MixingSettings:
    """The scalars that every mHC op of a model takes, and the ops with them. float64 streams go to the references."""

    norm_eps: float
    hc_eps: float
    sinkhorn_iterations: int

    @classmethod
    def of(cls, config: Config) -> MixingSettings:
        return cls(config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters)

    def _pre_options(self) -> dict[str, Any]:
        return {
            "norm_eps": self.norm_eps,
            "hc_eps": self.hc_eps,
            "sinkhorn_iterations": self.sinkhorn_iterations,
            "rms_eps": self.norm_eps,
        }

    def pre(
        self, streams: Tensor, weights: MixingWeights, norm_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = ops.mhc_pre_reference if streams.dtype == torch.float64 else ops.mhc_pre
        return op(streams, *weights, _norm_weight(norm_weight, streams), **self._pre_options())

    def post(self, sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        op = ops.mhc_post_reference if streams.dtype == torch.float64 else ops.mhc_post
        return op(sublayer, streams, post, comb)

    def post_pre(
        self,
        sublayer: Tensor,
        streams: Tensor,
        post: Tensor,
        comb: Tensor,
        weights: MixingWeights,
        norm_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        op = ops.mhc_post_pre_reference if streams.dtype == torch.float64 else ops.mhc_post_pre
        norm_weight = _norm_weight(norm_weight, streams)
        return op(sublayer, streams, post, comb, *weights, norm_weight, **self._pre_options())

    def head(self, streams: Tensor, weights: MixingWeights) -> Tensor:
        op = ops.mhc_head_reference if streams.dtype == torch.float64 else ops.mhc_head
        return op(streams, *weights, norm_eps=self.norm_eps, hc_eps=self.hc_eps)


def _norm_weight(weight: Tensor | None, streams: Tensor) -> Tensor | None:
    """As the ops take it; a checkpoint's bfloat16 one may meet wider streams."""
    return weight if weight is None or weight.dtype == torch.float32 else weight.to(streams.dtype)


def add_mixing_parameters(
    module: nn.Module, site: str, hidden: int, mixes: int, scales: int, dtype: torch.dtype, trainable: bool
) -> None:
    """Registers `<site>_fn` [mixes, 4 hidden], `<site>_base` [mixes] and `<site>_scale` [scales]: released names."""
    fn = empty_parameter(mixes, STREAMS * hidden, dtype=dtype, trainable=trainable)
    base = empty_parameter(mixes, dtype=dtype, trainable=trainable)
    scale = empty_parameter(scales, dtype=dtype, trainable=trainable)
    if not fn.is_meta:
        nn.init.normal_(fn, std=(STREAMS * hidden) ** -0.5)
        nn.init.zeros_(base)
        nn.init.ones_(scale)
    for name, parameter in (("fn", fn), ("base", base), ("scale", scale)):
        module.register_parameter(f"{site}_{name}", parameter)


def mixing_weights(module: nn.Module, site: str, streams: torch.dtype) -> MixingWeights:
    """The parameters of a site in the precision that mixing computes in."""
    wide = torch.promote_types(streams, torch.float32)
    return MixingWeights(*(getattr(module, f"{site}_{name}").to(wide) for name in MixingWeights._fields))


class HyperConnection(nn.Module):
    """Wraps a sublayer: its input is a mix of 4 residual streams, its output is mixed back into them.

    V4 normalises the input of each of its sublayers: `connection(streams, lambda x: sublayer(norm(x)))`.
    Source: DeepSeek-V4 report, 2.2; arXiv 2512.24880; the official inference code.

    Args:
        config: of the model (`hidden_size`, `hc_eps`, `hc_sinkhorn_iters`, `rms_norm_eps`).
        dtype: of the mixing weights.
    """

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.settings = MixingSettings.of(config)
        add_mixing_parameters(self, "hc", config.hidden_size, MIXES, 3, dtype, True)

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """streams [..., 4, hidden]; sublayer maps [..., hidden] to [..., hidden]. Returns the new streams.

        Raises:
            ValueError: streams that are not 4.
            RuntimeError: another width, or a dtype that is not bfloat16, float32 or float64; a sublayer that returns
                another shape or dtype.
        """
        if streams.dim() < 2 or streams.shape[-2] != STREAMS:
            raise ValueError(f"hyper_connection: streams must be [..., {STREAMS}, hidden], got {list(streams.shape)}")
        flat = streams.reshape(-1, STREAMS, streams.shape[-1])
        mixed, post, comb = self.settings.pre(flat, mixing_weights(self, "hc", streams.dtype))
        out = sublayer(mixed.view(*streams.shape[:-2], streams.shape[-1]))
        return self.settings.post(out.reshape(mixed.shape), flat, post, comb).view(streams.shape)
