"""A dense copy in place of dequantizing: the same bits forward, the same values under every transform."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.base_layers import QuantizedLinear
from vera_func.quant.dense_copy import dense_copy

from helpers import FORMATS, TRANSFORMS, normal, relative_error


OUT, IN = 64, 128


def weight(name):
    return FORMATS[name](normal(OUT, IN, seed=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_dequantizing_bit_for_bit(name, dtype):
    q, bias = weight(name), normal(OUT, seed=2, dtype=dtype)
    dense = vf.dequantize(q, dtype)
    for x in (normal(3, IN, dtype=dtype), normal(2, 3, IN, dtype=dtype)[:, -1:], normal(IN, dtype=dtype)):
        for grad_enabled in (False, True):
            with torch.set_grad_enabled(grad_enabled):
                actual = vf.quantized_linear(q, x, bias, dense=dense)
                assert torch.equal(actual, vf.quantized_linear(q, x, bias))
    # The copy is what is multiplied.
    assert not torch.equal(vf.quantized_linear(q, x, bias, dense=2 * dense), actual)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["nf4", "nested", "int8"])
def test_transforms(name, transform):
    q, x = weight(name), normal(3, IN)
    dense = vf.dequantize(q, torch.float32)
    f = lambda dense: TRANSFORMS[transform](lambda x: vf.quantized_linear(q, x, dense=dense).tanh())
    assert_close(f(dense)(x[0]), f(None)(x[0]), rtol=1e-4, atol=1e-4)
    assert_close(vmap(f(dense))(x), torch.stack([f(None)(row) for row in x]), rtol=1e-4, atol=1e-4)


def test_backward_and_compile():
    q, bias = weight("nf4"), normal(OUT, seed=2).requires_grad_()
    dense = vf.dequantize(q, torch.float32)
    found = []
    for given in (dense, None):
        x = normal(3, IN).requires_grad_()
        loss = vf.quantized_linear(q, x, bias, dense=given).square().sum()
        found.append(torch.autograd.grad(loss, [x, bias]))
    assert_close(*found)
    f = lambda x: vf.quantized_linear(q, x, dense=dense)
    step = lambda f: vmap(grad(lambda x: f(x).square().sum()))
    compiled = torch.compile(step(f), fullgraph=True, backend="aot_eager")
    assert_close(compiled(normal(3, IN)), step(f)(normal(3, IN)))


def test_another_dtype_is_dequantized():
    q, x = weight("nf4"), normal(3, IN, dtype=torch.bfloat16)
    assert torch.equal(vf.quantized_linear(q, x, dense=vf.dequantize(q, torch.float32)), vf.quantized_linear(q, x))
    q = vf.quantize_4bit(normal(OUT, IN, seed=1), compute_dtype=torch.bfloat16)
    dense = vf.dequantize(q, torch.bfloat16)
    assert torch.equal(vf.quantized_linear(q, x.float(), dense=dense), vf.quantized_linear(q, x.float()))
    assert relative_error(vf.quantized_linear(q, x.float(), dense=2 * dense), vf.quantized_linear(q, x.float())) > 0.5


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_weight_is_a_constant_with_a_copy_as_well(name):
    q, x = weight(name), normal(3, IN)
    dense = vf.dequantize(q, torch.float32)
    scale = "absmax" if name == "nf4" else "scale"

    def loss(values):
        return vf.quantized_linear(dataclasses.replace(q, **{scale: values}), x, dense=dense).sum()

    with pytest.raises(ValueError, match="a quantized weight is a constant"):
        grad(loss)(getattr(q, scale))
    with pytest.raises(ValueError, match="a quantized weight is a constant"):
        loss(getattr(q, scale).clone().requires_grad_()).backward()


def test_a_copy_of_another_weight_is_refused():
    with pytest.raises(ValueError, match=r"dense must have the shape of the weight, \(64, 128\), got \(128, 64\)"):
        vf.quantized_linear(weight("nf4"), normal(3, IN), dense=normal(IN, OUT))


def test_layers_share_it_and_files_leave_it_out():
    layer = QuantizedLinear(weight("nf4"), None)
    size = len(pickle.dumps(layer))
    layer.dense = dense_copy(layer.quantized, torch.float32)
    assert copy.deepcopy(layer).dense is layer.dense
    data = pickle.dumps(layer)
    assert len(data) < size + 500
    again = pickle.loads(data)
    assert torch.equal(again.dense.weight, layer.dense.weight)
    assert layer.to("meta").dense.weight.device.type == "cpu"  # a skeleton without state, but with its constants
    assert layer.float().dense is not None
    assert layer.bfloat16().dense is None  # it would never be used
