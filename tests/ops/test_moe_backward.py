"""The kernels of the experts' gradient: against float64, tails of every block, order of the sums, layouts, threads."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from moe_backward_cases import assert_no_worse_than, formula, problem, wide
from torch import Tensor

from dsv4 import _library, ops
from dsv4.testing import (
    Guarded,
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    strided,
)

CASES = implementation_cases("moe_experts_backward")
experts = pytest.mark.parametrize("implementation", CASES)
TYPED = [
    pytest.param(*case.values, dtype, marks=case.marks, id=f"{case.values[0]}-dtype{i}")
    for i, dtype in enumerate((torch.bfloat16, torch.float32))
    for case in CASES
    if case.values[0] != "amx" or dtype == torch.bfloat16  # tiles take no float32
]
typed_experts = pytest.mark.parametrize(("implementation", "dtype"), TYPED)
PAIRS = 60  # of a token and an expert, at least, from as many draws as it takes: a few errors alone say little


def run(implementation: str, a: dict[str, Any]) -> list[Tensor]:
    with max_isa(implementation):
        found = torch.ops.dsv4.moe_experts_backward(**a)
    assert _library.last_implementation("moe_experts_backward") == implementation
    inputs = [a["x"], a["weights"], a["w1"], a["w3"], a["w2"], *a["shared"]]
    for value, given, needed in zip(found, inputs, a.get("needed", [True] * len(inputs)), strict=True):
        assert value.shape == (given.shape if needed else (0,))
        assert value.dtype == given.dtype and value.is_contiguous()
    return list(found)


def kernel_calls() -> int:
    return sum(_library.calls().get("moe_experts_backward", {}).values())


def assert_no_worse_than_formula(implementation: str, **sizes: Any) -> None:
    draws = max(PAIRS // max(sizes["tokens"] * sizes.get("top_k", 2), 1), 1) if sizes["tokens"] else 1
    problems = [problem(**sizes) for _ in range(draws)]
    found = [run(implementation, a) for a in problems]
    assert_no_worse_than(formula, problems, found, [formula(wide(a)) for a in problems])


@pytest.mark.parametrize(
    "case",
    grid(tokens=[0, 1, 5, 19], hidden=[1, 33, 64, 131], inter=[1, 31, 64, 129]),
)
@typed_experts
def test_no_worse_than_the_formula(implementation: str, dtype: torch.dtype, case: dict[str, Any]) -> None:
    odd = case["hidden"] % 2 == 1
    assert_no_worse_than_formula(implementation, dtype=dtype, shared=odd, limit=0.7 if odd else 0.0, **case)


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 4, "count": 1, "top_k": 1, "hidden": 600, "inter": 520},
        {"tokens": 23, "count": 9, "top_k": 8, "hidden": 96, "inter": 72},
        {"tokens": 67, "count": 1, "top_k": 1, "hidden": 65, "inter": 515, "shared": True},
        {"tokens": 66, "count": 2, "top_k": 1, "hidden": 513, "inter": 130},
        {"tokens": 130, "count": 3, "top_k": 3, "hidden": 127, "inter": 260, "limit": 1.0},
        {"tokens": 9, "count": 257, "top_k": 6, "hidden": 40, "inter": 24},
        {"tokens": 6, "count": 2, "top_k": 1, "hidden": 1060, "inter": 70},
        {"tokens": 3, "count": 1, "top_k": 1, "hidden": 70, "inter": 2100},
        {"tokens": 3, "count": 1, "top_k": 1, "hidden": 2100, "inter": 70},
        {"tokens": 7, "count": 3, "top_k": 0, "shared": True},
        {"tokens": 7, "count": 0, "top_k": 2, "shared": True},
        {"tokens": 4, "inter": 0},
        {"tokens": 4, "hidden": 0},
    ],
    ids=str,
)
@typed_experts
def test_sizes_of_every_kind(implementation: str, dtype: torch.dtype, case: dict[str, Any]) -> None:
    """A chunk of sums is 64, 128 or 512 long, a piece 128 by 512 or 512 by 2,048, a tile 6 by 64 or 32 by 32."""
    assert_no_worse_than_formula(implementation, dtype=dtype, **case)


@typed_experts
def test_thousands_of_tokens_and_one_expert_with_most_of_them(implementation: str, dtype: torch.dtype) -> None:
    a = problem(tokens=2300, hidden=40, inter=24, count=5, dtype=dtype, shared=True)
    a["indices"][:2000, 0] = 3
    assert_no_worse_than(formula, [a], [run(implementation, a)], [formula(wide(a))])


@typed_experts
def test_an_expert_without_tokens_has_gradient_zero(implementation: str, dtype: torch.dtype) -> None:
    """Whatever its weights and the memory that the result takes."""
    a = problem(tokens=6, count=5, top_k=1, dtype=dtype)
    a["indices"][:] = torch.tensor([1, 3, 1, 1, -1, 3]).view(-1, 1)
    for name in ("w1", "w3", "w2"):
        a[name][[0, 2, 4]] = torch.nan
        taken = torch.full_like(a[name], torch.nan)
        del taken  # the allocator hands this memory out next
    found = run(implementation, a)
    for value in found[2:]:
        assert not value[[0, 2, 4]].any() and value[[1, 3]].isfinite().all() and value[[1, 3]].any()
    assert not found[0][4].any() and not found[1][4].any()


@typed_experts
def test_gradients_that_are_not_needed_come_back_empty(implementation: str, dtype: torch.dtype) -> None:
    """And the others with the bits that they have among all."""
    a = problem(tokens=9, count=3, dtype=dtype, shared=True, limit=0.7)
    whole = run(implementation, a)
    for needed in product((False, True), repeat=8):
        for value, other, wanted in zip(run(implementation, {**a, "needed": needed}), whole, needed, strict=True):
            assert_same_bits(value, other if wanted else other.new_empty(0))


@typed_experts
def test_nan_where_nobody_reads(implementation: str, dtype: torch.dtype) -> None:
    """Rows of tokens that no expert takes; memory before and behind every operand."""
    a = problem(tokens=9, hidden=35, inter=37, dtype=dtype)
    a["indices"][4] = -1
    expected = run(implementation, a)
    a["x"][4] = a["grad"][4] = a["weights"][4] = torch.nan
    for name in ("grad", "x", "weights", "w1", "w3", "w2"):
        memory = torch.full((a[name].numel() + 200,), torch.nan, dtype=a[name].dtype)
        memory[100:-100] = a[name].flatten()
        a[name] = memory[100:-100].view(a[name].shape)
    for value, other in zip(run(implementation, a), expected, strict=True):
        assert_same_bits(value, other)


@typed_experts
def test_nan_reaches_its_own_alone(implementation: str, dtype: torch.dtype) -> None:
    a = problem(tokens=12, top_k=1, count=3, dtype=dtype)
    a["indices"][:] = torch.tensor([0, 2] * 6).view(-1, 1)
    a["w1"][2, 3, 5] = torch.nan
    x, weights, *matrices = run(implementation, a)
    assert x[0::2].isfinite().all() and weights[0::2].isfinite().all()
    assert x[1::2].isnan().all() and weights[1::2].isnan().all()
    for matrix in matrices:
        assert matrix[0].isfinite().all() and not matrix[1].any() and matrix[2].isnan().any()


@typed_experts
def test_clamped_values_have_a_gradient_at_the_limit_and_none_beyond(implementation: str, dtype: torch.dtype) -> None:
    """One input, one inner value, one output: gate = w1, up = w3."""
    edge = torch.tensor(0.7, dtype=dtype)
    limit = edge.item()
    beyond, below = (torch.nextafter(edge, torch.tensor(end, dtype=dtype)) for end in (2.0, 0.0))
    ups = torch.stack([edge, beyond, below, -edge, -beyond, -below])
    gates = torch.stack([edge, beyond, below, -edge, -beyond, torch.tensor(-9.0, dtype=dtype)])
    pairs = torch.cartesian_prod(gates, ups)
    count = len(pairs)
    a = problem(tokens=count, hidden=1, inter=1, count=count, top_k=1, dtype=dtype, limit=limit)
    a["indices"] = torch.arange(count).view(-1, 1)
    a["x"] = torch.ones(count, 1, dtype=dtype)
    a["w1"], a["w3"] = (pairs[:, i].reshape(count, 1, 1).clone() for i in (0, 1))
    _, _, w1, w3, _ = run(implementation, a)
    assert (w1.flatten() != 0).tolist() == (pairs[:, 0] <= edge).tolist()
    assert (w3.flatten() != 0).tolist() == (pairs[:, 1].abs() <= edge).tolist()
    tolerance = {"rtol": 2e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-5}
    for value, other in zip(run(implementation, a), formula(a), strict=True):
        torch.testing.assert_close(value, other, **tolerance)


@typed_experts
def test_each_matrix_gets_its_own_gradient(implementation: str, dtype: torch.dtype) -> None:
    """By hand: with x, grad, routing weight 1, 2, 0.5 and one value of each matrix, silu' and the products."""
    a = problem(tokens=1, hidden=1, inter=1, count=2, top_k=2, dtype=dtype)
    a["x"][:], a["grad"][:], a["weights"] = 1, 2, torch.tensor([[0.5, 0.25]])
    a["indices"] = torch.tensor([[1, 0]])
    values = ([0.3, -1.1], [0.7, 2.0], [1.5, -0.4])
    a["w1"], a["w3"], a["w2"] = (torch.tensor(v, dtype=dtype).view(2, 1, 1) for v in values)
    x, weights, w1, w3, w2 = (value.double() for value in run(implementation, a))
    d_x = 0.0
    near = {"rtol": 1e-6 if dtype == torch.float32 else 2**-6, "atol": 0.0}
    for expert, slot, weight in ((0, 1, 0.25), (1, 0, 0.5)):
        gate, up, down = (float(a[name][expert]) for name in ("w1", "w3", "w2"))
        s = 1 / (1 + torch.tensor(-gate, dtype=torch.float64).exp().item())
        silu, slope = gate * s, s * (1 + gate * (1 - s))
        torch.testing.assert_close(weights[0, slot].item(), 2 * down * silu * up, **near)
        torch.testing.assert_close(w1[expert].item(), 2 * down * weight * up * slope, **near)
        torch.testing.assert_close(w3[expert].item(), 2 * down * weight * silu, **near)
        torch.testing.assert_close(w2[expert].item(), 2 * silu * up * weight, **near)
        d_x += 2 * down * weight * (up * slope * gate + silu * up)
    torch.testing.assert_close(x.item(), d_x, **{**near, "atol": 1e-7})


