"""compress: every implementation gives the bits of the definition, pages and state, in any cut of the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import _library
from dsv4.ops import compress, compress_reference
from dsv4.ops.layout import allocate_key_pages, allocate_pages
from dsv4.testing import (
    Guarded,
    assert_rejects,
    assert_same_bits,
    grid,
    implementation_cases,
    max_isa,
    strided,
    ulp_distance,
)

KERNELS = bool(_library.kernel_implementations().get("compress"))
pytestmark = pytest.mark.skipif(not KERNELS, reason="not run: the op library has no compress")
IMPLEMENTATIONS = implementation_cases("compress")
ROWS = ("kv", "gate", "rope", "sequence", "position")
NARROW = [torch.bfloat16, torch.float32]


def make(
    runs: tuple[tuple[int, int], ...] = ((0, 23), (0, 9), (5, 14)),
    order: tuple[int, ...] | None = None,
    ratio: int = 4,
    overlap: bool = True,
    head_dim: int = 64,
    rope_dim: int = 32,
    weight: torch.dtype = torch.bfloat16,
    format: Any = "fp8",
    page_size: int = 3,
    spare: int = 1,
    rotate: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Sequences (first position, rows) in some order. Those that do not begin at 0 find earlier rows in `state`, which
    is NaN where no position lies; every fifth block has no page."""
    torch.manual_seed(seed)
    channels = (2 if overlap else 1) * head_dim
    chosen = order or tuple(range(len(runs)))
    sequence = torch.cat([torch.full((runs[s][1],), s) for s in chosen]).int()
    position = torch.cat([torch.arange(runs[s][0], sum(runs[s])) for s in chosen]).int()
    blocks = max(sum(run) for run in runs) // ratio // page_size + 1
    table = torch.randperm(len(runs) * blocks + 1)[: len(runs) * blocks].int()
    table[4::5] = -1
    count = len(table) + 1
    ring = channels // head_dim * ratio + spare
    state = torch.randn(len(runs), ring, 2, channels)
    for s, (first, _) in enumerate(runs):
        state[s, min(first, ring) :] = float("nan")
    if rotate and isinstance(format, str):
        pages = allocate_key_pages(count, page_size, head_dim, format)
    elif format == "fp8":
        pages = allocate_pages(count, page_size, head_dim, rope_dim, "fp8")
    else:
        pages = torch.zeros(count, page_size, head_dim, dtype=format)
    angle = 50 * torch.randn(len(position), rope_dim // 2)
    return {
        "kv": torch.randn(len(position), channels) * torch.randint(-3, 4, (len(position), 1)).exp2(),
        "gate": 4 * torch.randn(len(position), channels),
        "ape": torch.randn(ratio, channels),
        "norm_weight": (1 + 0.2 * torch.randn(head_dim)).to(weight),
        "rope": torch.stack((angle.cos(), angle.sin()), -1),
        "state": state,
        "pages": pages.view(torch.uint8).fill_(0x5A).view(pages.dtype),
        "table": table.view(len(runs), blocks),
        "sequence": sequence,
        "position": position,
        "ratio": ratio,
        "eps": 1e-5,
        "page_size": page_size,
        "rotate": rotate,
    }


def check(implementation: str, a: dict[str, Any], whole: bool = True) -> tuple[Tensor, Tensor]:
    pages, state = a["pages"].clone(), a["state"].clone()
    compress_reference(**{**a, "pages": pages, "state": state})
    own_pages, own_state = Guarded(a["pages"]), Guarded(a["state"])
    with max_isa(implementation):
        compress(**{**a, "pages": own_pages.tensor, "state": own_state.tensor})
    assert _library.last_implementation("compress") == (implementation if whole else "scalar")
    own_pages.check()
    own_state.check()
    assert_same_bits(own_pages.tensor, pages, "pages")
    assert_same_bits(own_state.tensor, state, "state")
    return pages, state


ENTRIES = grid(
    overlap=[True, False],
    ratio=[1, 4, 7, 128],
    dims=[(512, 64), (64, 32), (96, 0), (40, 8)],
    weight=NARROW,
    format=["fp8", *NARROW],
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ENTRIES)
def test_entries(implementation: str, case: dict[str, Any]) -> None:
    head_dim, rope_dim = case["dims"]
    others = {name: value for name, value in case.items() if name != "dims"}
    runs = ((0, 260), (300, 90)) if case["ratio"] == 128 else ((0, 23), (0, 9), (5, 14), (2, 1))
    a = make(runs=runs, head_dim=head_dim, rope_dim=rope_dim, **others)
    check(implementation, a, whole=head_dim != 40)


KEYS = grid(overlap=[True, False], ratio=[1, 4], head_dim=[32, 64, 128], weight=NARROW, format=["fp4", "fp8", *NARROW])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", KEYS)
def test_index_keys(implementation: str, case: dict[str, Any]) -> None:
    check(implementation, make(rotate=True, **case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", ["fp8", torch.float32])
def test_narrow_keys(implementation: str, format: Any) -> None:
    check(implementation, make(rotate=True, head_dim=16, rope_dim=4, format=format), whole=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("most", [1, 2, 5, 11, 40])
@pytest.mark.parametrize("rotate", [False, True])
def test_any_cut_company_and_threads(implementation: str, overlap: bool, most: int, rotate: bool) -> None:
    a = make(overlap=overlap, rotate=rotate, spare=most % 3)
    expected = check(implementation, a)
    rows = [(a["sequence"] == s).nonzero().squeeze(1) for s in range(3)]
    before = torch.get_num_threads()
    pages, state, taken = a["pages"].clone(), a["state"].clone(), [0, 0, 0]
    try:
        while any(done < len(r) for done, r in zip(taken, rows, strict=True)):
            lengths = torch.randint(0, most + 1, (3,)).tolist()
            chosen = torch.cat([rows[s][taken[s] : taken[s] + lengths[s]] for s in torch.randperm(3).tolist()])
            taken = [done + n for done, n in zip(taken, lengths, strict=True)]
            torch.set_num_threads(1 + taken[0] % 3)
            with max_isa(implementation):
                compress(**{**a, **{name: a[name][chosen] for name in ROWS}, "state": state, "pages": pages})
    finally:
        torch.set_num_threads(before)
    assert_same_bits(pages, expected[0])
    assert_same_bits(state, expected[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_calls_of_any_shape(implementation: str, data: st.DataObject) -> None:
    runs = tuple(data.draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), min_size=1, max_size=4)))
    rotate = data.draw(st.booleans())
    head_dim = data.draw(st.sampled_from([32, 64, 128] if rotate else [32, 64, 96, 33, 7]))
    a = make(
        runs=runs,
        order=tuple(data.draw(st.permutations(range(len(runs))))),
        ratio=data.draw(st.integers(1, 20)),
        overlap=data.draw(st.booleans()),
        head_dim=head_dim,
        rope_dim=data.draw(st.sampled_from([0, 2, 32])) if head_dim > 32 else 0,
        weight=data.draw(st.sampled_from(NARROW)),
        format=data.draw(st.sampled_from(["fp4", "fp8", *NARROW] if rotate else ["fp8", *NARROW])),
        page_size=data.draw(st.integers(1, 9)),
        spare=data.draw(st.integers(0, 9)),
        rotate=rotate,
        seed=data.draw(st.integers(0, 1000)),
    )
    whole = len(a["norm_weight"]) % 32 == 0 and a["rope"].shape[1] % 16 == 0
    if len(a["kv"]):  # the definition returns early, which last_implementation does not show
        check(implementation, a, whole=whole)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 60.0, 1000.0])
def test_gates_of_any_size(implementation: str, size: float) -> None:
    """From nearly equal weights to one position that takes all; a gate of -inf takes part with weight 0."""
    a = make(weight=torch.float32, format=torch.float32)
    a["gate"] *= size
    a["ape"] *= size
    check(implementation, a)
    a["gate"][3::7, 5:40] = float("-inf")
    check(implementation, a)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_gates_give_the_mean(implementation: str) -> None:
    """Means of float32 values are often halfway between two of them, so the last bit of a weight decides some."""
    a = make(runs=((0, 40),), weight=torch.float32, format=torch.float32)
    a["gate"].zero_()
    a["ape"].zero_()
    expected = a["pages"].clone()
    compress_reference(**{**a, "pages": expected, "state": a["state"].clone()})
    with max_isa(implementation):
        compress(**a)
    assert ulp_distance(a["pages"], expected).max() <= 2
    assert (a["pages"] != expected).double().mean() < 0.02


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_value_that_is_not_finite_reaches_its_entries_alone(implementation: str) -> None:
    a = make(runs=((0, 24),), format=torch.float32)
    a["table"] = torch.arange(a["table"].numel(), dtype=torch.int32).view_as(a["table"])
    clean, _ = check(implementation, a)
    a["kv"][9, :3] = float("nan")  # of the first set: in entry 3, which pools positions 8 to 11 with it
    with max_isa(implementation):
        compress(**a)
    entries, expected = a["pages"].flatten(0, 1)[:6], clean.flatten(0, 1)[:6]
    assert entries[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert_same_bits(entries[others], expected[others])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gaps_in_memory(implementation: str) -> None:
    a = make(format=torch.float32)
    expected = check(implementation, a)
    b = {n: strided(v) if isinstance(v, Tensor) and v.dim() > 1 else v for n, v in a.items()}
    with max_isa(implementation):
        compress(**b)
    assert_same_bits(b["pages"].contiguous(), expected[0])
    assert_same_bits(b["state"].contiguous(), expected[1])


BAD: list[tuple[str, dict[str, Any]]] = [
    ("kv must be float32 or float64 [tokens, c * head_dim], got float32 [46]", {"kv": torch.zeros(46)}),
    (
        "kv must have 64 or 128 channels, got 192",
        {n: torch.zeros(46, 192) for n in ("kv", "gate")} | {"ape": torch.zeros(4, 192)},
    ),
    ("gate must be float32 [46, 128], got float32 [35, 128]", {"gate": torch.zeros(35, 128)}),
    ("gate must be float32 [46, 128], got float64 [46, 128]", {"gate": torch.zeros(46, 128).double()}),
    ("ape must be float32 [5, 128], got float32 [4, 128]", {"ratio": 5}),
    ("ratio must be at least 1, got 0", {"ratio": 0}),
    (
        "norm_weight must be bfloat16 or float32 or float64 [head_dim], got bfloat16 [1, 64]",
        {"norm_weight": torch.zeros(1, 64).bfloat16()},
    ),
    ("rope must be float32 or float64 [46, rope_dim / 2, 2], got float32 [46, 16]", {"rope": torch.zeros(46, 16)}),
    ("rope must have at most 32 pairs, got 33", {"rope": torch.zeros(46, 33, 2)}),
    ("state must be float32 [3, ring, 2, 128], got float32 [2, 9, 2, 128]", {"state": torch.zeros(2, 9, 2, 128)}),
    ("state must have a ring of at least 8 positions, got 7", {"state": torch.zeros(3, 7, 2, 128)}),
    ("the page size of pages must be at least 1, got 0", {"page_size": 0}),
    ("pages must be uint8 [pages, 384], got uint8 [4, 10]", {"pages": torch.zeros(4, 10).byte()}),
    (
        "pages must be bfloat16 or float16 or float32 or float64 [pages, 3, 64], got float32 [4, 2, 64]",
        {"pages": torch.zeros(4, 2, 64)},
    ),
    (
        "pages must be uint8 [pages, 102 or 204], got uint8 [4, 10]",
        {"pages": torch.zeros(4, 10).byte(), "rotate": True},
    ),
    ("table must be int32 [sequences, blocks], got int64 [3, 2]", {"table": torch.zeros(3, 2).long()}),
    ("sequence must be int32 [46], got int64 [46]", {"sequence": torch.zeros(46).long()}),
    ("position must be int32 [46], got int32 [1]", {"position": torch.zeros(1).int()}),
    ("position must ascend by one within a sequence, from 0 or later", {"position": torch.zeros(46).int()}),
    (
        "position must ascend by one within a sequence, from 0 or later",
        {"position": torch.arange(-1, 45).int(), "sequence": torch.zeros(46).int()},
    ),
    ("the rows of a sequence must stand together", {"sequence": (torch.arange(46) % 2).int()}),
    ("sequence must lie in [0, 3), the rows of the table, got 3", {"sequence": torch.full((46,), 3).int()}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:60] for message, _ in BAD])
def test_the_kernels_refuse_in_the_same_words(message: str, change: dict[str, Any]) -> None:
    assert_rejects(compress, make(), f"compress: {message}", **change)
    assert_rejects(torch.ops.dsv4._compress_reference, make(), f"compress: {message}", **change)


def test_a_refused_call_changes_nothing() -> None:
    a = make()
    before = a["pages"].clone(), a["state"].clone()
    for change in ({"sequence": (torch.arange(46) % 2).int()}, {"sequence": torch.full((46,), 3).int()}):
        with pytest.raises(RuntimeError, match="compress: "):
            compress(**{**a, **change})
    assert_same_bits(a["pages"], before[0])
    assert_same_bits(a["state"], before[1])
