"""The shells: thin modules over the pure functions, over every kind of base layer."""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn, ones
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import vera_func as vf
from vera_func.model.base_layers import QuantizedLinear
from vera_func.model.layers import Projections, frozen_layer, layer_class, layer_sizes

from helpers import FORMATS, QUANTIZERS, R, randomized, relative_error, row, snapshot
from refused import NAN, Q4, Refused


# Whole blocks of 32 rows, which bitsandbytes' repacking on some CPUs needs; in and out differ.
OUT, IN = 96, 64
LAYERS = ["dense", "conv1d", *FORMATS]


def base_layer(name, bias=True):
    """The layer as a user has it: `nn.Linear`, `Conv1D` or a bitsandbytes module, in training mode."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator) / 8
    values = torch.randn(OUT, generator=generator)
    if name == "conv1d":
        layer = Conv1D(OUT, IN)
        layer.weight.data, layer.bias.data = weight.t().contiguous(), values
        return layer
    if name in FORMATS:
        return vf.to_bnb(FORMATS[name](weight), values if bias else None)
    layer = nn.Linear(IN, OUT, bias)
    layer.weight.data = weight
    if bias:
        layer.bias.data = values
    return layer


def weight_of(layer):
    """The dense weight in the layer's own layout."""
    if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
        return vf.dequantize(vf.from_bnb(layer)[0])
    return layer.weight.detach()


def projections():
    # Wider than the layer, as when another layer is wider.
    return vf.init_projections(R, IN + 2, OUT + 3)


def make_shell(layer, *, trained=True, **options):
    shell = layer_class(layer)(layer, "default", **projections(), r=R, **options)
    if trained:
        values = randomized({"lambda_b": shell.lambda_b.detach(), "lambda_d": shell.lambda_d.detach()}, scale=1.0)
        shell.lambda_b.data, shell.lambda_d.data = values["lambda_b"], values["lambda_d"]
    return shell


def inputs(*lead, seed=3):
    return torch.randn(*lead, IN, generator=torch.Generator().manual_seed(seed))


