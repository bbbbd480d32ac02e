"""compress against a definition in loops, however the rows are cut into calls; compress_entries and its gradients."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4.model.config import Config
from dsv4.ops import compress, compress_entries, compress_entries_reference, rope_frequencies, rope_rows
from dsv4.ops.layout import allocate_key_pages, allocate_pages, read_keys, read_rows, write_keys, write_rows
from dsv4.testing import assert_rejects, assert_same_bits, check_op, grid, strided, ulp_distance

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
NAN = float("nan")
ROWS = ("kv", "gate", "rope", "sequence", "position")


def make(
    runs: tuple[tuple[int, int], ...] = ((0, 23), (0, 9), (0, 4)),
    ratio: int = 4,
    overlap: bool = True,
    head_dim: int = 32,
    rope_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype | None = None,
    page_size: int = 3,
    spare: int = 1,
    rotate: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Sequences (first position, rows); pages and state start as NaN, so that nothing unwritten may count."""
    g = torch.Generator().manual_seed(seed)
    sets = 2 if overlap else 1
    sequence = torch.cat([torch.full((n,), s) for s, (_, n) in enumerate(runs)]).int()
    position = torch.cat([torch.arange(start, start + n) for start, n in runs]).int()
    blocks = max(start + n for start, n in runs) // ratio // page_size + 1
    count = len(runs) * blocks + 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    angle = draw(64)[: rope_dim // 2] * (position // ratio * ratio).unsqueeze(1)
    return {
        "kv": draw(len(position), sets * head_dim),
        "gate": 2 * draw(len(position), sets * head_dim),
        "ape": draw(ratio, sets * head_dim),
        "norm_weight": (1 + 0.2 * draw(head_dim)).to(weight_dtype or dtype),
        "rope": torch.stack((angle.cos(), angle.sin()), dim=-1),
        "state": torch.full((len(runs), sets * ratio + spare, 2, sets * head_dim), NAN, dtype=dtype),
        "pages": torch.full((count, page_size, head_dim), NAN, dtype=weight_dtype or dtype),
        "table": torch.randperm(count, generator=g)[: len(runs) * blocks].int().view(len(runs), blocks),
        "sequence": sequence,
        "position": position,
        "ratio": ratio,
        "eps": 1e-3,
        "page_size": page_size,
        "rotate": rotate,
    }


def feed(a: dict[str, Any], cuts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(pages, state) after calls, the i-th of which takes the next cuts[i][s] rows of sequence s. Leaves `a` alone."""
    state, pages = a["state"].clone(), a["pages"].clone()
    rows = [(a["sequence"] == s).nonzero().squeeze(1) for s in range(len(state))]
    taken = [0] * len(rows)
    for lengths in cuts:
        chosen = torch.cat([rows[s][taken[s] : taken[s] + n] for s, n in enumerate(lengths)])
        taken = [done + n for done, n in zip(taken, lengths, strict=True)]
        compress(**{**a, **{name: a[name][chosen] for name in ROWS}, "state": state, "pages": pages})
    assert taken == [len(r) for r in rows]
    return pages, state


def at_once(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return feed(a, [[int((a["sequence"] == s).sum()) for s in range(len(a["state"]))]])


def brute_force(a: dict[str, Any], sequence: int) -> Tensor:
    """Entries of a sequence that starts at position 0, channel after channel, in float64."""
    mine = a["sequence"] == sequence
    kv, gate, rope = (a[name][mine].double() for name in ("kv", "gate", "rope"))
    ratio, head_dim = a["ratio"], len(a["norm_weight"])
    overlap = kv.shape[1] == 2 * head_dim
    entries = []
    for j in range(len(kv) // ratio):
        entry = torch.zeros(head_dim, dtype=torch.float64)
        for d in range(head_dim):
            weighted = total = 0.0
            for p in range(ratio * (j - 1) if overlap else ratio * j, ratio * (j + 1)):
                if p < 0:
                    continue
                channel = d + head_dim if overlap and p >= ratio * j else d
                weight = math.exp(float(gate[p, channel] + a["ape"][p % ratio, channel]))
                weighted += weight * float(kv[p, channel])
                total += weight
            entry[d] = weighted / total
        entry = entry.to(a["norm_weight"].dtype).double()
        entry = entry / (entry.square().mean() + a["eps"]).sqrt() * a["norm_weight"].double()
        entry = entry.to(a["norm_weight"].dtype).double()
        width = 2 * rope.shape[1]
        for i in range(width // 2):
            cos, sin = rope[ratio * j + ratio - 1, i]
            even, odd = entry[head_dim - width + 2 * i].clone(), entry[head_dim - width + 2 * i + 1].clone()
            entry[head_dim - width + 2 * i] = even * cos - odd * sin
            entry[head_dim - width + 2 * i + 1] = even * sin + odd * cos
        if a["rotate"]:
            signs = torch.tensor([[(-1) ** (r & c).bit_count() for c in range(head_dim)] for r in range(head_dim)])
            entry = signs.double() @ entry.to(a["norm_weight"].dtype).double() / math.sqrt(head_dim)
        entries.append(entry)
    return torch.stack(entries) if entries else torch.zeros(0, head_dim, dtype=torch.float64)


def stored(a: dict[str, Any], pages: Tensor, sequence: int, count: int) -> Tensor:
    size = a["page_size"]
    return torch.stack([pages[a["table"][sequence, j // size], j % size] for j in range(count)])


@pytest.mark.parametrize(
    "case", grid(overlap=[True, False], ratio=[1, 3, 4, 8], head_dim=[32, 96], dtype=[torch.float64, torch.float32])
)
def test_equals_the_definition(case: dict[str, Any]) -> None:
    a = make(**case)
    pages, _ = at_once(a)
    written = 0
    for s in range(3):
        expected = brute_force(a, s)
        written += len(expected)
        if not len(expected):
            continue
        got = stored(a, pages, s, len(expected))
        tolerance = 1e-12 if case["dtype"] == torch.float64 else 1e-6
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    assert int(torch.isfinite(pages).all(-1).sum()) == written


@pytest.mark.parametrize("rotate", [False, True])
def test_bfloat16_entries(rotate: bool) -> None:
    """Pooled in full precision, then rounded where the official program rounds."""
    a = make(dtype=torch.float32, weight_dtype=torch.bfloat16, head_dim=64, rotate=rotate)
    pages, _ = at_once(a)
    got, expected = stored(a, pages, 0, 5), brute_force(a, 0).bfloat16()
    assert got.dtype == torch.bfloat16
    assert (got != expected).double().mean() < 0.01
    assert ulp_distance(got, expected).double().quantile(0.99) <= 1


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("ratio", [3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_any_cut_gives_the_same_bits(overlap: bool, ratio: int, seed: int) -> None:
    a = make(overlap=overlap, ratio=ratio, dtype=torch.float32, weight_dtype=torch.bfloat16, spare=seed % 3)
    pages, state = at_once(a)
    g = torch.Generator().manual_seed(seed)
    left = [23, 9, 4]
    cuts = []
    while any(left):
        most = (1, 2, 5, 11, 4, 3)[seed]
        cuts.append([min(n, int(torch.randint(0, most + 1, (1,), generator=g))) for n in left])
        left = [n - c for n, c in zip(left, cuts[-1], strict=True)]
    again = feed(a, cuts)
    assert_same_bits(again[0], pages)
    assert_same_bits(again[1], state)


def test_alone_and_in_company_the_same_bits() -> None:
    a = make(dtype=torch.float32, runs=((0, 300), (0, 9), (0, 77)), head_dim=64)
    pages, state = at_once(a)
    for s in range(3):
        mine = a["sequence"] == s
        alone, alone_state = a["pages"].clone(), a["state"].clone()
        compress(**{**a, **{name: a[name][mine] for name in ROWS}, "state": alone_state, "pages": alone})
        count = int(mine.sum()) // 4
        assert_same_bits(stored(a, alone, s, count), stored(a, pages, s, count))
        assert_same_bits(alone_state[s], state[s])


def test_state_holds_the_last_positions() -> None:
    a = make(ratio=4, spare=3)
    _, state = at_once(a)
    for s, length in enumerate((23, 9, 4)):
        rows = (a["sequence"] == s).nonzero().squeeze(1)
        for p in range(max(0, length - 11), length):
            assert torch.equal(state[s, p % 11, 0], a["kv"][rows[p]])
            assert torch.equal(state[s, p % 11, 1], a["gate"][rows[p]] + a["ape"][p % 4])
    assert state[2, 4:].isnan().all()  # positions that never came


def test_a_step_back_within_the_spare_slots() -> None:
    """Rows that come again after a crop by at most `spare` positions meet the state they met before."""
    a = make(runs=((0, 20),), spare=3)
    pages, state = at_once(a)
    expected = pages.clone(), state.clone()
    for back in (1, 2, 3):
        chosen = slice(20 - back, 20)
        other = {**a, **{name: a[name][chosen] for name in ROWS}}
        wrong = {name: other[name] + 1 for name in ("kv", "gate")}
        compress(**{**other, **wrong, "state": state, "pages": pages})
        assert not torch.equal(state, expected[1])
        compress(**{**other, "state": state, "pages": pages})
        assert_same_bits(pages, expected[0])
        assert_same_bits(state, expected[1])


def test_entries_without_a_page_are_not_written() -> None:
    a = make()
    full, state = at_once(a)
    a["table"][0, 0] = -1
    pages, other = at_once(a)
    assert_same_bits(other, state)
    changed = ~((pages == full) | (pages.isnan() & full.isnan())).all(-1).all(-1)
    assert int(changed.sum()) == 1
    a["table"] = a["table"][:, :1]
    pages, other = at_once(a)
    assert_same_bits(other, state)
    assert int(torch.isfinite(pages).all(-1).sum()) == 2 + 1  # one page each of sequences 1 and 2


def test_no_rows() -> None:
    a = make()
    empty = {**a, **{name: a[name][:0] for name in ROWS}}
    compress(**empty)
    assert a["pages"].isnan().all()
    assert a["state"].isnan().all()


@pytest.mark.parametrize("format", ["fp8", "fp4", "key_fp8", "plain"])
def test_quantised_pools(format: str) -> None:
    rotate = format in ("fp4", "key_fp8")
    a = make(dtype=torch.float32, weight_dtype=torch.bfloat16, head_dim=128, rope_dim=64, rotate=rotate)
    entries, _ = at_once(a)
    count, size = len(a["pages"]), a["page_size"]
    where = torch.arange(count * size) // size, torch.arange(count * size) % size
    if rotate:
        kind = format.removeprefix("key_")
        a["pages"], expected = (allocate_key_pages(count, size, 128, kind) for _ in range(2))
    else:
        a["pages"], expected = (allocate_pages(count, size, 128, 64, format) for _ in range(2))
    got, _ = at_once(a)
    finite = torch.isfinite(entries.flatten(0, 1)).all(1)
    page = torch.where(finite, where[0], -1)
    if rotate:
        write_keys(expected, entries.flatten(0, 1), page, where[1], size)
        assert read_keys(got, *where, size, 128).any()
    else:
        write_rows(expected, entries.flatten(0, 1), page, where[1], size, 64)
        assert read_rows(got, *where, size, 128, 64).any()
    assert_same_bits(got, expected)


def test_inputs_with_gaps() -> None:
    a = make(dtype=torch.float32)
    expected = at_once(a)
    b = dict(a)
    for name in ("kv", "gate", "ape", "rope", "table"):
        b[name] = strided(a[name])
    for name in ("norm_weight", "sequence", "position"):
        b[name] = strided(a[name].unsqueeze(0))[0]
    pages, state = strided(a["pages"]), strided(a["state"])
    compress(**{**b, "pages": pages, "state": state})
    assert_same_bits(pages.contiguous(), expected[0])
    assert_same_bits(state.contiguous(), expected[1])


def test_blocks_never_change_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a = make(dtype=torch.float32)
    expected = at_once(a)
    monkeypatch.setattr(sys.modules["dsv4.ops.compress"], "_BLOCK_ELEMENTS", 1)
    for got, want in zip(at_once(a), expected, strict=True):
        assert_same_bits(got, want)


def golden(case: str, numerics: str, run: str, layer: int, name: str) -> tuple[dict[str, Any], Tensor]:
    """A call with the input and weights of a golden layer's compressor, plain pages, and the entries it must write."""
    config = Config.from_file(GOLDEN / case)
    tensors = load_file(GOLDEN / case / f"intermediates_{numerics}.safetensors")
    prefix = f"{run}.prefill.layers.{layer}"
    expected, x = tensors[f"{prefix}.{name}.out"][0], tensors[f"{prefix}.attn.in"][0].double()
    weights = load_file(GOLDEN / case / "model.safetensors")
    parts = ("wkv.weight", "wgate.weight", "ape", "norm.weight")
    own = {part: weights[f"layers.{layer}.attn.{name}.{part}"] for part in parts}
    tokens, head_dim, ratio = len(x), len(own["norm.weight"]), config.compress_ratios[layer]
    position = torch.arange(tokens, dtype=torch.int32)
    frequencies = rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling)
    blocks = tokens // 256 + 1
    call = {
        "kv": (x @ own["wkv.weight"].double().t()).float(),
        "gate": (x @ own["wgate.weight"].double().t()).float(),
        "ape": own["ape"],
        "norm_weight": own["norm.weight"].to(expected.dtype),
        "rope": rope_rows(position // ratio * ratio, frequencies),
        "state": torch.full((1, 2 * ratio, 2, own["ape"].shape[1]), NAN),
        "pages": torch.full((blocks, 256 // ratio, head_dim), NAN, dtype=expected.dtype),
        "table": torch.arange(blocks, dtype=torch.int32).flip(0).unsqueeze(0),
        "sequence": torch.zeros(tokens, dtype=torch.int32),
        "position": position,
        "ratio": ratio,
        "eps": config.rms_norm_eps,
        "page_size": 256 // ratio,
        "rotate": name.startswith("indexer"),
    }
    return call, expected


@pytest.mark.parametrize(
    ("case", "run", "layer", "name"),
    [
        ("dev_a", "full", 1, "compressor"),
        ("dev_a", "full", 1, "indexer.compressor"),
        ("dev_b", "full", 0, "compressor"),
        ("dev_b", "full", 0, "indexer.compressor"),
        ("dev_c", "full", 1, "compressor"),
        ("dev_c", "full", 1, "indexer.compressor"),
        ("dev_a", "r4", 2, "compressor"),
        ("dev_c", "r2", 0, "compressor"),
    ],
)
def test_golden_entries(case: str, run: str, layer: int, name: str) -> None:
    """Entries of whole layers, FP8 rows and FP4 keys, bit for bit; fed at once and in pieces."""
    a, expected = golden(case, "quant", run, layer, name)
    tokens, size, head_dim, count = len(a["kv"]), a["page_size"], expected.shape[1], len(a["pages"])
    if a["rotate"]:
        a["pages"] = allocate_key_pages(count, size, head_dim, "fp4")
    else:
        a["pages"] = allocate_pages(count, size, head_dim, 64, "fp8")
    entry = torch.arange(len(expected))
    page, offset = a["table"][0, entry // size], entry % size
    for cuts in ([[tokens]], [[7], [3], [tokens - 10]], [[1]] * tokens):
        pages, _ = feed(a, cuts)
        if a["rotate"]:
            got = read_keys(pages, page, offset, size, head_dim, torch.bfloat16)
        else:
            got = read_rows(pages, page, offset, size, head_dim, 64, torch.bfloat16)
        assert_same_bits(got, expected)


@pytest.mark.parametrize(("case", "layer"), [("dev_a", 1), ("dev_b", 0), ("dev_c", 1)])
@pytest.mark.parametrize("name", ["compressor", "indexer.compressor"])
def test_golden_entries_in_float32(case: str, layer: int, name: str) -> None:
    a, expected = golden(case, "fp32", "full", layer, name)
    assert expected.dtype == torch.float32
    pages, _ = at_once(a)
    torch.testing.assert_close(stored(a, pages, 0, len(expected)), expected, rtol=1e-5, atol=1e-5)


def entries_of(a: dict[str, Any], sequence: int) -> dict[str, Any]:
    mine = a["sequence"] == sequence
    count = int(mine.sum()) // a["ratio"]
    chosen = {name: a[name] for name in ("ape", "norm_weight", "ratio", "eps", "rotate")}
    return {
        "kv": a["kv"][mine],
        "gate": a["gate"][mine],
        "rope": a["rope"][mine][a["ratio"] - 1 :: a["ratio"]][:count],
        **chosen,
    }


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
def test_compress_entries_gives_what_compress_writes(overlap: bool, rotate: bool) -> None:
    a = make(overlap=overlap, rotate=rotate, dtype=torch.float32, weight_dtype=torch.bfloat16, head_dim=64)
    pages, _ = at_once(a)
    for s, count in enumerate((5, 2, 1)):
        got = compress_entries(**entries_of(a, s))
        assert got.shape == (count, 64)
        assert_same_bits(got, stored(a, pages, s, count))
    short = entries_of(make(runs=((0, 3),)), 0)
    assert compress_entries(**short).shape == (0, 32)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
def test_gradients_of_compress_entries(overlap: bool, rotate: bool) -> None:
    b = entries_of(make(overlap=overlap, rotate=rotate, runs=((0, 14),)), 0)
    names = ("kv", "gate", "ape", "norm_weight")
    leaves = [b[name].clone().requires_grad_() for name in names]

    def run(*values: Tensor) -> Tensor:
        return compress_entries(**{**b, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    kv_grad = torch.autograd.grad(run(*leaves).sin().sum(), leaves)[0]
    assert not kv_grad[12:].any()  # the remainder gives no entry
    assert kv_grad[:8, 32 * overlap :].all()


def narrow(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def test_op_registration() -> None:
    plain, keys = make(), make(rotate=True)
    plain["pages"].zero_()
    keys["pages"] = allocate_key_pages(len(keys["pages"]), keys["page_size"], 32, "fp4")
    for a in (plain, keys):
        a["state"].zero_()
        check_op(torch.ops.dsv4._compress_reference, *a.values())
        check_op(torch.ops.dsv4.compress, *(narrow(value) for value in a.values()))
    order = list(compress_entries_reference.__annotations__)[:-1]
    b = entries_of(make(), 0)
    for op, change in (("compress_entries", narrow), ("_compress_entries_reference", lambda value: value)):
        arguments = [change(b[name]) for name in order]
        arguments[0] = arguments[0].clone().requires_grad_()
        check_op(getattr(torch.ops.dsv4, op), *arguments)


def test_compiles_without_a_break() -> None:
    a = make(dtype=torch.float32)
    expected = at_once(a)

    def run(kv: Tensor, pages: Tensor, state: Tensor) -> Tensor:
        compress(**{**a, "kv": kv * 1.0, "pages": pages, "state": state})
        return pages.nan_to_num().sum()

    pages, state = a["pages"].clone(), a["state"].clone()
    total = torch.compile(run, fullgraph=True, backend="aot_eager")(a["kv"], pages, state)
    assert_same_bits(pages, expected[0])
    assert_same_bits(state, expected[1])
    assert total == expected[0].nan_to_num().sum()


BAD: list[tuple[str, dict[str, Any]]] = [
    (
        "kv must be float32 or float64 [tokens, c * head_dim], got bfloat16 [36, 64]",
        {"kv": torch.zeros(36, 64).bfloat16()},
    ),
    (
        "kv must have 32 or 64 channels, got 96",
        {n: torch.zeros(36, 96) for n in ("kv", "gate")} | {"ape": torch.zeros(4, 96)},
    ),
    ("gate must be float64 [36, 64], got float64 [35, 64]", {"gate": torch.zeros(35, 64).double()}),
    ("ape must be float64 [4, 64], got float64 [4, 32]", {"ape": torch.zeros(4, 32).double()}),
    ("ape must be float64 [5, 64], got float64 [4, 64]", {"ratio": 5}),
    ("ratio must be at least 1, got 0", {"ratio": 0}),
    (
        "norm_weight must be bfloat16 or float32 or float64 [head_dim], got float16 [32]",
        {"norm_weight": torch.zeros(32).half()},
    ),
    (
        "rope must be float32 or float64 [36, rope_dim / 2, 2], got float32 [36, 16]",
        {"rope": torch.zeros(36, 16)},
    ),
    ("rope must have at most 16 pairs, got 17", {"rope": torch.zeros(36, 17, 2)}),
    ("state must be float64 [3, ring, 2, 64], got float32 [3, 9, 2, 64]", {"state": torch.zeros(3, 9, 2, 64)}),
    ("state must have a ring of at least 8 positions, got 7", {"state": torch.zeros(3, 7, 2, 64).double()}),
    ("pages must be uint8 [pages, 192], got uint8 [4, 10]", {"pages": torch.zeros(4, 10).byte()}),
    (
        "pages must be bfloat16 or float16 or float32 or float64 [pages, 3, 32], got float64 [4, 2, 32]",
        {"pages": torch.zeros(4, 2, 32).double()},
    ),
    ("pages must be uint8 [pages, 51 or 108], got uint8 [4, 10]", {"pages": torch.zeros(4, 10).byte(), "rotate": True}),
    ("table must be int32 [sequences, blocks], got int64 [3, 2]", {"table": torch.zeros(3, 2).long()}),
    ("sequence must be int32 [36], got int64 [36]", {"sequence": torch.zeros(36).long()}),
    ("position must be int32 [36], got int32 [1]", {"position": torch.zeros(1).int()}),
    (
        "position must ascend by one within a sequence, from 0 or later",
        {"position": torch.zeros(36).int()},
    ),
    (
        "position must ascend by one within a sequence, from 0 or later",
        {"position": torch.arange(-1, 35).int(), "sequence": torch.zeros(36).int()},
    ),
    (
        "the rows of a sequence must stand together",
        {"sequence": (torch.arange(36) % 2).int()},
    ),
    ("sequence must lie in [0, 3), the rows of the table, got 3", {"sequence": torch.full((36,), 3).int()}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:60] for message, _ in BAD])
def test_refuses(message: str, change: dict[str, Any]) -> None:
    assert_rejects(compress, make(), f"compress: {message}", **change)


def test_refuses_to_rotate_other_widths() -> None:
    message = "compress_entries: head_dim must be a power of two to be rotated, got 96"
    assert_rejects(compress_entries, entries_of(make(head_dim=96), 0), message, rotate=True)


def test_a_refused_call_changes_nothing() -> None:
    a = make()
    before = a["pages"].clone(), a["state"].clone()
    with pytest.raises(RuntimeError, match="stand together"):
        compress(**{**a, "sequence": (torch.arange(36) % 2).int()})
    assert_same_bits(a["pages"], before[0])
    assert_same_bits(a["state"], before[1])
