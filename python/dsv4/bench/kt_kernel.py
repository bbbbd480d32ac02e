"""kt-kernel's experts (KTransformers) on the FP4 weights of a benchmark: e2m1 codes with a scale every 32 inputs,
multiplied in AMX or AVX-512, SwiGLU clamped alike. Its activations stay bfloat16 where ours are quantised.

It is no dependency, since it pins a version of torch of its own: `pip install --no-deps kt-kernel==0.7.2 gguf`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NAME = "kt-kernel FP4"
_MISSING = "not run: pip install --no-deps kt-kernel==0.7.2 gguf"


class _Experts:
    """Experts of kt-kernel, which repacks the weights as it loads them."""

    def __init__(self, stored: Sequence[tuple[Tensor, ...]], top_k: int, tokens: int, limit: float):
        from kt_kernel import kt_kernel_ext

        torch.set_flush_denormal(False)  # loading it turns that on, for everything else in the process

        workers = kt_kernel_ext.WorkerPoolConfig()
        workers.subpool_count, workers.subpool_numa_map = 1, [0]
        workers.subpool_thread_count = [torch.get_num_threads()]
        self._cpu = kt_kernel_ext.CPUInfer(workers)
        (experts, inter, _), hidden = stored[0][0].shape, stored[2][0].shape[1]
        self._on_gpu = torch.zeros(experts, dtype=torch.uint8)
        config = kt_kernel_ext.moe.MOEConfig(experts, top_k, hidden, inter, self._on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len, config.swiglu_limit = 0, self._cpu.backend_, tokens, limit
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, 32, False
        scales = [scale.float().bfloat16() for _, scale in stored]  # powers of two: exact
        for name, (codes, _), scale in zip(("gate", "up", "down"), stored, scales, strict=True):
            setattr(config, f"{name}_projs", [[matrix.data_ptr() for matrix in codes]])
            setattr(config, f"{name}_scales", [[matrix.data_ptr() for matrix in scale]])
        self._moe = kt_kernel_ext.moe.AMXFP4_KGroup_MOE(config)
        order = torch.arange(experts)
        self._cpu.submit(self._moe.load_weights_task(order.data_ptr()))
        self._cpu.sync()

    def __call__(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        out, count = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        rows, ids, shares = x.contiguous(), indices.long().contiguous(), weights.float().contiguous()
        operands = (tensor.data_ptr() for tensor in (ids, shares, rows, out))
        self._cpu.submit(self._moe.forward_task(count.data_ptr(), ids.shape[1], *operands, False))
        self._cpu.sync()
        return out


def against_kt_kernel(
    x: Tensor, weights: Tensor, indices: Tensor, stored: Sequence[tuple[Tensor, ...]], limit: float
) -> dict[str, Any]:
    """`baseline` and `run_baseline` of a case of moe_experts; the latter None where kt-kernel is missing.

    Args:
        x, weights, indices: as of moe_experts.
        stored: codes [experts, out, in / 2] uint8 and scales [experts, out, in / 32] e8m0 of w1, w3 and w2.
    """
    if x.device.type != "cpu" or importlib.util.find_spec("kt_kernel") is None:
        return {"baseline": f"{_NAME} {_MISSING}", "run_baseline": None}
    prepare = functools.cache(lambda: _Experts(stored, indices.shape[1], len(x), limit))
    return {"baseline": _NAME, "run_baseline": lambda: prepare()(x, weights, indices)}
