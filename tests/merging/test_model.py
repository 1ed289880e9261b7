import copy

import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import vera_func as vf
from vera_func.cli.report import merge_advice
from vera_func.io.lora import truncate

from helpers import MODELS, TARGETS, llama, quantized, randomized, relative_error, snapshot


IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
OPTIONS = {"llama": {}, "gpt2": {"bias": "vera_only"}, "bert": {"bias": "vera_only", "task_type": "SEQ_CLS"}}


def make_adapted(name, base="dense", **options):
    model = quantized(MODELS[name](), base)
    adapted = vf.adapt(model, vf.VeraConfig(r=16, target_modules=TARGETS[name], **OPTIONS[name], **options))
    return model, adapted._replace(params=randomized(adapted.params))


def logits_of(adapted):
    with torch.no_grad():
        return adapted.apply(adapted.params, adapted.frozen, input_ids=IDS).logits


def logits_without_bnb(model):
    """A quantized model's own forward rounds the activations or repacks; read the weights it holds instead."""
    nothing = vf.adapt(model, vf.VeraConfig(r=1, target_modules="all-linear"))
    return logits_of(nothing)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_lora_is_exact(name, base, tmp_path):
    model, adapted = make_adapted(name, base)
    report = vf.export_lora(tmp_path, *adapted[1:], model)
    assert set(report.error.values()) == {0.0}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    # In training mode PEFT multiplies by the dequantized weights; there is no dropout left to matter.
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits = theirs.train()(input_ids=IDS).logits
    assert relative_error(logits, logits_of(adapted)) < 1e-5


def test_lora_of_a_smaller_rank(tmp_path):
    model, adapted = make_adapted("llama")
    report = vf.export_lora(tmp_path, *adapted[1:], model, rank=5)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    for name, error in report.error.items():
        layer = theirs.base_model.model.get_submodule(name)
        vectors = {leaf: adapted.params[f"{name}.{leaf}"] for leaf in ("lambda_b", "lambda_d")}
        delta = vf.delta_weight(vectors, adapted.frozen, layer.in_features)
        singular = torch.linalg.svdvals(delta)
        assert error == pytest.approx((singular[5:].norm() / singular.norm()).item(), rel=1e-3)
        actual = ((layer.get_delta_weight("default") - delta).norm() / delta.norm()).item()
        assert actual == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (7, 3, 5, 4), (2, 3, 5, 4), (11, 13, 5, 5)])
def test_truncate_is_the_best_approximation(sizes):
    in_, out, r, rank = sizes
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(r, in_, generator=generator), torch.randn(out, r, generator=generator)
    left, right, error = truncate(A, B, rank)
    assert (left.shape, right.shape) == ((rank, in_), (out, rank))
    S = torch.linalg.svdvals(B @ A)
    assert error == pytest.approx((S[rank:].norm() / S.norm()).item(), abs=1e-5)
    assert ((right @ left - B @ A).norm() / S.norm()).item() == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("to", [None, torch.float32])
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_is_adapted(name, base, to):
    model, adapted = make_adapted(name, base)
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
    assert "adds nothing" in merge_advice(vf.model_merge_report(nothing))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.9.self_attn.q_proj.lambda_b": torch.ones(64)}, "no linear layer"),
        ({"model.layers.0.self_attn.q_proj.lambda_b": torch.ones(63)}, "needs lambda_b"),
        ({"model.layers.0.self_attn.q_proj.lambda_b": torch.full((64,), torch.nan)}, "q_proj.lambda_b.*NaN"),
        ({"model.norm.weights": torch.ones(64)}, "no parameter of the model"),
        ({"model.norm.weight": torch.ones(63)}, r"must be \(64,\)"),
    ],
)
def test_params_that_do_not_fit(change, message):
    model, adapted = make_adapted("llama")
    with pytest.raises(ValueError, match=message):
        vf.merge(model, adapted.params | change, adapted.frozen)


def test_unknown_formats():
    model, adapted = make_adapted("llama")
    with pytest.raises(ValueError, match="int4"):
        vf.merge(model, adapted.params, adapted.frozen, "int4")
    with pytest.raises(ValueError, match="floating-point"):
        vf.merge(model, adapted.params, adapted.frozen, torch.int8)
    with pytest.raises(ValueError, match=r"rank must be in 1 \.\.\. 16"):
        vf.export_lora("unused", *adapted[1:], model, rank=17)


def test_sizes_of_a_model_are_checked_before_anything_is_written(tmp_path):
    _, adapted = make_adapted("llama")
    with pytest.raises(ValueError, match="needs lambda_b"):
        vf.export_lora(tmp_path / "lora", *adapted[1:], llama(hidden_size=128))
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("base", ["nf4", "nested", "int8"])
def test_dequantized_model(base):
    """The same numbers without dequantizing: outputs and gradients, bit for bit; the model stays as it was."""
    model, adapted = make_adapted("llama", base)
    before = snapshot(model)
    dense = vf.dequantize_model(model, torch.float32)
    again = vf.adapt(dense, adapted.config)

    def loss(params, apply):
        return apply(params, adapted.frozen, input_ids=IDS).logits.square().mean()

    for apply in (again.apply, adapted.apply):
        value = loss(adapted.params, apply)
        grads = torch.func.grad(loss)(adapted.params, apply)
        if apply is again.apply:
            expected = value, grads
    assert_close((value, grads), expected, rtol=0, atol=0)
    assert_close(snapshot(model), before, rtol=0, atol=0)
    assert not any(hasattr(module.weight, "quant_state") for module in dense.modules() if hasattr(module, "weight"))
    assert dense.lm_head.weight is model.lm_head.weight
    assert not hasattr(dense.config, "quantization_config")
