"""Sampling, the generation loop and the tokenizer: on a small stand-in for the model, whose every logit is known."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dsv4
from dsv4.checkpoint import resolve
from dsv4.generation import Tokenizer, generate, generate_batch, sample
from dsv4.generation.encoding import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, THINK_OPEN
from dsv4.generation.tokenizer import TextStream, train_tokenizer

VOCAB = 11


class Cache:
    """Keeps the tokens it was fed, and in which pieces."""

    def __init__(self, batch_size=1, max_seq_len=1 << 20, length=0):
        self.batch_size, self.max_seq_len, self.tokens, self.pieces = batch_size, max_seq_len, [0] * length, []

    @property
    def length(self):
        return len(self.tokens)


class Model:
    """Logits depend on the last two tokens alone; gradients must be off, as in any generation."""

    config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=200)

    def __init__(self):
        self.table = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
        self.caches = []

    def new_cache(self, batch_size=1, max_seq_len=1 << 20):
        self.caches.append(Cache(batch_size, max_seq_len))
        return self.caches[-1]

    def __call__(self, ids, cache, logits_to_keep):
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert ids.shape[0] == 1
        assert logits_to_keep == 1
        cache.tokens += ids[0].tolist()
        cache.pieces.append(ids.shape[1])
        assert cache.length <= cache.max_seq_len
        return self.row(cache.tokens)[None, None]

    def row(self, tokens):
        return self.table[tokens[-2] if len(tokens) > 1 else 0, tokens[-1]]

    def greedy(self, prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.row(tokens).argmax()))
        return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("chunk", [1, 3, 7, 2048])
def test_greedy_for_any_chunk(prompt, chunk):
    model, seen = Model(), []
    got = list(generate(model, prompt, 9, prefill_chunk=chunk, progress=lambda done, total: seen.append((done, total))))
    assert got == model.greedy(prompt, 9)
    (cache,) = model.caches
    assert cache.tokens == prompt + got[:-1], "the cache holds what was fed: all but the last token"
    assert max(cache.pieces) <= chunk
    assert [done for done, _ in seen] == [*range(chunk, len(prompt), chunk), len(prompt)]
    assert {total for _, total in seen} == {len(prompt)}


@pytest.mark.parametrize("ids", [[1, 2], torch.tensor([1, 2]), torch.tensor([[1, 2]], dtype=torch.int32)])
def test_forms_of_input(ids):
    model = Model()
    assert list(generate(model, ids, 4)) == model.greedy([1, 2], 4)


def test_cache_when_the_reader_stops_early():
    model, cache = Model(), Cache()
    tokens = generate(model, [1, 2, 3], 50, cache=cache)
    got = [next(tokens) for _ in range(4)]
    tokens.close()
    assert cache.tokens == [1, 2, 3, *got[:-1]]
    # Going on from there gives what an uninterrupted run gives.
    rest = list(generate(model, got[-1:], 6, cache=cache))
    assert got + rest == model.greedy([1, 2, 3], 10)


def test_nothing_is_fed_before_the_first_token_is_asked_for():
    model = Model()
    tokens = generate(model, [1, 2], 3)
    assert model.caches[0].length == 0
    next(tokens)
    assert model.caches[0].length == 2


def test_numbers_of_other_kinds():
    model = dsv4.load("nano")
    first, second = generate(model, [1], np.int64(2))
    assert list(generate(model, [1], 30, stop_tokens=first)) == [first]
    assert first != second


def test_stop_tokens_are_given_and_end_the_sequence():
    model = Model()
    whole = model.greedy([1], 30)
    stop = whole[5]
    got = list(generate(model, [1], 30, stop_tokens={stop}))
    assert got == whole[: whole.index(stop) + 1]
    assert len(list(generate(model, [1], 30))) == 30


@pytest.mark.parametrize(
    "form", [np.int64, torch.tensor, lambda stop: torch.tensor([stop, stop]), lambda stop: [torch.tensor(stop)]]
)
def test_stop_tokens_of_other_kinds(form):
    model = Model()
    whole = model.greedy([1], 30)
    stop = form(whole[5])
    expected = whole[: whole.index(whole[5]) + 1]
    assert list(generate(model, [1], 30, stop_tokens=stop)) == expected


@pytest.mark.parametrize("stop", [None, 1.5, "1", [None], [1.0]])
def test_stop_tokens_that_are_none(stop):
    with pytest.raises(ValueError, match="stop_tokens must be a token or several, as integers, got"):
        generate(Model(), [1], 30, stop_tokens=stop)


def test_gradient_mode_is_the_callers():
    for _ in generate(Model(), [1], 3):
        assert torch.is_grad_enabled()


def test_seed():
    model = Model()
    runs = [list(generate(model, [1], 40, temperature=1.0, top_p=0.9, seed=seed)) for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    torch.manual_seed(0)
    assert list(generate(model, [1], 40, temperature=1.0, top_p=0.9, seed=7)) == runs[0], "global state does not matter"


def test_no_tokens_wanted():
    model = Model()
    assert list(generate(model, [1, 2], 0)) == []
    assert model.caches[0].length == 0


def test_exact_fit_and_one_too_many():
    model = Model()
    assert len(list(generate(model, [1, 2, 3], 4, cache=Cache(max_seq_len=6)))) == 4
    cache = Cache(max_seq_len=5)
    with pytest.raises(ValueError, match="no room for a prompt of 3 and 4 new ones"):
        generate(model, [1, 2, 3], 4, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": []}, "the prompt is empty"),
        ({"input_ids": [VOCAB]}, r"must lie in \[0, 11\), got 11 to 11"),
        ({"input_ids": [-1, 2]}, "got -1 to 2"),
        ({"input_ids": [1.5]}, "must be integer"),
        ({"input_ids": "def f"}, "got the text 'def f'; encode it first$"),
        ({"input_ids": [[1, 2], [3]]}, r"must be integer \[tokens\] or \[1, tokens\], got list$"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, r"got torch.int64 \[2, 3\]"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer >= 0, got 2.0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer >= 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0"),
        ({"temperature": math.nan}, "temperature must be a finite number >= 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"seed": -1}, "seed must be an integer from 0 to 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed must be an integer from 0 to 9223372036854775807, got 9223372036854775808"),
        ({"seed": 1.5}, "seed must be an integer from 0 to 9223372036854775807, got 1.5"),
        ({"max_new_tokens": 200}, "^prompt and new tokens, 201, would exceed the 200 positions of the model"),
        ({"cache": Cache(length=190), "max_new_tokens": 10}, "^prompt and new tokens, 201, would exceed"),
        ({"cache": Cache(batch_size=2)}, "the cache holds 2"),
    ],
)
def test_faults_are_named_at_the_call(arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(Model(), **{"input_ids": [1], **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "the prompt is empty"),
        ({"prompts": [[1], [2, VOCAB]]}, "got 2 to 11"),
        ({"prompts": [1, 2]}, r"must be integer \[tokens\] or \[1, tokens\], got torch.int64 \[\]"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer >= 0, got True"),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer >= 1, got 0"),
        ({"temperature": -1}, "temperature must be a finite number >= 0"),
        ({"top_p": 2}, "top_p must be above 0 and at most 1, got 2"),
        ({"seed": 2**63}, "seed must be an integer from 0 to 9223372036854775807"),
        ({"prompts": [[1], [2] * 190], "max_new_tokens": 11}, "^prompt and new tokens, 201, would exceed"),
    ],
)
def test_faults_of_a_batch_are_named_at_the_call(arguments, words):
    with pytest.raises(ValueError, match=words):
        generate_batch(Model(), **{"prompts": [[1], [2]], **arguments})


def frequencies(logits, count=4000, **settings):
    generator = torch.Generator().manual_seed(5)
    drawn = [sample(logits, generator=generator, **settings) for _ in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)).double() / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_frequencies(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -math.inf])
    expected = torch.softmax(logits.double() / temperature, 0)
    # 5 standard deviations of a frequency over 4000 draws is below 0.04.
    assert (frequencies(logits, temperature=temperature) - expected).abs().max() < 0.04
    assert frequencies(logits, temperature=temperature)[4] == 0


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [3]), (0.5, [3]), (0.51, [3, 1]), (0.76, [3, 1, 0]), (1.0, [3, 1, 0, 2])]
)
def test_nucleus(top_p, kept):
    logits = torch.tensor([0.15, 0.25, 0.1, 0.5]).log()
    drawn = frequencies(logits, temperature=1.0, top_p=top_p)
    expected = torch.zeros(4).double()
    expected[kept] = logits.exp().double()[kept]
    assert (drawn[kept] > 0).all()
    assert drawn.nonzero().numel() == len(kept)
    assert (drawn - expected / expected.sum()).abs().max() < 0.04


def test_ties_go_to_the_lower_token():
    logits = torch.tensor([0.0, 5.0, 5.0, 5.0])
    assert sample(logits) == 1
    assert frequencies(logits, count=200, temperature=1.0, top_p=0.3)[1] == 1.0


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e300])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([1e30, 3e38, -3e38, -math.inf])
    drawn = frequencies(logits, count=100, temperature=temperature)
    assert drawn[3] == 0
    if temperature < 1:
        assert drawn[1] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_of_other_dtypes(dtype):
    assert sample(torch.tensor([0.0, 2.0, 1.0], dtype=dtype)) == 1


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf], []])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits(bad, temperature):
    with pytest.raises(ValueError, match=r"largest logit is|must be \[vocab\]"):
        sample(torch.tensor(bad), temperature=temperature)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(
        ["the theory of the thing, and then the end. " * 20], 280, tmp_path_factory.mktemp("tokenizer")
    )


TEXTS = ["", "the then", "naïve 为什么 🙂🇩🇪", "a\x00b\r\n\t ", "".join(map(chr, range(1, 256)))]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_markers_are_single_tokens(tokenizer):
    for number, marker in enumerate(SPECIAL_TOKENS):
        assert tokenizer.token(marker) == number
        assert tokenizer.encode(f"a{marker}b")[1:-1] == [number]
    assert len(tokenizer) == 280


@pytest.mark.parametrize("byte_level", [True, False], ids=["byte-level", "any decoder"])
def test_stream_never_splits_a_character(tokenizer, byte_level):
    text = "为 naïve 🙂 the end"
    stream = TextStream(tokenizer._tokenizer, byte_level)
    pieces = [stream.push(token) for token in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces.count("") > 4, "the bytes of a character arrive one by one, and must be held back"


@pytest.mark.parametrize("byte_level", [True, False], ids=["byte-level", "any decoder"])
def test_stream_equals_decode_on_any_tokens(tokenizer, byte_level):
    draw = random.Random(0)
    for _ in range(300):
        tokens = [draw.randrange(285) for _ in range(draw.randrange(30))]  # 280 to 284 do not exist
        stream = TextStream(tokenizer._tokenizer, byte_level)
        assert "".join([stream.push(token) for token in tokens] + [stream.flush()]) == tokenizer.decode(tokens)


def test_stream_shows_bad_bytes_at_once(tokenizer):
    """A random model writes stray bytes; a reader must not wait for a good character to see that."""
    stream = tokenizer.stream()
    continuation = tokenizer.encode("为")[1]
    assert [stream.push(continuation) for _ in range(3)] == ["\ufffd"] * 3


def test_tokenizer_faults(tmp_path):
    with pytest.raises(ValueError, match=r"no such file; copy tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="not a tokenizer") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="vocab_size must be at least 270"):
        train_tokenizer(["x"], 200, tmp_path)


@pytest.fixture(scope="module")
def model():
    """A real one: two layers with compression, so that generation runs on everything a cache holds."""
    config = dsv4.Config(
        vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=128, q_lora_rank=128,
        o_groups=1, o_lora_rank=128, compress_ratios=(4, 128), n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=128, index_n_heads=2, index_topk=4, sliding_window=8,
    )  # fmt: skip
    return dsv4.init(config, seed=2)


@pytest.mark.parametrize("chunk", [5, 2048])
def test_model_greedy_is_argmax_of_stateless_logits(model, chunk):
    prompt = [7 * n % 300 for n in range(21)]
    tokens = list(prompt)
    for _ in range(8):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    cache = model.new_cache()
    got = list(model.generate(prompt, 8, cache=cache, prefill_chunk=chunk))
    assert got == tokens[len(prompt) :]
    assert cache.length == len(tokens) - 1
    assert cache.token_ids().tolist() == tokens[:-1]


def test_model_goes_on_from_a_snapshot_and_after_a_crop(model):
    prompt = list(range(40))
    cache = model.new_cache()
    first = list(model.generate(prompt, 3, cache=cache))
    branch = cache.snapshot()
    straight = list(model.generate(first[-1:], 6, cache=cache))
    assert list(model.generate(first[-1:], 6, cache=branch)) == straight
    branch.crop(len(prompt) + 2)
    assert list(model.generate(first[-1:], 6, cache=branch)) == straight
    assert list(model.generate(prompt, 9)) == first + straight


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("chunk", [1, 30, 2048])
def test_a_batch_gives_each_prompt_its_own_tokens(model, temperature, chunk):
    """Those it gets alone: prompts of different lengths, which end at different times."""
    prompts = [[(7 + seed) * n % 300 for n in range(length)] for seed, length in enumerate((21, 1, 130, 4))]
    settings = {"max_new_tokens": 9, "temperature": temperature}
    alone = [list(model.generate(p, seed=5 + i, **settings)) for i, p in enumerate(prompts)]
    stops = {alone[2][3], alone[0][6]}
    expected = [list(model.generate(p, seed=5 + i, stop_tokens=stops, **settings)) for i, p in enumerate(prompts)]
    assert {len(tokens) for tokens in expected} >= {4, 9}
    fed = []
    steps = list(
        model.generate_batch(
            prompts, seed=5, stop_tokens=stops, prefill_chunk=chunk, progress=lambda *x: fed.append(x), **settings
        )
    )
    assert [[token for token in column if token is not None] for column in zip(*steps, strict=True)] == expected
    assert all(token is None for step in steps[4:] for token in (step[2],)), "an ended sequence gives None"
    assert fed[-1] == (152, 152) and fed == sorted(fed)


def test_a_batch_is_fed_no_more_than_is_asked_for(model):
    assert list(model.generate_batch([[3]], 0)) == [], "a cache of no tokens is not asked for"
    steps = model.generate_batch([[1, 2], torch.tensor([[3]])], 5)
    assert [len(next(steps)) for _ in range(2)] == [2, 2]
    steps.close()
    assert list(model.generate_batch([[4]], 1)) == [[next(model.generate([4]))]]


def test_the_cache_goes_on_with_gradients_on(model):
    """No inference-mode tensor may be left in it: torch refuses to write to those in any other mode."""
    cache = model.new_cache()
    token = list(model.generate([1, 2, 3], 2, cache=cache))[-1]
    assert model(torch.tensor([[token]]), cache=cache).isfinite().all()


def test_bundled_tokenizer_fits_its_model():
    config = dsv4.Config.preset("nano")
    tokenizer = Tokenizer(resolve("nano"))
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.token(BOS) == config.bos_token_id
    assert tokenizer.token(EOS) == config.eos_token_id
    assert all(tokenizer.decode([token]) for token in range(config.vocab_size)), "every token has a text"
    prompt = dsv4.encode_messages([{"role": "user", "content": "naïve 为什么?"}], "thinking")
    assert tokenizer.decode(tokenizer.encode(prompt)) == prompt
    assert tokenizer.encode(prompt)[-2:] == [tokenizer.token(ASSISTANT), tokenizer.token(THINK_OPEN)]
