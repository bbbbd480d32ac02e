"""mHC's gradients through torch on CUDA, which the host plays where there is no GPU; the limits are the CPU's."""

from itertools import chain

import pytest
import torch
from cuda_device import NO_DEVICE, WHY_NOT, cuda_device
from mhc_cases import (
    NORMS,
    arguments,
    assert_gradients_as_accurate,
    assert_sums_as_accurate,
    norm_dtype,
    problems,
)

from dsv4.testing import assert_same_bits, grid

pytestmark = pytest.mark.skipif(NO_DEVICE, reason=WHY_NOT)

CASES = grid(tokens=[0, 2, 17, 70], hidden=[31, 96, 272], dtype=[torch.bfloat16, torch.float32])
WITH_NORMS = [("mhc_pre", norm) for norm in NORMS]
SETTINGS = {"mhc_pre": (1e-6, 1e-6, 20, 1e-6), "mhc_post": (), "mhc_head": (1e-6, 1e-6)}


def there(value):
    return value.to("cuda") if isinstance(value, torch.Tensor) else value


def device_gradients(op, made, residual=None):
    """As autograd would have them, from the op's backward on the device."""
    actual = []
    with torch.no_grad(), cuda_device() as device:
        before = device.calls()[f"{op}_backward"]
        for p in made:
            extra = [residual] if op == "mhc_pre" else []
            function = getattr(torch.ops.dsv4, f"{op}_backward")
            grads = function(*map(there, [*p.grads, *extra, *p.values]), *SETTINGS[op])
            if op == "mhc_pre":  # of the norm's weight, in its dtype
                weight = p.values[4]
                grads = grads[:4] if weight is None else (*grads[:4], grads[4].to(weight.dtype))
            actual.append(tuple(grad.cpu() for grad in grads))
        assert device.calls()[f"{op}_backward"] == before + len(made)
        assert not device.references
    return actual


@pytest.mark.parametrize(("op", "norm"), [*WITH_NORMS, ("mhc_post", None), ("mhc_head", None)])
@pytest.mark.parametrize("case", CASES)
def test_gradients(op, norm, case):
    made = problems(op, case["tokens"], case["hidden"], case["dtype"], norm_dtype(norm, case["dtype"]), True)
    assert_gradients_as_accurate(op, made, device_gradients(op, made))


@pytest.mark.parametrize(("op", "norm"), [*WITH_NORMS, ("mhc_head", None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [31, 96])
def test_gradients_of_scale_and_base(hidden, dtype, op, norm):
    sizes = [problems(op, tokens, hidden, dtype, norm_dtype(norm, dtype), True) for tokens in (1, 2, 17, 33, 70)]
    actual = [device_gradients(op, made) for made in sizes]
    assert_sums_as_accurate(op, [*chain(*sizes)], [*chain(*actual)])


@pytest.mark.parametrize("op", ["mhc_pre", "mhc_head"])
def test_the_gradient_of_fn_may_be_left_out(op):
    (p, *_) = problems(op, 17, 96, torch.bfloat16, torch.float32 if op == "mhc_pre" else None, True)
    arguments = [*p.grads, *([None] if op == "mhc_pre" else []), *p.values, *SETTINGS[op]]
    with torch.no_grad(), cuda_device():
        streams, fn, *sums = getattr(torch.ops.dsv4, f"{op}_backward")(*map(there, arguments), needs_fn=False)
        whole = getattr(torch.ops.dsv4, f"{op}_backward")(*map(there, arguments))
        assert fn.shape == (0,) and fn.dtype == torch.float32
        for a, b in zip((streams, *sums), (whole[0], *whole[2:]), strict=True):
            assert_same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_residual_is_added_before_rounding(dtype):
    (p, *_) = problems("mhc_pre", 17, 96, dtype, torch.float32, True)
    residual = torch.randn(17, 4, 96).to(dtype)
    (plain, *sums), (added, *same) = (device_gradients("mhc_pre", [p], more)[0] for more in (None, residual))
    expected = p.exact[0] + residual.double()
    close = torch.finfo(dtype).eps * expected.abs().max()
    torch.testing.assert_close(added.double(), expected, rtol=0, atol=float(close))
    if dtype == torch.bfloat16:  # one rounding is better than two
        own, twice = (added.double() - expected).norm(), ((plain + residual).double() - expected).norm()
        assert own < twice
    for a, b in zip(sums, same, strict=True):
        assert_same_bits(a, b)


def test_arguments_of_any_layout():
    values = list(arguments("mhc_post", 9, 40).values())
    grad = torch.randn(9, 4, 40).bfloat16()
    strange = [torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] for v in (grad, *values)]
    with torch.no_grad(), cuda_device():
        expected = torch.ops.dsv4.mhc_post_backward(*map(there, (grad, *values)))
        actual = torch.ops.dsv4.mhc_post_backward(*map(there, strange))
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a.cpu(), b.cpu())
