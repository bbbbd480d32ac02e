"""`dsv4 bench` of ops: every one is checked, what is counted and reported."""

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dsv4
from dsv4 import _library, bench
from dsv4.bench.measure import Case, Clock, Comparison, Peaks, Timing, _threaded_copy, judge, measure_peaks
from dsv4.model.recording import Recording
from dsv4.ops import rms_norm

PEAKS = Peaks(Timing(130.0, 1.0, 100.0), 1e6, Timing(70.0, 1.0, 50.0), Timing(11.0, 1.0, 10.0), 1e9)


@pytest.fixture
def fast_bench(monkeypatch):
    """The driver with made-up peaks and a stopped clock; the checks are real."""
    monkeypatch.setattr(bench, "measure_peaks", lambda clock: PEAKS)
    monkeypatch.setattr(Clock, "time", lambda self, run: (run(), Timing(1000.0, 2.0, 990.0))[1])


KEYS = [
    "op", "impl", "device", "shape", "us", "spread", "recorded_us", "gflop", "mbyte", "roof_us", "roof_fraction",
    "error", "error_limit", "baseline", "baseline_us", "ratio",
]  # fmt: skip
MHC = ["mhc_pre", "mhc_post", "mhc_post_pre", "mhc_head", "mhc_pre_backward", "mhc_post_backward"]
# Op -> shapes at context 33, in the order of the report. Prefill of 33 rows sees 0 to 8 entries of CSA, none of HCA.
SHAPES = {
    # Each against eager torch and then against transformers.
    "sparse_attention": [
        f"{kind} {step} context=33 rows={rows} heads=8 head_dim=128 fp8"
        for kind in ("csa", "hca")
        for step, rows in (("decode", "1"), ("decode", "8 sequences=8"), ("prefill", "33"))
        for _ in range(2)
    ],
    "sparse_attention_backward": [f"{k} context=33 rows=33 heads=8 head_dim=128 bf16" for k in ("csa", "hca")],
    "index_topk": [
        f"{step} context=33 rows={rows} heads=4 dim=128 k=64 fp4"
        for step, rows in (("decode", "1"), ("decode", "8 sequences=8"), ("prefill", "33"))
        for _ in range(2)
    ],
    "fp8_linear": [
        "wq_a rows=33 in=256 out=128 fp8", "wq_b rows=33 in=128 out=1024 fp8", "wo_b rows=33 in=128 out=256 fp8",
    ],
    "grouped_linear": ["wo_a rows=33 in=512 out=64 groups=2 fp8"],
    "fp4_linear": ["w1 rows=33 in=256 out=128 fp4", "w2 rows=33 in=128 out=256 fp4"],
    "dense_linear": ["wkv rows=33 in=256 out=256 float32", "weights_proj rows=33 in=256 out=4 float32"],
    **{op: ["tokens=33 hidden=256 bf16"] for op in MHC},
    "moe_map": ["tokens=33 experts=16 top_k=2"],
    "moe_gate": ["tokens=33 hidden=256 experts=16 top_k=2 bf16"],
    "moe_experts": ["tokens=33 hidden=256 inter=128 experts=16 top_k=2 fp4"] * 4,
    "moe_experts_backward": [f"tokens=33 hidden=256 inter=128 experts=16 top_k=2 bf16{f}" for f in ("", " frozen")],
    "query_norm_rope": ["rows=33 heads=8 head_dim=128 bf16"],
    "store_window": ["rows=33 head_dim=128 fp8"],
    "compress": ["csa rows=33 ratio=4 head_dim=128 fp8"],
    "compress_entries": ["csa rows=33 ratio=4 head_dim=128 bf16"],
    "query_norm_rope_backward": ["rows=33 heads=8 head_dim=128 bf16"],
    "rms_norm_backward": ["rows=33 hidden=256 bf16"],
    "kv_norm_rope_backward": ["rows=33 head_dim=128 bf16"],
    "compress_entries_backward": ["csa rows=33 ratio=4 head_dim=128 bf16"],
    "rms_norm": ["rows=33 hidden=256 bf16"],
    "kv_norm_rope": ["rows=33 head_dim=128 bf16"],
    "apply_rope": ["rows=33 heads=4 dim=128 bf16"],
    "rope_rows": ["rows=33 rope_dim=64 f32"],
    **{op: ["rows=33 heads=4 dim=128 bf16"] for op in ("index_query", "hadamard")},
    "quantize_fp8": ["rows=33 n=256 block=128 bf16"],
    "quantize_fp4": ["rows=33 n=256 block=32 bf16"],
    "dequantize_fp8": ["rows=33 n=256 block=128 bf16"],
    "dequantize_fp4": ["rows=33 n=256 block=32 bf16"],
    "dequantize_weight": ["wq_b out=1024 in=128 fp8"],
}  # fmt: skip


