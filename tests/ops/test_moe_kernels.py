"""The kernels of the gate and the experts: against the definition, tails of every block, both regimes, invariance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4 import _library, ops
from dsv4.testing import (
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    relative_rms,
    strided,
)

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
gates = pytest.mark.parametrize("implementation", implementation_cases("moe_gate"))
experts = pytest.mark.parametrize("implementation", implementation_cases("moe_experts"))
DTYPES = [torch.bfloat16, torch.float32]
# Sums in float32 differ from the definition in the last bits of float32; a rounding that they tip moves one element.
LIMIT = {torch.bfloat16: 4e-3, torch.float32: 3e-6}


def stored(matrix: Tensor, form: str, scale_dtype: torch.dtype = E8M0) -> tuple[Tensor, Tensor | None]:
    """A float32 matrix as a checkpoint has it, with scales that differ from block to block."""
    if form == "plain":
        return matrix, None
    if form == "fp4":
        codes, scale = ops.quantize_fp4(torch.nn.functional.pad(matrix, (0, matrix.shape[-1] % 2)))
        return codes.view(torch.int8), scale if scale_dtype == E8M0 else scale.float() * 1.375
    rows, columns = matrix.shape[-2:]
    scale = torch.randint(-11, -8, (*matrix.shape[:-2], -(-rows // 128), -(-columns // 128))).float().exp2()
    wide = scale.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
    codes = (matrix / wide).clamp(-448, 448).to(E4M3)
    return codes, scale.to(E8M0) if scale_dtype == E8M0 else scale * 1.375


def problem(
    tokens: int = 5,
    hidden: int = 160,
    inter: int = 200,
    count: int = 4,
    top_k: int = 2,
    form: str = "fp4",
    shared: str | None = "fp8",
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = E8M0,
    limit: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    torch.manual_seed(seed)

    def matrices(*lead: int, inner: int, form: str) -> list[tuple[Tensor, Tensor | None]]:
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        made = [stored(torch.randn(*lead, *s) / s[1] ** 0.5, form, scale_dtype) for s in shapes]
        return [(m.to(dtype) if s is None else m, s) for m, s in made]

    routed = matrices(count, inner=inter, form=form)
    result: dict[str, Any] = {"x": (2 * torch.randn(tokens, hidden)).to(dtype)}
    result["weights"] = torch.rand(tokens, top_k) + 0.25
    result["indices"] = torch.rand(tokens, count).argsort(-1)[:, :top_k].int()
    for name, (matrix, scale) in zip(("w1", "w3", "w2"), routed, strict=True):
        result[name], result[f"{name}_scale"] = matrix, scale
    if shared is not None:
        pairs = matrices(inner=inter + 40, form=shared)
        result["shared"] = [t for pair in pairs for t in pair if t is not None]
    result["swiglu_limit"] = limit
    return result


def chosen(implementation: str, a: dict[str, Any]) -> str:
    """This implementation, or the next that takes these matrices: tiles take no plain ones of float32."""
    scales = [a[f"{name}_scale"] for name in ("w1", "w3", "w2")]
    shared = a.get("shared")
    plain = any(scale is None for scale in scales) or (shared is not None and len(shared) == 3)
    return "avx512" if implementation == "amx" and plain and a["x"].dtype == torch.float32 else implementation


def run(implementation: str, a: dict[str, Any]) -> Tensor:
    with max_isa(implementation):
        out = ops.moe_experts(**a)
    assert _library.last_implementation("moe_experts") == chosen(implementation, a)
    assert out.shape == a["x"].shape and out.dtype == a["x"].dtype and out.is_contiguous()
    return out


def assert_as_defined(implementation: str, a: dict[str, Any]) -> None:
    out, expected = run(implementation, a), ops.moe_experts_reference(**a)
    if len(out):
        assert float(relative_rms(out, expected).max()) <= LIMIT[out.dtype]
    if implementation == "scalar" and a["w1_scale"] is not None:  # sums in float64, as the definition has them
        assert (out != expected).double().mean() <= 0.01 if len(out) else True


@pytest.mark.parametrize(
    "case",
    grid(
        form=["fp4", "fp8", "plain"],
        dtype=DTYPES,
        tokens=[0, 1, 3, 21],
        sizes=[(32, 32), (160, 200), (390, 134)],
    ),
)
@experts
def test_equals_the_definition(implementation: str, case: dict[str, Any]) -> None:
    hidden, inter = case["sizes"]
    rest = {name: value for name, value in case.items() if name != "sizes"}
    rest["limit"] = 0.7 if case["tokens"] == 3 else 0.0
    shared = "plain" if case["form"] == "plain" else "fp8"
    assert_as_defined(implementation, problem(hidden=hidden, inter=inter, shared=shared, **rest))


@pytest.mark.parametrize("form", ["fp4", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@experts
def test_float32_scales(implementation: str, dtype: torch.dtype, form: str) -> None:
    assert_as_defined(implementation, problem(form=form, dtype=dtype, scale_dtype=torch.float32, tokens=30))


@pytest.mark.parametrize("tokens", [1, 5, 40, 100])
@pytest.mark.parametrize("form", ["fp4", "fp8", "plain"])
@experts
def test_experts_without_inner_width(implementation: str, form: str, tokens: int) -> None:
    """Sums of nothing are zero, whatever the memory held before."""
    a = problem(tokens=tokens, form=form, inter=0, shared=None)
    torch.full((1 << 20,), torch.nan)  # freed: the next workspace may lie there
    assert not run(implementation, a).any()
    empty = [torch.zeros(0, 160), torch.zeros(0, 160), torch.zeros(160, 0)]
    a = problem(tokens=tokens, form=form, shared=None)
    alone = run(implementation, a)
    assert_same_bits(run(implementation, {**a, "shared": [m.to(torch.bfloat16) for m in empty]}), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scalar_among_the_shared_matrices_is_named(dtype: torch.dtype) -> None:
    """By the definition, which takes float64, in the words of the kernels."""
    x, weights, w13, w2 = (torch.ones(size, dtype=dtype) for size in ((2, 8), (2, 1), (1, 4, 8), (1, 8, 4)))
    indices = torch.zeros(2, 1, dtype=torch.int32)
    a = {"x": x, "weights": weights, "indices": indices, "w1": w13, "w3": w13, "w2": w2}
    name = str(dtype).removeprefix("torch.")
    message = f"moe_experts: shared w1 must be {name} [0, 8], got {name} []"
    assert_rejects(ops.moe_experts, a, message, shared=[torch.ones((), dtype=dtype)] * 3)


@pytest.mark.parametrize("tokens", [1, 40])
@gates
def test_gate_without_inputs(implementation: str, tokens: int) -> None:
    bias = torch.randn(48)
    torch.full((1 << 20,), torch.nan)
    with max_isa(implementation):
        weights, indices = ops.moe_gate(torch.zeros(tokens, 0).bfloat16(), torch.zeros(48, 0).bfloat16(), 4, bias)
    assert_same_bits(indices, bias.topk(4).indices.int().expand(tokens, 4).contiguous())
    torch.testing.assert_close(weights, torch.full((tokens, 4), 0.25))


@pytest.mark.parametrize("tokens", [7, 8, 9, 12, 63, 64, 65, 131])
@pytest.mark.parametrize("form", ["fp4", "fp8", "plain"])
@experts
def test_many_tokens_of_one_expert(implementation: str, form: str, tokens: int) -> None:
    a = problem(tokens=tokens, form=form, count=2, hidden=96, inter=64, top_k=1)
    a["indices"][:] = 1
    assert_as_defined(implementation, a)


@experts
def test_matrices_of_different_forms(implementation: str) -> None:
    a, b = problem(form="fp4", tokens=11), problem(form="fp8", tokens=11)
    a["w3"], a["w3_scale"], a["w2"], a["w2_scale"] = b["w3"], b["w3_scale"], b["w2"], b["w2_scale"]
    assert_as_defined(implementation, a)
    a["w2"], a["w2_scale"] = problem(form="plain", tokens=11)["w2"], None
    assert_as_defined(implementation, a)


@pytest.mark.parametrize("form", ["fp4", "fp8", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@experts
def test_rows_are_independent(implementation: str, dtype: torch.dtype, form: str) -> None:
    """Alone a token goes through the path of few tokens, in company through that of many."""
    a = problem(tokens=45, form=form, count=3, hidden=256, inter=136, dtype=dtype, limit=1.0)
    rows = [a.pop(name) for name in ("x", "weights", "indices")]
    with max_isa(implementation):
        assert_rows_independent(lambda x, w, i: ops.moe_experts(x, w, i, **a), rows)


@pytest.mark.parametrize("form", ["fp4", "fp8", "plain"])
@pytest.mark.parametrize(("hidden", "inter"), [(128, 256), (256, 128), (256, 200)])
@experts
def test_one_token_of_short_rows(implementation: str, hidden: int, inter: int, form: str) -> None:
    """Rows of weights of one or two blocks, with scales that lie one after another in memory or do not."""
    a = problem(tokens=9, form=form, count=2, hidden=hidden, inter=inter)
    expected = run(implementation, a)
    for token in range(9):
        one = a | {name: a[name][token : token + 1] for name in ("x", "weights", "indices")}
        assert_same_bits(run(implementation, one), expected[token : token + 1])
        for name in ("w1_scale", "w3_scale", "w2_scale"):
            one[name] = None if one[name] is None else strided(one[name])
        assert_same_bits(run(implementation, one), expected[token : token + 1])


@pytest.mark.parametrize("form", ["fp4", "fp8", "plain"])
@experts
def test_threads_and_layout_do_not_matter(implementation: str, form: str) -> None:
    a = problem(tokens=40, form=form, hidden=260, inter=300)
    expected = run(implementation, a)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_same_bits(run(implementation, a), expected)
    finally:
        torch.set_num_threads(before)
    apart = {k: strided(v) if isinstance(v, Tensor) else v for k, v in a.items()}
    apart["shared"] = [strided(t) for t in a["shared"]]
    assert_same_bits(run(implementation, apart), expected)


@experts
def test_more_tokens_than_are_taken_at_a_time(implementation: str) -> None:
    a = problem(tokens=2100, hidden=32, inter=32, count=3)
    out = run(implementation, a)
    for first in (0, 2040, 2090):
        part = {**a, **{n: a[n][first : first + 10] for n in ("x", "weights", "indices")}}
        assert_same_bits(out[first : first + 10], run(implementation, part))


@experts
def test_indices_out_of_range_repeated_and_wide(implementation: str) -> None:
    a = problem(tokens=6, top_k=3, count=4)
    a["indices"] = torch.tensor([[2, -1, 3], [4, 1 << 20, -7], [0, 0, 1], [3, 2, 0], [1, 3, 1], [-1, -1, 2]]).int()
    assert_as_defined(implementation, a)
    expected = run(implementation, a)
    assert_same_bits(run(implementation, {**a, "indices": a["indices"].long()}), expected)
    far = torch.where(a["indices"] == -7, -(1 << 40), a["indices"].long())
    assert_same_bits(run(implementation, {**a, "indices": far}), expected)
    order = torch.tensor([2, 0, 1])  # of a token's slots, which does not matter but for an expert taken twice
    shuffled = {**a, "indices": a["indices"][:, order], "weights": a["weights"][:, order]}
    assert_same_bits(run(implementation, shuffled)[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


@pytest.mark.parametrize("form", ["fp4", "fp8", "plain"])
@experts
def test_nan_of_an_expert_reaches_its_tokens_alone(implementation: str, form: str) -> None:
    a = problem(tokens=12, form=form, top_k=1, count=3, shared=None)
    a["indices"][:] = torch.tensor([0, 2] * 6).int().unsqueeze(1)
    if form == "plain":
        a["w1"][1:] = torch.nan
    else:
        a["w1_scale"].view(torch.uint8)[1:] = 255
    out = run(implementation, a)
    assert out[0::2].isfinite().all()
    assert out[1::2].isnan().all()
    a["x"][4, 3] = torch.inf
    assert run(implementation, a)[[0, 2, 6, 8, 10]].isfinite().all()


@experts
def test_e2m1_codes_and_extreme_scales(implementation: str) -> None:
    """Every code against a one-hot activation; the scales of a block reach their own 32 inputs."""
    hidden, inter = 256, 32
    a = problem(tokens=hidden, hidden=hidden, inter=inter, count=1, top_k=1, shared=None, dtype=torch.float32)
    a["indices"][:] = 0
    a["x"] = torch.eye(hidden) * 1.5
    a["w1"] = torch.arange(inter * hidden // 2).mul(37).remainder(256).to(torch.uint8).view(1, inter, -1)
    exponents = torch.arange(inter * hidden // 32).mul(5).remainder(12).add(120).to(torch.uint8)
    a["w1_scale"] = exponents.view(E8M0).view(1, inter, -1)
    assert_as_defined(implementation, a)
    for byte in (1, 60, 200):
        a["w1_scale"].view(torch.uint8).fill_(byte)
        a["w3_scale"].view(torch.uint8).fill_(127)
        out, expected = run(implementation, a), ops.moe_experts_reference(**a)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-37, equal_nan=True)


@experts
def test_the_order_of_slots_does_not_matter(implementation: str) -> None:
    """In float32, where another order of the sum shows in the last bits."""
    a = problem(tokens=40, top_k=6, count=8, form="plain", shared="plain", hidden=64, inter=32, dtype=torch.float32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {**a, "indices": a["indices"][:, order], "weights": a["weights"][:, order]}
    assert_same_bits(run(implementation, shuffled), run(implementation, a))


@pytest.mark.parametrize("dtype", DTYPES)
@experts
def test_outputs_are_summed_by_ascending_expert_then_the_shared_one(implementation: str, dtype: torch.dtype) -> None:
    """The sum of what each expert gives alone, taken in float32 in the documented order, has the same bits."""
    a = problem(tokens=40, top_k=6, count=8, form="plain", shared="plain", hidden=64, inter=32, dtype=dtype)
    nobody = torch.full_like(a["indices"], -1)
    total = torch.zeros(a["x"].shape)
    for expert in range(8):
        alone = {**a, "indices": torch.where(a["indices"] == expert, a["indices"], nobody), "shared": None}
        total += run(implementation, alone).float()
    total += run(implementation, {**a, "indices": nobody}).float()
    assert_same_bits(run(implementation, a), total.to(dtype))


@pytest.mark.parametrize("exponent", [63, 64, 126, 127, 128, 190, 191, 255])
@pytest.mark.parametrize("form", ["fp4", "fp8"])
@experts
def test_scales_at_the_ends_of_what_weights_can_take(implementation: str, form: str, exponent: int) -> None:
    """One such scale among ordinary ones; a token alone and in company takes the same way."""
    a = problem(tokens=17, form=form, count=2, top_k=1, hidden=400, inter=136, shared=None, dtype=torch.float32)
    a["w1_scale"].view(torch.uint8)[1, 0, 3] = exponent
    a["w2_scale"].view(torch.uint8)[0, 0, 1] = exponent
    if exponent < 190:
        assert_as_defined(implementation, a)
    rows = [a.pop(name) for name in ("x", "weights", "indices")]
    with max_isa(implementation):
        assert_rows_independent(lambda x, w, i: ops.moe_experts(x, w, i, **a), rows)


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 11, 12, 13, 19])
@pytest.mark.parametrize("form", ["fp4", "fp8"])
@experts
def test_rows_around_the_blocks_of_a_panel(implementation: str, form: str, tokens: int) -> None:
    a = problem(tokens=tokens, form=form, count=2, top_k=1, hidden=1090, inter=130, shared=None)
    a["indices"][:] = 1
    assert_as_defined(implementation, a)


@pytest.mark.parametrize("experts_", [(1, 1), (7, 2), (33, 5), (256, 6)])
@pytest.mark.parametrize("hidden", [1, 24, 31, 96, 515])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
@gates
def test_gate_equals_the_definition(
    implementation: str, dtypes: tuple[torch.dtype, torch.dtype], hidden: int, experts_: tuple[int, int]
) -> None:
    torch.manual_seed(hidden)
    count, top_k = experts_
    x, weight = torch.randn(19, hidden).to(dtypes[0]), torch.randn(count, hidden).to(dtypes[1])
    bias = torch.randn(count)
    with max_isa(implementation):
        weights, indices = ops.moe_gate(x, weight, top_k, bias, route_scale=1.5)
        ids, table = torch.arange(19) % 3, torch.stack([torch.randperm(count)[:top_k] for _ in range(3)])
        hashed, hashed_indices = ops.moe_gate(x, weight, top_k, None, ids, table, 2.5)
    narrow = dtypes == (torch.bfloat16, torch.bfloat16)
    assert _library.last_implementation("moe_gate") == (
        "avx512" if implementation == "amx" and not narrow else implementation
    )
    expected, expected_indices = ops.moe_gate_reference(x, weight, top_k, bias, route_scale=1.5)
    assert_same_bits(indices, expected_indices)
    torch.testing.assert_close(weights, expected, rtol=4e-6, atol=1e-7)
    assert_same_bits(hashed_indices, table[ids].int())
    expected, _ = ops.moe_gate_reference(x, weight, top_k, None, ids, table, 2.5)
    torch.testing.assert_close(hashed, expected, rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@gates
def test_gate_rows_ties_and_threads(implementation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = torch.randint(-2, 3, (40, 64)).to(dtype), torch.randint(-1, 2, (48, 64)).to(dtype)
    weight[24:] = weight[:24]  # each score twice
    weight[5] = torch.nan
    with max_isa(implementation):
        assert_rows_independent(lambda rows: ops.moe_gate(rows, weight, 7), [x])
        weights, indices = ops.moe_gate(x, weight, 7)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            for got, expected in zip(ops.moe_gate(x, weight, 7), (weights, indices), strict=True):
                assert_same_bits(got, expected)
        finally:
            torch.set_num_threads(before)
        last = ops.moe_gate(x, weight, 48)[1][:, -1]
    assert_same_bits(indices, ops.moe_gate_reference(x, weight, 7)[1])
    assert (last == 5).all()


@gates
def test_gate_gradient_takes_the_experts_of_the_forward_pass(implementation: str) -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(6, 40, requires_grad=True), torch.randn(9, 40, requires_grad=True)
    seed = torch.randn(6, 3)
    with max_isa(implementation):
        weights, _ = ops.moe_gate(x, weight, 3, torch.randn(9))
        found = torch.autograd.grad(weights, (x, weight), seed)
        torch.manual_seed(2)
        torch.randn(6, 40), torch.randn(9, 40), torch.randn(6, 3)
        expected = torch.autograd.grad(ops.moe_gate_reference(x, weight, 3, torch.randn(9))[0], (x, weight), seed)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_opcheck_of_the_ops_for_other_dtypes() -> None:
    a = problem(form="plain", shared=None, dtype=torch.float64)
    x, matrices = a["x"].requires_grad_(), [a[name] for name in ("w1", "w3", "w2")]
    check_op(torch.ops.dsv4._moe_experts_reference, x, a["weights"], a["indices"], *matrices)
    check_op(torch.ops.dsv4._moe_gate_reference, x, torch.randn(4, 160, dtype=torch.float64).requires_grad_(), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["fp4", "fp8", "plain"])
def test_a_missing_matrix_is_named(form: str, dtype: torch.dtype) -> None:
    """On kernels, and on the definition, which takes float64."""
    a = problem(form=form, dtype=dtype, shared=None)
    plain = str(dtype).removeprefix("torch.")
    bytes_ = " or ".join(("float8_e4m3fn", *(("uint8", "int8"))))
    for name, sizes in (("w3", "4, 200, 160"), ("w2", "4, 160, 200")):
        expected = f"{plain} [{sizes}]" if form == "plain" else f"{bytes_} [..., out, in]"
        assert_rejects(ops.moe_experts, a, f"moe_experts: {name} must be {expected}, got None", **{name: None})
    assert_rejects(ops.moe_experts, a, "moe_experts: w1 must be [experts, inter, hidden], got None", w1=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_e2m1_holds_an_even_number(dtype: torch.dtype) -> None:
    a = problem(form="fp4", dtype=dtype, shared=None)
    message = "moe_experts: w1 in e2m1 needs an even number of inputs, got 159"
    assert_rejects(ops.moe_experts, a, message, x=a["x"][:, 1:])
