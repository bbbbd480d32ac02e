"""sparse_attention against a definition in loops, the golden vectors, and the rules for keys that must not count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import KERNELS, NAN, Attend, assert_matches, brute_force, keys_of, make
from safetensors.torch import load_file
from torch import Tensor

from dsv4.model.config import Config
from dsv4.ops import rope_frequencies, rope_rows, sparse_attention, sparse_attention_reference
from dsv4.ops.layout import allocate_pages, read_rows, write_rows
from dsv4.testing import (
    assert_no_worse,
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    strided,
    ulp_distance,
)

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@pytest.fixture(params=["reference", *KERNELS])
def attend(request: pytest.FixtureRequest) -> Attend:
    return Attend(request.param)


@pytest.mark.parametrize(
    "case",
    grid(
        source=["window", "indices", "lengths"],
        dtype=[torch.float32, torch.bfloat16],
        heads=[1, 5, 16],
        head_dim=[32, 96],
    ),
)
def test_equals_the_definition(attend: Attend, case: dict[str, Any]) -> None:
    assert_matches(attend, attend.make(**case))


@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
def test_float16(source: str) -> None:
    assert_matches(Attend("reference"), make(source=source, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize(
    "names", [("query", "window_pages", "compressed_pages"), ("sink",), ("rope",), ("window_pages",)]
)
def test_dtypes_without_a_kernel(names: tuple[str, ...], dtype: torch.dtype) -> None:
    """One such argument is enough for the reference."""
    a = make(dtype=torch.float32)
    if names[0] in ("sink", "rope"):
        dtype = torch.float64
    a.update({name: a[name].to(dtype) for name in names})
    for x, y in zip(sparse_attention(**a), sparse_attention_reference(**a), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize(("heads", "head_dim"), [(128, 64), (64, 512), (7, 256), (2, 160)])
def test_equals_the_definition_at_other_sizes(attend: Attend, heads: int, head_dim: int) -> None:
    assert_matches(
        attend, attend.make(heads=heads, head_dim=head_dim, runs=((30, 3),), rope_dim=32, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 128, 300])
@pytest.mark.parametrize("start", [0, 1, 14, 15, 16, 31, 255])
def test_window_around_page_boundaries(attend: Attend, window: int, start: int) -> None:
    assert_matches(
        attend, attend.make(runs=((start, 4), (start + 1, 1)), window=window, source="window", rope_dim=None)
    )


@pytest.mark.parametrize("page_size", [1, 2, 53, 64])
@pytest.mark.parametrize("source", ["indices", "lengths"])
def test_entries_around_page_boundaries(attend: Attend, page_size: int, source: str) -> None:
    for start in (4 * page_size - 3, 8 * page_size - 2):
        assert_matches(attend, attend.make(runs=((start, 6),), page_size=page_size, source=source, k=9))


def test_more_indices_than_entries_and_none_visible(attend: Attend) -> None:
    a = attend.make(runs=((0, 3), (5, 2)), k=64)
    assert a["lengths"].tolist() == [0, 0, 0, 1, 1]
    assert_matches(attend, a)
    assert_matches(attend, attend.make(runs=((0, 2),), source="lengths"))
    a["indices"] = a["indices"][:, :0]
    assert_matches(attend, a)


def test_no_rows(attend: Attend) -> None:
    a = attend.make()
    for name in ("query", "sequence", "position", "indices", "lengths", "rope"):
        a[name] = a[name][:0]
    out, lse = attend(a)
    assert out.shape == (0, 3, 32)
    assert lse.shape == (0, 3)
    assert out.dtype == attend.wide
    assert lse.dtype == attend.wide


@pytest.mark.parametrize("sink", [-math.inf, 0.0, math.inf])
def test_rows_without_keys_and_infinite_sinks(attend: Attend, sink: float) -> None:
    a = attend.make(source="lengths")
    a["sink"].fill_(sink)
    a["window_table"][0] = -1
    a["compressed_table"][0] = -1
    out, lse = attend(a)
    empty = a["sequence"] == 0
    assert not out[empty].any()
    assert torch.isposinf(lse[empty]).all()
    expected, expected_lse = brute_force(a)
    torch.testing.assert_close(lse, expected_lse.to(lse.dtype))
    torch.testing.assert_close(out, expected.to(out.dtype) if sink < math.inf else torch.zeros_like(out))
    assert bool(out[~empty].any()) == (sink < math.inf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_heads(dtype: torch.dtype) -> None:
    out, lse = sparse_attention(**make(heads=0, dtype=dtype))
    assert out.shape == (17, 0, 32)
    assert lse.shape == (17, 0)


@pytest.mark.parametrize("runs", [((-6, 3), (9, 2)), ((-2, 5), (9, 2))])
@pytest.mark.parametrize("consecutive", [True, False])
def test_positions_below_0_see_no_window(attend: Attend, runs: Any, consecutive: bool) -> None:
    a = attend.make(runs=runs, source="window")
    if not consecutive:
        a["position"] = a["position"].flip(0)
        a["sequence"] = a["sequence"].flip(0)
    assert_matches(attend, a)
    assert torch.isposinf(attend(a)[1][a["position"] < 0]).all()


@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
def test_pages_that_are_not_stored_are_left_out(attend: Attend, source: str) -> None:
    a = attend.make(source=source, runs=((40, 12),), window=30)
    full = attend(a)
    a["window_table"][0, 1] = -1
    if source != "window":
        a["compressed_table"][0, 1] = -1
    assert_matches(attend, a)
    assert not torch.equal(attend(a)[0], full[0])
    a["window_table"] = a["window_table"][:, :2]  # positions past the table
    if source != "window":
        a["compressed_table"] = a["compressed_table"][:, :3]
    assert_matches(attend, a)


@pytest.mark.parametrize("source", ["indices", "lengths"])
def test_lengths_past_the_table(attend: Attend, source: str) -> None:
    a = attend.make(source=source, runs=((60, 2),), dtype=torch.bfloat16)
    a["compressed_pages"].nan_to_num_(0.5)
    a["compressed_table"] = a["compressed_table"][:, :3]
    expected = attend({**a, "lengths": torch.full_like(a["lengths"], 12)})
    for x, y in zip(attend({**a, "lengths": torch.full_like(a["lengths"], 2**31 - 1)}), expected, strict=True):
        assert_same_bits(x, y)


def test_an_infinite_key_of_weight_zero_spoils_only_its_own_dim(attend: Attend) -> None:
    a = attend.make(source="window", runs=((40, 6),), heads=1, rope_dim=None)
    a["query"][:, :, 0] = 1.0
    a["window_pages"][a["window_table"][0, 43 // 16], 43 % 16, 0] = -math.inf
    out, _ = attend(a)
    torch.testing.assert_close(out, brute_force(a)[0].to(out.dtype), equal_nan=True)
    assert out[:, 0, 0].isnan().tolist() == [False] * 3 + [True] * 3
    assert torch.isfinite(out[:, 0, 1:]).all()


@pytest.mark.parametrize("source", ["window", "lengths"])
def test_a_nan_reaches_only_the_rows_that_see_it(attend: Attend, source: str) -> None:
    """Rows of a block share their reads, so a key of one row lies next to the others' scores."""
    a = attend.make(source=source, runs=((40, 40),), window=5, dtype=torch.bfloat16)
    before = attend(a)
    if source == "window":
        a["window_pages"][a["window_table"][0, 60 // 16], 60 % 16] = NAN
        sees = (a["position"] >= 60) & (a["position"] < 65)
    else:
        a["compressed_pages"][a["compressed_table"][0, 17 // 4], 17 % 4] = math.inf
        sees = a["lengths"] > 17
    after = attend(a)
    assert 0 < sees.sum() < len(sees)
    for x, y in zip(after, before, strict=True):
        assert_same_bits(x[~sees], y[~sees])
    assert not torch.isfinite(after[0][sees]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
def test_a_row_does_not_depend_on_its_company(attend: Attend, source: str, dtype: torch.dtype) -> None:
    a = attend.make(source=source, dtype=dtype, runs=((250, 70), (0, 3), (61, 33)), heads=4, head_dim=64, window=32)
    names = [n for n in ("query", "sequence", "position", "rope", "indices", "lengths") if a[n] is not None]

    def part(*rows: Tensor) -> tuple[Tensor, Tensor]:
        return attend({**a, **dict(zip(names, rows, strict=True))})

    assert_rows_independent(part, [a[n] for n in names], cuts=(1, 64, 2, 5))


def test_a_block_of_rows_never_changes_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["dsv4.ops.attention"]
    for source in ("window", "indices", "lengths"):
        a = make(source=source, dtype=torch.bfloat16, runs=((40, 40),))
        monkeypatch.undo()
        expected = sparse_attention_reference(**a)
        for elements in (1, 3000):
            monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
            monkeypatch.setattr(module, "_DECODED_ELEMENTS", elements)
            for x, y in zip(sparse_attention_reference(**a), expected, strict=True):
                assert_same_bits(x, y)


@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
@pytest.mark.parametrize("rope_dim", [64, 32])
def test_fp8_pools_equal_plain_pools_of_their_values(attend: Attend, source: str, rope_dim: int) -> None:
    a = attend.make(source=source, head_dim=192, rope_dim=rope_dim, dtype=torch.bfloat16, page_size=5)
    plain = dict(a)
    for name, size in (("window_pages", a["window_page_size"]), ("compressed_pages", a["page_size"])):
        if a[name] is None:
            continue
        count = len(a[name])
        where = torch.arange(count * size)
        a[name] = allocate_pages(count, size, 192, rope_dim, "fp8")
        write_rows(a[name], plain[name].flatten(0, 1), where // size, where % size, size, rope_dim)
        rows = read_rows(a[name], where // size, where % size, size, 192, rope_dim, torch.bfloat16)
        plain[name] = rows.view(count, size, 192)
    for x, y in zip(attend(a), attend(plain), strict=True):
        assert_same_bits(x, y)
    assert_matches(attend, {**a, **{n: plain[n] for n in ("window_pages", "compressed_pages")}})
    # Without a rotation to undo, the width of the bfloat16 part is the argument's, 64 unless given.
    bare = {**a, "rope": None, "rope_dim": None if rope_dim == 64 else rope_dim}
    for x, y in zip(attend(bare), attend({**plain, "rope": None}), strict=True):
        assert_same_bits(x, y)


def test_inputs_with_gaps(attend: Attend) -> None:
    a = attend.make(dtype=torch.bfloat16)
    expected = attend(a)
    for name in ("query", "window_pages", "compressed_pages", "indices", "window_table", "compressed_table", "rope"):
        a[name] = strided(a[name])
    for name in ("sequence", "position", "lengths", "sink"):
        a[name] = strided(a[name].unsqueeze(0))[0]
    for x, y in zip(attend(a), expected, strict=True):
        assert_same_bits(x, y)


def test_no_worse_than_eager_bfloat16(attend: Attend) -> None:
    a = attend.make(
        runs=((500, 40),), heads=8, head_dim=128, window=64, source="window", rope_dim=None, dtype=torch.bfloat16
    )
    exact, _ = brute_force(a)
    rows = []
    for row in range(40):
        keys = torch.stack(keys_of(a, row)).bfloat16()
        scores = (a["query"][row] @ keys.t()).float() * a["scale"]
        scores = torch.cat((scores, a["sink"].unsqueeze(1)), dim=1)
        rows.append(scores.softmax(dim=1)[:, :-1].bfloat16() @ keys)
    assert_no_worse(attend(a)[0], torch.stack(rows), exact)


def test_golden_vectors_of_the_op(attend: Attend) -> None:
    """Bit for bit in bfloat16; sink, -1 slots, 20 keys of 40."""
    ops = load_file(GOLDEN / "ops" / "ops.safetensors")
    query, kv, index, sink, out, wide = (ops[f"sparse_attn.{n}"] for n in ("q", "kv", "idx", "sink", "o", "o_fp32"))
    batch, rows, _, head_dim = query.shape
    for dtype, expected, tolerance in ((torch.bfloat16, out, 0.0), (torch.float32, wide, 5e-7)):
        pages = kv.to(dtype)
        result, _ = attend.run(
            query.to(dtype).flatten(0, 1),
            pages,
            torch.full((batch, 1), -1, dtype=torch.int32),
            pages,
            torch.arange(batch, dtype=torch.int32).unsqueeze(1),
            torch.arange(batch, dtype=torch.int32).repeat_interleave(rows),
            torch.zeros(batch * rows, dtype=torch.int32),
            index.flatten(0, 1),
            torch.full((batch * rows,), kv.shape[1], dtype=torch.int32),
            sink,
            None,
            1,
            head_dim**-0.5,
            40,
            40,
        )
        assert (result.view_as(expected).double() - expected.double()).abs().max() <= tolerance


@pytest.mark.parametrize(("case", "layer"), [("dev_a", 0), ("dev_a", 1), ("dev_b", 0), ("dev_b", 1), ("dev_c", 1)])
def test_golden_layers(attend: Attend, case: str, layer: int) -> None:
    """Queries, FP8 rows and selections of whole layers: bfloat16 results equal but for rare rounding steps."""
    config = Config.from_file(GOLDEN / case)
    tensors = load_file(GOLDEN / case / "intermediates_quant.safetensors")
    names = ("q", "kv_all", "topk_idxs", "o_derot")
    query, kv, index, expected = (tensors[f"full.prefill.layers.{layer}.attn.{n}"][0] for n in names)
    sink = load_file(GOLDEN / case / "model.safetensors")[f"layers.{layer}.attn.attn_sink"]
    tokens, _, head_dim = query.shape
    ratio = config.compress_ratios[layer]
    rope_dim = config.qk_rope_head_dim
    frequencies = (
        rope_frequencies(rope_dim, config.compress_rope_theta, config.rope_scaling)
        if ratio
        else rope_frequencies(rope_dim, config.rope_theta)
    )
    position = torch.arange(tokens, dtype=torch.int32)

    def pool(rows: Tensor) -> Tensor:
        pages = allocate_pages(1, 64, head_dim, rope_dim, "fp8")
        where = torch.arange(len(rows))
        write_rows(pages, rows, torch.zeros_like(where), where, 64, rope_dim)
        assert torch.equal(read_rows(pages, 0 * where, where, 64, head_dim, rope_dim, torch.bfloat16), rows)
        return pages

    table = torch.zeros(1, 1, dtype=torch.int32)
    selected = ratio == 4
    out, _ = attend.run(
        query,
        pool(kv[:tokens]),
        table,
        pool(kv[tokens:]) if ratio else None,
        table if ratio else None,
        torch.zeros(tokens, dtype=torch.int32),
        position,
        torch.where(index >= tokens, index - tokens, -1) if selected else None,
        (position + 1) // ratio if ratio else None,
        sink,
        rope_rows(position, frequencies),
        config.sliding_window,
        head_dim**-0.5,
        64,
        64,
    )
    assert ulp_distance(out.flatten(), expected.flatten()).max() <= 1
    assert (out.flatten() != expected.flatten()).double().mean() < 1e-3


GRADIENT_RUNS = ((9, 4), (0, 3))


@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
@pytest.mark.parametrize("rope_dim", [None, 8])
def test_gradients(source: str, rope_dim: int | None) -> None:
    a = make(source=source, runs=GRADIENT_RUNS, heads=2, head_dim=32, window=3, rope_dim=rope_dim, k=5)
    a["window_table"][1] = -1  # with it a row without keys
    names = [n for n in ("query", "window_pages", "compressed_pages", "sink") if a[n] is not None]
    leaves = [a[n].nan_to_num(0.5).requires_grad_() for n in names]

    def attend(*values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = sparse_attention(**{**a, **dict(zip(names, values, strict=True))})
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    grad = torch.autograd.grad(attend(*leaves)[0].sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grad)


def test_gradients_with_infinite_sinks_are_finite() -> None:
    a = make(heads=2, source="lengths")
    a["sink"] = torch.tensor([math.inf, -math.inf], dtype=torch.float64, requires_grad=True)
    a["query"].requires_grad_()
    out, lse = sparse_attention(**a)
    query, sink = torch.autograd.grad((out.sum() + lse.sum()), (a["query"], a["sink"]))
    assert torch.isfinite(query).all()
    assert not sink.any()


def test_backward_equals_autograd_of_the_reference() -> None:
    """In bfloat16 too, where the numerators are rounded on the way."""
    a = make(dtype=torch.bfloat16, head_dim=64)
    names = ("query", "window_pages", "compressed_pages", "sink")
    weight = torch.randn(a["query"].shape, generator=torch.Generator().manual_seed(1))

    def grads(function: Any) -> tuple[Tensor, ...]:
        leaves = [a[n].nan_to_num(0.5).requires_grad_() for n in names]
        out, lse = function(**{**a, **dict(zip(names, leaves, strict=True))})
        return torch.autograd.grad((out.float() * weight).sum() + lse.sin().sum(), leaves)

    for own, expected in zip(grads(sparse_attention), grads(sparse_attention_reference), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
        assert own.abs().max() > 0


def test_byte_pools_take_no_gradient() -> None:
    a = make(source="window", head_dim=96, rope_dim=None, dtype=torch.bfloat16)
    count = len(a["window_pages"])
    a["window_pages"] = allocate_pages(count, 16, 96, 32, "fp8")
    a["rope_dim"] = 32
    a["query"].requires_grad_()
    out, lse = sparse_attention(**a)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), a["query"])
    assert grad.shape == a["query"].shape
    assert not grad.any()


@pytest.mark.parametrize("source", ["window", "indices", "lengths"])
def test_op_registration(source: str) -> None:
    a = make(source=source, runs=GRADIENT_RUNS)
    for name in ("query", "window_pages", "compressed_pages", "sink"):
        if a[name] is not None:
            a[name] = a[name].nan_to_num(0.5).requires_grad_()
    order = list(sparse_attention_reference.__annotations__)[:-1]
    check_op(torch.ops.dsv4._sparse_attention_reference, *(a[n] for n in order))
    narrow = [a[n].float() if isinstance(a[n], Tensor) and a[n].is_floating_point() else a[n] for n in order]
    narrow = [
        x.detach().requires_grad_(y.requires_grad) if isinstance(x, Tensor) else x
        for x, y in zip(narrow, (a[n] for n in order), strict=True)
    ]
    check_op(torch.ops.dsv4.sparse_attention, *narrow)


def test_compiles_without_a_break() -> None:
    a = make(dtype=torch.float32)
    a["query"].requires_grad_()
    expected = sparse_attention(**a)[0]
    compiled = torch.compile(
        lambda q: sparse_attention(**{**a, "query": q})[0] * 2, fullgraph=True, backend="aot_eager"
    )
    result = compiled(a["query"])
    assert_same_bits(result.detach(), expected.detach() * 2)
    (own,) = torch.autograd.grad(result.sum(), a["query"])
    (eager,) = torch.autograd.grad(2 * expected.sum(), a["query"])
    assert_same_bits(own, eager)


BAD: list[tuple[str, dict[str, Any]]] = [
    (
        "query must be bfloat16 or float16 or float32 or float64 [tokens, heads, head_dim], got float32 [17, 32]",
        {"query": torch.zeros(17, 32)},
    ),
    (
        "query must be bfloat16 or float16 or float32 or float64 [tokens, heads, head_dim], got int32 [17, 3, 32]",
        {"query": torch.zeros(17, 3, 32, dtype=torch.int32)},
    ),
    ("indices must be int32 [17, k], got int64 [17, 6]", {"indices": torch.zeros(17, 6, dtype=torch.int64)}),
    ("indices must be int32 [17, k], got int32 [9, 6]", {"indices": torch.zeros(9, 6, dtype=torch.int32)}),
    ("lengths must be int32 [17], got int32 [3]", {"lengths": torch.zeros(3, dtype=torch.int32)}),
    ("lengths must be given with compressed_pages, got None", {"lengths": None}),
    ("compressed_table must be given with compressed_pages, got None", {"compressed_table": None}),
    ("compressed_table must be None without compressed_pages", {"compressed_pages": None}),
    (
        "indices must be None without compressed_pages",
        {"compressed_pages": None, "compressed_table": None, "lengths": None},
    ),
    (
        "lengths must be None without compressed_pages",
        {"compressed_pages": None, "compressed_table": None, "indices": None},
    ),
    ("sequence must be int32 [17], got int64 [17]", {"sequence": torch.zeros(17, dtype=torch.int64)}),
    ("position must be int32 [17], got int32 [16]", {"position": torch.zeros(16, dtype=torch.int32)}),
    ("sink must be float32 or float64 [3], got bfloat16 [3]", {"sink": torch.zeros(3, dtype=torch.bfloat16)}),
    ("sink must be float32 or float64 [3], got float32 [4]", {"sink": torch.zeros(4)}),
    ("rope must be float32 or float64 [17, rope_dim / 2, 2], got float32 [1, 8, 2]", {"rope": torch.zeros(1, 8, 2)}),
    ("rope must have at most 16 pairs, got 17", {"rope": torch.zeros(17, 17, 2)}),
    ("rope_dim must be that of rope, 16, got 32", {"rope_dim": 32}),
    ("window must be at least 1, got 0", {"window": 0}),
    (
        "window_pages must be bfloat16 or float16 or float32 or float64 [pages, 16, 32], got float32 [4, 16, 64]",
        {"window_pages": torch.zeros(4, 16, 64)},
    ),
    (
        "compressed_pages must be uint8 [pages, 240], got uint8 [4, 200]",
        {"compressed_pages": torch.zeros(4, 200, dtype=torch.uint8)},
    ),
    (
        "compressed_table must be int32 [3, blocks], got int32 [2, 4]",
        {"compressed_table": torch.zeros(2, 4, dtype=torch.int32)},
    ),
    (
        "window_table must be int32 [sequences, blocks], got int64 [3, 17]",
        {"window_table": torch.zeros(3, 17, dtype=torch.int64)},
    ),
    ("the page size of window_pages must be at least 1, got 0", {"window_page_size": 0}),
    (
        "sequence must lie in [0, 3), the rows of the table, got 3",
        {"sequence": torch.full((17,), 3, dtype=torch.int32)},
    ),
    (
        "sequence must lie in [0, 3), the rows of the table, got -1",
        {"sequence": torch.full((17,), -1, dtype=torch.int32)},
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of kernels, of the reference alone
@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:60] for message, _ in BAD])
def test_refuses(message: str, change: dict[str, Any], dtype: torch.dtype) -> None:
    assert_rejects(sparse_attention, make(dtype=dtype), f"sparse_attention: {message}", **change)
