"""`dsv4 demo`: what was found, V4-Flash planned at a million tokens, and text from the bundled model."""

from __future__ import annotations

from pathlib import Path

from dsv4 import checkpoint
from dsv4.checkpoint.loader import RANDOM
from dsv4.cli import plan_lines
from dsv4.console import Run, end_tokens
from dsv4.environment import environment, environment_lines
from dsv4.generation import Tokenizer
from dsv4.model.config import Config
from dsv4.planner import plan

PROMPT = '''\
"""Counting words in text files."""

import os
import re


class WordCounter:
    """Count how often each word is used in a set of files."""

    def __init__(self, encoding="utf-8"):
        self.encoding = encoding
        self.counts = {}

    def add_file(self, filename):
        """Read a file and add its words to the counts."""
        with open(filename, encoding=self.encoding) as file:
            for line in file:
                for word in re.findall(r"[a-z]+", line.lower()):
                    self.counts[word] = self.counts.get(word, 0) + 1

    def '''
NEW_TOKENS = 96


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
    ids = tokenizer.encode(PROMPT)
    kinds = " ".join(config.layer_kind(layer).upper() for layer in range(config.num_hidden_layers))
    print(f"model      {config.num_hidden_layers} layers ({kinds}), released format, FP8 and FP4 weights")
    meaningless = model.note == RANDOM
    if model.note:
        print(f"note       {model.note}{': its text means nothing, its speed and its bytes do' * meaningless}")
    print(f"prompt     {len(ids)} tokens, the window is {config.sliding_window}\n\n{PROMPT}", end="", flush=True)
    going = Run(model, tokenizer, ids)
    ends = () if meaningless else end_tokens(config)  # random weights would end the text at random
    going.stream(max_new_tokens=NEW_TOKENS, stop_tokens=ends, temperature=0.5, seed=0)
    print()
    print("\n".join(going.stats_lines()))
    planned = plan(config, going.cache.length).cache_bytes
    print(f"planned    {planned:,} bytes, {'as held' if planned == going.cache.nbytes else 'NOT as held'}")


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
