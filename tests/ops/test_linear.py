"""Linear layers on quantised weights."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dsv4.ops as ops
from dsv4 import _library
from dsv4.testing import (
    assert_no_worse,
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    relative_rms,
    strided,
    ulp_distance,
)

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
OPS = load_file(GOLDEN / "ops" / "ops.safetensors")
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def fp8_weight(out, size, seed=0, scale_dtype=E8M0):
    """Random codes, and scales that differ from block to block."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator).mul(30).to(E4M3)
    scale = torch.randint(-8, -3, (-(-out // 128), -(-size // 128)), generator=generator).float().exp2()
    return weight, scale.to(scale_dtype)


def fp4_weight(out, size, seed=0, scale_dtype=E8M0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out, size // 2), generator=generator).to(torch.int8)
    scale = torch.randint(-8, -3, (out, -(-size // 32)), generator=generator).float().exp2()
    return weight, scale.to(scale_dtype)


LINEARS = {"fp8_linear": (ops.fp8_linear, fp8_weight), "fp4_linear": (ops.fp4_linear, fp4_weight)}


KERNELS = implementation_cases("fp8_linear")  # fp4_linear and grouped_linear have the same


@contextlib.contextmanager
def only(implementation, op, scale, dtype=None):
    """This implementation, or the next that takes these scales and, of grouped_linear, this dtype."""
    taken = scale.dtype == E8M0 and (op != "grouped_linear" or dtype == torch.bfloat16)
    expected = "avx512" if implementation == "amx" and not taken else implementation
    with max_isa("scalar" if implementation == "reference" else implementation):
        yield
        if implementation != "reference":
            assert _library.last_implementation(op) == expected


def sum_error(sizes, *dtypes):
    """What adding products of these magnitudes may cost: float32 in a kernel, else float64."""
    return (1e-14 if torch.float64 in dtypes else 2.0**-22) * sizes


def quantized(x):
    codes, scale = ops.quantize_fp8(x)
    return ops.dequantize_fp8(codes, scale, 128, torch.float64)


@pytest.mark.parametrize("name", LINEARS)
def test_golden(name):
    y = LINEARS[name][0](OPS[f"{name}.x"], OPS[f"{name}.weight"], OPS[f"{name}.scale"])
    assert y.dtype == torch.bfloat16
    assert ulp_distance(y, OPS[f"{name}.y"]).max() <= 1


@pytest.mark.parametrize("case", ["dev_a", "dev_b", "dev_c"])
def test_golden_output_projection(case):
    """attn.o_derot -> wo_a (grouped) -> wo_b -> attn.out of whole layers."""
    weights = load_file(GOLDEN / case / "model.safetensors")
    values = load_file(GOLDEN / case / "intermediates_quant.safetensors")
    layers = json.loads((GOLDEN / case / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        o = values[f"full.prefill.layers.{layer}.attn.o_derot"].flatten(0, 1)
        expected = values[f"full.prefill.layers.{layer}.attn.out"].flatten(0, 1)
        prefix = f"layers.{layer}.attn."
        low_rank = ops.grouped_linear(o, weights[prefix + "wo_a.weight"], weights[prefix + "wo_a.scale"])
        out = ops.fp8_linear(low_rank.flatten(1), weights[prefix + "wo_b.weight"], weights[prefix + "wo_b.scale"])
        error = relative_rms(out, expected)
        assert error.median() <= 1e-4
        assert error.max() <= 0.01


@pytest.mark.parametrize("case", ["dev_a", "dev_b"])
def test_golden_query_projection(case):
    """attn.in -> wq_a -> q_norm -> attn.qr, to one rounding step."""
    weights = load_file(GOLDEN / case / "model.safetensors")
    values = load_file(GOLDEN / case / "intermediates_quant.safetensors")
    config = json.loads((GOLDEN / case / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        x = values[f"full.prefill.layers.{layer}.attn.in"].flatten(0, 1)
        prefix = f"layers.{layer}.attn."
        y = ops.fp8_linear(x, weights[prefix + "wq_a.weight"], weights[prefix + "wq_a.scale"])
        qr = ops.rms_norm(y, weights[prefix + "q_norm.weight"], config["rms_norm_eps"])
        assert ulp_distance(qr, values[f"full.prefill.layers.{layer}.attn.qr"].flatten(0, 1)).max() <= 1


CASES = grid(name=list(LINEARS), rows=[(0,), (), (1,), (7,), (2, 3)], sizes=[(2, 1), (64, 200), (256, 128), (300, 130)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale_dtype", [E8M0, torch.float32])
def test_against_float64(case, dtype, scale_dtype):
    linear, make = LINEARS[case["name"]]
    size, out = case["sizes"]
    weight, scale = make(out, size, scale_dtype=scale_dtype)
    x = torch.randn(*case["rows"], size, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = ops.dequantize_weight(weight, scale, torch.float64)
    exact = quantized(x) @ wide.T
    y = linear(x, weight, scale)
    assert y.shape == (*case["rows"], out)
    assert y.dtype == dtype
    assert y.is_contiguous()
    error, limit = (y.double() - exact).abs(), torch.finfo(dtype).eps / 2 * exact.abs()
    sizes = quantized(x).abs() @ wide.T.abs()
    assert (error <= limit * 1.001 + sum_error(sizes, dtype)).all()
    if dtype != torch.float64:
        assert_no_worse(y, quantized(x).to(dtype) @ wide.to(dtype).T, exact)
    for out_dtype in (torch.bfloat16, torch.float32, torch.float64):
        y = linear(x, weight, scale, out_dtype)
        assert y.dtype == out_dtype
        limit = torch.finfo(out_dtype).eps / 2 * 1.001 * exact.abs() + sum_error(sizes, dtype, out_dtype)
        assert ((y.double() - exact).abs() <= limit).all()


# Below and above the number of rows from which kernels expand weights into memory; tiles cut on every side.
KERNEL_CASES = grid(name=list(LINEARS), rows=[1, 2, 4, 5, 8, 9, 14, 31], sizes=[(130, 33), (1024, 40), (416, 261)])


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", KERNEL_CASES)
@pytest.mark.parametrize("scale_dtype", [E8M0, torch.float32])
def test_kernels_against_float64(implementation, case, scale_dtype):
    linear, make = LINEARS[case["name"]]
    size, out = case["sizes"]
    weight, scale = make(out, size, scale_dtype=scale_dtype)
    if scale_dtype == torch.float32:
        scale = scale * torch.rand(scale.shape)
    x = torch.randn(case["rows"], size)
    with only(implementation, case["name"], scale):
        y = linear(x, weight, scale)
    wide = ops.dequantize_weight(weight, scale, torch.float64)
    exact, sizes = quantized(x) @ wide.T, quantized(x).abs() @ wide.T.abs()
    assert ((y.double() - exact).abs() <= 2.0**-24 * exact.abs() + sum_error(sizes)).all()
    if y.numel() >= 256:  # the largest error of fewer is a matter of luck
        assert_no_worse(y, quantized(x).float() @ wide.float().T, exact)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("rows", [8, 256], ids=["few", "many"])
@pytest.mark.parametrize("name", LINEARS)
def test_every_code_and_scale(implementation, rows, name):
    """Rows with a single 1 read the weight back: every code in every place of a block, every scale that stays exact."""
    linear, make = LINEARS[name]
    size = 512
    weight, scale = make(7, size)
    every = torch.arange(7 * weight.shape[1]).to(torch.uint8).view(7, -1)
    if name == "fp8_linear":
        every = torch.where(every & 0x7F == 0x7F, 0, every)
    weight = every.view(weight.dtype)
    scale = torch.arange(20, 20 + 7 * scale.numel(), 7)[: scale.numel()].remainder(220).add(20).to(torch.uint8)
    scale = scale.view(E8M0).view(-(-7 // 128) if name == "fp8_linear" else 7, -1)
    wide = ops.dequantize_weight(weight, scale, torch.float32)
    x = torch.eye(size)
    with only(implementation, name, scale):
        y = torch.cat([linear(part, weight, scale) for part in x.split(rows)])
    assert torch.equal(y, wide.T)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("rows", [8, 256], ids=["few", "many"])
def test_every_code_under_scales_around_those_that_fold(implementation, rows):
    """Weights may take in scales from 2^-60 to 1; what rows with a single 1 read back does not tell."""
    codes = torch.arange(2 * 256).to(torch.uint8)
    weight = torch.where(codes & 0x7F == 0x7F, 0, codes).view(2, 256).view(E4M3)
    x = torch.eye(256)
    for byte in range(64, 131):
        scale = torch.tensor([[byte, 120]], dtype=torch.uint8).view(E8M0)
        with only(implementation, "fp8_linear", scale):
            y = torch.cat([ops.fp8_linear(part, weight, scale) for part in x.split(rows)])
        assert torch.equal(y, ops.dequantize_weight(weight, scale, torch.float32).T)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_those_of_the_quantiser(implementation, dtype):
    """Weights with a single 1 in each row read the quantised activations back, bit for bit."""
    size = 200
    weight = torch.eye(size).to(E4M3)
    scale = torch.ones(2, 2)
    magnitudes = torch.linspace(-40, 40, 30).exp2().unsqueeze(1)
    x = torch.cat([torch.randn(30, size) * magnitudes, torch.randn(20, size) * torch.randn(20, size).mul(8).exp2()])
    ties = torch.arange(-100, 100) / 16 * 2.0**-9  # halves of e4m3's denormal steps at scale 1
    ties[0] = 448.0
    x = torch.cat([x, ties.unsqueeze(0), torch.full((1, size), 464.0), torch.zeros(1, size)]).to(dtype)
    with only(implementation, "fp8_linear", scale):
        y = ops.fp8_linear(x, weight, scale, torch.float32)
    codes, scales = ops.quantize_fp8(x)
    assert torch.equal(y, ops.dequantize_fp8(codes, scales, 128, torch.float32))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("rows", [2, 20])
def test_nan(implementation, rows):
    """Infinities and NaN among activations, NaN codes and NaN scales, each where it belongs and nowhere else."""
    for name, (linear, make) in LINEARS.items():
        weight, scale = make(140, 256)
        x = torch.randn(rows, 256).bfloat16()
        x[1, 130] = torch.inf
        if name == "fp8_linear":
            weight.view(torch.uint8)[3, 5] = 0xFF
            scale.view(torch.uint8)[1, 0] = 0xFF
            spoilt = torch.tensor([3, *range(128, 140)])
        else:
            scale.view(torch.uint8)[17, 7] = 0xFF
            spoilt = torch.tensor([17])
        with only(implementation, name, scale):
            y = linear(x, weight, scale)
        expected = torch.zeros(rows, 140, dtype=torch.bool)
        expected[1], expected[:, spoilt] = True, True
        assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_independent(implementation, name, dtype):
    linear, make = LINEARS[name]
    weight, scale = make(200, 384)
    x = torch.randn(37, 384).to(dtype)
    with only(implementation, name, scale):
        assert_rows_independent(lambda rows: linear(rows, weight, scale), [x], cuts=(1, 2, 16, 3, 8, 9))


@pytest.mark.parametrize("name", LINEARS)
def test_layout_does_not_matter(name):
    linear, make = LINEARS[name]
    weight, scale = make(200, 256)
    x = torch.randn(5, 256).bfloat16()
    assert_same_bits(linear(strided(x), strided(weight), strided(scale)), linear(x, weight, scale))


@pytest.mark.parametrize("name", LINEARS)
def test_bits_of_one_row_do_not_hide_in_another(name):
    """A NaN or a huge value spoils its own row alone."""
    linear, make = LINEARS[name]
    weight, scale = make(64, 128)
    x = torch.randn(4, 128).bfloat16()
    expected = linear(x, weight, scale)
    x[2, 5] = torch.nan
    y = linear(x, weight, scale)
    assert y[2].isnan().all()
    keep = torch.tensor([0, 1, 3])
    assert_same_bits(y[keep], expected[keep])


@pytest.mark.parametrize("name", LINEARS)
def test_says_that_there_is_no_gradient(name):
    linear, make = LINEARS[name]
    weight, scale = make(8, 32)
    x = torch.randn(2, 32, requires_grad=True)
    y = linear(x, weight, scale)
    with pytest.raises(RuntimeError, match=rf"{name}: has no gradient; train with plain weights"):
        y.sum().backward()


GROUPED = grid(tokens=[0, 1, 7, 40], groups=[1, 2, 4], sizes=[(1, 1), (64, 50), (130, 200)])


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("plain", [False, True], ids=["fp8", "plain"])
def test_grouped_against_float64(case, dtype, plain):
    groups, (size, out) = case["groups"], case["sizes"]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(case["tokens"], groups, size, generator=generator).to(dtype)
    weight, scale = fp8_weight(groups * out, size)
    wide = ops.dequantize_weight(weight, scale, torch.float64)
    if plain:
        weight, scale, wide = wide.to(dtype), None, wide.to(dtype).double()
    exact = torch.stack([x[:, g].double() @ wide[g * out : (g + 1) * out].T for g in range(groups)], 1)
    y = ops.grouped_linear(x, weight, scale)
    assert y.shape == (case["tokens"], groups, out)
    assert y.dtype == dtype
    assert y.is_contiguous()
    if dtype == torch.float64:
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    else:
        baseline = torch.stack([x[:, g] @ wide[g * out : (g + 1) * out].T.to(dtype) for g in range(groups)], 1)
        assert_no_worse(y, baseline, exact)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", [E8M0, torch.float32])
def test_grouped_kernels_against_float64(implementation, dtype, scale_dtype):
    weight, scale = fp8_weight(3 * 50, 300, scale_dtype=scale_dtype)
    wide = ops.dequantize_weight(weight, scale, torch.float64).view(3, 50, 300)
    for tokens in (*range(1, 24), 31, 32, 33, 47):
        x = torch.randn(tokens, 3, 300).to(dtype)
        with only(implementation, "grouped_linear", scale, dtype):
            y = ops.grouped_linear(x, weight, scale)
        exact = torch.einsum("tgk,gnk->tgn", x.double(), wide)
        sizes = torch.einsum("tgk,gnk->tgn", x.double().abs(), wide.abs())
        assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + sum_error(sizes)).all()
        assert_no_worse(y, torch.einsum("tgk,gnk->tgn", x, wide.to(dtype)), exact)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_rows_are_independent(implementation, dtype):
    weight, scale = fp8_weight(4 * 50, 256)
    x = torch.randn(29, 4, 256).to(dtype)
    with only(implementation, "grouped_linear", scale, dtype):
        assert_rows_independent(lambda rows: ops.grouped_linear(rows, weight, scale), [x])


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("tokens", "groups"), [(17, 9), (300, 8), (2305, 1)])
def test_threads_do_not_matter(implementation, tokens, groups):
    """One thread takes some rows and all of their outputs, of many threads each takes some outputs."""
    weight, scale = fp8_weight(groups * 150, 140)
    x = torch.randn(tokens, groups, 140).bfloat16()
    before = torch.get_num_threads()
    try:
        with only(implementation, "grouped_linear", scale, x.dtype):
            found = []
            for threads in (1, 2, 40):
                torch.set_num_threads(threads)
                found.append(ops.grouped_linear(x, weight, scale))
            for first in range(0, tokens, 16 if tokens < 100 else 255):
                rows = slice(first, first + 7)
                assert_same_bits(found[0][rows], ops.grouped_linear(x[rows], weight, scale))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("implementation", implementation_cases("dense_linear"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("groups", "size", "out"), [(1, 128, 33), (3, 70, 50), (2, 512, 64), (4, 31, 1), (2, 0, 3)])
def test_plain_groups_are_dense_linears(implementation, dtype, groups, size, out):
    weight = torch.randn(groups * out, size).to(dtype)
    with max_isa("scalar" if implementation == "reference" else implementation):
        for tokens in (0, 1, 2, 5, 16, 21):
            x = torch.randn(tokens, groups, size).to(dtype)
            y = torch.ops.dsv4.grouped_linear(x, weight)
            parts = [ops.dense_linear(x[:, g], w) for g, w in enumerate(weight.split(out))]
            assert_same_bits(y, torch.stack(parts, 1))
            assert_same_bits(torch.ops.dsv4.grouped_linear(strided(x), strided(weight)), y)


def test_plain_groups_of_few_rows_go_to_the_kernel():
    weight = torch.randn(2 * 20, 30)
    for tokens, through_kernel in ((64, True), (65, False)):
        before = _library.calls()["dense_linear"]
        ops.grouped_linear(torch.randn(tokens, 2, 30), weight)
        assert (_library.calls()["dense_linear"] != before) == through_kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_grouped_gradient_of_few_rows(dtype):
    x, weight = torch.randn(5, 2, 40).to(dtype).requires_grad_(), torch.randn(6, 40).to(dtype).requires_grad_()
    grad = torch.randn(5, 2, 3).to(dtype)
    found = torch.autograd.grad(ops.grouped_linear(x, weight), (x, weight), grad)
    for value, operand, equation in zip(found, (weight, x), ("tgn,gnk->tgk", "tgn,tgk->gnk"), strict=True):
        other = operand.view(2, 3, 40) if operand is weight else operand
        exact = torch.einsum(equation, grad.double(), other.double()).reshape(value.shape)
        baseline = torch.einsum(equation, grad, other).reshape(value.shape)
        assert_no_worse(value, baseline, exact)


def test_grouped_layout_does_not_matter():
    weight, scale = fp8_weight(4 * 50, 256)
    x = torch.randn(29, 4, 256).bfloat16()
    expected = ops.grouped_linear(x, weight, scale)
    assert_same_bits(ops.grouped_linear(strided(x), strided(weight), strided(scale)), expected)
    assert_same_bits(ops.grouped_linear(x.transpose(0, 1).contiguous().transpose(0, 1), weight, scale), expected)


def test_grouped_activations_are_not_quantised():
    weight, scale = torch.ones(1, 128).to(E4M3), torch.ones(1, 1)
    x = torch.zeros(1, 1, 128)
    x[0, 0, 0], x[0, 0, 1] = 448.0, 1 / 1024
    assert ops.grouped_linear(x, weight, scale).item() == 448 + 1 / 1024
    assert ops.fp8_linear(x[0], weight, scale).item() == 448


def test_grouped_gradient():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.grouped_linear, (x, weight))
    codes, scale = fp8_weight(8, 5)
    assert torch.autograd.gradcheck(lambda x: ops.grouped_linear(x, codes, scale), (x,))


def test_opcheck():
    x = torch.randn(3, 64).bfloat16()
    dsv4 = torch.ops.dsv4
    check_op(dsv4.fp8_linear, x, *fp8_weight(24, 64))
    check_op(dsv4.fp8_linear, x, *fp8_weight(24, 64), torch.float32)
    check_op(dsv4.fp4_linear, x, *fp4_weight(24, 64))
    check_op(dsv4.fp4_linear, x, *fp4_weight(24, 64, scale_dtype=torch.float32))
    check_op(dsv4.grouped_linear, x.view(3, 2, 32), *fp8_weight(6, 32))
    check_op(dsv4.grouped_linear, x.view(3, 2, 32).requires_grad_(), *fp8_weight(6, 32))
    plain = torch.randn(6, 8, requires_grad=True)
    check_op(dsv4.grouped_linear, torch.randn(3, 2, 8, requires_grad=True), plain)
    check_op(dsv4._grouped_linear_reference, torch.randn(3, 2, 8, requires_grad=True), plain)
    check_op(dsv4._fp8_linear_reference, x.double().detach(), *fp8_weight(24, 64))
    check_op(dsv4._fp4_linear_reference, x.double().detach(), *fp4_weight(24, 64))


X = torch.zeros(3, 256)
W8, S8 = fp8_weight(200, 256)
W4, S4 = fp4_weight(200, 256)
FLOATS, SCALES = "bfloat16 or float32 or float64", "float8_e8m0fnu or float32"
BAD = {
    "fp8_linear": (
        {"x": X, "weight": W8, "scale": S8},
        [
            ({"x": X.half()}, f"x must be {FLOATS} [..., in], got float16 [3, 256]"),
            ({"x": X.to(E4M3)}, f"x must be {FLOATS} [..., in], got float8_e4m3fn [3, 256]"),
            ({"x": torch.zeros(())}, f"x must be {FLOATS} [..., in], got float32 []"),
            ({"x": X[:, :255]}, "weight must be float8_e4m3fn [out, 255], got float8_e4m3fn [200, 256]"),
            ({"weight": W8.float()}, "weight must be float8_e4m3fn [out, 256], got float32 [200, 256]"),
            ({"weight": W4}, "weight must be float8_e4m3fn [out, 256], got int8 [200, 128]"),
            (
                {"weight": W8.view(2, 100, 256)},
                "weight must be float8_e4m3fn [out, 256], got float8_e4m3fn [2, 100, 256]",
            ),
            ({"scale": torch.ones(2, 3).bfloat16()}, f"scale must be {SCALES} [2, 2], got bfloat16 [2, 3]"),
            ({"scale": S8.float()[:1]}, f"scale must be {SCALES} [2, 2], got float32 [1, 2]"),
            ({"scale": torch.ones(2, 2, device="meta")}, "scale must be on cpu as x is, got meta"),
            ({"out_dtype": torch.float16}, "out_dtype must be bfloat16, float32 or float64, got torch.float16"),
        ],
    ),
    "fp4_linear": (
        {"x": X, "weight": W4, "scale": S4},
        [
            ({"x": X.int()}, f"x must be {FLOATS} [..., in], got int32 [3, 256]"),
            ({"x": X[:, :255]}, "the last dimension of x must be even, got 255"),
            ({"x": X[:, :254]}, "weight must be uint8 or int8 [out, 127], got int8 [200, 128]"),
            ({"weight": W8}, "weight must be uint8 or int8 [out, 128], got float8_e4m3fn [200, 256]"),
            ({"weight": W4[0]}, "weight must be uint8 or int8 [out, 128], got int8 [128]"),
            ({"weight": W4.int()}, "weight must be uint8 or int8 [out, 128], got int32 [200, 128]"),
            ({"scale": S8}, f"scale must be {SCALES} [200, 8], got float8_e8m0fnu [2, 2]"),
            ({"scale": S4.view(torch.uint8)}, f"scale must be {SCALES} [200, 8], got uint8 [200, 8]"),
            ({"weight": W4.to("meta")}, "weight must be on cpu as x is, got meta"),
            ({"out_dtype": torch.int8}, "out_dtype must be bfloat16, float32 or float64, got torch.int8"),
        ],
    ),
    "grouped_linear": (
        {"x": X.view(3, 2, 128), "weight": torch.zeros(10, 128), "scale": None},
        [
            ({"x": X}, f"x must be {FLOATS} [tokens, groups, in], got float32 [3, 256]"),
            ({"x": X.view(3, 2, 128).half()}, f"x must be {FLOATS} [tokens, groups, in], got float16 [3, 2, 128]"),
            ({"x": torch.zeros(3, 0, 128)}, "x must have at least one group, got 0"),
            ({"x": X.view(3, 2, 128).double()}, "weight must be float64 [groups * out, 128], got float32 [10, 128]"),
            ({"weight": torch.zeros(11, 128)}, "weight must have a multiple of 2 rows, one part a group, got 11"),
            ({"weight": torch.zeros(10, 64)}, "weight must be float32 [groups * out, 128], got float32 [10, 64]"),
            ({"weight": W8[:, :128]}, "weight must be float32 [groups * out, 128], got float8_e4m3fn [200, 128]"),
            ({"scale": torch.ones(1, 1)}, "weight must be float8_e4m3fn [groups * out, 128], got float32 [10, 128]"),
            (
                {"weight": W8[:, :128], "scale": torch.ones(1, 1)},
                f"scale must be {SCALES} [2, 1], got float32 [1, 1]",
            ),
            ({"weight": torch.zeros(10, 128, device="meta")}, "weight must be on cpu as x is, got meta"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [pytest.param(op, *fault, id=f"{op}-{i}") for op, (_, faults) in BAD.items() for i, fault in enumerate(faults)],
)
def test_bad_arguments(op, changes, message):
    assert_rejects(getattr(ops, op), BAD[op][0], f"{op}: {message}", **changes)