@typed_experts
def test_rows_alone_and_in_company(implementation: str, dtype: torch.dtype) -> None:
    """Gradients of a token's x and routing weights do not depend on the tokens beside it."""
    a = problem(tokens=45, hidden=136, inter=200, count=3, top_k=2, dtype=dtype, limit=1.0, shared=True)
    a["indices"][2, 1] = -1
    rows = [a.pop(name) for name in ("grad", "x", "weights", "indices")]
    assert_rows_independent(
        lambda g, x, w, i: tuple(run(implementation, {"grad": g, "x": x, "weights": w, "indices": i, **a})[:2]), rows
    )


@typed_experts
def test_an_expert_taken_twice_more_rows_than_a_group_has(implementation: str, dtype: torch.dtype) -> None:
    """The same token in places 255 and 256 of its expert (another in 511 and 512), or alone: the same sums in the same
    order."""
    a = problem(tokens=270, hidden=72, inter=200, count=1, top_k=2, dtype=dtype)
    a["indices"][:] = 0
    a["indices"][0, 1] = -1
    whole = run(implementation, a)
    for token in (128, 256):
        one = {**a, **{name: a[name][token : token + 1] for name in ("grad", "x", "weights", "indices")}}
        assert_same_bits(run(implementation, one)[0][0], whole[0][token])


