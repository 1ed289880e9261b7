"""`pool_adapters`: adapters of different ranks, targets and projections as rows of one batch."""

import peft
import pytest
import torch
from torch import nn, ones
from torch.func import grad
from torch.testing import assert_close

import vera_func as vf

from helpers import (
    assert_near,
    assert_same,
    bert,
    gpt2,
    llama,
    normal,
    quantized,
    randomized,
    relative_error,
    row,
    several,
    small,
    snapshot,
    tokens,
)
from refused import ADAPTED, CONFIGURATION, PARAMS, STACK, Refused, small_model


R, N = 8, 4
# torch's vmap goes through fused attention in a loop, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def directories(base, tmp_path):
    """Four unlike adapters over one model, saved as PEFT directories, and how PEFT reads them."""
    model = quantized(llama(), base)
    configs = [
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "save_projection": False},
        {"r": 8, "target_modules": ["down_proj", "q_proj"], "projection_prng_key": 3, "save_projection": False},
        {"r": 8, "target_modules": ["v_proj"], "projection_prng_key": 5},
        {"r": 16, "target_modules": r".*layers\.1\..*(gate|o)_proj"},
    ]
    for i, fields in enumerate(configs):
        _, params, frozen, config = vf.adapt(model, vf.VeraConfig(**fields))
        if config.save_projection:
            frozen = randomized(frozen, seed=9)  # no draw: the file's are to be read
        vf.save_adapter(tmp_path / str(i), randomized(params, seed=i, scale=0.5), frozen, config)
    return model, [tmp_path / str(i) for i in range(len(configs))]


class TestPools:
    @pytest.mark.parametrize("base", ["dense", "nested", "int8"])
    def test_give_each_row_what_peft_gives(self, base, tmp_path):
        model, folders = directories(base, tmp_path)
        pool = vf.pool_adapters([vf.load_adapter(folder, model) for folder in folders])
        assert pool.config.r == pool.frozen["vera_A"].shape[0] == 4 + 8 + 8 + 16
        x = tokens(4, 6)
        rows = pool.apply(vf.select_adapters(pool.params, [3, 2, 1, 0]), pool.frozen, input_ids=x).logits
        none = pool.apply(vf.select_adapters(pool.params, [-1] * 4), pool.frozen, input_ids=x).logits
        for i, chosen in enumerate([3, 2, 1, 0]):
            theirs = peft.PeftModel.from_pretrained(quantized(llama(), base), folders[chosen]).train()
            expected = theirs(input_ids=x[i : i + 1]).logits.detach()
            assert_near(rows[i : i + 1], expected, 5e-6)
            assert relative_error(none[i : i + 1], expected) > 1e-3
            # Over the whole batch, and summed with another one.
            assert_near(
                pool.apply(row(pool.params, chosen), pool.frozen, input_ids=x).logits[i : i + 1], expected, 5e-6
            )

    def test_gradients_are_each_adapters_own(self, tmp_path):
        model, folders = directories("dense", tmp_path)
        adapters = [vf.load_adapter(folder, model) for folder in folders]
        pool, x = vf.pool_adapters(adapters), tokens(2, 6)
        f = vf.vmap_adapters(pool.apply, None)
        gradient = grad(lambda s: f(s, pool.frozen, input_ids=x).logits.square().sum())(pool.params)
        start = 0
        for i, adapted in enumerate(adapters):
            own = grad(lambda p, a=adapted: a.apply(p, a.frozen, input_ids=x).logits.square().sum())(adapted.params)
            for key, value in own.items():
                part = gradient[key][i]
                part = part[start : start + len(value)] if key.endswith("lambda_d") else part
                assert_near(part, value)
            start += adapted.config.r

    def test_equal_projections_are_held_once(self):
        model = small().apply.model
        a = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0", "2"]))
        b = a._replace(params=randomized(a.params))
        c = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0", "2"], projection_prng_key=1))
        pool = vf.pool_adapters([a, c._replace(params=randomized(c.params, 2)), b])
        assert pool.config.r == 8
        for i, adapted in enumerate((a, c._replace(params=randomized(c.params, 2)), b)):
            expected = adapted.apply(adapted.params, adapted.frozen, normal(3, 7))
            assert_close(pool.apply(row(pool.params, i), pool.frozen, normal(3, 7)), expected)

    def test_inputs_are_left_alone(self):
        model = small().apply.model
        adapters = [vf.adapt(model, vf.VeraConfig(r=r, target_modules=[t])) for r, t in ((4, "0"), (8, "2"))]
        before = snapshot(*(tree for a in adapters for tree in (a.params, a.frozen)), model)
        pool = vf.pool_adapters(adapters)
        for leaf in (*pool.params.values(), *pool.frozen.values()):
            leaf.fill_(7.0)
        assert_same(snapshot(*(tree for a in adapters for tree in (a.params, a.frozen)), model), before)

    def test_of_one_is_that_one(self):
        adapted = small()
        pool = vf.pool_adapters([adapted])
        assert_same(row(pool.params, 0), adapted.params)
        assert_same(pool.frozen, adapted.frozen)

    def test_heads_and_biases(self):
        model = bert()
        configs = [
            {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"},
            {"r": 8, "target_modules": ["value"], "bias": "vera_only"},
            {"r": 4, "target_modules": ["key", "query"]},
        ]
        adapters = [vf.adapt(model, vf.VeraConfig(**fields)) for fields in configs]
        adapters = [a._replace(params=randomized(a.params, i)) for i, a in enumerate(adapters)]
        pool, x = vf.pool_adapters(adapters), tokens(3, 6)
        rows = pool.apply(pool.params, pool.frozen, input_ids=x).logits
        for i, a in enumerate(adapters):
            assert_near(rows[i : i + 1], a.apply(a.params, a.frozen, input_ids=x[i : i + 1]).logits)

    @pytest.mark.parametrize("own", [False, True])
    def test_a_row_can_be_saved(self, own, tmp_path):
        model = bert()
        more = {"modules_to_save": ["classifier"]} if own else {}
        configs = [{"r": 4, "target_modules": ["query"], **more}, {"r": 8, "target_modules": ["value"]}]
        adapters = [vf.adapt(model, vf.VeraConfig(**fields)) for fields in configs]
        adapters = [a._replace(params=randomized(a.params, i)) for i, a in enumerate(adapters)]
        pool, x = vf.pool_adapters(adapters), tokens(3, 6)
        for i, a in enumerate(adapters):
            vf.save_adapter(tmp_path, row(pool.params, i), pool.frozen, pool.config, adapter_name=str(i))
            expected = a.apply(a.params, a.frozen, input_ids=x).logits
            loaded = vf.load_adapter(tmp_path, model, adapter_name=str(i))
            assert_near(loaded.apply(loaded.params, loaded.frozen, input_ids=x).logits, expected)
            theirs = peft.PeftModel.from_pretrained(bert(), tmp_path / str(i)).eval()
            assert_near(theirs(input_ids=x).logits.detach(), expected)

    def test_dropout_of_one_rate(self):
        model = small().apply.model
        rates = [(0.5, 0.5), (0.5, 0.0)]
        for pair in rates:
            adapters = [vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0"], vera_dropout=rate)) for rate in pair]
            pool = vf.pool_adapters([a._replace(params=randomized(a.params)) for a in adapters])
            dropped = pool.apply.with_dropout(torch.Generator().manual_seed(0))
            exact = pool.apply(row(pool.params, 0), pool.frozen, normal(3, 7))
            assert torch.equal(dropped(row(pool.params, 0), pool.frozen, normal(3, 7)), exact) == (pair[0] != pair[1])

    def test_targets_are_in_the_models_order(self):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(11)))
        adapters = [vf.adapt(model, vf.VeraConfig(r=4, target_modules=[name])) for name in ("10", "2")]
        assert list(vf.pool_adapters(adapters).apply.targets) == ["2", "10"]

    def test_keep_int8_activations(self):
        model = nn.Sequential(vf.to_bnb(vf.quantize_8bit(normal(13, 32))))
        adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0"]), int8_activations=True)
        pool, x = vf.pool_adapters([adapted, adapted]), normal(3, 32)
        rows = pool.apply(row(pool.params, 1), pool.frozen, x)
        assert_near(rows, vf.quantized_linear(vf.from_bnb(model[0])[0], x, int8_activations=True))
        assert relative_error(rows, vf.quantized_linear(vf.from_bnb(model[0])[0], x)) > 1e-4

    def test_refuses(self):
        adapted = small()
        other = small()
        int8 = vf.adapt(adapted.apply.model, adapted.config, int8_activations=True)
        with pytest.raises(ValueError, match="nothing to pool"):
            vf.pool_adapters([])
        with pytest.raises(ValueError, match="adapters 1 and 0 belong to different model objects"):
            vf.pool_adapters([adapted, other])
        with pytest.raises(ValueError, match="int8_activations"):
            vf.pool_adapters([adapted, int8])
        with pytest.raises(ValueError, match=r"'0\.lambda_b' of adapter 1 is stacked"):
            vf.pool_adapters([adapted, adapted._replace(params=several(adapted))])


