# ruff: noqa: E501
"""Silent elsewhere: what PEFT 0.21, bitsandbytes 0.50 and torch 2.13 get wrong without an error.

Some of these give a warning, when it is too late. Here each is right, or raises; each row has its test below.

| elsewhere | here | test |
|---|---|---|
| a second adapter of lower r is accepted, and its forward fails | pooled, exact | `test_ranks_that_differ` |
| a second adapter with narrower targets and redrawn projections gets the wider draw: wrong outputs | each adapter has the draw of its own targets | `test_narrower_targets_of_a_second_adapter` |
| only the first layer's shapes are checked; a later layer fails in the forward | all are checked as the file is read | `test_shapes_of_all_layers` |
| loading other stored projections overwrites those of the adapters that are loaded | nothing loaded changes | `test_loading_another_changes_nothing` |
| after the last adapter is deleted none can be added | adapters are values | `test_removing_the_last_and_adding_again` |
| `adapter_names` is ignored, even unknown ones | one adapter per row; an unknown id raises | `test_an_adapter_for_each_row` |
| `layers_to_transform` is ignored beside a regular expression | raises | `test_layers_of_an_expression` |
| `r` of 0 or less fails far from where it was given | raises, and names `r` | `test_ranks_of_nothing` |
| a dropout below 0 disables dropout | raises | `test_dropout_below_zero` |
| a file with missing or unknown keys loads, with a warning or without | raises, and names file and key | `test_keys_that_are_missing_or_too_many` |
| layers of several dtypes fail in the forward | computed in the dtype of the vectors, cast once | `test_layers_of_several_dtypes` |
| unmerging a quantized layer does not give the base back | the base is never written to | `test_unmerging` |
| a small update vanishes in a 4-bit merge | the report says so | `test_a_small_update_vanishes` |
| an eval-mode forward may repack the weight and round its scales | the module is read, never run | `test_a_forward_leaves_the_weight_alone` |
| a repacked weight is dequantized, and merged into, as garbage | unpacked into a copy | `test_a_repacked_weight` |
| after repacking, gradients of everything upstream are lost | whole, in every state | `test_gradients_behind_a_layer` |
| `state_dict()` of a repacked layer keeps rounded scales | exact, as nothing was repacked | `test_statistics_after_a_state_dict` |
| blocks that straddle rows are dequantized with wrong scales on CPUs with AVX512, in bitsandbytes' own layers too | the formula | `test_blocks_that_straddle_rows` |
| the first call fixes the compute dtype and casts the bias | each call is independent | `test_the_first_call_decides_nothing` |
| 8-bit layers give different numbers in training and eval mode | the same; `int8_activations` is explicit | `test_eight_bits_in_training_and_not` |
| warnings for each layer and import, which hide the others | none | `test_nothing_is_logged` |
| `jvp` through a 4-bit layer returns zeros | right | `test_forward_derivatives` |
| `jvp` of `jvp` through an `autograd.Function` loses tangents (pytorch #197867) | right | `test_forward_derivatives_of_forward_derivatives` |
| a kernel reads on where the scales end | raises | `test_scales_that_end_too_early` |
| a product with a tensor on the meta device gives uninitialised memory | raises | `test_a_tensor_without_data` |
"""

import logging
import re
import warnings

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import grad, jvp
from torch.testing import assert_close

import vera_func as vf
from vera_func.cli.report import merge_advice
from vera_func.io.checkpoint import WEIGHTS
from vera_func.quant.quantize import levels, unpack

from helpers import QUANTIZERS, dense_forward, randomized, relative_error, repack, snapshot


def model(*, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5)).to(dtype)


def adapted(base, *targets, seed=1, **fields):
    fresh = vf.adapt(base, vf.VeraConfig(**{"r": 4, "target_modules": targets or ["0", "2"]} | fields))
    return fresh._replace(params=randomized(fresh.params, seed, 0.5))


def outputs(adapted, x):
    return adapted.apply(adapted.params, adapted.frozen, x)


def quantized_layer(name="nested", seed=0):
    """A bitsandbytes module 128 -> 96 with a bias, and an adapter of it."""
    generator = torch.Generator().manual_seed(seed)
    module = vf.to_bnb(
        QUANTIZERS[name](torch.randn(96, 128, generator=generator)), torch.randn(96, generator=generator)
    )
    return nn.Sequential(module), adapted(nn.Sequential(module), "0")


def oracle(adapted, base, x):
    weight = vf.dequantize(vf.from_bnb(base[0])[0])
    params = {leaf: adapted.params[f"0.{leaf}"] for leaf in ("lambda_b", "lambda_d")}
    return dense_forward(params, adapted.frozen, x, weight, base[0].bias)


