"""Quantisers bit for bit, their inverses, and the Hadamard rotation."""

import bisect
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import dsv4.ops as ops
from dsv4 import _library
from dsv4.testing import (
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    strided,
    ulp_distance,
)

GOLDEN = load_file(Path(__file__).parent.parent / "data" / "golden" / "ops" / "ops.safetensors")
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3_VALUES = GOLDEN["codes.e4m3_values"][:127].tolist()  # 0 ... 448 by code

SIZES = grid(rows=[(), (0,), (1,), (5,), (2, 3)], n=[0, 2, 30, 64, 126, 128, 130, 300], block=[32, 64, 128])
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def values(*shape, dtype=torch.float32, seed=0):
    """Random values whose blocks differ in size by many powers of two, with some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.randint(-12, 12, shape, generator=generator).float().exp2()
    return torch.where(torch.rand(*shape, generator=generator) < 0.05, 0.0, x).to(dtype)


def nearest_code(value, table):
    """Index of the entry nearest to a non-negative Fraction, ties to the even index."""
    above = min(bisect.bisect_left(table, value), len(table) - 1)
    candidates = (max(above - 1, 0), above)
    return min(candidates, key=lambda code: (abs(Fraction(table[code]) - value), code % 2))


def expected_block(block, floor, largest, table):
    """Scale exponent and codes (sign bit above the table's bits) of one block, in exact arithmetic."""
    amax = max([floor, *(abs(v) for v in block)])
    ratio = torch.tensor(amax) * torch.tensor(1 / largest)  # the one float32 product of the definition
    exponent = math.ceil(math.log2(Fraction(ratio.item()))) if ratio > 0 else None
    assert exponent is not None
    while Fraction(2) ** exponent < Fraction(ratio.item()):  # log2 above is rounded
        exponent += 1
    while Fraction(2) ** (exponent - 1) >= Fraction(ratio.item()):
        exponent -= 1
    codes = []
    for value in block:
        magnitude = min(abs(Fraction(value)) / Fraction(2) ** exponent, Fraction(largest))
        codes.append(nearest_code(magnitude, table) + (len(table) if math.copysign(1, value) < 0 else 0))
    return exponent, codes


class TestGolden:
    def test_fp8(self):
        codes, scale = ops.quantize_fp8(GOLDEN["act_quant128.x"])
        assert_same_bits(codes, GOLDEN["act_quant128.q"])
        assert_same_bits(scale, GOLDEN["act_quant128.scale"])

    def test_fp8_round_trip(self):
        assert_same_bits(ops.fp8_round_trip(GOLDEN["act_quant128.x"], 64), GOLDEN["act_quant64_inplace.y"])

    def test_fp4(self):
        codes, scale = ops.quantize_fp4(GOLDEN["act_quant128.x"])
        assert_same_bits(codes, GOLDEN["fp4_quant32.packed"])
        assert_same_bits(scale, GOLDEN["fp4_quant32.scale"])

    def test_fp4_round_trip(self):
        assert_same_bits(ops.fp4_round_trip(GOLDEN["act_quant128.x"]), GOLDEN["fp4_quant32_inplace.y"])

    def test_code_tables(self):
        one = torch.full((256, 1), 127, dtype=torch.uint8).view(E8M0)
        codes = GOLDEN["codes.e4m3_bytes"].view(E4M3).unsqueeze(-1)
        e4m3 = ops.dequantize_fp8(codes, one, 128, torch.float32).squeeze(-1)
        finite = ~GOLDEN["codes.e4m3_values"].isnan()
        assert_same_bits(e4m3[finite], GOLDEN["codes.e4m3_values"][finite])
        assert e4m3[~finite].isnan().all()

        packed = torch.arange(0, 16, 2, dtype=torch.uint8) | (torch.arange(1, 16, 2, dtype=torch.uint8) << 4)
        e2m1 = ops.dequantize_fp4(packed, one[0], 32, torch.float32)
        assert_same_bits(e2m1, GOLDEN["codes.e2m1_values"])

        scales = GOLDEN["codes.e8m0_bytes"].view(E8M0).unsqueeze(-1)
        ones = torch.ones(255, 1).to(E4M3)
        assert_same_bits(ops.dequantize_fp8(ones, scales, 128, torch.float32).squeeze(-1), GOLDEN["codes.e8m0_values"])

    @pytest.mark.parametrize("name", ["fp8_linear", "fp4_linear"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dequantized_weights(self, name, dtype):
        weight = ops.dequantize_weight(GOLDEN[f"{name}.weight"], GOLDEN[f"{name}.scale"], dtype)
        assert_same_bits(weight, GOLDEN[f"{name}.weight_dequant"].to(dtype))

    @pytest.mark.parametrize("n", [128, 256])
    def test_hadamard(self, n):
        y = ops.hadamard(GOLDEN[f"hadamard{n}.x"])
        assert ulp_distance(y, GOLDEN[f"hadamard{n}.y"]).max() <= 1


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_against_exact_arithmetic(case, dtype):
    x = values(*case["rows"], case["n"], dtype=dtype, seed=case["n"] + case["block"])
    blocks = -(-case["n"] // case["block"])
    codes8, scale8 = ops.quantize_fp8(x, case["block"])
    codes4, scale4 = ops.quantize_fp4(x, case["block"])
    assert codes8.shape == x.shape
    assert codes4.shape == (*case["rows"], case["n"] // 2)
    assert scale8.shape == scale4.shape == (*case["rows"], blocks)
    assert (codes8.dtype, scale8.dtype, codes4.dtype, scale4.dtype) == (E4M3, E8M0, torch.uint8, E8M0)
    unpacked = torch.stack((codes4 & 15, codes4 >> 4), -1).flatten(-2)

    rows = x.float().reshape(-1, case["n"]) if x.numel() else x.float().reshape(0, max(case["n"], 1))
    first = max(len(rows) - 2, 0)  # exact arithmetic is slow, and every row takes the same path
    for index, row in enumerate(rows[first:].tolist(), first):
        for start in range(0, case["n"], case["block"]):
            block = row[start : start + case["block"]]
            at = start // case["block"]
            exponent, codes = expected_block(block, torch.tensor(1e-4).item(), 448, E4M3_VALUES)
            assert scale8.view(torch.uint8).reshape(-1, blocks)[index, at] == exponent + 127
            codes = [c if c < 127 else c - 127 + 128 for c in codes]
            assert codes8.view(torch.uint8).reshape(-1, case["n"])[index, start : start + len(block)].tolist() == codes
            exponent, codes = expected_block(block, 6 * 2.0**-126, 6, E2M1)
            assert scale4.view(torch.uint8).reshape(-1, blocks)[index, at] == exponent + 127
            assert unpacked.reshape(-1, case["n"])[index, start : start + len(block)].tolist() == codes


@pytest.mark.parametrize("k", [-21, -3, 0, 5, 60, 119])
def test_scale_steps_where_amax_passes_the_largest_code(k):
    amax = torch.tensor([448.0 * 2.0**k])
    above = torch.nextafter(amax, 2 * amax)
    below = torch.nextafter(amax, 0 * amax)
    bytes_of = [int(ops.quantize_fp8(x)[1].view(torch.uint8)) for x in (below, amax, above)]
    # fl32(1/448) is below 1/448 and the product is rounded, so the step comes one or two values late, never early.
    assert bytes_of[:2] == [127 + k] * 2
    beyond = (amax * (1 + 2.0**-20)).float()
    assert int(ops.quantize_fp8(beyond)[1].view(torch.uint8)) == 128 + k
    assert bytes_of[2] in (127 + k, 128 + k)


def test_floors():
    zero = torch.zeros(1, 128)
    codes, scale = ops.quantize_fp8(zero)
    assert scale.view(torch.uint8).item() == 127 - 22
    assert codes.view(torch.uint8).unique().tolist() == [0]
    codes, scale = ops.quantize_fp4(zero)
    assert scale.view(torch.uint8).unique().tolist() == [1]
    assert codes.unique().tolist() == [0]
    tiny = torch.full((1, 32), 2.0**-149)
    assert ops.dequantize_fp4(*ops.quantize_fp4(tiny), 32, torch.float32).abs().max() == 0
    assert ops.dequantize_fp8(*ops.quantize_fp8(tiny, 32), 32, torch.float32).abs().max() == 0


def test_ties_go_to_the_even_code_and_zero_keeps_its_sign():
    ties = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.0, -0.25, -0.75, -5.0, 0.2500001, 0.2499999, 0, 0]
    )
    codes, scale = ops.quantize_fp4(ties, 16)
    assert scale.view(torch.uint8).item() == 127
    unpacked = torch.stack((codes & 15, codes >> 4), -1).flatten().tolist()
    assert unpacked == [0, 2, 2, 4, 4, 6, 6, 7, 8, 8, 10, 14, 1, 0, 0, 0]
    halves = torch.tensor([17.0, 19.0, 448.0, -17.0, -0.0])  # between 16, 18, 20: even codes are 16 and 20
    codes, _ = ops.quantize_fp8(halves)
    assert codes.float().tolist() == [16, 20, 448, -16, 0]
    assert codes.view(torch.uint8)[-1] == 128


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_value_that_is_not_finite_poisons_its_block_alone(bad, dtype):
    x = values(2, 256, dtype=dtype)
    x[1, 130] = bad
    clean = x.clone()
    clean[1, 128:] = 1
    codes, scale = ops.quantize_fp8(x)
    assert scale.view(torch.uint8)[1, 1] == 255
    assert ops.dequantize_fp8(codes, scale)[1, 128:].isnan().all()
    assert_same_bits(codes[:, :128].contiguous(), ops.quantize_fp8(clean)[0][:, :128].contiguous())
    codes, scale = ops.quantize_fp4(x)
    assert (scale.view(torch.uint8) == 255).sum() == 1
    assert ops.dequantize_fp4(codes, scale)[1, 128:160].isnan().all()
    assert not ops.dequantize_fp4(codes, scale)[0].isnan().any()


FINITE = st.floats(-(2.0**127), 2.0**127, width=32)  # beyond, rounding up may pass the largest float32


@settings(max_examples=200, deadline=None)
@given(st.lists(FINITE, min_size=2, max_size=70), st.booleans())
def test_round_trip_is_idempotent_and_close(row, four):
    x = torch.tensor(row[: len(row) // 2 * 2], dtype=torch.float32)
    quantize, dequantize = (ops.quantize_fp4, ops.dequantize_fp4) if four else (ops.quantize_fp8, ops.dequantize_fp8)
    once = dequantize(*quantize(x, 32), 32, torch.float64)
    twice = dequantize(*quantize(once.float(), 32), 32, torch.float64)
    representable = once.float().double() == once  # float32 underflow may drop the last bits of the smallest values
    assert torch.equal(once[representable], twice[representable])
    for start in range(0, len(x), 32):
        block, result = x[start : start + 32].double(), once[start : start + 32]
        amax = block.abs().max().clamp(min=6 * 2.0**-126 if four else 1e-4)
        # Half a step of the largest binade; the scale is under twice amax / largest code.
        assert (block - result).abs().max() <= 2 * amax * (1 / 6 if four else 16 / 448) * (1 + 1e-6)


@pytest.mark.parametrize("scale_dtype", [E8M0, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (200, 300), (127, 129), (0, 64), (64, 0)])
def test_dequantize_weight_fp8_by_blocks(shape, scale_dtype):
    rows, columns = shape
    weight = values(*shape).clamp(-448, 448).to(E4M3)  # else NaN in some versions of torch
    scale = torch.randint(-6, 6, (-(-rows // 128), -(-columns // 128))).float().exp2().to(scale_dtype)
    expected = torch.empty(shape)
    for i in range(rows):
        for j in range(0, columns, 128):
            expected[i, j : j + 128] = weight[i, j : j + 128].float() * scale[i // 128, j // 128].float()
    assert_same_bits(ops.dequantize_weight(weight, scale, torch.float32), expected)
    stacked = ops.dequantize_weight(
        torch.stack((weight.view(torch.uint8),) * 3).view(E4M3), torch.stack((scale.float(),) * 3), torch.float32
    )
    assert_same_bits(stacked, torch.stack((expected,) * 3))


@pytest.mark.parametrize("pack_dtype", [torch.int8, torch.uint8])
def test_dequantize_weight_fp4_puts_the_even_input_in_the_low_nibble(pack_dtype):
    weight = torch.tensor([[0x21, 0xF3]], dtype=torch.uint8).view(pack_dtype)
    scale = torch.tensor([[2.0]]).to(E8M0)
    assert ops.dequantize_weight(weight, scale, torch.float32).tolist() == [[1.0, 2.0, 3.0, -12.0]]


@pytest.mark.parametrize("n", [1, 2, 8, 128, 1024])
def test_hadamard_is_the_sylvester_matrix(n):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(3, 5, n, dtype=torch.float64)
    torch.testing.assert_close(ops.hadamard(x), x @ matrix / math.sqrt(n), rtol=0, atol=1e-13)
    torch.testing.assert_close(ops.hadamard(ops.hadamard(x)), x, rtol=0, atol=1e-13)
    for dtype in (torch.bfloat16, torch.float32):
        exact = x.to(dtype).double() @ matrix / math.sqrt(n)
        error = (ops.hadamard(x.to(dtype)).double() - exact).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-14).all()  # one rounding


HADAMARDS = grid(
    rows=[(), (0,), (1,), (5,), (2, 3)], size=[1, 2, 16, 32, 64, 128, 512, 8192], dtype=[torch.bfloat16, torch.float32],
    layout=["contiguous", "strided"],
)  # fmt: skip


@pytest.mark.parametrize("implementation", implementation_cases("hadamard"))
@pytest.mark.parametrize("case", HADAMARDS)
def test_hadamard_kernels_give_the_definition_s_bits(implementation, case):
    scale = torch.randint(-9, 9, (case["size"],)).exp2()
    x = (scale * torch.randn(*case["rows"], case["size"])).to(case["dtype"])
    given_x = strided(x) if case["layout"] == "strided" else x.clone()
    with max_isa(implementation):
        y = ops.hadamard(given_x)
    if implementation != "reference":
        whole = case["size"] % 32 == 0
        assert _library.last_implementation("hadamard") == (implementation if whole else "scalar")
    assert y.is_contiguous()
    assert_same_bits(given_x.contiguous(), x)
    assert_same_bits(y, ops.hadamard_reference(x))


@pytest.mark.parametrize("implementation", implementation_cases("hadamard"))
def test_hadamard_company_and_threads(implementation):
    x = torch.randn(37, 128).bfloat16()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with max_isa(implementation):
                assert_rows_independent(ops.hadamard, [x])
                assert_same_bits(ops.hadamard(x), ops.hadamard_reference(x))
    finally:
        torch.set_num_threads(before)


def test_hadamard_gradient():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.hadamard, (x,))
    assert torch.autograd.gradgradcheck(ops.hadamard, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(dtype):
    x = values(6, 256, dtype=dtype)
    for quantize in (ops.quantize_fp8, ops.quantize_fp4):
        for expected, got in zip(quantize(x), quantize(strided(x)), strict=True):
            assert_same_bits(got, expected)
            assert got.is_contiguous()
        transposed = x.t().contiguous().t()
        for expected, got in zip(quantize(x), quantize(transposed), strict=True):
            assert_same_bits(got, expected)
    assert_same_bits(ops.hadamard(strided(x)), ops.hadamard(x))
    codes, scale = ops.quantize_fp8(x)
    assert_same_bits(ops.dequantize_fp8(strided(codes), strided(scale)), ops.dequantize_fp8(codes, scale))
    codes, scale = ops.quantize_fp4(x)
    assert_same_bits(ops.dequantize_fp4(strided(codes), strided(scale)), ops.dequantize_fp4(codes, scale))
    weight, scale = values(200, 256).to(E4M3), torch.rand(2, 2)
    assert_same_bits(ops.dequantize_weight(strided(weight), strided(scale)), ops.dequantize_weight(weight, scale))


def test_rows_are_independent():
    x = values(23, 300, dtype=torch.bfloat16)
    assert_rows_independent(ops.quantize_fp8, [x])
    assert_rows_independent(ops.quantize_fp4, [x])
    assert_rows_independent(lambda rows: ops.hadamard(rows[:, :256]), [x])
    assert_rows_independent(ops.dequantize_fp8, list(ops.quantize_fp8(x)))


def test_opcheck():
    x = values(5, 256, dtype=torch.bfloat16)
    codes, scale = ops.quantize_fp8(x)
    packed, packed_scale = ops.quantize_fp4(x)
    weight = values(200, 256).clamp(-448, 448).to(E4M3)
    dsv4 = torch.ops.dsv4
    check_op(dsv4.quantize_fp8, x, 64)
    check_op(dsv4.quantize_fp4, x)
    check_op(dsv4.dequantize_fp8, codes, scale, 128, torch.float32)
    check_op(dsv4.dequantize_fp4, packed, packed_scale)
    check_op(dsv4.dequantize_fp4, packed, packed_scale.float())
    check_op(dsv4.dequantize_weight, weight, torch.rand(2, 2))
    check_op(dsv4.dequantize_weight, packed.view(torch.int8), packed_scale.float())
    check_op(dsv4._quantize_fp8_reference, x.double(), 64)
    check_op(dsv4._quantize_fp4_reference, x.double())
    check_op(dsv4._dequantize_fp8_reference, codes, scale, 128, torch.float64)
    check_op(dsv4._dequantize_fp4_reference, packed, packed_scale, 32, torch.float64)
    check_op(dsv4._dequantize_weight_reference, weight, torch.rand(2, 2), torch.float64)
    check_op(dsv4.hadamard, torch.randn(3, 8, requires_grad=True))
    check_op(dsv4._hadamard_reference, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "op", ["quantize_fp8", "quantize_fp4", "dequantize_fp8", "dequantize_fp4", "dequantize_weight"]
)
def test_a_gradient_is_refused(op, dtype):
    wanted = torch.ones(1, 2, requires_grad=True)
    if op.startswith("quantize"):
        result = getattr(ops, op)(wanted.to(dtype))[1].float()
    else:
        codes = torch.zeros(1, 32, dtype=torch.uint8) if op == "dequantize_fp4" else torch.zeros(1, 256).to(E4M3)
        result = getattr(ops, op)(codes, wanted, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"^{op}: has no gradient; detach "):
        result.sum().backward()


def test_compiles_without_graph_breaks():
    def function(x):
        return ops.fp8_round_trip(ops.hadamard(x)) + ops.fp4_round_trip(x)

    x = values(4, 256, dtype=torch.bfloat16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), function(x))


X = torch.zeros(2, 256)
INT, HALF = torch.zeros(2, 256, dtype=torch.int32), torch.zeros(2, 256).half()
SCALE = torch.ones(2, 2)
FLOATS = "bfloat16 or float32 or float64"
BAD_QUANTIZE = [
    ({"x": INT}, f"x must be {FLOATS} [..., n], got int32 [2, 256]"),
    ({"x": HALF}, f"x must be {FLOATS} [..., n], got float16 [2, 256]"),
    ({"x": X.bool()}, f"x must be {FLOATS} [..., n], got bool [2, 256]"),
    ({"x": X.to(E4M3)}, f"x must be {FLOATS} [..., n], got float8_e4m3fn [2, 256]"),
    ({"x": torch.zeros(())}, f"x must be {FLOATS} [..., n], got float32 []"),
    ({"x": X.to(torch.complex64)}, f"x must be {FLOATS} [..., n], got complex64 [2, 256]"),
]
SCALES = "float8_e8m0fnu or float32"
BAD = {
    "quantize_fp8": (
        {"x": X},
        [
            *BAD_QUANTIZE,
            ({"block": 0}, "block must be at least 1, got 0"),
            ({"block": -128}, "block must be at least 1, got -128"),
        ],
    ),
    "quantize_fp4": (
        {"x": X},
        [
            *BAD_QUANTIZE,
            ({"x": torch.zeros(2, 31)}, "the last dimension of x must be even, got 31"),
            ({"block": 0}, "block must be even and at least 2, got 0"),
            ({"block": 31}, "block must be even and at least 2, got 31"),
        ],
    ),
    "dequantize_fp8": (
        {"codes": X.to(E4M3), "scale": SCALE},
        [
            ({"codes": X}, "codes must be float8_e4m3fn [..., n], got float32 [2, 256]"),
            ({"codes": torch.zeros(()).to(E4M3)}, "codes must be float8_e4m3fn [..., n], got float8_e4m3fn []"),
            ({"scale": SCALE[:1]}, f"scale must be {SCALES} [2, 2], got float32 [1, 2]"),
            ({"scale": SCALE[0]}, f"scale must be {SCALES} [2, 2], got float32 [2]"),
            ({"scale": SCALE.bfloat16()}, f"scale must be {SCALES} [2, 2], got bfloat16 [2, 2]"),
            ({"scale": SCALE.to(E4M3)}, f"scale must be {SCALES} [2, 2], got float8_e4m3fn [2, 2]"),
            ({"scale": torch.ones(2, 2, device="meta")}, "scale must be on cpu as codes is, got meta"),
            ({"block": 64}, f"scale must be {SCALES} [2, 4], got float32 [2, 2]"),
            ({"block": 0}, "block must be at least 1, got 0"),
            ({"dtype": torch.float16}, "dtype must be bfloat16, float32 or float64, got torch.float16"),
        ],
    ),
    "dequantize_fp4": (
        {"codes": torch.zeros(2, 128, dtype=torch.uint8), "scale": torch.ones(2, 8)},
        [
            ({"codes": X}, "codes must be uint8 or int8 [..., n / 2], got float32 [2, 256]"),
            ({"codes": INT}, "codes must be uint8 or int8 [..., n / 2], got int32 [2, 256]"),
            ({"scale": SCALE}, f"scale must be {SCALES} [2, 8], got float32 [2, 2]"),
            ({"scale": torch.ones(2, 8).double()}, f"scale must be {SCALES} [2, 8], got float64 [2, 8]"),
            ({"scale": torch.ones(16)}, f"scale must be {SCALES} [2, 8], got float32 [16]"),
            ({"scale": torch.ones(2, 8, device="meta")}, "scale must be on cpu as codes is, got meta"),
            ({"block": 16}, f"scale must be {SCALES} [2, 16], got float32 [2, 8]"),
            ({"block": 3}, "block must be even and at least 2, got 3"),
            ({"dtype": torch.int32}, "dtype must be bfloat16, float32 or float64, got torch.int32"),
        ],
    ),
    "dequantize_weight": (
        {"weight": torch.zeros(200, 256).to(E4M3), "scale": SCALE},
        [
            ({"weight": X}, "weight must be float8_e4m3fn or uint8 or int8 [..., out, in], got float32 [2, 256]"),
            (
                {"weight": X[0].to(E4M3)},
                "weight must be float8_e4m3fn or uint8 or int8 [..., out, in], got float8_e4m3fn [256]",
            ),
            ({"weight": torch.zeros(300, 256).to(E4M3)}, f"scale must be {SCALES} [3, 2], got float32 [2, 2]"),
            ({"weight": torch.zeros(256, 300).to(E4M3)}, f"scale must be {SCALES} [2, 3], got float32 [2, 2]"),
            ({"weight": torch.zeros(2, 128).char()}, f"scale must be {SCALES} [2, 8], got float32 [2, 2]"),
            ({"weight": torch.zeros(3, 200, 256).to(E4M3)}, f"scale must be {SCALES} [3, 2, 2], got float32 [2, 2]"),
            ({"scale": SCALE.half()}, f"scale must be {SCALES} [2, 2], got float16 [2, 2]"),
            ({"scale": torch.ones(2, 2, device="meta")}, "scale must be on cpu as weight is, got meta"),
            ({"dtype": torch.float16}, "dtype must be bfloat16, float32 or float64, got torch.float16"),
        ],
    ),
    "hadamard": (
        {"x": X},
        [
            *BAD_QUANTIZE,
            ({"x": X[:, :0]}, "the last dimension of x must be a power of two, got 0"),
            ({"x": X[:, :3]}, "the last dimension of x must be a power of two, got 3"),
            ({"x": X[:, :96]}, "the last dimension of x must be a power of two, got 96"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [pytest.param(op, *fault, id=f"{op}-{i}") for op, (_, faults) in BAD.items() for i, fault in enumerate(faults)],
)
def test_bad_arguments(op, changes, message):
    assert_rejects(getattr(ops, op), BAD[op][0], f"{op}: {message}", **changes)
