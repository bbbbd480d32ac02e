"""Builds a model from a checkpoint."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.expected import Storage
from dsv4.checkpoint.progress import byte_bar
from dsv4.checkpoint.reader import Checkpoint
from dsv4.model.config import Config
from dsv4.model.transformer import Transformer
from dsv4.nn.linear import check_mode

BUNDLED = Path(__file__).resolve().parent.parent / "models"
_EXPERT = re.compile(r"(.+\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_E8M0_NAN = 255
RANDOM = "random weights"
"""Note of a model, in config.json and as `model.note`, whose output has no meaning."""


class Source(Protocol):
    """Tensors under released names, one at a time."""

    config: Config
    storage: Storage
    note: str

    def ordered_keys(self) -> list[str]: ...
    def nbytes(self, key: str) -> int: ...
    def get(self, key: str) -> Tensor: ...
    def name(self, key: str) -> str: ...


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    quantization: str = "checkpoint",
    dtype: torch.dtype = torch.bfloat16,
) -> Transformer:
    """The model of a checkpoint folder: the released layout, or what transformers' save_pretrained writes.

    Args:
        path: folder with config.json and safetensors files (one, or shards with their index), or the name of a bundled
            model.
        device: where the weights go, one tensor at a time.
        quantization: "checkpoint" keeps FP8 and FP4 weights as stored and rounds activations as the checkpoint was
            trained; "off" turns all weights into `dtype` and rounds nothing.
        dtype: of activations (and of weights in mode "off"): bfloat16, float32 or float64.
    Raises:
        CheckpointError (a ValueError, one line): no checkpoint, a damaged file, another model_type, or tensors that are
            missing, surplus, mis-shaped or mis-typed, all of them named; unquantised weights in mode "checkpoint".
        ValueError: an unknown mode, dtype or device.
    """
    checkpoint = Checkpoint(resolve(path))
    checkpoint.validate()
    title, place = checkpoint.folder.name, str(checkpoint.folder)
    try:
        return build(checkpoint, device, quantization, dtype, title=title, place=place)
    finally:
        checkpoint.close()


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint: a path, or the name of a model that comes with the package."""
    folder = Path(path)
    if folder.exists():
        return folder
    bundled = sorted(child.name for child in BUNDLED.iterdir() if child.is_dir()) if BUNDLED.is_dir() else []
    if str(path) in bundled:
        return BUNDLED / str(path)
    raise CheckpointError(f"{path}: no such folder, nor a bundled model ({', '.join(bundled) or 'there are none'})")


def build(
    source: Source, device: str | torch.device, quantization: str, dtype: torch.dtype, *, title: str, place: str
) -> Transformer:
    """A Transformer filled from `source`; `title` labels the progress bar, `place` opens error messages."""
    _check_mode(source, quantization, dtype, place)
    target = _device(device)
    with torch.device("meta"):
        model = Transformer(source.config, quantization, dtype)
    filler = Filler(model, source, target, quantization == "checkpoint")
    keys = [key for key in source.ordered_keys() if not key.endswith(".scale")]
    total = sum(source.nbytes(key) for key in source.ordered_keys())
    with byte_bar(title, total) as advance:
        for key in keys:
            advance(filler.take(key))
    if filler.problems:
        raise CheckpointError(f"{place}: holds values no model can have", filler.problems)
    filler.check_complete()
    model.note = source.note
    return model


