"""Norms, rotations and quantisers of rows against eager torch of the same dtype.

`context` counts rows at once. These ops are bound by bytes: each input and each output once. Quantisers are held to the
codes of their definition by way of the values they stand for; what quantises and goes on (index_query) likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.norm_rope import eager_norm, eager_norm_rope, eager_rope
from dsv4.model.config import Config

#: Ops of this family, and the rows at once unless told otherwise.
OPS = (
    "rms_norm", "kv_norm_rope", "apply_rope", "rope_rows", "index_query", "hadamard", "quantize_fp8", "quantize_fp4",
    "dequantize_fp8", "dequantize_fp4", "dequantize_weight",
)  # fmt: skip
CONTEXTS = (1, 4096)
QUICK_CONTEXTS = (256,)

_MOST_ROWS = 4096
_CHECKED_ROWS = 64
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The largest magnitude of each code but the last: ties go to the even code.
_E2M1_BETWEEN = (0.25, 0.75 - 2.0**-24, 1.25, 1.75 - 2.0**-23, 2.5, 3.5 - 2.0**-22, 5.0)


def _sylvester(size: int, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix / size**0.5).to(dtype)


def eager_quantized(x: Tensor, block: int, largest: float, floor: float) -> tuple[Tensor, Tensor]:
    """x over its blocks' power-of-two scales, and these."""
    blocks = x.float().unflatten(-1, (-1, block))
    scale = (blocks.abs().amax(-1, keepdim=True).clamp_min(floor) / largest).log2().ceil().exp2()
    return (blocks / scale).clamp(-largest, largest), scale


def eager_fp8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    codes, scale = eager_quantized(x, block, 448.0, 1e-4)
    return codes.to(torch.float8_e4m3fn).flatten(-2), scale.squeeze(-1).to(torch.float8_e8m0fnu)


