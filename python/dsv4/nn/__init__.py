"""The layers of DeepSeek-V4 as standalone modules."""

from dsv4.nn.attention import (
    Attention,
    CompressedSparseAttention,
    HeavilyCompressedAttention,
    SlidingWindowAttention,
)
from dsv4.nn.compressor import Compressor, Indexer
from dsv4.nn.hyper_connection import HyperConnection
from dsv4.nn.linear import Fp8Linear, GroupedLinear, Linear, RMSNorm
from dsv4.nn.moe import MixtureOfExperts
from dsv4.nn.rows import RopeFrequencies, Rows

__all__ = [
    "Attention",
    "CompressedSparseAttention",
    "Compressor",
    "Fp8Linear",
    "GroupedLinear",
    "HeavilyCompressedAttention",
    "HyperConnection",
    "Indexer",
    "Linear",
    "MixtureOfExperts",
    "RMSNorm",
    "RopeFrequencies",
    "Rows",
    "SlidingWindowAttention",
]
