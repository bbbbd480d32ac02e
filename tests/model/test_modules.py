"""The layers as standalone modules: any width, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import dsv4
from dsv4.nn import RopeFrequencies, Rows
from dsv4.nn.compressor import Compressor

CONFIG = replace(
    dsv4.Config.preset("nano"),
    hidden_size=48,
    num_attention_heads=3,
    o_groups=1,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=24,
    o_lora_rank=20,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=3,
    sliding_window=5,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=40,
    swiglu_limit=0.5,
)


def build(kind: str, dtype: torch.dtype, quantization: str = "off", config: dsv4.Config = CONFIG) -> nn.Module:
    torch.manual_seed(3)
    if kind == "SWA":
        return dsv4.nn.SlidingWindowAttention(config, quantization=quantization, dtype=dtype)
    if kind == "CSA":
        return dsv4.nn.CompressedSparseAttention(config, quantization=quantization, dtype=dtype)
    if kind == "HCA":
        return dsv4.nn.HeavilyCompressedAttention(config, ratio=8, quantization=quantization, dtype=dtype)
    return dsv4.nn.MixtureOfExperts(config, quantization=quantization, dtype=dtype)


@pytest.mark.parametrize("kind", ["SWA", "CSA", "HCA", "MoE"])
def test_gradients_in_float64(kind: str) -> None:
    """Of the input and of every parameter, against finite differences along a random direction."""
    module = build(kind, torch.float64)
    torch.manual_seed(4)
    x = torch.randn(2, 19, CONFIG.hidden_size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 19, CONFIG.hidden_size, dtype=torch.float64)
    trained = [x] + [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((module(x) * weight).sum(), trained, allow_unused=True)
    step = 1e-6
    untouched = []
    for tensor, gradient in zip(trained, gradients, strict=True):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            tensor += step * direction
            above = (module(x) * weight).sum()
            tensor -= 2 * step * direction
            below = (module(x) * weight).sum()
            tensor += step * direction
        slope = (above - below) / (2 * step)
        if gradient is None:
            untouched.append(tensor)
            assert slope.abs() <= 1e-6
            continue
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)
    indexer = sum(1 for name, _ in module.named_parameters() if name.startswith("indexer."))
    assert len(untouched) == indexer  # a selection has no gradient; everything else has


@pytest.mark.parametrize("kind", ["SWA", "CSA", "HCA", "MoE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step(kind: str, dtype: torch.dtype) -> None:
    module = build(kind, dtype)
    x = torch.randn(1, 33, CONFIG.hidden_size, dtype=dtype, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape and out.dtype == dtype
    out.float().pow(2).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["SWA", "CSA", "HCA", "MoE"])
@torch.no_grad()
def test_checkpoint_mode_alone(kind: str) -> None:
    """Quantised modules run without a cache; a batch gives what its sequences give alone."""
    config = replace(CONFIG, hidden_size=128, head_dim=128, qk_rope_head_dim=64, index_head_dim=128, q_lora_rank=128,
                     o_lora_rank=128, moe_intermediate_size=128)  # fmt: skip
    module = build(kind, torch.bfloat16, "checkpoint", config)
    x = torch.randn(3, 21, 128, dtype=torch.bfloat16)
    out = module(x)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all() and out.abs().sum() > 0
    for row in range(3):
        assert torch.equal(module(x[row : row + 1]), out[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hyper_connection(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = dsv4.nn.HyperConnection(CONFIG, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    inner = nn.Linear(CONFIG.hidden_size, CONFIG.hidden_size, dtype=dtype)
    streams = torch.randn(2, 7, 4, CONFIG.hidden_size, dtype=dtype, requires_grad=True)
    out = module(streams, inner)
    assert out.shape == streams.shape and out.dtype == dtype
    out.float().pow(2).sum().backward()
    for tensor in (streams, module.hc_fn, module.hc_base, module.hc_scale, inner.weight):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


def test_hash_routing_needs_ids() -> None:
    module = dsv4.nn.MixtureOfExperts(CONFIG, hash_routing=True, quantization="off", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"this layer routes by token id: pass token_ids, int64 \[tokens\]"):
        module(torch.randn(4, CONFIG.hidden_size))
    out = module(torch.randn(4, CONFIG.hidden_size), torch.tensor([0, 1, 2, 3]))
    assert torch.isfinite(out).all()


def test_unknown_quantization() -> None:
    with pytest.raises(ValueError, match=r'quantization must be "checkpoint" or "off", got \'fp8\''):
        dsv4.nn.SlidingWindowAttention(CONFIG, quantization="fp8")


def test_model_gradients() -> None:
    """The whole model trains in mode "off": every parameter outside the indexers gets a gradient."""
    config = replace(CONFIG, num_hidden_layers=3, compress_ratios=(0, 4, 8), num_hash_layers=1, vocab_size=64)
    model = dsv4.init(config, seed=0, quantization="off", dtype=torch.float32)
    model.requires_grad_(True)
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached != (".indexer." in name or "tid2eid" in name or name.endswith("gate.bias")), name


def test_hooks_that_run() -> None:
    """Those of all modules but the norms and matrices whose weights enter an op with other things, in training and with
    a cache."""
    config = replace(
        CONFIG, num_hidden_layers=3, compress_ratios=(0, 4, 8, 0), num_nextn_predict_layers=1, num_hash_layers=1
    )
    model = dsv4.init(config, 0, "off", torch.float32)
    seen: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    ids = torch.arange(20).unsqueeze(0)
    streams = model.hidden_streams(ids)
    model.predict_next(streams, ids)
    apart = ("layers", "mtp", "attn_norm", "ffn_norm", "kv_norm", "compressor.norm")
    expected = {n for n, _ in model.named_modules() if not n.endswith(apart) and ".shared_experts" not in n}
    assert seen == expected - {"", "norm"}
    model(ids)
    assert seen == expected
    seen.clear()
    model(ids, cache=model.new_cache())
    assert seen == {name for name in expected if not name.startswith("mtp.")}


def test_model_arguments() -> None:
    """What a call refuses, and that a refused call leaves the cache as it was."""
    model = dsv4.init(replace(CONFIG, num_hidden_layers=1, compress_ratios=(0,), num_hash_layers=0), 0, "off")
    other = dsv4.init(replace(CONFIG, num_hidden_layers=2, compress_ratios=(0, 4), num_hash_layers=0), 0, "off")
    one = replace(CONFIG, num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=0, num_nextn_predict_layers=1)
    predicting = dsv4.init(one, 0, "off")
    cache = model.new_cache(1, 8)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, cache=cache)
    vocab = CONFIG.vocab_size
    refused = {
        r"input_ids must be integer \[batch, seq\], got torch.float32 \[1, 4\]": lambda: model(ids.float()),
        r"input_ids must be integer \[batch, seq\], got torch.int64 \[4\]": lambda: model(ids[0]),
        rf"input_ids must lie in \[0, {vocab}\), got {vocab} to {vocab}": lambda: model(ids + vocab, cache=cache),
        rf"input_ids must lie in \[0, {vocab}\), got -1 to -1": lambda: model(ids - 1, cache=cache),
        r"the cache holds 1 sequences, input_ids has 2 rows": lambda: model(ids.repeat(2, 1), cache=cache),
        r"num_tokens must be 1 counts of 0 to 4, got \[5\]": lambda: model(ids, cache=cache, num_tokens=[5]),
        r"num_tokens must be 1 counts of 0 to 4, got \[1, 1\]": lambda: model(ids, cache=cache, num_tokens=[1, 1]),
        r"num_tokens must be 1 counts of 0 to 4, got \[1.5\]": lambda: model(ids, cache=cache, num_tokens=[1.5]),
        r"num_tokens must be 1 counts of 0 to 4, got \['1'\]": lambda: model(ids, cache=cache, num_tokens=["1"]),
        r"input_ids must be an integer tensor \[batch, seq\], got list": lambda: model([[0, 1]]),
        r"max_seq_len must be an integer from 1 to 2147483647, got 2147483648": lambda: model.new_cache(1, 2**31),
        r"max_seq_len": lambda: model(ids.repeat(1, 2), cache=cache),
        r"input_ids must be integer \[batch, seq\], got torch.complex64 \[1, 4\]": lambda: model(ids.cfloat()),
        r"logits_to_keep must be 0 \(all\) or a number of columns, got -1": lambda: model(ids, logits_to_keep=-1),
        r"the cache belongs to another model: make one with this model's new_cache": lambda: other(ids, cache=cache),
        r"the model has 0 multi-token prediction blocks, asked for number 0": lambda: model.predict_next(
            model.hidden_streams(ids), ids
        ),
        r"next_ids must be \[1, 4\] like the streams, got \[1, 3\]": lambda: predicting.predict_next(
            predicting.hidden_streams(ids), ids[:, :3]
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
        assert cache.length == 4
    assert model(ids, cache=cache).shape == (1, 4, vocab)
    assert model(ids[:, :0]).shape == (1, 0, vocab)


def test_a_cache_has_no_gradient() -> None:
    """It is written in place: logits that came through it say so, instead of leaving parts of the gradient out."""
    model = dsv4.init(replace(CONFIG, num_hidden_layers=2, compress_ratios=(0, 4), num_hash_layers=0), 0, "off")
    ids = torch.arange(20).unsqueeze(0)
    assert model(ids).requires_grad
    assert not model(ids, cache=model.new_cache(1, 20)).requires_grad


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(tokens: int, dtype: torch.dtype) -> None:
    config = replace(CONFIG, num_hidden_layers=3, compress_ratios=(0, 4, 8), num_hash_layers=1)
    model = dsv4.init(config, 0, "off", dtype)
    ids = torch.arange(tokens).unsqueeze(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert torch.equal(found, model(ids))


@pytest.mark.parametrize("kind", ["SWA", "CSA", "HCA", "MoE"])
def test_between_layers_of_autocast(kind: str) -> None:
    """What a linear of torch hands on there is bfloat16, beside weights of float32: as with weights in bfloat16."""
    module = build(kind, torch.float32)
    x = torch.randn(2, 19, CONFIG.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(nn.functional.linear(x, torch.eye(CONFIG.hidden_size)))
    found.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        reached = parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert reached == (parameter.requires_grad and not name.startswith("indexer.")), name
    expected = module.to(torch.bfloat16)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_wrapped_shared_expert() -> None:
    """Its weights go into one op with the experts', so an adapter around one would do nothing."""
    module = build("MoE", torch.float32)

    class Adapter(nn.Linear):
        pass

    module.shared_experts.w3 = Adapter(CONFIG.hidden_size, CONFIG.moe_intermediate_size, bias=False)
    with pytest.raises(TypeError, match=r"shared_experts.w3 must be .* forward of Adapter would not run"):
        module(torch.zeros(3, CONFIG.hidden_size))
    module = build("MoE", torch.float32)
    x = torch.randn(3, CONFIG.hidden_size)
    expected = module(x)
    nn.utils.parametrizations.weight_norm(module.shared_experts.w3)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("quantization", ["checkpoint", "off"])