@typed_experts
def test_the_order_of_slots_does_not_matter(implementation: str, dtype: torch.dtype) -> None:
    a = problem(tokens=40, hidden=64, inter=96, count=8, top_k=6, dtype=dtype, shared=True)
    a["indices"][1:3] = a["indices"][3]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    x, weights, *matrices = run(implementation, a)
    shuffled = {**a, "indices": a["indices"][:, order], "weights": a["weights"][:, order]}
    other_x, other_weights, *others = run(implementation, shuffled)
    for value, other in zip((x, weights[:, order], *matrices), (other_x, other_weights, *others), strict=True):
        assert_same_bits(value, other)


@typed_experts
def test_threads_and_layout_do_not_matter(implementation: str, dtype: torch.dtype) -> None:
    a = problem(tokens=330, hidden=260, inter=300, count=3, dtype=dtype, shared=True, limit=1.0)
    expected = run(implementation, a)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for value, other in zip(run(implementation, a), expected, strict=True):
                assert_same_bits(value, other)
    finally:
        torch.set_num_threads(before)
    apart = {name: strided(value) if isinstance(value, Tensor) else value for name, value in a.items()}
    apart["shared"] = [strided(t) for t in a["shared"]]
    turned = {**a, **{name: a[name].mT.contiguous().mT for name in ("w1", "w3", "w2", "x", "grad")}}
    for other_layout in (apart, turned):
        for value, other in zip(run(implementation, other_layout), expected, strict=True):
            assert_same_bits(value, other)
    ones = torch.ones((), dtype=dtype).expand(a["grad"].shape)
    for value, other in zip(
        run(implementation, {**a, "grad": ones}), run(implementation, {**a, "grad": +ones}), strict=True
    ):
        assert_same_bits(value, other)


