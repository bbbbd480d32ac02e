"""index_topk against a definition in loops, the golden selections, and the rules for ties, NaN and absent entries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4.model.config import Config
from dsv4.ops import index_topk, index_topk_reference
from dsv4.ops.layout import allocate_key_pages, read_keys, write_keys
from dsv4.testing import assert_rejects, assert_rows_independent, assert_same_bits, check_op, grid, strided

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
NAN = float("nan")


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

    `levels`: draw from so few values that scores tie.
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
        for entry in range(max(row, default=0)):
            pages[table[s, entry // page_size], entry % page_size] = draw(dim)
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


def brute_force(a: dict[str, Any]) -> Tensor:
    tokens, heads, _ = a["query"].shape
    rows = []
    for t in range(tokens):
        scored = []
        for entry in range(int(a["lengths"][t])):
            block = entry // a["page_size"]
            page = int(a["table"][int(a["sequence"][t]), block]) if block < a["table"].shape[1] else -1
            if page < 0:
                continue
            key = a["pages"][page, entry % a["page_size"]].double()
            score = torch.zeros((), dtype=torch.float64)
            for h in range(heads):
                score += a["weights"][t, h].double() * (a["query"][t, h].double() * key).sum().relu()
            value = float(score if a["query"].dtype == torch.float64 else score.float())
            if value == value:
                scored.append((-value, entry))
        best = sorted(entry for _, entry in sorted(scored)[: a["k"]])
        rows.append(best + [-1] * (a["k"] - len(best)))
    return torch.tensor(rows, dtype=torch.int32).view(tokens, a["k"])


def assert_matches(a: dict[str, Any]) -> None:
    result = index_topk(**a)
    assert result.is_contiguous()
    assert_same_bits(result, brute_force(a))


@pytest.mark.parametrize(
    "case",
    grid(
        dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
        heads=[1, 5],
        k=[1, 6, 30, 31, 64],
        page_size=[1, 4, 53],
    ),
)
def test_equals_the_definition(case: dict[str, Any]) -> None:
    assert_matches(make(**case))


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129])
def test_lengths_around_pages(length: int) -> None:
    assert_matches(make(lengths=((length,), (length - 1, length + 1)), page_size=64, k=64, dim=128, heads=4))


@pytest.mark.parametrize("seed", range(20))
def test_ties_go_to_the_lower_entry(seed: int) -> None:
    a = make(lengths=((40, 39), (25,)), heads=2, dim=4, levels=1, k=7, seed=seed)
    scores = [len(set(row)) for row in brute_force({**a, "k": 40}).tolist()]
    assert max(scores) > 20
    assert_matches(a)


def test_all_scores_equal() -> None:
    a = make(lengths=((30, 5),), k=8)
    a["query"].zero_()
    assert index_topk(**a).tolist() == [list(range(8)), [0, 1, 2, 3, 4, -1, -1, -1]]
    a["weights"].fill_(-1)  # -0.0 and 0.0 are one score
    a["query"][:, 0].normal_(generator=torch.Generator().manual_seed(0))
    assert_matches(a)


def test_scores_are_rounded_to_float32_before_they_are_compared() -> None:
    a = make(lengths=((2,),), heads=1, k=1)
    a["query"].fill_(1.0)
    a["weights"].fill_(1.0)
    keys = a["pages"][a["table"][0, 0]]
    keys[:2] = 0.0
    keys[:2, 0] = 1.0
    keys[1, 1] = 2.0**-30
    assert index_topk(**a).tolist() == [[0]]
    for name in ("query", "weights", "pages"):
        a[name] = a[name].double()
    assert index_topk(**a).tolist() == [[1]]


def test_nan_and_infinite_scores() -> None:
    a = make(lengths=((30, 12), (9,)), k=8)
    for entry, value in ((0, NAN), (3, NAN), (5, float("inf")), (7, NAN), (11, -float("inf"))):
        a["pages"][a["table"][0, entry // 4], entry % 4] = value
    a["weights"][0] = -1  # scores of infinite keys are -inf or, where products cancel, NaN
    assert_matches(a)
    a["query"][1] = NAN
    result = index_topk(**a)
    assert result[1].tolist() == [-1] * 8
    assert_same_bits(result, brute_force(a))


def test_minus_infinity_is_a_score() -> None:
    a = make(lengths=((5, 5),), heads=1, k=4)
    a["query"].fill_(1.0)
    a["pages"][a["table"][0, 0], :4] = 1.0
    a["weights"].fill_(-float("inf"))
    a["pages"][a["table"][0, 1], 0] = 1.0
    assert index_topk(**a).tolist() == [[0, 1, 2, 3]] * 2


def test_entries_that_are_not_stored() -> None:
    a = make(lengths=((30, 14), (9,)), k=8)
    full = index_topk(**a)
    a["table"][0, 1] = -1
    assert_matches(a)
    assert not torch.equal(index_topk(**a), full)
    a["table"] = a["table"][:, :3]
    assert_matches(a)
    expected = index_topk(**{**a, "lengths": torch.full_like(a["lengths"], 12)})
    assert_same_bits(index_topk(**{**a, "lengths": torch.full_like(a["lengths"], 2**31 - 1)}), expected)
    a["table"].fill_(-1)
    assert (index_topk(**a) == -1).all()
    assert (index_topk(**{**a, "table": a["table"][:, :0]}) == -1).all()


def test_nothing_visible_and_no_rows() -> None:
    a = make(lengths=((0, 0), (0,)))
    a["lengths"][1] = -5
    assert (index_topk(**a) == -1).all()
    for name in ("query", "weights", "sequence", "lengths"):
        a[name] = a[name][:0]
    assert index_topk(**a).shape == (0, 6)


@pytest.mark.parametrize("format", ["fp4", "fp8"])
def test_byte_pools_equal_plain_pools_of_their_values(format: str) -> None:
    a = make(dim=128, dtype=torch.bfloat16, page_size=5)
    count = len(a["pages"])
    where = torch.arange(count * 5) // 5, torch.arange(count * 5) % 5
    pages = allocate_key_pages(count, 5, 128, format)
    write_keys(pages, a["pages"].flatten(0, 1), *where, 5)
    values = read_keys(pages, *where, 5, 128, torch.bfloat16).view(count, 5, 128)
    assert values.isnan().any()
    assert_same_bits(index_topk(**{**a, "pages": pages}), brute_force({**a, "pages": values}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    lengths = (tuple(range(150, 260, 2)), (3,), tuple(range(40, 60)))
    a = make(lengths=lengths, dim=64, heads=4, dtype=dtype, k=32, page_size=16)
    names = ("query", "weights", "sequence", "lengths")
    assert_rows_independent(
        lambda *rows: index_topk(**{**a, **dict(zip(names, rows, strict=True))}), [a[n] for n in names], (1, 40, 2, 7)
    )


def test_blocks_never_change_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a = make(lengths=((60, 61, 62, 63), (40,)))
    expected = index_topk(**a)
    module = sys.modules["dsv4.ops.index"]
    for elements, keys in ((1, 8192), (1 << 22, 7), (200, 16)):
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(module, "_KEYS_PER_BLOCK", keys)
        assert_same_bits(index_topk(**a), expected)


def test_inputs_with_gaps() -> None:
    a = make()
    expected = index_topk(**a)
    for name in ("query", "weights", "pages", "table"):
        a[name] = strided(a[name])
    for name in ("sequence", "lengths"):
        a[name] = strided(a[name].unsqueeze(0))[0]
    assert_same_bits(index_topk(**a), expected)


@pytest.mark.parametrize(("case", "layer"), [("dev_a", 1), ("dev_b", 0), ("dev_c", 1)])
@pytest.mark.parametrize("format", ["fp4", "plain"])
def test_golden_selections(case: str, layer: int, format: str) -> None:
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
    result = index_topk(
        query,
        weights,
        pages,
        torch.tensor([[1]], dtype=torch.int32),
        torch.zeros(tokens, dtype=torch.int32),
        (torch.arange(tokens, dtype=torch.int32) + 1) // 4,
        config.index_topk,
    )
    for row, official in zip(result.tolist(), expected.tolist(), strict=True):
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
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:60] for message, _ in BAD])
def test_refuses(message: str, change: dict[str, Any]) -> None:
    assert_rejects(index_topk, make(), f"index_topk: {message}", **change)
