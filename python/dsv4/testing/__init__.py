"""Helpers of the tests: comparing results, listing cases, forcing an implementation. They have tests of their own."""

from dsv4.testing.cases import grid, strided
from dsv4.testing.checks import (
    assert_rejects,
    assert_rows_independent,
    check_op,
    implementation_cases,
    max_isa,
)
from dsv4.testing.compare import (
    assert_no_worse,
    assert_same_bits,
    relative_rms,
    same_bits,
    ulp_distance,
)
from dsv4.testing.guard import Guarded

__all__ = [
    "Guarded",
    "assert_no_worse",
    "assert_rejects",
    "assert_rows_independent",
    "assert_same_bits",
    "check_op",
    "grid",
    "implementation_cases",
    "max_isa",
    "relative_rms",
    "same_bits",
    "strided",
    "ulp_distance",
]