def test_bench_of_every_op(run, fast_bench, tmp_path):
    code, out, err = run("bench", "--shape", "nano", "--context", 33, "--json", tmp_path / "results.jsonl")
    assert (code, err) == (0, "")
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    expected = [(op, text) for op, texts in SHAPES.items() for text in texts]
    assert [result["op"] for result in results[:3]] == ["peak_copy", "peak_float32", "peak_bfloat16"]
    assert [(result["op"], result["shape"].removeprefix("nano ")) for result in results[3:]] == expected
    for result in results:
        assert list(result) == KEYS
    for result in results[3:]:
        assert result["impl"] in dsv4.ops.implementations()[result["op"]]["cpu"]
        assert 0 <= result["error"] <= result["error_limit"] < 0.1
        missing = result["baseline"].startswith("kt-kernel FP4 not run")
        beside = (None, None) if missing else (1000.0, 1.0)
        assert (result["us"], result["baseline_us"], result["ratio"]) == (1000.0, *beside)
        repeated = result["op"] not in ("store_window", "compress") and not result["op"].endswith("_backward")
        assert result["recorded_us"] == (1000.0 if repeated else None), result["op"]
        assert result["roof_fraction"] == result["roof_us"] / 1000
        assert f"{result['op']} {result['impl']} cpu" in out


def test_bytes_and_flops_of_the_report(run, fast_bench, tmp_path):
    """Per token: pre 10 D + 80 and 208 D, post 18 D + 80 and 40 D, both 20 D + 160; fn 384 D once."""
    run("bench", *("--op=mhc_pre", "--op=mhc_post", "--op=mhc_post_pre"), "--shape=nano", "--context=64",
        "--json", tmp_path / "results.jsonl")  # fmt: skip
    pre, post, both = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[3:])
    tokens, hidden = 64, 256
    assert post["mbyte"] * 1e6 == tokens * (18 * hidden + 80)
    assert pre["mbyte"] * 1e6 == pytest.approx(tokens * (10 * hidden + 80) + 384 * hidden, rel=1e-3)
    assert both["mbyte"] * 1e6 == pytest.approx(tokens * (20 * hidden + 160) + 384 * hidden, rel=1e-3)
    assert [round(r["gflop"] * 1e9) for r in (pre, post)] == [tokens * 208 * hidden, tokens * 40 * hidden]
    # Post moves 299,008 bytes at 10,000 a microsecond; its FLOPs take less.
    assert post["roof_us"] == pytest.approx(tokens * (18 * hidden + 80) / 1e4)


