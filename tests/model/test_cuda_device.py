"""The whole model on a CUDA device, the machine's own or one that the host plays (cuda_device.py): the package's CUDA
kernels and the flow around them, against the golden cases and the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_cases import DTYPES, attention_case, on_device
from cuda_device import GPU, HOPPER, NO_DEVICE, WHY_NOT, Device, DeviceTensor, cuda_device
from golden import ROOT, Run, attention_calls, attention_errors, feed, feed_forward_errors, rel_rms, runs, tensors
from golden import model as cpu_model
from torch import Tensor
from torch.utils import _pytree

import dsv4
from dsv4.checkpoint.loader import BUNDLED
from dsv4.generation.tokenizer import Tokenizer
from dsv4.nn import Rows
from dsv4.ops.layout import allocate_key_pages, write_keys
from dsv4.testing import assert_same_bits
from dsv4.testing.checks import max_isa

pytestmark = pytest.mark.skipif(NO_DEVICE, reason=WHY_NOT)
of_the_played_device = pytest.mark.skipif(GPU, reason="not run: of the device that the host plays alone")

needs_hopper = pytest.mark.skipif(not HOPPER, reason="not run: no Hopper GPU, and no nvcc for its kernels' PTX")

# What a step of a model with all kinds of layers runs.
STEP_OPS = {
    "compress",
    "dense_linear",
    "fp8_linear",
    "grouped_linear",
    "index_query",
    "index_topk",
    "mhc_head",
    "mhc_post",
    "mhc_post_pre",
    "mhc_pre",
    "moe_experts",
    "moe_gate",
    "query_norm_rope",
    "rms_norm",
    "rope_rows",
    "sparse_attention",
    "store_window",
}
FULL = [run for run in runs() if run.name == "full"]
SOME = FULL[0].ids[:, :22]
# Widths of nano and one layer of each kind.
KINDS = replace(dsv4.Config.preset("nano"), num_hidden_layers=4, compress_ratios=(0, 0, 4, 128))


@pytest.fixture
def device() -> Iterator[Device]:
    with torch.no_grad(), cuda_device() as device:
        yield device


@pytest.fixture(scope="module")
def in_one_piece() -> Tensor:
    """Logits of SOME, in host memory."""
    with torch.no_grad(), cuda_device():
        return feed(dsv4.load(ROOT / "dev_a", device="cuda"), SOME, [22]).cpu()


def steps(run: Run) -> list[int]:
    return [run.prompt] + [1] * (run.length - run.prompt)


@pytest.mark.parametrize("run", FULL, ids=str)
def test_checkpoint(run: Run, device: Device) -> None:
    """Only the bulk of the logits can be compared; here: that every op has its kernel and nobody waits."""
    model = dsv4.load(ROOT / run.case, device="cuda")
    before = device.calls()
    device.waits.clear()
    logits = feed(model, run.ids, steps(run))
    assert logits.is_cuda and {op for op, count in device.calls().items() if count > before[op]} == STEP_OPS
    assert not device.references and not device.waits
    errors = rel_rms(logits.cpu(), tensors(run.case, "expected_quant")[f"{run.name}.logits"])
    assert errors.median() <= 0.10


@pytest.mark.parametrize("run", FULL, ids=str)
def test_sublayers(run: Run, device: Device) -> None:
    """Recorded inputs of every attention and every mixture of experts: as near to the recorded outputs as the CPU must
    be, and the CPU's own selections."""
    model, cpu = (dsv4.load(ROOT / run.case, device=where) for where in ("cuda", "cpu"))
    for layer in range(len(model.layers)):
        calls, cpu_calls = (attention_calls(where, layer, run) for where in (model, cpu))
        errors = attention_errors(calls, layer, run, model.config.sliding_window)
        assert errors is not None and errors.median() <= 0.02 and errors.max() <= 0.05, layer
        for (phase, got, chosen), (_, expected, cpu_chosen) in zip(calls, cpu_calls, strict=True):
            assert rel_rms(got, expected).max() <= 5e-3, (layer, phase)
            if cpu_chosen is not None:
                assert chosen is not None and torch.equal(chosen, cpu_chosen), (layer, phase)
    for errors in feed_forward_errors(model, run):
        assert len(errors) >= run.prompt // 2 and errors.median() <= 0.01 and errors.max() <= 0.03