@typed_experts
def test_operands_stay_as_they_are(implementation: str, dtype: torch.dtype) -> None:
    a = problem(tokens=7, hidden=50, inter=30, dtype=dtype)
    guarded = {name: Guarded(value) for name, value in a.items() if isinstance(value, Tensor)}
    run(implementation, {**a, **{name: value.tensor for name, value in guarded.items()}})
    for name, value in guarded.items():
        value.check()
        assert_same_bits(value.tensor, a[name])


@typed_experts
def test_indices_out_of_range_and_wide(implementation: str, dtype: torch.dtype) -> None:
    a = problem(tokens=6, top_k=3, count=4, dtype=dtype)
    a["indices"] = torch.tensor([[2, -1, 3], [4, 1 << 20, -7], [0, 0, 1], [3, 2, 0], [1, 3, 1], [-1, -1, 2]]).int()
    expected = run(implementation, a)
    outside = (a["indices"] < 0) | (a["indices"] >= 4)
    assert not expected[1][outside].any() and expected[1][~outside].all()
    assert not expected[0][1].any()
    far = torch.where(a["indices"] == -7, -(1 << 40), a["indices"].long())
    for indices in (a["indices"].long(), far):
        for value, other in zip(run(implementation, {**a, "indices": indices}), expected, strict=True):
            assert_same_bits(value, other)


def test_float32_goes_to_the_vectors() -> None:
    calls = _library.calls()["moe_experts_backward"].get("amx", 0)
    torch.ops.dsv4.moe_experts_backward(**problem())
    assert _library.calls()["moe_experts_backward"].get("amx", 0) == calls


def test_float64_and_second_derivatives() -> None:
    """float64 takes the formula; a gradient of the gradient is refused in words."""
    a = problem(tokens=4)
    calls = kernel_calls()
    x = a["x"].double().requires_grad_()
    matrices = [a[name].double() for name in ("w1", "w3", "w2")]
    ops.moe_experts(x, a["weights"], a["indices"], *matrices).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float64
    assert kernel_calls() == calls
    x = a["x"].requires_grad_()
    out = ops.moe_experts(x, a["weights"], a["indices"], *(a[name] for name in ("w1", "w3", "w2")))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert kernel_calls() == calls + 1
    with pytest.raises(RuntimeError, match="moe_experts_backward: has no gradient"):
        grad.sum().backward()


