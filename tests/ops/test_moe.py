"""The router's gate and the experts."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dsv4.ops as ops
from dsv4.testing import (
    assert_no_worse,
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    relative_rms,
    strided,
)

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
NAMES = ("w1", "w3", "w2")


def golden_layers(case, mode):
    """(x, gate arguments, experts, shared, limit, expected) of every layer's prefill and first decode steps."""
    config = json.loads((GOLDEN / case / "config.json").read_text())
    weights = load_file(GOLDEN / case / "model.safetensors")
    values = load_file(GOLDEN / case / f"intermediates_{mode}.safetensors")
    prompt = json.loads((GOLDEN / case / "meta.json").read_text())["runs"]["full"]["prompt_len"]
    ids = load_file(GOLDEN / case / "inputs.safetensors")["full.input_ids"].flatten()
    for layer in range(config["num_hidden_layers"]):
        prefix = f"layers.{layer}.ffn."
        experts = [
            torch.stack(
                [
                    weights[f"{prefix}experts.{e}.{n}.{part}"].view(torch.uint8)
                    for e in range(config["n_routed_experts"])
                ]
            )
            for part in ("weight", "scale")
            for n in NAMES
        ]
        experts[3:] = [scale.view(E8M0) for scale in experts[3:]]
        shared = [weights[f"{prefix}shared_experts.{n}.{part}"] for n in NAMES for part in ("weight", "scale")]
        if mode == "fp32":
            experts[:3] = [
                ops.dequantize_weight(w, s, torch.float32) for w, s in zip(experts[:3], experts[3:], strict=True)
            ]
            experts[3:] = [None] * 3
            shared = [ops.dequantize_weight(shared[i], shared[i + 1], torch.float32) for i in (0, 2, 4)]
        for phase, start in (("prefill", 0), ("decode0", prompt), ("decode1", prompt + 1)):
            expected = {
                name: values.get(f"full.{phase}.layers.{layer}.{name}")
                for name in ("ffn.in", "ffn.out", "ffn.shared_out", "gate.scores", "gate.weights", "gate.indices")
            }
            x = expected["ffn.in"].flatten(0, 1)
            routing = {"weight": weights[prefix + "gate.weight"], "top_k": config["num_experts_per_tok"]}
            routing["route_scale"] = config["routed_scaling_factor"]
            if layer < config["num_hash_layers"]:
                routing["token_ids"] = ids[start : start + len(x)]
                routing["tid2eid"] = weights[prefix + "gate.tid2eid"]
            else:
                routing["bias"] = weights[prefix + "gate.bias"]
            yield x, routing, experts, shared, config["swiglu_limit"], expected


@pytest.mark.parametrize("mode", ["quant", "fp32"])
@pytest.mark.parametrize("case", ["dev_a", "dev_b", "dev_c"])
def test_golden_layers(case, mode):
    for x, routing, experts, shared, limit, expected in golden_layers(case, mode):
        weights, indices = ops.moe_gate(x, **routing)
        order, golden_order = indices.argsort(-1), expected["gate.indices"].argsort(-1)
        assert torch.equal(indices.gather(1, order), expected["gate.indices"].gather(1, golden_order))
        torch.testing.assert_close(
            weights.gather(1, order), expected["gate.weights"].gather(1, golden_order), rtol=1e-5, atol=1e-6
        )
        out = ops.moe_experts(x, weights, indices, *experts, shared=shared, swiglu_limit=limit)
        error = relative_rms(out, expected["ffn.out"].flatten(0, 1))
        # A different order of summation moves the official result by at most 7e-5 (quant) and rounding (fp32).
        assert error.max() <= (7e-5 if mode == "quant" else 2e-6)
        if expected["ffn.shared_out"] is not None:
            nobody = torch.full_like(indices, -1)
            alone = ops.moe_experts(x, weights, nobody, *experts, shared=shared, swiglu_limit=limit)
            assert relative_rms(alone, expected["ffn.shared_out"]).max() <= (7e-5 if mode == "quant" else 2e-6)
        if expected["gate.scores"] is not None:
            all_weights, all_indices = ops.moe_gate(x, routing["weight"], len(routing["weight"]))
            scores = torch.empty_like(all_weights).scatter(1, all_indices.long(), all_weights)
            golden = expected["gate.scores"] / expected["gate.scores"].sum(-1, keepdim=True)
            torch.testing.assert_close(scores, golden, rtol=1e-5, atol=1e-6)


