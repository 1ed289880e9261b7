"""Models quantized and dequantized as a whole: copies that share what stays as it is."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import vera_func as vf
from vera_func.cli import demo
from vera_func.model.convert import quantize_model

from helpers import MODELS, TARGETS, llama, quantized, randomized, snapshot
from refused import QMODEL, Refused, small_model


IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
OPTIONS = {"llama": {}, "gpt2": {"bias": "vera_only"}, "bert": {"bias": "vera_only", "task_type": "SEQ_CLS"}}


def make_adapted(name, base="dense", **options):
    model = quantized(MODELS[name](), base)
    adapted = vf.adapt(model, vf.VeraConfig(r=16, target_modules=TARGETS[name], **OPTIONS[name], **options))
    return model, adapted._replace(params=randomized(adapted.params))


# The parts


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_quantize_model_is_a_copy_that_shares_the_rest(quant):
    model = llama()
    before = snapshot(model)
    new = quantize_model(model, quant)
    assert demo.quantize_model is quantize_model
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert new.lm_head.weight is model.lm_head.weight
    assert new.model.embed_tokens.weight is model.model.embed_tokens.weight
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in names:
        q, _ = vf.from_bnb(new.get_submodule(name))
        weight = model.get_submodule(name).weight.detach()
        expected = vf.quantize_8bit(weight) if quant == "int8" else vf.quantize_4bit(weight, quant)
        assert_close(vf.dequantize(q), vf.dequantize(expected))


def test_quantize_model_leaves_what_is_quantized_and_refuses_when_nothing_is_left():
    model = quantized(llama(), "nf4")
    with pytest.raises(ValueError, match=r"no nn.Linear to quantize"):
        quantize_model(model, "nf4")


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


# What is refused

bad = Refused()

bad("dequantize_model", "a state dict", lambda _: vf.dequantize_model(QMODEL.state_dict()), "got OrderedDict")
bad("dequantize_model", "integers", lambda _: vf.dequantize_model(QMODEL, torch.int8), "got torch.int8")
bad(
    "quantize_model",
    "unknown format",
    lambda _: vf.quantize_model(small_model(), "int3"),
    "must be one of .*got 'int3'",
)
bad("quantize_model", "no linears", lambda _: vf.quantize_model(nn.Sequential(nn.ReLU()), "nf4"), "no nn.Linear")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