def test_shapes_on_meta(quantization: str) -> None:
    config = replace(CONFIG, num_hidden_layers=3, compress_ratios=(0, 4, 8), num_hash_layers=1)
    with torch.device("meta"):
        model = dsv4.Transformer(config, quantization)
        ids = torch.zeros(2, 19, dtype=torch.int64)
    found = model(ids)
    assert found.device.type == "meta" and found.shape == (2, 19, config.vocab_size)


def test_other_dtypes() -> None:
    """Mode "off" follows `to`; codes have no other dtype, and a model that was refused is as before."""
    config = replace(CONFIG, num_hidden_layers=2, compress_ratios=(0, 4), num_hash_layers=0)
    ids = torch.arange(20).unsqueeze(0)
    plain = dsv4.init(config, 0, "off", torch.float32).to(torch.bfloat16)
    assert (plain.dtype, plain(ids).isfinite().all().item()) == (torch.bfloat16, True)
    experts = build("MoE", torch.float32).to(torch.bfloat16)
    assert experts(torch.ones(20, CONFIG.hidden_size).bfloat16()).dtype == torch.bfloat16
    for module in (build(kind, torch.bfloat16, "checkpoint") for kind in ("SWA", "CSA", "HCA", "MoE")):
        before = {name: value.dtype for name, value in module.state_dict().items()}
        with pytest.raises(ValueError, match="weights as stored have no other dtype"):
            module.float()
        assert {name: value.dtype for name, value in module.state_dict().items()} == before
        assert module.to("cpu") is module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_activations_of_stored_weights(dtype: torch.dtype) -> None:
    model = dsv4.load("nano", dtype=dtype)
    ids = torch.arange(150).unsqueeze(0)
    found = model(ids)
    assert found.dtype == dtype
    assert torch.equal(model(ids, cache=model.new_cache(1, 150)), found)
    with dsv4.ops.use_reference():
        expected = model(ids)
    # float64 has references alone; in float32 a choice that changes moves random weights' logits, by 4 %.
    assert (found - expected).square().mean() <= (0 if dtype == torch.float64 else 0.01) * expected.square().mean()


