"""What a linear layer is, and its sizes."""

import pytest
import torch
from torch import nn

from vera_func.model.linears import linear_sizes, widest_sizes

from helpers import bert, gpt2, llama, quantized


@pytest.mark.parametrize("model", [llama, lambda: quantized(llama(), "nf4"), gpt2, bert])
def test_sizes_are_those_of_the_layer(model):
    model = model()
    seen = 0
    for module in model.modules():
        sizes = linear_sizes(module)
        if sizes is not None:
            seen += 1
            # The length of a row goes in, and the output has the other length.
            if isinstance(module, nn.Linear):
                assert sizes == (module.in_features, module.out_features)
            else:
                assert module(torch.ones(1, sizes[0])).shape == (1, sizes[1])
    assert seen > 2
    assert (
        linear_sizes(nn.Embedding(3, 5))
        is linear_sizes(nn.Conv1d(3, 5, 1))
        is linear_sizes(nn.Bilinear(3, 5, 2))
        is None
    )


def test_the_widest_sizes_may_be_those_of_different_layers():
    model = nn.ModuleDict({"a": nn.Linear(7, 2), "b": nn.Linear(3, 5), "c": nn.Linear(11, 13)})
    assert widest_sizes(model, ["a", "b"]) == (7, 5)