def test_vectors_are_not_rounded_to_the_dtype_of_the_projections():
    adapted = small()
    half = adapted._replace(
        params=randomized(adapted.params), frozen={name: leaf.bfloat16() for name, leaf in adapted.frozen.items()}
    )
    pool = vf.pool_adapters([half, half])
    assert pool.params["0.lambda_b"].dtype == torch.float32
    assert_same(row(pool.params, 0)["0.lambda_b"], half.params["0.lambda_b"])


def test_gpt2_pools_conv1d():
    model = gpt2()
    adapters = [
        vf.adapt(model, vf.VeraConfig(r=r, target_modules=[target], projection_prng_key=r))
        for r, target in ((4, "c_attn"), (8, "c_fc"))
    ]
    adapters = [a._replace(params=randomized(a.params, i)) for i, a in enumerate(adapters)]
    pool, x = vf.pool_adapters(adapters), tokens(2, 6)
    rows = pool.apply(pool.params, pool.frozen, input_ids=x).logits
    for i, a in enumerate(adapters):
        assert_near(rows[i : i + 1], a.apply(a.params, a.frozen, input_ids=x[i : i + 1]).logits)


# What is refused

bad = Refused()

bad("pool_adapters", "none", lambda _: vf.pool_adapters([]), "nothing to pool")
bad("pool_adapters", "one, not in a list", lambda _: vf.pool_adapters(ADAPTED), "must be a sequence of Adapted")
bad("pool_adapters", "params", lambda _: vf.pool_adapters([PARAMS]), "must be a sequence of Adapted")
bad(
    "pool_adapters",
    "different model",
    lambda _: vf.pool_adapters([ADAPTED, vf.adapt(small_model(), CONFIGURATION)]),
    "different model",
)
bad(
    "pool_adapters",
    "a key too many",
    lambda _: vf.pool_adapters([ADAPTED._replace(params=PARAMS | {"9.lambda_b": ones(3)})]),
    "unknown keys",
)
bad(
    "pool_adapters",
    "no projections",
    lambda _: vf.pool_adapters([ADAPTED._replace(frozen={})]),
    "'vera_A' and 'vera_B'",
)
bad("pool_adapters", "a stack", lambda _: vf.pool_adapters([ADAPTED._replace(params=STACK)]), "is stacked; pool single")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
