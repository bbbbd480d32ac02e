"""Checkpoints: reading the released and the transformers layout, writing the released one, random weights."""

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.init import init
from dsv4.checkpoint.inspect import Inspection, inspect
from dsv4.checkpoint.loader import load, resolve
from dsv4.checkpoint.memory import keep_freed
from dsv4.checkpoint.quantize import quantize
from dsv4.checkpoint.reader import Checkpoint
from dsv4.checkpoint.writer import save_released

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Inspection",
    "init",
    "inspect",
    "keep_freed",
    "load",
    "quantize",
    "resolve",
    "save_released",
]
