"""Mixture of experts: router, routed experts and the shared expert."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.model.config import Config
from dsv4.nn.linear import (
    FP8_BLOCK,
    Fp8Linear,
    Linear,
    StoredWeights,
    as_taken,
    check_mode,
    empty_parameter,
    fill_normal,
    linear,
)

FP4_BLOCK = 32
_MATRICES = ("w1", "w3", "w2")  # gate, up, down


class Router(nn.Module):
    """Chooses `num_experts_per_tok` experts a token from sqrt(softplus(x W^T)), in float32.

    Hash layers look the experts up by token id (`tid2eid`); the others add `bias` to the scores for the choice alone.
    The weights are the chosen scores, normalised and scaled.
    """

    def __init__(self, config: Config, hash_routing: bool, *, trainable: bool, dtype: torch.dtype):
        super().__init__()
        self.top_k, self.route_scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = empty_parameter(config.n_routed_experts, config.hidden_size, dtype=dtype, trainable=trainable)
        fill_normal(self.weight)
        self.bias: nn.Parameter | None = None
        self.tid2eid: Tensor | None
        self.register_buffer("tid2eid", None)
        if hash_routing:
            self.tid2eid = torch.empty(config.vocab_size, self.top_k, dtype=torch.int64)
            if not self.tid2eid.is_meta:
                self.tid2eid = torch.rand(config.vocab_size, config.n_routed_experts).argsort(-1)[:, : self.top_k]
        else:
            bias_dtype = torch.promote_types(dtype, torch.float32)
            self.bias = empty_parameter(config.n_routed_experts, dtype=bias_dtype, trainable=False)
            if not self.bias.is_meta:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> weights float32 [tokens, top_k], experts int32 [tokens, top_k]."""
        if self.tid2eid is not None and token_ids is None:
            raise ValueError("MixtureOfExperts: this layer routes by token id: pass token_ids, int64 [tokens]")
        return ops.moe_gate(
            x,
            self.weight,
            self.top_k,
            bias=None if self.bias is None else self.bias.to(torch.promote_types(x.dtype, torch.float32)),
            token_ids=token_ids if self.tid2eid is not None else None,
            tid2eid=self.tid2eid,
            route_scale=self.route_scale,
        )