def _check_mode(source: Source, quantization: str, dtype: torch.dtype, place: str) -> None:
    """ValueError (CheckpointError where the weights are at fault) unless a model of `source` can be built so."""
    if quantization == "checkpoint" and (source.storage.linear == "plain" or source.storage.experts == "plain"):
        raise CheckpointError(f"{place}: the weights are not quantised; load them with quantization='off'")
    source.config.check_quantization(quantization)
    check_mode(quantization, dtype)


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is not a device; use 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "meta":
        raise ValueError("'meta' holds no weights; a model without them is made by Transformer(config) on that device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{str(device)!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


class Filler:
    """Moves tensors of a source into a model, or part of one under released names, built on the meta device."""

    def __init__(self, model: nn.Module, source: Source, device: torch.device, quantized: bool):
        self.model, self.source, self.device, self.quantized = model, source, device, quantized
        self.available = set(source.ordered_keys())
        self.problems: list[str] = []

    def take(self, key: str) -> int:
        """Places a tensor and its scale, if it has one; returns the bytes read."""
        weight = self.source.get(key)
        scale_key = key.removesuffix("weight") + "scale"
        scale = None
        if key.endswith(".weight") and scale_key in self.available:
            scale = self.source.get(scale_key)
            self._check_scale(scale_key, scale)
        elif key.endswith(".tid2eid"):
            self._check_experts(key, weight)
        expert = _EXPERT.fullmatch(key)
        if expert is not None:
            self._take_expert(expert.group(1), int(expert.group(2)), expert.group(3), weight, scale)
        else:
            for name, tensor in self._converted(key, scale_key, weight, scale):
                self._assign(name, tensor)
        return self.source.nbytes(key) + (0 if scale is None else self.source.nbytes(scale_key))

    def _converted(
        self, key: str, scale_key: str, weight: Tensor, scale: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        target = self._target(key)
        if scale is None:
            keep = self.quantized or not weight.is_floating_point()
            yield key, weight.to(self.device, weight.dtype if keep else target.dtype, copy=True)
        elif self.quantized and weight.dtype == target.dtype:
            yield key, weight.to(self.device, copy=True)
            yield scale_key, scale.to(self.device, copy=True)
        else:
            # In mode "checkpoint" only compressor weights come here: computed in float32, FP8 in some releases.
            dtype = torch.float32 if self.quantized else target.dtype
            yield key, ops.dequantize_weight(weight.to(self.device), scale.to(self.device), dtype)

    def _take_expert(self, prefix: str, expert: int, matrix: str, weight: Tensor, scale: Tensor | None) -> None:
        if weight.dtype == torch.uint8:
            weight = weight.view(torch.int8)
        if not self.quantized and scale is not None:
            dtype = self._target(f"{prefix}.{matrix}").dtype
            weight, scale = ops.dequantize_weight(weight.to(self.device), scale.to(self.device), dtype), None
        for name, part in ((f"{prefix}.{matrix}", weight), (f"{prefix}.{matrix}_scale", scale)):
            if part is not None:
                self._stack(name, part)[expert].copy_(part)

    def _stack(self, name: str, part: Tensor) -> Tensor:
        target = self._target(name)
        if target.is_meta:
            dtype = part.dtype if self.quantized else target.dtype
            self._assign(name, torch.empty(target.shape, dtype=dtype, device=self.device))
        return self._target(name).detach()

    def _target(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        target = module._parameters.get(leaf, module._buffers.get(leaf))
        if target is None:
            raise RuntimeError(f"the model has no tensor {name}")
        return target

    def _assign(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module, target = self.model.get_submodule(path), self._target(name)
        if tensor.shape != target.shape:
            raise RuntimeError(f"the model has {name} as {list(target.shape)}, the checkpoint {list(tensor.shape)}")
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=target.requires_grad)
        else:
            module._buffers[leaf] = tensor

    def _check_scale(self, key: str, scale: Tensor) -> None:
        if scale.dtype == torch.float8_e8m0fnu:
            bad = int((scale.view(torch.uint8) == _E8M0_NAN).sum())
        else:
            bad = int((~(torch.isfinite(scale) & (scale >= 0))).sum())
        if bad:
            self.problems.append(f"{self.source.name(key)} holds {bad} scales that are NaN, infinite or negative")

    def _check_experts(self, key: str, ids: Tensor) -> None:
        count = self.source.config.n_routed_experts
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            self.problems.append(f"{self.source.name(key)} names experts {low} to {high}, there are {count}")

    def check_complete(self) -> None:
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.is_meta:
                raise RuntimeError(f"no released tensor fills {name}")