X = torch.randn(11, 7, generator=torch.Generator().manual_seed(3))
WIDE = torch.randn(11, 128, generator=torch.Generator().manual_seed(4))

# ------------------------------------------------------------------------------------------------- several adapters


def test_ranks_that_differ():
    base = model()
    one, other = adapted(base), adapted(base, r=2, projection_prng_key=9)
    pool = vf.pool_adapters([one, other])
    rows = vf.select_adapters(pool.params, [0, 1] * 5 + [0])
    mixed = pool.apply(rows, pool.frozen, X)
    assert_close(mixed[0::2], outputs(one, X)[0::2])
    assert_close(mixed[1::2], outputs(other, X)[1::2])


def test_narrower_targets_of_a_second_adapter(tmp_path):
    # Without stored projections: they are drawn for the targets of the adapter, not of the one that was there first.
    base = model()
    wide, narrow = (adapted(base, *targets, save_projection=False) for targets in (["0", "2"], ["2"]))
    assert wide.frozen["vera_B"].shape != narrow.frozen["vera_B"].shape
    for name, each in (("wide", wide), ("narrow", narrow)):
        vf.save_adapter(tmp_path, *each[1:], adapter_name=name)
    loaded = [vf.load_adapter(tmp_path, base, adapter_name=name) for name in ("wide", "narrow")]
    for each, again in zip((wide, narrow), loaded, strict=True):
        assert torch.equal(outputs(again, X), outputs(each, X))


def test_shapes_of_all_layers(tmp_path):
    each = adapted(model())
    for key, shape in (("base_model.vera_A", (4, 12)), ("base_model.vera_B", (12, 4))):
        file = vf.save_adapter(tmp_path, *each[1:]) / WEIGHTS
        save_file(load_file(file) | {key: torch.ones(shape)}, file)
        with pytest.raises(ValueError, match=rf"{WEIGHTS}: for this model, vera_A must have"):
            vf.load_adapter(tmp_path, model())


def test_loading_another_changes_nothing(tmp_path):
    base = model()
    one = adapted(base)
    before = outputs(one, X), snapshot(base, one.params, one.frozen)
    other = one._replace(frozen=randomized(one.frozen, 7))
    vf.save_adapter(tmp_path, *other[1:])
    loaded = vf.load_adapter(tmp_path, base)
    assert not torch.equal(loaded.frozen["vera_A"], one.frozen["vera_A"])
    assert torch.equal(outputs(one, X), before[0])
    for now, then in zip(snapshot(base, one.params, one.frozen), before[1], strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)


def test_removing_the_last_and_adding_again():
    base = model()
    first = outputs(adapted(base), X)  # the adapter is garbage now
    assert torch.equal(outputs(adapted(base), X), first)


def test_an_adapter_for_each_row():
    base = model()
    parts = [adapted(base, seed=seed) for seed in range(3)]
    stacked = vf.stack_adapters([part.params for part in parts])
    ids = [2, 0, 1, 1, -1, 0, 2, 2, 1, 0, -1]
    mixed = parts[0].apply(vf.select_adapters(stacked, ids), parts[0].frozen, X)
    for i, id in enumerate(ids):
        expected = base(X[i]) if id < 0 else outputs(parts[id], X[i])
        assert_close(mixed[i], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="adapter id 3 is out of range"):
        vf.select_adapters(stacked, [3])


# -------------------------------------------------------------------------------------------------- configurations


def test_layers_of_an_expression():
    with pytest.raises(ValueError, match="layers_to_transform does not apply to a regular expression"):
        vf.VeraConfig(target_modules=r".*\.q_proj", layers_to_transform=[1])


@pytest.mark.parametrize("r", [0, -4])
def test_ranks_of_nothing(r):
    with pytest.raises(ValueError, match=f"r must be positive, got {r}"):
        vf.VeraConfig(r=r)
    with pytest.raises(ValueError, match=f"r must be a positive integer, got {r}"):
        vf.init_projections(r, 7, 5)


def test_dropout_below_zero():
    with pytest.raises(ValueError, match=r"vera_dropout must be at least 0 and below 1, got -0\.5"):
        vf.VeraConfig(vera_dropout=-0.5)


def test_keys_that_are_missing_or_too_many(tmp_path):
    each = adapted(model())
    file = vf.save_adapter(tmp_path, *each[1:]) / WEIGHTS
    whole = load_file(file)
    lacking = {key: value for key, value in whole.items() if key != "base_model.model.2.vera_lambda_b"}
    for tensors, message in (
        (lacking, "lacks '2.lambda_b'"),
        (
            whole | {"base_model.model.1.vera_lambda_b": torch.ones(13)},
            "has '1.lambda_b', but the adapted model has no such",
        ),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=message):
            vf.load_adapter(tmp_path, model())


