"""One layer of a checkpoint at a time: for models that are larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.expected import FP8
from dsv4.checkpoint.loader import Filler
from dsv4.checkpoint.reader import Checkpoint
from dsv4.model.block import Block


class Layers:
    """The layers of an opened checkpoint, each built as `dsv4.load` builds it, and only while it is used.

    Args:
        checkpoint: validated. Where its weights are stored quantised they stay so (mode "checkpoint").
    Raises: ValueError: sizes that this mode does not take.
    """

    dtype = torch.bfloat16
    """Of activations and, in mode "off", of weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        storage = checkpoint.storage
        plain = storage.linear == "plain" or storage.experts == "plain"
        self.quantization = "off" if plain else "checkpoint"
        checkpoint.config.check_quantization(self.quantization)
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self._keys: list[list[str]] = [[] for _ in range(self.config.num_hidden_layers)]
        for key in checkpoint.ordered_keys():
            parts = key.split(".")
            if parts[0] == "layers":
                self._keys[int(parts[1])].append(key)

    def stored_bytes(self, layer: int) -> int:
        """Bytes of the layer's tensors in the files."""
        return sum(map(self.checkpoint.nbytes, self._keys[layer]))

    def held_bytes(self, layer: int) -> int:
        """Bytes of the layer's tensors in memory: as stored in mode "checkpoint", but for compressor weights, which
        some releases store in FP8 and which are computed with in float32."""
        if self.quantization == "checkpoint":
            compressor = [key for key in self._keys[layer] if ".compressor.w" in key]
            if any(self.checkpoint.tensors[key].dtype == FP8 for key in compressor):
                widened = (-1 if key.endswith(".scale") else 3 for key in compressor)
                sizes = map(self.checkpoint.nbytes, compressor)
                return self.stored_bytes(layer) + sum(a * b for a, b in zip(widened, sizes, strict=True))
            return self.stored_bytes(layer)
        with torch.device("meta"):
            block = self._block(layer)
        return sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))

    def largest_read(self, layer: int) -> int:
        """Bytes of the layer's largest tensor in the files."""
        return max(map(self.checkpoint.nbytes, self._keys[layer]))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding [tokens, hidden]; the table stays on disk but for the pages they lie in."""
        rows = self.checkpoint.get("embed.weight")[token_ids].to(self.dtype)
        self.checkpoint.close()
        if not torch.isfinite(rows).all():
            bad = int(token_ids[~torch.isfinite(rows).all(-1)][0])
            raise CheckpointError(f"{self.checkpoint.folder}: embed.weight holds NaN or infinity in row {bad}")
        return rows

    @contextmanager
    def layer(self, layer: int, advance: Callable[[int], None] = lambda count: None) -> Iterator[Block]:
        """The layer, loaded; leaving frees it. `advance` is told of bytes read.

        Raises: CheckpointError: values no model can have, each tensor that holds them named.
        """
        with torch.device("meta"):
            holder = _Holder({layer: self._block(layer)})
        filler = Filler(holder, self.checkpoint, torch.device("cpu"), self.quantization == "checkpoint")
        for key in self._keys[layer]:
            if not key.endswith(".scale"):
                advance(filler.take(key))
        self.checkpoint.close()
        if filler.problems:
            raise CheckpointError(f"{self.checkpoint.folder}: layer {layer}", filler.problems)
        filler.check_complete()
        block = holder.layers[str(layer)]
        assert isinstance(block, Block)
        try:
            yield block
        finally:
            block.to_empty(device="meta")  # whoever still refers to the layer does not keep its weights

    def _block(self, layer: int) -> Block:
        config = self.config
        return Block(config, config.layer_ratio(layer), config.is_hash_layer(layer), self.quantization, self.dtype)


class _Holder(nn.Module):
    """Some layers under the names that they have in the model."""

    def __init__(self, blocks: dict[int, Block]):
        super().__init__()
        self.layers = nn.ModuleDict({str(number): block for number, block in blocks.items()})


def parse_layers(text: str, count: int) -> list[int]:
    """Layer numbers of a selection such as "0-3,7", ascending. ValueError, in one line, for other texts or layers."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
            raise ValueError(f"{text!r} is no selection of layers; write 0-3,7")
        if int(first) > int(last) or int(last) >= count:
            raise ValueError(
                f"{part.strip()!r} must lie in 0-{count - 1}, lower number first: the model has {count} layers"
            )
        found.update(range(int(first), int(last) + 1))
    return sorted(found)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as `parse_layers` takes them: "0-3,7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
