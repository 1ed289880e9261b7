"""Quantized models as files: the same bits, whatever they are loaded into, and nothing that a file can break."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM

import vera_func as vf
from vera_func.quant.value import flatten

from helpers import FORMATS, assert_same_bits, bert, gpt2, llama, quantized, quantized_layers, repack, tokens
from refused import RAW, UNREADABLE, Refused


def skeleton(model, quant="nf4", into="meta"):
    """A model of the same configuration without data, or with other data."""
    config = model.config
    if into == "meta":
        with torch.device("meta"):
            return type(model)(config).to(model.dtype).eval()
    torch.manual_seed(7)
    other = type(model)(config).to(model.dtype).eval()
    return quantized(other, quant) if into == "quantized" else other


@pytest.mark.parametrize("into", ["meta", "dense", "quantized"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_model_comes_back_bit_for_bit(tmp_path, name, into):
    model = quantized(llama(), name)
    before = [p.view(torch.uint8).clone() if p.is_floating_point() else p.clone() for p in model.parameters()]
    file = vf.save_quantized(tmp_path / "model.safetensors", model)
    empty = skeleton(model, name, into)
    loaded = vf.load_quantized(file, empty)
    assert_same_bits(loaded, model)
    after = [p.view(torch.uint8) if p.is_floating_point() else p for p in model.parameters()]
    assert all(map(torch.equal, before, after))
    assert all(parameter.is_meta for parameter in empty.parameters()) == (into == "meta")
    adapted = [vf.adapt(one, vf.VeraConfig(r=4, target_modules=["q_proj"])) for one in (model, loaded)]
    logits = [one.apply(one.params, one.frozen, input_ids=tokens()).logits for one in adapted]
    assert torch.equal(*logits)
    out = [one.apply.generate(one.params, one.frozen, tokens(), max_new_tokens=4, do_sample=False) for one in adapted]
    assert torch.equal(*out)


@pytest.mark.parametrize("make", [gpt2, bert])
def test_other_architectures(tmp_path, make):
    """Biases, ties, buffers, layers that are not `nn.Linear`."""
    model = make()
    if make is gpt2:
        model.extra = nn.Linear(64, 64)
    model = quantized(model, "nf4")
    file = vf.save_quantized(tmp_path / "model", model)
    empty = make()
    if make is gpt2:
        empty.extra = nn.Linear(64, 64)
    loaded = vf.load_quantized(file, empty.to("meta"))
    assert_same_bits(loaded, model)
    if make is gpt2:
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert "lm_head.weight" not in load_file(file)


@pytest.mark.parametrize("double_quant", [False, True])
def test_options_of_a_value(tmp_path, double_quant):
    q = vf.quantize_4bit(torch.randn(32, 64), blocksize=128, double_quant=double_quant, compute_dtype=torch.float16)
    eight = dataclasses.replace(vf.quantize_8bit(torch.randn(16, 32)), threshold=6.0)
    model = nn.Sequential(vf.to_bnb(q), nn.Sequential(vf.to_bnb(eight, torch.ones(16))))
    empty = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Sequential(nn.Linear(32, 16))).to("meta")
    loaded = vf.load_quantized(vf.save_quantized(tmp_path / "model", model), empty)
    for got, right in zip(quantized_layers(loaded).values(), quantized_layers(model).values(), strict=True):
        assert flatten(got[0])[1] == flatten(right[0])[1]
    assert not loaded[0].weight.requires_grad


def test_a_layer_that_repacked_itself_is_saved_as_it_reads(tmp_path):
    model = nn.Sequential(vf.to_bnb(vf.quantize_4bit(torch.randn(32, 64))))
    repack(model[0])
    loaded = vf.load_quantized(vf.save_quantized(tmp_path / "model", model), nn.Sequential(nn.Linear(64, 32, False)))
    assert torch.equal(vf.dequantize(vf.from_bnb(loaded[0])[0]), vf.dequantize(vf.from_bnb(model[0])[0]))


def test_modes_and_gradients_are_those_of_the_model_given(tmp_path):
    model = nn.Sequential(vf.to_bnb(vf.quantize_4bit(torch.randn(32, 64))), nn.Linear(32, 2)).eval()
    file = vf.save_quantized(tmp_path / "model", model)
    empty = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 2)).train()
    empty[1].bias.requires_grad_(False)
    loaded = vf.load_quantized(file, empty)
    assert loaded.training
    assert loaded[0].training
    assert [p.requires_grad for p in loaded.parameters()] == [False, True, False]


def test_what_is_loaded_can_be_written_to_and_saved_again(tmp_path):
    model = quantized(llama(), "nf4")
    file = vf.save_quantized(tmp_path / "model", model)
    before = file.read_bytes()
    loaded = vf.load_quantized(file, skeleton(model))
    assert_same_bits(vf.load_quantized(vf.save_quantized(tmp_path / "again", loaded), skeleton(model)), model)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert file.read_bytes() == before
    vf.save_quantized(file, loaded)  # over the file that it is mapped from
    assert_close(vf.load_quantized(file, skeleton(model)).lm_head.weight, torch.zeros(67, 64))
    assert not loaded.lm_head.weight.any()


@pytest.mark.parametrize("how", ["quantize_model", "transformers"])
def test_the_configuration_says_what_is_quantized(tmp_path, how):
    model = vf.quantize_model(llama(), "nf4")
    file = vf.save_quantized(tmp_path / "model", model)
    loaded = vf.load_quantized(file, skeleton(model))
    assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    loaded.save_pretrained(tmp_path / "folder")
    if how == "transformers":
        again = LlamaForCausalLM.from_pretrained(tmp_path / "folder")
        for one, other in zip(quantized_layers(again).values(), quantized_layers(model).values(), strict=True):
            assert torch.equal(vf.dequantize(one[0]), vf.dequantize(other[0]))


def test_tied_where_the_model_is_and_not_in_the_file(tmp_path):
    untied = quantized(gpt2(), "nf4")
    untied.extra = vf.to_bnb(vf.quantize_4bit(torch.ones(64, 64)))
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() + 1)
    file = vf.save_quantized(tmp_path / "model", untied)
    tied = gpt2()
    tied.extra = nn.Linear(64, 64, bias=False)
    with pytest.raises(
        ValueError, match=r"'transformer.wte.weight' and 'lm_head.weight' are stored separately, but are tied"
    ):
        vf.load_quantized(file, tied)


# What is refused

bad = Refused()


def small():
    return nn.Sequential(vf.to_bnb(vf.quantize_4bit(torch.linspace(-1, 1, 2048).reshape(32, 64))), nn.Linear(32, 2))


def dense(out=32, classes=2, **options):
    return nn.Sequential(nn.Linear(64, out, bias=False), nn.Linear(out, classes, **options))


def changed(folder, tensors=None, drop=(), **metadata):
    """A file in which something is different."""
    file = vf.save_quantized(folder / "model", small())
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])["__metadata__"]
    kept = {key: value.clone() for key, value in load_file(file).items() if key not in drop}
    save_file(kept | (tensors or {}), file, header | metadata)
    return vf.load_quantized(file, dense())


def without_data():
    model = small()
    model[1].to("meta")
    return model


def layer(**fields):
    spec = {"shape": [32, 64], "dtype": "float32", "quant_type": "nf4", "blocksize": 64, "compute_dtype": None}
    return json.dumps({"0": {key: value for key, value in (spec | fields).items() if value != "drop"}})


bad("save_quantized", "dense", lambda t: vf.save_quantized(t / "new", dense()), "no quantized layer to save")
bad("save_quantized", "no module", lambda t: vf.save_quantized(t / "new", {}), "model must be an nn.Module, got dict")
bad("save_quantized", "no data", lambda t: vf.save_quantized(t / "new", without_data()), "'1.weight' is on the meta")
bad("save_quantized", "a folder", lambda t: vf.save_quantized(t, small()), "is a folder: pass", IsADirectoryError)
bad("save_quantized", "no folder", lambda t: vf.save_quantized(t / "x" / "y", small()), "y", OSError)
bad("load_quantized", "no file", lambda t: vf.load_quantized(t / "x", dense()), "x", FileNotFoundError)
bad("load_quantized", "a folder", lambda t: vf.load_quantized(t, dense()), "directory", OSError)

for what, content in RAW.items():

    def raw(folder, content=content):
        (folder / "model").write_bytes(content)
        return vf.load_quantized(folder / "model", dense())

    bad("load_quantized", what, raw, f"model ({UNREADABLE}|does not contain a quantized model)")


def another(folder):
    save_file({"a": torch.ones(1)}, folder / "model")
    return vf.load_quantized(folder / "model", dense())


def into(model):
    return lambda t: vf.load_quantized(vf.save_quantized(t / "model", small()), model())


def beside_its_parameters():
    model = dense().to("meta")
    model.table = torch.ones(3, device="meta")
    return model


bad(
    "load_quantized",
    "another file",
    another,
    "does not contain a quantized model: expected a file from vf.save_quantized",
)
bad("load_quantized", "no module for a model", into(dict), "model must be an nn.Module, got dict")
bad(
    "load_quantized",
    "a wider model",
    into(lambda: dense(16)),
    r"layer '0' has shape \(32, 64\), but .* needs shape \(16, 64\)",
)
bad(
    "load_quantized",
    "a longer head",
    into(lambda: dense(classes=3)),
    r"'1.weight' has shape \(2, 32\), but the model needs \(3, 32\)",
)
bad("load_quantized", "no such layer", into(lambda: nn.Sequential(nn.ReLU())), "layer '0' .* has no such linear layer")
bad("load_quantized", "a missing bias", into(lambda: dense(bias=False)), "has '1.bias', but the Sequential has no such")
bad("load_quantized", "a table on meta", into(beside_its_parameters), "'table' of the Sequential is on the meta device")
for what, change, message in (
    ("another version", {"format": "vera_func quantized model 9"}, "does not contain a quantized model"),
    ("no layers", {"layers": "5"}, "'layers' must be a JSON object, got int"),
    ("no JSON", {"layers": "{"}, "is not JSON"),
    ("a list for a layer", {"layers": '{"0": []}'}, "layer '0' is damaged"),
    ("another size", {"layers": layer(shape=[64, 64])}, "layer '0' is damaged: packed"),
    ("a flat shape", {"layers": layer(shape=[64])}, "layer '0' is damaged"),
    ("a negative size of a layer", {"layers": layer(shape=[-32, -64])}, "layer '0' is damaged: shape must be"),
    ("an unknown dtype", {"layers": layer(dtype="nn")}, "layer '0' is damaged: dtype must be the name"),
    ("integers for a dtype", {"layers": layer(dtype="int8")}, "layer '0' is damaged: dtype must be one of"),
    ("an unknown format of a layer", {"layers": layer(quant_type="nf5")}, "layer '0' is damaged: quant_type must be"),
    ("blocks of 3", {"layers": layer(blocksize=3)}, "layer '0' is damaged: blocksize must be"),
    ("a missing field", {"layers": layer(blocksize="drop")}, "layer '0' is damaged"),
    ("an unknown field", {"layers": layer(colour=1)}, "layer '0' is damaged"),
    ("8 bits for 4", {"layers": '{"0": {"shape": [32, 64], "threshold": 0.0}}'}, "layer '0' is damaged"),
    ("a list of aliases", {"aliases": "[]"}, "'aliases' must be a JSON object of names"),
    ("numbers for aliases", {"aliases": '{"a": 5}'}, "'aliases' must be a JSON object of names"),
    ("no layer at all", {"layers": "{}"}, "lacks '0.weight'"),
):
    bad("load_quantized", what, lambda t, c=change: changed(t, **c), message)
for what, tensors, drop, message in (
    ("a missing tensor", {}, ["1.bias"], "lacks '1.bias'"),
    ("no scales", {}, ["0.absmax"], "layer '0' is damaged"),
    ("NaN for a scale", {"0.absmax": torch.full((32,), float("nan"))}, [], "layer '0' is damaged: a scale holds NaN"),
    ("scales in 16 bits", {"0.absmax": torch.ones(32).half()}, [], "layer '0' is damaged: absmax must have"),
    ("an unknown tensor", {"colour": torch.ones(1)}, [], "has 'colour', but the Sequential has no such"),
):
    bad("load_quantized", what, lambda t, c=tensors, d=drop: changed(t, c, d), message)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