# ------------------------------------------------------------------------------------------------- dtypes, merging


def test_layers_of_several_dtypes():
    class Cast(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    first, tanh, last = model()
    base = nn.Sequential(first, tanh, Cast(), last.bfloat16())
    each = adapted(base, "0", "3")
    y = outputs(each, X)
    layer = lambda i: {leaf: each.params[f"{i}.{leaf}"] for leaf in ("lambda_b", "lambda_d")}
    hidden = dense_forward(layer(0), each.frozen, X, first.weight, first.bias).tanh()
    expected = dense_forward(layer(3), each.frozen, hidden, last.weight.float(), last.bias.float())
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), expected) < 0.02


@pytest.mark.parametrize("name", ["nf4", "fp4", "nested", "int8"])
def test_unmerging(name):
    base, each = quantized_layer(name)
    before, y = snapshot(base), outputs(each, WIDE)
    q, _ = vf.from_bnb(base[0])
    plain = vf.dequantize(q).clone()
    for _ in range(3):
        merged = vf.merge(base, each.params, each.frozen)
        assert not torch.equal(vf.dequantize(vf.from_bnb(merged[0])[0]), plain)
    assert torch.equal(vf.dequantize(q), plain)
    assert torch.equal(outputs(each, WIDE), y)
    for key, value in base.state_dict().items():
        assert torch.equal(value, before[0][key]), key


def test_a_small_update_vanishes():
    each = quantized_layer("nf4")[1]
    params = each.params | {"0.lambda_b": 1e-3 * each.params["0.lambda_b"]}
    reports = vf.model_merge_report(each._replace(params=params))
    assert reports["0"].kept < 0.2
    assert merge_advice(reports).startswith("Do not merge like this")
    assert vf.model_merge_report(each._replace(params=params), torch.float32)["0"].kept > 0.99


# ---------------------------------------------------------------------------------- bitsandbytes, torch.func, torch


@pytest.mark.parametrize("name", ["nf4", "nested", "int8"])
def test_a_forward_leaves_the_weight_alone(name):
    base, each = quantized_layer(name)
    before = snapshot(base)[0]
    pointer = base[0].weight.data_ptr()
    base.eval()
    with torch.no_grad():
        outputs(adapted(base, "0"), WIDE)
        outputs(each, WIDE.bfloat16())
    assert base[0].weight.data_ptr() == pointer
    assert getattr(base[0].weight, "SCB", None) is not None or name != "int8"
    for key, value in base.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["nf4", "nested"])
