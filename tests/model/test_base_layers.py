"""Layers with a weight and a bias for each row of the batch."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from vera_func.model.base_layers import RowwiseAffine

from helpers import row


AFFINE = {
    "Linear": lambda: nn.Linear(7, 5),
    "Linear without bias": lambda: nn.Linear(7, 5, bias=False),
    "Conv1D": lambda: Conv1D(5, 7),
    "LayerNorm": lambda: nn.LayerNorm(7),
}


@pytest.mark.parametrize("given", ["weight and bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("lead", [(4,), (4, 3), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("name", AFFINE)
def test_row_by_row_is_a_loop(name, lead, given):
    torch.manual_seed(0)
    layer = AFFINE[name]()
    affine = RowwiseAffine(layer)
    x = torch.randn(*lead, 7)
    own = {key: torch.randn(4, *p.shape) for key, p in layer.named_parameters() if key in given}
    rows = functional_call(affine, own, x)
    for i in range(4):
        assert_close(rows[i], functional_call(layer, row(own, i), x[i]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", AFFINE)
def test_one_value_for_all_rows_is_the_layer_itself(name):
    layer = AFFINE[name]()
    x = torch.randn(4, 3, 7)
    assert torch.equal(RowwiseAffine(layer)(x), layer(x))
    own = {key: torch.randn(p.shape) for key, p in layer.named_parameters()}
    assert torch.equal(functional_call(RowwiseAffine(layer), own, x), functional_call(layer, own, x))


@pytest.mark.parametrize("key", ["weight", "bias"])
@pytest.mark.parametrize("name", ["Linear", "Conv1D", "LayerNorm"])
def test_rows_that_do_not_match(name, key):
    layer = AFFINE[name]()
    rows = {key: torch.ones(4, *getattr(layer, key).shape)}
    with pytest.raises(ValueError, match=rf"{key} \(4, .*x \(5, 3, 7\)"):
        functional_call(RowwiseAffine(layer), rows, torch.ones(5, 3, 7))


@pytest.mark.parametrize("name", AFFINE)
def test_gradients_row_by_row(name):
    torch.manual_seed(0)
    layer = AFFINE[name]()
    x = torch.randn(4, 3, 7)
    own = {key: torch.randn(4, *p.shape) for key, p in layer.named_parameters()}

    def rows(own):
        return functional_call(RowwiseAffine(layer), own, x).square().sum()

    expected = vmap(grad(lambda own, x: functional_call(layer, own, x).square().sum()))(own, x)
    assert_close(grad(rows)(own), expected, rtol=1e-4, atol=1e-4)