class Experts(nn.Module):
    """Weights of all routed experts, stacked: w1 (gate) and w3 (up) [E, inter, hidden], w2 (down) [E, hidden, inter].

    As released, FP4 (two codes a byte along the input, one scale per 32 inputs) or FP8 (128 x 128 blocks); plain in
    mode "off".
    """

    def __init__(self, config: Config, quantization: str, dtype: torch.dtype):
        super().__init__()
        experts, hidden, inter = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        for name in _MATRICES:
            rows, columns = (hidden, inter) if name == "w2" else (inter, hidden)
            if quantization == "off" or config.expert_dtype == "bf16":
                self._add(name, (experts, rows, columns), dtype)
            elif config.expert_dtype == "fp4":
                if columns % 2:
                    raise ValueError(f"FP4 experts need even widths, got {columns}; use quantization='off'")
                self._add(name, (experts, rows, columns // 2), torch.int8)
                self._add(name + "_scale", (experts, rows, -(-columns // FP4_BLOCK)), torch.float8_e8m0fnu)
            else:
                blocks = (experts, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
                self._add(name, (experts, rows, columns), torch.float8_e4m3fn)
                self._add(name + "_scale", blocks, torch.float8_e8m0fnu)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        trainable = dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        parameter = empty_parameter(*shape, dtype=dtype, trainable=trainable)
        self.register_parameter(name, parameter)
        if parameter.is_meta:
            return
        with torch.no_grad():
            if trainable:
                fill_normal(parameter)
            elif dtype == torch.int8:
                parameter.copy_(torch.randint(-128, 128, shape, dtype=torch.int8))
            elif dtype == torch.float8_e4m3fn:
                parameter.copy_((torch.randn(shape) * 64).clamp(-448, 448))
            else:  # scales: bring codes of deviation about 3 (FP4) or 64 (FP8) down to 1 / sqrt(inputs)
                codes = self.get_parameter(name.removesuffix("_scale"))
                inputs, deviation = (codes.shape[-1] * 2, 3) if codes.dtype == torch.int8 else (codes.shape[-1], 64)
                exponent = math.floor(math.log2(inputs**-0.5 / deviation))
                parameter.copy_(torch.full(shape, 2.0**exponent))

    def forward(
        self, x: Tensor, weights: Tensor, indices: Tensor, shared: tuple[Tensor, ...], swiglu_limit: float
    ) -> Tensor:
        """`ops.moe_experts` with these weights, plain ones in the dtype of x."""
        return ops.moe_experts(
            x,
            weights,
            indices,
            *(as_taken(getattr(self, name), x.dtype) for name in _MATRICES),
            *(getattr(self, name + "_scale", None) for name in _MATRICES),
            shared=shared,
            swiglu_limit=swiglu_limit,
        )


class SharedExpert(nn.Module):
    """The expert that every token passes; FP8 pairs in mode "checkpoint"."""

    def __init__(self, config: Config, quantization: str, dtype: torch.dtype):
        super().__init__()
        hidden, inter = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.w1 = linear(hidden, inter, quantization, dtype)
        self.w3 = linear(hidden, inter, quantization, dtype)
        self.w2 = linear(inter, hidden, quantization, dtype)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What ops.moe_experts takes as `shared` for activations of this dtype."""
        tensors = []
        for name in _MATRICES:
            module = getattr(self, name)
            if not isinstance(module, (Linear, Fp8Linear)):  # an adapter would be left out without a word
                raise TypeError(
                    f"MixtureOfExperts: shared_experts.{name} must be a dsv4.nn.Linear or Fp8Linear, whose weight goes "
                    f"into one op with the experts'; forward of {type(module).__name__} would not run"
                )
            if hasattr(module.weight, "placements"):  # a DTensor: what gathers it is a hook, which does not run either
                raise TypeError(
                    f"MixtureOfExperts: shared_experts.{name} is still sharded, since its weight goes into one op with "
                    "the experts'; use fully_shard on the ffn or the layer in place of shared_experts"
                )
            tensors += [as_taken(module.weight, dtype), *([module.scale] if isinstance(module, Fp8Linear) else [])]
        return tuple(tensors)


class MixtureOfExperts(StoredWeights):
    """Routed experts, each w2(silu(gate) * up * weight) with a clamp on gate and up, plus the shared expert.

    Source: DeepSeek-V4 report, 2.1; the official inference code.

    Args:
        config: of the model.
        hash_routing: experts by token id (the first `num_hash_layers` layers of a model).
        quantization: "checkpoint" (weights as released, FP8 activations) or "off".
        dtype: of activations and, in mode "off", of the weights: bfloat16, float32 or float64.
    Raises:
        ValueError: unknown quantization or dtype.
    """

    def __init__(
        self,
        config: Config,
        hash_routing: bool = False,
        quantization: str = "checkpoint",
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        quantized = check_mode(quantization, dtype) == "checkpoint"
        self.swiglu_limit = config.swiglu_limit
        self.gate = Router(config, hash_routing, trainable=not quantized, dtype=dtype)
        self.experts = Experts(config, quantization, dtype)
        self.shared_experts = SharedExpert(config, quantization, dtype) if config.n_shared_experts else None

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """The experts' sum for every row.

        Args:
            x: [..., hidden] bfloat16, float32 or float64; plain weights are converted to its dtype.
            token_ids: [...] int32 or int64, for hash routing.
        Returns: the shape and dtype of x.
        Raises:
            ValueError: token_ids are missing where experts are chosen by them.
            TypeError: a matrix of the shared expert was wrapped, or is sharded apart from the others.
            RuntimeError: another width or dtype, or a token id outside the vocabulary.
        """
        flat = x.reshape(-1, x.shape[-1])
        weights, indices = self.gate(flat, None if token_ids is None else token_ids.reshape(-1))
        shared = self.shared_experts.tensors(x.dtype) if self.shared_experts is not None else ()
        return self.experts(flat, weights, indices, shared, self.swiglu_limit or 0.0).view(x.shape)
