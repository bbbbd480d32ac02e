"""FSDP2 in two processes: a step on half of the batch each has the gradients of the model in one piece."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.functional import cross_entropy

import dsv4

CONFIG = replace(
    dsv4.Config.preset("nano"),
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0),
    num_nextn_predict_layers=1,
    num_hash_layers=1,
    vocab_size=64,
)
IDS = torch.randint(64, (4, 150), generator=torch.Generator().manual_seed(0))
FULL = StateDictOptions(full_state_dict=True)


def gradients(model: dsv4.Transformer, ids: Tensor) -> dict[str, Tensor]:
    after_next = model.predict_next(model.hidden_streams(ids[:, :-2]), ids[:, 1:-1])
    loss = cross_entropy(after_next.flatten(0, 1), ids[:, 2:].flatten())
    (loss + cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def model() -> dsv4.Transformer:
    made = dsv4.init(CONFIG, 0, "off", torch.float32)
    for layer in made.layers:
        if layer.attn.indexer is not None:
            layer.attn.indexer.requires_grad_(False)
    return made


def process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for dtype in (torch.float32, torch.bfloat16):
        step(rank, dtype, folder / str(dtype))
    shared_experts_apart()
    dist.destroy_process_group()


def step(rank: int, dtype: torch.dtype, folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": init_device_mesh("cpu", (2,)), "mp_policy": policy}
    inside = options | {"mp_policy": replace(policy, cast_forward_inputs=False)}  # routing weights stay float32
    ours = model()
    for block in (*ours.layers, *ours.mtp):
        fully_shard(block.ffn.experts, **inside)
        if block.attn.ratio:
            fully_shard(block.attn.compressor, **inside)
        fully_shard(block, **options)
    fully_shard(ours, **options)
    for method in ("hidden_streams", "predict_next"):
        register_fsdp_forward_method(ours, method)
    found = {name: g.full_tensor() for name, g in gradients(ours, IDS[2 * rank : 2 * rank + 2]).items()}
    halves = [gradients(model().to(dtype), half) for half in IDS.split(2)]
    assert found.keys() == halves[0].keys()
    for name, gradient in found.items():
        expected = (halves[0][name].float() + halves[1][name].float()) / 2
        # What two passes leave in the model's own parameters is added in another order.
        assert (gradient - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm(), name

    with torch.no_grad():
        expected = ours(IDS)
    dcp.save(get_model_state_dict(ours), checkpoint_id=folder)
    other = get_model_state_dict(dsv4.init(CONFIG, 1, "off", torch.float32))  # in one piece, as two read it
    dcp.load(other, checkpoint_id=folder)
    whole = get_model_state_dict(ours, options=FULL)
    if rank == 0:
        assert all(torch.equal(value, other[name]) for name, value in whole.items())
    set_model_state_dict(ours, other, options=FULL)
    with torch.no_grad():
        assert torch.equal(ours(IDS), expected)


def shared_experts_apart() -> None:
    ours = model()
    fully_shard(ours.layers[0].ffn.shared_experts, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TypeError, match=r"w1 is still sharded.*; use fully_shard on the ffn or the layer in place of"):
        ours(IDS)


def test_sharded_blocks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (tmp_path,), nprocs=2)
