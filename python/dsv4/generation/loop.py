"""The generation loops: prefill in chunks, then one token at a time, of one sequence or of several."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dsv4.cache import KVCache
from dsv4.generation.sampling import check_sampling, sample
from dsv4.model.config import Config
from dsv4.model.recording import RecordedModel
from dsv4.model.transformer import Transformer

_MOST_SEED = 2**63 - 1


def generate(
    model: Transformer,
    input_ids: torch.Tensor | Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: int | Collection[int] = (),
    cache: KVCache | None = None,
    prefill_chunk: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[int]:
    """Continue one sequence, giving each token as soon as it is chosen.

    A token is fed to the model when the one after it is asked for. So after n tokens the cache holds the prompt and the
    first n - 1 of them, whether the loop ended by itself or its caller stopped reading; to go on, feed the last token
    in front of what comes next.

    Args:
        model: the model, or anything called like it.
        input_ids: the prompt: integers, or an integer tensor [tokens] or [1, tokens]. At least one token.
        max_new_tokens: the most tokens to give.
        temperature, top_p: of `dsv4.generation.sample`; temperature 0 is greedy.
        seed: of the random numbers, from 0 to 2^63 - 1; the same seed gives the same tokens.
        stop_tokens: one token or several: the sequence ends with the first of these, which is given too. The
            end-of-sentence token counts only when it is named here.
        cache: continues the one sequence it holds. None: a new cache of the size needed.
        prefill_chunk: the prompt is fed this many tokens at a time.
        progress: called with (tokens fed, tokens of the prompt) after every chunk of the prompt.
    Returns: an iterator over tokens; the prompt is fed when the first is asked for.
    Raises: ValueError, before anything is fed, for arguments out of range, a prompt that does not fit the cache, or
        more tokens than the model has positions (`config.max_position_embeddings`).
    """
    prompt = _prompt(input_ids, model.config.vocab_size)
    check_sampling(temperature, top_p)
    max_new_tokens = _integer("max_new_tokens", max_new_tokens, 0)
    prefill_chunk = _integer("prefill_chunk", prefill_chunk, 1)
    seed = _integer("seed", seed, 0, _MOST_SEED)
    check_positions(model.config, (0 if cache is None else cache.length) + len(prompt) + max_new_tokens)
    needed = len(prompt) + max(max_new_tokens - 1, 0)
    if cache is None:
        cache = model.new_cache(batch_size=1, max_seq_len=needed)
    elif cache.batch_size != 1:
        raise ValueError(f"generate continues one sequence, the cache holds {cache.batch_size}")
    elif cache.length + needed > cache.max_seq_len:
        raise ValueError(
            f"the cache holds {cache.length} of at most {cache.max_seq_len} tokens: no room for a prompt of "
            f"{len(prompt)} and {max_new_tokens} new ones; give new_cache a larger max_seq_len"
        )
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: torch.Tensor) -> int:
        return sample(logits[0, -1], temperature, top_p, generator)

    return _tokens(model, prompt, cache, choose, max_new_tokens, _stops(stop_tokens), prefill_chunk, progress)


def generate_batch(
    model: Transformer,
    prompts: Sequence[torch.Tensor | Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: int | Collection[int] = (),
    prefill_chunk: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int | None]]:
    """Continue several sequences at once, giving one token of each as soon as all are chosen.

    A row's result does not depend on the rows beside it, so in mode "checkpoint" the tokens of prompt i are those of
    `generate(model, prompts[i], seed=seed + i)`; in mode "off" up to rounding. A step reads each weight that several
    sequences need once. A sequence that has ended takes no further part, and its cache is given back.

    Args:
        prompts: of any lengths, each as `generate` takes it.
        seed: from 0 to 2^63 - 1; the random numbers of prompt i are those of seed + i.
        prefill_chunk: so many tokens of all prompts together are fed at a time, at least one of each.
        progress: called with (tokens fed, tokens of all prompts but the last of each) after every such piece.
        model, max_new_tokens, temperature, top_p, stop_tokens: as of `generate`.
    Returns: an iterator over lists with an element a prompt: its next token, or None if it has ended.
    Raises: ValueError, before anything is fed, for arguments out of range, or more tokens than the model has positions.
    """
    ids = [_prompt(prompt, model.config.vocab_size) for prompt in prompts]
    if not ids:
        raise ValueError("prompts is empty: it needs at least one prompt")
    check_sampling(temperature, top_p)
    max_new_tokens = _integer("max_new_tokens", max_new_tokens, 0)
    prefill_chunk = _integer("prefill_chunk", prefill_chunk, 1)
    seed = _integer("seed", seed, 0, _MOST_SEED)
    check_positions(model.config, max(map(len, ids)) + max_new_tokens)
    choosers = [
        partial(sample, temperature=temperature, top_p=top_p, generator=torch.Generator().manual_seed(seed + number))
        for number in range(len(ids))
    ]
    return _batches(model, ids, choosers, max_new_tokens, _stops(stop_tokens), prefill_chunk, progress)


def check_positions(config: Config, tokens: int) -> None:
    """ValueError, in one line, where a sequence of so many tokens is longer than the model has positions."""
    most = config.max_position_embeddings
    if tokens > most:
        raise ValueError(
            f"prompt and new tokens, {tokens:,}, would exceed the {most:,} positions of the model "
            "(max_position_embeddings); ask for fewer"
        )


def _integer(name: str, value: Any, least: int, most: float = math.inf) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        wanted = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {wanted}, got {value!r}")
    return operator.index(value)


def _stops(stop_tokens: int | Collection[int]) -> frozenset[int]:
    """As plain integers: elements of a tensor equal no token."""
    try:
        return frozenset([operator.index(stop_tokens)])  # type: ignore[arg-type]
    except TypeError:
        pass  # several
    try:
        return frozenset(map(operator.index, stop_tokens))  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"stop_tokens must be a token or several, as integers, got {stop_tokens!r}") from None


def _prompt(input_ids: torch.Tensor | Sequence[int], vocab_size: int) -> torch.Tensor:
    """The prompt as int64 [tokens] on the CPU."""
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError):  # text, or lists of different lengths
        what = f"the text {input_ids!r}; encode it first" if isinstance(input_ids, str) else type(input_ids).__name__
        raise ValueError(f"input_ids must be integer [tokens] or [1, tokens], got {what}") from None
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.numel() == 0:
        raise ValueError("the prompt is empty: it needs at least one token")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integer [tokens] or [1, tokens], got {ids.dtype} {list(ids.shape)}")
    ids = ids.to("cpu", torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids must lie in [0, {vocab_size}), got {low} to {high}: is this the model's tokenizer?"
        )
    return ids


def _tokens(
    model: Transformer,
    prompt: torch.Tensor,
    cache: KVCache,
    choose: Callable[[torch.Tensor], int],
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    prefill_chunk: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[int]:
    if max_new_tokens == 0:
        return
    feed = _recorded(model)
    for start in range(0, len(prompt), prefill_chunk):
        chunk = prompt[start : start + prefill_chunk]
        logits = _feed(feed, chunk, cache)
        if progress is not None:
            progress(start + len(chunk), len(prompt))
    for number in range(max_new_tokens):
        token = choose(logits)
        yield token
        if token in stop_tokens or number + 1 == max_new_tokens:
            return
        logits = _feed(feed, torch.tensor([token]), cache)


def _batches(
    model: Transformer,
    prompts: list[torch.Tensor],
    choosers: Sequence[Callable[[torch.Tensor], int]],
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    prefill_chunk: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[list[int | None]]:
    if max_new_tokens == 0:
        return
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens - 1)
    # All but the last tokens, whose logits nobody needs; then the last ones are a step like any other.
    _feed_prompts(model, [prompt[:-1] for prompt in prompts], cache, prefill_chunk, progress)
    feed = _recorded(model)
    going, newest = list(range(len(prompts))), [int(prompt[-1]) for prompt in prompts]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = feed(torch.tensor(newest).unsqueeze(1), cache, logits_to_keep=1)
        newest = [choosers[number](row[-1]) for number, row in zip(going, logits, strict=True)]
        given: list[int | None] = [None] * len(prompts)
        for number, token in zip(going, newest, strict=True):
            given[number] = token
        yield given
        kept = [place for place, token in enumerate(newest) if token not in stop_tokens]
        if not kept:
            return
        if len(kept) < len(going):
            going, newest = [going[place] for place in kept], [newest[place] for place in kept]
            rest = cache.fork(kept)
            cache.clear()
            cache = rest


def _feed_prompts(
    model: Transformer,
    prompts: list[torch.Tensor],
    cache: KVCache,
    prefill_chunk: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    whole, begin = sum(map(len, prompts)), 0
    while begin < max(map(len, prompts)):
        width = max(1, prefill_chunk // sum(len(prompt) > begin for prompt in prompts))
        parts = [prompt[begin : begin + width] for prompt in prompts]
        with torch.no_grad():
            chunk = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
            model(chunk, cache=cache, num_tokens=list(map(len, parts)), logits_to_keep=1)
        begin += width
        if progress is not None:
            progress(sum(min(len(prompt), begin) for prompt in prompts), whole)


def _recorded(model: Transformer) -> Callable[..., torch.Tensor]:
    return RecordedModel(model) if isinstance(model, Transformer) else model


def _feed(model: Callable[..., torch.Tensor], ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    # Not across a yield, where it would switch gradients off for the caller; and not inference mode, whose tensors the
    # caller could not go on using in the cache.
    with torch.no_grad():
        return model(ids.unsqueeze(0), cache=cache, logits_to_keep=1)
