"""DVoRA over whole models: against dense weights, many adapters at once, folded, in pools, trained, as a module."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.algebra import without_update
from vera_func.model.dora import keep_norm_statistics

from helpers import (
    RANK,
    TOLERANCE,
    LargestTensor,
    assert_near,
    assert_same,
    build,
    dora_forward,
    language,
    logits,
    merged,
    quantized,
    randomized,
    row,
    several,
    small,
    tokens,
)
from refused import ADAPTED, FROZEN, PARAMS, Refused, small_model


fold = vf.fold_magnitude


def dora(name="llama", base="dense", **fields):
    return language(name, base, use_dora=True, **fields)


def of_layer(params, name):
    return {key: params[f"{name}.{key}"] for key in ("lambda_b", "lambda_d", "magnitude")}


@pytest.mark.parametrize("base", ["dense", "nf4", "nested", "fp4", "int8", "bf16 storage"])
def test_equals_dense_weights(base):
    model, adapted = dora("llama", base)
    expected = logits(merged(model, adapted)(input_ids=tokens()))
    assert_near(logits(adapted.apply(adapted.params, adapted.frozen, input_ids=tokens())), expected)


@pytest.mark.parametrize(("name", "base"), [("gpt2", "dense"), ("bert", "nf4")])
def test_equals_dense_weights_beside_a_bias(name, base):
    model, adapted = dora(name, base)
    for parameter in model.parameters():  # biases are zero at first
        if parameter.dim() == 1 and parameter.is_floating_point():
            parameter.data += 0.1
    expected = logits(merged(model, adapted)(input_ids=tokens()))
    assert_near(logits(adapted.apply(adapted.params, adapted.frozen, input_ids=tokens())), expected)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fresh_adapter_is_the_base(name, base):
    plain = build(name, base)
    adapted = build(name, base, use_dora=True)
    assert {key.rpartition(".")[2] for key in adapted.params} == {"lambda_b", "lambda_d", "magnitude"}
    one = logits(plain.apply(plain.params, plain.frozen, input_ids=tokens()))
    assert torch.equal(logits(adapted.apply(adapted.params, adapted.frozen, input_ids=tokens())), one)


def two_layers(base, differentiate):
    """A double model of two layers as a function, and the same by the dense formula."""
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Linear(32, 5), nn.Tanh(), nn.Linear(5, 3)), base)
    dense = []
    for layer in (model[0], model[2]):
        weight = layer.weight if base == "dense" else vf.dequantize(vf.from_bnb(layer)[0], torch.float64)
        dense.append((weight.detach().double(), layer.bias.detach().double()))
    model = model.double() if base == "dense" else model
    config = vf.VeraConfig(r=RANK, target_modules=["0", "2"], use_dora=True, differentiate_norm=differentiate)
    apply, params, frozen, _ = vf.adapt(model, config, dtype=torch.float64)
    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def oracle(p):
        y = dora_forward(of_layer(p, "0"), frozen, x, *dense[0], differentiate)
        return dora_forward(of_layer(p, "2"), frozen, y.tanh(), *dense[1], differentiate)

    return (lambda p: apply(p, frozen, x)), oracle, randomized(params)


@pytest.mark.parametrize("differentiate", [False, True], ids=["constant norm", "norm"])
@pytest.mark.parametrize("base", ["dense", "nf4", "nested", "int8"])
def test_gradient_and_hessian(base, differentiate):
    here, oracle, params = two_layers(base, differentiate)
    for transform in (vf.grad, hessian):
        actual = transform(lambda p: here(p).square().sum())(params)
        expected = transform(lambda p: oracle(p).square().sum())(params)
        assert_close(actual, expected, **TOLERANCE[torch.float64])


def test_compiles():
    apply, params, frozen, _ = build(use_dora=True)
    params, ids = randomized(params), tokens()

    def loss(p):
        return logits(apply(p, frozen, input_ids=ids)).square().mean()

    compiled = torch.compile(vf.grad(loss), fullgraph=True, backend="aot_eager")(params)
    assert_close(compiled, vf.grad(loss)(params), rtol=1e-4, atol=1e-4)
    stacked = several(vf.Adapted(apply, params, frozen, None))
    rows = vf.select_adapters(fold(apply, stacked, frozen), [0, -1, 2])
    forward = torch.compile(lambda p: logits(apply(p, frozen, input_ids=ids)), fullgraph=True, backend="eager")
    assert_close(forward(rows), logits(apply(rows, frozen, input_ids=ids)), rtol=1e-4, atol=1e-4)


class TestManyAdapters:
    @pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_a_mixed_batch(self, name, base):
        model, adapted = dora(name, base)
        stacked = several(adapted)
        ids = [2, -1, 0]
        expected = [
            logits(model(input_ids=tokens()[i : i + 1]) if j < 0 else one(adapted, stacked, j, tokens()[i : i + 1]))
            for i, j in enumerate(ids)
        ]
        folded = fold(adapted.apply, stacked, adapted.frozen)
        for given in (stacked, folded):
            rows = vf.select_adapters(given, ids)
            out = logits(adapted.apply(rows, adapted.frozen, input_ids=tokens()))
            assert_near(out, torch.cat(expected))

    def test_maps_over_adapters(self):
        _, adapted = dora("llama", "nf4")
        stacked = several(adapted)
        expected = torch.stack([logits(one(adapted, stacked, i, tokens())) for i in range(4)])
        for given in (stacked, fold(adapted.apply, stacked, adapted.frozen)):
            together = vf.vmap_adapters(adapted.apply, in_dims=None)(given, adapted.frozen, input_ids=tokens())
            assert_near(logits(together), expected)
        small_ones = small(use_dora=True)
        many, x = several(small_ones), torch.ones(2, 7)
        mapped = vmap(small_ones.apply, (0, None, None))(many, small_ones.frozen, x)
        assert_near(mapped, torch.stack([one(small_ones, many, i, x) for i in range(4)]))

    @pytest.mark.parametrize("differentiate", [False, True])
    def test_mapped_over_batches_norms_are_computed_once_an_adapter(self, differentiate):
        adapted = small(use_dora=True, differentiate_norm=differentiate)
        stacked, x = several(adapted), torch.randn(4, 50, 7, generator=torch.Generator().manual_seed(2))

        def losses(p, x):
            return adapted.apply(p, adapted.frozen, x).square().sum()

        def mapped(p):
            return vf.vmap_adapters(adapted.apply)(p, adapted.frozen, x).square().sum()

        with LargestTensor() as largest:
            mapped(stacked)
        assert largest.numel <= 4 * 50 * 8  # the largest activation; norms of all rows need (200, 5, 8)
        assert_close(vf.grad(mapped)(stacked), vmap(torch.func.grad(losses))(stacked, x), rtol=1e-4, atol=1e-4)

    def test_gradients_of_rows(self):
        _, adapted = dora("llama", "nf4")
        stacked = several(adapted, 3)

        def losses(p, ids):
            return logits(adapted.apply(p, adapted.frozen, input_ids=ids)).square().mean((1, 2)).sum()

        together = vf.grad(losses)(stacked, tokens())
        for i in range(3):
            alone = vf.grad(losses)(row(stacked, i), tokens()[i : i + 1])
            for key, value in alone.items():
                assert_near(together[key][i], value, 1e-4)

    def test_sums(self):
        adapted = small(use_dora=True, targets=["2"])  # the change of the last layer is that of the output
        stacked, x = several(adapted), torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
        ids, weights = [[0, 1], [-1, 2], [3, 3]], torch.tensor([[0.5, 2.0], [1.0, -1.0], [0.25, 0.5]])
        rows = vf.select_adapters(fold(adapted.apply, stacked, adapted.frozen), ids, weights)
        base = adapted.apply.model(x)
        expected = base.clone()
        for i, terms in enumerate(ids):
            for adapter, weight in zip(terms, weights[i], strict=True):
                if adapter >= 0:
                    expected[i] += weight * (one(adapted, stacked, adapter, x)[i] - base[i])
        assert_near(adapted.apply(rows, adapted.frozen, x), expected)

    def test_generates(self):
        _, adapted = dora("llama", "nf4")
        stacked = several(adapted, 3, scale=1.0)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        folded = fold(adapted.apply, stacked, adapted.frozen)
        rows = vf.select_adapters(folded, [2, -1, 1])
        together = adapted.apply.generate(rows, adapted.frozen, input_ids=tokens(), **options)
        for i, j in enumerate([2, None, 1]):
            alone = vf.select_adapters(stacked, [-1 if j is None else j])
            ids = tokens()[i : i + 1]
            assert torch.equal(together[i], adapted.apply.generate(alone, adapted.frozen, input_ids=ids, **options)[0])

    @pytest.mark.parametrize("folded", [False, True])
    def test_a_pool_of_vera_and_dvora(self, folded):
        model, first = dora("llama", "nf4")
        fields = {"target_modules": ["v_proj", "k_proj"], "r": 5, "projection_prng_key": 1}
        second = vf.adapt(model, vf.VeraConfig(**fields))
        second = second._replace(params=randomized(second.params))
        given = first._replace(params=fold(first.apply, first.params, first.frozen)) if folded else first
        pool = vf.pool_adapters([given, second])
        rows = vf.select_adapters(pool.params, [1, 0, -1])
        out = logits(pool.apply(rows, pool.frozen, input_ids=tokens()))
        for i, adapted in enumerate([second, first]):
            alone = adapted.apply(adapted.params, adapted.frozen, input_ids=tokens()[i : i + 1])
            assert_near(out[i], logits(alone)[0])
        assert_near(out[2], logits(model(input_ids=tokens()[2:]))[0])
        assert pool.config.use_dora

    def test_a_pool_of_equal_layers_can_be_saved_one_by_one(self, tmp_path):
        model, first = dora()
        pool = vf.pool_adapters([first, first._replace(params=randomized(first.params, 7))])
        vf.save_adapter(tmp_path, vf.unstack_adapters(pool.params)[1], pool.frozen, pool.config)
        loaded = vf.load_adapter(tmp_path, model)
        assert_near(
            logits(loaded.apply(loaded.params, loaded.frozen, input_ids=tokens())),
            logits(first.apply(randomized(first.params, 7), first.frozen, input_ids=tokens())),
        )

    def test_arithmetic_of_folded_adapters(self):
        adapted = small(use_dora=True, targets=["2"])
        stacked, x = several(adapted, 2), torch.ones(3, 7)
        base = adapted.apply(vf.select_adapters(stacked, [-1] * 3), adapted.frozen, x)
        first, second = vf.unstack_adapters(fold(adapted.apply, stacked, adapted.frozen))
        second["2.lambda_d"] = first["2.lambda_d"]  # so that the sum exists

        def change(p):
            return adapted.apply(p, adapted.frozen, x) - base

        assert_near(change(vf.scale_adapter(first, -0.5)), -0.5 * change(first))
        total = vf.add_adapters([first, second], [2.0, 0.5])
        assert_near(change(total), 2 * change(first) + 0.5 * change(second))


@pytest.mark.parametrize("use_dora", [False, True])
def test_without_its_update_an_adapter_is_the_base_with_its_heads(use_dora):
    adapted = small(use_dora=use_dora, modules_to_save=["2"], targets=["0"])
    params, x = randomized(adapted.params), torch.ones(3, 7)
    model = copy.deepcopy(adapted.apply.model)
    model.load_state_dict({key: value for key, value in params.items() if key.startswith("2.")}, strict=False)
    for given in (params, fold(adapted.apply, params, adapted.frozen)) if use_dora else (params,):
        assert torch.equal(adapted.apply(without_update(given), adapted.frozen, x), model(x))


def one(adapted, stacked, i, x):
    apply, frozen = adapted.apply, adapted.frozen
    return apply(row(stacked, i), frozen, x)


class TestFold:
    @pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
    def test_gives_the_same(self, base):
        _, (apply, params, frozen, _) = dora("llama", base)
        before = {key: value.clone() for key, value in params.items()}
        folded = fold(apply, params, frozen)
        assert not [key for key in folded if key.endswith("magnitude")]
        out = logits(apply(params, frozen, input_ids=tokens()))
        assert_near(logits(apply(folded, frozen, input_ids=tokens())), out)
        assert_same(params, before)

    def test_stacked_and_selected_in_either_order(self):
        _, adapted = dora("llama", "nf4")
        stacked = several(adapted)
        first = fold(adapted.apply, vf.select_adapters(stacked, [1, -1, 3]), adapted.frozen)
        second = vf.select_adapters(fold(adapted.apply, stacked, adapted.frozen), [1, -1, 3])
        outs = [logits(adapted.apply(p, adapted.frozen, input_ids=tokens())) for p in (first, second)]
        assert_near(*outs)

    def test_kept_statistics(self):
        _, (apply, params, frozen, _) = dora("llama", "nf4")
        kept = keep_norm_statistics(apply, frozen)
        assert kept["vera_A"] is frozen["vera_A"]

        def loss(p, f):
            return logits(apply(p, f, input_ids=tokens())).square().mean()

        assert_same(vf.grad(loss)(params, kept), vf.grad(loss)(params, frozen))
        assert_same(fold(apply, params, kept), fold(apply, params, frozen))

    def test_a_given_weight_has_its_own_norms(self):
        adapted = small(use_dora=True)
        apply, frozen, x = adapted.apply, adapted.frozen, torch.ones(2, 7)
        params = randomized(adapted.params) | {"0.weight": torch.randn(5, 7, generator=torch.Generator())}
        model = copy.deepcopy(apply.model)
        model[0].weight = nn.Parameter(params["0.weight"])
        expected = merged(model, adapted._replace(params=randomized(adapted.params)))(x)
        for f in (frozen, keep_norm_statistics(apply, frozen)):
            assert_near(apply(params, f, x), expected)
            assert_near(apply(fold(apply, params, f), f, x), expected)


class TestTraining:
    def test_fit_and_module_and_biases(self):
        adapted = small(use_dora=True, bias="vera_only", modules_to_save=["2"], targets=["0"])
        x, y = torch.randn(8, 7, generator=torch.Generator().manual_seed(2)), torch.ones(8, 3)

        def loss(params, x):
            return (adapted.apply(params, adapted.frozen, x) - y).square().mean()

        run = vf.fit(loss, adapted.params, lambda step: x, steps=5, learning_rate=0.1, progress=False)
        assert run.losses[-1] < run.losses[0]
        assert not torch.equal(run.params["0.magnitude"], adapted.params["0.magnitude"])
        trained = adapted._replace(params=dict(run.params))
        module = vf.to_module(trained)
        names = {name for name, p in module.named_parameters() if p.requires_grad}
        assert names == adapted.params.keys()
        assert_near(module(x), trained.apply(trained.params, trained.frozen, x))
        module(x).sum().backward()
        gradient = vf.grad(lambda p: trained.apply(p, trained.frozen, x).sum())(trained.params)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert_near(parameter.grad, gradient[name])

    def test_biases_of_rows(self):
        adapted = small(use_dora=True, bias="vera_only")
        stacked = {
            k: v + torch.rand(4, 1, generator=torch.Generator().manual_seed(3)) for k, v in several(adapted).items()
        }
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
        for given in (stacked, fold(adapted.apply, stacked, adapted.frozen)):
            out = adapted.apply(vf.select_adapters(given, [3, -1, 0]), adapted.frozen, x)
            assert_near(out[0], one(adapted, stacked, 3, x[:1])[0])
            assert_near(out[1], adapted.apply.model(x[1:2])[0])
            assert_near(out[2], one(adapted, stacked, 0, x[2:])[0])

    def test_dropout_acts_on_the_update(self):
        adapted = small(use_dora=True, vera_dropout=0.5, targets=["0"])
        apply = adapted.apply.with_dropout(torch.Generator().manual_seed(0))
        params, x = adapted.params, torch.ones(4, 7)
        assert torch.equal(apply(params, adapted.frozen, x), adapted.apply(params, adapted.frozen, x))
        changed = randomized(params)
        assert not torch.equal(apply(changed, adapted.frozen, x), adapted.apply(changed, adapted.frozen, x))

    def test_counts_magnitudes(self):
        adapted = small(use_dora=True, targets=["0"])
        assert vf.num_parameters(adapted).trainable == 5 + RANK + 5


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_one_layer_as_a_module(base):
    torch.manual_seed(0)
    layer = quantized(nn.Sequential(nn.Linear(64, 32)), base)[0]
    frozen = vf.init_projections(4, 64, 32)
    cls = {"dense": vf.Linear, "nf4": vf.Linear4bit, "int8": vf.Linear8bitLt}[base]
    adapted = cls(layer, "default", frozen["vera_A"], frozen["vera_B"], 4, use_dora=True)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if base != "dense":
        weight, bias = vf.dequantize(vf.from_bnb(layer)[0], torch.float32), vf.from_bnb(layer)[1]
    given = randomized({name: p.detach() for name, p in adapted.named_parameters() if "base_layer" not in name})
    assert given.keys() == {"lambda_b", "lambda_d", "magnitude"}
    out = functional_call(adapted, given, x)
    assert_near(out, dora_forward(given, frozen, x, weight, bias))
    adapted.load_state_dict(given, strict=False)
    assert_near(x @ (weight + adapted.get_delta_weight("default")).T + bias, out)


bad = Refused()
DORA = vf.adapt(small_model(), vf.VeraConfig(r=4, target_modules=["0", "2"], use_dora=True))
FOLDED = fold(DORA.apply, DORA.params, DORA.frozen)
WRONG = DORA.params | {"0.magnitude": torch.ones(3)}
WITHOUT = {key: value for key, value in DORA.params.items() if key != "2.magnitude"}
STATISTICS = keep_norm_statistics(DORA.apply, FROZEN)


def call(adapted, params, frozen=FROZEN):
    return lambda _: adapted.apply(params, frozen, torch.ones(3, 7))


bad("fold_magnitude", "VeRA", lambda _: fold(ADAPTED.apply, PARAMS, FROZEN), "have no magnitude to fold, got")
bad("fold_magnitude", "folded params", lambda _: fold(DORA.apply, FOLDED, FROZEN), "have no magnitude to fold, got")
bad("fold_magnitude", "another layer", lambda _: fold(DORA.apply, WRONG, FROZEN), r"'0.magnitude' must .*\*rows, 5\)")
for what, call_with, message in (
    (
        "a model",
        lambda: fold(DORA.apply.model, DORA.params, DORA.frozen),
        "an Apply, .*got Sequential",
    ),
    ("a list of adapters", lambda: fold(DORA.apply, [DORA.params], DORA.frozen), "params must be a dict .*got list"),
    ("no projections", lambda: fold(DORA.apply, DORA.params, None), "frozen must be a dict of tensors, got NoneType"),
):
    bad("fold_magnitude", what, lambda _, f=call_with: f(), message)
bad("keep_norm_statistics", "what adapt returns", lambda _: keep_norm_statistics(DORA, FROZEN), "got Adapted")
bad("keep_norm_statistics", "no projections", lambda _: keep_norm_statistics(DORA.apply, {}), "lacks .*vera_A")
bad("keep_norm_statistics", "VeRA", lambda _: keep_norm_statistics(ADAPTED.apply, FROZEN), "have no magnitudes: adapt")
bad("adapt", "neither a magnitude nor a scale", call(DORA, WITHOUT), "lacks 1 .*'2.magnitude'")
bad(
    "adapt",
    "both a magnitude and a scale",
    call(DORA, DORA.params | FOLDED),
    "'0.magnitude' and its folded form '0.output_scale'",
)
bad(
    "adapt",
    "a magnitude of VeRA",
    call(ADAPTED, PARAMS | {"0.magnitude": torch.ones(5)}),
    "unknown keys, first '0.magn",
)
bad("adapt", "statistics of VeRA", call(ADAPTED, PARAMS, STATISTICS), "frozen must have the keys")
bad("VeraConfig", "a norm of VeRA", lambda _: vf.VeraConfig(differentiate_norm=True), "pass use_dora=True")
bad("VeraConfig", "a number as use_dora", lambda _: vf.VeraConfig(use_dora=1), "use_dora must be True or False")
bad("select_adapters", "a sum with magnitudes", lambda _: vf.select_adapters(
    vf.stack_adapters([DORA.params] * 2), [[0, 1]]), r"has the magnitude '0.magnitude'.*fold_magnitude")  # fmt: skip
bad("scale_adapter", "a magnitude", lambda _: vf.scale_adapter(DORA.params, 2.0), "magnitude '0.magnitude', and the")
bad("add_adapters", "magnitudes", lambda _: vf.add_adapters([DORA.params] * 2), "magnitude '0.magnitude', and the")
bad("pool_adapters", "folded and not", lambda _: vf.pool_adapters([DORA, DORA._replace(params=FOLDED)]),
    "fold all adapters, or none")  # fmt: skip


def two_norms():
    config = vf.VeraConfig(r=4, target_modules=["0"], use_dora=True, differentiate_norm=True)
    return [DORA, vf.adapt(DORA.apply.model, config)]


bad("pool_adapters", "norms differentiated and not", lambda _: vf.pool_adapters(two_norms()), "differentiate_norm")


@pytest.mark.parametrize("case", bad.rows)
def test_refuses(case, tmp_path):
    bad.check(case, tmp_path)
