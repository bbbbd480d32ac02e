"""Text to tokens and back, through the tokenizers library and the tokenizer.json in a model's folder."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from dsv4.generation.encoding import SPECIAL_TOKENS


class Tokenizer:
    """A model's tokenizer. Text is taken as it is: nothing is put in front of it or behind it.

    Raises: ValueError, in one line, where the file is missing or is not a tokenizer.
    """

    def __init__(self, path: str | Path):
        """Read tokenizer.json (the file or its folder)."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(f"{file}: no such file; copy tokenizer.json from the release into the model's folder")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file}: not a tokenizer ({str(error).splitlines()[0]})") from None
        self._byte_level = _is_byte_level(json.loads(self._tokenizer.to_str())["decoder"])

    def __len__(self) -> int:
        """Tokens it knows: one more than the highest."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. The encoding's markers become their own tokens wherever they stand."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, markers included; bytes that are no UTF-8 become U+FFFD, unknown tokens nothing."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token(self, text: str) -> int | None:
        """The number of one token, given as it is written in the vocabulary."""
        return self._tokenizer.token_to_id(text)

    def byte_tokens(self) -> list[int]:
        """The token of each of the 256 bytes.

        Raises: ValueError where the vocabulary lacks one.
        """
        found = {byte: self.token(character) for character, byte in _BYTES.items()}
        if None in found.values():
            raise ValueError("the vocabulary has no token for every byte")
        return [token for _, token in sorted(found.items()) if token is not None]

    def stream(self) -> TextStream:
        """Decodes tokens as they come."""
        return TextStream(self._tokenizer, self._byte_level)


class TextStream:
    """Text of a growing token sequence, never half a character: what all calls return joins to `Tokenizer.decode`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, byte_level: bool):
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace") if byte_level else None
        self._general = DecodeStream(skip_special_tokens=False)
        self._tokens: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        """The text this token completes; "" while it ends inside a character."""
        if self._bytes is not None:
            return self._bytes.decode(_token_bytes(self._tokenizer.id_to_token(token) or ""))
        self._tokens.append(token)
        text = self._general.step(self._tokenizer, token) or ""
        self._given += text
        return text

    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD where it ends inside a character."""
        if self._bytes is not None:
            return self._bytes.decode(b"", final=True)
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
        return whole.removeprefix(self._given)


def _is_byte_level(decoder: dict | None) -> bool:
    if decoder is None:
        return False
    steps = decoder.get("decoders", [decoder])
    return len(steps) == 1 and steps[0].get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """The characters byte-level vocabularies write bytes with: printable Latin-1 as itself, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; one with characters outside the alphabet (a marker) stands for its own UTF-8."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """A byte-level BPE tokenizer for a small model of one's own, written to `path` (a file or a folder).

    The encoding's markers come first (BOS 0, EOS 1), then the 256 bytes, then merges learned from `texts` up to
    `vocab_size`. Any text can be encoded, and every token of the vocabulary has a text.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least} (markers and bytes), got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    tokenizer.save(str(file), pretty=False)
    return Tokenizer(file)