def eager_fp4(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    values, scale = eager_quantized(x, block, 6.0, 6 * 2.0**-126)
    between = torch.tensor(_E2M1_BETWEEN, device=x.device)
    codes = (torch.bucketize(values.abs(), between) + 8 * values.signbit()).to(torch.uint8).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale.squeeze(-1).to(torch.float8_e8m0fnu)


def _eager_values(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    return (codes.float().unflatten(-1, (-1, block)) * scale.float().unsqueeze(-1)).bfloat16().flatten(-2)


def _fp8_values(stored: tuple[Tensor, Tensor]) -> Tensor:
    return _eager_values(stored[0], stored[1], 128)


def _eager_fp4_values(codes: Tensor, scale: Tensor) -> Tensor:
    table = torch.tensor((*_E2M1, *(-value for value in _E2M1)), device=codes.device)
    return _eager_values(table[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()], scale, 32)


class _Rows:
    """The cases of `rows` rows of one model."""

    def __init__(self, name: str, rows: int, device: torch.device):
        self.name, self.config, self.rows, self.device = name, Config.preset(name), rows, device
        self.rope_dim = self.config.qk_rope_head_dim
        self.frequency = ops.rope_frequencies(self.rope_dim, self.config.rope_theta).to(device)
        self.position = torch.arange(rows, device=device) * 251
        self.rope = ops.rope_rows_reference(self.position, self.frequency)
        self.hidden = torch.randn(rows, self.config.hidden_size).bfloat16().to(device)
        self.query = torch.randn(rows, self.config.index_n_heads, self.config.index_head_dim).bfloat16().to(device)

    def case(
        self,
        op: str,
        sizes: str,
        run: Callable[..., Any],
        eager: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        *,
        exact: Callable[..., Tensor],
        values: Callable[[Any], Tensor] = lambda result: result,
        shared: tuple[Tensor, ...] = (),
    ) -> Case:
        """`run` and `eager` of the inputs (a row each for every row) and of those that all rows share. `exact`, the
        truth in float64, is compared with the `values` of their results."""

        def compare() -> list[Comparison]:
            some = [x[:_CHECKED_ROWS] for x in inputs]
            return [Comparison(values(run(*some, *shared)), values(eager(*some, *shared)), exact(*some, *shared))]

        results = run(*inputs, *shared)
        moved = (*inputs, *shared, *(results if isinstance(results, tuple) else (results,)))
        return Case(
            op, f"{self.name} rows={self.rows} {sizes}", lambda: run(*inputs, *shared), "eager torch",
            lambda: eager(*inputs, *shared), compare, 0.0, float(sum(x.nbytes for x in moved)), "none",
        )  # fmt: skip

    def rms_norm(self) -> Case:
        weight = (torch.rand(self.config.hidden_size) + 0.5).bfloat16().to(self.device)

        return self.case(
            "rms_norm", f"hidden={self.config.hidden_size} bf16", ops.rms_norm, eager_norm, (self.hidden,),
            exact=lambda x, w: eager_norm(x.double(), w.double()), shared=(weight,),
        )  # fmt: skip

    def kv_norm_rope(self) -> Case:
        head_dim = self.config.head_dim
        kv = torch.randn(self.rows, head_dim).bfloat16().to(self.device)
        weight = (torch.rand(head_dim) + 0.5).bfloat16().to(self.device)
        return self.case(
            "kv_norm_rope", f"head_dim={head_dim} bf16", lambda x, r, w: ops.kv_norm_rope(x, w, r),
            lambda x, r, w: eager_norm_rope(x, w, r), (kv, self.rope),
            exact=lambda x, r, w: eager_norm_rope(x.double(), w.double(), r.double()), shared=(weight,),
        )  # fmt: skip

    def apply_rope(self) -> Case:
        return self.case(
            "apply_rope", self._heads(), ops.apply_rope, eager_rope, (self.query, self.rope),
            exact=lambda x, r: eager_rope(x.double(), r.double()),
        )  # fmt: skip

    def rope_rows(self) -> Case:
        def eager(position: Tensor, frequency: Tensor) -> Tensor:
            angle = position.float().unsqueeze(-1) * frequency
            return torch.stack((angle.cos(), angle.sin()), -1)

        def exact(position: Tensor, frequency: Tensor) -> Tensor:
            angle = (position.float().unsqueeze(-1) * frequency).double()
            return torch.stack((angle.cos(), angle.sin()), -1)

        return self.case(
            "rope_rows", f"rope_dim={self.rope_dim} f32", ops.rope_rows, eager, (self.position,),
            exact=exact, shared=(self.frequency,),
        )  # fmt: skip

    def index_query(self) -> Case:
        matrix = _sylvester(self.config.index_head_dim, torch.bfloat16).to(self.device)

        def eager(x: Tensor, rope: Tensor) -> Tensor:
            return _eager_fp4_values(*eager_fp4(ops.apply_rope_reference(x, rope) @ matrix, 32))

        return self.case(
            "index_query", self._heads(), ops.index_query, eager, (self.query, self.rope),
            exact=lambda x, r: ops.index_query_reference(x, r).double(),
        )  # fmt: skip

    def hadamard(self) -> Case:
        matrix = _sylvester(self.config.index_head_dim, torch.bfloat16).to(self.device)
        wide = _sylvester(self.config.index_head_dim, torch.float64).to(self.device)
        return self.case(
            "hadamard", self._heads(), ops.hadamard, lambda x: x @ matrix, (self.query,),
            exact=lambda x: x.double() @ wide,
        )  # fmt: skip

    def quantize_fp8(self) -> Case:
        return self.case(
            "quantize_fp8", f"n={self.config.hidden_size} block=128 bf16", lambda x: ops.quantize_fp8(x, 128),
            lambda x: eager_fp8(x, 128), (self.hidden,), values=_fp8_values,
            exact=lambda x: _fp8_values(ops.quantize_fp8_reference(x, 128)).double(),
        )  # fmt: skip

    def quantize_fp4(self) -> Case:
        return self.case(
            "quantize_fp4", f"n={self.config.hidden_size} block=32 bf16", ops.quantize_fp4,
            lambda x: eager_fp4(x, 32), (self.hidden,), values=lambda result: _eager_fp4_values(*result),
            exact=lambda x: _eager_fp4_values(*ops.quantize_fp4_reference(x)).double(),
        )  # fmt: skip

    def dequantize_fp8(self) -> Case:
        return self.case(
            "dequantize_fp8", f"n={self.config.hidden_size} block=128 bf16", ops.dequantize_fp8,
            lambda *stored: _fp8_values(stored), ops.quantize_fp8_reference(self.hidden),
            exact=lambda *stored: ops.dequantize_fp8_reference(*stored, 128, torch.float64),
        )  # fmt: skip

    def dequantize_fp4(self) -> Case:
        return self.case(
            "dequantize_fp4", f"n={self.config.hidden_size} block=32 bf16", ops.dequantize_fp4, _eager_fp4_values,
            ops.quantize_fp4_reference(self.hidden),
            exact=lambda *stored: ops.dequantize_fp4_reference(*stored, 32, torch.float64),
        )  # fmt: skip

    def dequantize_weight(self) -> Case:
        """FP8, wq_b; however many rows there are."""
        size = self.config.num_attention_heads * self.config.head_dim, self.config.q_lora_rank
        codes = torch.randn(size).to(torch.float8_e4m3fn).to(self.device)
        scale = torch.rand(size[0] // 128, size[1] // 128).log2().ceil().exp2().to(self.device)

        def eager(codes: Tensor, scale: Tensor) -> Tensor:
            blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            return (codes.float() * blocks).bfloat16()

        def compare() -> list[Comparison]:
            exact = ops.dequantize_weight_reference(codes, scale, torch.float64)
            return [Comparison(ops.dequantize_weight(codes, scale), eager(codes, scale), exact)]

        return Case(
            "dequantize_weight", f"{self.name} wq_b out={size[0]} in={size[1]} fp8",
            lambda: ops.dequantize_weight(codes, scale), "eager torch", lambda: eager(codes, scale), compare, 0.0,
            3.0 * codes.numel() + scale.nbytes, "none",
        )  # fmt: skip

    def _heads(self) -> str:
        return f"heads={self.config.index_n_heads} dim={self.config.index_head_dim} bf16"


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the sizes of the model `shape`, on `context` rows at once (4096 at most: prompts come in chunks)."""
    torch.manual_seed(0)
    yield getattr(_Rows(shape, min(context, _MOST_ROWS), device), op)()
