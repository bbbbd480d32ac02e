"""The command line as its users meet it: what it prints, where, and with which exit code."""

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dsv4
from dsv4 import checkpoint, demo
from dsv4.checkpoint.progress import terminal_bar
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


def test_env_names_the_machine():
    found = dsv4.environment.environment()
    memory = re.search(r"^MemTotal: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found["hardware"]["memory bytes"] == int(memory[1]) << 10
    assert found["hardware"]["processor"] in re.findall(r": (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert {name: found["versions"][name] for name in ("tokenizers", "safetensors")} == {
        name: importlib.metadata.version(name) for name in ("tokenizers", "safetensors")
    }
    line = next(line for line in dsv4.environment.environment_lines(found) if line.startswith("processor  "))
    found["hardware"]["memory bytes"] = None  # where the system does not say
    assert re.sub(r", \d+ GiB$", "", line) in dsv4.environment.environment_lines(found)


def test_env_lists_gpus_by_their_number(monkeypatch):
    gpus = [
        SimpleNamespace(name="first", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132),
        SimpleNamespace(name="second", major=12, minor=0, total_memory=96 << 30, multi_processor_count=188),
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", gpus.__getitem__)
    found = dsv4.environment.environment()
    second = {"name": "second", "capability": "12.0", "memory bytes": 96 << 30, "processors": 188}
    assert found["hardware"]["gpus"][1] == second
    lines = dsv4.environment.environment_lines(found)
    first = lines.index("gpu        first, sm_90, 80 GiB")
    assert lines[first - 1].startswith("threads")
    assert lines[first + 1] == "gpu        second, sm_120, 96 GiB"
    assert lines[first + 2].startswith("cpu ops")


def test_env_knows_the_instruction_sets(run, monkeypatch):
    monkeypatch.setenv("DSV4_MAX_ISA", "SCALAR")
    assert "SCALAR: unknown, limits nothing; there are scalar, avx2, avx512, amx, sm80, sm90" in run("env")[1]
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
        (["generate", "nano", "--prompt", "x", "--max-new-tokens", "0"], "'0' must be a whole number from 1 to 2^40"),
        (["generate", "nano", "--prompt", "x", "--max-new-tokens", "many"], "'many' must be a whole number"),
        (["generate", "nano", "--prompt", "x", "--temperature", "-1"], "'-1' must be a number from 0 to 1,000,000"),
        (["generate", "nano", "--prompt", "x", "--temperature", "nan"], "'nan' must be a number from 0 to 1,000,000"),
        (["generate", "nano", "--prompt", "x", "--seed", str(1 << 63)], "must be a whole number from 0 to 2^63 - 1"),
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
        (["plan", "v4-pro", "--plot", "plan"], "plan: the ending says the format; name it plan.png"),
        *(
            ([*command, option, ""], f"argument {option}: is empty; name a file or folder")
            for command, option in (
                (["plan", "nano"], "--plot"),
                (["bench"], "--json"),
                (["bench", "--million"], "--resume"),
                (["bench", "--layer"], "--scratch"),
                (["inspect", "nano", "--check-layers"], "--json"),
                (["generate", "nano"], "--prompt-file"),
            )
        ),
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


def test_generate_runs_what_its_options_say(run, folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    load, loaded, ran = checkpoint.load, [], []
    monkeypatch.setattr(checkpoint, "load", lambda *how: loaded.append(how) or load(how[0], "cpu", *how[2:]))
    monkeypatch.setattr("dsv4.console.generate", lambda *_, **settings: iter([ran.append(settings) or 1]))
    options = ("--device", "cuda:1", "--quantization", "off", "--dtype", "float32", "--prefill-chunk", 7)
    draws = {"temperature": 0.5, "top_p": 0.9, "seed": 3}
    for more in (options, ("--temperature", 0.5, "--top-p", 0.9, "--seed", 3, "--ignore-eos")):
        assert run("generate", folder, "--prompt", "x", *more)[0] == 0
    assert loaded == [
        (folder, torch.device("cuda:1"), "off", torch.float32),
        (folder, torch.device("cpu"), "checkpoint", torch.bfloat16),
    ]
    plain = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "stop_tokens": (TINY.eos_token_id,), "prefill_chunk": 7}
    said = plain | draws | {"stop_tokens": (), "prefill_chunk": 2048}
    assert [{name: settings[name] for name in plain} for settings in ran] == [plain, said]


def test_bench_runs_what_its_options_say(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    ran = []
    monkeypatch.setattr("dsv4.bench.run", lambda **options: ran.append(options) or 0)
    monkeypatch.setattr("dsv4.bench.million.run", lambda *options: ran.append(options) or 0)
    assert run("bench", "--op", "mhc_post", "--shape", "nano", "--context", "4K", "--device", "cuda:1")[0] == 0
    assert run("bench", "--quick", "--json", "x")[0] == 0
    assert run("bench", "--million")[0] == 0
    cuda = {"ops": ["mhc_post"], "shapes": ["nano"], "contexts": [4096], "device": torch.device("cuda:1")}
    assert ran == [
        cuda | {"quick": False, "json_file": None},
        dict.fromkeys(cuda) | {"device": torch.device("cpu"), "quick": True, "json_file": "x"},
        (1 << 20, None, None),
    ]


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
    shown = (
        "Found here",
        "3,514",
        "48,068",
        "knows how code looks",
        "class WordCounter",
        "tokens/s",
        "would hold",
        "as held",
    )
    for words in shown:
        assert words in out
    assert "NOT as held" not in out
    prompt, window = map(int, re.search(r"prompt +(\d+) tokens, the window is (\d+)", out).groups())
    assert prompt > window == 128


def test_a_bar_without_a_terminal_writes_nothing(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with terminal_bar() as bar:
        bar.update(bar.add_task("prompt", total=2), completed=1)
        bar.console.print()  # as rich 13 does at the end of any bar
    assert capsys.readouterr() == ("", "")
