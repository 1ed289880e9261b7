"""Activation checkpointing: the same gradients, and every layer runs twice."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import vera_func as vf
from vera_func.train.checkpointing import checkpointed_loss

from helpers import language, tokens


@pytest.mark.parametrize(("name", "base"), [("llama", "dense"), ("llama", "nf4"), ("gpt2", "dense")])
def test_gradients_are_the_same(name, base):
    model, adapted = language(name, base)
    calls = []

    def value(module, ids):
        if not calls:
            for child, layer in module.named_modules():
                if child.endswith("mlp"):
                    layer.register_forward_pre_hook(lambda *_: calls.append(0))
        return module(input_ids=ids, use_cache=False).logits.square().mean()

    loss = checkpointed_loss(adapted, value)
    found, grads = vf.value_and_grad(loss)(adapted.params, tokens())
    assert len(calls) == 4  # two layers, in forward and again in backward

    def plain(params):
        return adapted.apply(params, adapted.frozen, input_ids=tokens(), use_cache=False).logits.square().mean()

    right, expected = vf.value_and_grad(plain)(adapted.params)
    assert_close(found, right, rtol=1e-5, atol=1e-6)
    assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())  # the base is as it was
    run = vf.fit(loss, adapted.params, lambda step: tokens(), steps=2, learning_rate=0.01, progress=False)
    assert run.losses[1] < run.losses[0]


def test_what_is_refused():
    adapted = vf.adapt(nn.Sequential(nn.Linear(4, 4)), vf.VeraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"a Sequential, contains no nn\.ModuleList with layers to checkpoint"):
        checkpointed_loss(adapted, lambda module, batch: torch.zeros(()))
