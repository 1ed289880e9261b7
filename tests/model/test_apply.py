"""`Apply`: which params it takes, parameters of the model's own, dropout, threads, copies."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from torch import nn, ones
from torch.func import grad, vmap
from torch.testing import assert_close

import vera_func as vf
from vera_func.model.base_layers import QuantizedLinear
from vera_func.private import tree_leaves

from helpers import (
    TiedWeight,
    language,
    llama,
    loss_of,
    merged,
    normal,
    quantized,
    randomized,
    relative_error,
    tokens,
)
from refused import ADAPTED, FROZEN, PARAMS, STACK, Refused


R = 8
BERT, QV = "bert.encoder.layer", ("query", "value")
BAD = {
    "a missing key": (
        lambda p: {k: v for k, v in p.items() if k != "0.lambda_d"},
        r"lacks 1 of its 4 keys, first '0\.lambda_d'",
    ),
    "no keys": (lambda p: {}, r"lacks 4 of its 4 keys, first '0\.lambda_b'"),
    "an unknown key": (lambda p: p | {"1.lambda_b": torch.ones(5)}, r"1 unknown keys, first '1\.lambda_b'"),
    "a misspelt key": (lambda p: p | {"0.lambda_B": p["0.lambda_b"]}, r"unknown keys, first '0\.lambda_B'"),
    "a buffer": (lambda p: p | {"3.running_mean": torch.ones(3)}, r"unknown keys, first '3\.running_mean'"),
    "PEFT's keys": (lambda p: {f"base_model.model.{k}": v for k, v in p.items()}, "lacks 4 .* 4 unknown keys"),
    "a long vector": (lambda p: p | {"0.lambda_b": torch.ones(7)}, r"'0\.lambda_b' must .* \(\*rows, 5\), got \(7,\)"),
    "a scalar": (lambda p: p | {"2.lambda_d": torch.ones(())}, r"'2\.lambda_d' must .* \(\*rows, 8\), got \(\)"),
    "a transposed weight": (
        lambda p: p | {"0.weight": torch.ones(7, 5)},
        r"'0\.weight' must .* \(5, 7\), got \(7, 5\)",
    ),
    "an untrained weight by row": (lambda p: p | {"0.weight": torch.ones(3, 5, 7)}, r"'0\.weight' must .* \(5, 7\)"),
    "rows of another batch": (lambda p: {k: torch.stack([v, v]) for k, v in p.items()}, r"\(2, 5\) .* shape \(3, 7\)"),
}


class TestKeys:
    def adapted(self):
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3)).eval()
        return vf.adapt(model, vf.VeraConfig(r=R, target_modules=["0", "2"]))

    @pytest.mark.parametrize("case", BAD)
    def test_bad_params_raise(self, case):
        apply, params, frozen, _ = self.adapted()
        change, message = BAD[case]
        with pytest.raises(ValueError, match=message):
            apply(change(params), frozen, normal(3, 7))

    @pytest.mark.parametrize("case", [case for case in BAD if case != "rows of another batch"])
    def test_bad_params_make_no_module(self, case):
        adapted = self.adapted()
        change, message = BAD[case]
        with pytest.raises(ValueError, match=message):
            vf.to_module(adapted._replace(params=change(adapted.params)))

    def test_a_module_holds_one_adapter(self):
        adapted = self.adapted()
        with pytest.raises(ValueError, match=r"'0\.lambda_b' .* is stacked"):
            vf.to_module(adapted._replace(params=vf.stack_adapters([adapted.params] * 3)))

    def test_bad_projections_raise(self):
        apply, params, frozen, _ = self.adapted()
        for change, message in (
            ({"vera_A": None}, "keys 'vera_A' and 'vera_B'"),
            ({"vera_A": torch.ones(4, 7)}, r"implies rank 8, but vera_A \(4, 7\)"),
            ({"vera_A": torch.ones(8, 6)}, r"7 -> 5, but vera_A \(8, 6\)"),
            ({"vera_C": torch.ones(8, 6)}, "vera_C"),
        ):
            wrong = {k: v for k, v in (frozen | change).items() if v is not None}
            with pytest.raises(ValueError, match=message):
                apply(params, wrong, normal(3, 7))

    def test_nothing_runs_without_its_vectors(self):
        """The copy of the tree holds places, not values: what is not bound fails, and computes nothing."""
        apply = self.adapted()[0]
        root = apply.trees.root
        vectors = [p for name, p in root.named_parameters() if name.endswith(("lambda_b", "lambda_d"))]
        assert vectors
        assert all(p.is_meta for p in (*vectors, root.projections.vera_A, root.projections.vera_B))
        with pytest.raises(NotImplementedError, match="meta"):
            root.model(normal(3, 7))

    def test_errors_leave_no_trace(self):
        apply, params, frozen, _ = self.adapted()
        expected = apply(params, frozen, normal(3, 7))
        with pytest.raises(ValueError, match="match"):
            apply({k: torch.stack([v, v]) for k, v in params.items()}, frozen, normal(3, 7))
        with pytest.raises(ValueError, match="floating-point"):
            apply(params, frozen, normal(3, 7).long())
        assert torch.equal(apply(params, frozen, normal(3, 7)), expected)


class TestOwnParameters:
    def test_any_may_be_overridden(self):
        model, adapted = language("llama", "dense")
        for key in (
            "model.norm.weight",
            "model.layers.1.mlp.down_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
        ):
            value = randomized({key: model.get_parameter(key).detach()})[key]
            other = copy.deepcopy(model)
            other.get_parameter(key).data = value
            output = adapted.apply(adapted.params | {key: value}, adapted.frozen, input_ids=tokens()).logits
            assert relative_error(output, merged(other, adapted)(input_ids=tokens()).logits) < 1e-5
            assert relative_error(output, adapted.apply(*adapted[1:3], input_ids=tokens()).logits) > 1e-3

    @pytest.mark.parametrize("base", ["dense", "nf4"])
    def test_a_tied_embedding(self, base):
        model = quantized(llama(tie_word_embeddings=True), base).train()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q_proj"]))
        value = randomized({"": model.lm_head.weight.detach()})[""]
        other = copy.deepcopy(model)
        other.model.embed_tokens.weight.data = value
        assert other.lm_head.weight is other.model.embed_tokens.weight
        output = adapted.apply(
            adapted.params | {"model.embed_tokens.weight": value}, adapted.frozen, input_ids=tokens()
        ).logits
        assert_close(output, other(input_ids=tokens()).logits, rtol=1e-4, atol=1e-4)
        module = vf.to_module(adapted._replace(params=adapted.params | {"model.embed_tokens.weight": value}))
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert_close(module(input_ids=tokens()).logits, output)

    @pytest.mark.parametrize(
        ("name", "base", "fields", "own"),
        [
            ("bert", "dense", {"task_type": "SEQ_CLS"}, {"classifier.weight", "classifier.bias"}),
            ("bert", "nf4", {"bias": "vera_only"}, {f"{BERT}.{i}.attention.self.{n}.bias" for i in "01" for n in QV}),
            ("bert", "int8", {"bias": "all"}, None),
            ("gpt2", "dense", {"bias": "all"}, None),
            ("llama", "nested", {"modules_to_save": ["lm_head", "norm"]}, {"lm_head.weight", "model.norm.weight"}),
        ],
    )  # fmt: skip
    def test_trained_ones(self, name, base, fields, own):
        model, adapted = language(name, base, **fields)
        if own is None:
            own = {key for key, _ in model.named_parameters() if key.endswith("bias")}
        assert {key for key in adapted.params if not key.endswith(("lambda_b", "lambda_d"))} == own
        gradient = grad(loss_of(adapted, input_ids=tokens()))(adapted.params)
        oracle = merged(model, adapted).requires_grad_(True)
        for key in own:
            oracle.get_parameter(key).data = adapted.params[key].clone()
        output = oracle(input_ids=tokens()).logits
        assert relative_error(adapted.apply(*adapted[1:3], input_ids=tokens()).logits, output) < 1e-5
        output.square().sum().backward()
        module = vf.to_module(adapted)
        module(input_ids=tokens()).logits.square().sum().backward()
        trained = {n: p for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        found = [key for key in own if oracle.get_parameter(key).grad is not None]
        assert found
        # Of one scale: the bias of a key projection moves no logit, so that its gradient is rounding.
        scale = max(gradient[key].abs().max() for key in found)
        for key in found:
            assert (gradient[key] - oracle.get_parameter(key).grad).abs().max() < 1e-4 * scale, key
        assert sum(p.requires_grad for p in module.parameters()) == len(adapted.params)
        assert len(trained) == len(adapted.params)
        missing = {k: v for k, v in adapted.params.items() if k not in own}
        with pytest.raises(ValueError, match="lacks"):
            adapted.apply(missing, adapted.frozen, input_ids=tokens())

    @pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
    def test_training_one_of_two_tied_modules_unties_them(self, saved, tmp_path):
        model = llama(tie_word_embeddings=True)
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q_proj"], modules_to_save=saved))
        names = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
        own = {key for key in adapted.params if "lambda" not in key}
        assert own == {names[name] for name in saved}
        params = {key: randomized({"": value}, seed)[""] for seed, (key, value) in enumerate(adapted.params.items())}
        adapted = adapted._replace(params=params)
        other = copy.deepcopy(model)
        for key in own:
            other.get_submodule(key.removesuffix(".weight")).weight = nn.Parameter(params[key])
        output = adapted.apply(params, adapted.frozen, input_ids=tokens()).logits
        assert relative_error(output, merged(other, adapted)(input_ids=tokens()).logits) < 1e-5
        assert_close(vf.to_module(adapted)(input_ids=tokens()).logits, output)
        # And in PEFT.
        vf.save_adapter(tmp_path, params, adapted.frozen, adapted.config)
        with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
            theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
        assert relative_error(theirs(input_ids=tokens()).logits, output) < 1e-5
        pool = vf.pool_adapters([adapted, vf.adapt(model, vf.VeraConfig(r=4, target_modules=["v_proj"]))])
        one = {key: leaf[0] for key, leaf in pool.params.items()}
        assert relative_error(pool.apply(one, pool.frozen, input_ids=tokens()).logits, output) < 1e-5

    def test_a_tied_bias_stays_tied(self):
        model = TiedWeight()
        model.other.bias = model.layer.bias
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["layer"], bias="all"))
        other = copy.deepcopy(model)
        other.layer.bias.data = normal(7)
        output = adapted.apply(adapted.params | {"layer.bias": normal(7)}, adapted.frozen, normal(3, 7))
        assert_close(output, other(normal(3, 7)))

    def test_the_start_is_a_copy(self):
        model, _ = language("bert", "dense")
        params = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["query"], modules_to_save=["classifier"])).params
        assert torch.equal(params["classifier.weight"], model.classifier.weight)
        assert params["classifier.weight"].data_ptr() != model.classifier.weight.data_ptr()
        assert not any(value.requires_grad for value in params.values())


class TestDropout:
    def adapted(self, rate=0.5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5))
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["0"], vera_dropout=rate))
        return adapted._replace(params=randomized(adapted.params))

    def run(self, adapted, seed, x):
        dropped = adapted.apply.with_dropout(torch.Generator().manual_seed(seed))
        return dropped(adapted.params, adapted.frozen, x)

    def test_needs_a_generator_and_follows_it(self):
        adapted, x = self.adapted(), normal(3, 7)
        exact = adapted.apply(adapted.params, adapted.frozen, x)
        assert_close(exact, merged(adapted.apply.model, adapted)(x))
        first = self.run(adapted, 1, x)
        assert torch.equal(first, self.run(adapted, 1, x))
        assert not torch.equal(first, self.run(adapted, 2, x))
        assert not torch.equal(first, exact)
        assert torch.equal(adapted.apply(adapted.params, adapted.frozen, x), exact)
        assert torch.equal(self.run(self.adapted(0.0), 1, x), exact)

    def test_a_generator_goes_on(self):
        adapted, x = self.adapted(), normal(3, 7)
        dropped = adapted.apply.with_dropout(torch.Generator().manual_seed(0))
        assert not torch.equal(dropped(*adapted[1:3], x), dropped(*adapted[1:3], x))

    def test_keeps_the_mean_and_the_base(self):
        adapted, x = self.adapted(), normal(1, 7).expand(20_000, 7)
        dropped = self.run(adapted, 0, x)
        exact = adapted.apply(*adapted[1:3], x[:1])[0]
        deviation = dropped.std(0)
        assert ((dropped.mean(0) - exact).abs() < 5 * deviation / 20_000**0.5).all()
        assert (deviation > 1e-3).all()
        # With everything dropped, or λ_b = 0, only the base is left, untouched.
        none = adapted._replace(params=vf.adapt(adapted.apply.model, adapted.config).params)
        assert torch.equal(self.run(none, 0, x), adapted.apply.model(x))

    def test_vmap(self):
        adapted, x = self.adapted(), normal(3, 7)
        stacked = vf.stack_adapters([adapted.params] * 4)
        dropped = adapted.apply.with_dropout(torch.Generator().manual_seed(0))
        f = lambda params: dropped(params, adapted.frozen, x)
        outputs = vmap(f, randomness="different")(stacked)
        assert len(outputs.unique(dim=0)) == 4
        same = vmap(f, randomness="same")(stacked)
        assert len(same.unique(dim=0)) == 1
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(f)(stacked)
        gradients = vmap(grad(lambda p: f(p).sum()), randomness="different")(stacked)
        assert len(gradients["0.lambda_d"].unique(dim=0)) == 4

    def test_of_a_language_model(self):
        _, adapted = language("llama", "nf4", vera_dropout=0.3)
        exact, first, again, other = (
            (adapted.apply if seed is None else adapted.apply.with_dropout(torch.Generator().manual_seed(seed)))(
                *adapted[1:3], input_ids=tokens()
            ).logits
            for seed in (None, 1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first, exact)


@pytest.mark.parametrize(("name", "base"), [("llama", "nested"), ("gpt2", "dense")])
def test_threads(name, base):
    _, adapted = language(name, base)
    adapters = [randomized(adapted.params, seed) for seed in range(8)]
    forward = lambda params: adapted.apply(params, adapted.frozen, input_ids=tokens()).logits
    work = lambda params: (forward(params).detach(), grad(lambda p: forward(p).square().sum())(params))
    expected = [work(params) for params in adapters]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(work, adapters))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert relative_error(actual[0][0], actual[1][0]) > 0.01


def test_dropout_in_threads():
    """Threads that share one `apply` with dropout each draw; the others, without it, do not."""
    _, adapted = language("llama", "dense", vera_dropout=0.5)
    exact = adapted.apply(*adapted[1:3], input_ids=tokens()).logits
    dropped = adapted.apply.with_dropout(torch.Generator().manual_seed(0))
    applies = [dropped, adapted.apply] * 8
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda apply: apply(*adapted[1:3], input_ids=tokens()).logits, applies))
    for apply, output in zip(applies, outputs, strict=True):
        assert torch.equal(output, exact) == (apply is adapted.apply)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("base", ["dense", "nested", "int8"])
def test_copies_and_pickles(base, tied):
    model = quantized(llama(tie_word_embeddings=tied), base).train()
    adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q_proj", "v_proj"]))
    adapted = adapted._replace(params=randomized(adapted.params))
    call = lambda apply, params: apply(params, adapted.frozen, input_ids=tokens()).logits
    other = adapted.params | {"model.embed_tokens.weight": normal(67, 64)}
    expected = [call(adapted.apply, params) for params in (adapted.params, other)]
    unpickled = pickle.loads(pickle.dumps(adapted.apply))
    for copied in (copy.deepcopy(adapted.apply), unpickled, pickle.loads(pickle.dumps(unpickled))):
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(call, copied, adapted.params).result(), expected[0])
        assert all(map(torch.equal, [call(copied, params) for params in (adapted.params, other)], expected))
        # One memory for the copied model and its function, and none with the original.
        own, theirs = ({p.data_ptr() for p in a.model.parameters()} for a in (copied, adapted.apply))
        assert own <= {t.data_ptr() for t in tensors_of(copied.trees.root)}
        assert not own & theirs
        assert not any(p.requires_grad for n, p in copied.trees.root.named_parameters() if "lambda" not in n)
    assert torch.equal(call(adapted.apply, adapted.params), expected[0])


def tensors_of(root):
    layers = [module for module in root.modules() if isinstance(module, QuantizedLinear)]
    return [*root.parameters(), *(leaf for layer in layers for leaf in tree_leaves(layer.quantized))]


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_a_pickle_holds_the_model_once(base):
    model = quantized(llama(hidden_size=128, intermediate_size=512), base)
    adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q_proj", "v_proj"]))
    adapted.apply(*adapted[1:3], input_ids=tokens())  # trees that wait for a call are not stored either
    alone = len(pickle.dumps(model))
    assert len(pickle.dumps(adapted)) < 1.15 * alone + 60_000


def test_copied_apply_with_dropout():
    _, adapted = language("llama", "dense", vera_dropout=0.5)
    dropped = adapted.apply.with_dropout(torch.Generator().manual_seed(0))
    copied = copy.deepcopy(dropped)
    outputs = [f(*adapted[1:3], input_ids=tokens()).logits for f in (dropped, copied)]
    assert torch.equal(*outputs)


def test_repr():
    assert repr(language("llama", "dense")[1].apply) == "Apply(LlamaForCausalLM, 4 adapted layers)"


# What is refused

bad = Refused()


def call(params=None, frozen=None, x=None):
    x = ones(2, 7) if x is None else x
    return ADAPTED.apply(PARAMS | (params or {}), FROZEN if frozen is None else frozen, x)


bad("Adapted", "None for a vector", lambda _: call({"0.lambda_b": None}), "'0.lambda_b' must be a tensor, got NoneType")
bad("Adapted", "a number", lambda _: call({"0.lambda_b": 1.0}), "'0.lambda_b' must be a tensor, got float")
bad("Adapted", "integers", lambda _: call({"0.lambda_b": ones(5).long()}), "lambda_b must be .*floating.*torch.int64")
bad("Adapted", "another layer's key", lambda _: call({"1.lambda_b": ones(5)}), "unknown keys, first '1.lambda_b'")
bad("Adapted", "a transposed pair", lambda _: call(frozen={k: v.T for k, v in FROZEN.items()}), "implies rank 4, but")
bad(
    "Adapted",
    "flat projections",
    lambda _: call(frozen={k: v.flatten() for k, v in FROZEN.items()}),
    "must have shape .r, >=",
)
bad("Adapted", "another rank", lambda _: call(frozen=vf.init_projections(5, 7, 5)), r"vera_A \(5, 7\)")
bad("Adapted", "more than the pair", lambda _: call(frozen=FROZEN | {"C": ones(2)}), "keys 'vera_A' and 'vera_B', got")
bad("Adapted", "a batch of another size", lambda _: call(STACK), r"\(3, 5\) has leading axes \(3,\).*\(2, 7\)")
bad("Adapted", "x of integers", lambda _: call(x=ones(2, 7).long()), "x must be a floating-point tensor")
bad("Adapted", "dropout without randomness", lambda _: ADAPTED.apply.with_dropout(None), "torch.Generator .*NoneType")
bad("Adapted", "dropout from a seed", lambda _: ADAPTED.apply.with_dropout(0), "needs a torch.Generator .*int")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
