"""What every op must pass, whatever it computes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from dsv4 import _library
from dsv4.environment import LIMITS, VARIABLE
from dsv4.ops._registry import implementations
from dsv4.testing.compare import assert_same_bits

_NARROW = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
_ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@contextlib.contextmanager
def max_isa(name: str) -> Iterator[None]:
    """Within, kernels above this instruction set are not chosen (environment variable DSV4_MAX_ISA)."""
    if name not in LIMITS:
        raise ValueError(f"max_isa: name must be one of {', '.join(LIMITS)}, got {name!r}")
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def implementation_cases(op: str, device: str = "cpu") -> list[Any]:
    """pytest parameters: the name of every implementation of `op` that was built for `device`, in the order of
    preference.

    One that this machine cannot run is reported as not run (a skip whose reason begins so), never as passed. An op
    without kernels gives "reference".
    """
    import pytest

    usable = implementations()[op][device]
    try:
        built = _library.build_info()["libraries"].get(device, {}).get("built", {}).get(op, [])
    except ImportError:
        built = []
    names = list(dict.fromkeys([*built, *usable]))
    reason = f"not run: this machine has no {{}} for {op}"
    return [
        pytest.param(name, marks=() if name in usable else pytest.mark.skip(reason=reason.format(name)))
        for name in names
    ]


def check_op(op: Any, *args: Any) -> None:
    """torch.library.opcheck on `op` (torch.ops.dsv4.<op>): schema, autograd registration, fake kernel, AOT dispatch.

    torch's own schema test cannot compare 8-bit floats. Calls with such tensors, or such results, are held to the
    schema here instead: no argument changes that the schema does not say is written, no result shares memory with an
    argument.
    """
    from torch.library import opcheck

    copies = _pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, args)
    result = op(*copies)
    narrow = any(tensor.dtype in _NARROW for tensor in (*_tensors(args), *_tensors(result)))
    if narrow:
        _check_schema(op, args, copies, result)
    opcheck(op.default, args, test_utils=_ALL_CHECKS[1:] if narrow else _ALL_CHECKS)


def _check_schema(op: Any, args: Sequence[Any], used: Sequence[Any], result: Any) -> None:
    for declared, before, after in zip(op.default._schema.arguments, args, used, strict=False):
        if declared.alias_info is not None and declared.alias_info.is_write:
            continue
        for a, b in zip(_tensors(before), _tensors(after), strict=True):
            assert_same_bits(b, a, f"{op}: argument {declared.name}")
    taken = {tensor.untyped_storage().data_ptr() for tensor in _tensors(used) if tensor.numel()}
    for tensor in _tensors(result):
        if tensor.numel() and tensor.untyped_storage().data_ptr() in taken:
            raise AssertionError(f"{op}: a result shares its memory with an argument")


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in _pytree.tree_leaves(values) if isinstance(value, Tensor)]


def assert_rejects(function: Callable[..., Any], arguments: Mapping[str, Any], message: str, **changes: Any) -> None:
    """Fails unless `function` takes the arguments, and refuses them once changed with exactly this message."""
    function(**arguments)
    changed = {**arguments, **changes}
    try:
        function(**changed)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if text != message:
            raise AssertionError(f"wrong message\n  expected: {message}\n  got:      {text}") from error
        return
    raise AssertionError(f"accepted what it should refuse: {message}")


def assert_rows_independent(
    function: Callable[..., Any], rows: Sequence[Tensor], cuts: Sequence[int] = (1, 2, 5, 3)
) -> None:
    """Fails unless function(*rows), a tensor or a tuple with one row per input row, gives each row the same bits alone,
    in chunks (lengths `cuts`, repeated), in reverse order, and when called twice."""

    def run(*parts: Tensor) -> tuple[Tensor, ...]:
        result = function(*parts)
        return result if isinstance(result, tuple) else (result,)

    whole = run(*rows)
    count = rows[0].shape[0]
    for name, lengths in (("alone", [1] * count), ("in chunks", list(cuts) * count)):
        start, pieces = 0, []
        for length in lengths:
            if start >= count:
                break
            pieces.append(run(*(r[start : start + length] for r in rows)))
            start += length
        for index, expected in enumerate(whole):
            assert_same_bits(torch.cat([_joinable(p[index]) for p in pieces]), _joinable(expected), f"rows {name}")
    flipped = run(*(_joinable(r).flip(0).view(r.dtype) for r in rows))
    for name, again in (("called twice", run(*rows)), ("reversed", tuple(_joinable(r).flip(0) for r in flipped))):
        for expected, other in zip(whole, again, strict=True):
            assert_same_bits(_joinable(other), _joinable(expected), f"rows {name}")


def _joinable(x: Tensor) -> Tensor:
    """8-bit floats as bytes: torch can neither concatenate nor flip them."""
    return x.view(torch.uint8) if x.dtype in _NARROW else x
