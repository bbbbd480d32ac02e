"""Norms, rotary embedding and the window store."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import dsv4.ops as ops
from dsv4.ops.layout import allocate_pages, read_rows
from dsv4.testing import (
    Guarded,
    assert_no_worse,
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    relative_rms,
    strided,
    ulp_distance,
)

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
OPS = load_file(GOLDEN / "ops" / "ops.safetensors")
CASES = ["dev_a", "dev_b", "dev_c"]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
NARROW = [torch.bfloat16, torch.float32]


def yarn(factor, original, fast=32, slow=1):
    return SimpleNamespace(factor=factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow)


TABLES = {
    "plain_theta1e4": (1e4, None),
    "yarn_theta1.6e5_f16_o65536": (1.6e5, yarn(16, 65536)),
    "yarn_theta1.6e5_f4_o64": (1.6e5, yarn(4, 64)),
    "yarn_theta1.6e5_f8_o128": (1.6e5, yarn(8, 128)),
}


def rope_table(position, rope_dim=64, theta=1e4, dtype=torch.float32):
    return ops.rope_rows(torch.as_tensor(position), ops.rope_frequencies(rope_dim, theta).to(dtype))


def normalized(x, weight, eps):
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double()


def rotated(x, rope, inverse=False):
    """By complex numbers, float64; the op's own definition works on pairs of reals."""
    width = 2 * rope.shape[1]
    turn = torch.view_as_complex(rope.double().contiguous())
    turn = turn.conj() if inverse else turn
    turn = turn.view(turn.shape[0], *[1] * (x.dim() - 2), width // 2)
    pairs = torch.view_as_complex(x[..., x.shape[-1] - width :].double().unflatten(-1, (width // 2, 2)).contiguous())
    return torch.cat((x[..., : x.shape[-1] - width].double(), torch.view_as_real(pairs * turn).flatten(-2)), -1)


class TestRopeTables:
    @pytest.mark.parametrize("name", TABLES)
    def test_golden(self, name):
        theta, scaling = TABLES[name]
        rows = ops.rope_rows(OPS["rope.positions"], ops.rope_frequencies(64, theta, scaling))
        assert rows.dtype == torch.float32
        for index, part in enumerate(("cos", "sin")):
            assert (rows[..., index] - OPS[f"rope.{name}.{part}"]).abs().max() <= 2.0**-23

    @pytest.mark.parametrize("rope_dim", [2, 32, 64, 128])
    @pytest.mark.parametrize("scaling", [None, yarn(16, 65536), yarn(4, 64), yarn(40, 4096, 16, 2), yarn(2, 8, 1, 1)])
    def test_frequencies_by_the_formula(self, rope_dim, scaling):
        theta = 1.6e5
        found = ops.rope_frequencies(rope_dim, theta, scaling)
        assert found.shape == (rope_dim // 2,)
        assert found.dtype == torch.float32
        for i in range(rope_dim // 2):
            expected = theta ** (-2 * i / rope_dim)
            if scaling is not None:

                def dim_of(turns):
                    length = scaling.original_max_position_embeddings
                    return rope_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

                low = max(math.floor(dim_of(scaling.beta_fast)), 0)
                high = min(math.ceil(dim_of(scaling.beta_slow)), rope_dim - 1)
                ramp = min(max((i - low) / ((high - low) or 0.001), 0), 1)
                expected = expected / scaling.factor * ramp + expected * (1 - ramp)
            assert found[i].item() == pytest.approx(expected, rel=1e-6)

    def test_rows_at_a_million(self):
        frequencies = ops.rope_frequencies(64, 1e4)
        position = torch.tensor([0, 1, 1048575], dtype=torch.int32)
        rows = ops.rope_rows(position, frequencies)
        angle = (position.float().unsqueeze(1) * frequencies).double()
        assert_same_bits(rows, torch.stack((angle.cos(), angle.sin()), -1).float())
        assert rows[0].tolist() == [[1.0, 0.0]] * 32
        assert ops.rope_rows(position, frequencies.double()).dtype == torch.float64
        assert_rows_independent(lambda p: ops.rope_rows(p, frequencies), [torch.arange(0, 10**6, 31337)])

    @pytest.mark.parametrize("rope_dim", [0, -2, 3])
    def test_bad_width(self, rope_dim):
        with pytest.raises(ValueError, match=f"rope_frequencies: rope_dim must be even and positive, got {rope_dim}"):
            ops.rope_frequencies(rope_dim, 1e4)


class TestGolden:
    def test_rope_applied_and_undone(self):
        rope = rope_table([5, 6, 7, 8])
        turned = ops.apply_rope(OPS["rope_apply.x"][0], rope)
        assert ulp_distance(turned, OPS["rope_apply.y_pos5to8_theta1e4"][0]).max() <= 1
        undone = ops.apply_rope(OPS["rope_apply.y_pos5to8_theta1e4"][0], rope, inverse=True)
        assert ulp_distance(undone, OPS["rope_apply.y_inverse"][0]).max() <= 1

    @staticmethod
    def layer_inputs(case):
        config = json.loads((GOLDEN / case / "config.json").read_text())
        weights = load_file(GOLDEN / case / "model.safetensors")
        values = load_file(GOLDEN / case / "intermediates_quant.safetensors")
        scaling = {key: value for key, value in config["rope_scaling"].items() if key != "type"}
        for layer in range(config["num_hidden_layers"]):
            attn = {k: v for k, v in values.items() if k.startswith(f"full.prefill.layers.{layer}.attn.")}
            attn = {k.rsplit(".", 1)[1]: v[0] for k, v in attn.items()}
            compresses = config["compress_ratios"][layer] > 0
            theta = config["compress_rope_theta"] if compresses else config["rope_theta"]
            frequencies = ops.rope_frequencies(64, theta, SimpleNamespace(**scaling) if compresses else None)
            rope = ops.rope_rows(torch.arange(attn["in"].shape[0]), frequencies)
            yield config, {k: v for k, v in weights.items() if k.startswith(f"layers.{layer}.attn.")}, attn, rope

    @pytest.mark.parametrize("case", CASES)
    def test_queries(self, case):
        for config, weights, attn, rope in self.layer_inputs(case):
            weight = {k.split("attn.")[1]: v for k, v in weights.items()}
            q = ops.fp8_linear(attn["qr"], weight["wq_b.weight"], weight["wq_b.scale"])
            q = q.unflatten(-1, (config["num_attention_heads"], config["head_dim"]))
            error = relative_rms(ops.query_norm_rope(q, rope, config["rms_norm_eps"]), attn["q"])
            # The vectorised and the scalar bfloat16 rsqrt of torch on a CPU differ, so a few heads are one step off.
            assert error.median() == 0
            assert error.max() <= 2.0**-6
            assert (error > 0).double().mean() <= 0.15

    @pytest.mark.parametrize("case", CASES)
    def test_window_rows_through_pages(self, case):
        for config, weights, attn, rope in self.layer_inputs(case):
            weight = {k.split("attn.")[1]: v for k, v in weights.items()}
            kv = ops.fp8_linear(attn["in"], weight["wkv.weight"], weight["wkv.scale"])
            tokens, head_dim = kv.shape
            position = torch.arange(tokens, dtype=torch.int32)
            pages = allocate_pages(2, 256, head_dim, 64, "fp8")
            table = torch.tensor([[1, 0]], dtype=torch.int32)
            sequence = torch.zeros(tokens, dtype=torch.int32)
            eps = config["rms_norm_eps"]
            ops.store_window(kv, weight["kv_norm.weight"], rope, pages, table, sequence, position, eps)
            rows = read_rows(pages, table[0, position // 256], position % 256, 256, head_dim, 64, torch.bfloat16)
            assert ulp_distance(rows, attn["kv_all"][:tokens]).max() <= 1


NORM = grid(rows=[(), (0,), (1,), (9,), (2, 3)], n=[1, 7, 128, 515], weight=[None, torch.bfloat16, torch.float32])


@pytest.mark.parametrize("case", NORM)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(case, dtype):
    x = (3 * torch.randn(*case["rows"], case["n"])).to(dtype)
    weight = None if case["weight"] is None else torch.randn(case["n"]).to(case["weight"])
    y = ops.rms_norm(x, weight, 1e-3)
    exact = normalized(x, weight, 1e-3)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-14).all()


def test_rms_norm_eps_is_under_the_root():
    assert ops.rms_norm(torch.zeros(1, 4), None, 1e-6).tolist() == [[0, 0, 0, 0]]
    assert ops.rms_norm(torch.full((1, 4), 3.0), None, 7.0).tolist() == [[0.75] * 4]


ROPE = grid(tokens=[0, 1, 6], heads=[None, 1, 3], dims=[(2, 2), (64, 64), (128, 64), (96, 32)], inverse=[False, True])


@pytest.mark.parametrize("case", ROPE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_rope(case, dtype):
    head_dim, rope_dim = case["dims"]
    heads = () if case["heads"] is None else (case["heads"],)
    x = torch.randn(case["tokens"], *heads, head_dim).to(dtype)
    rope = rope_table(torch.arange(case["tokens"]) * 1000, rope_dim)
    y = ops.apply_rope(x, rope, case["inverse"])
    exact = rotated(x, rope, case["inverse"])
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-14).all()
    assert_same_bits(y[..., : head_dim - rope_dim].contiguous(), x[..., : head_dim - rope_dim].contiguous())


def test_apply_rope_inverse_undoes():
    x = torch.randn(5, 2, 128, dtype=torch.float64)
    rope = rope_table(torch.arange(5) * 99, dtype=torch.float64)
    torch.testing.assert_close(ops.apply_rope(ops.apply_rope(x, rope), rope, inverse=True), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 2, 64), (1, 1, 64), (7, 3, 128), (5, 2, 96)])
def test_query_norm_rope(shape, dtype):
    q = (5 * torch.randn(*shape)).to(dtype)
    rope = rope_table(torch.arange(shape[0]) * 77)
    y = ops.query_norm_rope(q, rope, 1e-5)
    exact = rotated(normalized(q, None, 1e-5), rope)
    assert y.shape == shape
    assert y.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(y, exact, rtol=1e-13, atol=1e-13)
        return
    norm = q * (q.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert_no_worse(y, ops.apply_rope(norm, rope), exact)


def test_query_norm_rounds_at_each_step():
    """Squares, mean, inverse root and product each go through bfloat16, as in the official program."""
    step, still = 1 + 2.0**-7, torch.tensor([[[1.0, 0.0]]])
    for row, root in (
        # The square of `step` loses its 2^-14; the mean 1 + 2^-8 is a tie and goes to 1. With the 2^-14 it would go up.
        ([1, 1, 1, step], 1.0),
        # The mean 1 + 3 * 2^-8 is a tie and goes up to 1 + 2^-6, whose root is nearest to 254/256; its own, to 255/256.
        ([1, step, step, step], 254 / 256),
    ):
        q = torch.tensor([[row]], dtype=torch.bfloat16)
        expected = (q.double() * root).bfloat16()
        assert_same_bits(ops.query_norm_rope(q, still, 0.0), expected)

    q = torch.randn(64, 4, 128).bfloat16()
    mean = (q.float() * q.float()).bfloat16().double().mean(-1, keepdim=True).bfloat16()
    root = (1 / (mean.double() + 1e-3).bfloat16().double().sqrt()).bfloat16()
    still = torch.tensor([1.0, 0.0]).expand(64, 2, 2)
    assert_same_bits(ops.query_norm_rope(q, still, 1e-3), (q.float() * root.float()).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", NARROW)
@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (7, 128), (5, 512)])
def test_kv_norm_rope(shape, dtype, weight_dtype):
    kv, weight = (4 * torch.randn(*shape)).to(dtype), torch.randn(shape[1]).to(weight_dtype)
    rope = rope_table(torch.arange(shape[0]) * 77)
    y = ops.kv_norm_rope(kv, weight, rope, 1e-5)
    assert y.shape == shape
    assert y.dtype == dtype
    expected = rotated(normalized(kv, weight, 1e-5).to(dtype), rope).to(dtype)  # two roundings
    if dtype == torch.float64:
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    else:
        assert_same_bits(y, expected)


def window_arguments(pages, tokens=7, head_dim=128, rope_dim=64, dtype=torch.bfloat16, page_size=4):
    torch.manual_seed(0)
    return {
        "kv": torch.randn(tokens, head_dim).to(dtype),
        "weight": torch.randn(head_dim),
        "rope": rope_table(torch.arange(tokens), rope_dim),
        "pages": pages,
        "table": torch.tensor([[3, 0, -1], [2, -1, 1]], dtype=torch.int32),
        "sequence": torch.tensor([0, 0, 0, 1, 1, 1, 1][:tokens], dtype=torch.int32),
        "position": torch.tensor([3, 4, 8, 0, 5, 11, 12][:tokens], dtype=torch.int32),
        "page_size": page_size,
    }


WRITTEN = {0: (3, 3), 1: (0, 0), 3: (2, 0), 5: (1, 3)}  # row: (page, offset); rows 2, 4 meet -1, row 6 has no column


@pytest.mark.parametrize("format", ["fp8", torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_store_window_writes_its_rows_and_nothing_else(format, dtype):
    if format == "fp8":
        guarded = Guarded(torch.full_like(allocate_pages(4, 4, 128, 64, "fp8"), 0x5A))
    else:
        guarded = Guarded(torch.full((4, 4, 128), 9.0, dtype=format))
    before = guarded.tensor.clone()
    arguments = window_arguments(guarded.tensor, dtype=dtype)
    ops.store_window(**arguments)
    guarded.check()
    rows = ops.kv_norm_rope(arguments["kv"], arguments["weight"], arguments["rope"])
    if format == "fp8":
        expected = torch.cat((ops.fp8_round_trip(rows[:, :64].float(), 64), rows[:, 64:].bfloat16().float()), 1)
    else:
        expected = rows.to(format)
    page, offset = (torch.tensor(v) for v in zip(*WRITTEN.values(), strict=True))
    found = read_rows(guarded.tensor, page, offset, 4, 128, 64)
    assert_same_bits(found, expected[list(WRITTEN)])
    # Writing the same rows over a second pool with other contents changes the same bytes.
    other = (before.view(torch.uint8) ^ 0xFF).view(before.dtype)
    arguments["pages"] = other
    ops.store_window(**arguments)
    untouched = guarded.tensor.view(torch.uint8) == before.view(torch.uint8)
    flipped = other.view(torch.uint8) == (before.view(torch.uint8) ^ 0xFF)
    size = len(WRITTEN) * (64 + 128 + 1 if format == "fp8" else 128 * before.element_size())
    assert (~(untouched & flipped)).sum() == size


def test_store_window_in_chunks_gives_the_same_bytes():
    whole = allocate_pages(3, 256, 512, 64, "fp8")
    tokens = 600
    kv, weight = torch.randn(tokens, 512).bfloat16(), torch.randn(512)
    rope, position = rope_table(torch.arange(tokens)), torch.arange(tokens, dtype=torch.int32)
    sequence, table = torch.zeros(tokens, dtype=torch.int32), torch.tensor([[2, 0, 1]], dtype=torch.int32)
    ops.store_window(kv, weight, rope, whole, table, sequence, position)
    pieces, start = torch.zeros_like(whole), 0
    for length in (1, 255, 2, 300, 42):
        part = slice(start, start + length)
        ops.store_window(kv[part], weight, rope[part], pieces, table, sequence[part], position[part])
        start += length
    assert start == tokens
    assert_same_bits(pieces, whole)


@pytest.mark.parametrize(("sequence", "wrong"), [([0, 2, 1], 2), ([0, -1, 1], -1)])
def test_store_window_refuses_a_sequence_without_a_table(sequence, wrong):
    arguments = window_arguments(torch.zeros(4, 4, 128), tokens=3)
    message = f"store_window: sequence must lie in [0, 2), the rows of the table, got {wrong}"
    assert_rejects(ops.store_window, arguments, message, sequence=torch.tensor(sequence, dtype=torch.int32))


def test_store_window_of_nothing():
    pages = torch.zeros(1, 4, 8)
    arguments = window_arguments(pages, tokens=0, head_dim=8, rope_dim=8)
    ops.store_window(**arguments)
    assert pages.count_nonzero() == 0


@pytest.mark.parametrize("dtype", NARROW)
def test_rows_are_independent(dtype):
    torch.manual_seed(0)
    q, kv, weight = torch.randn(23, 3, 128).to(dtype), torch.randn(23, 128).to(dtype), torch.randn(128)
    rope = rope_table(torch.arange(23))
    assert_rows_independent(lambda x: ops.rms_norm(x, weight), [kv])
    assert_rows_independent(ops.apply_rope, [q, rope])
    assert_rows_independent(ops.query_norm_rope, [q, rope])
    assert_rows_independent(lambda x, r: ops.kv_norm_rope(x, weight, r), [kv, rope])


def test_layout_does_not_matter():
    q, kv, weight, rope = torch.randn(5, 3, 64), torch.randn(5, 64), torch.randn(64), rope_table(range(5))
    for dtype in NARROW:
        q, kv = q.to(dtype), kv.to(dtype)
        assert_same_bits(ops.rms_norm(strided(kv), strided(weight)), ops.rms_norm(kv, weight))
        assert_same_bits(ops.apply_rope(strided(q), strided(rope)), ops.apply_rope(q, rope))
        assert_same_bits(ops.query_norm_rope(strided(q), strided(rope)), ops.query_norm_rope(q, rope))
        assert_same_bits(
            ops.kv_norm_rope(strided(kv), strided(weight), strided(rope)), ops.kv_norm_rope(kv, weight, rope)
        )
    pages, gaps = torch.zeros(4, 4, 128), strided(torch.zeros(4, 4, 128))
    ops.store_window(**window_arguments(pages))
    arguments = window_arguments(gaps)
    ops.store_window(**{k: strided(v) if k in ("kv", "rope", "table", "position") else v for k, v in arguments.items()})
    assert_same_bits(gaps.contiguous(), pages)
    assert pages.count_nonzero() > 0


def test_gradients():
    def real(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    rope = rope_table(range(4), 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.rms_norm, (real(4, 6), real(6), 1e-3))
    assert torch.autograd.gradcheck(ops.rms_norm, (real(4, 6),))
    assert torch.autograd.gradcheck(ops.apply_rope, (real(4, 2, 6), rope))
    assert torch.autograd.gradcheck(ops.apply_rope, (real(4, 6), rope, True))
    assert torch.autograd.gradcheck(ops.query_norm_rope, (real(4, 2, 6), rope, 1e-3))
    assert torch.autograd.gradcheck(ops.kv_norm_rope, (real(4, 6), real(6), rope, 1e-3))


def test_gradients_in_bfloat16_follow_the_float64_ones():
    x = torch.randn(8, 64, requires_grad=True, dtype=torch.bfloat16)
    weight, rope = torch.randn(64, requires_grad=True), rope_table(range(8))
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    seed = torch.randn(8, 64).bfloat16()
    ops.kv_norm_rope(x, weight, rope).backward(seed)
    ops.kv_norm_rope(wide_x, wide_weight, rope.double()).backward(seed.double())
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert relative_rms(x.grad, wide_x.grad).max() < 0.02
    assert relative_rms(weight.grad, wide_weight.grad).max() < 0.02


def test_opcheck():
    def real(*shape):
        return torch.randn(*shape, requires_grad=True)

    rope, dsv4 = rope_table(range(3), 4), torch.ops.dsv4
    check_op(dsv4.rms_norm, real(3, 8), real(8), 1e-5)
    check_op(dsv4.rms_norm, torch.randn(3, 8).bfloat16())
    check_op(dsv4._rms_norm_reference, real(3, 8).double())
    check_op(dsv4.rope_rows, torch.arange(3), ops.rope_frequencies(4, 1e4))
    check_op(dsv4._rope_rows_reference, torch.arange(3), ops.rope_frequencies(4, 1e4).double())
    check_op(dsv4._apply_rope_reference, real(3, 2, 8).double(), rope)
    check_op(dsv4._kv_norm_rope_reference, real(3, 8).double(), real(8), rope)
    check_op(dsv4.apply_rope, real(3, 2, 8), rope)
    check_op(dsv4.apply_rope, torch.randn(3, 8).bfloat16(), rope, True)
    check_op(dsv4.query_norm_rope, real(3, 2, 8), rope)
    check_op(dsv4._query_norm_rope_reference, real(3, 2, 8).double(), rope)
    check_op(dsv4.kv_norm_rope, real(3, 8), real(8), rope)
    for pages in (torch.zeros(4, 4, 128), allocate_pages(4, 4, 128, 64, "fp8")):
        a = window_arguments(pages)
        page_size = a.pop("page_size")
        check_op(dsv4.store_window, *a.values(), 1e-6, page_size)
        check_op(dsv4._store_window_reference, *a.values(), 1e-6, page_size)


def test_compiles_without_graph_breaks():
    def function(kv, weight, rope, pages, table, sequence, position):
        ops.store_window(kv, weight, rope, pages, table, sequence, position, page_size=4)
        return ops.query_norm_rope(kv.unsqueeze(1), rope) + pages.sum()

    pages, other = torch.zeros(4, 4, 128), torch.zeros(4, 4, 128)
    arguments = window_arguments(pages, dtype=torch.float32)
    arguments.pop("page_size")
    expected = function(**arguments)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(**{**arguments, "pages": other}), expected)
    assert_same_bits(other, pages)


X, ROPE_TABLE, WEIGHT = torch.zeros(3, 8), torch.zeros(3, 2, 2), torch.zeros(8)
FLOATS = "bfloat16 or float32 or float64"
PLAIN = "bfloat16 or float16 or float32 or float64"
ROPES = "float32 or float64 [3, rope_dim / 2, 2]"
BAD_ROPE = [
    ({"rope": ROPE_TABLE[:2]}, f"rope must be {ROPES}, got float32 [2, 2, 2]"),
    ({"rope": ROPE_TABLE.flatten(1)}, f"rope must be {ROPES}, got float32 [3, 4]"),
    ({"rope": torch.zeros(3, 2, 3)}, f"rope must be {ROPES}, got float32 [3, 2, 3]"),
    ({"rope": ROPE_TABLE.bfloat16()}, f"rope must be {ROPES}, got bfloat16 [3, 2, 2]"),
    ({"rope": torch.zeros(3, 5, 2)}, "rope must have at most 4 pairs, got 5"),
]
BAD_KV = [
    ({"kv": X.half()}, f"kv must be {FLOATS} [tokens, head_dim], got float16 [3, 8]"),
    ({"kv": X[0]}, f"kv must be {FLOATS} [tokens, head_dim], got float32 [8]"),
    ({"weight": WEIGHT[:7]}, f"weight must be {FLOATS} [8], got float32 [7]"),
    ({"weight": WEIGHT.long()}, f"weight must be {FLOATS} [8], got int64 [8]"),
    ({"weight": WEIGHT.to("meta")}, "weight must be on cpu as kv is, got meta"),
    *BAD_ROPE,
]
PAGES = torch.zeros(2, 4, 8)
TABLE, ROW = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
BAD = {
    "rms_norm": (
        {"x": X, "weight": WEIGHT},
        [
            ({"x": X.half()}, f"x must be {FLOATS} [..., n], got float16 [3, 8]"),
            ({"x": X.int()}, f"x must be {FLOATS} [..., n], got int32 [3, 8]"),
            ({"x": torch.zeros(())}, f"x must be {FLOATS} [..., n], got float32 []"),
            ({"weight": torch.zeros(7)}, f"weight must be {FLOATS} [8], got float32 [7]"),
            ({"weight": X}, f"weight must be {FLOATS} [8], got float32 [3, 8]"),
            ({"weight": WEIGHT.half()}, f"weight must be {FLOATS} [8], got float16 [8]"),
            ({"weight": WEIGHT.bool()}, f"weight must be {FLOATS} [8], got bool [8]"),
            ({"weight": WEIGHT.to("meta")}, "weight must be on cpu as x is, got meta"),
        ],
    ),
    "apply_rope": (
        {"x": X, "rope": ROPE_TABLE},
        [
            ({"x": X[0]}, "x must be [tokens, head_dim] or [tokens, heads, head_dim], got [8]"),
            ({"x": X.view(1, 1, 3, 8)}, "x must be [tokens, head_dim] or [tokens, heads, head_dim], got [1, 1, 3, 8]"),
            ({"x": X.half()}, f"x must be {FLOATS} [..., head_dim], got float16 [3, 8]"),
            ({"rope": ROPE_TABLE.to("meta")}, "rope must be on cpu as x is, got meta"),
            *BAD_ROPE,
        ],
    ),
    "query_norm_rope": (
        {"q": X.view(3, 1, 8), "rope": ROPE_TABLE},
        [
            ({"q": X}, f"q must be {FLOATS} [tokens, heads, head_dim], got float32 [3, 8]"),
            ({"q": X.view(3, 1, 8).half()}, f"q must be {FLOATS} [tokens, heads, head_dim], got float16 [3, 1, 8]"),
            ({"rope": ROPE_TABLE.to("meta")}, "rope must be on cpu as q is, got meta"),
            *BAD_ROPE,
        ],
    ),
    "rope_rows": (
        {"position": torch.arange(3), "inv_freq": WEIGHT},
        [
            ({"position": torch.arange(3.0)}, "position must be int32 or int64 [tokens], got float32 [3]"),
            ({"position": torch.arange(3).short()}, "position must be int32 or int64 [tokens], got int16 [3]"),
            ({"position": torch.zeros(3, 1).int()}, "position must be int32 or int64 [tokens], got int32 [3, 1]"),
            ({"position": torch.zeros(()).int()}, "position must be int32 or int64 [tokens], got int32 []"),
            ({"inv_freq": X}, "inv_freq must be float32 or float64 [rope_dim / 2], got float32 [3, 8]"),
            ({"inv_freq": WEIGHT.bfloat16()}, "inv_freq must be float32 or float64 [rope_dim / 2], got bfloat16 [8]"),
            ({"inv_freq": WEIGHT.int()}, "inv_freq must be float32 or float64 [rope_dim / 2], got int32 [8]"),
            ({"inv_freq": WEIGHT.to("meta")}, "inv_freq must be on cpu as position is, got meta"),
        ],
    ),
    "kv_norm_rope": ({"kv": X, "weight": WEIGHT, "rope": ROPE_TABLE}, BAD_KV),
    "store_window": (
        {
            "kv": X,
            "weight": WEIGHT,
            "rope": ROPE_TABLE,
            "pages": PAGES,
            "table": TABLE,
            "sequence": ROW,
            "position": ROW,
            "page_size": 4,
        },
        [
            *BAD_KV,
            ({"pages": PAGES.int()}, f"pages must be {PLAIN} [pages, 4, 8], got int32 [2, 4, 8]"),
            ({"pages": PAGES[:, :3]}, f"pages must be {PLAIN} [pages, 4, 8], got float32 [2, 3, 8]"),
            ({"pages": torch.zeros(2, 40, dtype=torch.uint8)}, "pages must be uint8 [pages, 84], got uint8 [2, 40]"),
            ({"page_size": 0}, "the page size of pages must be at least 1, got 0"),
            ({"table": TABLE.long()}, "table must be int32 [sequences, blocks], got int64 [1, 2]"),
            ({"table": TABLE[0]}, "table must be int32 [sequences, blocks], got int32 [2]"),
            ({"sequence": ROW[:2]}, "sequence must be int32 or int64 [3], got int32 [2]"),
            ({"sequence": ROW.float()}, "sequence must be int32 or int64 [3], got float32 [3]"),
            ({"position": ROW.view(3, 1)}, "position must be int32 or int64 [3], got int32 [3, 1]"),
            ({"position": ROW.to("meta")}, "position must be on cpu as kv is, got meta"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [pytest.param(op, *fault, id=f"{op}-{i}") for op, (_, faults) in BAD.items() for i, fault in enumerate(faults)],
)
def test_bad_arguments(op, changes, message):
    assert_rejects(getattr(ops, op), BAD[op][0], f"{op}: {message}", **changes)


@pytest.mark.parametrize("op", ["rms_norm", "query_norm_rope", "kv_norm_rope", "compress_entries"])
def test_second_derivatives(op):
    """A gradient that is to have one itself does, also where a tensor is passed twice."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    turns = ops.rope_rows_reference(torch.arange(8), ops.rope_frequencies(4, 100.0)).double()
    if op == "rms_norm":
        function, leaves = (lambda x, w: ops.rms_norm(x * x, w, 1e-6)), (leaf(3, 8), leaf(8))
        same = leaf(3, 3)
        assert torch.autograd.gradgradcheck(lambda x: ops.rms_norm(x, x[0], 1e-6), (same,))
    elif op == "query_norm_rope":
        function, leaves = (lambda q: ops.query_norm_rope(q, turns[:2], 1e-6)), (leaf(2, 2, 8),)
    elif op == "kv_norm_rope":
        function, leaves = (lambda x, w: ops.kv_norm_rope(x, w, turns[:2], 1e-6)), (leaf(2, 8), leaf(8))
    else:
        function = lambda *tensors: ops.compress_entries(*tensors, turns[:2], 2)  # noqa: E731
        leaves = (leaf(4, 8), leaf(4, 8), leaf(2, 8), leaf(8))
    assert torch.autograd.gradgradcheck(function, leaves)
