"""index_topk on every implementation against the float64 definition and the golden selections, and the rules for ties,
NaN and absent entries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dsv4 import _library
from dsv4.model.config import Config
from dsv4.ops import index_topk, index_topk_reference
from dsv4.ops.layout import FP4_BLOCK, allocate_key_pages, key_page_bytes, read_keys, write_keys
from dsv4.testing import (
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    strided,
)

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
NAN, INF = float("nan"), float("inf")
KERNELS = implementation_cases("index_topk")
every_kernel = pytest.mark.parametrize("implementation", KERNELS)


def make(
    lengths: tuple[tuple[int, ...], ...] = ((0, 3, 9, 30), (5,), (17, 1, 18)),
    heads: int = 3,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    k: int = 6,
    page_size: int = 4,
    seed: int = 0,
    levels: int = 0,
) -> dict[str, Any]:
    """One sequence for each tuple of visible lengths, one row for each length. Unread slots hold NaN.

    `levels`: draw integers from -levels to levels, so that all sums are exact and many scores tie.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if levels:
            return torch.randint(-levels, levels + 1, shape, generator=g).to(dtype)
        return torch.randn(*shape, generator=g).to(dtype)

    flat = torch.tensor([n for row in lengths for n in row], dtype=torch.int32)
    sequence = torch.tensor([s for s, row in enumerate(lengths) for _ in row], dtype=torch.int32)
    blocks = max((max(row, default=0) for row in lengths), default=0) // page_size + 1
    count = len(lengths) * blocks + 2
    table = torch.randperm(count, generator=g)[: len(lengths) * blocks].int().view(len(lengths), blocks)
    pages = torch.full((count, page_size, dim), NAN, dtype=dtype)
    for s, row in enumerate(lengths):
        entry = torch.arange(max(row, default=0))
        pages[table[s, entry // page_size].long(), entry % page_size] = draw(len(entry), dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "query": draw(len(flat), heads, dim),
        "weights": draw(len(flat), heads).to(wide),
        "pages": pages,
        "table": table,
        "sequence": sequence,
        "lengths": flat,
        "k": k,
        "page_size": page_size,
    }


def scores_of(a: dict[str, Any], t: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of row t, float64: the entries that are stored, their scores, and the largest error that float32 sums may have.

    `values`: [pages, page_size, dim], what the pool of `a` holds.
    """
    entry = torch.arange(min(max(int(a["lengths"][t]), 0), a["table"].shape[1] * a["page_size"]))
    page = a["table"][int(a["sequence"][t])][entry // a["page_size"]].long()
    entry = entry[page >= 0]
    keys = values[page[page >= 0], entry % a["page_size"]].double()
    query, weights = a["query"][t].double(), a["weights"][t].double()
    score = (weights.unsqueeze(1) * (query @ keys.t()).relu()).sum(0)
    size = (weights.abs().unsqueeze(1) * (query.abs() @ keys.abs().t())).sum(0)
    return entry, score, size * 2.0**-24 * (query.shape[0] + query.shape[1] + 4)


def brute_force(a: dict[str, Any], values: Tensor | None = None) -> Tensor:
    rows = []
    for t in range(len(a["query"])):
        entry, score, _ = scores_of(a, t, a["pages"] if values is None else values)
        score = score if a["query"].dtype == torch.float64 else score.float()
        scored = [(-value, e) for e, value in zip(entry.tolist(), score.tolist(), strict=True) if value == value]
        best = sorted(e for _, e in sorted(scored)[: a["k"]])
        rows.append(best + [-1] * (a["k"] - len(best)))
    return torch.tensor(rows, dtype=torch.int32).view(len(rows), a["k"])


def run(implementation: str, a: dict[str, Any]) -> Tensor:
    """index_topk on this implementation, or on the next that takes the problem."""
    _, heads, dim = a["query"].shape
    tiles = heads > 0 and a["query"].dtype == torch.bfloat16 and a["pages"].dtype != torch.float32
    expected = "avx512" if implementation == "amx" and not tiles else implementation
    with max_isa(implementation):
        result = index_topk(**a)
        assert _library.last_implementation("index_topk") == ("scalar" if dim % 32 else expected)
    assert result.is_contiguous() and result.dtype == torch.int32 and result.shape == (len(a["query"]), a["k"])
    return result


def assert_matches(implementation: str, a: dict[str, Any], values: Tensor | None = None, exact: bool = False) -> None:
    """Fails where the selection is not the definition's. Unless `exact`, an entry may be taken for another if float32
    sums cannot tell their scores apart."""
    result, expected = run(implementation, a), brute_force(a, values)
    if exact or torch.equal(result, expected):
        assert_same_bits(result, expected)
        return
    for t, (got, want) in enumerate(zip(result.tolist(), expected.tolist(), strict=True)):
        chosen = [e for e in got if e >= 0]
        assert got == sorted(set(chosen)) + [-1] * (a["k"] - len(chosen))
        assert len(chosen) == len([e for e in want if e >= 0])
        entry, score, slack = scores_of(a, t, a["pages"] if values is None else values)
        place = {e: i for i, e in enumerate(entry.tolist())}
        cut = min(float(score[place[e]]) for e in want if e >= 0)
        for e in set(got) ^ set(want):
            assert abs(float(score[place[e]]) - cut) <= 2 * float(slack.max()), f"row {t}, entry {e}"


@pytest.mark.parametrize(
    "case",
    grid(
        dtype=[torch.float32, torch.bfloat16],
        heads=[0, 1, 2, 5, 8, 23],
        k=[1, 6, 30, 31, 64],
        page_size=[1, 4, 53],
        levels=[0, 2],
    ),
)
@every_kernel
def test_equals_the_definition(implementation: str, case: dict[str, Any]) -> None:
    assert_matches(implementation, make(**case), exact=case["levels"] > 0)


@pytest.mark.parametrize("case", grid(dtype=[torch.float64, torch.float16], heads=[1, 5], k=[1, 6, 31], page_size=[4]))
def test_reference_equals_the_definition(case: dict[str, Any]) -> None:
    a = make(**case)
    assert_same_bits(index_topk(**a), brute_force(a))


@pytest.mark.parametrize("dim", [4, 33, 64, 96, 128, 160, 512])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@every_kernel
def test_widths_and_mixed_types(implementation: str, dtypes: tuple[str, str], dim: int) -> None:
    a = make(lengths=((70, 75), (49,)), dim=dim, levels=2, dtype=torch.bfloat16, heads=9)
    a["query"], a["pages"] = (a[n].to(getattr(torch, d)) for n, d in zip(("query", "pages"), dtypes, strict=True))
    assert_matches(implementation, a, exact=True)


@pytest.mark.parametrize("length", [15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 127, 128, 129, 383, 384, 385, 400])
@every_kernel
def test_lengths_around_pages_and_chunks(implementation: str, length: int) -> None:
    a = make(lengths=((length,), (length - 1, length + 1)), page_size=64, k=64, heads=4, dtype=torch.bfloat16, levels=3)
    assert_matches(implementation, a, exact=True)


@pytest.mark.parametrize("seed", range(10))
@every_kernel
def test_ties_go_to_the_lower_entry(implementation: str, seed: int) -> None:
    a = make(lengths=((40, 39), (25,)), heads=2, levels=1, k=7, seed=seed, dim=32)
    a["query"][..., 4:] = 0
    assert max(len(set(row)) for row in brute_force({**a, "k": 40}).tolist()) > 20
    assert_matches(implementation, a, exact=True)


@every_kernel
def test_all_scores_equal(implementation: str) -> None:
    a = make(lengths=((30, 5),), k=8)
    a["query"].zero_()
    assert run(implementation, a).tolist() == [list(range(8)), [0, 1, 2, 3, 4, -1, -1, -1]]
    a["weights"].fill_(-1)  # -0.0 and 0.0 are one score
    a["query"][:, 0].normal_(generator=torch.Generator().manual_seed(0))
    assert_matches(implementation, a)


# Streams longer than what a selection holds at once, score by score in a given order.


def stream(order: str, length: int) -> Tensor:
    """Integers below 2^16."""
    up = torch.arange(length) % 65536
    g = torch.Generator().manual_seed(length)
    if order == "alternating":
        return torch.where(up % 2 == 0, up, 60000 - up)
    if order == "late":  # all that count come last, before that nothing
        return torch.where(up < length - 40, 7, up)
    return {
        "ascending": up,
        "descending": up.flip(0),
        "equal": torch.full((length,), 5),
        "zero": torch.zeros(length, dtype=torch.int64),
        "steps": up // 700,
        "falling steps": up.flip(0) // 700,
        "random": torch.randint(0, 65536, (length,), generator=g),
        "two values": torch.randint(0, 2, (length,), generator=g),
    }[order]


ORDERS = [
    "ascending",
    "descending",
    "equal",
    "zero",
    "steps",
    "falling steps",
    "random",
    "two values",
    "alternating",
    "late",
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [1, 37, 512, 2600, 9000])
@every_kernel
def test_any_order_of_scores(implementation: str, k: int, order: str) -> None:
    length = 8200
    values = stream(order, length)
    pages = torch.zeros(length // 64 + 1, 64, 32, dtype=torch.bfloat16)
    flat = pages.view(-1, 32)[:length]
    flat[:, 0], flat[:, 1] = (values // 256).bfloat16(), (values % 256).bfloat16()
    query = torch.zeros(1, 2, 32, dtype=torch.bfloat16)
    flat[:, 2] = torch.where(values > 0, 2.0**23, 0.0).bfloat16()  # neighbouring integers become neighbouring floats
    query[0, 0, :3] = torch.tensor([256.0, 1.0, 1.0])
    query[0, 1, 0] = -1  # nothing after relu
    a = {
        "query": query,
        "weights": torch.tensor([[1.0, 1000.0]]),
        "pages": pages,
        "table": torch.arange(len(pages), dtype=torch.int32).unsqueeze(0),
        "sequence": torch.zeros(1, dtype=torch.int32),
        "lengths": torch.tensor([length], dtype=torch.int32),
        "k": k,
        "page_size": 64,
    }
    best = (-values).sort(stable=True).indices[:k].sort().values
    expected = torch.full((1, k), -1, dtype=torch.int32)
    expected[0, : len(best)] = best.int()
    assert_same_bits(run(implementation, a), expected)
    flat[::3] = NAN
    real = torch.arange(length)[torch.arange(length) % 3 != 0]
    best = real[(-values[real]).sort(stable=True).indices[:k]].sort().values
    expected.fill_(-1)[0, : len(best)] = best.int()
    assert_same_bits(run(implementation, a), expected)


def test_scores_are_rounded_to_float32_before_they_are_compared() -> None:
    a = make(lengths=((2,),), heads=1, k=1)
    a["query"].fill_(1.0)
    a["weights"].fill_(1.0)
    keys = a["pages"][a["table"][0, 0]]
    keys[:2] = 0.0
    keys[:2, 0] = 1.0
    keys[1, 1] = 2.0**-30
    for kernel in KERNELS:
        if not kernel.marks:
            assert run(kernel.values[0], a).tolist() == [[0]]
    for name in ("query", "weights", "pages"):
        a[name] = a[name].double()
    assert index_topk(**a).tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kernel
def test_nan_and_infinite_scores(implementation: str, dtype: torch.dtype) -> None:
    a = make(lengths=((30, 12), (9,)), k=8, dtype=dtype)
    for entry, value in ((0, NAN), (3, NAN), (5, INF), (7, NAN), (11, -INF)):
        a["pages"][a["table"][0, entry // 4], entry % 4] = value
    a["weights"][0] = -1  # scores of infinite keys are -inf or, where products cancel, NaN
    assert_matches(implementation, a)
    a["pages"][a["table"][0, 1], 1] = 0
    a["pages"][a["table"][0, 1], 1, 0] = INF  # no cancellation: an infinite score
    a["query"][0, :, 0] = 1
    a["weights"][1] = 1
    a["query"][1, :, 0] = 2
    assert_matches(implementation, a)
    assert 5 in run(implementation, a)[1].tolist()
    a["query"][1] = NAN
    result = run(implementation, a)
    assert result[1].tolist() == [-1] * 8
    assert_same_bits(result, brute_force(a))


@every_kernel
def test_minus_infinity_is_a_score(implementation: str) -> None:
    a = make(lengths=((5, 5),), heads=1, k=4)
    a["query"].fill_(1.0)
    a["pages"][a["table"][0, 0], :4] = 1.0
    a["weights"].fill_(-INF)
    a["pages"][a["table"][0, 1], 0] = 1.0
    assert run(implementation, a).tolist() == [[0, 1, 2, 3]] * 2


@every_kernel
def test_entries_that_are_not_stored(implementation: str) -> None:
    a = make(lengths=((30, 14), (9,)), k=8, levels=3)
    full = run(implementation, a)
    a["table"][0, 1] = -1
    assert_matches(implementation, a, exact=True)
    assert not torch.equal(run(implementation, a), full)
    a["table"] = a["table"][:, :3].clone()
    assert_matches(implementation, a, exact=True)
    expected = run(implementation, {**a, "lengths": torch.full_like(a["lengths"], 12)})
    assert_same_bits(run(implementation, {**a, "lengths": torch.full_like(a["lengths"], 2**31 - 1)}), expected)
    a["table"].fill_(-1)
    assert (run(implementation, a) == -1).all()
    assert (run(implementation, {**a, "table": a["table"][:, :0]}) == -1).all()


@every_kernel
def test_pages_outside_the_pool_are_not_read(implementation: str) -> None:
    a = make(lengths=((30, 14), (9,)), k=8, levels=3)
    missing = {**a, "table": a["table"].clone()}
    missing["table"][0, 1] = -1
    for page in (len(a["pages"]), 2**31 - 1, -2, -(2**31)):
        a["table"][0, 1] = page
        assert_same_bits(run(implementation, a), run(implementation, missing))


@every_kernel
def test_nothing_visible_and_no_rows(implementation: str) -> None:
    a = make(lengths=((0, 0), (0,)))
    a["lengths"][1] = -5
    assert (run(implementation, a) == -1).all()
    for name in ("query", "weights", "sequence", "lengths"):
        a[name] = a[name][:0]
    assert run(implementation, a).shape == (0, 6)


@every_kernel
def test_no_heads_tie_everywhere(implementation: str) -> None:
    assert run(implementation, make(lengths=((9, 2),), heads=0, k=3)).tolist() == [[0, 1, 2], [0, 1, -1]]


# Byte pools


def byte_pool(a: dict[str, Any], format: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The pool of `a` in bytes, and the values that it then holds."""
    count, size, dim = a["pages"].shape
    where = torch.arange(count * size) // size, torch.arange(count * size) % size
    pages = allocate_key_pages(count, size, dim, format)
    write_keys(pages, a["pages"].flatten(0, 1), *where, size)
    return pages, read_keys(pages, *where, size, dim).view(count, size, dim)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", ["fp4", "fp8"])
@every_kernel
def test_byte_pools_hold_the_values_of_plain_ones(
    implementation: str, format: str, dtype: torch.dtype, page_size: int, dim: int
) -> None:
    a = make(lengths=((3, 60), (21,)), dim=dim, dtype=torch.bfloat16, page_size=page_size, heads=4)
    a["query"] = a["query"].to(dtype)
    pages, values = byte_pool(a, format)
    assert values.isnan().any()
    assert_matches(implementation, {**a, "pages": pages}, values)


@every_kernel
def test_every_fp8_code_and_any_scale(implementation: str) -> None:
    page_size, dim = 64, 128
    g = torch.Generator().manual_seed(5)
    a = make(lengths=((200,),), dim=dim, dtype=torch.bfloat16, page_size=page_size, k=40, heads=6)
    count = len(a["pages"])
    codes = torch.randint(0, 256, (count, page_size, dim), generator=g).to(torch.uint8)
    codes[codes % 128 == 127] = 1  # NaN
    codes[0, :4, 0] = torch.tensor([127, 255, 127, 255])
    scales = torch.randn(count, page_size, generator=g) / 3
    scales[:, 5], scales[:, 6], scales[1, 7] = 0.0, 1e-30, NAN
    pages = torch.cat((codes.flatten(1), scales.view(torch.uint8).flatten(1)), dim=1)
    assert pages.shape[1] == key_page_bytes(page_size, dim, "fp8")
    values = codes.view(torch.float8_e4m3fn).float() * scales.unsqueeze(-1)
    assert_matches(implementation, {**a, "pages": pages}, values)


@pytest.mark.parametrize("exponents", [(2, 2), (2, 30), (127, 127), (120, 133), (240, 252), (252, 253), (253, 253)])
@pytest.mark.parametrize("dim", [32, 128, 160])
@every_kernel
def test_every_fp4_code_and_any_scale(implementation: str, dim: int, exponents: tuple[int, int]) -> None:
    page_size, (low, high) = 16, exponents
    g = torch.Generator().manual_seed(6)
    a = make(lengths=((100, 77),), dim=dim, dtype=torch.bfloat16, page_size=page_size, k=20, heads=6)
    count = len(a["pages"])
    codes = torch.randint(0, 256, (count, page_size, dim // 2), generator=g).to(torch.uint8)
    if high > 250:
        codes &= 0xBB  # magnitudes up to 1.5, so that float32 holds the values
    scales = torch.randint(low, high + 1, (count, page_size, dim // FP4_BLOCK), generator=g).to(torch.uint8)
    scales[0, 3, 0] = 255  # NaN
    pages = torch.cat((codes.flatten(1), scales.flatten(1)), dim=1)
    where = torch.arange(count * page_size) // page_size, torch.arange(count * page_size) % page_size
    values = read_keys(pages, *where, page_size, dim).view(count, page_size, dim)
    a["query"] *= 2.0 ** (round((127 - (low + high) / 2) / 2) - (4 if high > 250 else 0))
    assert_matches(implementation, {**a, "pages": pages}, values)


# Invariance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@every_kernel
def test_a_row_does_not_depend_on_its_company(implementation: str, dtype: torch.dtype) -> None:
    lengths = (tuple(range(150, 260, 2)), (3,), tuple(range(40, 60)), (1700, 5))
    a = make(lengths=lengths, dim=64, heads=5, dtype=dtype, k=32, page_size=16)
    names = ("query", "weights", "sequence", "lengths")
    assert_rows_independent(
        lambda *rows: run(implementation, {**a, **dict(zip(names, rows, strict=True))}),
        [a[n] for n in names],
        (1, 40, 2, 7),
    )


@pytest.mark.parametrize("lengths", [((9000,),), ((4000, 5200, 17), (6100,)), (tuple(range(3000, 3040)),)])
@every_kernel
def test_threads_do_not_matter(implementation: str, lengths: tuple[tuple[int, ...], ...]) -> None:
    a = make(lengths=lengths, dim=32, heads=2, dtype=torch.bfloat16, k=100, page_size=64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(implementation, a)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert_same_bits(run(implementation, a), one)
    finally:
        torch.set_num_threads(before)
    assert_matches(implementation, a)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 140), max_size=4).map(tuple), min_size=1, max_size=4).map(tuple),
    heads=st.integers(1, 20),
    k=st.integers(1, 150),
    page_size=st.sampled_from([1, 2, 7, 16, 64]),
    format=st.sampled_from(["fp4", "fp8", "plain"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    gaps=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@every_kernel
def test_any_problem(implementation: str, lengths: Any, format: str, gaps: int, **case: Any) -> None:
    a = make(lengths=lengths, levels=2, dim=32, **case)
    values = None
    if format != "plain":
        a["pages"], values = byte_pool(a, format)
    g = torch.Generator().manual_seed(case["seed"])
    for _ in range(gaps):
        a["table"].view(-1)[int(torch.randint(0, a["table"].numel(), (1,), generator=g))] = -1
    assert_matches(implementation, a, values, exact=True)


def test_blocks_never_change_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a = make(lengths=((60, 61, 62, 63), (40,)), dtype=torch.float64)
    expected = index_topk(**a)
    module = sys.modules["dsv4.ops.index"]
    for elements, keys in ((1, 8192), (1 << 22, 7), (200, 16)):
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(module, "_KEYS_PER_BLOCK", keys)
        assert_same_bits(index_topk(**a), expected)


@every_kernel
def test_inputs_with_gaps(implementation: str) -> None:
    a = make()
    expected = run(implementation, a)
    for name in ("query", "weights", "pages", "table"):
        a[name] = strided(a[name])
    for name in ("sequence", "lengths"):
        a[name] = strided(a[name].unsqueeze(0))[0]
    assert_same_bits(run(implementation, a), expected)


@every_kernel
def test_rows_far_apart_in_memory(implementation: str) -> None:
    a = make(levels=2)
    expected = run(implementation, a)
    for name in ("query", "weights", "table", "pages"):
        wide = torch.full((2 * len(a[name]), *a[name].shape[1:]), 99).to(a[name].dtype)
        wide[::2] = a[name]
        a[name] = wide[::2]
    assert_same_bits(run(implementation, a), expected)


# Golden data


@pytest.mark.parametrize(("case", "layer"), [("dev_a", 1), ("dev_b", 0), ("dev_c", 1)])
@pytest.mark.parametrize("format", ["fp4", "plain"])
@every_kernel
def test_golden_selections(implementation: str, case: str, layer: int, format: str) -> None:
    config = Config.from_file(GOLDEN / case)
    tensors = load_file(GOLDEN / case / "intermediates_quant.safetensors")
    prefix = f"full.prefill.layers.{layer}."
    query, keys, expected = (tensors[f"{prefix}indexer.{n}"][0] for n in ("q", "compressor.out", "topk_idxs"))
    x = tensors[f"{prefix}attn.in"][0]
    project = load_file(GOLDEN / case / "model.safetensors")[f"layers.{layer}.attn.indexer.weights_proj.weight"]
    tokens, heads, dim = query.shape
    weights = (x.double() @ project.double().t()).bfloat16().float() * (dim * heads) ** -0.5
    pages = allocate_key_pages(2, 64, dim, format)
    where = torch.ones(len(keys), dtype=torch.int32), torch.arange(len(keys))
    write_keys(pages, keys, *where, 64)
    assert torch.equal(read_keys(pages, *where, 64, dim, torch.bfloat16), keys)
    a = {
        "query": query,
        "weights": weights,
        "pages": pages,
        "table": torch.tensor([[1]], dtype=torch.int32),
        "sequence": torch.zeros(tokens, dtype=torch.int32),
        "lengths": (torch.arange(tokens, dtype=torch.int32) + 1) // 4,
        "k": config.index_topk,
        "page_size": 64,
    }
    for row, official in zip(run(implementation, a).tolist(), expected.tolist(), strict=True):
        assert {entry for entry in row if entry >= 0} == {entry - tokens for entry in official if entry >= 0}


def test_op_registration() -> None:
    a = make()
    for op in (torch.ops.dsv4.index_topk, torch.ops.dsv4._index_topk_reference):
        check_op(op, *a.values())
    expected = index_topk(**a)
    compiled = torch.compile(lambda q: index_topk(**{**a, "query": q}) + 1, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(a["query"]), expected + 1)


def test_has_no_gradient() -> None:
    a = make()
    a["query"].requires_grad_()
    result = index_topk(**a)
    assert not result.requires_grad
    assert_same_bits(result, index_topk_reference(**a))


BAD: list[tuple[str, dict[str, Any]]] = [
    (
        "query must be bfloat16 or float16 or float32 or float64 [tokens, index_heads, dim], got float32 [8, 32]",
        {"query": torch.zeros(8, 32)},
    ),
    ("weights must be float32 or float64 [8, 3], got bfloat16 [8, 3]", {"weights": torch.zeros(8, 3).bfloat16()}),
    ("weights must be float32 or float64 [8, 3], got float32 [8, 4]", {"weights": torch.zeros(8, 4)}),
    (
        "pages must be bfloat16 or float16 or float32 or float64 [pages, 4, 32], got float32 [2, 4, 64]",
        {"pages": torch.zeros(2, 4, 64)},
    ),
    ("pages must be uint8 [pages, 68 or 144], got uint8 [2, 100]", {"pages": torch.zeros(2, 100).byte()}),
    ("table must be int32 [sequences, blocks], got int64 [3, 8]", {"table": torch.zeros(3, 8).long()}),
    ("sequence must be int32 [8], got int32 [7]", {"sequence": torch.zeros(7).int()}),
    ("lengths must be int32 [8], got int64 [8]", {"lengths": torch.zeros(8).long()}),
    ("k must be at least 1, got 0", {"k": 0}),
    ("the page size of pages must be at least 1, got 0", {"page_size": 0}),
    ("sequence must lie in [0, 3), the rows of the table, got 3", {"sequence": torch.full((8,), 3).int()}),
    ("sequence must lie in [0, 3), the rows of the table, got -7", {"sequence": torch.full((8,), -7).int()}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:60] for message, _ in BAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refuses(dtype: torch.dtype, message: str, change: dict[str, Any]) -> None:
    """In the same words whether a kernel or the reference would have run."""
    assert_rejects(index_topk, make(dtype=dtype), f"index_topk: {message}", **change)
