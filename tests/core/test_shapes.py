"""Inputs whose rows do not follow one another in memory cost no copies of a weight."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import vera_func as vf
from vera_func.core.shapes import require_finite, require_single

from helpers import BASES, LargestTensor, dense_forward, make_base, make_layer


def strided(kind, b, seq, in_):
    """`(b, seq, in)` in float32, no view of which is a matrix."""
    whole = torch.randn(b, seq + 1, in_, generator=torch.Generator().manual_seed(0))
    return {
        "last token": whole[:, -1:],
        "not the first": whole[:, 1:],
        "transposed": torch.randn(seq, b, in_).transpose(0, 1),
        "expanded": whole[:, :1].expand(b, seq, in_),
    }[kind]


@pytest.mark.parametrize("kind", ["last token", "not the first", "transposed", "expanded"])
@pytest.mark.parametrize("base", BASES)
def test_a_strided_input_of_an_adapted_layer_copies_no_weight(base, kind):
    params, frozen, weight, _ = make_layer(out=96, in_=64, r=80, dtype=torch.float32)
    base_fn, dense = make_base(base, weight)
    x = strided(kind, 5, 3, 64)
    assert not x.is_contiguous()
    with LargestTensor() as largest, torch.no_grad():
        y = vf.vera_forward(params, frozen, x, base_fn)
    assert largest.numel < 2 * weight.numel()
    assert_close(y, dense_forward(params, frozen, x, dense), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["last token", "not the first", "transposed", "expanded"])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_strided_gradient_copies_no_weight(base, kind):
    """That of a mean over tokens is expanded."""
    params, frozen, weight, _ = make_layer(out=96, in_=64, r=80, dtype=torch.float32)
    base_fn, dense = make_base(base, weight)
    grad = strided(kind, 5, 3, 96)
    x = torch.randn(*grad.shape[:-1], 64, requires_grad=True)
    y = vf.vera_forward(params, frozen, x, base_fn)
    with LargestTensor() as largest:
        (got,) = torch.autograd.grad(y, x, grad)
    assert largest.numel < 2 * weight.numel()
    (right,) = torch.autograd.grad(dense_forward(params, frozen, x, dense), x, grad)
    assert_close(got, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_a_strided_input_of_a_layer_that_is_not_adapted(bias):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96, bias=bias))
    apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0"]))
    x = strided("transposed", 5, 3, 64)
    with LargestTensor() as largest, torch.no_grad():
        y = apply(params, frozen, x)
    assert largest.numel < 2 * 64 * 96
    assert_close(y, model(x))
    assert isinstance(vf.to_module(vf.Adapted(apply, params, frozen, None))[1], nn.Linear)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(value):
    require_finite("x", torch.ones(2, 3), "give up")
    x = torch.ones(2, 3)
    x[1, 2] = value
    with pytest.raises(ValueError, match=r"^x holds NaN or inf: give up\.$"):
        require_finite("x", x, "give up")


def test_stacked_tensors_are_found():
    require_single("x", torch.ones(()), ())
    with pytest.raises(ValueError, match=r"^x must have shape \(3,\), got \(2, 3\)\. To split .* use unstack_adapters"):
        require_single("x", torch.ones(2, 3), (3,))
