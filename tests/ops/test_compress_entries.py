"""compress_entries and its gradients: kernels against the definitions, which tests/ops/test_compress.py checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4 import _library
from dsv4.ops import compress_entries, compress_entries_backward_reference, compress_entries_reference
from dsv4.testing import (
    Guarded,
    assert_no_worse,
    assert_rejects,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
    strided,
    ulp_distance,
)

OP, BACKWARD = "compress_entries", "compress_entries_backward"
NARROW = [torch.bfloat16, torch.float32]
INPUTS = ("kv", "gate", "ape", "norm_weight")
forward_kernels = pytest.mark.parametrize("implementation", implementation_cases(OP))
kernels = pytest.mark.parametrize("implementation", implementation_cases(BACKWARD))
CASES = grid(
    overlap=[True, False],
    tokens=[0, 3, 4, 5, 23, 140],
    ratio=[1, 4, 7, 128],
    dims=[(512, 64), (64, 32), (96, 0), (40, 8)],
    weight=NARROW,
)
KEYS = grid(
    overlap=[True, False], tokens=[9, 140], ratio=[4], dims=[(32, 0), (128, 64), (256, 32), (16, 4)], weight=NARROW
)


def make(
    tokens: int = 23,
    ratio: int = 4,
    overlap: bool = True,
    dims: tuple[int, int] = (64, 32),
    weight: torch.dtype = torch.bfloat16,
    rotate: bool = False,
    eps: float = 1e-5,
) -> dict[str, Any]:
    (head_dim, rope_dim), channels = dims, dims[0] * (2 if overlap else 1)
    angle = 50 * torch.randn(tokens // ratio, rope_dim // 2)
    return {
        "kv": torch.randn(tokens, channels) * torch.randint(-3, 4, (tokens, 1)).exp2(),
        "gate": 4 * torch.randn(tokens, channels),
        "ape": torch.randn(ratio, channels),
        "norm_weight": (1 + 0.2 * torch.randn(head_dim)).to(weight),
        "rope": torch.stack((angle.cos(), angle.sin()), -1),
        "ratio": ratio,
        "eps": eps,
        "rotate": rotate,
    }


def whole(a: dict[str, Any]) -> bool:
    return len(a["norm_weight"]) % 32 == 0 and a["rope"].shape[1] % 16 == 0


def run(implementation: str, a: dict[str, Any]) -> Tensor:
    with max_isa(implementation):
        result = compress_entries(**a)
    assert _library.last_implementation(OP) == (implementation if whole(a) else "scalar")
    return result


def gradients(implementation: str, grad: Tensor, a: dict[str, Any]) -> list[Tensor]:
    with max_isa(implementation):
        result = getattr(torch.ops.dsv4, BACKWARD)(grad, *a.values())
    assert _library.last_implementation(BACKWARD) == (implementation if whole(a) else "scalar")
    return list(result)


def grad_of(a: dict[str, Any]) -> Tensor:
    return torch.randn(len(a["rope"]), len(a["norm_weight"])).to(a["norm_weight"].dtype)


@forward_kernels
@pytest.mark.parametrize("case", CASES)
def test_entries(implementation: str, case: dict[str, Any]) -> None:
    a = make(**case)
    assert_same_bits(run(implementation, a), compress_entries_reference(**a))


@forward_kernels
@pytest.mark.parametrize("case", KEYS)
def test_index_keys(implementation: str, case: dict[str, Any]) -> None:
    a = make(rotate=True, **case)
    assert_same_bits(run(implementation, a), compress_entries_reference(**a))


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """The definition has the same steps in float64, but sums what is rounded here."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    if found.numel() == 0:
        return
    size = float(expected.float().abs().max())
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7 if found.dtype != torch.float32 else 1e-5,
                               atol=2e-6 * size, msg=lambda text: f"{what}: {text}")  # fmt: skip


@kernels
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_formula(implementation: str, rotate: bool, case: dict[str, Any]) -> None:
    head_dim = case["dims"][0]
    a = make(rotate=rotate and head_dim & (head_dim - 1) == 0, **case)
    grad = grad_of(a)
    found = gradients(implementation, grad, a)
    expected = compress_entries_backward_reference(grad, **a)
    for name, own, other in zip(INPUTS, found, expected, strict=True):
        assert own.is_contiguous()
        close(own, other, name)
    entries, ratio = len(grad), case["ratio"]
    assert not found[0][entries * ratio :].any()
    assert not found[1][entries * ratio :].any()
    if case["overlap"] and entries:  # what the entry after the last would pool
        assert not found[0][(entries - 1) * ratio :, :head_dim].any()
    if not a["rotate"] and entries:  # the same steps: the same bits, but where a rounding is close
        distance = ulp_distance(found[0], expected[0])
        assert (distance > 0).float().mean() < 0.01


