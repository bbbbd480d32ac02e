"""The command line as its users meet it: what it prints, where, and with which exit code."""

import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import dsv4
from dsv4 import bench, checkpoint, cli, demo
from dsv4.bench.measure import Case, Clock, Comparison, Peaks, Timing, judge
from dsv4.generation import Tokenizer
from dsv4.generation.tokenizer import train_tokenizer

TINY = dsv4.Config(
    vocab_size=272, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=128, q_lora_rank=128,
    o_groups=1, o_lora_rank=128, compress_ratios=(4, 128), n_routed_experts=2, num_experts_per_tok=1,
    moe_intermediate_size=128, index_n_heads=1, index_topk=8, sliding_window=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two layers with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.save_released(dsv4.init(TINY), path)
    train_tokenizer(["the thing and the theory"], TINY.vocab_size, path)
    return path


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("command", ["generate", "plan", "inspect", "bench", "env", "demo"])
def test_help_of_every_command(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"usage: dsv4 {command}" in out
    assert f"dsv4 {command}" in run("--help")[1] or command == "demo"


def test_version(run):
    assert run("--version") == (0, f"dsv4 {dsv4.__version__}\n", "")


@pytest.mark.parametrize("command", ["generate", "plan", "bench"])
def test_help_teaches_by_example(run, command):
    assert re.search(rf"examples:\n( .*\n)*.*dsv4 {command} ", run(command, "--help")[1])


@pytest.mark.parametrize(
    ("name", "figures"),
    [("v4-pro", ["5,031", "48,068", "10.5%", "27.4%"]), ("v4-flash", ["3,514", "48,068", "7.3%", "10.3%"])],
)
def test_plan(run, name, figures):
    code, out, err = run("plan", name, "--context", "1M")
    assert (code, err) == (0, "")
    for figure in [*figures, "1,048,576 tokens", "FP8-equivalent = 1 x FP8 + 2 x BF16 + 0.5 x FP4"]:
        assert figure in out


def test_plan_formula_adds_up(run):
    _, out, _ = run("plan", "v4-flash", "--context", "64K")
    for line in re.findall(r"^  (?:this model|V3\.2) +(.* = .*) GFLOP$", out, re.MULTILINE):
        terms, total = line.replace(",", "").split(" = ")
        found = sum(float(weight) * float(count) for weight, count in re.findall(r"([\d.]+) x ([\d.]+)", terms))
        assert found == pytest.approx(float(total), abs=0.01)


def test_plan_as_json(run):
    values = json.loads(run("plan", "v4-pro", "--json")[1])
    assert values["context"] == 1 << 20
    assert int(values["kv_bytes_per_token"]) == 5031
    share = values["fp8_equivalent_flops"] / values["v3.2"]["fp8_equivalent_flops"]
    assert share == pytest.approx(0.27, abs=0.01)


def test_plan_of_a_folder(run, folder):
    code, out, _ = run("plan", folder, "--context", "1K")
    assert code == 0
    assert out.startswith("tiny at 1,024 tokens (1K)")


def test_plan_draws(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run("plan", "nano", "--plot", tmp_path / "plan.svg")
    assert code == 0
    assert (tmp_path / "plan.svg").stat().st_size > 10_000
    assert "plan.svg" in err


def test_plot_without_matplotlib(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("plan", "nano", "--plot", tmp_path / "plan.svg")
    assert code == 2
    assert "pip install matplotlib" in err
    assert err.count("\n") == 1


def test_env(run):
    code, out, _ = run("env")
    assert code == 0
    for op in dsv4.ops.implementations():
        assert re.search(rf"^{op} +\S", out, re.MULTILINE)
    for words in (torch.__version__, "DSV4_MAX_ISA", "processor", "cpu ops", "cuda ops"):
        assert words in out


def test_env_as_json(run, monkeypatch):
    monkeypatch.setenv("DSV4_MAX_ISA", "scalar")
    values = json.loads(run("env", "--json")[1])
    assert values["DSV4_MAX_ISA"] == "scalar"
    assert values["implementations"] == dsv4.ops.implementations()


def test_env_knows_the_instruction_sets(run, monkeypatch):
    monkeypatch.setenv("DSV4_MAX_ISA", "SCALAR")
    assert "SCALAR: unknown, limits nothing; there are scalar, avx512, amx, sm80, sm90" in run("env")[1]
    monkeypatch.setenv("DSV4_MAX_ISA", "scalar")
    assert "unknown" not in run("env")[1]


def test_inspect(run, folder):
    code, out, err = run("inspect", folder)
    assert (code, err) == (0, "")
    for words in ("2 (1 CSA, 1 HCA)", "released", "random weights", "tokenizer.json", "experts fp4"):
        assert words in out


def test_generate_streams_what_the_model_says(run, folder):
    code, out, err = run("generate", folder, "--prompt", "the thing", "--raw", "--max-new-tokens", 6, "--ignore-eos")
    tokenizer = Tokenizer(folder)
    tokens = list(dsv4.load(folder).generate(tokenizer.encode("the thing"), 6))
    assert code == 0
    assert out == tokenizer.decode(tokens) + "\n"
    assert "random weights; its text means nothing" in err
    assert "\r" not in err, "no progress bar where no terminal is"


@pytest.mark.parametrize("mode", ["--chat", "--thinking"])
def test_generate_encodes_the_prompt(run, folder, mode, monkeypatch):
    seen = []
    monkeypatch.setattr("dsv4.console.generate", lambda model, ids, *_, **__: iter([seen.append(ids) or 40]))
    code, _, _ = run("generate", folder, "--prompt", "hi", "--system", "be brief", mode)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert code == 0
    assert seen == [Tokenizer(folder).encode(dsv4.encode_messages(messages, mode[2:]))]


def test_statistics(run, folder):
    _, out, err = run("generate", folder, "--prompt", "the", "--raw", "--max-new-tokens", 4, "--ignore-eos", "--stats")
    prompt = len(Tokenizer(folder).encode("the"))
    length = prompt + 3
    cache = dsv4.plan(TINY, length).cache_bytes
    assert re.search(rf"prompt +{prompt} tokens, [\d.,]+ tokens/s", err)
    assert re.search(r"generated +4 tokens, [\d.,]+ tokens/s", err)
    assert f"({cache:,} bytes) for {length} tokens" in err
    assert "V3.2       would hold" in err
    assert "tokens/s" not in out


def test_sampling_settings_reach_the_loop(run, folder):
    def text(*options):
        return run("generate", folder, "--prompt", "a", "--raw", "--max-new-tokens", 8, "--ignore-eos", *options)[1]

    assert text("--temperature", 2, "--seed", 1) == text("--temperature", 2, "--seed", 1)
    assert text("--temperature", 2, "--seed", 1) != text("--temperature", 2, "--seed", 2)
    assert text("--temperature", 2, "--seed", 1, "--top-p", 1e-6) == text()


def test_tokens_need_no_tokenizer(run, folder, tmp_path):
    path = broken(folder, tmp_path, lambda path: (path / "tokenizer.json").unlink())
    code, out, _ = run("generate", path, "--tokens", "5, 6 7", "--max-new-tokens", 4, "--ignore-eos")
    expected = list(dsv4.load(folder).generate([5, 6, 7], 4))
    assert code == 0
    assert [int(part) for part in out.split()] == expected


def test_prompt_from_a_file(run, folder, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("naïve 为".encode())
    assert run("generate", folder, "--prompt-file", file, "--max-new-tokens", 1)[0] == 0
    file.write_bytes(b"\xff\xfe")
    code, _, err = run("generate", folder, "--prompt-file", file)
    assert code == 2
    assert "is not UTF-8 text" in err


def broken(folder, tmp_path, change):
    """A copy of the checkpoint, changed."""
    path = tmp_path / "broken"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    change(path)
    return path


def truncate(path):
    (file,) = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:5000])


def other_model(path):
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))


@pytest.mark.parametrize("command", ["generate", "inspect"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, "safetensors"),
        (other_model, "model_type must be 'deepseek_v4', got 'llama'"),
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: (path / "config.json").write_text("{"), "not readable as JSON"),
        (lambda path: [file.unlink() for file in path.glob("*.safetensors")], "safetensors"),
    ],
)
def test_broken_checkpoints(run, folder, tmp_path, command, change, words):
    path = broken(folder, tmp_path, change)
    code, out, err = run(command, path, *(["--prompt", "x"] if command == "generate" else []))
    assert (code, out) == (2, "")
    assert err.startswith(f"dsv4 {command}: ")
    assert words in err
    assert err.count("\n") == 1


