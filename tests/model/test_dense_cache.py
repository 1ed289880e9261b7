"""`apply.with_dense_cache(max_bytes=...)`: which layers get a dense copy, what that takes, and what it changes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.base_layers import QuantizedLinear

from helpers import RANK, TARGETS, assert_near, assert_same, llama, quantized, randomized, several, tokens


ENOUGH, IDS = 2**30, tokens()


def build(base="nf4", dtype=torch.float32):
    model = quantized(llama(dtype, "eager"), base)
    adapted = vf.adapt(model, vf.VeraConfig(r=RANK, target_modules=TARGETS["llama"]))
    return adapted._replace(params=randomized(adapted.params))


def layers(apply):
    return {path: m for path, m in apply.trees.root.named_modules() if isinstance(m, QuantizedLinear)}


def cached(apply):
    return {path for path, layer in layers(apply).items() if layer.dense is not None}


def logits(adapted, apply, params=None):
    return apply(adapted.params if params is None else params, adapted.frozen, input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["nf4", "nested", "int8"])
def test_equals_dequantizing(base, dtype):
    adapted = build(base, dtype)
    fast = adapted.apply.with_dense_cache(max_bytes=ENOUGH)
    sizes = sum(layer.quantized.shape[0] * layer.quantized.shape[1] for layer in layers(fast).values())
    assert fast.dense_bytes == sizes * dtype.itemsize
    assert {layer.dense.weight.dtype for layer in layers(fast).values()} == {dtype}
    assert torch.equal(logits(adapted, fast), logits(adapted, adapted.apply))
    with torch.no_grad():
        assert torch.equal(logits(adapted, fast), logits(adapted, adapted.apply))
    assert not cached(adapted.apply)
    assert adapted.apply.dense_bytes == 0


def test_gradients_and_rows():
    adapted = build()
    fast = adapted.apply.with_dense_cache(max_bytes=ENOUGH)
    found = [
        vf.grad(lambda p, a=a: logits(adapted, a, p).square().sum())(adapted.params) for a in (fast, adapted.apply)
    ]
    assert_close(*found, rtol=1e-4, atol=1e-4)
    stacked = several(adapted, 3)
    rows = vf.select_adapters(stacked, [2, 0, -1])
    assert_same(logits(adapted, fast, rows), logits(adapted, adapted.apply, rows))
    loss = lambda apply: torch.func.grad(lambda p: logits(adapted, apply, p).square().sum())
    mapped = [vmap(loss(apply))(stacked) for apply in (fast, adapted.apply)]
    assert_close(*mapped, rtol=1e-4, atol=1e-4)


def test_fills_the_budget_and_no_more():
    adapted = build()
    every = adapted.apply.with_dense_cache(max_bytes=ENOUGH)
    for budget in (0, 1, 64 * 64 * 4, 50_000, every.dense_bytes - 1, every.dense_bytes):
        fast = adapted.apply.with_dense_cache(max_bytes=budget)
        sizes = {p: 4 * m.quantized.shape[0] * m.quantized.shape[1] for p, m in layers(fast).items()}
        held = sum(sizes[path] for path in cached(fast))
        assert held == fast.dense_bytes <= budget
        assert all(sizes[path] > budget - held for path in sizes.keys() - cached(fast))  # no other one fits
        assert torch.equal(logits(adapted, fast), logits(adapted, adapted.apply))
    again = every.with_dense_cache(max_bytes=0)  # the budget is for all copies, not for more of them
    assert again.dense_bytes == 0
    assert every.dense_bytes > 0


class Uneven(nn.Module):
    """Its last layer is called three times, its first once, its second never."""

    def __init__(self):
        super().__init__()
        self.once, self.never, self.often = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.once(x)
        for _ in range(3):
            x = self.often(x).tanh()
        return x


def test_layers_that_are_called_most_come_first():
    torch.manual_seed(0)
    model = vf.quantize_model(Uneven(), "nf4")
    apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["once"]))
    size, x = 64 * 64 * 4, torch.randn(2, 64)
    workload = lambda apply: apply(params, frozen, x)
    name = {path: path.removeprefix("model.").removesuffix(".base_layer") for path in layers(apply)}
    found = [
        {name[path] for path in cached(apply.with_dense_cache(max_bytes=n * size, workload=workload))} for n in range(4)
    ]
    assert found == [set(), {"often"}, {"often", "once"}, {"often", "once"}]
    assert {name[path] for path in cached(apply.with_dense_cache(max_bytes=2 * size))} == {"once", "never"}
    fast = apply.with_dense_cache(max_bytes=size, workload=workload)
    assert torch.equal(workload(fast), workload(apply))
    assert not any(m._forward_pre_hooks for m in fast.trees.root.modules())


def test_a_workload_that_generates():
    adapted = build()
    rows = vf.select_adapters(several(adapted), [1, -1, 0])
    workload = lambda apply: apply.generate(
        rows, adapted.frozen, input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0
    )
    fast = adapted.apply.with_dense_cache(max_bytes=ENOUGH, workload=workload)
    assert cached(fast) == {*layers(fast)}
    assert torch.equal(workload(fast), workload(adapted.apply))


def test_copies_share_it_and_files_leave_it_out():
    adapted = build()
    fast = adapted.apply.with_dense_cache(max_bytes=ENOUGH)
    weights = lambda apply: {path: layer.dense.weight.data_ptr() for path, layer in layers(apply).items()}
    others = [copy.copy(fast), copy.deepcopy(fast), fast.with_dropout(torch.Generator()), fast.with_row_axes(0)]
    others += [fast.with_fused_weights()]
    for other in others:
        assert weights(other) == weights(fast)
    with ThreadPoolExecutor(3) as pool:  # each call of several at once has its own tree
        for result in pool.map(lambda _: logits(adapted, fast), range(6)):
            assert torch.equal(result, logits(adapted, adapted.apply))
    trees = fast.trees.free
    assert trees
    assert all(weights(SimpleNamespace(trees=tree)) == weights(fast) for tree in trees)
    data = pickle.dumps(fast)
    assert len(data) < len(pickle.dumps(adapted.apply)) + 10_000
    again = pickle.loads(data)
    assert again.dense_bytes == fast.dense_bytes
    assert torch.equal(logits(adapted, again), logits(adapted, fast))
    assert torch.equal(vf.to_module(adapted._replace(apply=fast))(input_ids=IDS).logits, logits(adapted, fast))


def test_compute_dtype_and_activations_in_8_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    adapt = lambda m, **options: vf.adapt(m, vf.VeraConfig(r=4, target_modules=["0"]), **options)
    for i, layer in enumerate(model):
        q = vf.quantize_4bit(layer.weight.detach(), compute_dtype=torch.bfloat16)
        model[i] = vf.to_bnb(q, layer.bias.detach())
    apply, params, frozen, _ = adapt(model)
    fast, x = apply.with_dense_cache(max_bytes=ENOUGH), torch.randn(3, 64)
    assert fast.dense_bytes == 2 * 64 * 64 * 2
    assert torch.equal(fast(params, frozen, x), apply(params, frozen, x))
    rounded = adapt(vf.quantize_model(nn.Sequential(nn.Linear(64, 64)), "int8"), int8_activations=True)
    assert rounded.apply.with_dense_cache(max_bytes=ENOUGH).dense_bytes == 0


def test_dense_models_have_nothing_to_copy():
    adapted = build("dense")
    fast = adapted.apply.with_dense_cache(max_bytes=ENOUGH)
    assert fast.dense_bytes == 0
    assert_near(logits(adapted, fast), logits(adapted, adapted.apply), 0)


@pytest.mark.parametrize("value", [-1, 1.5, 1e9, True, "1 GB", None])
def test_a_budget_is_an_integer(value):
    with pytest.raises(ValueError, match=r"max_bytes must be a non-negative number of bytes, got"):
        build().apply.with_dense_cache(max_bytes=value)


def test_other_mistakes():
    apply = build().apply
    with pytest.raises(ValueError, match="workload must be a function that takes an Apply, got dict"):
        apply.with_dense_cache(max_bytes=1, workload={})
    for value in (-1, 2.0, True, "32"):
        with pytest.raises(ValueError, match="max_rows must be a non-negative integer or None"):
            apply.with_fused_weights(max_rows=value)