def _bad() -> dict[str, dict[str, Any]]:
    shared = [torch.zeros(5, 48), torch.zeros(5, 48), torch.zeros(48, 5)]
    floats = "bfloat16 or float32 or float64"
    return {
        f"x must be {floats} [tokens, hidden], got float16 [5, 48]": {"x": torch.zeros(5, 48).half()},
        f"x must be {floats} [tokens, hidden], got float32 [48]": {"x": torch.zeros(48)},
        "grad must be float32 [5, 48], got float32 [5, 47]": {"grad": torch.zeros(5, 47)},
        "grad must be float32 [5, 48], got bfloat16 [5, 48]": {"grad": torch.zeros(5, 48).bfloat16()},
        "weights must be float32 or float64 [5, top_k], got bfloat16 [5, 2]": {"weights": torch.zeros(5, 2).bfloat16()},
        "weights must be float32 or float64 [5, top_k], got float32 [4, 2]": {"weights": torch.zeros(4, 2)},
        "indices must be int32 or int64 [5, 2], got int64 [5, 3]": {"indices": torch.zeros(5, 3).long()},
        "indices must be int32 or int64 [5, 2], got float32 [5, 2]": {"indices": torch.zeros(5, 2)},
        "w1 must be [experts, inter, hidden], got [40, 48]": {"w1": torch.zeros(40, 48)},
        "w1 must be float32 [4, 40, 48], got float32 [4, 40, 47]": {"w1": torch.zeros(4, 40, 47)},
        "w3 must be float32 [4, 40, 48], got float32 [3, 40, 48]": {"w3": torch.zeros(3, 40, 48)},
        "w2 must be float32 [4, 48, 40], got bfloat16 [4, 48, 40]": {"w2": torch.zeros(4, 48, 40).bfloat16()},
        "shared must hold 0 or 3 tensors, got 2": {"shared": shared[:2]},
        "needed must hold 5 flags, got 8": {"needed": [True] * 8},
        "needed must hold 8 flags, got 0": {"shared": shared, "needed": []},
        "shared w3 must be float32 [5, 48], got float32 [4, 48]": {"shared": [shared[0], shared[1][:4], shared[2]]},
        "shared w2 must be float32 [48, 5], got float32 [5, 48]": {"shared": [shared[0], shared[1], shared[1]]},
    }


BAD = _bad()


@pytest.mark.parametrize("message", BAD)
def test_rejects(message: str) -> None:
    """The kernels, the formula and the fake kernel in the same words."""
    for op in (torch.ops.dsv4.moe_experts_backward, torch.ops.dsv4._moe_experts_backward_reference):
        assert_rejects(op, problem(), f"moe_experts_backward: {message}", **BAD[message])
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in {**problem(), **BAD[message]}.items()}
    meta["shared"] = [t.to("meta") for t in meta["shared"]]
    with pytest.raises(RuntimeError) as caught:
        torch.ops.dsv4.moe_experts_backward(**meta)
    assert str(caught.value).splitlines()[0] == f"moe_experts_backward: {message}"


@experts
def test_rejects_a_limit_below_zero(implementation: str) -> None:
    with max_isa(implementation), pytest.raises(RuntimeError, match="moe_experts_backward: swiglu_limit must not be"):
        torch.ops.dsv4.moe_experts_backward(**problem(limit=-1.0))
    with max_isa(implementation), pytest.raises(RuntimeError, match="swiglu_limit must be finite and not negative"):
        torch.ops.dsv4.moe_experts_backward(**problem(limit=float("inf")))


@typed_experts
def test_opcheck(implementation: str, dtype: torch.dtype) -> None:
    with max_isa(implementation):
        for shared in (False, True):
            arguments = problem(dtype=dtype, shared=shared, limit=0.5).values()
            for needed in (None, [True, False, False, True, False, *[False] * (3 if shared else 0)]):
                check_op(torch.ops.dsv4.moe_experts_backward, *arguments, needed)
    narrow = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in problem().values()]
    check_op(torch.ops.dsv4._moe_experts_backward_reference, *narrow)
