"""The command line: generate | plan | inspect | bench | env | demo.

Results go to standard output, everything about them to standard error. A fault is one line that names the mend, with
exit code 2; an interrupt leaves what was produced and exits with 130.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

import dsv4
from dsv4 import checkpoint, environment, planner
from dsv4.checkpoint import layer_check
from dsv4.checkpoint.loader import BUNDLED, RANDOM
from dsv4.checkpoint.memory import keep_freed, parse_size, size
from dsv4.console import Run, end_tokens, say
from dsv4.generation import Tokenizer, encode_messages
from dsv4.generation.loop import check_positions
from dsv4.model.config import Config
from dsv4.model.transformer import Transformer
from dsv4.planner import FLOP_WEIGHT, Flops, Plan, format_context, parse_context

_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130
_DTYPES = ("bfloat16", "float32", "float64")

_EXAMPLES = """examples:
  dsv4 env                                          what this machine has and what each op runs on
  dsv4 plan v4-pro --context 1M                     KV bytes, FLOPs and weights next to DeepSeek-V3.2
  dsv4 plan v4-flash --plot plan.svg                the same over the context length, drawn
  dsv4 inspect ./DeepSeek-V4-Flash                  what a checkpoint holds, without loading it
  dsv4 inspect ./DeepSeek-V4-Flash --check-layers   runs it layer by layer, with memory for one
  dsv4 generate nano --prompt "import os" --raw     the bundled model
  dsv4 generate ./DeepSeek-V4-Flash --prompt-file question.txt --thinking --temperature 0.6 --top-p 0.95
  dsv4 bench --op mhc_post --json results.jsonl     an op against eager torch and the machine's own peaks

