"""Running a generation on a console: streamed text, a progress bar, and what is to be said afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from dsv4.checkpoint.memory import size
from dsv4.checkpoint.progress import terminal_bar
from dsv4.generation import TextStream, Tokenizer, generate
from dsv4.model.config import Config
from dsv4.model.transformer import Transformer
from dsv4.planner import baseline


def end_tokens(config: Config) -> tuple[int, ...]:
    """The tokens that end an answer."""
    found = config.eos_token_id
    return () if found is None else found if isinstance(found, tuple) else (found,)


class Numbers:
    """In place of a `TextStream`: tokens as numbers."""

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


class Run:
    """One generation: streams its text (without a tokenizer, its numbers) and keeps what is to be said about it."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None, ids: list[int]):
        self.model, self.tokenizer, self.ids = model, tokenizer, ids
        self.cache: Any = None
        self.tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    def stream(self, max_new_tokens: int, stop_tokens: Sequence[int], **settings: Any) -> None:
        """Write the text to standard output. After an interrupt what was written stands, and its line is ended."""
        self.cache = self.model.new_cache(max_seq_len=len(self.ids) + max_new_tokens)
        text = self.tokenizer.stream() if self.tokenizer is not None else Numbers()
        with terminal_bar() as bar:
            prompt = bar.add_task("prompt", total=len(self.ids))
            tokens = generate(
                self.model,
                self.ids,
                max_new_tokens,
                stop_tokens=stop_tokens,
                cache=self.cache,
                progress=lambda done, _: bar.update(prompt, completed=done),
                **settings,
            )
            started = time.perf_counter()
            first = next(tokens)
            self.prefill_seconds = time.perf_counter() - started
        started = time.perf_counter()
        try:
            self._put(text, first, stop_tokens)
            for token in tokens:
                self.decode_seconds = time.perf_counter() - started
                self._put(text, token, stop_tokens)
        finally:
            write(text.flush() + "\n")

    def _put(self, text: TextStream | Numbers, token: int, stop_tokens: Sequence[int]) -> None:
        self.tokens += 1
        if token not in stop_tokens:
            write(text.push(token))

    def stats_lines(self) -> list[str]:
        """Speed, cache bytes, and what DeepSeek-V3.2 would hold for as many tokens."""
        length = self.cache.length if self.cache is not None else 0
        if not self.tokens or not length:
            return ["stopped before the first token"]
        lines = [f"prompt     {len(self.ids)} tokens, {len(self.ids) / self.prefill_seconds:,.1f} tokens/s"]
        if self.tokens > 1:
            rate = (self.tokens - 1) / self.decode_seconds
            lines.append(f"generated  {self.tokens} tokens, {rate:,.2f} tokens/s after the first")
        else:
            lines.append(f"generated  {self.tokens} token")
        equal = baseline(length).kv_bytes
        lines.append(f"cache      {size(self.cache.nbytes)} ({self.cache.nbytes:,} bytes) for {length:,} tokens")
        lines.append(
            f"V3.2       would hold {size(equal)} at its full size for as many: {equal / self.cache.nbytes:.1f} x"
        )
        return lines


def write(text: str) -> None:
    """Model text to standard output. On a terminal without control characters, which could do anything to it."""
    if not text:
        return
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def say(*lines: str) -> None:
    """Lines about a result, to standard error."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)
