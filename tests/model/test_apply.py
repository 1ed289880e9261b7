"""Whole models: `apply` against a model with the update merged into its weights, and what it leaves alone."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jvp, vjp, vmap
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import vera_func as vf

from helpers import FORMATS, MODELS, TARGETS, gpt2, llama, quantized, randomized, relative_error, snapshot


R = 8
BERT, QV = "bert.encoder.layer", ("query", "value")
LANGUAGE = [
    *(("llama", base) for base in ("dense", *FORMATS)),
    ("gpt2", "dense"),
    ("bert", "dense"),
    ("bert", "nested"),
]


def tokens(rows=3, length=7, seed=0):
    return torch.randint(3, 67, (rows, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


class TiedWeight(nn.Module):
    """Two layers with one weight, of which the first is adapted."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(7, 7), nn.Linear(7, 7)
        self.other.weight = self.layer.weight

    def forward(self, x):
        return self.other(self.layer(x).tanh())


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


def language(name, base, **fields):
    # In training mode (without dropout), as bitsandbytes rewrites 4-bit weights in the other.
    model = quantized(MODELS[name](), base).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    adapted = vf.adapt(model, vf.VeraConfig(r=R, **({"target_modules": TARGETS[name]} | fields)))
    return model, adapted._replace(params=randomized(adapted.params))


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def loss_of(adapted, *args, **kwargs):
    return lambda params: logits(adapted.apply(params, adapted.frozen, *args, **kwargs)).square().sum()