def eager(kv: Tensor, gate: Tensor, ape: Tensor, weight: Tensor, a: dict[str, Any]) -> Tensor:
    """The whole op in the dtype of kv."""
    ratio, head_dim, (cos, sin) = a["ratio"], len(weight), a["rope"].to(kv.dtype).unbind(-1)
    entries = len(kv) // ratio
    kv, gate = (x[: entries * ratio].unflatten(0, (entries, ratio)) for x in (kv, gate))
    gate = gate + ape
    if kv.shape[2] > head_dim:
        kv, gate = (
            torch.cat(
                (torch.cat((x.new_full((1, ratio, head_dim), first), x[:-1, :, :head_dim])), x[..., head_dim:]), 1
            )
            for x, first in ((kv, 0.0), (gate, float("-inf")))
        )
    row = (kv * gate.softmax(1)).sum(1)
    row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + a["eps"]) * weight
    width = 2 * cos.shape[1]
    passed, even, odd = row[:, : head_dim - width], row[:, head_dim - width :: 2], row[:, head_dim - width + 1 :: 2]
    row = torch.cat((passed, torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(1)), 1)
    if not a["rotate"]:
        return row
    matrix = torch.ones(1, 1, dtype=kv.dtype)
    while len(matrix) < head_dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return row @ (matrix / head_dim**0.5)


@kernels
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("ratio", [4, 32])
def test_gradients_are_no_worse_than_autograd(implementation: str, overlap: bool, rotate: bool, ratio: int) -> None:
    a = make(tokens=150, ratio=ratio, overlap=overlap, rotate=rotate, dims=(128, 64), weight=torch.float32)
    grad = grad_of(a)
    own = [a[name].clone().requires_grad_() for name in INPUTS]
    with max_isa(implementation):
        found = torch.autograd.grad(compress_entries(**{**a, **dict(zip(INPUTS, own, strict=True))}), own, grad)
    assert _library.last_implementation(BACKWARD) == implementation
    plain = [a[name].clone().requires_grad_() for name in INPUTS]
    wide = [a[name].double().requires_grad_() for name in INPUTS]
    baseline = torch.autograd.grad(eager(*plain, a), plain, grad)
    exact = torch.autograd.grad(eager(*wide, a), wide, grad.double())
    for mine, other, truth in zip(found, baseline, exact, strict=True):
        assert_no_worse(mine, other, truth)


@kernels
@pytest.mark.parametrize("size", [1e-3, 1.0, 60.0, 1000.0])
def test_gates_of_any_size(implementation: str, size: float) -> None:
    """From nearly equal weights to one position that takes all; a gate of -inf takes part with weight 0."""
    a = make(weight=torch.float32)
    a["gate"] *= size
    a["ape"] *= size
    left_out = {**a, "gate": a["gate"].clone()}
    left_out["gate"][3::7, 5:40] = float("-inf")
    grad = grad_of(a)
    for b in (a, left_out):
        found = gradients(implementation, grad, b)
        for name, own, other in zip(INPUTS, found, compress_entries_backward_reference(grad, **b), strict=True):
            close(own, other, name)
    assert not found[0][3, 5:40].any()


@kernels
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
def test_threads_memory_and_gaps(implementation: str, overlap: bool, rotate: bool) -> None:
    a = make(tokens=301, overlap=overlap, rotate=rotate, dims=(128, 64))
    grad = grad_of(a)
    expected, entries = gradients(implementation, grad, a), run(implementation, a)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(run(implementation, a), entries)
            for own, other in zip(gradients(implementation, grad, a), expected, strict=True):
                assert_same_bits(own, other)
    finally:
        torch.set_num_threads(before)
    tensors = {n: v for n, v in {"grad": grad, **a}.items() if isinstance(v, Tensor)}
    guards = {name: Guarded(value) for name, value in tensors.items()}
    apart = {n: strided(v) if v.dim() > 1 else strided(v.unsqueeze(0))[0] for n, v in tensors.items()}
    for changed in ({name: guard.tensor for name, guard in guards.items()}, apart):
        b = {**a, **{name: value for name, value in changed.items() if name != "grad"}}
        assert_same_bits(run(implementation, b), entries)
        for own, other in zip(gradients(implementation, changed["grad"], b), expected, strict=True):
            assert_same_bits(own, other)
    for name, guard in guards.items():
        guard.check()
        assert_same_bits(guard.tensor, tensors[name])


@kernels
def test_a_row_depends_on_its_entries_alone(implementation: str) -> None:
    """More rows behind change nothing before, but for the sums over entries; nor do rows that make no entry."""
    a = make(tokens=44, weight=torch.float32)
    grad = grad_of(a)
    expected = gradients(implementation, grad, a)
    for tokens in (24, 27):
        some = {**a, "kv": a["kv"][:tokens], "gate": a["gate"][:tokens], "rope": a["rope"][:6]}
        found = gradients(implementation, grad[:6], some)
        for own, other in zip(found[:2], expected[:2], strict=True):
            assert_same_bits(own[:20], other[:20])
            assert_same_bits(own[20:24, 64:], other[20:24, 64:])
    rest = {n: torch.full_like(a[n], float("nan")) for n in ("kv", "gate")}
    longer = {**a, **{n: torch.cat((a[n], value[:3])) for n, value in rest.items()}}
    for own, other in zip(gradients(implementation, grad, longer), expected, strict=True):
        assert_same_bits(own[: len(other)], other)


