"""mHC: every implementation that this machine has against the float64 definition, its gradients, its refusals."""

import json
from pathlib import Path

import pytest
import torch
from mhc_cases import (
    EAGER,
    LAYOUTS,
    NORMS,
    X,
    arguments,
    assert_as_accurate_as_torch,
    norm_dtype,
    problems,
    results,
)
from safetensors.torch import load_file

import dsv4.ops as ops
from dsv4 import _library
from dsv4.ops import _mhc_checks as checks
from dsv4.testing import (
    Guarded,
    assert_rejects,
    assert_rows_independent,
    assert_same_bits,
    check_op,
    grid,
    implementation_cases,
    max_isa,
)

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
EPS = {"norm_eps": 1e-6, "hc_eps": 1e-6}


def check_forward(op, implementation, case, norm=None):
    made = problems(op, case["tokens"], case["hidden"], case["dtype"], norm)
    outcomes = []
    for problem in made:
        given = [value if value is None else LAYOUTS[case["layout"]](value) for value in problem.values]
        before = [value if value is None else value.clone() for value in given]
        with max_isa(implementation):
            actual = results(getattr(ops, op)(*given))
            if _library.last_implementation(op) != implementation:
                assert implementation == "amx" and case["dtype"] == torch.float32
        for value, kept in zip(given, before, strict=True):
            assert value is None or torch.equal(value, kept)
        for a, e in zip(actual, problem.exact, strict=True):
            assert a.shape == e.shape and a.is_contiguous()
        outcomes.append(actual)
        if op == "mhc_post_pre":
            # the streams are rounded before they are read again: it must equal the two ops, whose error is checked
            with max_isa(implementation):
                new = ops.mhc_post(*given[:4])
                for a, b in zip(actual, (new, *ops.mhc_pre(new, *given[4:])), strict=True):
                    assert_same_bits(a, b)
    if op != "mhc_post_pre":
        assert_as_accurate_as_torch(made, outcomes, implementation == "amx")


CASES = grid(
    tokens=[0, 1, 2, 15, 16, 17, 33],
    hidden=[1, 31, 32, 33, 64, 192],
    dtype=[torch.bfloat16, torch.float32],
    layout=list(LAYOUTS),
)
WIDE = grid(tokens=[1, 3, 13], hidden=[4096, 7168, 511, 1025], dtype=[torch.bfloat16, torch.float32], layout=["padded"])


@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre"))
@pytest.mark.parametrize("case", CASES + WIDE)
def test_mhc_pre(implementation, case):
    norm = norm_dtype(NORMS[(case["tokens"] + case["hidden"]) % 3], case["dtype"])
    check_forward("mhc_pre", implementation, case, norm)


@pytest.mark.parametrize("implementation", implementation_cases("mhc_post"))
@pytest.mark.parametrize("case", CASES + WIDE)
def test_mhc_post(implementation, case):
    check_forward("mhc_post", implementation, case)


@pytest.mark.parametrize("implementation", implementation_cases("mhc_post_pre"))
@pytest.mark.parametrize("case", CASES + WIDE)
def test_mhc_post_pre(implementation, case):
    norm = norm_dtype(NORMS[(case["tokens"] + case["hidden"]) % 3], case["dtype"])
    check_forward("mhc_post_pre", implementation, case, norm)


@pytest.mark.parametrize("implementation", implementation_cases("mhc_head"))
@pytest.mark.parametrize("case", CASES + WIDE)
def test_mhc_head(implementation, case):
    check_forward("mhc_head", implementation, case)


@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre"))
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.0])
@pytest.mark.parametrize("rounds", [1, 2, 7, 20, 40])
def test_settings(implementation, rounds, eps):
    settings = (10 * eps, eps, rounds, 3 * eps)
    made = problems("mhc_pre", 9, 96, torch.float32, torch.float32, settings=settings)
    with max_isa(implementation):
        outcomes = [ops.mhc_pre(*problem.values, *settings) for problem in made]
    assert_as_accurate_as_torch(made, outcomes, implementation == "amx")


@pytest.mark.parametrize("op", list(EAGER))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre"))
def test_rows_are_independent(implementation, dtype, op):
    if op == "mhc_post" and implementation == "amx":
        pytest.skip("not run: mhc_post has no amx implementation")
    values = arguments(op, 41, 160, dtype, dtype)
    rows = {name: value for name, value in values.items() if name in ("sublayer", "streams", "post", "comb")}
    fixed = {name: value for name, value in values.items() if name not in rows}

    def run(*parts):
        return getattr(ops, op)(**dict(zip(rows, parts, strict=True)), **fixed)

    with max_isa(implementation):
        assert_rows_independent(run, list(rows.values()), cuts=(1, 2, 16, 17, 5))
        one = results(run(*rows.values()))
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for a, b in zip(results(run(*rows.values())), one, strict=True):
                    assert_same_bits(a, b)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("op", list(EAGER))