def test_bytes_and_flops_of_the_attention(run, fast_bench, tmp_path):
    """A CSA row of nano attends to 128 + 64 rows of 192 + 8 bytes, an HCA row to 128 + context / 128."""
    run("bench", "--op=sparse_attention", "--op=index_topk", "--shape=nano", "--context=2048",
        "--json", tmp_path / "results.jsonl")  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[3:]]
    ours = [result for result in results if result["baseline"] == "eager torch bf16"]
    csa, csa_batch, csa_prefill, hca, hca_batch, hca_prefill, index, index_batch, index_prefill = ours
    assert [result["baseline"] for result in results] == ["eager torch bf16", "transformers"] * len(ours)
    for one, eight in ((csa, csa_batch), (hca, hca_batch), (index, index_batch)):
        assert eight["gflop"] == pytest.approx(8 * one["gflop"])
        assert eight["mbyte"] == pytest.approx(8 * one["mbyte"])
    query = 8 * 128 * 2
    assert csa["mbyte"] * 1e6 == pytest.approx((128 + 64) * 200 + 2 * query + 256 + 64 * 4)
    assert hca["mbyte"] * 1e6 == pytest.approx((128 + 16) * 200 + 2 * query + 256)
    assert csa["gflop"] * 1e9 == pytest.approx(4 * 8 * 128 * (128 + 64))
    assert hca["gflop"] * 1e9 == pytest.approx(4 * 8 * 128 * (128 + 16))
    # In a prefill each stored row counts once, however many queries read it.
    window = 127 * 128 // 2 + (2048 - 127) * 128
    assert hca_prefill["mbyte"] * 1e6 == pytest.approx((2048 + 16) * 200 + 2048 * (2 * query + 256))
    assert hca_prefill["gflop"] * 1e9 == pytest.approx(4 * 8 * 128 * (window + sum(t // 128 for t in range(1, 2049))))
    assert csa_prefill["mbyte"] * 1e6 <= (2048 + 512) * 200 + 2048 * (2 * query + 256 + 256)
    assert index["mbyte"] * 1e6 == pytest.approx(512 * 68 + 4 * 128 * 2 + 4 * 4 + 64 * 4)
    assert index["gflop"] * 1e9 == pytest.approx(258 * 4 * 512)
    assert index_prefill["gflop"] * 1e9 == pytest.approx(258 * 4 * sum(t // 4 for t in range(1, 2049)))


def test_bytes_and_flops_of_weights(run, fast_bench, tmp_path):
    """Stored bytes: FP8 one a weight and one a 128 x 128, FP4 a half and one a 32; of experts those that are used."""
    run("bench", "--op=fp8_linear", "--op=grouped_linear", "--op=fp4_linear", "--op=moe_experts", "--shape=nano",
        "--context=1", "--json", tmp_path / "results.jsonl")  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[3:]]
    wq_a, _, _, wo_a, w1, _, experts, *others = results
    baselines = [result["baseline"].split(" not run")[0] for result in (experts, *others)]
    assert baselines == ["eager torch bf16", "torch._grouped_mm bf16", "transformers", "kt-kernel FP4"]
    assert wq_a["mbyte"] * 1e6 == pytest.approx(256 * 128 + 2 + 2 * (256 + 128))
    assert wo_a["mbyte"] * 1e6 == pytest.approx(2 * 64 * 512 + 4 + 2 * 2 * (512 + 64))
    assert w1["mbyte"] * 1e6 == pytest.approx(256 * 128 * (1 / 2 + 1 / 32) + 2 * (256 + 128))
    assert experts["mbyte"] * 1e6 == pytest.approx(2 * 3 * 256 * 128 * (1 / 2 + 1 / 32) + 2 * 2 * 256)
    assert [round(result["gflop"] * 1e9) for result in (wq_a, wo_a, experts)] == [
        2 * 256 * 128, 2 * 2 * 64 * 512, 2 * 6 * 256 * 128,
    ]  # fmt: skip


def test_bytes_of_the_stores(run, fast_bench, tmp_path):
    """An FP8 row of nano takes 192 bytes and 8 of scales; 256 bytes of rope a row."""
    run("bench", "--op=query_norm_rope", "--op=store_window", "--op=compress", "--shape=nano", "--context=256",
        "--json", tmp_path / "results.jsonl")  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[3:]]
    query, window, csa, hca = (result["mbyte"] * 1e6 for result in results)
    assert query == pytest.approx(256 * (2 * 8 * 128 * 2 + 256))
    assert window == pytest.approx(256 * (2 * 128 + 256 + 200))
    # float32 values and gates and their last ratio rows as state, the bias, and an entry every ratio rows.
    assert csa == pytest.approx(256 * 2 * 1024 + 8 * 2 * 1024 + 4 * 1024 + 64 * (256 + 200))
    assert hca == pytest.approx(256 * 2 * 512 + 128 * 2 * 512 + 128 * 512 + 2 * (256 + 200))


def _scaled(result):
    return (result[0] * 1.03, result[1]) if isinstance(result, tuple) else result * 1.03


def _next_entry(chosen):
    return torch.where(chosen >= 0, chosen - 1, chosen)


def _next_code(result):
    codes = result[0].clone()
    codes.view(torch.uint8)[0, 0] ^= 1
    return codes, result[1]


def _descending(chosen):
    return chosen.flip(1)


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        ("sparse_attention", _scaled), ("fp8_linear", _scaled), ("grouped_linear", _scaled), ("fp4_linear", _scaled),
        ("moe_experts", lambda result: result * 1.1), ("index_topk", _next_entry), ("index_topk", _descending),
        ("query_norm_rope", _scaled), ("store_window", None), ("compress", None), ("rms_norm", _scaled),
        ("kv_norm_rope", _scaled), ("apply_rope", _scaled), ("rope_rows", _scaled), ("hadamard", _scaled),
        ("index_query", lambda result: result * 1.1), ("quantize_fp8", _next_code), ("quantize_fp4", _next_code),
        ("dequantize_fp8", _scaled), ("dequantize_fp4", _scaled), ("dequantize_weight", _scaled),
    ],
)  # fmt: skip
def test_bench_notices_a_wrong_result(run, fast_bench, monkeypatch, op, fault):
    right = getattr(dsv4.ops, op)
    wrong = (lambda *args, **kwargs: fault(right(*args, **kwargs))) if fault else (lambda *args, **kwargs: None)
    monkeypatch.setattr(dsv4.ops, op, wrong)
    code, out, err = run("bench", "--op", op, "--shape", "nano", "--context", 1024)
    cases = len(out.splitlines()) - 3
    assert code == 1
    assert f"{cases} failed" in err
    assert out.count("FAILED its check") == cases


@pytest.mark.parametrize("quick", [True, False])
def test_contexts_unless_told_otherwise(run, fast_bench, monkeypatch, quick):
    asked = []

    def cases(op, shape, context, device):
        asked.append((shape, context))
        return iter(())

    family = SimpleNamespace(CONTEXTS=(7, 8), QUICK_CONTEXTS=(3,), cases=cases)
    monkeypatch.setattr(bench, "families", lambda: {"mhc_post": family})
    assert run("bench", *["--quick"] * quick)[0] == 0
    assert asked == ([("nano", 3)] if quick else [("v4-flash", 7), ("v4-flash", 8)])


@pytest.mark.parametrize(
    ("op", "measured"),
    [
        ("sparse_attention", True), ("sparse_attention_backward", True), ("index_topk", False), ("compress", False),
        ("moe_experts_backward", True),
    ],
)  # fmt: skip
def test_bench_of_one_token(run, fast_bench, op, measured):
    """Nothing is compressed yet: window alone, or nothing to measure."""
    code, out, err = run("bench", "--op", op, "--shape", "nano", "--context", 1)
    assert code == 0
    assert any(line.startswith(f"{op} ") for line in out.splitlines()) == measured
    assert (f"{op}: nothing to measure for nano at context 1" in err) != measured


def test_bench_of_mhc_takes_the_rows_of_a_chunk(run, fast_bench, monkeypatch):
    """A context of a million tokens would be 8 GiB of streams even for nano."""
    monkeypatch.setattr("dsv4.bench.mhc._MOST_ROWS", 64)
    code, out, _ = run("bench", "--op", "mhc_post", "--op", "mhc_post_backward", "--shape", "nano", "--context", "1M")
    assert code == 0
    assert out.count(" nano tokens=64 hidden=256 ") == 2


def case(result, eager, exact, floor=1e-6):
    outputs = [Comparison(torch.tensor(result), torch.tensor(eager), torch.tensor(exact, dtype=torch.float64))]
    return Case("mhc_post", "x", lambda: None, "eager", lambda: None, lambda: outputs, 1.0, 1.0, "float32", floor)


@pytest.mark.parametrize(
    ("result", "passes"),
    [([1.0, 2.0], True), ([1.0, 2.015], True), ([1.0, 2.03], False), ([0.0, 0.0], False), ([1.0, float("nan")], False)],
)
def test_judge(result, passes):
    error, limit = judge(case(result, [1.0, 2.01], [1.0, 2.0]))
    assert (error <= limit) == passes


def test_no_time_where_the_check_failed(run, fast_bench, tmp_path, monkeypatch):
    failing = case([1.0, 3.0], [1.0, 2.0], [1.0, 2.0])
    family = SimpleNamespace(CONTEXTS=(1,), cases=lambda *_: iter([failing]))
    monkeypatch.setattr(bench, "families", lambda: {"mhc_post": family})
    code, out, err = run("bench", "--op", "mhc_post", "--json", tmp_path / "results.jsonl")
    last = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert code == 1
    assert "1 failed" in err
    assert "FAILED its check" in out.splitlines()[-1]
    assert " us" not in out.splitlines()[-1]
    assert [last[key] for key in ("us", "spread", "roof_fraction", "baseline_us", "ratio")] == [None] * 5
    assert last["error"] > last["error_limit"]


def test_peaks_decide_the_roof():
    both = case([1.0], [1.0], [1.0])
    assert PEAKS.bytes_per_us == 1e4
    assert PEAKS.flops_per_us("bfloat16") == 1e8
    assert PEAKS.flops_per_us("float32") == 5e7  # two BF16 products replace one in float32
    assert PEAKS.roof_us(both) == 1e-4


def test_units_are_measured_twice(monkeypatch):
    """A program beside one of the two measurements does not lower the roof."""
    monkeypatch.setattr(Clock, "time", lambda self, run: Timing(1.0, 0.0, 1.0))
    clock = Clock(torch.device("cpu"), quick=True)
    found = iter([{"float32": 1.0, "bfloat16": 4.0}, {"float32": 2.0, "bfloat16": 3.0}, None, None])
    monkeypatch.setattr(_library, "unit_peaks", lambda threads: next(found))
    assert measure_peaks(clock).units == {"float32": 2.0, "bfloat16": 4.0}
    assert measure_peaks(clock).units is None


def test_threads_that_cannot_be_started(run, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    code, out, err = run("bench", "--quick", "--op", "rms_norm")
    assert (code, out) == (2, "")
    assert err == (
        "dsv4 bench: cannot work on 3 threads (can't start new thread); raise the limit of processes (ulimit -u), or "
        "set OMP_NUM_THREADS=1\n"
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert measure_peaks(Clock(torch.device("cpu"), quick=True)).copy.us > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_threaded_copy(threads):
    source, target = np.arange(10, dtype=np.uint8), np.zeros(10, dtype=np.uint8)
    _threaded_copy(source, target, threads)
    assert (source == target).all()


def test_recorded_time_has_no_python_in_it(run, monkeypatch, tmp_path):
    """The share of the roof is that of the kernels; the comparison with the baseline is of two calls from Python."""
    monkeypatch.setattr(bench, "measure_peaks", lambda clock: PEAKS)
    monkeypatch.setattr(
        Clock, "time", lambda self, run: (run(), Timing(200.0 if isinstance(run, Recording) else 400.0, 1.0, 1.0))[1]
    )
    assert run("bench", "--op", "rms_norm", "--op", "mhc_pre_backward", "--shape", "nano", "--context", 5, "--json",
               tmp_path / "results.jsonl")[0] == 0  # fmt: skip
    short, gradient = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[3:])
    assert [short[key] for key in ("us", "recorded_us", "ratio")] == [400.0, 200.0, 1.0]
    assert short["roof_fraction"] == short["roof_us"] / 200
    assert "| recorded 200.0 us |" in bench.line(short)
    assert gradient["recorded_us"] is None
    assert gradient["roof_fraction"] == gradient["roof_us"] / 400


def test_recorded_time_is_that_of_the_kernels():
    clock = Clock(torch.device("cpu"), quick=True)
    x, weight = torch.ones(64, 512), torch.ones(512)
    with torch.inference_mode():
        recording = Recording(lambda: rms_norm(x, weight))
        started = time.perf_counter()
        inside = recording.time_kernels()
        outside = (time.perf_counter() - started) * 1e6
        assert inside is not None and 0 < inside < outside
        assert torch.equal(recording.result, rms_norm(x, weight))
        assert Recording(lambda: rms_norm(x, weight) * 2).time_kernels() is None  # torch's product is among them
        assert clock.time(recording).us > 0


def test_what_cannot_be_repeated_has_no_recorded_time():
    clock = Clock(torch.device("cpu"), quick=True)
    values = torch.ones(4)
    with torch.inference_mode():
        assert clock.time_recorded(lambda: values * 2) is not None
        assert clock.time_recorded(lambda: None) is None
        assert clock.time_recorded(lambda: (values * 2) * float((values * 2).sum())) is None


def test_recorded_call_that_differs_is_given_no_time():
    values, calls = torch.ones(4), []

    def changes():
        calls.append(None)
        return values * len(calls)

    with torch.inference_mode(), pytest.raises(RuntimeError, match="other values than the call itself"):
        Clock(torch.device("cpu"), quick=True).time_recorded(changes)


def test_clock():
    calls = []
    clock = Clock(torch.device("cpu"), quick=True)
    timing = clock.time(lambda: calls.append(time.sleep(0.004 if len(calls) % 2 else 0.002)))
    assert len(calls) == 4, "one to warm up, three that count"
    assert 2000 <= timing.fastest <= timing.us
    assert timing.us >= 4000, "the median of 4, 2 and 4 ms"
