"""What torch's FlopCounterMode counts: the benchmarks' FLOPs, the planner's, and by hand where shapes bound them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dsv4
from dsv4 import bench
from dsv4.ops import _registry
from dsv4.planner import plan

CONFIG = dsv4.Config.preset("nano")
CONTEXT = 1024
# These have no product of matrices.
OTHERS = {
    "apply_rope", "compress", "compress_entries", "compress_entries_backward", "dequantize_fp4", "dequantize_fp8",
    "dequantize_weight", "hadamard", "index_query", "kv_norm_rope", "kv_norm_rope_backward", "moe_map", "quantize_fp4",
    "quantize_fp8", "query_norm_rope", "query_norm_rope_backward", "rms_norm", "rms_norm_backward", "rope_rows",
    "store_window",
}  # fmt: skip
# FLOPs a token and unit of width that the benchmarks count for the norm of the streams.
NORM = {"mhc_pre": 8, "mhc_post_pre": 8, "mhc_head": 8, "mhc_pre_backward": 16}


def counted(run: Callable[[], Any]) -> Counter[str]:
    """FLOPs by op."""
    with FlopCounterMode(display=False) as counter:
        run()
    return Counter({str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()})


def test_every_op_is_counted_or_has_no_product() -> None:
    """And so is the op that runs its reference."""
    ops = {op: op.removeprefix("_").removesuffix("_reference") for op in _registry.registered_ops()}
    for op, name in ops.items():
        assert (getattr(torch.ops.dsv4, op) in flop_registry) == (name not in OTHERS), op
    assert set(ops.values()) > OTHERS


@pytest.mark.parametrize("op", [op for op in bench.families() if op not in OTHERS])
def test_as_many_as_the_benchmark_counts(op: str) -> None:
    """More where rows of a prompt see fewer entries than there are, which shapes do not say."""
    exact = 0
    for case in bench.families()[op].cases(op, "nano", CONTEXT, torch.device("cpu")):
        found = counted(case.run)[f"dsv4.{op}"]
        expected = case.flops
        if op in NORM:
            expected -= NORM[op] * CONTEXT * CONFIG.hidden_size
        exact += found == expected
        bounded = "prefill" in case.shape or (op == "sparse_attention_backward" and " hca " in case.shape)
        assert found == expected or (bounded and expected < found < 2.1 * expected), case.shape
    assert exact > 0


def test_decoding_is_what_the_planner_counts() -> None:
    """But for the products with streams, and of the index's weights with its scores, which it leaves out."""
    model = dsv4.init(CONFIG)
    cache = model.new_cache()
    ids = torch.randint(CONFIG.vocab_size, (1, CONTEXT))
    with torch.no_grad():
        model(ids[:, :-1], cache=cache)
        found = counted(lambda: model(ids[:, -1:], cache=cache))
    ratios = [CONFIG.layer_ratio(layer) for layer in range(CONFIG.num_hidden_layers)]
    streams = (2 * (8 + 40) * len(ratios) + 8) * CONFIG.hidden_size
    scores = 2 * CONFIG.index_n_heads * (CONTEXT // CONFIG.csa_ratio) * ratios.count(CONFIG.csa_ratio)
    terms = {what: flops for what, flops, _ in plan(CONFIG, CONTEXT).flops.terms}
    assert found["dsv4.sparse_attention"] == terms["attention"]
    assert found["dsv4.index_topk"] == terms["index scores"] + scores
    assert found.total() == plan(CONFIG, CONTEXT).flops.raw + streams + scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training(dtype: torch.dtype) -> None:
    """float64 runs the references, whose inside torch does not see; but for mHC's, which it counts by itself."""
    config = replace(CONFIG, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
    model = dsv4.init(config, 0, "off", dtype)
    ids, logits = torch.randint(config.vocab_size, (2, 256)), []
    forward = counted(lambda: logits.append(model(ids)))
    back = counted(lambda: logits[0].sum().backward())
    name = (lambda op: f"dsv4.{op}") if dtype == torch.float32 else (lambda op: f"dsv4._{op}_reference")
    rows, width = ids.numel(), config.hidden_size
    experts, inter = config.num_experts_per_tok + config.n_shared_experts, config.moe_intermediate_size
    assert forward[name("moe_experts")] == 3 * 2 * 3 * rows * experts * width * inter
    keys = 3 * 128 + min(64, 256 // 4) + 256 // 128
    assert forward[name("sparse_attention")] == 4 * rows * config.num_attention_heads * config.head_dim * keys
    assert forward[name("index_topk")] == 2 * rows * config.index_n_heads * (config.index_head_dim + 1) * 256 // 4

    assert 2 * back[name("sparse_attention_backward")] == 5 * forward[name("sparse_attention")]
    assert 3 * back[name("moe_experts_backward")] == 8 * forward[name("moe_experts")]
    assert back[name("dense_linear")] == 3 * forward[name("moe_gate")]  # its logits are taken again
    assert back["aten.bmm"] == 2 * forward["dsv4._grouped_linear_reference"]  # which many rows take
    if dtype == torch.float32:
        index = 2 * width * 2 * config.index_head_dim + width * config.index_n_heads
        index += config.q_lora_rank * config.index_n_heads * config.index_head_dim
        assert back["aten.mm"] == 2 * (forward["aten.mm"] - 2 * rows * index)  # a selection has no gradient
        assert back["dsv4.mhc_post_backward"] == 2 * 40 * 6 * rows * width
        assert back["dsv4.mhc_pre_backward"] == 600 * 6 * rows * width  # the input again, for the norm after it
        assert back["dsv4.mhc_head_backward"] == 112 * rows * width


def test_frozen_weights_are_not_counted() -> None:
    """Of experts gate and up again, and what goes into x; of mHC all but the product into fn."""
    model = dsv4.init(replace(CONFIG, num_hidden_layers=1, compress_ratios=(0,)), 0, "off", torch.float32)
    ids, back = torch.randint(CONFIG.vocab_size, (1, 64)), []
    for frozen in (False, True):
        for name, parameter in model.named_parameters():
            part = any(part in name for part in (".experts.", "shared", "_fn"))
            parameter.requires_grad_(not (frozen and part))
        out = model(ids).sum()
        back.append(counted(out.backward))
    everything, some = back
    assert 8 * some["dsv4.moe_experts_backward"] == 5 * everything["dsv4.moe_experts_backward"]
    fn = 2 * 24 * 4 * ids.numel() * CONFIG.hidden_size
    assert everything["dsv4.mhc_pre_backward"] - some["dsv4.mhc_pre_backward"] == 2 * fn


def test_pages_of_bytes_have_no_gradient() -> None:
    formula = flop_registry[torch.ops.dsv4.sparse_attention_backward]
    out, lse, tables = torch.empty(3, 4, 32), torch.empty(3, 4), torch.empty(1, 2)

    def flops(raw: torch.Tensor, pages: torch.Tensor | None, indices: torch.Tensor | None) -> int:
        table = None if pages is None else tables
        return formula(out, lse, lse, out, raw, tables, pages, table, lse, lse, indices, None, lse, None, 100, 1.0)

    plain, stored = torch.empty(2, 64, 32), torch.empty(2, 4096)
    assert flops(plain, None, None) == 10 * 3 * 4 * 32 * 100
    assert flops(stored, plain, None) == 3 * 4 * 32 * (6 * 100 + 10 * 2 * 64)
    assert flops(plain, stored, torch.empty(3, 7)) == 3 * 4 * 32 * (10 * 100 + 6 * 7)
    assert flops(plain, stored, torch.empty(3, 999)) == 3 * 4 * 32 * (10 * 100 + 6 * 2 * 64)


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "dsv4"])
def test_counted_whichever_is_imported_first(first: str) -> None:
    code = f"""
import sys, {first}, torch, dsv4
assert ("torch.utils.flop_counter" in sys.modules) == {first != "dsv4"}  # it would import triton
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    dsv4.ops.dense_linear(torch.ones(3, 5), torch.ones(7, 5))
assert counter.get_total_flops() == 2 * 3 * 5 * 7
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