def test_no_tokenizer(run, folder, tmp_path):
    path = broken(folder, tmp_path, lambda path: (path / "tokenizer.json").unlink())
    code, _, err = run("generate", path, "--prompt", "x")
    assert code == 2
    assert "copy tokenizer.json from the release" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such folder, nor a bundled model (nano)"),
        (["generate", "nano"], "one of the arguments --prompt --prompt-file --tokens is required"),
        (["generate", "nano", "--tokens", "1,x"], "'1,x' must be token numbers, such as 1,2,3"),
        (["generate", "nano", "--tokens", "1,9999999999"], "'1,9999999999' must be token numbers"),
        (["generate", "nano", "--prompt", "a\udcff"], "--prompt is not UTF-8 text"),
        (["generate", "nano", "--prompt", "a", "--system", "\udcff"], "--system is not UTF-8 text"),
        (["generate", "nano", "--tokens", "1,512"], "must lie in [0, 512), got 1 to 512"),
        (["generate", "nano", "--tokens", "1", "--system", "y"], "--system needs --chat or --thinking"),
        (["generate", "nano", "--tokens", "1", "--max-new-tokens", str(1 << 20)], "exceed the 1,048,576 positions"),
        (["generate", "nano", "--prompt", "x", "--max-new-tokens", "0"], "'0' must be a whole number from 1 on"),
        (["generate", "nano", "--prompt", "x", "--max-new-tokens", "many"], "'many' must be a whole number"),
        (["generate", "nano", "--prompt", "x", "--temperature", "-1"], "'-1' must be a number from 0 on"),
        (["generate", "nano", "--prompt", "x", "--temperature", "nan"], "'nan' must be a number from 0 on"),
        (["generate", "nano", "--prompt", "x", "--top-p", "1.5"], "'1.5' must be above 0 and at most 1"),
        (["generate", "nano", "--prompt", "x", "--device", "tpu9"], "'tpu9' is no device"),
        (["generate", "nano", "--prompt", "x", "--device", "cuda:99"], "use --device cpu"),
        (["generate", "nano", "--prompt", "x", "--raw", "--system", "y"], "--system needs --chat or --thinking"),
        (["generate", "nano", "--prompt", "", "--raw"], "the prompt is empty"),
        (["generate", "nano", "--prompt-file", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["plan", "v5"], "no preset 'v5'; there are v4-flash, v4-pro, nano"),
        (["plan", "v4-pro", "--context", "1G"], "'1G' is no number of tokens; write 131072, 64K or 1M"),
        (["plan", "v4-pro", "--context", "9" * 5000], "is no number of tokens"),
        (["inspect", "nano", "--check-layers", "--memory", "9" * 5000], "is no amount of memory"),
        (
            ["bench", "--layer", "--shape", "nano", "--json", "/nowhere/r.jsonl"],
            "bench: /nowhere/r.jsonl: No such file",
        ),
        (["plan", "v4-pro", "--context", "0"], "'0' must be a whole number of tokens from 1"),
        (["plan", "v4-pro", "--plot", "/nowhere/plan.png"], "/nowhere/plan.png"),
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["bench", "--op", "sorting"], "no benchmark of 'sorting'; there are sparse_attention, sparse_att"),
        (["bench", "--shape", "v5"], "invalid choice: 'v5'"),
        (
            ["bench", "--quick", "--json", "/nowhere/r.jsonl"],
            "bench: /nowhere/r.jsonl: No such file or directory; name another",
        ),
        (["bench", "--million", "--resume", "/dev/null/x"], "bench: /dev/null/x: Not a directory; name another place"),
        (["sing"], "invalid choice: 'sing'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, words):
    code, _, err = run(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]


def test_interrupt_keeps_what_was_produced(run, folder, monkeypatch):
    tokenizer = Tokenizer(folder)
    tokens = tokenizer.encode("a为")

    def interrupted(model, ids, count, cache, **_):
        model(torch.tensor([ids]), cache=cache)
        yield from tokens[:-1]  # ends inside a character
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv4.console.generate", interrupted)
    code, out, err = run("generate", folder, "--prompt", "x", "--stats")
    assert code == 130
    assert out == "a\ufffd\n"
    assert f"generated  {len(tokens) - 1} tokens" in err


def test_control_characters_stay_off_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    dsv4.console.write("a\x1b[2Jb\tc\nd\x07")
    assert capsys.readouterr().out == "a\ufffd[2Jb\tc\nd\ufffd"


def test_demo(run, monkeypatch):
    monkeypatch.setattr(demo, "NEW_TOKENS", 2)
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    for words in ("Found here", "3,514", "48,068", "random weights", "tokens/s", "V3.2       would hold", "as held"):
        assert words in out
    assert "NOT as held" not in out
    prompt, window = map(int, re.search(r"prompt +(\d+) tokens, the window is (\d+)", out).groups())
    assert prompt > window == 128


PEAKS = Peaks(Timing(130.0, 1.0, 100.0), 1e6, Timing(70.0, 1.0, 50.0), Timing(11.0, 1.0, 10.0), 1e9)


@pytest.fixture
def fast_bench(monkeypatch):
    """The driver with made-up peaks and a stopped clock; the checks are real."""
    monkeypatch.setattr(bench, "measure_peaks", lambda clock: PEAKS)
    monkeypatch.setattr(Clock, "time", lambda self, run: (run(), Timing(1000.0, 2.0, 990.0))[1])


KEYS = [
    "op", "impl", "device", "shape", "us", "spread", "gflop", "mbyte", "roof_us", "roof_fraction", "error",
    "error_limit", "baseline", "baseline_us", "ratio",
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
    "moe_experts": ["tokens=33 hidden=256 inter=128 experts=16 top_k=2 fp4"] * 3,
    "moe_experts_backward": ["tokens=33 hidden=256 inter=128 experts=16 top_k=2 bf16"],
    **{op: ["rows=33 heads=8 head_dim=128 bf16"] for op in ("query_norm_rope", "query_norm_rope_backward")},
    "store_window": ["rows=33 head_dim=128 fp8"],
    "compress": ["csa rows=33 ratio=4 head_dim=128 fp8"],
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
    assert baselines == ["eager torch bf16", "transformers", "kt-kernel FP4"]
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


def test_clock():
    calls = []
    clock = Clock(torch.device("cpu"), quick=True)
    timing = clock.time(lambda: calls.append(time.sleep(0.004 if len(calls) % 2 else 0.002)))
    assert len(calls) == 4, "one to warm up, three that count"
    assert 2000 <= timing.fastest <= timing.us
    assert timing.us >= 4000, "the median of 4, 2 and 4 ms"
