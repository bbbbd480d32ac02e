"""How an op comes to be `torch.ops.dsv4.<op>`, and what this process runs it on.

An op whose schema a C++ library has defined keeps the kernels of that library; any other is defined here. In both
cases the pure-torch reference is its implementation on every device that has no kernel, so the public functions work
with or without compiled code, and `implementations()` says which of the two a call reaches.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4 import _library
from dsv4.ops._flops import count_products

NAMESPACE = "dsv4"


def _load_library() -> bool:
    """Loads the compiled kernels before any op is defined here, since they bring the schemas of their ops."""
    try:
        _library.load()
    except ImportError as error:
        warnings.warn(f"{error}; until then every op runs its reference", RuntimeWarning, stacklevel=2)
        return False
    return True


_has_library = _load_library()

# Fragments must outlive every call: an op disappears with the Library object that defined it.
_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")
_registered: list[str] = []
_references: dict[str, Callable[..., Any]] = {}
"""Qualified op name -> its reference behind its checks."""


def register(
    schema: str,
    reference: Callable[..., Any],
    *,
    check: Callable[..., None] | None = None,
    check_values: Callable[..., None] | None = None,
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    recompute: bool = False,
    products: Callable[..., int] | None = None,
) -> None:
    """Registers an op's reference, its fake kernel and its gradient.

    Args:
        schema: torch schema without the namespace, e.g. `"hadamard(Tensor x) -> Tensor"`.
        reference: the pure-torch definition. It must return fresh contiguous tensors, never an argument or a view of
            it, and repeat the defaults of the schema.
        check: raises RuntimeError on arguments that the op does not take. Runs before the reference and the fake
            kernel.
        check_values: the same for what only the values of a tensor show. Runs before the reference alone.
        fake: allocates the results without computing them. None: the reference itself, which must then not look at
            values.
        backward, setup_context: the gradient, as torch.library.register_autograd takes them.
        recompute: take the gradient by running the reference again under autograd. For references that do not look at
            values, so that the backward pass can be traced.
        products: multiply-adds of its matrix products by the shapes of its arguments; None: it has none.
    """
    op = schema.split("(", 1)[0]
    if not _defined(op):
        _fragment.define(schema)

    def checked(function: Callable[..., Any], *checks: Callable[..., None] | None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            for first in checks:
                if first is not None:
                    first(*args, **kwargs)
            with torch._C._DisableAutocast():  # the definition says which dtype a product has
                return function(*args, **kwargs)

        return run

    qualified = f"{NAMESPACE}::{op}"
    _references[qualified] = checked(reference, check, check_values)
    _fragment.impl(op, _references[qualified], "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, checked(fake or reference, check), lib=_fragment)
    if recompute:
        backward, setup_context = _recompute_backward(reference), _save_arguments
    if backward is not None:
        torch.library.register_autograd(
            qualified, _for_passed_arguments(backward), setup_context=setup_context, lib=_ReverseMode()
        )
    elif getattr(getattr(torch.ops, NAMESPACE), op).default._schema.is_mutable:
        _fragment.impl(op, _writing(op), "Autograd", with_keyset=True)
    if products is not None:
        count_products(op, products)
    _registered.append(op)


class _ReverseMode:
    """The library as register_autograd sees it: its kernel refuses what torch would otherwise leave at a tangent of
    zeros (forward mode, torch.func.jvp), or fail at in words about its own classes (torch.func.grad)."""

    def impl(self, op: str, kernel: Callable[..., Any], key: str, **options: Any) -> None:
        def run(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
                for value in tree_leaves(args):
                    if isinstance(value, Tensor) and _is_differentiated(value):
                        name = op.removeprefix(f"{NAMESPACE}::").removeprefix("_").removesuffix("_reference")
                        raise RuntimeError(
                            f"{name}: has gradients of torch.autograd alone; use backward or torch.autograd.grad in "
                            "place of torch.func's grad, vjp and jvp"
                        )
            return kernel(keyset, *args, **kwargs)

        _fragment.impl(op, run, key, **options)


def _is_differentiated(value: Tensor) -> bool:
    """By a transform of torch.func, or in forward mode."""
    traced = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled() and value.requires_grad
    return traced or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None)


def _writing(op: str) -> Callable[..., Any]:
    """Autograd's part of an op that writes arguments, which torch leaves out: to refuse what would silently go without
    a gradient, and to count the writing, by which a backward pass finds that a tensor it saved has changed since."""
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default
    arguments = overload._schema.arguments
    written = [place for place, argument in enumerate(arguments) if argument.is_write]
    name = op.removeprefix("_").removesuffix("_reference")

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, value in zip(arguments, args, strict=False):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(f"{name}: has no gradient; detach {argument.name} or call it in torch.no_grad()")
        result = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        torch.autograd.graph.increment_version([args[place] for place in written])
        return result

    return run


def no_gradient(op: str, mend: str) -> tuple[Callable[..., Any], Callable[..., None]]:
    """A backward and setup_context for an op without a gradient, which say so instead of leaving one out silently."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{op}: has no gradient; {mend}")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    return backward, setup_context


