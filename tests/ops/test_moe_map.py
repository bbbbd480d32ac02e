"""The permutation of routed pairs by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4 import _library, ops
from dsv4.testing import assert_rejects, assert_same_bits, check_op, grid, implementation_cases, max_isa, strided

maps = pytest.mark.parametrize("implementation", implementation_cases("moe_map"))


def by_hand(indices: Tensor, experts: int) -> tuple[list[int], list[int]]:
    pairs: list[list[int]] = [[] for _ in range(experts)]
    for pair, expert in enumerate(indices.flatten().tolist()):
        if 0 <= expert < experts:
            pairs[expert].append(pair)
    offsets = [sum(len(p) for p in pairs[:e]) for e in range(experts + 1)]
    rows = [pair for p in pairs for pair in p]
    return offsets, rows + [-1] * (indices.numel() - len(rows))


def run(implementation: str, indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    with max_isa(implementation):
        found = ops.moe_map(indices, experts)
    assert _library.last_implementation("moe_map") == implementation
    return found


def assert_by_hand(implementation: str, indices: Tensor, experts: int) -> None:
    for offsets, rows in (run(implementation, indices, experts), ops.moe_map_reference(indices, experts)):
        assert offsets.dtype == rows.dtype == torch.int32
        assert (offsets.tolist(), rows.tolist()) == by_hand(indices, experts)


@pytest.mark.parametrize(
    "case",
    grid(
        tokens=[0, 1, 2, 7, 64, 129],
        top_k=[0, 1, 2, 6],
        experts=[1, 2, 16, 257],
        dtype=[torch.int32, torch.int64],
    ),
)
@maps
def test_by_hand(implementation: str, case: dict[str, Any]) -> None:
    """Some indices belong to nobody, some are taken twice by a token."""
    torch.manual_seed(case["tokens"])
    experts = case["experts"]
    indices = torch.randint(-1, experts + 1, (case["tokens"], case["top_k"])).to(case["dtype"])
    assert_by_hand(implementation, indices, experts)


@maps
def test_extreme_indices(implementation: str) -> None:
    """A wide index that would fall into range if its high half were dropped belongs to nobody."""
    indices = torch.tensor([[-(2**63), 2**63 - 1], [2**32, -(2**32) + 1], [3, 4], [0, -1]])
    assert_by_hand(implementation, indices, 4)
    assert_by_hand(implementation, torch.tensor([[-(2**31), 2**31 - 1, 0]], dtype=torch.int32), 4)
    assert_by_hand(implementation, torch.full((3, 2), -1), 4)
    assert_by_hand(implementation, torch.full((3, 2), 3), 4)


@maps
def test_layout_does_not_matter(implementation: str) -> None:
    indices = torch.randint(-1, 9, (33, 6)).int()
    expected = run(implementation, indices, 8)
    for apart in (strided(indices), indices.t().contiguous().t()):
        for got, want in zip(run(implementation, apart, 8), expected, strict=True):
            assert_same_bits(got, want)


def test_the_map_says_which_rows_moe_experts_gives_an_expert() -> None:
    """One expert at a time over its own rows adds up to the op, in float64."""
    torch.manual_seed(0)
    tokens, top_k, experts = 9, 3, 5
    x, weights = torch.randn(tokens, 8, dtype=torch.float64), torch.rand(tokens, top_k, dtype=torch.float64)
    w1, w3, w2 = (torch.randn(experts, *s, dtype=torch.float64) for s in ((6, 8), (6, 8), (8, 6)))
    indices = torch.randint(-1, experts + 1, (tokens, top_k))
    offsets, rows = ops.moe_map(indices, experts)
    total = torch.zeros_like(x)
    for e in range(experts):
        mine = rows[offsets[e] : offsets[e + 1]].long()
        hidden = torch.nn.functional.silu(x[mine // top_k] @ w1[e].T) * (x[mine // top_k] @ w3[e].T)
        total.index_add_(0, mine // top_k, (hidden * weights.flatten()[mine, None]) @ w2[e].T)
    torch.testing.assert_close(total, ops.moe_experts(x, weights, indices, w1, w3, w2))


BAD = {
    "indices must be int32 or int64 [tokens, top_k], got float32 [3, 2]": {"indices": torch.zeros(3, 2)},
    "indices must be int32 or int64 [tokens, top_k], got bool [3, 2]": {"indices": torch.zeros(3, 2).bool()},
    "indices must be int32 or int64 [tokens, top_k], got uint8 [3, 2]": {"indices": torch.zeros(3, 2).byte()},
    "indices must be int32 or int64 [tokens, top_k], got int32 [3]": {"indices": torch.zeros(3).int()},
    "indices must be int32 or int64 [tokens, top_k], got int32 []": {"indices": torch.tensor(1).int()},
    "indices must be int32 or int64 [tokens, top_k], got int64 [1, 3, 2]": {"indices": torch.zeros(1, 3, 2).long()},
    "experts must be 1 to 2147483646, got 0": {"experts": 0},
    "experts must be 1 to 2147483646, got -4": {"experts": -4},
    "experts must be 1 to 2147483646, got 2147483647": {"experts": 2**31 - 1},
}


@pytest.mark.parametrize("message", BAD)
def test_rejects(message: str) -> None:
    arguments = {"indices": torch.zeros(3, 2).int(), "experts": 4}
    assert_rejects(ops.moe_map, arguments, f"moe_map: {message}", **BAD[message])


def test_opcheck() -> None:
    check_op(torch.ops.dsv4.moe_map, torch.randint(-1, 5, (7, 3)), 4)
    check_op(torch.ops.dsv4.moe_map, torch.randint(-1, 5, (0, 3)).int(), 4)
