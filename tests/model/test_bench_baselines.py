"""What attention, index and experts are timed beside: the same rows, in eager torch and in transformers."""

import json

import pytest
import torch

from dsv4 import bench, cli, ops
from dsv4.bench import attention, index, linear, moe, pages, transformers_cores
from dsv4.bench.library_products import against_scaled_mm
from dsv4.bench.measure import Clock, Peaks, Timing
from dsv4.testing import relative_rms

PEAKS = Peaks(Timing(130.0, 1.0, 100.0), 1e6, Timing(70.0, 1.0, 50.0), Timing(11.0, 1.0, 10.0), 1e9)


@pytest.mark.parametrize("context", [33, 700])
def test_attention_of_transformers_is_the_op(context):
    """Decode, eight sequences of it, and prefill, of both kinds: bfloat16 rounding apart."""
    found = [
        case for case in attention.cases("", "nano", context, torch.device("cpu")) if case.baseline != "transformers"
    ]
    theirs = [
        case for case in attention.cases("", "nano", context, torch.device("cpu")) if case.baseline == "transformers"
    ]
    assert len(found) == len(theirs) == 6
    for case, other in zip(found, theirs, strict=True):
        expected, result = case.run(), other.run_baseline().flatten(0, 1)
        assert (result.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()
        eager = torch.cat(case.run_baseline())
        assert (eager.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()


@pytest.mark.parametrize("context", [200, 1500])
def test_index_of_transformers_is_the_op(context):
    """Up to the few entries whose scores bfloat16 weights reorder."""
    for case in index.cases("", "nano", context, torch.device("cpu")):
        if case.baseline != "transformers":
            continue
        chosen, theirs = case.run(), case.run_baseline().flatten(0, 1)
        assert len(chosen) == len(theirs)
        for row, other in zip(chosen.tolist(), theirs.tolist(), strict=True):
            ours, others = {*row} - {-1}, {*other} - {-1}
            assert len(ours) == len(others)
            assert len(ours & others) >= 0.8 * len(ours)


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_of_transformers_are_the_op(tokens):
    """On unquantised activations, and with the routing weight after the down projection: a few per cent apart."""
    case, _, other, _ = moe.cases("moe_experts", "nano", tokens, torch.device("cpu"))
    assert (case.baseline, other.baseline) == ("eager torch bf16", "transformers")
    expected, eager, theirs = case.run().float(), case.run_baseline().float(), other.run_baseline().float()
    assert relative_rms(theirs, eager).max() <= 0.01
    assert relative_rms(theirs, expected).max() <= 0.06


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_of_kt_kernel_are_the_op(tokens):
    """Its activations are not quantised: a few per cent apart. Without it the line says how to get it."""
    case, *_, other = moe.cases("moe_experts", "nano", tokens, torch.device("cpu"))
    if other.run_baseline is None:
        assert other.baseline == "kt-kernel FP4 not run: pip install --no-deps kt-kernel==0.7.2 gguf"
        pytest.skip("not run: kt-kernel is not installed")
    assert relative_rms(other.run_baseline().float(), case.run().float()).max() <= 0.06
    assert (torch.tensor(1e-40) * 0.5).item() > 0, "kt-kernel left denormals flushed for the whole process"


@pytest.mark.parametrize("tokens", [1, 9])
def test_grouped_products_are_the_op(tokens):
    """On unquantised activations; beside transformers' rounding of the routing weights, the same sums."""
    case, other, *_ = moe.cases("moe_experts", "nano", tokens, torch.device("cpu"))
    assert other.baseline == "torch._grouped_mm bf16"
    grouped, eager = other.run_baseline().float(), case.run_baseline().float()
    assert relative_rms(grouped, eager).max() <= 0.01


def _scaled_mm(a, b, a_scale, b_scale, out_dtype):
    """torch's, for scales of 1 x 128 and 128 x 128 in the strides that cuBLAS takes."""
    (rows, inner), outputs = a.shape, b.shape[1]
    blocks, padded = inner // 128, -(-inner // 128 // 4) * 4
    assert (a.dtype, b.dtype, a_scale.dtype, b_scale.dtype) == (*[torch.float8_e4m3fn] * 2, *[torch.float32] * 2)
    assert a.is_contiguous() and b.mT.is_contiguous()
    assert (a_scale.shape, a_scale.stride()) == ((rows, blocks), (1, rows))
    assert (b_scale.mT.shape, b_scale.mT.stride()) == ((-(-outputs // 128), blocks), (padded, 1))
    a_wide = a_scale.repeat_interleave(128, 1)
    b_wide = b_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :outputs]
    return ((a.float() * a_wide) @ (b.float() * b_wide)).to(out_dtype)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 128), (640, 200)])
def test_scaled_product_is_the_op(rows, inputs, outputs, monkeypatch):
    torch.manual_seed(3)
    x, (weight, scale) = torch.randn(rows, inputs).bfloat16(), linear.draw_weight("fp8", outputs, inputs)

    def against():
        return against_scaled_mm(x, weight, scale, lambda: ops.fp8_linear(x, weight, scale))

    # torch itself: of whole matrices on a CPU.
    assert against()["run_baseline"] is None and against()["baseline"].startswith("torch._scaled_mm not run: ")
    monkeypatch.setattr(torch, "_scaled_mm", _scaled_mm)
    assert against()["baseline"] == "torch._scaled_mm" and against()["run_baseline"] is not None
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: 1.1 * _scaled_mm(*args, **kwargs))
    assert against() == {"baseline": "torch._scaled_mm not run: differs by 1.0e-01", "run_baseline": None}