@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre"))
def test_a_token_of_nan_stays_alone_and_nothing_is_written_beside_inputs(implementation, op):
    values = arguments(op, 19, 70, X, X)
    with max_isa(implementation):
        clean = results(getattr(ops, op)(**values))
        guards = {name: Guarded(value) for name, value in values.items()}
        poisoned = {name: guard.tensor for name, guard in guards.items()}
        poisoned["streams"][7] = torch.nan
        poisoned["streams"][8, 2, 3] = torch.inf
        actual = results(getattr(ops, op)(**poisoned))
    for guard in guards.values():
        guard.check()
    others = [t for t in range(19) if t not in (7, 8)]
    for a, b in zip(actual, clean, strict=True):
        assert_same_bits(a[others], b[others])
        assert torch.isnan(a[7]).any()


@pytest.mark.parametrize("op", ["mhc_pre", "mhc_post", "mhc_head"])
@pytest.mark.parametrize("implementation", implementation_cases("mhc_head"))
def test_offsets_beyond_31_bits(implementation, op):
    stride = 74_899 * 4 * 7168  # elements between two tokens: beyond 2^31; only their own pages exist
    memory = torch.empty(stride + 4 * 7168, dtype=X)
    values = arguments(op, 2, 7168)
    far = memory.as_strided((2, 4, 7168), (stride, 7168, 1))
    far.copy_(values["streams"])
    with max_isa(implementation):
        near = results(getattr(ops, op)(**values))
        for a, b in zip(results(getattr(ops, op)(**{**values, "streams": far})), near, strict=True):
            assert_same_bits(a, b)


# Golden data.


@pytest.mark.parametrize(
    ("name", "rounds", "eps"), [("it1_eps1e-2", 1, 1e-2), ("it7_eps1e-3", 7, 1e-3), ("it20_eps1e-6", 20, 1e-6)]
)
@pytest.mark.parametrize("implementation", ["reference", *implementation_cases("mhc_pre")])
def test_sinkhorn_of_the_official_program(implementation, name, rounds, eps):
    golden = load_file(GOLDEN / "ops" / "ops.safetensors")
    mixes, scale, base = golden["sinkhorn.mixes"][0], golden["sinkhorn.scale"], golden["sinkhorn.base"]
    pre, post, comb = (golden[f"sinkhorn.{name}.{part}"][0] for part in ("pre", "post", "comb"))
    if implementation == "reference":
        result = ops.mhc_weights_reference(mixes, scale, base, eps, rounds)
        for actual, expected in zip(result, (pre, post, comb), strict=True):
            assert (actual - expected).abs().max() <= 1e-6
        return
    # Streams of 28 values whose root mean square is 1: the 24 mixes, shrunk to leave room, and what fills up the rest.
    # fn undoes the shrinking, so that fn r / rms(r) are the mixes.
    shrink = 0.9 * 28**0.5 / mixes.double().norm(dim=-1).max()
    small = mixes.double() * shrink
    fill = ((28 - small.square().sum(-1, keepdim=True)) / 4).sqrt().expand(-1, 4)
    streams = torch.cat([small, fill], -1).float().view(-1, 4, 7)
    fn = torch.cat([torch.eye(24), torch.zeros(24, 4)], -1) / shrink.float()
    with max_isa(implementation):
        mixed, actual_post, actual_comb = ops.mhc_pre(streams, fn, scale, base, None, 0.0, eps, rounds)
    assert (actual_post - post).abs().max() <= 1e-6
    assert (actual_comb - comb).abs().max() <= 1e-6
    assert (mixed - (pre.unsqueeze(-1) * streams).sum(1)).abs().max() <= 2e-6


