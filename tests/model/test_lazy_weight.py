"""Layers whose weight a model reads instead of calling them: the adapted weight, or an error."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.func import grad, jvp, vmap
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import vera_func as vf
from vera_func.model.lazy_weight import LazyWeight

from helpers import QUANTIZERS, R, normal, randomized, relative_error, tokens


OUT, IN = 96, 64
AUDIO = {
    **{"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
    **{"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
}
MAMBA = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}


class Reader(nn.Module):
    """Reads the weight of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.is_transposed = layer, isinstance(layer, Conv1D)

    def forward(self, x):
        weight = self.layer.weight
        return x @ (weight if self.is_transposed else weight.mT) + self.layer.bias


def reader(base):
    weight, bias = normal(OUT, IN) / 8, normal(OUT, seed=1)
    if base == "conv1d":
        layer = Conv1D(OUT, IN)
        layer.weight.data, layer.bias.data = weight.mT.contiguous(), bias
    elif base == "dense":
        layer = nn.Linear(IN, OUT)
        layer.weight.data, layer.bias.data = weight, bias
    else:
        q = QUANTIZERS[base](weight)
        layer, weight = vf.to_bnb(q, bias), vf.dequantize(q, torch.float32)
    return Reader(layer), weight.double(), bias.double()


def formula(weight, bias, frozen, params, x):
    right = torch.diag(params["layer.lambda_d"]) @ frozen["vera_A"]
    weight = weight + torch.diag(params["layer.lambda_b"]) @ frozen["vera_B"] @ right
    if "layer.magnitude" in params:
        weight = weight * (params["layer.magnitude"] / weight.norm(dim=-1).detach())[:, None]
    return x @ weight.mT + bias


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("base", ["dense", "conv1d", *QUANTIZERS])
def test_is_the_adapted_weight(base, use_dora):
    model, weight, bias = reader(base)
    config = vf.VeraConfig(r=R, target_modules=["layer"], use_dora=use_dora)
    apply, params, frozen, _ = vf.adapt(model, config)
    adapters = [randomized(params, seed) for seed in range(3)]
    x = normal(5, IN, seed=2)

    def run(p):
        return apply(p, frozen, x)

    def expected(p):
        double = {name: value.double() for name, value in frozen.items()}
        return formula(weight, bias, double, {key: value.double() for key, value in p.items()}, x.double())

    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    assert_close(run(adapters[0]), expected(adapters[0]), **close)
    squared = lambda f: lambda p: f(p).square().sum()
    assert_close(grad(squared(run))(adapters[0]), grad(squared(expected))(adapters[0]), **close)
    assert_close(vf.grad(squared(run))(adapters[0]), grad(squared(expected))(adapters[0]), **close)
    tangent = (adapters[0],), (adapters[1],)
    assert_close(jvp(run, *tangent)[1], jvp(expected, *tangent)[1], **close)
    stacked = vf.stack_adapters(adapters)
    assert_close(vmap(run)(stacked), torch.stack([expected(p) for p in adapters]), **close)
    merged = vf.merge(model, adapters[0], frozen, torch.float32)
    assert_close(merged(x), expected(adapters[0]), **close)
    assert_close(vf.to_module(vf.Adapted(apply, adapters[0], frozen, config))(x), expected(adapters[0]), **close)
    rows = vf.select_adapters(stacked, [0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match=r"weight of 'layer' without calling"):
        apply(rows, frozen, x)
    with pytest.raises(ValueError, match=r"weight of 'layer' without calling"):
        vf.vmap_adapters(apply, in_dims=None)(stacked, frozen, x)


@pytest.mark.parametrize("base", ["dense", "nested"])
def test_under_the_compiler(base):
    model, *_ = reader(base)
    apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["layer"]))
    params, x = randomized(params), normal(5, IN, seed=2)
    compiled = torch.compile(lambda p: apply(p, frozen, x), fullgraph=True, backend="aot_eager")
    assert_close(compiled(params), apply(params, frozen, x), rtol=1e-5, atol=1e-5)


def test_a_trained_weight_is_adapted_as_well():
    """`bias` and a head in params are the layer's own; here the weight itself is replaced."""
    model, _, bias = reader("dense")
    apply, params, frozen, _ = vf.adapt(model, vf.VeraConfig(r=R, target_modules=["layer"]))
    params, x = randomized(params), normal(5, IN, seed=2)
    own = {"layer.weight": normal(OUT, IN, seed=3)}
    double = [{name: value.double() for name, value in tree.items()} for tree in (frozen, params)]
    expected = formula(own["layer.weight"].double(), bias, *double, x.double())
    assert_close(apply(params | own, frozen, x), expected, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_dtype_device_and_shape_need_no_values(base, monkeypatch):
    model, *_ = reader(base)

    class Casts(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):  # as T5 and its relatives do
            weight = self.layer.weight
            assert isinstance(weight, LazyWeight)
            assert tuple(weight.shape) == (OUT, IN) == tuple(weight.size())
            assert weight.dim() == 2
            assert weight.numel() == OUT * IN
            if weight.dtype not in (x.dtype, torch.int8):
                x = x.to(weight.dtype)
            return self.layer(x.to(weight.device))

    x = normal(5, IN, seed=2)
    casts = Casts(model.layer)
    apply, params, frozen, _ = vf.adapt(casts, vf.VeraConfig(r=R, target_modules=["layer"]))
    params = randomized(params)
    expected = vf.merge(model, params, frozen, torch.float32)(x)
    monkeypatch.setattr("vera_func.model.layers.AdaptedLinear._adapted_weight", None)  # not called
    assert relative_error(apply(params, frozen, x), expected) < 1e-5


@pytest.mark.parametrize("name", ["WavLMModel", "MambaForCausalLM"])
def test_models_that_read_weights(name):
    """WavLM reads the weights of its attention, and Mamba that of `dt_proj`."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(AUDIO if name == "WavLMModel" else MAMBA))).eval()
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"] if name == "WavLMModel" else ["dt_proj"]
    inputs = {"input_values": normal(2, 200)} if name == "WavLMModel" else {"input_ids": tokens(2, 5)}
    for base in (model, vf.quantize_model(model, "nf4")):
        apply, params, frozen, _ = vf.adapt(base, vf.VeraConfig(r=R, target_modules=targets))
        params = randomized(params, scale=3.0)
        dense = vf.dequantize_model(copy.deepcopy(base), torch.float32)
        with torch.no_grad():
            output = apply(params, frozen, **inputs)[0]
            expected = vf.merge(dense, params, frozen)(**inputs)[0]
            effect = relative_error(expected, dense(**inputs)[0])
            assert relative_error(output, expected) < 1e-3 * effect