def test_attention_alone_takes_batches() -> None:
    swa = build("SWA", torch.float32)
    for shape in ((5, CONFIG.hidden_size), (0, 5, CONFIG.hidden_size), (2, 5, CONFIG.hidden_size + 1)):
        with pytest.raises(ValueError, match=r"attention: x must be \[batch, length, hidden 48\], batch from 1 on"):
            swa(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"attention: x must be torch.float32 as the weights are, got torch.bfloat16"):
        swa(torch.zeros(1, 5, CONFIG.hidden_size, dtype=torch.bfloat16))


@pytest.mark.parametrize("length", [3, 4, 8, 43])
@pytest.mark.parametrize("ratio", [CONFIG.csa_ratio, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_entries_of_a_batch_are_those_of_its_sequences(length: int, ratio: int, dtype: torch.dtype) -> None:
    """Bit for bit, and what one sequence holds reaches no other."""
    torch.manual_seed(3)
    compressor = Compressor(CONFIG, ratio, 32, rotate=False, quantization="off", dtype=dtype)
    x = torch.randn(3, length, CONFIG.hidden_size, dtype=dtype)
    x[1] = torch.nan
    rows = Rows.whole_sequences(3, length, RopeFrequencies(CONFIG), x.device)
    found = compressor(x.flatten(0, 1), rows)
    rope = rows.entry_rope(ratio)[ratio - 1 : length : ratio]
    kv, gate = (p(x.flatten(0, 1)).unflatten(0, (3, length)) for p in (compressor.wkv, compressor.wgate))
    for own in (0, 2):
        alone = dsv4.ops.compress_entries(kv[own], gate[own], compressor.ape, compressor.norm.weight, rope, ratio)
        assert torch.equal(found[own], alone)
    assert found.shape == (3, length // ratio, 32)


@pytest.mark.parametrize("ratio", [-1, 0, CONFIG.csa_ratio])
def test_ratios_that_are_not_heavy(ratio: int) -> None:
    with pytest.raises(ValueError, match=f"HCA's ratio must be from 1 on and not CSA's 4, got {ratio}"):
        dsv4.nn.HeavilyCompressedAttention(CONFIG, ratio=ratio)


def test_arguments_that_no_module_is_made_of() -> None:
    with pytest.raises(ValueError, match=r"attention: ratio must be 0 \(window only\) or more, got -1"):
        dsv4.nn.Attention(CONFIG, -1)
    for make in (
        lambda: dsv4.nn.Attention(CONFIG, 0, "fp8"),
        lambda: dsv4.nn.GroupedLinear(2, 8, 8, "fp8", torch.float32),
        lambda: dsv4.nn.MixtureOfExperts(CONFIG, quantization="fp8"),
    ):
        with pytest.raises(ValueError, match=r'quantization must be "checkpoint" or "off", got \'fp8\''):
            make()
    for mode in ("checkpoint", "off"):
        for kind in (dsv4.Transformer, dsv4.nn.SlidingWindowAttention, dsv4.nn.MixtureOfExperts):
            with pytest.raises(ValueError, match=r"^dtype must be one of torch.bfloat16, .*, got torch.float16$"):
                kind(CONFIG, quantization=mode, dtype=torch.float16)


def test_streams_of_another_shape() -> None:
    connection = dsv4.nn.HyperConnection(CONFIG)
    with pytest.raises(ValueError, match=r"streams must be \[\.\.\., 4, hidden\], got \[3, 2, 48\]"):
        connection(torch.zeros(3, 2, CONFIG.hidden_size), lambda x: x)


def test_widths_of_stored_experts() -> None:
    """Any even width, the last group of 32 scaled by itself."""
    config = replace(CONFIG, hidden_size=200, moe_intermediate_size=34)
    assert build("MoE", torch.bfloat16, "checkpoint", config)(torch.ones(3, 200).bfloat16()).shape == (3, 200)
    with pytest.raises(ValueError, match="FP4 experts need even widths, got 35; use quantization='off'"):
        build("MoE", torch.bfloat16, "checkpoint", replace(config, moe_intermediate_size=35))
