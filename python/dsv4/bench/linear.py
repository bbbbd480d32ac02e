"""The linear layers on stored weights against torch's product with the dequantised or plain weight, on a GPU also
beside its product of FP8 operands (bench/library_products).

`context` counts rows: one decodes, thousands prefill. FLOPs: 2 in out a row; bytes: codes and scales of the weight,
rows, outputs. The check is against float64 with the activations as the definition quantises them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4 import ops
from dsv4.bench.library_products import against_scaled_mm
from dsv4.bench.measure import Case, Comparison
from dsv4.bench.pages import spread
from dsv4.model.config import Config

#: Ops of this family, and the rows at once unless told otherwise.
OPS = ("fp8_linear", "grouped_linear", "fp4_linear", "dense_linear")
CONTEXTS = (1, 8, 64, 2048)
QUICK_CONTEXTS = (1, 64)

_CHECKED_ROWS = 8


def most_rows(device: torch.device) -> int:
    """Of a prompt's chunk."""
    return 4096 if device.type == "cpu" else 8192


def _matrices(op: str, config: Config) -> list[tuple[str, int, int, int]]:
    """(name, groups, inputs, outputs a group) of the model's matrices that `op` multiplies with."""
    wide = config.num_attention_heads * config.head_dim
    groups = config.o_groups
    if op == "grouped_linear":
        return [("wo_a", groups, wide // groups, config.o_lora_rank)]
    if op == "dense_linear":
        hidden = config.hidden_size
        return [("wkv", 1, hidden, 2 * config.head_dim), ("weights_proj", 1, hidden, config.index_n_heads)]
    if op == "fp4_linear":
        hidden, inter = config.hidden_size, config.moe_intermediate_size
        return [("w1", 1, hidden, inter), ("w2", 1, inter, hidden)]
    return [
        ("wq_a", 1, config.hidden_size, config.q_lora_rank),
        ("wq_b", 1, config.q_lora_rank, wide),
        ("wo_b", 1, groups * config.o_lora_rank, config.hidden_size),
    ]


def draw_weight(kind: str, *size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [..., out, in]: "fp8" in blocks of 128 x 128, "fp4" in rows of 32."""
    *leading, outputs, inputs = size
    if kind == "fp4":
        codes = torch.randint(0, 256, (*leading, outputs, inputs // 2), dtype=torch.uint8, device=device)
        blocks = (outputs, -(-inputs // 32))
    else:
        codes = torch.randn(*leading, outputs, inputs, device=device).to(torch.float8_e4m3fn)
        blocks = (-(-outputs // 128), -(-inputs // 128))
    scale = torch.randint(118, 122, (*leading, *blocks), dtype=torch.uint8, device=device)
    return codes, scale.view(torch.float8_e8m0fnu)


def _cases(op: str, shape: str, matrix: tuple[str, int, int, int], rows: int, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    name, groups, inputs, outputs = matrix
    kind = "fp4" if op == "fp4_linear" else "fp8"
    weight, scale = draw_weight(kind, groups * outputs, inputs, device=device)
    grouped = op == "grouped_linear"
    x = torch.randn(rows, *([groups] if grouped else []), inputs, device=device).bfloat16()
    dense = ops.dequantize_weight(weight, scale, torch.bfloat16)
    call = getattr(ops, op)

    def product(x: Tensor, w: Tensor) -> Tensor:
        if not grouped:
            return F.linear(x, w)
        return torch.bmm(x.transpose(0, 1), w.unflatten(0, (groups, outputs)).mT).transpose(0, 1)

    def compare() -> list[Comparison]:
        index = spread(rows, _CHECKED_ROWS).to(device)
        some = x[index] if grouped else ops.fp8_round_trip(x[index])
        exact = product(some.double(), dense.double())
        return [Comparison(call(x, weight, scale)[index], product(some, dense), exact)]

    text = f"{shape} {name} rows={rows} in={inputs} out={outputs}{f' groups={groups}' if grouped else ''} {kind}"
    case = Case(
        op, text, lambda: call(x, weight, scale), "eager torch bf16", lambda: product(x, dense), compare,
        2.0 * rows * groups * inputs * outputs,
        weight.nbytes + scale.nbytes + x.nbytes + 2.0 * rows * groups * outputs, "bfloat16",
    )  # fmt: skip
    yield case
    if op == "fp8_linear" and device.type == "cuda":
        yield replace(case, **against_scaled_mm(x, weight, scale, case.run))


def _dense_case(shape: str, matrix: tuple[str, int, int, int], rows: int, device: torch.device) -> Case:
    """float32 weights, as the compressors and the head of the official program multiply."""
    torch.manual_seed(0)
    name, _, inputs, outputs = matrix
    x = torch.randn(rows, inputs).bfloat16().to(device)
    weight = torch.randn(outputs, inputs).to(device)

    def call(x: Tensor) -> Tensor:
        return ops.dense_linear(x, weight, torch.float32)

    def compare() -> list[Comparison]:
        index = spread(rows, _CHECKED_ROWS).to(device)
        some = x[index]
        exact = F.linear(some.double(), weight.double())
        return [Comparison(call(x)[index], F.linear(some.float(), weight), exact)]

    text = f"{shape} {name} rows={rows} in={inputs} out={outputs} float32"
    return Case(
        "dense_linear", text, lambda: call(x), "eager torch f32", lambda: F.linear(x.float(), weight), compare,
        2.0 * rows * inputs * outputs, weight.nbytes + x.nbytes + 4.0 * rows * outputs, "float32",
    )  # fmt: skip


def cases(op: str, shape: str, context: int, device: torch.device) -> Iterator[Case]:
    """`op` for the matrices of the model `shape`, on `context` rows at once: at most a chunk of a prompt."""
    rows = min(context, most_rows(device))
    for matrix in _matrices(op, Config.preset(shape)):
        if op == "dense_linear":
            yield _dense_case(shape, matrix, rows, device)
        else:
            yield from _cases(op, shape, matrix, rows, device)