MODEL is a folder with a checkpoint (released layout or transformers'), or the name of a bundled one: nano.
`dsv4 COMMAND --help` explains the options of a command."""


class _Parser(argparse.ArgumentParser):
    """One line an error instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(_BAD_INPUT, f"{self.prog}: {_one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. `arguments`: None takes those of the process."""
    # Python leaves None where the caller closed a stream.
    sys.stdout, sys.stderr = (
        stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") for stream in (sys.stdout, sys.stderr)
    )
    options = argparse.Namespace(command="")
    try:
        options = _parser().parse_args(arguments)
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader has left
        return 0
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):
            print(f"dsv4 {options.command}: {_one_line(_reason(error))}", file=sys.stderr)
        return _BAD_INPUT
    finally:
        for stream in (sys.stdout, sys.stderr):
            _give_up(stream)


def _give_up(stream: TextIO) -> None:
    """What cannot be written now must not be tried again at exit, where Python would complain."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _reason(error: Exception) -> str:
    """What went wrong, without the number that the system gives a failed call."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.filename is None:
        return f"{error.strerror}; make room or write elsewhere" if error.errno == errno.ENOSPC else error.strerror
    mend = "check its permissions" if isinstance(error, PermissionError) else "name another place"
    return f"{error.filename}: {error.strerror}; {mend}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser("dsv4", description="DeepSeek-V4 models and ops.", epilog=_EXAMPLES, formatter_class=plain)
    parser.add_argument("--version", action="version", version=f"dsv4 {dsv4.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str, more: str = "") -> _Parser:
        added = commands.add_parser(name, help=text, description=text, epilog=more, formatter_class=plain)
        added.set_defaults(run=run)
        return added

    _add_generate(command("generate", _generate, "Continue a prompt and stream the text.", _GENERATE_HELP))
    _add_plan(command("plan", _plan, "KV bytes, FLOPs of one token and weights; against DeepSeek-V3.2.", _PLAN_HELP))
    _add_inspect(command("inspect", _inspect, "What a checkpoint holds, and what is wrong with it.", _INSPECT_HELP))
    _add_bench(command("bench", _bench, "Check and time ops against eager torch and the machine's peaks.", _BENCH_HELP))
    env = command("env", _env, "Versions, hardware, op libraries, and the implementation each op runs on.")
    env.add_argument("--json", action="store_true", help="print one JSON object")
    command("demo", _demo, "Look around, plan V4-Flash at 1M tokens, and generate with the bundled model.")
    return parser


def _number(kind: type, least: float, most: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
        return value

    return parse


def _file(text: str) -> str:
    """A name; not the empty one of a variable of the shell that is not set, which would be taken for none."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return text


def _token_list(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be token numbers, such as 1,2,3")
    return [int(part) for part in parts]


def _parsed(parse: Callable[[str], int]) -> Callable[[str], int]:
    def checked(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


_context, _size = _parsed(parse_context), _parsed(parse_size)


# generate

_GENERATE_HELP = """The prompt is one user message, wrapped as the released models expect; --raw feeds it as it is.
Text goes to standard output as it comes; notes, progress and --stats go to standard error.

examples:
  dsv4 generate nano --prompt "def main():" --raw --max-new-tokens 40 --stats
  echo "What is 6*7?" | dsv4 generate ./DeepSeek-V4-Flash --prompt-file - --thinking"""


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a bundled name (nano)")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", type=_file, metavar="FILE",
                        help="read the prompt from a UTF-8 file; - is standard input")  # fmt: skip
    prompt.add_argument("--tokens", type=_token_list, metavar="IDS",
                        help="the prompt as token numbers (1,2,3); gives numbers, needs no tokenizer")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--chat", dest="mode", action="store_const", const="chat", help="answer directly (default)")
    mode.add_argument("--thinking", dest="mode", action="store_const", const="thinking",
                      help="let the model reason before it answers")  # fmt: skip
    mode.add_argument("--raw", dest="mode", action="store_const", const="raw", help="continue the text as it is")
    parser.add_argument("--system", metavar="TEXT", help="system message (not with --raw)")
    count = _number(int, 1, 1 << 40, "a whole number from 1 to 2^40")
    parser.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="default 128")
    parser.add_argument("--temperature", type=_number(float, 0, 1e6, "a number from 0 to 1,000,000"),
                        default=0.0, metavar="T", help="0 takes the likeliest token (default)")  # fmt: skip
    parser.add_argument("--top-p", type=_number(float, 1e-9, 1, "above 0 and at most 1"), default=1.0, metavar="P",
                        help="draw from the likeliest that sum to P; default 1; not at temperature 0")  # fmt: skip
    parser.add_argument("--seed", type=_number(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1"), default=0,
                        metavar="N", help="of the random draws; default 0; no effect at temperature 0")  # fmt: skip
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sentence token")
    parser.add_argument(
        "--prefill-chunk", type=count, default=2048, metavar="N", help="prompt tokens a step; default 2048"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1; cuda has not run on a GPU")
    parser.add_argument("--quantization", choices=("checkpoint", "off"), default="checkpoint",
                        help="checkpoint (default): as stored, FP8 and FP4; off: plain weights and cache")  # fmt: skip
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of activations; default bfloat16")
    parser.add_argument("--stats", action="store_true", help="tokens/s, cache bytes, and what DeepSeek-V3.2 would hold")
    parser.set_defaults(mode="chat")


def _generate(options: argparse.Namespace) -> int:
    if options.system is not None and (options.mode == "raw" or options.tokens is not None):
        raise ValueError("--system needs --chat or --thinking and a text: a raw prompt has no messages")
    for name in ("prompt", "system"):
        # Bytes of the command line that are not UTF-8 come as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in getattr(options, name) or ""):
            raise ValueError(f"--{name} is not UTF-8 text")
    text = _read_text(options.prompt_file) if options.prompt_file is not None else options.prompt
    model, tokenizer = _load(options)
    ids = options.tokens if tokenizer is None else tokenizer.encode(_prompt_text(text, options.mode, options.system))
    check_positions(model.config, len(ids) + options.max_new_tokens)
    keep_freed()
    run = Run(model, tokenizer, ids)
    if model.note:
        say(f"note: {options.model}: {model.note}{'; its text means nothing' * (model.note == RANDOM)}")
    try:
        run.stream(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            stop_tokens=() if options.ignore_eos else end_tokens(model.config),
            prefill_chunk=options.prefill_chunk,
        )
    finally:
        if options.stats:
            say(*run.stats_lines())
    return 0


def _read_text(name: str) -> str:
    if name == "-" and sys.stdin is None:
        raise ValueError("standard input is closed; name a file")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from None


def _prompt_text(text: str, mode: str, system: str | None) -> str:
    if mode == "raw":
        return text
    messages = [{"role": "system", "content": system}] if system is not None else []
    return encode_messages([*messages, {"role": "user", "content": text}], thinking_mode=mode)


def _load(options: argparse.Namespace) -> tuple[Transformer, Tokenizer | None]:
    """The tokenizer, where the prompt is a text, is read first: that takes no time, and it may be missing."""
    folder = checkpoint.resolve(options.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{options.model}: no config.json; a model is a folder with config.json and safetensors files")
    tokenizer = Tokenizer(folder) if options.tokens is None else None
    dtype = getattr(torch, options.dtype)
    return checkpoint.load(folder, _device(options.device), options.quantization, dtype), tokenizer


def _device(name: str) -> torch.device:
    try:
        device: torch.device | None = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name!r} is no device; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} GPUs found" if count else "no GPU that this torch can use"
        raise ValueError(f"{name}: {found}; use --device cpu, or install a CUDA build of torch")
    return device


# plan

_PLAN_HELP = """FLOPs are those of one token that follows CONTEXT others, in FP8 equivalents:
  FP8-equivalent = 1 x FP8 + 2 x BF16 + 0.5 x FP4 (index scores)

examples:
  dsv4 plan v4-pro --context 1M
  dsv4 plan v4-flash --context 64K --plot flash.png
  dsv4 plan ./my-model --context 32768"""


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="v4-flash, v4-pro, nano, or a folder with config.json")
    parser.add_argument(
        "--context", type=_context, default=1 << 20, metavar="N", help="tokens: 131072, 64K, 1M (default)"
    )
    parser.add_argument("--plot", type=_file, metavar="FILE",
                        help="draw both over the context length, with v4-flash and v4-pro")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _config(name: str) -> Config:
    try:
        return Config.preset(name)
    except ValueError as unknown:
        if not Path(name).exists():
            raise ValueError(f"{name}: no such folder or file; {unknown}") from None
    return Config.from_file(name)


def _plan(options: argparse.Namespace) -> None:
    config = _config(options.model)
    found = planner.plan(config, options.context)
    if options.plot:
        models = {"v4-pro": Config.preset("v4-pro"), "v4-flash": Config.preset("v4-flash")}
        if config not in models.values():
            models[Path(options.model).name] = config
        planner.plot(list(models.items()), options.plot, max(options.context, 1 << 12))
    if options.json:
        print(json.dumps(_plan_values(found), indent=1))
    else:
        print("\n".join(plan_lines(options.model, found)))
    if options.plot:
        say(f"drawn: {options.plot}")


def _plan_values(found: Plan) -> dict[str, Any]:
    return {
        "context": found.context,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "kv_bytes": found.kv_bytes,
        "cache_bytes": found.cache_bytes,
        "flops": found.flops.raw,
        "fp8_equivalent_flops": found.flops.weighted,
        "weight_bytes": found.weight_bytes,
        "parameters": found.parameters,
        "active_parameters": found.active_parameters,
        "v3.2": {
            "kv_bytes_per_token": found.v32.kv_bytes_per_token,
            "kv_bytes": found.v32.kv_bytes,
            "flops": found.v32.flops.raw,
            "fp8_equivalent_flops": found.v32.flops.weighted,
        },
    }


def plan_lines(name: str, found: Plan) -> list[str]:
    """A plan as text."""
    v32, ours, theirs = found.v32, found.flops, found.v32.flops
    giga, kv_share = 1e9, f"{found.kv_ratio:.1%}"

    def row(what: str, mine: str, other: str = "", share: str = "") -> str:
        return f"{what:<34}{mine:>16}{other:>16}{share:>10}".rstrip()

    lines = [
        f"{Path(name).name} at {found.context:,} tokens ({format_context(found.context)})",
        "",
        row("", "this model", "V3.2", "share"),
        row("KV bytes a token", f"{found.kv_bytes_per_token:,.0f}", f"{v32.kv_bytes_per_token:,}", kv_share),
        row("KV bytes", size(found.kv_bytes), size(v32.kv_bytes), kv_share),
        row("cache, with window and tails", size(found.cache_bytes)),
        "",
    ]
    for (what, mine, precision), (_, other, other_precision) in zip(ours.terms, theirs.terms, strict=True):
        kinds = precision if precision == other_precision else f"{precision}; V3.2 {other_precision}"
        label = what if what.startswith("weights") else f"{what} ({kinds.upper()})"
        lines.append(row(f"GFLOP: {label}", f"{mine / giga:,.3f}", f"{other / giga:,.3f}"))
    lines += [
        row("GFLOP, FP8-equivalent", f"{ours.weighted / giga:,.3f}", f"{theirs.weighted / giga:,.3f}",
            f"{found.flops_ratio:.1%}"),
        "",
        "FP8-equivalent = 1 x FP8 + 2 x BF16 + 0.5 x FP4",
        f"  this model     {_formula(ours)}",
        f"  V3.2           {_formula(theirs)}",
        "  (the report does not define its \"equivalent FP8 FLOPs\"; this weighting gives its shares)",
        "",
        row("weights", size(found.weight_bytes)),
        row("parameters", f"{found.parameters / giga:,.3f} B"),
        row("  multiply one token", f"{found.active_parameters / giga:,.3f} B"),
        "(parameters count the block of multi-token prediction, which the release's own figure leaves out)",
    ]  # fmt: skip
    return lines


def _formula(flops: Flops) -> str:
    sums = {kind: sum(count for _, count, precision in flops.terms if precision == kind) for kind in FLOP_WEIGHT}
    parts = [f"{FLOP_WEIGHT[kind]:g} x {sums[kind] / 1e9:,.3f}" for kind in ("fp8", "bf16", "fp4") if sums[kind]]
    return f"{' + '.join(parts)} = {flops.weighted / 1e9:,.3f} GFLOP"


# inspect, env, bench, demo

_INSPECT_HELP = """Without options, headers are read and no weights. --check-layers loads and runs a layer at a time, so
that a checkpoint may be larger than memory: all tokens on the kernels, the last few again on the references of the
ops. NaN, or results further apart than the limit, make exit code 1. Layers that --layers leaves out pass the streams
on unchanged. The head and multi-token prediction blocks are not run.

examples:
  dsv4 inspect ./DeepSeek-V4-Flash
  dsv4 inspect ./DeepSeek-V4-Flash --check-layers --memory 8G --json layers.jsonl
  dsv4 inspect ./DeepSeek-V4-Flash --check-layers --layers 0-3,7 --tokens 4K"""


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a bundled name")
    parser.add_argument("--check-layers", action="store_true", help="run it layer by layer against the references")
    parser.add_argument("--memory", type=_size, metavar="BYTES",
                        help="what the process may take: 8G, 512M; default: what is free")  # fmt: skip
    parser.add_argument("--layers", metavar="LIST", help="only these: 0-3,7; default all")
    parser.add_argument(
        "--tokens", type=_context, metavar="N", help="length of the sequence of random ids; default 512"
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="write one JSON object a layer, as it is done")


def _check_layers(options: argparse.Namespace) -> int:
    tokens = options.tokens or layer_check.TOKENS
    check = layer_check.LayerCheck(options.model, options.layers, tokens, options.memory)
    faults: list[str] = []
    done: list[int] = []
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(options.json, "w", encoding="utf-8")) if options.json else None
        print("\n".join(layer_check.heading(check)), flush=True)
        try:
            for report in check.run():
                done.append(report.layer)
                faults += report.faults
                if out is not None:
                    out.write(json.dumps(report.to_dict()) + "\n")
                    out.flush()
                print(layer_check.line(report), flush=True)
        except KeyboardInterrupt:
            say(f"dsv4 inspect: interrupted; checked {f'layers {layer_check.ranges(done)}' if done else 'no layer'}")
            raise
        finally:
            if faults:
                more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
                say(f"dsv4 inspect: {_one_line('; '.join(faults[:8]) + more)}")
    return _FAILED if faults else 0


def _inspect(options: argparse.Namespace) -> int:
    if options.check_layers:
        return _check_layers(options)
    for name in ("memory", "layers", "tokens", "json"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} belongs to --check-layers")
    found = checkpoint.inspect(options.model)
    stored = ", ".join(f"{dtype} {size(count)}" for dtype, count in found.bytes_by_dtype.items())
    storage = found.storage
    print(f"{found.folder}")
    print("\n".join(found.config_lines()))
    print(f"layout     {found.layout}, {len(found.files)} file{'s' * (len(found.files) != 1)}, {size(found.nbytes)}")
    print(f"formats    linear {storage.linear}, experts {storage.experts}, compressor {storage.compressor}")
    print(f"stored     {stored}")
    print(f"values     {found.parameters:,} ({found.active_parameters:,} used by one token)")
    has_tokenizer = (found.folder / "tokenizer.json").is_file()
    print(f"tokenizer  {'tokenizer.json' if has_tokenizer else 'none; dsv4 generate needs tokenizer.json here'}")
    if found.note:
        print(f"note       {found.note}")
    for problem in found.problems:
        say(f"dsv4 inspect: {problem}")
    return _BAD_INPUT if found.problems else 0


def _env(options: argparse.Namespace) -> None:
    found = environment.environment()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print("\n".join(environment.environment_lines(found)))
    print()
    print("\n".join(environment.implementation_lines(found)))


_BENCH_HELP = """Every result is checked against a float64 reference first; no time is printed where the check failed.
roof: the FLOPs and fewest bytes of the shape over this machine's own measured peaks.
recorded: the same call as a decoding model repeats it, without Python and torch's dispatcher. The share of the roof,
FLOPS and bytes/s are its.

examples:
  dsv4 bench --op mhc_pre --op mhc_post --shape v4-flash --json results.jsonl
  dsv4 bench --op sparse_attention --op index_topk --context 1M
  dsv4 bench --quick
  dsv4 bench --layer --json layer.jsonl
  dsv4 bench --million --resume run --json million.jsonl
  dsv4 bench --end-to-end --context 1K --context 4K --json nano.jsonl

--million: 1,048,576 tokens (the standard library's sources, a token a byte) through the first four layers of nano, then
64 decoded ones. With --resume FOLDER it saves its cache there, every half minute and when interrupted, and continues
from what it finds.

--end-to-end: nano, prompts of 1K, 4K, 16K and 64K tokens and decoding after them, beside transformers and llama.cpp
with the same weights (in a clone: pip install '.[peers]'), logits compared.

--layer, --million and --end-to-end are runs of their own, without --op."""


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op; may be repeated")
    parser.add_argument("--shape", action="append", metavar="NAME", choices=("nano", "v4-flash", "v4-pro"),
                        help="nano, v4-flash, v4-pro; may be repeated; default v4-flash")  # fmt: skip
    parser.add_argument("--context", action="append", type=_context, metavar="N",
                        help="tokens of the sequence for attention, rows at once for others (at most 4096, experts and "
                        "linears on a GPU 8192); may be repeated; default: several, as the op needs")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats, to see that it works")
    parser.add_argument("--million", action="store_true", help="prefill a million tokens in one process, and decode")
    parser.add_argument("--end-to-end", action="store_true", help="nano beside transformers and llama.cpp")
    parser.add_argument("--beside", action="append", choices=("transformers", "llama.cpp"), metavar="NAME",
                        help="with --end-to-end: only transformers or llama.cpp; may be repeated")  # fmt: skip
    parser.add_argument("--tokens", type=_context, metavar="N", help="with --million: so many tokens; default 1M")
    parser.add_argument("--resume", type=_file, metavar="FOLDER",
                        help="with --million: save there, continue from what is there")  # fmt: skip
    parser.add_argument("--layer", action="store_true",
                        help="write, load and run one full layer (v4-flash: 3.4 GiB of disk, 5 of memory)")  # fmt: skip
    parser.add_argument(
        "--scratch",
        type=_file,
        metavar="FOLDER",
        help="with --layer: an existing folder to write it in; default the system's",
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="write one JSON object a line")


def _bench(options: argparse.Namespace) -> int:
    from dsv4 import bench

    if options.layer:
        return _bench_layer(options)
    if options.scratch is not None:
        raise ValueError("--scratch belongs to --layer")
    if options.million or options.end_to_end:
        return _bench_model(options)
    if options.tokens is not None or options.resume is not None:
        raise ValueError("--tokens and --resume belong to --million")
    if options.beside:
        raise ValueError("--beside belongs to --end-to-end")
    return bench.run(
        ops=options.op,
        shapes=options.shape,
        contexts=options.context,
        device=_device(options.device),
        quick=options.quick,
        json_file=options.json,
    )


def _bench_model(options: argparse.Namespace) -> int:
    """The benchmarks of a whole model."""
    from dsv4.bench import end_to_end, million

    other = options.op or options.shape or options.quick or options.device != "cpu"
    if options.million:
        if other or options.context or options.end_to_end or options.beside:
            raise ValueError("--million takes --tokens, --resume and --json, and no other option")
        return million.run(options.tokens or million.TOKENS, options.resume, options.json)
    if other or options.tokens is not None or options.resume is not None:
        raise ValueError("--end-to-end takes --context, --beside and --json, and no other option")
    return end_to_end.run(options.context, options.json, beside=options.beside)


def _bench_layer(options: argparse.Namespace) -> int:
    from dsv4.bench import layer

    names = ("op", "context", "million", "end_to_end", "beside", "tokens", "resume")
    if any(getattr(options, name) for name in names) or options.device != "cpu" or len(options.shape or ()) > 1:
        raise ValueError("--layer takes one --shape, --scratch, --quick and --json, and no other option")
    shape = options.shape[0] if options.shape else "nano" if options.quick else "v4-flash"
    return layer.run(shape, options.scratch, options.json, options.quick)


def _demo(options: argparse.Namespace) -> None:
    from dsv4 import demo  # which takes `plan_lines` from here

    demo.run(BUNDLED / "nano")


if __name__ == "__main__":
    sys.exit(main())
