"""DeepSeek-V4's layers as torch custom ops, and the full model around them."""

import os
import sys

try:
    from dsv4 import nn, ops
    from dsv4.cache import KVCache
    from dsv4.checkpoint import init, load
    from dsv4.generation import encode_messages, generate, generate_batch, parse_completion
    from dsv4.model.config import Config
    from dsv4.model.recording import RecordedModel
    from dsv4.model.transformer import Transformer
    from dsv4.planner import plan
except KeyboardInterrupt:
    # Python imports this package before any line of the command, and torch takes seconds. Of `python -m dsv4` the
    # first argument is "-m" as yet.
    if os.path.basename(sys.argv[0]) not in ("dsv4", "-m"):
        raise
    sys.exit(130)

__version__ = "0.1.0"

# The loops stand above the model; these are their shorthands.
Transformer.generate = generate
Transformer.generate_batch = generate_batch

__all__ = [
    "Config",
    "KVCache",
    "RecordedModel",
    "Transformer",
    "encode_messages",
    "generate",
    "generate_batch",
    "init",
    "load",
    "nn",
    "ops",
    "parse_completion",
    "plan",
]