def test_batch_of_other_sequences():
    """Each of the eight has pages and indices of its own: their rows differ, and one alone gives its row."""
    case = next(c for c in attention.cases("", "nano", 300, torch.device("cpu")) if "sequences=8" in c.shape)
    rows = case.run()
    assert len(rows) == 8
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 8
    for row, alone in zip(rows, case.run_baseline(), strict=True):
        assert (alone[0].float() - row.float()).abs().max() <= 0.02 * row.float().abs().max()


@pytest.fixture
def results(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "measure_peaks", lambda clock: PEAKS)
    monkeypatch.setattr(Clock, "time", lambda self, run: (run(), Timing(1000.0, 2.0, 990.0))[1])

    def call():
        file = tmp_path / "results.jsonl"
        assert cli.main(["bench", "--op=index_topk", "--shape=nano", "--context=256", "--json", str(file)]) == 0
        return [json.loads(line) for line in file.read_text().splitlines()[3:]], capsys.readouterr().out

    return call


def test_without_transformers(results, monkeypatch):
    find = transformers_cores.importlib.util.find_spec
    monkeypatch.setattr(
        transformers_cores.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    lines, out = results()
    assert [line["baseline"] for line in lines[1::2]] == ["transformers not run: install dsv4[peers]"] * 3
    for line in lines[1::2]:
        assert line["baseline_us"] is line["ratio"] is None
        assert line["us"] == 1000.0
    assert out.count("transformers not run: install dsv4[peers] | ok") == 3


def test_without_the_memory(results, monkeypatch):
    monkeypatch.setattr(transformers_cores, "free_bytes", lambda device: 1000)
    lines, _ = results()
    assert [line["baseline_us"] is None for line in lines] == [False, True, False, True, False, True]
    assert lines[-1]["baseline"].startswith("transformers not run: needs ")


def test_sizes():
    """A prefill step is whole up to 64K; batches shrink where memory would not hold them."""
    assert pages.prefill_rows(65536, 2.0**40) == 2048
    assert pages.prefill_rows(100, 1.0) == 100
    assert pages.prefill_rows(1 << 20, 2.0**28) == 256
    assert [pages.batch(8, nbytes) for nbytes in (1 << 20, 1 << 30, 1 << 40)] == [8, 4, 2]
    assert [pages.batch(64, nbytes) for nbytes in (1 << 20, 1 << 28, 1 << 30)] == [64, 16, 0]
    assert [pages.batch(wanted, 1 << 40) for wanted in (1, None)] == [1, 1]
    assert [pages.steps(torch.device(kind)) for kind in ("cpu", "cuda")] == [(1, 8, None), (1, 8, 64, None)]
