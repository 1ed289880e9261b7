"""Models merged as a whole: equal to the adapted model, and loaded by transformers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import vera_func as vf
from vera_func import private
from vera_func.cli.report import merge_advice

from helpers import IDS, MODELS, logits_of, logits_without_bnb, make_adapted, randomized, relative_error, snapshot
from refused import (
    ADAPTED,
    FROZEN,
    NAN,
    PARAMS,
    Q4,
    Refused,
    X,
    filled,
    small_model,
)


@pytest.mark.parametrize("use_dora", [False, True], ids=["VeRA", "DVoRA"])
@pytest.mark.parametrize("to", [None, torch.float32])
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_is_adapted(name, base, to, use_dora):
    model, adapted = make_adapted(name, base, use_dora=use_dora)
    before = snapshot(model)
    merged = vf.merge(model, adapted.params, adapted.frozen, to)
    assert type(merged) is type(model)
    tolerance = {"dense": 1e-5, "nf4": 0.3, "int8": 0.05}["dense" if to else base]
    assert relative_error(logits_without_bnb(merged), logits_of(adapted)) < tolerance
    assert_close(snapshot(model), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("to", [None, "nf4", "fp4", "int8", torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_round_trip_through_transformers(base, to, tmp_path):
    model, adapted = make_adapted("llama", base)
    merged = vf.merge(model, adapted.params, adapted.frozen, to).eval()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(logits_without_bnb(loaded), logits_without_bnb(merged), rtol=0, atol=0)
    kinds = {type(module).__name__ for module in loaded.modules() if "Linear" in type(module).__name__}
    if isinstance(to, torch.dtype):
        assert kinds == {"Linear"}
        assert {p.dtype for p in loaded.parameters()} == {to}
    elif to is not None or base != "dense":
        assert kinds == {"Linear", "Linear8bitLt" if "int8" in (to, to or base) else "Linear4bit"}


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Normed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=-1), self.bias)


class Renamed(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias  # as Falcon's layers


@pytest.mark.parametrize("to", [None, torch.float32])
@pytest.mark.parametrize("layer", [Scaled, Normed])
def test_a_layer_that_transforms_its_product_is_refused(layer, to):
    """The update is added to the output: merged into the weight, it would be scaled with it."""
    model = nn.Sequential(layer(8, 6))
    adapted = vf.adapt(model, vf.VeraConfig(r=2, target_modules=["0"]))
    params, x = randomized(adapted.params), torch.ones(2, 8)
    base, update = model(x), x @ vf.delta_weight(layer_params(params), adapted.frozen, 8).T
    assert_close(adapted.apply(params, adapted.frozen, x), base + update)
    with pytest.raises(ValueError, match=rf"'0' is a {layer.__name__}, whose output is not"):
        vf.merge(model, params, adapted.frozen, to)
    other = vf.adapt(nn.Sequential(Renamed(8, 6)), vf.VeraConfig(r=2, target_modules=["0"]))
    merged = vf.merge(other.apply.model, params, other.frozen, to)
    assert_close(merged(x), other.apply(params, other.frozen, x))


def layer_params(params):
    return {leaf: params[f"0.{leaf}"] for leaf in ("lambda_b", "lambda_d")}


def test_float64_stays_float64():
    model = nn.Sequential(nn.Linear(8, 6)).double()
    adapted = vf.adapt(model, vf.VeraConfig(r=2, target_modules=["0"]), dtype=torch.float64)
    params, x = randomized(adapted.params), torch.ones(2, 8, dtype=torch.float64)
    expected = adapted.apply(params, adapted.frozen, x)
    assert_close(vf.merge(model, params, adapted.frozen)(x), expected, rtol=1e-13, atol=1e-13)


def test_merge_carries_what_was_trained_beside():
    model, adapted = make_adapted("bert")
    merged = vf.merge(model, adapted.params, adapted.frozen)
    assert torch.equal(merged.classifier.weight, adapted.params["classifier.weight"])
    key = "bert.encoder.layer.0.attention.self.query.bias"
    assert torch.equal(merged.get_parameter(key), adapted.params[key])


def test_running_the_merged_model_leaves_the_users_alone():
    model, adapted = make_adapted("llama", "int8")
    merged = vf.merge(model, adapted.params, adapted.frozen).eval()
    before = logits_of(adapted)
    merged(input_ids=IDS)  # bitsandbytes moves the statistics of its own modules here
    again = vf.adapt(model, adapted.config)
    assert torch.equal(again.apply(adapted.params, adapted.frozen, input_ids=IDS).logits, before)


def test_advice():
    model, adapted = make_adapted("llama", "nf4")
    small = {k: v * 0.01 if k.endswith("lambda_b") else v for k, v in adapted.params.items()}
    reports = vf.model_merge_report(adapted._replace(params=small))
    assert len(reports) == 4
    assert "Do not merge" in merge_advice(reports)
    assert "safe" in merge_advice(vf.model_merge_report(adapted, torch.bfloat16))
    for kept, error, says in (
        (1.0, 0.25, "keeps the update: 100 %"),
        (0.8, 0.25, "changes the adapter's effect: 80 %"),
    ):
        assert says in merge_advice({"q": vf.MergeReport(kept, error, size=0.01)})
    nothing = vf.adapt(model, adapted.config)
    assert "Nothing to merge" in merge_advice(vf.model_merge_report(nothing))


def test_unknown_formats():
    model, adapted = make_adapted("llama")
    with pytest.raises(ValueError, match="int4"):
        vf.merge(model, adapted.params, adapted.frozen, "int4")
    with pytest.raises(ValueError, match="floating-point"):
        vf.merge(model, adapted.params, adapted.frozen, torch.int8)
    with pytest.raises(ValueError, match=r"rank must be an integer from 1 to 16"):
        vf.export_lora("unused", *adapted[1:], model, rank=17)


def test_a_bias_stays_tied():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)
            self.second.bias = self.first.bias

        def forward(self, x):
            return self.second(self.first(x))

    model = Two()
    adapted = vf.adapt(model, vf.VeraConfig(r=5, target_modules=["first"], bias="all"))
    params = randomized(adapted.params)
    merged = vf.merge(model, params, adapted.frozen)
    x = torch.randn(3, 7)
    assert torch.equal(merged.first.bias, params["first.bias"])
    assert torch.equal(merged.second.bias, params["first.bias"])
    assert relative_error(merged(x), adapted.apply(params, adapted.frozen, x)) < 1e-5


def test_an_override_of_a_layer_that_is_adapted():
    """Its update is added to the weight that is given, as `apply` does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    adapted = vf.adapt(model, vf.VeraConfig(r=3, target_modules=["0"]))
    params = randomized(adapted.params, scale=0.5) | {"0.weight": torch.randn(5, 7), "0.bias": torch.randn(5)}
    x = torch.randn(3, 7)
    merged = vf.merge(model, params, adapted.frozen)
    assert relative_error(merged(x), adapted.apply(params, adapted.frozen, x)) < 1e-5
    report = vf.model_merge_report(adapted._replace(params=params), torch.float32)["0"]
    vectors = {leaf: params[f"0.{leaf}"] for leaf in ("lambda_b", "lambda_d")}
    size = vf.delta_weight(vectors, adapted.frozen, 7).norm() / params["0.weight"].norm()
    assert report.size == pytest.approx(size.item(), rel=1e-5)


