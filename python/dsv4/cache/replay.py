"""From where the model has to run again when a cache is cut back further than its rings reach."""

from __future__ import annotations

from typing import NamedTuple

from dsv4.cache.layer import Settings


class Replay(NamedTuple):
    """Attributes:
    start: first position to run again; the model runs start .. length - 1.
    reuses_window: window rows before `start` stand in the cache and are read; otherwise they are rebuilt from nothing.
    floor: afterwards, the window rows from here on are exact in every layer.
    """

    start: int
    reuses_window: bool
    floor: int


def plan_replay(settings: Settings, length: int, floor: int) -> Replay:
    """What to run again so that a sequence of `length` tokens continues, bit for bit, as if nothing had been cut off.

    Compressed entries of whole blocks below `length` are still in the cache, in every layer. Lost may be window rows
    below `floor`, and compressor tails. Let W be the window, L the number of layers, and t = length - rollback: the
    shortest length that must be continuable afterwards without another replay. So these are needed:

    * in every layer, window rows from t - W + 1 on (the window of position t);
    * where layer l compresses by m, its tail from T_l = floor(t / m) m on, or T_l - m where blocks overlap.

    Rows and tails of layer l at position p depend on the layer's input x_l(p) alone. x_0 is the embedding; x_(l+1)(p)
    follows from x_l(p), the window rows p - W + 1 .. p of layer l, and entries that end at p or before, which are
    stored. For a run that starts at s:

    1. Where window rows are stored from s - W + 1 on (floor <= s - W + 1), every window of the run is whole, and all
       x_l(p), p >= s, are exact. Then s = min_l T_l, the earliest tail, is early enough.
    2. Otherwise x_l is exact from s + l (W - 1) on, since every layer needs whole windows below it. So s is the least
       over l of min(t - W + 1, T_l) - l (W - 1); at 0 nothing precedes, and all is exact.

    A replay must not store compressed entries: its first rows are not exact, and the exact entries are there already.

    Args:
        settings: of the cache.
        length: tokens the sequence was cut back to, > 0.
        floor: window rows from here to `length` are exact in every layer.
    """
    window, first = settings.config.sliding_window, max(0, length - settings.rollback)
    tails = []
    for ratio in settings.ratios:
        tail = first // ratio * ratio - ratio * settings.overlaps(ratio) if ratio else first
        tails.append(max(0, tail))
    start = min(tails)
    if floor <= max(0, start - window + 1):
        return Replay(start, True, floor)
    needed = (min(first - window + 1, tail) - layer * (window - 1) for layer, tail in enumerate(tails))
    start = max(0, min(needed))
    return Replay(start, False, start + (len(tails) - 1) * (window - 1) if start else 0)
