"""What a checkpoint folder holds, without loading it."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dsv4.checkpoint.expected import PACKED, Storage
from dsv4.checkpoint.loader import RANDOM, resolve
from dsv4.checkpoint.reader import Checkpoint
from dsv4.model.config import Config


@dataclass(frozen=True)
class Inspection:
    """Summary of a checkpoint.

    Attributes:
        folder: where it lies.
        config: its configuration, expert_dtype as found in the tensors.
        layout: "released" or "transformers".
        storage: formats of linear weights, experts and scales.
        files: safetensors files, in order.
        parameters: values of all weights (an FP4 byte counts twice, scales and hash tables not at all).
        active_parameters: those that one token passes, without MTP blocks and embedding.
        expert_parameters: those of routed experts.
        bytes_by_dtype: stored bytes, most first.
        note: what config.json says of the weights, "" where it says nothing.
        problems: tensors at fault, one line each; empty = `dsv4.load` takes it.
    """

    folder: Path
    config: Config
    layout: str
    storage: Storage
    files: tuple[Path, ...]
    parameters: int
    active_parameters: int
    expert_parameters: int
    bytes_by_dtype: dict[str, int]
    note: str
    problems: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.bytes_by_dtype.values())

    @property
    def random(self) -> bool:
        """Whether the weights are known to be random, so that output means nothing."""
        return self.note == RANDOM

    def config_lines(self) -> list[str]:
        """The configuration in a few lines of text."""
        config = self.config
        kinds = Counter(config.layer_kind(layer) for layer in range(config.num_hidden_layers))
        layers = ", ".join(f"{count} {kind.upper()}" for kind, count in kinds.items())
        hashed = sum(config.is_hash_layer(layer) for layer in range(config.num_hidden_layers))
        yarn = config.rope_scaling
        scaling = f", YaRN {yarn.factor:g} x {yarn.original_max_position_embeddings}" if yarn else ""
        lines = [
            f"layers     {config.num_hidden_layers} ({layers}), MTP blocks {config.num_nextn_predict_layers}",
            f"width      hidden {config.hidden_size}, 4 streams, vocabulary {config.vocab_size}",
            f"attention  {config.num_attention_heads} heads x {config.head_dim} (rope {config.qk_rope_head_dim}), "
            f"q_lora {config.q_lora_rank}, output {config.o_groups} x {config.o_lora_rank}, "
            f"window {config.sliding_window}",
            f"experts    {config.n_routed_experts} top-{config.num_experts_per_tok}, "
            f"inter {config.moe_intermediate_size}, {config.n_shared_experts} shared, {hashed} hash layers, "
            f"clamp {config.swiglu_limit:g}",
            f"rope       theta {config.rope_theta:g}; compressed {config.compress_rope_theta:g}{scaling}",
        ]
        if kinds["csa"]:
            index = f"{config.index_n_heads} heads x {config.index_head_dim}, top {config.index_topk}"
            lines.insert(3, f"index      {index}")
        return lines


def inspect(path: str | Path) -> Inspection:
    """Reads config.json and the headers of a checkpoint (folder or bundled name); weights stay on disk.

    Raises: CheckpointError where there is no readable checkpoint. Wrong tensors are listed in `problems` instead.
    """
    checkpoint = Checkpoint(resolve(path))
    config = checkpoint.config
    sizes: Counter[str] = Counter()
    parameters = experts = active = 0
    for key, entry in checkpoint.tensors.items():
        sizes[entry.dtype] += entry.nbytes
        if key.endswith((".scale", ".tid2eid")):
            continue
        values = math.prod(entry.shape)
        if ".experts." in key:
            values *= 2 if entry.dtype in PACKED else 1
            experts += values
        elif not key.startswith("mtp.") and key != "embed.weight":
            active += values
        parameters += values
    routed_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    routed = experts * config.num_hidden_layers // routed_layers
    return Inspection(
        folder=checkpoint.folder,
        config=config,
        layout=checkpoint.layout,
        storage=checkpoint.storage,
        files=tuple(checkpoint.files),
        parameters=parameters,
        active_parameters=active + routed * config.num_experts_per_tok // config.n_routed_experts,
        expert_parameters=experts,
        bytes_by_dtype=dict(sizes.most_common()),
        note=checkpoint.note,
        problems=tuple(checkpoint.problems()),
    )
