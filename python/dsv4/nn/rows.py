"""The rows of one step: where each token stands, and the tables its layers share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.cache import BLOCK
from dsv4.model.config import Config


class RopeFrequencies:
    """The two rotary embeddings of a model.

    Layers that compress use `compress_rope_theta` with YaRN for queries, window, compressed and index keys alike; pure
    sliding-window layers use `rope_theta` without YaRN.
    """

    def __init__(self, config: Config):
        yarn = config.rope_scaling
        self._factor = {False: 1.0, True: yarn.attention_factor if yarn else 1.0}
        self._inverse = {
            False: ops.rope_frequencies(config.qk_rope_head_dim, config.rope_theta),
            True: ops.rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, yarn),
        }
        self._elsewhere: dict[tuple[bool, torch.device], Tensor] = {}  # copies on other devices than the CPU

    def rope(self, compressed: bool, position: Tensor) -> Tensor:
        """float32 (cos, sin), [tokens, rope_dim / 2, 2]."""
        inverse = self._inverse[compressed]
        if position.device.type != "cpu":
            key = (compressed, position.device)
            if key not in self._elsewhere:
                self._elsewhere[key] = inverse.to(position.device)
            inverse = self._elsewhere[key]
        rope = ops.rope_rows(position, inverse)
        return rope if self._factor[compressed] == 1.0 else rope * self._factor[compressed]


class Rows:
    """Query rows of a step, sequences one after another, positions ascending inside each.

    Not a dataclass: torch.distributed takes those apart and casts what they hold to a mixed precision's dtype.

    Attributes:
        frequencies: of the model's rotary embeddings.
        sequence: int32 [tokens], slot of the cache (or of the batch) that a row belongs to.
        position: int32 [tokens], absolute position, from 0.
        window_table: int32 [sequences, blocks], physical page of every 256 positions of window rows, -1 = not stored.
        compressed_table: int32 [sequences, blocks], the same for compressed entries and index keys.
        write_table: int32 [sequences, blocks], where new compressed entries go; -1 = keep what is there.
        token_ids: int64 [tokens] or None, for hash routing.
    """

    def __init__(
        self,
        frequencies: RopeFrequencies,
        sequence: Tensor,
        position: Tensor,
        window_table: Tensor,
        compressed_table: Tensor,
        write_table: Tensor,
        token_ids: Tensor | None = None,
    ):
        self.frequencies = frequencies
        self.sequence, self.position = sequence, position
        self.window_table, self.compressed_table, self.write_table = window_table, compressed_table, write_table
        self.token_ids = token_ids
        self._ropes: dict[tuple[bool, int], Tensor] = {}
        self._visible: dict[int, Tensor] = {}

    @classmethod
    def whole_sequences(
        cls,
        batch: int,
        length: int,
        frequencies: RopeFrequencies,
        device: torch.device,
        token_ids: Tensor | None = None,
    ) -> Rows:
        """Rows of `batch` sequences of `length` tokens from position 0, each with pages of its own, in order."""
        blocks = -(-length // BLOCK)
        table = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
        sequence = torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(length)
        position = torch.arange(length, dtype=torch.int32, device=device).repeat(batch)
        return cls(frequencies, sequence, position, table, table, table, token_ids)

    def fill(self, ratios: Iterable[int]) -> None:
        """Makes at once what layers of these ratios share: where layers are compiled one by one, each finds the same,
        and none is compiled again for what another has left."""
        for ratio in ratios:
            self.rope(ratio > 0)
            if ratio:
                self.entry_rope(ratio)
                self.visible_entries(ratio)

    def rope(self, compressed: bool) -> Tensor:
        """(cos, sin) at each row's own position, [tokens, rope_dim / 2, 2]."""
        return self._rope(compressed, 1)

    def entry_rope(self, ratio: int) -> Tensor:
        """(cos, sin) at the first position of the block of `ratio` tokens that each row stands in."""
        return self._rope(True, ratio)

    def _rope(self, compressed: bool, ratio: int) -> Tensor:
        key = (compressed, ratio)
        if key not in self._ropes:
            position = self.position
            if ratio > 1:
                position = torch.div(position, ratio, rounding_mode="floor") * ratio
            self._ropes[key] = self.frequencies.rope(compressed, position)
        return self._ropes[key]

    def visible_entries(self, ratio: int) -> Tensor:
        """int32 [tokens]: how many compressed entries each row may attend to, (position + 1) // ratio."""
        if ratio not in self._visible:
            self._visible[ratio] = torch.div(self.position + 1, ratio, rounding_mode="floor").to(torch.int32)
        return self._visible[ratio]