def merged(model, adapted):
    """The oracle: a dense copy of the model whose weights have the update added."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        dense = module
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            q, bias = vf.from_bnb(module)
            dense = nn.Linear(q.shape[1], q.shape[0], bias=bias is not None)
            dense.weight.data = vf.dequantize(q, torch.float32)
            if bias is not None:
                dense.bias.data = bias.clone()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense)
        prefix = f"{name}." if name else ""
        if f"{prefix}lambda_b" in adapted.params:
            vectors = {key: adapted.params[prefix + key] for key in ("lambda_b", "lambda_d")}
            transposed = isinstance(dense, Conv1D)
            in_features = dense.weight.shape[0 if transposed else 1]
            delta = vf.delta_weight(vectors, adapted.frozen, in_features)
            # A new parameter: one that was tied stays as it was for the other layer.
            dense.weight = nn.Parameter(dense.weight.detach() + (delta.T if transposed else delta))
    return model


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
    "a long vector": (lambda p: p | {"0.lambda_b": torch.ones(7)}, r"'0\.lambda_b' must be \(\*rows, 5\), got \(7,\)"),
    "a scalar": (lambda p: p | {"2.lambda_d": torch.ones(())}, r"'2\.lambda_d' must be \(\*rows, 8\), got \(\)"),
    "a transposed weight": (
        lambda p: p | {"0.weight": torch.ones(7, 5)},
        r"'0\.weight' must be \(5, 7\), got \(7, 5\)",
    ),
    "an untrained weight by row": (lambda p: p | {"0.weight": torch.ones(3, 5, 7)}, r"'0\.weight' must be \(5, 7\)"),
    "rows of another batch": (lambda p: {k: torch.stack([v, v]) for k, v in p.items()}, r"\(2, 5\) .* x \(3, 7\)"),
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
        vectors = [p for name, p in apply.root.named_parameters() if name.endswith(("lambda_b", "lambda_d"))]
        assert vectors
        assert all(p.is_meta for p in (*vectors, *apply.root.projections.buffers()))
        with pytest.raises(NotImplementedError, match="meta"):
            apply.root.model(normal(3, 7))

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


@pytest.mark.parametrize("base", ["dense", "nested", "int8"])
def test_copies_and_pickles(base):
    _, adapted = language("llama", base)
    expected = adapted.apply(*adapted[1:3], input_ids=tokens()).logits
    for other in (copy.deepcopy(adapted.apply), pickle.loads(pickle.dumps(adapted.apply))):
        assert torch.equal(other(*adapted[1:3], input_ids=tokens()).logits, expected)
        with ThreadPoolExecutor(1) as pool:
            threaded = pool.submit(lambda f: f(*adapted[1:3], input_ids=tokens()).logits, other).result()
        assert torch.equal(threaded, expected)
    assert torch.equal(adapted.apply(*adapted[1:3], input_ids=tokens()).logits, expected)


def test_copied_apply_with_dropout():
    _, adapted = language("llama", "dense", vera_dropout=0.5)
    dropped = adapted.apply.with_dropout(torch.Generator().manual_seed(0))
    copied = copy.deepcopy(dropped)
    outputs = [f(*adapted[1:3], input_ids=tokens()).logits for f in (dropped, copied)]
    assert torch.equal(*outputs)


class TestAttentionOfTorch:
    def test_refuses_what_is_never_called(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        with pytest.raises(ValueError, match=r"'self_attn\.out_proj' is never called"):
            vf.adapt(model, vf.VeraConfig(r=4, target_modules=["out_proj", "linear1"]))

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


# transformers 5 renames it.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "base"), [("llama", "dense"), ("llama", "nested"), ("gpt2", "dense")])
def test_gradient_checkpointing(name, base, reentrant):
    _, adapted = language(name, base)
    gradients = []
    for checkpointing in (False, True):
        module = vf.to_module(adapted).train()
        if checkpointing:
            module.gradient_checkpointing_enable({"use_reentrant": reentrant})
            module.enable_input_require_grads()
            calls = count_calls(module)
        module(input_ids=tokens(), use_cache=False).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert set(calls.values()) == {2}  # every layer ran again in backward
    for key in adapted.params:
        assert relative_error(gradients[1][key], gradients[0][key]) < 1e-5, key


def count_calls(module):
    calls = {}
    for name, layer in module.named_modules():
        if isinstance(layer, vf.Linear | vf.Linear4bit):
            calls[name] = 0

            def count(layer, args, name=name):
                calls[name] += 1

            layer.register_forward_pre_hook(count)
    return calls


class TestToModule:
    def test_shares_the_base_and_copies_the_vectors(self):
        model, adapted = language("llama", "dense")
        module = vf.to_module(adapted)
        assert module.model.norm.weight.data_ptr() == model.model.norm.weight.data_ptr()
        before = snapshot(adapted.params)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
        module(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
        assert_close(snapshot(adapted.params), before, rtol=0, atol=0)
        params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        assert not torch.equal(
            params["model.layers.0.self_attn.q_proj.lambda_b"], before[0]["model.layers.0.self_attn.q_proj.lambda_b"]
        )
        assert torch.equal(
            adapted.apply(params, adapted.frozen, input_ids=tokens()).logits, module(input_ids=tokens()).logits
        )

    def test_uses_the_given_projections(self):
        _, adapted = language("llama", "dense")
        adapted = adapted._replace(frozen=randomized(adapted.frozen))
        expected = adapted.apply(*adapted[1:3], input_ids=tokens()).logits
        assert torch.equal(vf.to_module(adapted)(input_ids=tokens()).logits, expected)

    def test_modules_are_independent(self):
        _, adapted = language("gpt2", "dense")
        first, second = vf.to_module(adapted), vf.to_module(adapted._replace(params=randomized(adapted.params, 5)))
        expected = first(input_ids=tokens()).logits
        second(input_ids=tokens()).logits.sum().backward()
        assert torch.equal(first(input_ids=tokens()).logits, expected)
        assert torch.equal(adapted.apply(*adapted[1:3], input_ids=tokens()).logits, expected)
        assert all(p.grad is None for p in first.parameters())


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
    with pytest.raises(ValueError, match=r"which no module of this model ends in.*'q_proj'"):
        vf.adapt(llama(), vf.VeraConfig(r=R, target_modules=["q_proj", "query"]))
    with pytest.raises(ValueError, match="'norm' is a BatchNorm1d"):
        vf.adapt(Normalized(), vf.VeraConfig(r=R, target_modules=["norm"]))


def test_repr():
    assert repr(language("llama", "dense")[1].apply) == "Apply(LlamaForCausalLM, 4 adapted layers)"
