"""Text in, text out: prompt encoding, tokenizer, sampling, and the generation loop."""

from dsv4.generation.encoding import EncodingError, encode_messages, parse_completion
from dsv4.generation.loop import generate
from dsv4.generation.sampling import sample
from dsv4.generation.tokenizer import TextStream, Tokenizer

__all__ = ["EncodingError", "TextStream", "Tokenizer", "encode_messages", "generate", "parse_completion", "sample"]