def gate_by_hand(x, weight, top_k, bias, route_scale):
    """In Python floats, one token and expert at a time."""
    weights, indices = [], []
    for row in x.tolist():
        scores = []
        for expert in weight.tolist():
            z = math.fsum(a * b for a, b in zip(row, expert, strict=True))
            scores.append(math.sqrt(z if z > 20 else math.log1p(math.exp(z))))
        ranked = sorted(
            range(len(scores)), key=lambda e: (-(scores[e] + (bias[e].item() if bias is not None else 0)), e)
        )
        total = sum(scores[e] for e in ranked[:top_k])
        indices.append(ranked[:top_k])
        weights.append([scores[e] / total * route_scale for e in ranked[:top_k]])
    return weights, indices


class TestGate:
    @pytest.mark.parametrize(
        "case", grid(tokens=[0, 1, 5, 33], experts=[(1, 1), (4, 4), (7, 2), (64, 6)], biased=[False, True])
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_against_the_formula(self, case, dtype):
        experts, top_k = case["experts"]
        x, weight = (2 * torch.randn(case["tokens"], 24)).to(dtype), torch.randn(experts, 24).to(dtype)
        bias = torch.randn(experts) if case["biased"] else None
        weights, indices = ops.moe_gate(x, weight, top_k, bias, route_scale=1.5)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert indices.dtype == torch.int32
        assert weights.shape == indices.shape == (case["tokens"], top_k)
        expected_weights, expected_indices = gate_by_hand(x, weight, top_k, bias, 1.5)
        assert indices.tolist() == expected_indices
        expected_weights = torch.tensor(expected_weights, dtype=torch.float64).view(-1, top_k)
        torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64])
    def test_hash_routing_takes_experts_from_the_table_and_weights_from_the_scores(self, id_dtype, table_dtype):
        x, weight = torch.randn(5, 16), torch.randn(6, 16)
        table = torch.stack([torch.randperm(6)[:3] for _ in range(10)]).to(table_dtype)
        ids = torch.tensor([3, 0, 9, 3, 7], dtype=id_dtype)
        weights, indices = ops.moe_gate(x, weight, 3, token_ids=ids, tid2eid=table, route_scale=2.0)
        assert indices.dtype == torch.int32
        assert torch.equal(indices.long(), table[ids.long()].long())
        scores = torch.nn.functional.softplus(x.double() @ weight.double().T).sqrt().gather(1, indices.long())
        torch.testing.assert_close(weights.double(), 2 * scores / scores.sum(-1, keepdim=True), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("bad", [-1, 10])
    def test_values_out_of_range(self, bad):
        arguments = {"x": torch.zeros(1, 4), "weight": torch.zeros(10, 4), "top_k": 2, "token_ids": torch.tensor([3])}
        arguments["tid2eid"] = torch.zeros(10, 2, dtype=torch.int64)
        message = f"moe_gate: token_ids must lie in [0, 10), got {bad}"
        assert_rejects(ops.moe_gate, arguments, message, token_ids=torch.tensor([bad]))
        message = f"moe_gate: tid2eid must lie in [0, 10), got {bad}"
        assert_rejects(ops.moe_gate, arguments, message, tid2eid=torch.full((10, 2), bad))

    def test_ties_go_to_the_lower_index(self):
        x, weight = torch.ones(2, 4), torch.ones(40, 4)
        assert ops.moe_gate(x, weight, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2
        bias = torch.zeros(40)
        bias[[30, 11, 25]] = 1.0
        weights, indices = ops.moe_gate(x, weight, 5, bias)
        assert indices.tolist() == [[11, 25, 30, 0, 1]] * 2
        assert weights.tolist() == [[pytest.approx(0.2)] * 5] * 2  # the bias chooses, it does not weigh

    def test_nan_is_chosen_last(self):
        weight = torch.eye(4)
        x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        weight[3] = torch.nan
        assert ops.moe_gate(x, weight, 3)[1].tolist() == [[2, 1, 0]]

    def test_very_negative_and_large_logits(self):
        weight = torch.tensor([[-150.0], [-120.0], [-39.0], [-41.0], [19.99], [20.01], [1e4]])
        for top_k in (1, 7):
            x = torch.ones(1, 1, requires_grad=True)
            weights, indices = ops.moe_gate(x, weight, top_k)
            assert indices[0].tolist() == [6, 5, 4, 2, 3, 1, 0][:top_k]
            assert weights.isfinite().all()
            weights.square().sum().backward()
            assert x.grad.isfinite().all()
        tail = torch.tensor([[-120.0], [-122.0]])  # softplus of both is 0 in float32
        weights, _ = ops.moe_gate(torch.ones(1, 1), tail, 2)
        assert weights[0].tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)], rel=1e-6)
        far = torch.tensor([[-1e4, -800.0, -802.0]], dtype=torch.float64, requires_grad=True)
        weights, _ = ops.moe_gate(far, torch.eye(3, dtype=torch.float64), 3)  # softplus is 0 in float64 too
        assert weights[0].tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e), 0.0], rel=1e-6)
        weights[0, 0].backward()
        assert far.grad.isfinite().all()
        assert far.grad[0, 1] > 0
        weights, _ = ops.moe_gate(torch.ones(1, 1), torch.full((2, 1), -1e4), 2)
        assert weights.tolist() == [[0.0, 0.0]]

    def test_score_is_continuous_where_its_formula_changes(self):
        for z in (-40.0, 20.0):
            logits = torch.tensor([[z], [math.nextafter(z, -1000)], [math.nextafter(z, 1000)]], dtype=torch.float64)
            weights, _ = ops.moe_gate(torch.ones(1, 1, dtype=torch.float64), logits, 3)
            # torch's own softplus drops exp(-20) = 2e-9 above its threshold
            assert weights[0].tolist() == pytest.approx([1 / 3] * 3, rel=1e-9)

    def test_gradient(self):
        x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (8, 6)))
        bias = torch.randn(8, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x, w: ops.moe_gate(x, w, 3, bias, None, None, 1.5)[0], (x, weight))
        ids, table = torch.tensor([0, 1, 1, 0, 2]), torch.stack([torch.randperm(8)[:3] for _ in range(3)])
        assert torch.autograd.gradcheck(lambda x, w: ops.moe_gate(x, w, 3, None, ids, table)[0], (x, weight))

    def test_gradient_by_formula_in_the_tail(self):
        """ds/dz = s / 2 for very negative z; dL/ds_k = (g_k - sum_j g_j s_j / S) / S."""
        z = torch.tensor([[-130.0, -131.0, -200.0]], dtype=torch.float64, requires_grad=True)
        weights, indices = ops.moe_gate(z, torch.eye(3, dtype=torch.float64), 3)
        seed = torch.tensor([[1.0, 5.0, -2.0]], dtype=torch.float64)
        weights.backward(seed)
        assert indices.tolist() == [[0, 1, 2]]
        s = (z.detach() / 2).exp()
        expected = (seed - (seed * s).sum() / s.sum()) / s.sum() * s / 2
        torch.testing.assert_close(z.grad, expected, rtol=1e-7, atol=1e-30)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_rows_are_independent_and_layout_does_not_matter(self, dtype):
        x, weight, bias = torch.randn(41, 256).to(dtype), torch.randn(16, 256).to(dtype), torch.randn(16)
        assert_rows_independent(lambda rows: ops.moe_gate(rows, weight, 3, bias), [x])
        for got, expected in zip(
            ops.moe_gate(strided(x), strided(weight), 3, strided(bias)), ops.moe_gate(x, weight, 3, bias), strict=True
        ):
            assert_same_bits(got, expected)
        ids, table = torch.arange(41) % 7, torch.stack([torch.randperm(16)[:3] for _ in range(7)])
        assert_rows_independent(lambda rows, i: ops.moe_gate(rows, weight, 3, None, i, table), [x, ids])