@pytest.mark.parametrize("case", ["dev_a", "dev_b", "dev_c"])
@pytest.mark.parametrize("implementation", implementation_cases("mhc_pre"))
def test_a_block_of_the_official_program(implementation, case):
    config = json.loads((GOLDEN / case / "config.json").read_text())
    weights = load_file(GOLDEN / case / "model.safetensors")
    golden = load_file(GOLDEN / case / "intermediates_fp32.safetensors")

    def values(name):
        return golden[f"full.prefill.layers.0.{name}"][0]

    def mixing(part):
        names = [f"layers.0.hc_{part}_{name}" for name in ("fn", "scale", "base")]
        return [*(weights[name].float() for name in names), weights[f"layers.0.{part}_norm.weight"].float()]

    eps = config["rms_norm_eps"]
    settings = (eps, config["hc_eps"], config["hc_sinkhorn_iters"], eps)
    with max_isa(implementation):
        ids = load_file(GOLDEN / case / "inputs.safetensors")["full.input_ids"][0, : len(values("attn.in"))].long()
        streams = weights["embed.weight"][ids].float().unsqueeze(1).repeat(1, 4, 1)
        attn_in, post, comb = ops.mhc_pre(streams, *mixing("attn"), *settings)
        torch.testing.assert_close(post, values("hc_attn.post"), rtol=0, atol=2e-6)
        torch.testing.assert_close(comb, values("hc_attn.comb"), rtol=0, atol=2e-6)
        torch.testing.assert_close(attn_in, values("attn.in"), rtol=1e-5, atol=1e-5)
        streams, ffn_in, post, comb = ops.mhc_post_pre(
            values("attn.out"), streams, post, comb, *mixing("ffn"), *settings
        )
        torch.testing.assert_close(ffn_in, values("ffn.in"), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(comb, values("hc_ffn.comb"), rtol=0, atol=2e-6)
        out = ops.mhc_post(values("ffn.out"), streams, post, comb)
        torch.testing.assert_close(out, values("block_out"), rtol=1e-5, atol=1e-5)


# What the ops refuse, in these words. The fake kernels, here on the meta device, say the same.


def bad_streams(op):
    wanted = f"{op}: streams must be bfloat16 or float32 [tokens, 4, hidden], got"
    return [
        ({"streams": torch.randn(9, 3, 8).to(X)}, f"{wanted} bfloat16 [9, 3, 8]"),
        ({"streams": torch.randn(9, 4, 8).double()}, f"{wanted} float64 [9, 4, 8]"),
        ({"streams": torch.randn(9, 32).to(X)}, f"{wanted} bfloat16 [9, 32]"),
        ({"streams": None}, f"{wanted} None"),
    ]


def bad_post(op):
    return [
        ({"sublayer": torch.randn(9, 7).to(X)}, f"{op}: sublayer must be bfloat16 [9, 8], got bfloat16 [9, 7]"),
        ({"sublayer": torch.randn(9, 8)}, f"{op}: sublayer must be bfloat16 [9, 8], got float32 [9, 8]"),
        ({"post": torch.rand(9, 4).to(X)}, f"{op}: post must be float32 [9, 4], got bfloat16 [9, 4]"),
        ({"post": torch.rand(8, 4)}, f"{op}: post must be float32 [9, 4], got float32 [8, 4]"),
        ({"comb": torch.rand(9, 16)}, f"{op}: comb must be float32 [9, 4, 4], got float32 [9, 16]"),
        ({"comb": torch.rand(9, 4, 4).half()}, f"{op}: comb must be float32 [9, 4, 4], got float16 [9, 4, 4]"),
    ]


def bad_mixing(op):
    mixes, scales = (4, 1) if op == "mhc_head" else (24, 3)
    return [
        ({"fn": None}, f"{op}: fn must be float32 [{mixes}, 32], got None"),
        ({"fn": torch.randn(mixes, 8)}, f"{op}: fn must be float32 [{mixes}, 32], got float32 [{mixes}, 8]"),
        ({"fn": torch.randn(mixes, 32).to(X)}, f"{op}: fn must be float32 [{mixes}, 32], got bfloat16 [{mixes}, 32]"),
        ({"scale": torch.rand(4)}, f"{op}: scale must be float32 [{scales}], got float32 [4]"),
        ({"base": torch.rand(mixes).int()}, f"{op}: base must be float32 [{mixes}], got int32 [{mixes}]"),
        ({"hc_eps": -1.0}, f"{op}: hc_eps must be finite and not negative, got -1"),
        ({"norm_eps": float("inf")}, f"{op}: norm_eps must be finite and not negative, got inf"),
    ]


def bad_norm(op):
    return [
        ({"norm_weight": torch.rand(9)}, f"{op}: norm_weight must be bfloat16 or float32 [8], got float32 [9]"),
        ({"sinkhorn_iterations": 0}, f"{op}: sinkhorn_iterations must be from 1 to 1048576, got 0"),
        ({"sinkhorn_iterations": 2**20 + 1}, f"{op}: sinkhorn_iterations must be from 1 to 1048576, got 1048577"),
        ({"sinkhorn_iterations": 2**31}, f"{op}: sinkhorn_iterations must be from 1 to 1048576, got 2147483648"),
        ({"rms_eps": -2.5}, f"{op}: rms_eps must be finite and not negative, got -2.5"),
    ]


BAD = {
    "mhc_pre": [*bad_streams("mhc_pre"), *bad_mixing("mhc_pre"), *bad_norm("mhc_pre")],
    "mhc_post": [*bad_streams("mhc_post"), *bad_post("mhc_post")],
    "mhc_post_pre": [
        *bad_streams("mhc_post_pre"), *bad_post("mhc_post_pre"), *bad_mixing("mhc_post_pre"), *bad_norm("mhc_post_pre"),
    ],
    "mhc_head": [*bad_streams("mhc_head"), *bad_mixing("mhc_head")],
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("op", "changes", "message"), [pytest.param(op, c, m, id=m) for op, cases in BAD.items() for c, m in cases]
)
def test_refusals(op, changes, message, device):
    def place(values):
        return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values.items()}

    assert_rejects(getattr(ops, op), place(arguments(op, 9, 8, X, X)), message, **place(changes))