class Selections:
    """What the routers and indexers of a model choose, in order."""

    def __init__(self, model: dsv4.Transformer):
        self.taken: list[Tensor] = []
        for block in model.layers:
            block.ffn.gate.register_forward_hook(lambda _m, _i, output: self.taken.append(output[1].cpu()))
            if block.attn.indexer is not None:
                block.attn.indexer.register_forward_hook(lambda _m, _i, output: self.taken.append(output.cpu()))


@pytest.mark.parametrize("run", FULL, ids=str)
def test_off_float32(run: Run, device: Device) -> None:
    selected, before = [], device.calls()["sparse_attention"]
    for where in ("cuda", "cpu"):
        model = dsv4.load(ROOT / run.case, device=where, quantization="off", dtype=torch.float32)
        selections = Selections(model)
        logits = feed(model, run.ids, steps(run)).cpu()
        assert (logits - tensors(run.case, "expected_fp32")[f"{run.name}.logits"]).abs().max() <= 1e-4
        selected.append(selections.taken)
    for mine, theirs in zip(*selected, strict=True):
        assert torch.equal(mine, theirs)
    # wo_a, a plain grouped product, is torch's. Of each layer and step, attention has its kernel.
    assert set(device.references) == {"_grouped_linear_reference"}
    assert device.calls()["sparse_attention"] - before == len(steps(run)) * model.config.num_hidden_layers


def test_off_bfloat16(device: Device) -> None:
    for run in FULL:
        model = dsv4.load(ROOT / run.case, device="cuda", quantization="off", dtype=torch.bfloat16)
        errors = rel_rms(feed(model, run.ids, steps(run)).cpu(), tensors(run.case, "expected_fp32")["full.logits"])
        assert errors.median() <= 0.015 and (errors <= 0.05).float().mean() >= 0.90
    assert set(device.references) == {"_grouped_linear_reference"}