@kernels
def test_nan_reaches_its_own_entries(implementation: str) -> None:
    a = make(tokens=24, weight=torch.float32)
    grad = grad_of(a)
    clean = gradients(implementation, grad, a)
    grad[2, 5] = float("nan")
    found = gradients(implementation, grad, a)
    assert found[0][8:12, 64:].isnan().all()
    assert found[0][4:8, :64].isnan().all()
    for own, other in zip(found[:2], clean[:2], strict=True):
        assert_same_bits(own[:4], other[:4])
        assert_same_bits(own[12:], other[12:])
        assert_same_bits(own[8:12, :64], other[8:12, :64])
        assert_same_bits(own[4:8, 64:], other[4:8, 64:])


@pytest.mark.parametrize("rotate", [True, False])
def test_op_registration(rotate: bool) -> None:
    a = make(tokens=10, rotate=rotate, weight=torch.float32)
    grad = grad_of(a)
    check_op(torch.ops.dsv4.compress_entries_backward, grad, *a.values())
    wide = [v.double() if isinstance(v, Tensor) else v for v in a.values()]
    check_op(torch.ops.dsv4._compress_entries_backward_reference, grad.double(), *wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_rope_is_refused(dtype: torch.dtype) -> None:
    a = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in make().items()}
    y = compress_entries(**{**a, "rope": a["rope"].requires_grad_()})
    with pytest.raises(RuntimeError, match=r"^compress_entries: rope has no gradient; detach it$"):
        y.sum().backward()


BAD: list[tuple[str, dict[str, Any]]] = [
    ("kv must be float32 or float64 [tokens, c * head_dim], got float32 [23]", {"kv": torch.zeros(23)}),
    ("kv must have 64 or 128 channels, got 192",
     {n: torch.zeros(23, 192) for n in ("kv", "gate")} | {"ape": torch.zeros(4, 192)}),
    ("gate must be float32 [23, 128], got float32 [22, 128]", {"gate": torch.zeros(22, 128)}),
    ("gate must be float32 [23, 128], got float64 [23, 128]", {"gate": torch.zeros(23, 128).double()}),
    ("ape must be float32 [4, 128], got float32 [3, 128]", {"ape": torch.zeros(3, 128)}),
    ("ratio must be at least 1, got 0", {"ratio": 0}),
    ("ratio must be at least 1, got -4", {"ratio": -4}),
    ("norm_weight must be bfloat16 or float32 or float64 [head_dim], got float16 [64]",
     {"norm_weight": torch.zeros(64).half()}),
    ("rope must be float32 or float64 [5, rope_dim / 2, 2], got float32 [6, 16, 2]", {"rope": torch.zeros(6, 16, 2)}),
    ("rope must have at most 32 pairs, got 33", {"rope": torch.zeros(5, 33, 2)}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:60] for message, _ in BAD])
def test_refuses(message: str, change: dict[str, Any]) -> None:
    a = make()
    assert_rejects(compress_entries, a, f"{OP}: {message}", **change)
    with_grad = {"grad": grad_of(a), **a}
    for op in (torch.ops.dsv4.compress_entries_backward, torch.ops.dsv4._compress_entries_backward_reference):
        assert_rejects(op, with_grad, f"{BACKWARD}: {message}", **change)


BAD_GRAD: list[tuple[str, Tensor]] = [
    ("grad must be bfloat16 [5, 64], got bfloat16 [6, 64]", torch.zeros(6, 64).bfloat16()),
    ("grad must be bfloat16 [5, 64], got bfloat16 [5, 32]", torch.zeros(5, 32).bfloat16()),
    ("grad must be bfloat16 [5, 64], got float32 [5, 64]", torch.zeros(5, 64)),
]


@pytest.mark.parametrize(("message", "grad"), BAD_GRAD, ids=[message for message, _ in BAD_GRAD])
def test_refuses_another_gradient(message: str, grad: Tensor) -> None:
    a = make()
    for op in (torch.ops.dsv4.compress_entries_backward, torch.ops.dsv4._compress_entries_backward_reference):
        assert_rejects(op, {"grad": grad_of(a), **a}, f"{BACKWARD}: {message}", grad=grad)


def test_refuses_to_rotate_other_widths() -> None:
    message = f"{OP}: head_dim must be a power of two to be rotated, got 96"
    assert_rejects(compress_entries, make(dims=(96, 32)), message, rotate=True)