def plain_experts(experts, hidden, inter, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    lead = () if experts is None else (experts,)
    return [torch.randn(*lead, *s, generator=generator, dtype=torch.float64).div(s[1] ** 0.5).to(dtype) for s in shapes]


def fp8(weight):
    """A plain weight as codes and scales that differ from block to block."""
    shape = (*weight.shape[:-2], -(-weight.shape[-2] // 128), -(-weight.shape[-1] // 128))
    scale = torch.randint(-11, -8, shape).float().exp2()
    rows = scale.repeat_interleave(128, -2)[..., : weight.shape[-2], :].repeat_interleave(128, -1)[
        ..., : weight.shape[-1]
    ]
    return (weight / rows).clamp(-448, 448).to(E4M3), scale.to(E8M0)


def fp4(weight):
    codes, scale = ops.quantize_fp4(weight)
    return codes.view(torch.int8), scale


def routing(tokens, experts, top_k):
    indices = (
        torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
        if tokens
        else torch.zeros(0, top_k).int()
    )
    return torch.rand(tokens, top_k), indices


def by_hand(x, weights, indices, matrices, shared, limit, round_activation, dtype):
    """Token by token, with the roundings of the contract; `dtype` None leaves them out."""

    def rounded(value):
        return value if dtype is None else value.to(dtype).double()

    def summed(value):
        return value if dtype in (None, torch.float64) else value.float().double()

    def expert(row, w1, w3, w2, weight):
        row = round_activation(row)
        gate, up = rounded(w1 @ row), rounded(w3 @ row)
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        hidden = rounded(gate * torch.sigmoid(gate) * up * weight)
        return rounded(w2 @ round_activation(hidden))

    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for slot in indices[t].argsort(stable=True).tolist():
            e = int(indices[t, slot])
            if 0 <= e < len(matrices[0]):
                out[t] = summed(out[t] + expert(row, *(m[e] for m in matrices), weights[t, slot].double()))
        if shared:
            out[t] = summed(out[t] + expert(row, *shared, 1.0))
    return out if dtype is None else out.to(dtype)


def through_fp8(row):
    codes, scale = ops.quantize_fp8(row.unsqueeze(0))
    return ops.dequantize_fp8(codes, scale, 128, torch.float64)[0]


EXPERTS = grid(tokens=[0, 1, 6], sizes=[(32, 32, 3, 1), (160, 200, 4, 2)], limit=[0.0, 0.7], shared=[False, True])


class TestExperts:
    @pytest.mark.parametrize("case", EXPERTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_plain(self, case, dtype):
        hidden, inter, experts, top_k = case["sizes"]
        x = (2 * torch.randn(case["tokens"], hidden)).to(dtype)
        weights, indices = routing(case["tokens"], experts, top_k)
        matrices = plain_experts(experts, hidden, inter, dtype)
        shared = plain_experts(None, hidden, inter + 8, dtype, seed=1) if case["shared"] else None
        out = ops.moe_experts(x, weights, indices, *matrices, shared=shared, swiglu_limit=case["limit"])
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert out.is_contiguous()
        wide = [m.double() for m in matrices], shared and [m.double() for m in shared]
        exact = by_hand(x, weights, indices, *wide, case["limit"], lambda row: row, None)
        if dtype == torch.float64:
            torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
        else:
            assert_no_worse(out, self.in_torch(x, weights, indices, matrices, shared, case["limit"]), exact)

    @staticmethod
    def in_torch(x, weights, indices, matrices, shared, limit):
        """What a user would write, all in the dtype of x: every expert on every token."""

        def expert(w1, w3, w2):
            gate, up = x @ w1.T, x @ w3.T
            if limit:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (torch.nn.functional.silu(gate) * up) @ w2.T

        out = torch.zeros_like(x)
        for e in range(len(matrices[0])):
            share = (weights * (indices == e)).sum(-1, keepdim=True).to(x.dtype)
            out = out + share * expert(*(m[e] for m in matrices))
        return out + expert(*shared) if shared else out

    @pytest.mark.parametrize("case", EXPERTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("pack", [fp4, fp8])
    def test_quantised(self, case, dtype, pack):
        """The definition, bit by bit; test_moe_kernels compares the kernels with it."""
        hidden, inter, experts, top_k = case["sizes"]
        x = (2 * torch.randn(case["tokens"], hidden)).to(dtype)
        weights, indices = routing(case["tokens"], experts, top_k)
        stored = [pack(m) for m in plain_experts(experts, hidden, inter)]
        shared_stored = [fp8(m) for m in plain_experts(None, hidden, inter, seed=1)] if case["shared"] else []
        out = ops.moe_experts_reference(
            x,
            weights,
            indices,
            *(w for w, _ in stored),
            *(s for _, s in stored),
            shared=[t for pair in shared_stored for t in pair],
            swiglu_limit=case["limit"],
        )
        wide = [ops.dequantize_weight(w, s, torch.float64) for w, s in stored]
        shared = [ops.dequantize_weight(w, s, torch.float64) for w, s in shared_stored]
        expected = by_hand(x, weights, indices, wide, shared, case["limit"], through_fp8, dtype)
        assert out.shape == x.shape
        assert out.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
        else:
            assert_same_bits(out, expected)

    def test_the_clamp_is_one_sided_for_the_gate(self):
        x = torch.tensor([[1.0]])
        one = torch.ones(1, 1, 1)
        weight, index = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)

        def out(gate, up):
            return ops.moe_experts(x, weight, index, gate * one, up * one, one, swiglu_limit=2.0).item()

        def silu(v):
            return v / (1 + math.exp(-v))

        assert out(5.0, 1.0) == pytest.approx(silu(2.0), rel=1e-6)
        assert out(-5.0, 1.0) == pytest.approx(silu(-5.0), rel=1e-6)
        assert out(1.0, 5.0) == pytest.approx(2 * silu(1.0), rel=1e-6)
        assert out(1.0, -5.0) == pytest.approx(-2 * silu(1.0), rel=1e-6)

    def test_the_weight_enters_before_the_quantiser(self):
        """1 + 2^-4 is no e4m3 value, times 2^-3 * 17 / 16 neither; the codes differ with the place of the weight."""
        hidden = torch.linspace(0.5, 1.5, 32)
        weight, index = torch.tensor([[0.7]]), torch.zeros(1, 1, dtype=torch.int32)
        x = torch.ones(1, 32)
        w1, w3 = torch.diag(hidden).unsqueeze(0) * 4, torch.eye(32).unsqueeze(0)
        packed = [ops.quantize_fp4(w) for w in (w1, w3)]
        w2, w2_scale = torch.eye(32).unsqueeze(0).to(E4M3), torch.ones(1, 1, 1)
        out = ops.moe_experts(x, weight, index, packed[0][0], packed[1][0], w2, packed[0][1], packed[1][1], w2_scale)
        gate = ops.dequantize_weight(*packed[0], torch.float64)[0].diagonal()
        product = (gate * torch.sigmoid(gate)).unsqueeze(0)
        before = ops.fp8_round_trip((product * weight.double()).float())
        after = ops.fp8_round_trip(product.float()) * weight
        assert_same_bits(out, before)
        assert not torch.equal(before, after)

    def test_indices_out_of_range_and_repeated(self):
        x, (weights, _) = torch.randn(3, 32), routing(3, 4, 2)
        matrices = plain_experts(4, 32, 16, torch.float32)
        alone = ops.moe_experts(x, weights[:, :1].contiguous(), torch.tensor([[2], [0], [3]]), *matrices)
        padded = torch.tensor([[2, -1], [0, 4], [3, 1 << 20]], dtype=torch.int32)
        assert_same_bits(ops.moe_experts(x, weights, padded, *matrices), alone)
        twice = ops.moe_experts(x, weights, torch.tensor([[2, 2], [0, 0], [3, 3]]), *matrices)
        total = ops.moe_experts(x, weights.sum(1, keepdim=True), torch.tensor([[2], [0], [3]]), *matrices)
        torch.testing.assert_close(twice, total)
        nobody = ops.moe_experts(x, weights, torch.full((3, 2), -1), *matrices)
        assert nobody.count_nonzero() == 0

    def test_a_nan_expert_is_seen_by_its_tokens_alone(self):
        x, weights = torch.randn(3, 32), torch.ones(3, 1)
        matrices = plain_experts(4, 32, 16, torch.float32)
        matrices[0][1] = torch.nan
        out = ops.moe_experts(x, weights, torch.tensor([[0], [1], [2]]), *matrices)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()

    def test_the_order_of_a_tokens_experts_does_not_matter(self):
        x, (weights, indices) = torch.randn(9, 64).bfloat16(), routing(9, 8, 5)
        matrices = [fp4(m) for m in plain_experts(8, 64, 32)]
        arguments = [w for w, _ in matrices] + [s for _, s in matrices]
        expected = ops.moe_experts(x, weights, indices, *arguments)
        order = torch.randperm(5)
        assert_same_bits(ops.moe_experts(x, weights[:, order], indices[:, order], *arguments), expected)

    @pytest.mark.parametrize("pack", [fp4, fp8])
    def test_rows_are_independent_and_layout_does_not_matter(self, pack):
        x, (weights, indices) = torch.randn(37, 256).bfloat16(), routing(37, 8, 3)
        stored = [pack(m) for m in plain_experts(8, 256, 192)]
        arguments = [w for w, _ in stored] + [s for _, s in stored]
        shared = [t for m in plain_experts(None, 256, 128, seed=1) for t in fp8(m)]
        assert_rows_independent(
            lambda a, b, c: ops.moe_experts(a, b, c, *arguments, shared=shared, swiglu_limit=1.0), [x, weights, indices]
        )
        expected = ops.moe_experts(x, weights, indices, *arguments, shared=shared)
        apart = [strided(t) for t in (x, weights, indices, *arguments)]
        assert_same_bits(ops.moe_experts(*apart, shared=[strided(t) for t in shared]), expected)

    @pytest.mark.parametrize("limit", [0.0, 0.5])
    def test_gradient(self, limit):
        weights, indices = routing(5, 4, 2)
        indices[2, 1] = -1
        indices[4, 1] = indices[4, 0]
        weights = weights.double().requires_grad_()
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        matrices = [m.requires_grad_() for m in plain_experts(4, 6, 3)]
        shared = [m.requires_grad_() for m in plain_experts(None, 6, 5, seed=1)]
        assert torch.autograd.gradcheck(
            lambda x, w, a, b, c, *s: ops.moe_experts(x, w, indices, a, b, c, shared=s, swiglu_limit=limit),
            (x, weights, *matrices, *shared),
        )
        assert torch.autograd.gradcheck(lambda x, w, *m: ops.moe_experts(x, w, indices, *m), (x, weights, *matrices))

    def test_backward_op_equals_autograd_of_the_reference(self):
        weights, indices = routing(7, 4, 2)
        leaves = [torch.randn(7, 16), weights, *plain_experts(4, 16, 12), *plain_experts(None, 16, 8, seed=1)]
        leaves = [t.double().requires_grad_() for t in leaves]
        grad = torch.randn(7, 16, dtype=torch.float64)
        result = ops.moe_experts_reference(
            leaves[0], leaves[1], indices, *leaves[2:5], shared=leaves[5:], swiglu_limit=0.6
        )
        expected = torch.autograd.grad(result, leaves, grad)
        data = [t.detach() for t in leaves]
        found = ops.moe_experts_backward_reference(grad, *data[:2], indices, *data[2:5], data[5:], 0.6)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_gradient_is_no_worse_than_autograd_in_the_same_dtype(self, dtype):
        weights, indices = routing(16, 4, 2)
        narrow = [torch.randn(16, 64).to(dtype), weights, *plain_experts(4, 64, 48, dtype)]
        seed = torch.randn(16, 64).to(dtype)

        def gradients(function, leaves, seed):
            leaves = [t.detach().clone().requires_grad_() for t in leaves]
            x, weights, *matrices = leaves
            function(x, weights, indices, matrices).backward(seed)
            return [t.grad for t in leaves]

        def through_op(x, weights, indices, matrices):
            return ops.moe_experts(x, weights, indices, *matrices)

        def in_torch(x, weights, indices, matrices):
            return self.in_torch(x, weights, indices, matrices, None, 0.0)

        exact = gradients(in_torch, [t.double() for t in narrow], seed.double())
        baseline = gradients(in_torch, narrow, seed)
        for got, other, truth, leaf in zip(gradients(through_op, narrow, seed), baseline, exact, narrow, strict=True):
            assert got.dtype == leaf.dtype
            assert_no_worse(got, other, truth)

    def test_says_that_quantised_experts_have_no_gradient(self):
        x, (weights, indices) = torch.randn(3, 32, requires_grad=True), routing(3, 4, 2)
        stored = [fp4(m) for m in plain_experts(4, 32, 32)]
        out = ops.moe_experts(x, weights, indices, *(w for w, _ in stored), *(s for _, s in stored))
        with pytest.raises(RuntimeError, match="moe_experts: quantised experts have no gradient"):
            out.sum().backward()


def test_opcheck():
    dsv4 = torch.ops.dsv4
    x, gate = torch.randn(5, 32, requires_grad=True), torch.randn(4, 32, requires_grad=True)
    check_op(dsv4.moe_gate, x, gate, 2, torch.randn(4))
    check_op(
        dsv4.moe_gate, x, gate, 2, None, torch.tensor([0, 1, 2, 2, 1]), torch.tensor([[0, 1], [3, 2], [1, 0]]), 1.5
    )
    weights, indices = routing(5, 4, 2)
    matrices = [m.requires_grad_() for m in plain_experts(4, 32, 16, torch.float32)]
    shared = [m.requires_grad_() for m in plain_experts(None, 32, 8, torch.float32)]
    check_op(dsv4.moe_experts, x, weights.requires_grad_(), indices, *matrices)
    check_op(dsv4.moe_experts, x, weights, indices, *matrices, None, None, None, shared, 0.5)
    data = [t.detach() for t in (x, weights)], [m.detach() for m in matrices], [m.detach() for m in shared]
    check_op(dsv4.moe_experts_backward, torch.randn(5, 32), *data[0], indices, *data[1], data[2], 0.5)
    stored = [fp4(m) for m in plain_experts(4, 32, 64)]
    packed = [w for w, _ in stored] + [s for _, s in stored]
    check_op(dsv4.moe_experts, data[0][0].bfloat16(), data[0][1], indices, *packed)
    check_op(
        dsv4.moe_experts, data[0][0].bfloat16(), data[0][1], indices, *packed[:3], *(s.float() for s in packed[3:])
    )


def test_compiles_without_graph_breaks():
    def function(x, gate, bias, *matrices):
        weights, indices = ops.moe_gate(x, gate, 2, bias)
        return ops.moe_experts(x, weights, indices, *matrices, swiglu_limit=1.0)

    arguments = [torch.randn(6, 16), torch.randn(4, 16), torch.randn(4), *plain_experts(4, 16, 8, torch.float32)]
    for t in arguments[:2] + arguments[3:]:
        t.requires_grad_()
    eager = function(*arguments)
    expected = torch.autograd.grad(eager.square().sum(), arguments[:2] + arguments[3:])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    assert_same_bits(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.square().sum(), arguments[:2] + arguments[3:]), expected, strict=True):
        torch.testing.assert_close(a, b)


X, GATE, BIAS = torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(4)
IDS, HASHED = torch.zeros(3, dtype=torch.int64), torch.zeros(10, 2, dtype=torch.int64)
BY_HASH = {"bias": None, "token_ids": IDS, "tid2eid": HASHED}
FLOATS, SCALES = "bfloat16 or float32 or float64", "float8_e8m0fnu or float32"
W13, W2 = torch.zeros(4, 6, 8), torch.zeros(4, 8, 6)
WEIGHTS, INDICES = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int32)
P13, P2, S13, S2 = (torch.zeros(4, 6, 4).char(), torch.zeros(4, 8, 3).char(), torch.ones(4, 6, 1), torch.ones(4, 8, 1))
PACKED = {"w1": P13, "w3": P13, "w2": P2, "w1_scale": S13, "w3_scale": S13, "w2_scale": S2}
BAD = {
    "moe_gate": (
        {"x": X, "weight": GATE, "top_k": 2, "bias": BIAS},
        [
            ({"x": X.half()}, f"x must be {FLOATS} [tokens, hidden], got float16 [3, 8]"),
            ({"x": X[0]}, f"x must be {FLOATS} [tokens, hidden], got float32 [8]"),
            ({"x": X[:, :7]}, f"weight must be {FLOATS} [experts, 7], got float32 [4, 8]"),
            ({"weight": GATE.to(E4M3)}, f"weight must be {FLOATS} [experts, 8], got float8_e4m3fn [4, 8]"),
            ({"weight": GATE.to("meta")}, "weight must be on cpu as x is, got meta"),
            ({"top_k": 0}, "top_k must be 1 to 4, the number of experts, got 0"),
            ({"top_k": 5}, "top_k must be 1 to 4, the number of experts, got 5"),
            ({"bias": BIAS[:3]}, "bias must be float32 or float64 [4], got float32 [3]"),
            ({"bias": BIAS.bfloat16()}, "bias must be float32 or float64 [4], got bfloat16 [4]"),
            ({"token_ids": IDS}, "token_ids and tid2eid must be given together"),
            ({"tid2eid": HASHED}, "token_ids and tid2eid must be given together"),
            ({"token_ids": IDS, "tid2eid": HASHED}, "bias must be None where tid2eid chooses the experts"),
            ({**BY_HASH, "token_ids": IDS[:2]}, "token_ids must be int32 or int64 [3], got int64 [2]"),
            ({**BY_HASH, "token_ids": IDS.float()}, "token_ids must be int32 or int64 [3], got float32 [3]"),
            (
                {**BY_HASH, "tid2eid": HASHED[:, :1]},
                "tid2eid must be int32 or int64 [vocabulary, 2], got int64 [10, 1]",
            ),
        ],
    ),
    "moe_experts": (
        {"x": X, "weights": WEIGHTS, "indices": INDICES, "w1": W13, "w3": W13, "w2": W2},
        [
            ({"x": X.half()}, f"x must be {FLOATS} [tokens, hidden], got float16 [3, 8]"),
            ({"x": X.view(1, 3, 8)}, f"x must be {FLOATS} [tokens, hidden], got float32 [1, 3, 8]"),
            ({"x": X.bfloat16()}, "w1 must be bfloat16 [4, 6, 8], got float32 [4, 6, 8]"),
            ({"weights": WEIGHTS[:2]}, "weights must be float32 or float64 [3, top_k], got float32 [2, 2]"),
            ({"weights": WEIGHTS.bfloat16()}, "weights must be float32 or float64 [3, top_k], got bfloat16 [3, 2]"),
            ({"indices": INDICES[:, :1]}, "indices must be int32 or int64 [3, 2], got int32 [3, 1]"),
            ({"indices": INDICES.short()}, "indices must be int32 or int64 [3, 2], got int16 [3, 2]"),
            ({"w1": W13[0]}, "w1 must be [experts, inter, hidden], got [6, 8]"),
            ({"w3": W13[:3]}, "w3 must be float32 [4, 6, 8], got float32 [3, 6, 8]"),
            ({"w2": W13}, "w2 must be float32 [4, 8, 6], got float32 [4, 6, 8]"),
            ({"w2": W2.to("meta")}, "w2 must be on cpu as x is, got meta"),
            ({"w1": P13}, "w1 must be float32 [4, 6, 8], got int8 [4, 6, 4]"),
            ({"w1_scale": S13}, "w1 must be float8_e4m3fn or uint8 or int8 [..., out, in], got float32 [4, 6, 8]"),
            ({**PACKED, "w1_scale": S2}, f"w1_scale must be {SCALES} [4, 6, 1], got float32 [4, 8, 1]"),
            ({**PACKED, "w1": P13[:, :, :3]}, "w1 must be int8 [4, 6, 4], got int8 [4, 6, 3]"),
            ({**PACKED, "x": X[:, :7]}, "w1 in e2m1 needs an even number of inputs, got 7"),
            (
                {"shared": [P13[0, 0], P13[0, 0], P2[0, 0], S13[0, 0], S13[0, 0], S2[0, 0]]},
                "shared w1 must be [..., out, in], got 1 dimensions",
            ),
            ({**PACKED, "w2": W2.to(E4M3)}, f"w2_scale must be {SCALES} [4, 1, 1], got float32 [4, 8, 1]"),
            ({"shared": [W13[0]]}, "shared must hold 0, 3 or 6 tensors, got 1"),
            ({"shared": [W13[0], W13[0], W13[0]]}, "shared w2 must be float32 [8, 6], got float32 [6, 8]"),
            ({"shared": [W13[0].double()] * 3}, "shared w1 must be float32 [6, 8], got float64 [6, 8]"),
            ({"swiglu_limit": -1.0}, "swiglu_limit must not be negative, got -1.0"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [pytest.param(op, *fault, id=f"{op}-{i}") for op, (_, faults) in BAD.items() for i, fault in enumerate(faults)],
)
def test_bad_arguments(op, changes, message):
    assert_rejects(getattr(ops, op), BAD[op][0], f"{op}: {message}", **changes)
