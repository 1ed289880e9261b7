"""`adapt`: any model as a pure function of params; equal to the model with merged weights, for every transform."""

import copy
import dataclasses

import peft
import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jvp, vjp, vmap
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import vera_func as vf
from vera_func.model.convert import quantize_model

from helpers import (
    LANGUAGE,
    MODELS,
    TARGETS,
    TiedWeight,
    gpt2,
    language,
    llama,
    loss_of,
    merged,
    normal,
    quantized,
    randomized,
    relative_error,
    snapshot,
    tokens,
)
from refused import CONFIGURATION, PARAMS, Refused, small_model


R = 8
BERT, QV = "bert.encoder.layer", ("query", "value")


class Nested(nn.Module):
    """Layers at several depths, one of them in a list."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(7, 5), nn.ReLU()), nn.Linear(5, 3, bias=False)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Twice(nn.Module):
    """Calls one layer two times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


class SharedModule(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.second = self.first
        self.head = nn.Linear(7, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


class Itself(nn.Module):
    """Contains itself, which ends nn.Module's walks unless they are asked for all names; two weights are tied."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.tied = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.tied.weight = self.second.weight
        self.inner = nn.Sequential(nn.Tanh())
        self.inner.whole = self

    def forward(self, x):
        whole = self.inner.whole
        return whole.tied(whole.second(self.inner[0](whole.first(x))))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(7, 5), nn.BatchNorm1d(5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(1, 2)

    def forward(self, x):
        return self.norm(self.layer(x))


# A model, what to adapt of it, and the layers that it then has adapted.
PLAIN = {
    "a bare layer": (lambda: nn.Linear(7, 5), ".*", [""]),
    "nested": (Nested, ["0.0", "layers.1"], ["layers.0.0", "layers.1"]),
    "a layer called twice": (Twice, ["layer"], ["layer"]),
    "a shared layer": (SharedModule, ["first"], ["first"]),
    "a tied weight": (TiedWeight, ["layer"], ["layer"]),
    "BatchNorm": (Normalized, ["layer"], ["layer"]),
    "Conv1D": (lambda: nn.Sequential(Conv1D(5, 7), nn.ReLU(), nn.Linear(5, 2)), ["0"], ["0"]),
}


def plain(case):
    torch.manual_seed(0)
    build, targets, _ = PLAIN[case]
    model = build().eval()
    adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=targets))
    return model, adapted._replace(params=randomized(adapted.params, scale=0.5)), normal(3, 7)


def tree_of(model):
    """What a user could notice of a model."""
    parameters = {name: (p.requires_grad, p.grad, id(p)) for name, p in model.named_parameters()}
    modules = {name: (type(m), m.training, id(m)) for name, m in model.named_modules()}
    return repr(model), parameters, modules


class TestPlainModules:
    @pytest.mark.parametrize("case", PLAIN)
    def test_equals_merged(self, case):
        model, adapted, x = plain(case)
        _, _, targets = PLAIN[case]
        assert list(adapted.apply.targets) == targets
        assert {key.rpartition(".")[0] for key in adapted.params} == set(targets)
        output = adapted.apply(adapted.params, adapted.frozen, x)
        assert_close(output, merged(model, adapted)(x), rtol=1e-5, atol=1e-5)
        assert relative_error(output, model(x)) > 0.01

    @pytest.mark.parametrize("case", PLAIN)
    def test_starts_at_the_base(self, case):
        model, _, x = plain(case)
        apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=R, target_modules=PLAIN[case][1]))
        assert torch.equal(apply(params, frozen, x), model(x))

    @pytest.mark.parametrize("case", PLAIN)
    def test_gradients(self, case):
        model, adapted, x = plain(case)
        loss = loss_of(adapted, x)
        gradient = grad(loss)(adapted.params)
        leaves = {key: value.clone().requires_grad_() for key, value in adapted.params.items()}
        loss(leaves).backward()
        module = vf.to_module(adapted)
        module(x).square().sum().backward()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert trained.keys() == gradient.keys()
        step = 1e-2
        for key, value in gradient.items():
            assert_close(leaves[key].grad, value)
            assert_close(trained[key].grad, value)
            # The oracle's own slope, in the direction of the gradient.
            ends = [
                merged(model, adapted._replace(params=adapted.params | {key: adapted.params[key] + s * value}))
                .double()(x.double())
                .square()
                .sum()
                for s in (step / value.norm(), -step / value.norm())
            ]
            assert_close((ends[0] - ends[1]).float() / (2 * step), value.norm(), rtol=1e-2, atol=1e-3)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("case", PLAIN)
    def test_transforms(self, case):
        _, adapted, x = plain(case)
        loss, params = loss_of(adapted, x), adapted.params
        gradient, direction = grad(loss)(params), randomized(params, seed=3, scale=1.0)
        slope = sum((gradient[key] * direction[key]).sum() for key in params)
        assert_close(jvp(loss, (params,), (direction,))[1], slope, rtol=1e-4, atol=1e-3)
        # Hessian times direction, once as a whole matrix, once forward over reverse.
        key = next(key for key in params if key.endswith("lambda_d"))
        inner = lambda vector: loss(params | {key: vector})
        product = hessian(inner)(params[key]) @ direction[key]
        assert_close(jvp(grad(inner), (params[key],), (direction[key],))[1], product, rtol=1e-3, atol=1e-3)
        stacked = vf.stack_adapters([randomized(params, seed) for seed in range(3)])
        per_adapter = vmap(grad(loss))(stacked)
        for i, one in enumerate(vf.unstack_adapters(stacked)):
            for name, value in grad(loss)(one).items():
                assert_close(per_adapter[name][i], value, rtol=1e-4, atol=1e-4)

    def test_batch_statistics_are_not_the_users(self):
        model = Normalized().train()
        apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["layer"]))
        before = snapshot(model)
        first = apply(params, frozen, normal(3, 7))
        assert torch.equal(apply(params, frozen, normal(3, 7)), first)
        assert_close(snapshot(model), before, rtol=0, atol=0)
        assert_close(first, copy.deepcopy(model)(normal(3, 7)))

    def test_all_names_of_a_shared_layer_are_one(self):
        _, adapted, x = plain("a shared layer")
        with pytest.raises(ValueError, match="unknown"):
            adapted.apply(adapted.params | {"second.lambda_b": torch.zeros(7)}, adapted.frozen, x)

    @pytest.mark.parametrize("bias", ["none", "all"])
    def test_a_module_that_contains_itself(self, bias):
        model = Itself()
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["first", "tied"], bias=bias))
        adapted = adapted._replace(params=randomized(adapted.params, scale=0.5))
        assert list(adapted.apply.targets) == ["first", "tied"]
        oracle, x = copy.deepcopy(model), normal(3, 7)
        for key, value in adapted.params.items():
            if key.endswith("bias"):
                oracle.get_parameter(key).data = value
        expected = merged(oracle, adapted)(x)
        assert_close(adapted.apply(*adapted[1:3], x), expected, rtol=1e-5, atol=1e-5)
        assert_close(vf.to_module(adapted)(x), expected, rtol=1e-5, atol=1e-5)
        pool = vf.pool_adapters([adapted, adapted])
        rows = vf.select_adapters(pool.params, [0, 1, 0])
        assert_close(pool.apply(rows, pool.frozen, x), expected, rtol=1e-5, atol=1e-5)

    def test_a_tied_weight_is_overridden_everywhere(self):
        model, adapted, x = plain("a tied weight")
        weight = normal(7, 7, seed=5)
        other = copy.deepcopy(model)
        other.layer.weight.data = weight  # a deep copy keeps the tie
        assert other.other.weight is other.layer.weight
        output = adapted.apply(adapted.params | {"layer.weight": weight}, adapted.frozen, x)
        assert_close(output, merged(other, adapted)(x), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"unknown keys, first 'other.weight'"):
            adapted.apply(adapted.params | {"other.weight": weight}, adapted.frozen, x)


class TestLanguageModels:
    @pytest.mark.parametrize(("name", "base"), LANGUAGE)
    def test_equals_merged(self, name, base):
        model, adapted = language(name, base)
        expected = merged(model, adapted)(input_ids=tokens()).logits
        output = adapted.apply(adapted.params, adapted.frozen, input_ids=tokens()).logits
        assert relative_error(output, expected) < 1e-5
        without = adapted.apply(adapted.params, {k: 0 * v for k, v in adapted.frozen.items()}, input_ids=tokens())
        assert relative_error(without.logits, expected) > 1e-3

    @pytest.mark.parametrize(("name", "base"), LANGUAGE)
    def test_leaves_the_model_alone_and_is_pure(self, name, base):
        model, _ = language(name, base)
        inputs = {"input_ids": tokens(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
        before, noticed = snapshot(model), tree_of(model)
        weights = {name: (p.data_ptr(), dict(vars(p))) for name, p in model.named_parameters()}
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=TARGETS[name], bias="vera_only"))
        adapted = adapted._replace(params=randomized(adapted.params))
        values = snapshot(adapted.params, adapted.frozen, inputs)
        first = adapted.apply(adapted.params, adapted.frozen, **inputs).logits
        grad(loss_of(adapted, **inputs))(adapted.params)
        vf.to_module(adapted)(**inputs).logits.sum().backward()
        again = adapted.apply(adapted.params, adapted.frozen, **inputs).logits
        assert torch.equal(first, again)
        assert_close(snapshot(adapted.params, adapted.frozen, inputs), values, rtol=0, atol=0)
        assert tree_of(model) == noticed
        for key, (address, attributes) in weights.items():
            assert model.get_parameter(key).data_ptr() == address
            assert vars(model.get_parameter(key)).keys() == attributes.keys()
        for key, value in model.state_dict().items():
            # As bytes, for a float storage of packed values may spell NaN.
            assert torch.equal(value.reshape(-1).view(torch.uint8), before[0][key].reshape(-1).view(torch.uint8)), key

    @pytest.mark.parametrize(("name", "base"), LANGUAGE)
    def test_gradients(self, name, base):
        model, adapted = language(name, base)
        loss = loss_of(adapted, input_ids=tokens())
        gradient = grad(loss)(adapted.params)
        leaves = {key: value.clone().requires_grad_() for key, value in adapted.params.items()}
        loss(leaves).backward()
        module = vf.to_module(adapted)
        assert type(module) is type(model)
        module(input_ids=tokens()).logits.square().sum().backward()
        # The oracle's slopes of the merged weights: dL/dλ_b = rowsum(dL/dW ∘ B diag(λ_d) A), and so on.
        oracle = merged(model, adapted)
        oracle(input_ids=tokens()).logits.square().sum().backward()
        for key, value in gradient.items():
            layer, _, leaf = key.rpartition(".")
            weight = oracle.get_submodule(layer).weight.grad
            weight = weight.T if isinstance(oracle.get_submodule(layer), Conv1D) else weight
            vectors = {k: adapted.params[f"{layer}.{k}"] for k in ("lambda_b", "lambda_d")}
            _, pullback = vjp(lambda v, n=weight.shape[1]: vf.delta_weight(v, adapted.frozen, n), vectors)
            assert relative_error(value, pullback(weight)[0][leaf]) < 1e-4, key
            assert relative_error(leaves[key].grad, value) < 1e-5, key
            assert relative_error(module.get_parameter(key).grad, value) < 1e-5, key
        assert all(p.grad is None for p in model.parameters())
        assert {n for n, p in module.named_parameters() if p.grad is not None} == adapted.params.keys()

    @pytest.mark.parametrize("base", ["dense", "nested", "int8"])
    def test_forward_derivative(self, base):
        # torch's fused attention has none on a CPU.
        model = quantized(llama(attention="eager"), base).train()
        adapted = vf.adapt(model, vf.VeraConfig(r=R, target_modules=TARGETS["llama"]))
        params = randomized(adapted.params)
        loss, direction = loss_of(adapted, input_ids=tokens()), randomized(params, seed=3)
        gradient = grad(loss)(params)
        slope = sum((gradient[key] * direction[key]).sum() for key in gradient)
        assert_close(jvp(loss, (params,), (direction,))[1], slope, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("base", ["dense", "nested", "int8"])
    def test_compiles(self, base):
        model = quantized(llama(), base).train()
        model.model.layers = model.model.layers[:1]  # tracing takes seconds a layer
        apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["q_proj", "down_proj"]))
        params, ids = randomized(params), tokens()
        f = lambda params: apply(params, frozen, input_ids=ids).logits
        if base == "nested":
            f = grad(lambda params: apply(params, frozen, input_ids=ids).logits.square().sum())
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(params)
        assert_close(compiled, f(params), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", MODELS)
    def test_attention_implementations_agree(self, name):
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[0, :3] = 0
        outputs = []
        for attention in ("sdpa", "eager"):
            adapted = vf.adapt(MODELS[name](attention=attention), vf.VeraConfig(r=R, target_modules=TARGETS[name]))
            params = randomized(adapted.params)
            outputs.append(adapted.apply(params, adapted.frozen, input_ids=tokens(), attention_mask=mask).logits)
        rows = mask.bool() if name != "bert" else slice(None)
        assert_close(outputs[0][rows], outputs[1][rows], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("base", ["dense", "nested"])
    def test_generates(self, base):
        model, adapted = language("llama", base)
        oracle = merged(model, adapted).eval()
        options = {"max_new_tokens": 8, "do_sample": False}
        actual = adapted.apply.generate(adapted.params, adapted.frozen, tokens(), **options)
        assert torch.equal(actual, oracle.generate(tokens(), **options))
        base_tokens = adapted.apply.generate(
            vf.adapt(model, adapted.config).params, adapted.frozen, tokens(), **options
        )
        assert not torch.equal(actual, base_tokens)

    def test_calls_any_method(self):
        model, adapted = language("llama", "dense")
        embeddings = adapted.apply.method("get_input_embeddings", adapted.params, adapted.frozen)
        assert torch.equal(embeddings.weight, model.get_input_embeddings().weight)

    def test_int8_activations(self):
        model, _ = language("llama", "int8")
        config = vf.VeraConfig(r=R, target_modules=TARGETS["llama"])
        apply, params, frozen, _ = vf.adapt(model, config, int8_activations=True)
        actual = apply(params, frozen, input_ids=tokens()).logits
        assert_close(actual, copy.deepcopy(model).eval()(input_ids=tokens()).logits)
        assert relative_error(actual, model(input_ids=tokens()).logits) > 1e-3
        # Over other bases it changes nothing.
        for base in ("dense", "nf4"):
            model, adapted = language("llama", base)
            other = vf.adapt(model, config, int8_activations=True).apply
            assert torch.equal(
                other(adapted.params, adapted.frozen, input_ids=tokens()).logits,
                adapted.apply(adapted.params, adapted.frozen, input_ids=tokens()).logits,
            )


class TestAttentionOfTorch:
    def test_refuses_what_is_never_called(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        with pytest.raises(ValueError, match=r"'self_attn\.out_proj' is never called"):
            vf.adapt(model, vf.VeraConfig(r=4, target_modules=["out_proj", "linear1"]))

    def test_is_left_out_of_all_linear_layers(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules="all-linear"))
        assert adapted.apply.targets == ("linear1", "linear2")

    @pytest.mark.parametrize("stacked", [False, True])
    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_the_fast_path_does_not_skip_the_adapter(self, activation, stacked):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
        if stacked:
            model = nn.TransformerEncoder(model, 2, enable_nested_tensor=False)
        model = model.eval()
        adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["linear1", "linear2"]))
        params, x = randomized(adapted.params), normal(2, 3, 8)
        oracle = merged(model, adapted._replace(params=params))
        before = snapshot(model)
        with torch.no_grad():  # where torch takes that path
            output = adapted.apply(params, adapted.frozen, x)
            assert relative_error(output, model(x)) > 0.01
            assert_close(output, oracle(x), rtol=1e-4, atol=1e-4)
            assert_close(vf.to_module(adapted._replace(params=params))(x), oracle(x), rtol=1e-4, atol=1e-4)
        assert_close(snapshot(model), before, rtol=0, atol=0)
        layer = model.layers[0] if stacked else model
        assert layer.activation_relu_or_gelu in (1, 2)  # the user's keeps its fast path


class TestDrawnVectors:
    def test_need_a_generator(self):
        config = vf.VeraConfig(r=R, target_modules=["c_attn"], init_weights=False)
        with pytest.raises(ValueError, match="generator"):
            vf.adapt(gpt2(), config)
        first, again, other = (
            vf.adapt(gpt2(), config, generator=torch.Generator().manual_seed(seed)).params for seed in (0, 0, 1)
        )
        assert_close(first, again, rtol=0, atol=0)
        key = "transformer.h.0.attn.c_attn.lambda_d"
        assert not torch.equal(first[key], other[key])
        assert not torch.equal(first[key], first[key.replace("h.0", "h.1")])
        assert torch.equal(first[key.replace("_d", "_b")], torch.ones(192))


def test_no_config_matches_nothing():
    with pytest.raises(ValueError, match="no module matches"):
        vf.adapt(llama(), vf.VeraConfig(r=R, target_modules="nothing"))
    with pytest.raises(ValueError, match=r"no module name ends in these.*'q_proj'"):
        vf.adapt(llama(), vf.VeraConfig(r=R, target_modules=["q_proj", "query"]))
    with pytest.raises(ValueError, match="'norm' is a BatchNorm1d"):
        vf.adapt(Normalized(), vf.VeraConfig(r=R, target_modules=["norm"]))


def on_queries(**fields):
    return vf.VeraConfig(r=R, target_modules=["q_proj"], **fields)


class TestOrigin:
    """The configuration says what it is an adapter of, as PEFT's does."""

    def test_the_model_s_own_name(self, tmp_path):
        llama().save_pretrained(tmp_path)
        model = type(llama()).from_pretrained(tmp_path)
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(r=R, target_modules=["q_proj"])).peft_config[
            "default"
        ]
        config = vf.adapt(model, on_queries()).config
        assert config.base_model_name_or_path == theirs.base_model_name_or_path == str(tmp_path)
        assert config.auto_mapping == {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        }
        # An adapter of the same weights in another format has the same base; the format is not part of the name.
        quantized = vf.adapt(quantize_model(model, "nf4"), on_queries()).config
        assert quantized.base_model_name_or_path == str(tmp_path)
        assert vf.adapt(model, on_queries(task_type="CAUSAL_LM")).config.auto_mapping is None
        # Merged weights are not those of that name.
        adapted = vf.adapt(model, on_queries())
        merged = vf.merge(model, adapted.params, adapted.frozen)
        assert vf.adapt(merged, on_queries()).config.base_model_name_or_path is None
        assert model.name_or_path == model.config.name_or_path == str(tmp_path)

    def test_a_name_that_is_given(self, tmp_path):
        llama().save_pretrained(tmp_path)
        model = type(llama()).from_pretrained(tmp_path)
        config = vf.adapt(model, on_queries(base_model_name_or_path="mine", revision="v1")).config
        assert (config.base_model_name_or_path, config.revision) == ("mine", "v1")

    def test_no_name(self):
        # transformers' models that were made here have the name "".
        for model in (llama(), nn.ModuleDict({"q_proj": nn.Linear(2, 2)})):
            config = vf.adapt(model, on_queries()).config
            assert config.base_model_name_or_path is None
            assert config.auto_mapping is None

    def test_a_pool_of_one_base_has_its_name(self, tmp_path):
        llama().save_pretrained(tmp_path)
        model = type(llama()).from_pretrained(tmp_path)
        adapters = [vf.adapt(model, vf.VeraConfig(r=r, target_modules=["q_proj"])) for r in (2, 3)]
        assert vf.pool_adapters(adapters).config.base_model_name_or_path == str(tmp_path)


# What is refused

bad = Refused()

bad("adapt", "no model", lambda _: vf.adapt(None, CONFIGURATION), "model must be an nn.Module, got NoneType")
bad("adapt", "a dict", lambda _: vf.adapt(small_model(), {"r": 4}), "config must be vera_func's VeraConfig, got dict")
bad(
    "adapt",
    "integers",
    lambda _: vf.adapt(small_model(), CONFIGURATION, dtype=torch.int32),
    "dtype must be a floating-point",
)
bad("adapt", "no layers", lambda _: vf.adapt(nn.Sequential(), CONFIGURATION), "no module matches")
bad(
    "adapt", "a seed for a generator",
    lambda _: vf.adapt(small_model(), dataclasses.replace(CONFIGURATION, init_weights=False), generator=0),
    "generator=torch.Generator",
)  # fmt: skip
bad("num_parameters", "params", lambda _: vf.num_parameters(PARAMS), "must be an Adapted, .*got dict")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