def test_backward_refusals():
    values = arguments("mhc_pre", 9, 8)
    grads = {"grad_input": torch.randn(9, 8).to(X), "grad_post": torch.randn(9, 4), "grad_comb": torch.randn(9, 4, 4)}
    settings = {**EPS, "sinkhorn_iterations": 20, "rms_eps": 1e-6}
    for device in ("cpu", "meta"):
        good = {**grads, "grad_residual": None, **values, **settings}
        good = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in good.items()}
        for name, bad, message in (
            ("grad_input", torch.randn(9, 8), "grad_input must be bfloat16 [9, 8], got float32 [9, 8]"),
            ("grad_post", torch.randn(9, 5), "grad_post must be float32 [9, 4], got float32 [9, 5]"),
            ("grad_comb", torch.randn(8, 4, 4), "grad_comb must be float32 [9, 4, 4], got float32 [8, 4, 4]"),
            ("grad_residual", torch.randn(9, 4, 8), "grad_residual must be bfloat16 [9, 4, 8], got float32 [9, 4, 8]"),
        ):
            message = f"mhc_pre_backward: {message}"
            assert_rejects(torch.ops.dsv4.mhc_pre_backward, good, message, **{name: bad.to(device)})


def test_no_hidden_width_is_refused():
    for device in ("cpu", "meta"):
        values = [v.to(device) for v in arguments("mhc_post", 2, 0).values()]
        with pytest.raises(RuntimeError, match="mhc_post: hidden must be at least 1, got 0"):
            ops.mhc_post(*values)


# torch's own machinery.

REGISTERED = ("mhc_pre", "mhc_post", "mhc_post_pre", "mhc_head")
REGISTERED_BACKWARD = ("mhc_pre_backward", "mhc_post_backward", "mhc_head_backward")


@pytest.mark.parametrize("norm", [None, X, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", REGISTERED)
def test_opcheck(op, dtype, norm):
    if norm == X and dtype == torch.float32:
        norm = torch.float32
    values = arguments(op, 5, 24, dtype, norm).values()
    check_op(getattr(torch.ops.dsv4, op), *[v if v is None else v.requires_grad_() for v in values])
    check_op(getattr(torch.ops.dsv4, op), *[v if v is None else v.detach() for v in values])


@pytest.mark.parametrize("op", REGISTERED_BACKWARD)
def test_opcheck_backward(op):
    grads = [torch.randn(5, 24).to(X)]
    forward = op.removesuffix("_backward")
    tail = [*EPS.values()]
    if op == "mhc_post_backward":
        grads, tail = [torch.randn(5, 4, 24).to(X)], []
    if op == "mhc_pre_backward":
        grads += [torch.randn(5, 4), torch.randn(5, 4, 4), torch.randn(5, 4, 24).to(X)]
        tail += [20, 1e-6]
    for needs_fn in [[]] if op == "mhc_post_backward" else [[True], [False]]:
        check_op(getattr(torch.ops.dsv4, op), *grads, *arguments(forward, 5, 24, X, X).values(), *tail, *needs_fn)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_block_equals_eager(backend):
    linear = torch.nn.Linear(64, 64, dtype=X)
    values = arguments("mhc_pre", 11, 64, X, X)
    streams, mixing = values.pop("streams"), list(values.values())

    def block(streams):
        mixed, post, comb = ops.mhc_pre(streams, *mixing)
        streams, mixed, post, comb = ops.mhc_post_pre(linear(mixed), streams, post, comb, *mixing)
        return ops.mhc_post(linear(mixed), streams, post, comb)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    grads = []
    for function in (block, compiled):
        leaf = streams.clone().requires_grad_()
        out = function(leaf)
        out.square().sum().backward()
        grads.append((out.detach(), leaf.grad))
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)
    torch._dynamo.reset()


def test_python_checks_know_every_op():
    assert {f"check_{op.removeprefix('mhc_')}" for op in (*REGISTERED, *REGISTERED_BACKWARD)} <= set(dir(checks))
