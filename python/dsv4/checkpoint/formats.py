"""Plain weights in the formats of the release."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4 import ops
from dsv4.checkpoint.expected import FP8_BLOCK, Storage, expected_tensors
from dsv4.checkpoint.reader import ITEM_BITS
from dsv4.model.config import Config

_E4M3_MAX = 448.0


def quantize_weight_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 pair of a plain weight [out, in]: codes e4m3 [out, in], scale e8m0 [ceil(out / 128), ceil(in / 128)].

    A block's scale is the smallest power of two that brings its largest magnitude to 448 or below (1 for zeros).
    """
    out, inputs = weight.shape
    padded = F.pad(weight.float(), (0, -inputs % FP8_BLOCK, 0, -out % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    amax = blocks.abs().amax(dim=(1, 3))
    # frexp is exact, a logarithm is not: amax = mantissa * 2^exponent with mantissa in [0.5, 1).
    mantissa, exponent = torch.frexp(amax / _E4M3_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    scale = torch.where(amax > 0, torch.ldexp(torch.ones_like(amax), exponent), torch.ones_like(amax))
    codes = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:out, :inputs]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale.to(torch.float8_e8m0fnu)


def quantize_weight_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 pair of a plain weight [out, in]: codes int8 [out, in / 2], even input low; scale e8m0 [out, in / 32]."""
    codes, scale = ops.quantize_fp4(weight.float())
    return codes.view(torch.int8), scale


class FormatSource(ABC):
    """The tensors of a checkpoint of `config`, under released names, made of plain values when they are asked for."""

    def __init__(self, config: Config, note: str = ""):
        self.config, self.note = config, note
        self.storage = Storage.of(config)
        self.table = expected_tensors(config, self.storage)
        self._pair: tuple[str, tuple[Tensor, Tensor]] | None = None

    @abstractmethod
    def plain(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The values of a weight, of any float dtype."""

    @abstractmethod
    def whole(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """A table of whole numbers, int64."""

    def ordered_keys(self) -> list[str]:
        return list(self.table)

    def nbytes(self, key: str) -> int:
        expected = self.table[key]
        return torch.Size(expected.shape).numel() * ITEM_BITS[expected.dtypes[0]] // 8

    def name(self, key: str) -> str:
        return key

    def get(self, key: str) -> Tensor:
        expected = self.table[key]
        if expected.pair:
            stem, _, part = key.rpartition(".")
            return self._quantized(stem)[part == "scale"]
        if expected.dtypes == ("I64",):
            return self.whole(key, expected.shape)
        return self.plain(key, expected.shape).to(torch.float32 if expected.dtypes == ("F32",) else torch.bfloat16)

    def _quantized(self, stem: str) -> tuple[Tensor, Tensor]:
        if self._pair is None or self._pair[0] != stem:
            out, inputs = self.table[stem + ".weight"].shape
            packed = self.table[stem + ".weight"].dtypes[0] == "I8"
            weight = self.plain(stem + ".weight", (out, inputs * 2 if packed else inputs))
            self._pair = (stem, (quantize_weight_fp4 if packed else quantize_weight_fp8)(weight))
        return self._pair[1]
