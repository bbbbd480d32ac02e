"""Manifold-constrained hyper-connections around a sublayer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.model.config import Config
from dsv4.nn.linear import empty_parameter

STREAMS = 4
MIXES = 2 * STREAMS + STREAMS * STREAMS  # pre, post, comb


@dataclass(frozen=True)
class MixingSettings:
    """The scalars every mHC op takes."""

    norm_eps: float
    hc_eps: float
    sinkhorn_iterations: int

    @classmethod
    def of(cls, config: Config) -> MixingSettings:
        if config.hc_mult != STREAMS:
            raise ValueError(f"hc_mult must be {STREAMS}, got {config.hc_mult}")
        return cls(config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters)

    def pre(
        self, streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = ops.mhc_pre_reference if streams.dtype == torch.float64 else ops.mhc_pre
        return op(
            streams,
            fn,
            scale,
            base,
            norm_weight,
            norm_eps=self.norm_eps,
            hc_eps=self.hc_eps,
            sinkhorn_iterations=self.sinkhorn_iterations,
            rms_eps=self.norm_eps,
        )

    def post(self, sublayer: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        op = ops.mhc_post_reference if streams.dtype == torch.float64 else ops.mhc_post
        return op(sublayer, streams, post, comb)

    def post_pre(
        self,
        sublayer: Tensor,
        streams: Tensor,
        post: Tensor,
        comb: Tensor,
        fn: Tensor,
        scale: Tensor,
        base: Tensor,
        norm_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        op = ops.mhc_post_pre_reference if streams.dtype == torch.float64 else ops.mhc_post_pre
        return op(
            sublayer,
            streams,
            post,
            comb,
            fn,
            scale,
            base,
            norm_weight,
            norm_eps=self.norm_eps,
            hc_eps=self.hc_eps,
            sinkhorn_iterations=self.sinkhorn_iterations,
            rms_eps=self.norm_eps,
        )

    def head(self, streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        op = ops.mhc_head_reference if streams.dtype == torch.float64 else ops.mhc_head
        return op(streams, fn, scale, base, norm_eps=self.norm_eps, hc_eps=self.hc_eps)


def mixing_parameters(
    hidden: int, mixes: int, scales: int, dtype: torch.dtype, trainable: bool
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """fn [mixes, 4 hidden], base [mixes], scale [scales], as the release stores them."""
    fn = empty_parameter(mixes, STREAMS * hidden, dtype=dtype, trainable=trainable)
    base = empty_parameter(mixes, dtype=dtype, trainable=trainable)
    scale = empty_parameter(scales, dtype=dtype, trainable=trainable)
    if not fn.is_meta:
        nn.init.normal_(fn, std=(STREAMS * hidden) ** -0.5)
        nn.init.zeros_(base)
        nn.init.ones_(scale)
    return fn, base, scale


class HyperConnection(nn.Module):
    """Wraps a sublayer: its input is a mix of 4 residual streams, its output is mixed back into them.

    Source: DeepSeek-V4 report, 2.2; arXiv 2512.24880; the official inference code.

    Args:
        config: of the model (`hidden_size`, `hc_eps`, `hc_sinkhorn_iters`, `rms_norm_eps`).
        dtype: of the mixing weights.
    """

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.settings = MixingSettings.of(config)
        self.fn, self.base, self.scale = mixing_parameters(config.hidden_size, MIXES, 3, dtype, True)

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """streams [..., 4, hidden]; sublayer maps [..., hidden] to [..., hidden]. Returns the new streams."""
        flat = streams.reshape(-1, STREAMS, streams.shape[-1])
        mixed, post, comb = self.settings.pre(flat, self.fn, self.scale, self.base)
        out = sublayer(mixed.view(*streams.shape[:-2], streams.shape[-1]))
        return self.settings.post(out.reshape(mixed.shape), flat, post, comb).view(streams.shape)