def test_a_key_that_apply_refuses():
    """A second name of a shared layer, and a packed weight."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(7, 7), "other": nn.Linear(7, 7)})
    model["second"] = model["first"]
    model["packed"] = vf.to_bnb(vf.quantize_8bit(torch.ones(7, 7)))
    adapted = vf.adapt(model, vf.VeraConfig(r=3, target_modules=["other"]))
    for key, message in (
        ("second.weight", "which is not a parameter of the model"),
        ("packed.weight", "but 'packed.weight' of the model has type Int8Params, which can't be replaced"),
    ):
        with pytest.raises(ValueError, match=rf"'{key}', {message}"):
            vf.merge(model, adapted.params | {key: torch.ones(7, 7)}, adapted.frozen)


class Scaled(nn.Linear):
    """A float8 layer that multiplies its weight by a scale, as transformers' FP8Linear does."""

    def forward(self, x):
        return nn.functional.linear(x, 3 * self.weight.float(), self.bias.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
class TestFloat8:
    def adapted(self, dtype, layer=nn.Linear):
        torch.manual_seed(0)
        model = nn.Sequential(layer(64, 32)).to(dtype)
        adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0"]))
        return model, adapted._replace(params=randomized(adapted.params))

    def test_is_refused_in_one_sentence(self, dtype):
        model, adapted = self.adapted(dtype)
        for call in (lambda: vf.merge(model, *adapted[1:3]), lambda: vf.model_merge_report(adapted)):
            with pytest.raises(ValueError, match=rf"{dtype}.*to=torch.bfloat16"):
                call()

    @pytest.mark.parametrize("to", [torch.bfloat16, torch.float32, "nf4", "int8"])
    def test_is_merged_to_a_format_that_can_hold_it(self, dtype, to):
        model, (_, params, frozen, _) = self.adapted(dtype)
        merged = vf.merge(model, params, frozen, to)
        vectors = {leaf: params[f"0.{leaf}"] for leaf in ("lambda_b", "lambda_d")}
        expected = model[0].weight.double() + vf.delta_weight(vectors, frozen, 64).double()
        actual = merged[0].weight if isinstance(to, torch.dtype) else vf.dequantize(vf.from_bnb(merged[0])[0])
        bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3, "int8": 0.01, "nf4": 0.15}[to]
        assert (actual.double() - expected).norm() < bound * expected.norm()

    @pytest.mark.parametrize("to", [None, torch.bfloat16, "nf4"])
    def test_with_a_scale_is_refused(self, dtype, to):
        model, (_, params, frozen, _) = self.adapted(dtype, Scaled)
        with pytest.raises(ValueError, match=rf"Scaled.*{dtype}"):
            vf.merge(model, params, frozen, to)


