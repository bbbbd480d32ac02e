"""mHC's gradients: native kernels against float64 autograd of the references, and the formulas themselves."""

import pytest
import torch
from mhc_cases import (
    EAGER,
    NORMS,
    OUTPUTS,
    X,
    arguments,
    assert_one_draw,
    double,
    eager_draws,
    eager_post_pre,
    eager_pre,
    norm_dtype,
    results,
)

import dsv4.ops as ops
from dsv4 import _library
from dsv4.testing import assert_same_bits, grid, implementation_cases, max_isa


def gradients(function, values, grads):
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in values]
    out = results(function(*leaves))
    wanted = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(out, wanted, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])


def pooled(names, grads):
    """Gradients of scale and base as one result: single sums over all tokens, whose errors mean little one by one."""
    rest = [g for name, g in zip(names, grads, strict=True) if name not in ("scale", "base")]
    small = [g for name, g in zip(names, grads, strict=True) if name in ("scale", "base")]
    return [*rest, torch.cat(small)] if small else rest


def check_gradients(op, implementation, values):
    names = list(arguments(op, 1, 1))
    wanted = [name for name, value in zip(names, values, strict=True) if value is not None]
    grads = [torch.randn_like(o) for o in results(EAGER[op](*values))]
    with max_isa(implementation):
        actual = gradients(getattr(ops, op), values, grads)
        # mhc_post_pre leaves its own streams' gradient to the op of the half it came through last
        backward = {"mhc_post_pre": "mhc_post"}.get(op, op) + "_backward"
        assert _library.last_implementation(backward) == implementation
    exact = gradients(getattr(ops, f"{op}_reference"), double(values), double(grads))

    def eager(order):
        return wanted, gradients(EAGER[op], order(names, values), order(OUTPUTS[op], grads))

    draws = (pooled(wanted, draw) for draw in eager_draws(op, names, values, eager))
    # The norm's input was rounded: an error that all orders of summation share, and that the exact gradient lacks.
    factor = 3.0 if "norm_weight" in wanted and values[0].dtype == X else 2.0
    assert_one_draw(implementation, pooled(wanted, actual), draws, pooled(wanted, exact), factor)


GRADIENT_CASES = grid(
    tokens=[0, 1, 2, 15, 16, 17, 33, 70],
    hidden=[31, 32, 33, 96, 272],
    dtype=[torch.bfloat16, torch.float32],
    draw=[0, 1, 2],
)


@pytest.mark.parametrize("case", GRADIENT_CASES)
@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre_backward"))
def test_mhc_pre_backward(implementation, case):
    norm = norm_dtype(NORMS[case["draw"]], case["dtype"])
    check_gradients(
        "mhc_pre",
        implementation,
        list(arguments("mhc_pre", case["tokens"], case["hidden"], case["dtype"], norm).values()),
    )


@pytest.mark.parametrize("case", GRADIENT_CASES)
@pytest.mark.parametrize("implementation", implementation_cases("mhc_post_backward"))
def test_mhc_post_backward(implementation, case):
    values = arguments("mhc_post", case["tokens"], case["hidden"], case["dtype"])
    check_gradients("mhc_post", implementation, list(values.values()))


@pytest.mark.parametrize("case", GRADIENT_CASES)
@pytest.mark.parametrize("implementation", implementation_cases("mhc_head_backward"))
def test_mhc_head_backward(implementation, case):
    values = arguments("mhc_head", case["tokens"], case["hidden"], case["dtype"])
    check_gradients("mhc_head", implementation, list(values.values()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tokens", [1, 17, 70])
@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre_backward"))
def test_mhc_post_pre_gradients_equal_the_two_ops(implementation, tokens, norm):
    values = list(arguments("mhc_post_pre", tokens, 96, X, norm_dtype(norm, X)).values())
    grads = [torch.randn_like(o) for o in eager_post_pre(*values)]

    def separate(sublayer, streams, post, comb, *mixing):
        new = ops.mhc_post(sublayer, streams, post, comb)
        return (new, *ops.mhc_pre(new, *mixing))

    with max_isa(implementation):
        fused, apart = gradients(ops.mhc_post_pre, values, grads), gradients(separate, values, grads)
    for a, b in zip(fused, apart, strict=True):
        # the fused op adds the two gradients of the new streams before it rounds them
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=float(b.abs().max()) * 2**-6)
    # in float32 nothing is rounded in between
    wide = [None if v is None else v.float() for v in values]
    with max_isa(implementation):
        check_gradients("mhc_post_pre", implementation, wide)


@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre_backward"))
def test_gradients_do_not_depend_on_threads(implementation):
    threads = torch.get_num_threads()
    for op in ("mhc_pre", "mhc_post", "mhc_head"):
        values = list(arguments(op, 77, 600, X, X).values())
        grads = [torch.randn_like(o) for o in results(EAGER[op](*values))]
        with max_isa(implementation):
            expected = gradients(getattr(ops, op), values, grads)
            try:
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    for a, b in zip(gradients(getattr(ops, op), values, grads), expected, strict=True):
                        assert_same_bits(a, b)
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("rounds", [1, 33, 70])
@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre_backward"))
def test_gradients_through_few_and_many_sinkhorn_rounds(implementation, rounds):
    values = list(arguments("mhc_pre", 9, 40, torch.float32).values())
    grads = [torch.randn_like(o) for o in eager_pre(*values)]
    settings = (1e-6, 1e-3, rounds, 1e-6)
    with max_isa(implementation):
        actual = gradients(lambda *v: ops.mhc_pre(*v, *settings), values, grads)
    exact = gradients(lambda *v: ops.mhc_pre_reference(*v, *settings), double(values), double(grads))
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-6 * float(e.abs().max()))


@pytest.mark.parametrize("norm", [None, torch.float64])
@pytest.mark.parametrize("op", list(EAGER))
def test_references_are_differentiable(op, norm):
    values = [v if v is None else v.double() for v in arguments(op, 3, 5, torch.float64, norm).values()]
    leaves = [None if v is None else v.requires_grad_() for v in values]
    function = getattr(ops, f"{op}_reference")
    assert torch.autograd.gradcheck(lambda *v: function(*v), leaves)


@pytest.mark.parametrize("norm", [None, torch.float64])
def test_gradient_formulas_equal_autograd(norm):
    mixing = arguments("mhc_pre", 3, 5, torch.float64, norm)
    values = [v if v is None else v.double() for v in mixing.values()]
    grads = [torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 4, 4)]
    residual = torch.randn(3, 4, 5).double()
    settings = (1e-5, 1e-3, 4, 1e-4)
    expected = gradients(lambda *v: ops.mhc_pre_reference(*v, *settings), values, double(grads))
    actual = ops.mhc_pre_backward_reference(*double(grads), residual, *values, *settings)
    torch.testing.assert_close(actual[0] - residual, expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=False):
        torch.testing.assert_close(a, e)
    for op in ("mhc_post", "mhc_head"):
        values = double(arguments(op, 3, 5, torch.float64).values())
        grad = torch.randn_like(EAGER[op](*values))
        tail = () if op == "mhc_post" else (1e-6, 1e-6)
        expected = gradients(getattr(ops, f"{op}_reference"), values, [grad])
        for a, e in zip(getattr(ops, f"{op}_backward_reference")(grad, *values, *tail), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_second_derivatives_are_refused():
    values = [v.requires_grad_() for v in arguments("mhc_post", 2, 8, torch.float32).values()]
    (grad,) = torch.autograd.grad(ops.mhc_post(*values).square().sum(), values[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="mhc_post_backward: has no gradient"):
        grad.sum().backward()