def implementations() -> dict[str, dict[str, list[str]]]:
    """What each public op runs on in this process: {op: {"cpu": [...], "cuda": [...]}}, best first.

    "reference" is the pure-torch definition. The list of a device that this process does not have is empty.
    """
    kernels = _library.kernel_implementations() if _has_library else {}
    has_cuda = torch.cuda.is_available()
    table: dict[str, dict[str, list[str]]] = {}
    for op in sorted(op for op in _registered if not op.startswith("_")):
        found = kernels.get(op, {})
        cpu, cuda = (found.get(device) or ["reference"] for device in ("cpu", "cuda"))
        table[op] = {"cpu": cpu, "cuda": cuda if has_cuda else []}
    return table


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Within, every op of this package runs its pure-torch reference in place of its kernels, on any device.

    The whole model can so be run on the definitions of its ops: `with dsv4.ops.use_reference(): model(ids)`. It covers
    calls through `torch.ops.dsv4`, ops that references call, and gradients taken inside; it holds for this thread.
    """
    with _References():
        yield


class _References(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, a second's work, at the first op

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        reference = _references.get(func.name())
        if reference is None:
            return func(*args, **(kwargs or {}))
        with self:  # torch leaves the mode while it is asked, and a reference may be written with other ops
            return reference(*args, **(kwargs or {}))


def registered_ops() -> list[str]:
    """The names of all ops, backward ops among them."""
    return sorted(_registered)


def _defined(op: str) -> bool:
    return torch._C._dispatch_has_kernel(f"{NAMESPACE}::{op}") or hasattr(getattr(torch.ops, NAMESPACE), op)


def _for_passed_arguments(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Drops the gradients of trailing arguments that were left at their defaults: the dispatcher removes those from the
    call, shows them to setup_context all the same, and then counts what backward returns against the call."""

    def run(ctx: Any, *grads: Any) -> Any:
        with torch._C._DisableAutocast():
            result = backward(ctx, *grads)
        return result[: len(ctx.needs_input_grad)] if isinstance(result, tuple) else result

    return run


def _save_arguments(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]


def _recompute_backward(reference: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = iter(ctx.saved_tensors)
        arguments: list[Any] = []
        wanted: list[Tensor] = []
        needs_input_grad = (*ctx.needs_input_grad, *[False] * (len(ctx.others) - len(ctx.needs_input_grad)))
        twice = torch.is_grad_enabled()  # the gradient is to have one itself
        with torch.enable_grad():
            for is_tensor, other, needs_grad in zip(ctx.is_tensor, ctx.others, needs_input_grad, strict=True):
                value = next(tensors) if is_tensor else other
                if needs_grad:  # a tensor of its own, also where one is passed twice
                    value = value.view_as(value) if twice else value.detach().requires_grad_()
                    wanted.append(value)
                arguments.append(value)
            result = reference(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad and g is not None]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, create_graph=twice
            )
            if pairs
            else [None] * len(wanted)
        )
        return tuple(next(found) if needs_grad else None for needs_grad in needs_input_grad)

    return backward
