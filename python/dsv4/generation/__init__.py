"""Text in, text out: prompt encoding, tokenizer, sampling, and the generation loops."""

from dsv4.generation.encoding import EncodingError, encode_messages, parse_completion
from dsv4.generation.loop import generate, generate_batch
from dsv4.generation.sampling import sample
from dsv4.generation.tokenizer import TextStream, Tokenizer

__all__ = [
    "EncodingError",
    "TextStream",
    "Tokenizer",
    "encode_messages",
    "generate",
    "generate_batch",
    "parse_completion",
    "sample",
]
