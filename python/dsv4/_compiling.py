"""What `torch.compile` leaves alone: bookkeeping in Python and on the host, between the graphs of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def between_graphs(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, run as it stands where its caller is compiled. `torch.compiler.disable` alone would import the
    compiler, a second, in every program."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    # A code object for each function: the compiler stops where one of them has been compiled anew eight times.
    run.__code__ = run.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return run