def test_a_repacked_weight(name):
    base, _ = quantized_layer(name)
    weight = vf.dequantize(vf.from_bnb(base[0])[0])
    repack(base[0])
    each = adapted(base, "0")
    # What is left is bitsandbytes' rounding of the scales to bfloat16.
    assert relative_error(vf.dequantize(vf.from_bnb(base[0])[0]), weight) < 2**-7
    merged = vf.merge_dense(
        vf.from_bnb(base[0])[0], {k[2:]: v for k, v in each.params.items()}, each.frozen, torch.float32
    )
    assert_close(WIDE @ merged.T + base[0].bias, outputs(each, WIDE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_blocks_that_straddle_rows(quant_type):
    """Half of the blocks of 64 begin in one row of 96 and end in the next."""
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    q = vf.quantize_4bit(weight, quant_type)
    codes, absmax = unpack(q)
    dense = (levels(q)[codes.long()].reshape(-1, 64) * absmax[:, None]).reshape(32, 96)
    assert torch.equal(vf.dequantize(q), dense)
    assert relative_error(dense, weight) < 0.3  # bitsandbytes is off by more than that where it is wrong
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    assert_close(vf.quantized_linear(q, x), x @ dense.T)


@pytest.mark.parametrize("state", ["fresh", "repacked"])
def test_gradients_behind_a_layer(state):
    base, _ = quantized_layer("nested")
    base = (nn.Sequential(repack(base[0])) if state == "repacked" else base).eval()
    two = vf.adapt(nn.Sequential(nn.Linear(128, 128), base[0]), vf.VeraConfig(r=4, target_modules=["0", "1"]))
    params = randomized(two.params, scale=0.5)
    weight = vf.dequantize(vf.from_bnb(base[0])[0])
    first = two.apply.model[0]

    def by_hand(params):
        layer = lambda i: {leaf: params[f"{i}.{leaf}"] for leaf in ("lambda_b", "lambda_d")}
        hidden = dense_forward(layer(0), two.frozen, WIDE, first.weight, first.bias)
        return dense_forward(layer(1), two.frozen, hidden, weight, base[0].bias).square().sum()

    actual = grad(lambda p: two.apply(p, two.frozen, WIDE).square().sum())(params)
    for key, expected in grad(by_hand)(params).items():
        assert expected.abs().max() > 0
        assert relative_error(actual[key], expected) < 1e-4, key


def test_statistics_after_a_state_dict():
    base, each = quantized_layer("nested")
    q, _ = vf.from_bnb(base[0])
    base.eval()
    outputs(each, WIDE)
    base.state_dict()
    again, _ = vf.from_bnb(base[0])
    assert torch.equal(again.absmax, q.absmax)
    assert torch.equal(again.nested.scale, q.nested.scale)
    assert torch.equal(vf.dequantize(again), vf.dequantize(q))


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_the_first_call_decides_nothing(first):
    base, each = quantized_layer("nf4")
    outputs(each, WIDE.to(first))
    fresh_base, fresh = quantized_layer("nf4")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(outputs(each, WIDE.to(dtype)), outputs(fresh, WIDE.to(dtype)))
    assert base[0].bias.dtype == fresh_base[0].bias.dtype == torch.float32
    assert base[0].compute_dtype is None


def test_eight_bits_in_training_and_not():
    base, _ = quantized_layer("int8")
    y = [outputs(adapted(mode, "0"), WIDE) for mode in (base.train(), base.eval(), base.train())]
    assert torch.equal(y[0], y[1])
    assert torch.equal(y[0], y[2])
    assert_close(y[0], oracle(adapted(base, "0"), base, WIDE), rtol=1e-4, atol=1e-4)


def test_nothing_is_logged(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for name in ("nf4", "int8"):
        base, _ = quantized_layer(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs(adapted(base.eval(), "0"), WIDE)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["nf4", "nested", "int8"])
def test_forward_derivatives(name):
    base, each = quantized_layer(name)
    f = lambda x: outputs(each, x)
    _, tangent = jvp(f, (WIDE,), (torch.ones_like(WIDE),))
    _, expected = jvp(lambda x: oracle(each, base, x), (WIDE,), (torch.ones_like(WIDE),))
    assert expected.abs().max() > 1
    assert_close(tangent, expected, rtol=1e-4, atol=1e-4)
    if name != "int8":  # bitsandbytes' own: zeros
        module = bnb.nn.Linear4bit(128, 96, quant_type="nf4").to("cpu").train()
        assert not jvp(module, (WIDE,), (torch.ones_like(WIDE),))[1].any()


def test_forward_derivatives_of_forward_derivatives():
    apply, params, frozen, _ = adapted(quantized_layer("nf4")[0], "0")
    along = {key: torch.full_like(leaf, 0.1) for key, leaf in params.items()}

    def loss(params):
        return apply(params, frozen, WIDE).square().sum()

    slope = lambda params: jvp(loss, (params,), (along,))[1]
    forward, reverse = jvp(slope, (params,), (along,))[1], grad(slope)(params)
    assert_close(forward, sum((reverse[key] * along[key]).sum() for key in params), rtol=1e-4, atol=1e-4)


def test_scales_that_end_too_early():
    q = vf.quantize_4bit(torch.randn(32, 64))
    lying = vf.Quantized4bit(q.packed, q.absmax[:1].clone(), None, (32, 64), torch.float32, "nf4", 64)
    with pytest.raises(ValueError, match=r"absmax must have shape \(32,\)"):
        vf.dequantize(lying)


def test_a_tensor_without_data():
    frozen = {key: value.to("meta") for key, value in vf.init_projections(4, 7, 5).items()}
    with pytest.raises(ValueError, match="vera_A is on meta, vera_B on meta, lambda_b on cpu and lambda_d on cpu"):
        vf.vera_forward(vf.init_params(4, 5), frozen, X, nn.Linear(7, 5))


# -------------------------------------------------------------------------------------------------------- the table


def test_the_table_names_every_test():
    rows = [line for line in __doc__.splitlines() if line.startswith("|")][2:]
    named = [re.search(r"`(test_\w+)` \|$", row) for row in rows]
    assert all(named), [row for row, name in zip(rows, named, strict=True) if not name]
    names = [match[1] for match in named]
    here = {name for name in globals() if name.startswith("test_")} - {"test_the_table_names_every_test"}
    assert sorted(names) == sorted(here)
