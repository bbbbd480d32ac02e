"""Choosing the next token from its logits."""

from __future__ import annotations

import math

import torch


def check_sampling(temperature: float, top_p: float) -> None:
    """ValueError, in one line, unless the settings of `sample` make sense."""
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature must be a finite number >= 0 (0 = the likeliest token), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def sample(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """One token from the logits of one position.

    Args:
        logits: [vocab], any float dtype, any device; -inf rules a token out.
        temperature: 0 takes the largest logit (of equal ones, the lowest token). Otherwise logits are divided by it.
        top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least this (nucleus
            sampling, Holtzman et al., 2020); of equal probabilities the lower token enters first.
        generator: a CPU generator; one number is drawn from it a call, so equal seeds give equal tokens whatever device
            the logits are on. Unused at temperature 0.
    Raises: ValueError for settings out of range, NaN or +inf among the logits, or no token left to choose.
    """
    check_sampling(temperature, top_p)
    if logits.dim() != 1 or logits.shape[0] == 0:
        raise ValueError(f"logits must be [vocab], got {list(logits.shape)}")
    scores = logits.detach().to("cpu", torch.float64)
    best = float(scores.max())
    if not math.isfinite(best):
        raise ValueError(f"the largest logit is {best}: the model's output is not usable")
    if temperature == 0:
        return int(scores.argmax())
    # Shifted by the maximum first, so that no temperature overflows.
    probabilities = torch.softmax((scores - best) / temperature, dim=0)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    cumulative = ordered.cumsum(0)
    kept = int(torch.searchsorted(cumulative, top_p)) + 1 if top_p < 1 else int((ordered > 0).sum())
    kept = min(kept, tokens.shape[0])
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[kept - 1]
    # right=True: a draw that equals a boundary belongs to the next token, so probability 0 is never drawn.
    place = int(torch.searchsorted(cumulative[:kept], draw, right=True))
    return int(tokens[min(place, kept - 1)])
