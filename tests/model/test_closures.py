"""Functions that refer to modules: a copied model runs its own modules, and not those of the original."""

from weakref import ref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.closures import copy_module

from helpers import merged, normal, randomized


class Model(nn.Module):
    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        if change is not None:
            change(self)

    def forward(self, x):
        return getattr(self, "run", self.second)(torch.tanh(self.first(x)))


def set_run(model, run):
    vars(model)["run"] = run


def by_lambda(model):
    set_run(model, lambda x: model.second(x))


def by_method(model):
    forward = model.second.forward
    set_run(model, lambda x: forward(x))


def by_nested_functions(model):
    def inner(x, count=3):
        return outer(x, count - 1) if count else model.second(x)

    def outer(x, count):
        return inner(x, count)

    set_run(model, inner)


def by_list(model):
    layers = [model.second]
    set_run(model, lambda x, *, index=0: layers[index](x))


def by_patched_forward(model):
    original = model.forward
    vars(model)["forward"] = lambda x: original(x) + 0


def by_hook(model):
    model.first.register_forward_hook(lambda module, args, output: output + 0 * model.second(args[0]))


def by_weak_reference(model):
    vars(model)["held"] = ref(model.second)
    set_run(model, lambda x: model.held()(x))


CHANGES = [by_lambda, by_method, by_nested_functions, by_list, by_patched_forward, by_hook, by_weak_reference]


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("change", CHANGES)
def test_adapted_and_merged_models_run_their_own_modules(change, quant):
    model = Model(change)
    plain = Model(None)
    if quant:
        model, plain = vf.quantize_model(model, quant).train(), vf.quantize_model(plain, quant).train()
    config = vf.VeraConfig(r=4, target_modules=["first", "second"])
    apply, params, frozen, _ = vf.adapt(model, config)
    params, x = randomized(params, scale=1.0), normal(3, 64)
    # The oracle has no functions, and the same weights.
    expected = merged(plain, vf.Adapted(apply, params, frozen, config))(x)
    close = {"rtol": 1e-4, "atol": 1e-4}
    for _ in range(2):
        assert_close(apply(params, frozen, x), expected, **close)
    if quant is None or change is not by_method:  # the method is that of a bitsandbytes module
        assert_close(vf.merge(model, params, frozen, torch.float32)(x), expected, **close)
    assert_close(vf.to_module(vf.Adapted(apply, params, frozen, config))(x), expected, **close)
    assert_close(model(x), plain(x), **close)


def test_the_rest_of_a_closure_is_shared():
    model, seen = nn.Sequential(nn.Linear(3, 3)), []
    model[0].register_forward_hook(lambda *_: seen.append(type(model[0]).__name__))
    adapted = vf.adapt(model, vf.VeraConfig(r=2, target_modules=["0"]))
    adapted.apply(adapted.params, adapted.frozen, normal(2, 3))
    assert len(seen) == 1
    hook = next(iter(model[0]._forward_hooks.values()))
    copied = copy_module(model, {})
    (other,) = copied[0]._forward_hooks.values()
    assert other is not hook
    assert {id(cell.cell_contents) for cell in other.__closure__} == {id(copied), id(seen)}
    # A function that refers to no module of the tree is not copied.
    model[0].forward = unrelated = lambda x: seen
    assert copy_module(model, {})[0].forward is unrelated


def test_a_module_that_the_copy_shares_keeps_its_reference():
    def refer(model):
        vars(model.first)["owner"] = ref(model)

    model = Model(refer)
    model.second = nn.DataParallel(model.second)
    assert vf.quantize_model(model, "nf4") is not model
    assert model.first.owner() is model


def test_references_to_and_from_parts_of_a_replaced_layer():
    layer = nn.Linear(64, 64)
    layer.part = nn.Identity()
    vars(layer.part)["owner"] = ref(layer)
    model = nn.Sequential(layer, nn.Linear(64, 64))
    vars(model[1])["part"] = ref(layer.part)
    new = copy_module(model, {id(layer): nn.Linear(64, 64)})
    assert new[1].part() is layer.part.owner().part is layer.part
