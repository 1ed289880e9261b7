"""`adapt(..., product_dtype=...)`: a model whose adapters multiply in 16 bits, one adapter or many."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import vmap

import vera_func as vf

from helpers import RANK, TARGETS, assert_near, llama, quantized, randomized, several, tokens


# The branch is a part of the logits, and its products are rounded a few times: 2^-8 in bfloat16.
NEAR = 0.02
CONFIG = vf.VeraConfig(r=RANK, target_modules=TARGETS["llama"])


def pair(base="nf4", dtype=torch.float32):
    """The same model and config with and without 16-bit products, and four adapters."""
    model = quantized(llama(dtype, "eager"), base)
    plain, fast = (vf.adapt(model, CONFIG, product_dtype=d) for d in (None, torch.bfloat16))
    return plain, fast, several(plain)


def logits(adapted, params, ids, apply=None):
    return (apply or adapted.apply)(params, adapted.frozen, input_ids=ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_rounds_the_branch_alone(base, dtype):
    plain, fast, stacked = pair(base, dtype)
    params, ids = vf.unstack_adapters(stacked)[0], tokens()
    assert {v.dtype for v in (*fast.params.values(), *fast.frozen.values())} == {torch.float32}
    exact, rounded = logits(plain, params, ids), logits(fast, params, ids)
    assert not torch.equal(exact, rounded)
    assert_near(rounded, exact, NEAR)
    fresh = plain.params  # lambda_b is 0: the base alone, in the base's arithmetic
    assert torch.equal(logits(fast, fresh, ids), logits(plain, fresh, ids))


def test_frozen_may_be_given_in_16_bits():
    _, fast, stacked = pair()
    params, ids = vf.unstack_adapters(stacked)[0], tokens()
    given = fast._replace(frozen={k: v.to(torch.bfloat16) for k, v in fast.frozen.items()})
    assert torch.equal(logits(given, params, ids), logits(fast, params, ids))


def test_a_single_row_without_gradients_is_multiplied_in_the_dtype_of_the_vectors():
    plain, fast, stacked = pair()
    params = vf.unstack_adapters(stacked)[0]
    row, rows = tokens(1, 1), tokens(1, 2)
    with torch.no_grad():
        assert torch.equal(logits(fast, params, row), logits(plain, params, row))
        assert not torch.equal(logits(fast, params, rows), logits(plain, params, rows))
        mapped = vmap(lambda p: logits(fast, p, row))(stacked)  # four rows at a time
        assert not torch.equal(mapped[0], logits(plain, params, row))
    assert torch.equal(logits(fast, params, row), logits(plain, params, row))  # no input requires gradients
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    rounded, exact = (logits(each, leaves, row) for each in (fast, plain))
    assert not torch.equal(rounded, exact)
    assert_near(rounded, exact, NEAR)


def test_many_adapters():
    plain, fast, stacked = pair()
    ids = tokens(4, 7)
    rows = vf.select_adapters(stacked, [2, 0, -1, 1])
    assert_near(logits(fast, rows, ids), logits(plain, rows, ids), NEAR)
    sums = vf.select_adapters(stacked, [[2, 0], [0, 1], [-1, 3], [1, 1]], [[0.5, 1.0], [2.0, -1.0], [1.0, 1.0], [0, 1]])
    assert_near(logits(fast, sums, ids), logits(plain, sums, ids), NEAR)
    folded = vf.vmap_adapters(fast.apply, in_dims=None)(stacked, fast.frozen, input_ids=ids).logits
    mapped = vmap(lambda p: logits(fast, p, ids))(stacked)
    expected = torch.stack([logits(plain, p, ids) for p in vf.unstack_adapters(stacked)])
    assert_near(folded, expected, NEAR)
    assert_near(mapped, expected, NEAR)


def test_pool():
    model = quantized(llama(), "nf4")
    wide = vf.VeraConfig(r=2 * RANK, target_modules=["q_proj"], projection_prng_key=1)
    pools = []
    for dtype in (None, torch.bfloat16):
        adapters = [vf.adapt(model, config, product_dtype=dtype) for config in (CONFIG, wide)]
        pools.append(vf.pool_adapters([a._replace(params=randomized(a.params)) for a in adapters]))
        assert pools[-1].apply.product_dtype == dtype
    outputs = [logits(pool, vf.select_adapters(pool.params, [1, 0, 1]), tokens()) for pool in pools]
    assert not torch.equal(*outputs)
    assert_near(*outputs, NEAR)
    mixed = [vf.adapt(model, CONFIG), vf.adapt(model, CONFIG, product_dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match="adapter 1 and adapter 0 differ in product_dtype"):
        vf.pool_adapters(mixed)


def test_dropout():
    model, config = llama(), vf.VeraConfig(r=RANK, target_modules=TARGETS["llama"], vera_dropout=0.5)
    plain, fast = (vf.adapt(model, config, product_dtype=d) for d in (None, torch.bfloat16))
    params = randomized(plain.params)
    drawn = [logits(a, params, tokens(), a.apply.with_dropout(torch.Generator().manual_seed(3))) for a in (plain, fast)]
    assert_near(*drawn, NEAR)
    assert not torch.equal(drawn[1], logits(fast, params, tokens()))


def test_gradients():
    plain, fast, stacked = pair()
    params, ids = vf.unstack_adapters(stacked)[0], tokens()
    exact, rounded = (vf.grad(lambda p, a=a: logits(a, p, ids).square().mean())(params) for a in (plain, fast))
    for key, value in exact.items():
        assert rounded[key].dtype == torch.float32
        assert_near(rounded[key], value, 0.05)


def test_merges_and_files_are_unaffected(tmp_path):
    plain, fast, stacked = pair()
    params = vf.unstack_adapters(stacked)[0]
    q, _ = vf.from_bnb(plain.apply.model.model.layers[0].self_attn.q_proj)
    merged = [vf.merge(a.apply.model, params, a.frozen, to=torch.float32) for a in (plain, fast)]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(*(model.state_dict()[name] for model in merged))
    assert q.shape == merged[0].state_dict()[name].shape
    vf.save_adapter(tmp_path, params, fast.frozen, fast.config)
    exact = vf.load_adapter(tmp_path, plain.apply.model)
    again = vf.load_adapter(tmp_path, plain.apply.model, product_dtype=torch.bfloat16)
    assert torch.equal(logits(exact, exact.params, tokens()), logits(plain, params, tokens()))
    assert torch.equal(logits(again, again.params, tokens()), logits(fast, params, tokens()))


def test_modules_and_copies_keep_it():
    _, fast, stacked = pair()
    params = vf.unstack_adapters(stacked)[0]
    expected = logits(fast, params, tokens())
    for apply in (pickle.loads(pickle.dumps(fast.apply)), copy.deepcopy(fast.apply), fast.apply.with_fused_weights()):
        assert torch.equal(logits(fast, params, tokens(), apply), expected)
    module = vf.to_module(fast._replace(params=params))
    assert torch.equal(module(input_ids=tokens()).logits, expected)


def test_a_layer():
    frozen = vf.init_projections(4, 8, 6)
    base, x = nn.Linear(8, 6), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    layers = [
        vf.Linear(base, "default", frozen["vera_A"], frozen["vera_B"], r=4, product_dtype=dtype)
        for dtype in (None, torch.bfloat16)
    ]
    for layer in layers:
        nn.init.ones_(layer.lambda_b)
    outputs = [layer(x) for layer in layers]
    assert not torch.equal(*outputs)
    assert_near(*outputs, NEAR)
    with pytest.raises(ValueError, match="product_dtype must be"):
        vf.Linear(base, "default", frozen["vera_A"], frozen["vera_B"], r=4, product_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "bfloat16"])
def test_other_dtypes_are_refused(dtype, tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="product_dtype must be"):
        vf.adapt(model, CONFIG, product_dtype=dtype)
    adapted = vf.adapt(model, CONFIG)
    vf.save_adapter(tmp_path, *adapted[1:])
    with pytest.raises(ValueError, match=r"^product_dtype must be"):
        vf.load_adapter(tmp_path, model, product_dtype=dtype)
