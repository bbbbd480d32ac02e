"""mHC's gradients: native kernels against float64 autograd of the references, and the formulas themselves."""

from itertools import chain

import pytest
import torch
from mhc_cases import (
    EAGER,
    NORMS,
    X,
    arguments,
    assert_gradients_as_accurate,
    assert_sums_as_accurate,
    double,
    eager_post_pre,
    gradients,
    norm_dtype,
    problems,
    results,
)
from torch.utils._python_dispatch import TorchDispatchMode

import dsv4.ops as ops
from dsv4 import _library
from dsv4.testing import assert_same_bits, grid, implementation_cases, max_isa


def native_gradients(op, implementation, made, settings=()):
    with max_isa(implementation):
        actual = [gradients(lambda *v: getattr(ops, op)(*v, *settings), p.values, p.grads) for p in made]
        # mhc_post_pre leaves its own streams' gradient to the op of the half it came through last
        backward = {"mhc_post_pre": "mhc_post"}.get(op, op) + "_backward"
        if implementation == "amx" and (backward == "mhc_post_backward" or made[0].values[0].dtype == torch.float32):
            implementation = "avx512"  # tiles multiply bfloat16, and mhc_post has no product
        assert _library.last_implementation(backward) == implementation
    return actual


def check_gradients(op, implementation, case, norm=None, settings=()):
    made = problems(op, case["tokens"], case["hidden"], case["dtype"], norm, True, settings, case.get("draw", 0))
    assert_gradients_as_accurate(op, made, native_gradients(op, implementation, made, settings))


GRADIENT_CASES = grid(
    tokens=[0, 1, 2, 15, 16, 17, 33, 70],
    hidden=[31, 32, 33, 96, 272],
    dtype=[torch.bfloat16, torch.float32],
    draw=[0, 1, 2],
)


@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre_backward"))
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_mhc_pre_backward(implementation, case):
    check_gradients("mhc_pre", implementation, case, norm_dtype(NORMS[case["draw"]], case["dtype"]))


@pytest.mark.parametrize("implementation", implementation_cases("mhc_post_backward"))
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_mhc_post_backward(implementation, case):
    check_gradients("mhc_post", implementation, case)


@pytest.mark.parametrize("implementation", implementation_cases("mhc_head_backward"))
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_mhc_head_backward(implementation, case):
    check_gradients("mhc_head", implementation, case)


@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre_backward"))
@pytest.mark.parametrize(("op", "norm"), [*(("mhc_pre", norm) for norm in NORMS), ("mhc_head", None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [31, 96])
def test_gradients_of_scale_and_base(hidden, dtype, op, norm, implementation):
    """Sums over tokens and hidden elements, a handful a problem: taken as one over problems of several sizes."""
    sizes = [problems(op, tokens, hidden, dtype, norm_dtype(norm, dtype), True) for tokens in (1, 2, 17, 33, 70)]
    actual = [native_gradients(op, implementation, made) for made in sizes]
    assert_sums_as_accurate(op, [*chain(*sizes)], [*chain(*actual)])


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
    case = {"tokens": tokens, "hidden": 96, "dtype": torch.float32}
    check_gradients("mhc_post_pre", implementation, case, norm and torch.float32)


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


class FnGradients(TorchDispatchMode):
    """Whether the calls of the backward ops computed that of fn."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.name() in ("dsv4::mhc_pre_backward", "dsv4::mhc_head_backward"):
            self.taken.append(found[1].numel() > 0)
        return found


@pytest.mark.parametrize("implementation", ["reference", *implementation_cases("mhc_pre_backward")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["mhc_pre", "mhc_post_pre", "mhc_head"])
def test_a_frozen_fn_has_no_gradient_and_costs_none(op, dtype, implementation):
    """The others have the bits that they have beside it."""
    values = arguments(op, 37, 96, dtype, None if op == "mhc_head" else torch.float32)
    reference = implementation == "reference"
    with ops.use_reference() if reference else max_isa(implementation):
        grads, found = None, {}
        for frozen in (False, True):
            leaves = {name: v.detach().clone().requires_grad_(name != "fn" or not frozen) for name, v in values.items()}
            out = results(getattr(ops, op)(*leaves.values()))
            grads = grads or [torch.randn_like(o) for o in out]
            with FnGradients() as calls:
                torch.autograd.backward(out, grads)
            assert reference or calls.taken == [not frozen]
            found[frozen] = {name: leaf.grad for name, leaf in leaves.items()}
    assert found[True].pop("fn") is None and found[False].pop("fn").any()
    for name, grad in found[True].items():
        assert_same_bits(grad, found[False][name])


@pytest.mark.parametrize("rounds", [1, 33, 70])
@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre_backward"))
def test_gradients_through_few_and_many_sinkhorn_rounds(implementation, rounds):
    case = {"tokens": 9, "hidden": 40, "dtype": torch.float32}
    check_gradients("mhc_pre", implementation, case, settings=(1e-6, 1e-3, rounds, 1e-6))


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
