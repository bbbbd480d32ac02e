"""Other programs that run a model of ours: transformers, and llama.cpp through llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4.bench.gguf_file import write_gguf
from dsv4.checkpoint.names import released_name, stacked_experts
from dsv4.model.config import Config

#: What a row says of a program that is not installed.
MISSING = "not run: install dsv4[peers]"


class Engine(Protocol):
    """A program with a model in it and one sequence in its memory."""

    name: str
    precision: str

    def reset(self) -> None:
        """Forget the sequence."""

    def feed(self, ids: Tensor) -> Tensor:
        """Append tokens int64 [n]; logits of the last, float32 [vocab]."""

    def bytes_needed(self, tokens: int) -> int:
        """About how much memory a prompt of so many tokens takes."""


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


class TransformersEngine:
    """transformers' DeepseekV4ForCausalLM with the weights of a model of ours of mode "off".

    Args:
        state, config: of our model.
        dtype: to run in.
        piece: tokens of a prompt at once; None: all.
    """

    def __init__(self, state: Mapping[str, Tensor], config: Config, dtype: torch.dtype, piece: int | None):
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
        self.model = DeepseekV4ForCausalLM(DeepseekV4Config.from_dict(values)).eval()
        theirs = {key: _their_tensor(key, state) for key in self.model.state_dict()}
        self.model.load_state_dict(theirs)
        self.model.to(dtype)
        self.name = f"transformers, pieces of {piece}" if piece else "transformers"
        self.precision = str(dtype).removeprefix("torch.")
        self._piece, self._config = piece, config
        self._past: Any = None

    def reset(self) -> None:
        self._past = None

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        for part in ids.split(self._piece or len(ids)):
            out = self.model(part.unsqueeze(0), past_key_values=self._past, use_cache=True, logits_to_keep=1)
            self._past = out.past_key_values
        return out.logits[0, -1].float()

    def bytes_needed(self, tokens: int) -> int:
        """Four times the float32 scores of the widest layer: of every head, row of a piece, and key or entry."""
        rows = min(tokens, self._piece or tokens)
        keys = rows + self._config.sliding_window + tokens // (self._config.csa_ratio or tokens)
        return 4 * 4 * self._config.num_attention_heads * rows * keys


def _their_tensor(key: str, state: Mapping[str, Tensor]) -> Tensor:
    """The tensor of a parameter of transformers' model, from ours."""
    name = released_name(key)
    assert name is not None, key
    stack = stacked_experts(name)
    if stack is None:
        return state[name]
    prefix, kind = stack
    if kind == "down_proj":
        return state[f"{prefix}.w2"]
    return torch.cat((state[f"{prefix}.w1"], state[f"{prefix}.w3"]), 1)


class LlamaEngine:
    """llama.cpp with a GGUF file of a model of ours of mode "off"; its defaults, but for threads and context.

    Args:
        state, config: of our model.
        dtype: of the matrices in the file.
        folder: where to write the file.
        room: most tokens of the sequence.
    Raises: ValueError: it does not take the model.
    """

    name = "llama.cpp"
    _BATCH = 2048

    def __init__(self, state: Mapping[str, Tensor], config: Config, dtype: torch.dtype, folder: Path, room: int):
        from llama_cpp import llama_cpp as api

        self._api, self._vocab = api, config.vocab_size
        self.precision = str(dtype).removeprefix("torch.")
        file = folder / f"{self.precision}.gguf"
        write_gguf(state, config, file, dtype)
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp does not load {file.name}")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch = room, self._BATCH
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            raise ValueError("llama.cpp makes no context for the model")

    def reset(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def feed(self, ids: Tensor) -> Tensor:
        for part in ids.split(self._BATCH):
            tokens = (ctypes.c_int32 * len(part))(*part.tolist())
            if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(part))) != 0:
                raise ValueError(f"llama.cpp fails on {len(part)} tokens")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self._vocab,)).copy())

    def bytes_needed(self, tokens: int) -> int:
        """Its attention keeps no scores, and rows that are shorter than ours in mode "off"."""
        return 0

    def close(self) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
