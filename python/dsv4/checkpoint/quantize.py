"""A trained model in the formats of the release."""

from torch import Tensor

from dsv4.checkpoint.formats import FormatSource
from dsv4.checkpoint.loader import build
from dsv4.checkpoint.writer import released_tensors
from dsv4.model.transformer import Transformer


def quantize(model: Transformer) -> Transformer:
    """A model of mode "off" as one of mode "checkpoint": weights rounded to the FP8 and FP4 of the release.

    Each matrix by itself: 128 x 128 blocks of e4m3 codes, or groups of 32 e2m1 codes for experts, under the smallest
    power of two that holds the largest value; all else in bfloat16 or float32. `save_released` writes the result.

    Raises: ValueError: the model is not of mode "off", or its config has no quantised format (expert_dtype "bf16").
    """
    if model.quantization != "off":
        raise ValueError(f'quantize takes a model of quantization="off", got "{model.quantization}"')
    if model.config.expert_dtype == "bf16":
        raise ValueError('quantize needs a config whose expert_dtype is "fp4" or "fp8", got "bf16"')
    return build(_PlainSource(model), model.device, "checkpoint", model.dtype, title="quantise", place="dsv4.quantize")


class _PlainSource(FormatSource):
    def __init__(self, model: Transformer):
        super().__init__(model.config, model.note)
        self._tensors = {key: tensor.detach() for key, tensor in released_tensors(model.state_dict())}

    def plain(self, key: str, shape: tuple[int, ...]) -> Tensor:
        return self._tensors[key]

    def whole(self, key: str, shape: tuple[int, ...]) -> Tensor:
        return self._tensors[key]