# What is refused

bad = Refused()


for to in ("int4", torch.int8, 4, True):
    wrong = f"to must be one of .*, got {to!r}"
    bad("merge", f"to {to}", lambda _, to=to: vf.merge(small_model(), PARAMS, FROZEN, to), wrong)
    bad("model_merge_report", f"to {to}", lambda _, to=to: vf.model_merge_report(ADAPTED, to), wrong)

bad("merge", "no vectors", lambda _: vf.merge(small_model(), {}, FROZEN), "the 'lambda_b' of at least one layer")
bad(
    "merge",
    "a list",
    lambda _: vf.merge(small_model(), PARAMS | {"0.lambda_d": [1.0]}, FROZEN),
    "must be a tensor, got list",
)


def on_two_devices():
    model = small_model()
    with private.fake_tensors():
        for layer, device in ((model[0], "cuda:0"), (model[2], "cuda:1")):
            for name, parameter in [*layer.named_parameters()]:
                setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
    return model


bad(
    "merge",
    "layers on two devices",
    lambda _: vf.merge(on_two_devices(), PARAMS, FROZEN),
    r"must be on one device, but are on cuda:0 \(0\), cuda:1 \(2\)",
)
bad("merge", "NaN in the pair", lambda _: vf.merge(small_model(), PARAMS, filled(FROZEN, NAN)), "holds NaN or inf")
bad(
    "merge",
    "a weight for nothing",
    lambda _: vf.merge(small_model(), PARAMS, FROZEN, weights={"9": Q4}),
    "'9', which is not an adapted",
)
for what, weight in {
    "a number": 3,
    "another shape": torch.ones(7, 5),
    "integers": torch.ones(5, 7).long(),
    "no data": torch.ones(5, 7, device="meta"),
    "NaN": torch.full((5, 7), NAN),
}.items():
    bad(
        "merge",
        f"a weight of {what}",
        lambda _, weight=weight: vf.merge(small_model(), PARAMS, FROZEN, weights={"0": weight}),
        "the weight of '0' (must be a quantized weight or .*shape \\(5, 7\\)|has no data|holds NaN)",
    )
bad("merge", "weights=3", lambda _: vf.merge(small_model(), PARAMS, FROZEN, weights=3), "weights must be a dict")
bad(
    "merge",
    "params=None",
    lambda _: vf.merge(small_model(), None, FROZEN),
    "params must be a dict of tensors, got NoneT",
)
bad("merge", "an Adapted", lambda _: vf.merge(small_model(), ADAPTED, FROZEN), "pass its attribute params")
bad("model_merge_report", "a model", lambda _: vf.model_merge_report(small_model()), "adapted must be an Adapted")
bad(
    "model_merge_report",
    "inputs of nothing",
    lambda _: vf.model_merge_report(ADAPTED, "nf4", {"9": X}),
    "inputs has '9'",
)
bad(
    "model_merge_report",
    "inputs of others",
    lambda _: vf.model_merge_report(ADAPTED._replace(params=PARAMS), "nf4", {"0": X}),
    r"\(\*tokens, 7\)",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