@needs_hopper
@pytest.mark.parametrize("name", ["fp8_linear", "fp4_linear", "grouped_linear"])
def test_hopper_where_it_is_asked_for(name: str, device: Device) -> None:
    """Many tokens, by warpgroups: what the sm80 kernels and the CPU's compute."""
    generator = torch.Generator().manual_seed(9)
    tokens, inputs, groups = 70, 256, 2 if name == "grouped_linear" else 1
    x = torch.randn(tokens, groups, inputs, generator=generator).bfloat16()
    fp4 = name == "fp4_linear"
    codes = torch.randint(126, (8192 * groups, inputs // (1 + fp4)), generator=generator, dtype=torch.uint8)
    scales = torch.randint(
        118, 124, (8192 if fp4 else 64 * groups, inputs // (32 if fp4 else 128)), generator=generator, dtype=torch.uint8
    )
    weight = codes if fp4 else codes.view(torch.float8_e4m3fn)
    arguments = (x if groups > 1 else x[:, 0], weight, scales.view(torch.float8_e8m0fnu))
    op = getattr(dsv4.ops, name)
    there = [value.to("cuda") for value in arguments]
    before = device.calls("sm90")[name]
    by_default = op(*there).cpu()
    assert device.calls("sm90")[name] == before
    with max_isa("sm90"):
        asked = op(*there).cpu()
    assert device.calls("sm90")[name] == before + 1
    for other in (by_default, op(*arguments)):
        assert rel_rms(asked.float(), other.float()).max() <= 5e-3


@needs_hopper
def test_hopper_chooses_the_same_entries(device: Device) -> None:
    generator = torch.Generator().manual_seed(10)
    query, weights = torch.randn(40, 64, 128, generator=generator), torch.randn(40, 64, generator=generator)
    pages, where = allocate_key_pages(6, 64, 128, "fp4"), torch.arange(6 * 64)
    write_keys(pages, torch.randn(6 * 64, 128, generator=generator).bfloat16(), where // 64, where % 64, 64)
    table = torch.randperm(6, generator=generator).int().view(2, 3)
    sequence, lengths = torch.arange(40).int() // 20, torch.randint(250, (40,), generator=generator).int()
    arguments = (query.bfloat16(), weights, pages, table, sequence, lengths, 32, 64)
    there = [value.to("cuda") if isinstance(value, Tensor) else value for value in arguments]
    with max_isa("sm90"):
        before = device.calls("sm90")["index_topk"]
        asked = dsv4.ops.index_topk(*there).cpu()
        assert device.calls("sm90")["index_topk"] == before + 1
    assert torch.equal(asked, dsv4.ops.index_topk(*there).cpu()) and torch.equal(asked, dsv4.ops.index_topk(*arguments))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
def test_entries_without_a_cache(rotate: bool, overlap: bool, weight: torch.dtype, device: Device) -> None:
    generator = torch.Generator().manual_seed(8)
    channels = 128 if overlap else 64
    case = {
        "kv": torch.randn(23, channels, generator=generator),
        "gate": torch.randn(23, channels, generator=generator),
        "ape": torch.randn(4, channels, generator=generator),
        "norm_weight": torch.randn(64, generator=generator).to(weight),
        "rope": dsv4.ops.rope_rows(4 * torch.arange(5), dsv4.ops.rope_frequencies(32, 1e4)),
        "ratio": 4,
        "rotate": rotate,
    }
    before = device.calls()["compress_entries"]
    got = dsv4.ops.compress_entries(**on_device(case))
    assert device.calls()["compress_entries"] == before + 1
    assert not device.references and not device.waits
    expected = dsv4.ops.compress_entries(**case)
    close = 2**-7 if weight == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.cpu(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("query", DTYPES)
@pytest.mark.parametrize("window", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("entries", [*DTYPES, torch.uint8])
def test_attention_of_every_dtype(
    query: torch.dtype, window: torch.dtype, entries: torch.dtype, device: Device
) -> None:
    """What the CPU's kernels take, the GPU's do."""
    case = attention_case(query, window, entries)
    out, lse = dsv4.ops.sparse_attention(**case)
    got, got_lse = dsv4.ops.sparse_attention(**on_device(case))
    assert not device.references
    assert rel_rms(got.cpu().flatten(1), out.flatten(1)).max() <= (2**-8 if query == torch.bfloat16 else 2**-21)
    torch.testing.assert_close(got_lse.cpu(), lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 32), (torch.float16, 32), (torch.float32, 33)])
def test_attention_left_to_the_reference(dtype: torch.dtype, head_dim: int, device: Device) -> None:
    dsv4.ops.sparse_attention(**on_device(attention_case(dtype, dtype, dtype, head_dim)))
    assert device.references == {"_sparse_attention_reference": 1}


def layer_outputs(model: dsv4.Transformer, ids: Tensor, chunks: list[int], given: list[Tensor] | None) -> list[Tensor]:
    """Streams after every layer of every chunk; each layer starts from the `given` ones, or from those before it."""
    cache, outputs, inputs = model.new_cache(1, ids.shape[1]), [], iter(given or ())
    for chunk in ids.split(chunks, dim=1):
        step = cache.begin([chunk[0]])
        rows = Rows(model.frequencies, *step.tensors())
        streams = model._embed(step.token_ids).unsqueeze(1).repeat(1, 4, 1)
        for index, block in enumerate(model.layers):
            streams = block(streams, rows, cache.layers[index])
            outputs.append(streams.cpu())
            streams = next(inputs).to(model.device) if given else streams
        cache.commit(step)
    return outputs


def test_layers_of_every_kind(device: Device) -> None:
    """Layer by layer from the CPU's streams: through all of them, random weights blow a flip of one code up."""
    ids = torch.randint(512, (1, 131), generator=torch.Generator().manual_seed(1))
    chunks = [130, 1]  # the 128 tokens of an entry of the HCA layer, and more
    cpu = layer_outputs(dsv4.init(KINDS), ids, chunks, None)
    got = layer_outputs(dsv4.init(KINDS, device="cuda"), ids, chunks, cpu)
    for layer in range(4):
        pieces = zip(got[layer::4], cpu[layer::4], strict=True)
        errors = torch.cat([rel_rms(mine.flatten(1), theirs.flatten(1)) for mine, theirs in pieces])
        # Where rounding makes a router choose another expert, a row differs.
        assert len(errors) == 131 and errors.median() <= 0.03 and (errors > 0.1).sum() <= 3, layer


def test_generation(device: Device) -> None:
    """Greedy tokens: those of the logits of one piece; one wait a token, for its logits."""
    model = dsv4.init(KINDS, device="cuda")
    device.waits.clear()
    prompt = list(range(40, 48))
    tokens = list(model.generate(prompt, max_new_tokens=3))
    assert GPU or sum(device.waits.values()) == 3
    logits = feed(model, torch.tensor([[*prompt, *tokens[:-1]]]), [10])
    assert logits[0, 7:].argmax(-1).tolist() == tokens
    (sampled,) = model.generate(prompt[:2], max_new_tokens=1, temperature=1.0, seed=5)
    assert 0 <= sampled < 512


def test_trained_model(device: Device) -> None:
    """The bundled model's logits on Python text, as a prompt and a token at a time: the CPU's, as near as golden logits
    must be. On a GPU past the window and the first entries of HCA, which would take the host too long."""
    tokens = Tokenizer(BUNDLED / "nano").encode(Path(__file__).read_text())[: 700 if GPU else 24]
    ids, cuts = torch.tensor([tokens]), [len(tokens) - 3, 1, 1, 1]
    got, cpu = (feed(dsv4.load("nano", device=where), ids, cuts).cpu() for where in ("cuda", "cpu"))
    errors = rel_rms(got, cpu)
    assert errors.median() <= 0.10 and (errors[:, -3:] <= 0.10).all()
    assert (got.argmax(-1) == cpu.argmax(-1)).float().mean() >= 0.9
    assert not device.references


def test_chunks_and_company_do_not_matter(in_one_piece: Tensor, device: Device) -> None:
    model = dsv4.load(ROOT / "dev_a", device="cuda")
    assert_same_bits(feed(model, SOME, [5, 1, 16]).cpu(), in_one_piece)
    both = torch.cat([SOME, SOME.flip(1)])
    logits = model(both, cache=model.new_cache(2, 64), num_tokens=[22, 10])
    assert_same_bits(logits[0].cpu(), in_one_piece[0])
    assert_same_bits(logits[1, :10].cpu(), feed(model, SOME.flip(1)[:, :10], [10])[0].cpu())
    assert not logits[1, 10:].any()


def test_caches(in_one_piece: Tensor, device: Device, tmp_path: Path) -> None:
    """Copies, cuts with and without a replay, a file: the device's bits."""
    model = dsv4.load(ROOT / "dev_a", device="cuda")
    cache = model.new_cache(1, 64)
    model(SOME[:, :17], cache=cache)
    copy = cache.snapshot()
    assert_same_bits(model(SOME[:, 17:], cache=copy).cpu(), in_one_piece[:, 17:])
    cache.save(tmp_path / "cache")
    loaded = dsv4.KVCache.load(tmp_path / "cache", device="cuda")
    assert loaded.layers[0].window_pages.is_cuda
    assert_same_bits(model(SOME[:, 17:], cache=loaded).cpu(), in_one_piece[:, 17:])
    for length, replays in ((18, False), (3, True)):
        copy.crop(length)
        assert any(copy.pending()) == replays
        assert_same_bits(model(SOME[:, length:], cache=copy).cpu(), in_one_piece[:, length:])


@of_the_played_device
def test_kernels_run_again_from_a_tape(device: Device) -> None:
    """What dsv4.RecordedModel decodes with, on a device; with scratch memory and without."""
    ops = torch.ops.dsv4
    x = torch.randn(3, 256, device="cuda")
    weight, scale = torch.randint(0, 120, (128, 256), dtype=torch.uint8), torch.full((1, 2), 0.5)
    weight, scale = weight.view(torch.float8_e4m3fn).to("cuda"), scale.to("cuda")
    ops._host_model_tape_begin()
    normed = dsv4.ops.rms_norm(x, None)
    result = dsv4.ops.fp8_linear(normed, weight, scale)
    assert ops._host_model_tape_calls() == 2
    tape = ops._host_model_tape_end()
    for seed in range(3):
        x.copy_(torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)))
        ops._host_model_tape_run(tape, 0, 2)
        assert torch.equal(result.cpu(), dsv4.ops.fp8_linear(dsv4.ops.rms_norm(x, None), weight, scale).cpu())
    ops._host_model_tape_free(tape)


def test_multi_token_prediction(device: Device) -> None:
    model, ids = dsv4.load(ROOT / "dev_a", device="cuda"), SOME
    got = model.predict_next(model.hidden_streams(ids[:, :-1]), ids[:, 1:])
    cpu = cpu_model("dev_a", "checkpoint", torch.bfloat16)
    assert rel_rms(got.cpu(), cpu.predict_next(cpu.hidden_streams(ids[:, :-1]), ids[:, 1:])).median() <= 0.10


def experts_case(up: str) -> list[Tensor | None]:
    """x, weights, indices, w1, w3, w2 and their scales: w1 and w2 in e2m1 with e8m0 scales, w3 as `up` says."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    codes = torch.randint(-128, 128, (3, 2, 64, 32), generator=generator, dtype=torch.int8)
    scales = torch.full((3, 2, 64, 2), 2.0**-5).to(torch.float8_e8m0fnu)
    w3, w3_scale = codes[1], scales[1]
    if up == "float32 scales":
        w3_scale = w3_scale.float()
    elif up == "e4m3":
        w3, w3_scale = torch.randn(2, 64, 64, generator=generator).to(torch.float8_e4m3fn), torch.ones(2, 1, 1)
    elif up == "uint8":
        w3 = w3.view(torch.uint8)
    elif up == "plain":
        w3, w3_scale = torch.randn(2, 64, 64, generator=generator).bfloat16() / 8, None
    indices = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32)
    return [x, torch.rand(3, 2, generator=generator), indices, codes[0], w3, codes[2], scales[0], w3_scale, scales[2]]


@pytest.mark.parametrize(
    ("up", "shared"),
    [(up, shared) for up in ("as w1", "uint8", "float32 scales", "e4m3") for shared in (False, True)]
    + [("plain", False)],  # a shared expert is quantised as a whole or not at all
)
def test_experts_whose_gate_and_up_are_stored_differently(up: str, shared: bool, device: Device) -> None:
    case = experts_case("as w1" if shared else up)
    if shared:
        _, _, _, w1, w3, w2, w1_scale, w3_scale, w2_scale = experts_case(up)
        case.append([part[0] for part in (w1, w1_scale, w3, w3_scale, w2, w2_scale)])
    expected = dsv4.ops.moe_experts(*case)
    there = _pytree.tree_map_only(Tensor, lambda value: value.to("cuda"), case)
    before = device.calls()["moe_experts"]
    assert rel_rms(dsv4.ops.moe_experts(*there).cpu(), expected).max() <= 1e-2
    assert device.calls()["moe_experts"] - before == 1 and not device.references


@of_the_played_device
class TestDevice:
    """The device itself."""

    def test_devices_do_not_mix(self, device: Device) -> None:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert isinstance(there, DeviceTensor) and (there + torch.tensor(1.0)).is_cuda
        with pytest.raises(RuntimeError, match=r"cuda:0 and on cpu"):
            there + here
        with pytest.raises(RuntimeError, match="1 of 2 tensors are not on the device"):
            dsv4.ops.rms_norm(there, here)
        assert (there + here.to("cuda")).cpu().tolist() == [2, 2, 2]

    def test_waits_are_counted(self, device: Device) -> None:
        x = torch.arange(4.0).to("cuda")
        x[0] = 5
        x.add_(1)
        assert not device.waits
        assert x.max() == 6 and x[x > 2].shape == (3,) and x.tolist() == [6, 2, 3, 4] and float(x[1]) == 2
        assert device.waits == {"index": 1, "_to_copy": 1, "_local_scalar_dense": 2}
