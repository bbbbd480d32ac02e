"""Linear layers on plain weights."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

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
    strided,
)

KERNELS = implementation_cases("dense_linear")
FLOATS = [torch.bfloat16, torch.float32]


@contextlib.contextmanager
def only(implementation, *operands):
    """This implementation, or the next that takes operands of these dtypes."""
    narrow = all(operand.dtype == torch.bfloat16 for operand in operands)
    expected = "avx512" if implementation == "amx" and not narrow else implementation
    with max_isa("scalar" if implementation == "reference" else implementation):
        yield
        if implementation != "reference":
            assert _library.last_implementation("dense_linear") == expected


def operands(rows, size, out, x_dtype, w_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*rows, size, generator=generator).to(x_dtype),
        torch.randn(out, size, generator=generator).to(w_dtype),
    )


# Rows on both sides of the number that needs scratch memory, of a tile and of a piece; inputs of a step and of a block;
# outputs of a tile and of a piece.
CASES = grid(
    rows=[1, 2, 3, 4, 5, 8, 66], sizes=[(1, 1), (31, 17), (33, 70), (512, 33), (513, 5), (1100, 36)], x=FLOATS, w=FLOATS
)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_against_float64(implementation, case):
    size, out = case["sizes"]
    x, weight = operands((case["rows"],), size, out, case["x"], case["w"])
    exact, sizes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    with only(implementation, x, weight):
        for out_dtype in FLOATS:
            y = ops.dense_linear(x, weight, out_dtype)
            assert y.dtype == out_dtype
            assert y.is_contiguous()
            rounding = torch.finfo(out_dtype).eps / 2 * 1.001 * exact.abs()
            assert ((y.double() - exact).abs() <= rounding + 2.0**-22 * sizes).all()
            if y.numel() >= 256:  # the largest error of fewer is a matter of luck
                assert_no_worse(y, F.linear(x.to(torch.float32), weight.to(torch.float32)).to(out_dtype), exact)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 3), (0, 2), (2, 1, 4)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(("size", "out"), [(0, 3), (5, 0), (40, 24)])
def test_shapes(rows, dtype, size, out):
    x, weight = operands(rows, size, out, dtype, dtype)
    exact = x.double() @ weight.double().T
    y = ops.dense_linear(x, weight)
    assert y.shape == (*rows, out)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5 if dtype != torch.float64 else 1e-12
    )
    for out_dtype in (*FLOATS, torch.float64):
        assert ops.dense_linear(x, weight, out_dtype).dtype == out_dtype


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("w_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize(("size", "out"), [(1100, 39), (96, 22)])
def test_rows_are_independent(implementation, x_dtype, w_dtype, size, out):
    x, weight = operands((139,), size, out, x_dtype, w_dtype)
    with only(implementation, x, weight):
        assert_rows_independent(
            lambda rows: ops.dense_linear(rows, weight, torch.float32), [x], cuts=(1, 2, 3, 4, 5, 64, 7, 53)
        )


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_weights_are_not_narrowed(implementation, rows, dtype):
    """Rows with a single 1 read the weight back: every bit of it, in every place of a step and of a block."""
    weight = torch.randn(520, 520)
    x = torch.eye(520).to(dtype)
    with only(implementation, x, weight):
        y = torch.cat([ops.dense_linear(part, weight, torch.float32) for part in x.split(rows)])
    assert torch.equal(y, weight.T)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("w_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_nan(implementation, x_dtype, w_dtype):
    """NaN and infinities where they belong and nowhere else; memory between rows is not read."""
    for rows in (3, 9):
        x, weight = operands((rows,), 70, 37, x_dtype, w_dtype)
        x[1, 69], weight[35, 3] = torch.nan, torch.inf
        spaced_x = torch.full((rows, 73), torch.nan, dtype=x_dtype)
        spaced_w = torch.full((37, 73), torch.nan, dtype=w_dtype)
        spaced_x[:, :70], spaced_w[:, :70] = x, weight
        with only(implementation, x, weight):
            y = ops.dense_linear(spaced_x[:, :70], spaced_w[:, :70], torch.float32)
            assert_same_bits(y, ops.dense_linear(x, weight, torch.float32))
        expected = torch.zeros(rows, 37, dtype=torch.bool)
        expected[1], expected[:, 35] = True, True
        assert torch.equal(~y.isfinite(), expected)


def test_layout_does_not_matter():
    x, weight = operands((2, 7), 130, 40, torch.bfloat16, torch.float32)
    expected = ops.dense_linear(x, weight)
    assert_same_bits(ops.dense_linear(strided(x), strided(weight)), expected)
    assert_same_bits(ops.dense_linear(x.transpose(0, 1), weight), expected.transpose(0, 1).contiguous())
    assert_same_bits(ops.dense_linear(x, weight.T.contiguous().T), expected)


def test_threads_do_not_matter():
    x, weight = operands((70,), 600, 300, torch.bfloat16, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.dense_linear(x, weight, torch.float32)
        torch.set_num_threads(3)
        assert_same_bits(ops.dense_linear(x, weight, torch.float32), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [(3,), (2, 3)])
def test_gradient(rows):
    x, weight = operands(rows, 5, 4, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(ops.dense_linear, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("w_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_gradient_against_float64(x_dtype, w_dtype):
    x, weight = operands((2, 37), 70, 45, x_dtype, w_dtype)
    grad = torch.randn(2, 37, 45)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    found = torch.autograd.grad(ops.dense_linear(*leaves, torch.float32), leaves, grad)
    wide = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.autograd.grad(F.linear(*wide), wide, grad.double())
    eager = x.float().requires_grad_(), weight.float().requires_grad_()
    baseline = torch.autograd.grad(F.linear(*eager), eager, grad)
    for name, gradient, base, wanted in zip(("x", "weight"), found, baseline, exact, strict=True):
        assert gradient.dtype == {"x": x_dtype, "weight": w_dtype}[name]
        assert_no_worse(gradient, base.to(gradient.dtype), wanted)
    only_x = torch.autograd.grad(ops.dense_linear(leaves[0], weight, torch.float32), leaves[:1], grad)
    assert_same_bits(only_x[0], found[0])


def test_opcheck():
    x, weight = operands((3,), 40, 24, torch.bfloat16, torch.bfloat16)
    check_op(torch.ops.dsv4.dense_linear, x, weight)
    check_op(torch.ops.dsv4.dense_linear, x.view(1, 3, 40), weight.float(), torch.float32)
    check_op(torch.ops.dsv4.dense_linear, x.requires_grad_(), weight.requires_grad_(), torch.float32)
    check_op(torch.ops.dsv4._dense_linear_reference, x.detach().double(), weight.detach())


X, W = torch.zeros(3, 256), torch.zeros(200, 256)
WORDS = "bfloat16 or float32 or float64"
BAD = [
    ({"x": X.half()}, f"x must be {WORDS} [..., in], got float16 [3, 256]"),
    ({"x": X.int()}, f"x must be {WORDS} [..., in], got int32 [3, 256]"),
    ({"x": torch.zeros(())}, f"x must be {WORDS} [..., in], got float32 []"),
    ({"x": X[:, :255]}, f"weight must be {WORDS} [out, 255], got float32 [200, 256]"),
    ({"weight": W.half()}, f"weight must be {WORDS} [out, 256], got float16 [200, 256]"),
    ({"weight": W[0]}, f"weight must be {WORDS} [out, 256], got float32 [256]"),
    ({"weight": W.view(2, 100, 256)}, f"weight must be {WORDS} [out, 256], got float32 [2, 100, 256]"),
    ({"weight": W.T}, f"weight must be {WORDS} [out, 256], got float32 [256, 200]"),
    ({"weight": W.to("meta")}, "weight must be on cpu as x is, got meta"),
    ({"out_dtype": torch.float16}, "out_dtype must be bfloat16, float32 or float64, got torch.float16"),
    ({"out_dtype": torch.int32}, "out_dtype must be bfloat16, float32 or float64, got torch.int32"),
]


@pytest.mark.parametrize(("changes", "message"), [pytest.param(*fault, id=str(i)) for i, fault in enumerate(BAD)])
def test_bad_arguments(changes, message):
    assert_rejects(ops.dense_linear, {"x": X, "weight": W}, f"dense_linear: {message}", **changes)