EXPECTED = {
    "dense": vf.Linear,
    "conv1d": vf.Linear,
    "int8": vf.Linear8bitLt,
    **dict.fromkeys([name for name in FORMATS if name != "int8"], vf.Linear4bit),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_class_follows_from_the_base(name):
    layer = base_layer(name)
    assert layer_class(layer) is layer_class(frozen_layer(layer)) is EXPECTED[name]
    assert layer_sizes(frozen_layer(layer)) == (IN, OUT)


@pytest.mark.parametrize("name", LAYERS)
def test_a_new_shell_is_its_base(name):
    layer = base_layer(name)
    x = inputs(3)
    assert relative_error(make_shell(layer, trained=False, d_initial=0.5)(x), layer(x)) <= 1e-6
    shell = make_shell(layer, trained=False, d_initial=0.5)
    assert (shell.lambda_d == 0.5).all()
    assert (shell.lambda_b == 0).all()
    assert_close(make_shell(layer, trained=False).lambda_d, torch.full_like(shell.lambda_d, 0.1))


@pytest.mark.parametrize("name", LAYERS)
def test_adds_the_delta_weight(name):
    layer = base_layer(name)
    shell = make_shell(layer)
    delta = shell.get_delta_weight("default")
    assert delta.shape == weight_of(layer).shape
    x = inputs(2, 3)
    delta = delta.t() if name == "conv1d" else delta
    assert_close(shell(x) - layer(x), x @ delta.t(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has the adapter 'default', not 'other'"):
        shell.get_delta_weight("other")


@pytest.mark.parametrize("name", LAYERS)
def test_is_the_layer_of_peft(name):
    layer = base_layer(name)
    config = peft.VeraConfig(r=R, target_modules=["layer"], fan_in_fan_out=name == "conv1d")
    theirs = (
        peft.get_peft_model(nn.ModuleDict({"layer": copy.deepcopy(layer)}), config).train().base_model.model["layer"]
    )
    shell = layer_class(layer)(layer, "default", **vf.init_projections(R, IN, OUT), r=R)
    values = randomized({"lambda_b": shell.lambda_b.detach(), "lambda_d": shell.lambda_d.detach()}, scale=1.0)
    for key, value in values.items():
        getattr(shell, key).data = value
        getattr(theirs, f"vera_{key}")["default"].data = value.clone()
    x = inputs(3)
    assert relative_error(shell(x), theirs(x)) <= 1e-6
    assert relative_error(shell.get_delta_weight("default"), theirs.get_delta_weight("default")) <= 1e-6
    shell(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for key in values:
        assert relative_error(getattr(shell, key).grad, getattr(theirs, f"vera_{key}")["default"].grad) <= 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_through_a_shell(name):
    shell = make_shell(base_layer(name)).requires_grad_(False)
    params = {"lambda_b": shell.lambda_b, "lambda_d": shell.lambda_d}
    stacked = vf.stack_adapters([randomized(params, seed) for seed in range(3)])
    x = inputs(5)

    def loss(p):
        return functional_call(shell, p, x).square().sum()

    gradients = vmap(grad(loss))(stacked)
    for i in range(3):
        leaves = {key: value.clone().requires_grad_() for key, value in row(stacked, i).items()}
        loss(leaves).backward()
        assert_close(row(gradients, i), {key: leaf.grad for key, leaf in leaves.items()}, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_the_base_is_read_and_not_changed(name):
    layer = base_layer(name).eval()
    before = snapshot(vf.from_bnb(layer)[0])[0]
    make_shell(layer)(inputs(3))
    after = vf.from_bnb(layer)[0]
    assert not getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)
    assert torch.equal(vf.dequantize(before), vf.dequantize(after))


@pytest.mark.parametrize("form", ["tensors", "mappings", "BufferDict of PEFT"])
def test_projections_come_as_tensors_or_by_adapter(form):
    frozen = projections()
    A, B = frozen["vera_A"], frozen["vera_B"]
    other = torch.zeros(1, 1)
    if form == "mappings":
        A, B = {"other": other, "default": A}, {"other": other, "default": B}
    elif form == "BufferDict of PEFT":
        config = peft.VeraConfig(r=R, target_modules=["0"])
        theirs = peft.get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config).base_model
        A, B = theirs.vera_A, theirs.vera_B
        frozen = vf.init_projections(R, IN, OUT)
    shell = vf.Linear(base_layer("dense"), "default", A, B, R)
    assert torch.equal(shell.projections.vera_A, frozen["vera_A"])
    assert torch.equal(shell.projections.vera_B, frozen["vera_B"])


def test_projections_are_shared_and_in_no_state_dict():
    frozen = projections()
    shells = nn.ModuleList(
        vf.Linear(nn.Linear(IN, OUT), "default", frozen["vera_A"], frozen["vera_B"], R) for _ in range(3)
    )
    for shell in shells:
        assert shell.projections.vera_A.data_ptr() == frozen["vera_A"].data_ptr()
        assert shell.projections.vera_B.data_ptr() == frozen["vera_B"].data_ptr()
    assert len({shell.lambda_b.data_ptr() for shell in shells}) == 3
    state = shells.state_dict()
    assert not [key for key in state if "vera_" in key or "projections" in key or "mixture" in key]
    assert {key for key in state if key.startswith("0.")} == {
        "0.lambda_b", "0.lambda_d", "0.base_layer.weight", "0.base_layer.bias",
    }  # fmt: skip
    assert not Projections(frozen["vera_A"], frozen["vera_B"]).state_dict()


def test_only_the_vectors_are_trained():
    shell = make_shell(base_layer("nf4"))
    assert {key for key, p in shell.named_parameters() if p.requires_grad} == {"lambda_b", "lambda_d"}
    assert not shell.projections.vera_A.requires_grad
    assert set(shell.state_dict()) == {"lambda_b", "lambda_d", "base_layer.bias"}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_cast_leaves_the_quantized_weight_alone(name, cast):
    # A statistic in 16 bits would be another weight.
    shell = make_shell(base_layer(name))
    before = copy.deepcopy(shell.base_layer.quantized)
    shell = cast(shell)
    after = shell.base_layer.quantized
    leaves = [torch.utils._pytree.tree_leaves(q) for q in (before, after)]
    for old, new in zip(*leaves, strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(old, new)
    assert shell.lambda_b.dtype != torch.float32
    x = inputs(3).to(shell.lambda_b.dtype)
    assert shell(x).dtype == x.dtype
    assert relative_error(shell.base_layer(x).float(), base_layer(name)(inputs(3))) <= 2e-2


def test_a_copy_of_a_shell_is_a_shell():
    shell = make_shell(base_layer("nested"))
    other = copy.deepcopy(shell)
    x = inputs(3)
    assert torch.equal(other(x), shell(x))
    with torch.no_grad():
        other.lambda_b.zero_()
    assert not torch.equal(other(x), shell(x))


def test_dropout_needs_a_generator():
    shell = make_shell(base_layer("dense"), vera_dropout=0.5).train()
    x = inputs(200)
    plain = shell(x)
    assert torch.equal(plain, make_shell(base_layer("dense"))(x))  # training mode alone drops nothing
    base = shell.base_layer(x)
    shell.generator = torch.Generator().manual_seed(0)
    first, second = shell(x), shell(x)
    assert not torch.equal(first, second)
    shell.generator = torch.Generator().manual_seed(0)
    assert torch.equal(shell(x), first)
    # The base sees the whole input: where the update is zero, nothing changes.
    with torch.no_grad():
        shell.lambda_b.zero_()
    assert torch.equal(shell(x), base)


def test_dropout_keeps_the_mean():
    shell = make_shell(base_layer("dense"), vera_dropout=0.25)
    x = inputs(1)
    update = shell(x) - shell.base_layer(x)
    shell.generator = torch.Generator().manual_seed(0)
    many = shell(x.expand(20_000, IN)) - shell.base_layer(x)
    assert_close(many.mean(0, keepdim=True), update, rtol=0, atol=0.05 * update.abs().max().item())


@pytest.mark.parametrize(
    ("shell", "name", "needed"),
    [
        (vf.Linear, "nf4", "adapt a Linear4bit; use vf.Linear4bit"),
        (vf.Linear, "int8", "adapt a Linear8bitLt; use vf.Linear8bitLt"),
        (vf.Linear4bit, "dense", "use vf.Linear"),
        (vf.Linear4bit, "int8", "adapt a Linear8bitLt; use vf.Linear8bitLt"),
        (vf.Linear8bitLt, "fp4", "adapt a Linear4bit; use vf.Linear4bit"),
        (vf.Linear8bitLt, "conv1d", "adapt a Conv1D; use vf.Linear"),
    ],
)
def test_the_wrong_shell(shell, name, needed):
    with pytest.raises(ValueError, match=needed):
        shell(base_layer(name), "default", **projections(), r=R)


@pytest.mark.parametrize("layer", [nn.Embedding(3, 5), nn.Conv1d(3, 5, 1), nn.LayerNorm(3), nn.Bilinear(3, 3, 5)])
def test_a_layer_that_has_no_shell(layer):
    with pytest.raises(ValueError, match=f"a {type(layer).__name__} cannot be adapted: pass an nn.Linear"):
        vf.Linear(layer, "default", **projections(), r=R)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": R + 1}, rf"at rank {R + 1}, a layer {IN} -> {OUT} needs vera_A"),
        ({"vera_A": torch.ones(R, IN - 1)}, rf"vera_A of shape \({R}, >= {IN}\), got \({R}, {IN - 1}\)"),
        ({"vera_B": torch.ones(OUT - 1, R)}, rf"vera_B of shape \(>= {OUT}, {R}\), got \({OUT - 1}, {R}\)"),
        ({"vera_B": torch.ones(OUT, R + 1)}, rf"vera_B .* got \({OUT}, {R + 1}\)"),
        ({"vera_dropout": 1.0}, "vera_dropout must be at least 0 and below 1"),
        ({"vera_dropout": -0.1}, "vera_dropout must be at least 0 and below 1"),
    ],
)
@pytest.mark.parametrize("name", ["dense", "nf4", "int8"])
def test_what_does_not_fit(name, change, message):
    with pytest.raises(ValueError, match=message):
        layer_class(base_layer(name))(base_layer(name), "default", **(projections() | {"r": R} | change))


# --------------------------------------------------------------------------------------------- the frozen layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_linear_is_the_layer_of_bitsandbytes(name, bias):
    layer = base_layer(name, bias)
    frozen = frozen_layer(layer)
    assert isinstance(frozen, QuantizedLinear)
    assert (frozen.bias is not None) == bias
    assert relative_error(frozen(inputs(2, 3)), layer(inputs(2, 3))) <= 1e-6


def test_other_layers_stay_what_they_are():
    for layer in (nn.Linear(3, 2), Conv1D(2, 3), nn.LayerNorm(3)):
        assert frozen_layer(layer) is layer


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_bias_for_each_row(name):
    frozen = frozen_layer(base_layer(name))
    x = inputs(4, 3)
    biases = torch.randn(4, OUT, generator=torch.Generator().manual_seed(0))
    rows = functional_call(frozen, {"bias": biases}, x)
    for i in range(4):
        assert_close(rows[i], functional_call(frozen, {"bias": biases[i]}, x[i]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=rf"bias \(4, {OUT}\).*x \(5, 3, {IN}\)"):
        functional_call(frozen, {"bias": biases}, inputs(5, 3))


def test_int8_activations_are_asked_for():
    layer = base_layer("int8")
    exact = QuantizedLinear(*vf.from_bnb(layer))(inputs(3))
    rounded = QuantizedLinear(*vf.from_bnb(layer), int8_activations=True)(inputs(3))
    assert 1e-4 < relative_error(rounded, exact) < 5e-2


# ------------------------------------------------------------------------------------- torch's idiom for ensembles


@pytest.mark.parametrize("skeleton", ["meta", "own"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_stack_of_layers_copies_no_constants(name, skeleton):
    """`torch.func.stack_module_state`, as its documentation has it: the stateless module is moved to meta."""
    layers = [make_shell(base_layer(name)) for _ in range(3)]
    for seed, layer in enumerate(layers):
        for key, value in randomized(dict(layer.named_parameters()), seed, scale=0.5).items():
            layer.get_parameter(key).data = value.detach()
    params, buffers = stack_module_state(layers)
    assert buffers == {}
    vectors = {"lambda_b", "lambda_d", "base_layer.bias"}
    assert params.keys() == vectors | (set() if name in FORMATS else {"base_layer.weight"})
    assert all(params[key].dim() == 2 for key in vectors)
    base = copy.deepcopy(layers[0])
    base = base.to("meta") if skeleton == "meta" else base
    call = lambda params, x: functional_call(base, (params, buffers), (x,))
    x = inputs(5)
    expected = torch.stack([layer(x) for layer in layers])
    assert_close(vmap(call, (0, None))(params, x), expected, rtol=1e-5, atol=1e-4)
    loss = lambda params, x: call(params, x).square().sum()
    gradients = vmap(grad(loss), (0, None))(params, x)
    for i, layer in enumerate(layers):
        layer(x).square().sum().backward()
        for key in ("lambda_b", "lambda_d"):
            assert_close(gradients[key][i], layer.get_parameter(key).grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["dense", "nested"])
def test_moving_a_layer_moves_its_constants(name):
    layer = make_shell(base_layer(name))
    A, x = layer.projections.vera_A, inputs(3)
    expected = layer(x)
    layer.to("cpu")
    assert layer.projections.vera_A is A
    layer.double()
    assert layer.projections.vera_A.dtype == torch.float64
    assert relative_error(layer(x.double()), expected.double()) < 1e-6
    layer.to_empty(device="cpu")  # forgets what is trained, but no constant
    assert torch.equal(layer.projections.vera_A, A.double())


# What is refused

bad = Refused()


def shell(kind="Linear", base=None, A=None, B=None, r=4, **options):
    base = nn.Linear(7, 5) if base is None else base
    return getattr(vf, kind)(base, "a", ones(4, 7) if A is None else A, ones(5, 4) if B is None else B, r, **options)


bad("Linear", "a 4-bit layer", lambda _: shell(base=vf.to_bnb(Q4)), "use vf.Linear4bit")
bad("Linear4bit", "a dense layer", lambda _: shell("Linear4bit"), "use vf.Linear")
bad("Linear8bitLt", "a 4-bit layer", lambda _: shell("Linear8bitLt", vf.to_bnb(Q4)), "use vf.Linear4bit")
bad("Linear", "a convolution", lambda _: shell(base=nn.Conv1d(2, 3, 1)), "a Conv1d cannot be adapted")
bad("Linear", "r=0", lambda _: shell(r=0, A=ones(0, 7), B=ones(5, 0)), "r must be a positive integer, got 0")
bad("Linear", "another rank", lambda _: shell(r=5), r"at rank 5, a layer 7 -> 5 needs vera_A .* got \(4, 7\)")
bad("Linear", "a flat A", lambda _: shell(A=ones(4)), r"vera_A .* got \(4,\)")
bad("Linear", "dropout=1", lambda _: shell(vera_dropout=1.0), "vera_dropout must be at least 0 and below 1")
bad("Linear", "dropout of NaN", lambda _: shell(vera_dropout=NAN), "vera_dropout must be at least 0 and below 1")
bad("Linear", "d of NaN", lambda _: shell(d_initial=NAN), "d_initial must be finite")
bad("Linear", "the delta of another", lambda _: shell().get_delta_weight("b"), "has the adapter 'a', not 'b'")
bad("Linear", "projections of another", lambda _: shell(A={"b": ones(4, 7)}), "'a'", KeyError)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
