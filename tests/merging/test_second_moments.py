"""What the layers of a model read, token by token, and weights calibrated on it."""

import pytest
import torch
from torch import ones
from torch.testing import assert_close

import vera_func as vf
from vera_func.merging.second_moments import calibrate_weights, second_moments

from helpers import llama, quantized, randomized, snapshot
from refused import ADAPTED, NAN, QADAPTED, Refused, filled


TARGETS = ["q_proj", "v_proj"]
IDS = torch.randint(3, 67, (12, 40), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(40) >= torch.arange(12)[:, None]).long()  # padded on the left, row by row more


def make_adapted(base="nf4"):
    model = quantized(llama(), base)
    # A few directions carry the inputs, as in a trained model; with white inputs no grid could be better than another.
    generator = torch.Generator().manual_seed(3)
    model.model.embed_tokens.weight.data = torch.randn(67, 5, generator=generator) @ torch.randn(
        5, 64, generator=generator
    )
    adapted = vf.adapt(model, vf.VeraConfig(r=8, target_modules=TARGETS))
    params = randomized(adapted.params)
    return model, adapted._replace(params={k: v * 0.1 if k.endswith("b") else v for k, v in params.items()})


def batches(mask=MASK):
    return [{"input_ids": IDS[i : i + 4], "attention_mask": mask[i : i + 4]} for i in range(0, 12, 4)]


def gap(output):
    return output.logits[:, -1, 5] - output.logits[:, -1, 6]


def test_a_shared_layer_counts_every_call():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x))

    model, x = Twice(), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    adapted = vf.adapt(model, vf.VeraConfig(r=2, target_modules=["layer"]))
    rows = torch.cat([x, model.layer(x).detach()]).double()
    assert_close(second_moments(adapted, [{"x": x}])["layer"].double(), rows.T @ rows / 14, rtol=1e-5, atol=1e-6)
    # The gradients of y1 + y2 with respect to the outputs of both calls.
    weights = torch.cat([model.layer.weight.sum(0).square().sum().expand(7), torch.full((7,), 3.0)]).detach().double()
    weighted = (rows.T * weights) @ rows / weights.sum()
    found = second_moments(adapted, [{"x": x}], readout=lambda y: y.sum(1))["layer"].double()
    assert_close(found, 0.1 * rows.T @ rows / 14 + 0.9 * weighted, rtol=1e-5, atol=1e-6)


def test_gram_is_the_mean_over_tokens():
    model, adapted = make_adapted()
    seen = []
    hook = lambda module, args: seen.append(args[0])
    module = vf.to_module(adapted)
    module.model.layers[1].self_attn.q_proj.register_forward_pre_hook(hook)
    for batch in batches():
        module(**batch)
    tokens = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches(), strict=True)])
    before = snapshot(model)
    grams = second_moments(adapted, batches())
    assert set(grams) == set(adapted.apply.targets)
    assert_close(grams["model.layers.1.self_attn.q_proj"], tokens.T @ tokens / len(tokens))
    assert_close(snapshot(model), before, rtol=0, atol=0)


def test_padding_is_left_out():
    _, adapted = make_adapted()
    changed = [{**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 9)} for b in batches()]
    grams, others = (second_moments(adapted, b, readout=gap) for b in (batches(), changed))
    assert_close(others, grams, rtol=1e-4, atol=1e-5)


def test_readout_weighs_tokens():
    _, adapted = make_adapted()
    # In the last layer's q only the last token matters for what is read off the last position.
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    name = "model.layers.1.self_attn.q_proj"
    plain, weighted = second_moments(adapted, [batch])[name], second_moments(adapted, [batch], readout=gap)[name]
    seen = []
    module = vf.to_module(adapted)
    module.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    module(**batch)
    last = seen[0][:, -1]
    assert torch.linalg.matrix_rank(weighted - 0.1 * plain, rtol=1e-4) <= 12
    outside = torch.linalg.qr(last.T, mode="complete").Q[:, 12:]
    assert_close((outside.T @ (weighted - 0.1 * plain) @ outside).abs().max(), torch.tensor(0.0), rtol=0, atol=1e-5)


