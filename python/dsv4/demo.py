"""`dsv4 demo`: what was found, V4-Flash planned at a million tokens, and text from the bundled model."""

from __future__ import annotations

from pathlib import Path

from dsv4 import checkpoint
from dsv4.cli import plan_lines
from dsv4.console import Run, end_tokens
from dsv4.environment import environment, environment_lines
from dsv4.generation import Tokenizer, encode_messages
from dsv4.model.config import Config
from dsv4.planner import plan

QUESTION = """\
A cache keeps what a model has read, so that every new token can look back without reading all of it again. In most
models it grows by the same amount with every token, and after a million tokens it no longer fits into the memory of one
machine. DeepSeek-V4 keeps the last 128 tokens as they are, and what lies further back in compressed form: one entry
for every 4 tokens, of which each query chooses the best, and one entry for every 128 tokens, which it reads in full.
Which questions about a long text can still be answered exactly, and which only approximately?"""
NEW_TOKENS = 48


def run(folder: Path) -> None:
    """Print all of it. `folder`: a checkpoint with its tokenizer.

    Raises: ValueError, in one line, where the folder is no checkpoint.
    """
    found = environment()
    _title("Found here")
    print("\n".join(environment_lines(found)))
    cpu = [(op, names["cpu"][0]) for op, names in found["implementations"].items() if names["cpu"]]
    native = [f"{op} ({name})" for op, name in cpu if name != "reference"]
    print(f"ops        {len(native)} of {len(cpu)} on a native kernel: {', '.join(native) or 'none'}")
    print("           the others run their reference; dsv4 env lists all")

    _title("V4-Flash planned at a million tokens")
    print("\n".join(plan_lines("v4-flash", plan(Config.preset("v4-flash"), 1 << 20))))

    _title(f"Text from the bundled model {folder.name}")
    model, tokenizer = checkpoint.load(folder), Tokenizer(folder)
    config = model.config
    ids = tokenizer.encode(encode_messages([{"role": "user", "content": QUESTION}]))
    kinds = " ".join(config.layer_kind(layer).upper() for layer in range(config.num_hidden_layers))
    print(f"model      {config.num_hidden_layers} layers ({kinds}), released format, FP8 and FP4 weights")
    if model.note:
        print(f"note       it has {model.note}: its text means nothing, its speed and its bytes do")
    print(f"prompt     {len(ids)} tokens, the window is {config.sliding_window}\n\n{QUESTION}\n")
    going = Run(model, tokenizer, ids)
    ends = () if model.note else end_tokens(config)  # random weights would end the text at random
    going.stream(max_new_tokens=NEW_TOKENS, stop_tokens=ends, temperature=1.0, seed=0)
    print()
    print("\n".join(going.stats_lines()))
    planned = plan(config, going.cache.length).cache_bytes
    print(f"planned    {planned:,} bytes, {'as held' if planned == going.cache.nbytes else 'NOT as held'}")


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