def test_calibrated_model_is_closer_than_a_rounded_one():
    model, adapted = make_adapted()
    grams = second_moments(adapted, batches(), readout=gap)
    weights = calibrate_weights(adapted, grams)
    errors = {}
    for name, merged in {
        "rounded": vf.merge(model, *adapted[1:3]),
        "calibrated": vf.merge(model, *adapted[1:3], weights=weights),
    }.items():
        nothing = vf.adapt(merged, adapted.config)
        actual = gap(nothing.apply(nothing.params, nothing.frozen, **batches()[0]))
        wanted = gap(adapted.apply(adapted.params, adapted.frozen, **batches()[0]))
        errors[name] = (actual - wanted).norm().item()
    assert errors["calibrated"] < 0.5 * errors["rounded"]


def test_what_can_not_be_calibrated():
    adapted = make_adapted()[1]
    with pytest.raises(ValueError, match="at least one token to calibrate with"):
        second_moments(adapted, [])
    with pytest.raises(ValueError, match="does not depend on"):
        second_moments(adapted, batches(), readout=lambda output: output.logits.sum((1, 2)) * 0)
    with pytest.raises(ValueError, match="moments lacks the layer"):
        calibrate_weights(adapted, {})
    int8 = quantized(llama(), "int8")
    with pytest.raises(ValueError, match="only 4-bit layers"):
        calibrate_weights(vf.adapt(int8, adapted.config), {})


@pytest.mark.parametrize("base", ["nf4", "nested", "fp4"])
def test_a_calibrated_model_is_an_ordinary_one(base, tmp_path):
    """Saved, and read by transformers and bitsandbytes alone, it gives the logits of the weights that were chosen."""
    from transformers import AutoModelForCausalLM

    model, adapted = make_adapted(base)
    weights = calibrate_weights(adapted, second_moments(adapted, batches()))
    merged = vf.merge(model, *adapted[1:3], weights=weights)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, q in weights.items():
        assert_close(vf.dequantize(vf.from_bnb(loaded.get_submodule(name))[0]), vf.dequantize(q), rtol=0, atol=0)
    # In training mode bitsandbytes multiplies by the dequantized weights.
    actual = loaded.train()(input_ids=IDS, attention_mask=MASK).logits
    nothing = vf.adapt(merged, vf.VeraConfig(r=1, target_modules="all-linear"))
    expected = nothing.apply(*nothing[1:3], input_ids=IDS, attention_mask=MASK).logits
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# What is refused

bad = Refused()

bad("second_moments", "no batches", lambda _: second_moments(ADAPTED, []), "at least one token to calibrate with")
bad(
    "second_moments",
    "tensors",
    lambda _: second_moments(ADAPTED, [ones(2, 7)]),
    "mapping of the model's keyword arguments",
)
bad(
    "second_moments",
    "one batch",
    lambda _: second_moments(ADAPTED, {"input": ones(2, 7)}),
    "must be a mapping .*got str",
)
bad(
    "second_moments",
    "NaN",
    lambda _: second_moments(ADAPTED, [{"input": ones(2, 7) * NAN}]),
    "second moments of '0' holds NaN or inf",
)

for what, readout in (
    ("detached", lambda y: y.detach()),
    ("elsewhere", lambda y: ones(2)),
    ("a number", lambda y: 1.0),
):
    bad(
        "second_moments", f"a readout {what}",
        lambda _, readout=readout: second_moments(ADAPTED, [{"input": ones(2, 7)}], readout=readout),
        "does not depend on any adapted layer",
    )  # fmt: skip

bad(
    "calibrate_weights",
    "dense",
    lambda _: calibrate_weights(ADAPTED, {}),
    "only 4-bit layers",
)
bad(
    "calibrate_weights",
    "no gram",
    lambda _: calibrate_weights(QADAPTED, {}),
    "lacks the layer '0'",
)
bad(
    "calibrate_weights", "second moments of others",
    lambda _: calibrate_weights(QADAPTED._replace(params=filled(QADAPTED.params)), {"0": torch.eye(32)}),
    r"gram must have shape \(64, 64\), got \(32, 32\)",
)  # fmt: skip


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
