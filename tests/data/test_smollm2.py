"""The demo's model: the cache of its quantized forms, on a tiny model in its place, and the real one."""

import shutil
import sys

import pytest
import torch

from vera_func.data import smollm2
from vera_func.model.convert import quantize_model
from vera_func.quant.bnb import is_bnb_linear

from helpers import assert_same_bits


@pytest.fixture
def cache(tmp_path, folder, monkeypatch):
    """A cache in which a tiny model is the demo's."""
    shutil.copytree(folder, tmp_path / "SmolLM2-135M-Instruct")
    monkeypatch.setenv("VERA_FUNC_CACHE", str(tmp_path))
    return tmp_path


def forms(cache):
    return sorted(file.name for file in cache.glob("*.safetensors"))


def unable(*args, **options):
    raise AssertionError("the model is quantized again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_a_cached_form_is_what_quantizing_gives(cache, monkeypatch, quant, dtype):
    right, _ = smollm2.load_smollm2(dtype, quant)
    (file,) = forms(cache)
    assert file.startswith(f"SmolLM2-135M-Instruct-{quant}-{str(dtype)[6:]}-")
    monkeypatch.setattr(smollm2, "quantize_model", unable)
    model, tokenizer = smollm2.load_smollm2(dtype, quant)
    assert_same_bits(model, right)
    assert not model.training
    assert model.dtype == dtype
    # transformers 5.0 leaves the file's dtype in the configuration of a model that is loaded with another dtype.
    assert model.config.to_dict() | {"dtype": None} == right.config.to_dict() | {"dtype": None}
    assert model.name_or_path == right.name_or_path
    assert model.generation_config.to_dict() == right.generation_config.to_dict()
    assert model.lm_head.weight is not None
    assert tokenizer("joy").input_ids
    dense, _ = smollm2.load_smollm2(dtype)
    assert_same_bits(quantize_model(dense, quant), model)
    assert not any(map(is_bnb_linear, dense.modules()))
    assert forms(cache) == [file]


@pytest.mark.parametrize("how", ["the folder changed", "damaged", "other layers", "another bitsandbytes"])
def test_a_stale_form_is_made_again(cache, monkeypatch, how):
    smollm2.load_smollm2(torch.float32, "nf4")
    (before,) = forms(cache)
    if how == "the folder changed":
        dense, _ = smollm2.load_smollm2(torch.float32)
        with torch.no_grad():
            dense.model.layers[0].mlp.up_proj.weight.mul_(2)
        dense.save_pretrained(cache / "SmolLM2-135M-Instruct")
    elif how == "damaged":
        (cache / before).write_bytes((cache / before).read_bytes()[:5000])
    elif how == "other layers":
        chosen = smollm2.quantizable_layers
        monkeypatch.setattr(
            smollm2, "quantizable_layers", lambda model: {k: v for k, v in chosen(model).items() if "up" not in k}
        )
    else:
        monkeypatch.setattr(smollm2, "version", lambda name: "99.0")
    made = []
    monkeypatch.setattr(smollm2, "quantize_model", lambda *args: made.append(args) or quantize_model(*args))
    model, _ = smollm2.load_smollm2(torch.float32, "nf4")
    assert len(made) == 1
    dense, _ = smollm2.load_smollm2(torch.float32)
    assert_same_bits(model, quantize_model(dense, "nf4"))
    (after,) = forms(cache)
    assert (before != after) == (how in ("the folder changed", "another bitsandbytes"))


def test_a_cache_that_cannot_be_written(cache, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(smollm2, "save_quantized", full)
    model, _ = smollm2.load_smollm2(torch.float32, "nf4")
    assert any(map(is_bnb_linear, model.modules()))
    assert forms(cache) == []


@pytest.mark.network
def test_real_model_is_plain_and_quiet(capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr
    model, tokenizer = smollm2.load_smollm2(torch.bfloat16)
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr)
    assert capfd.readouterr() == ("", "")
    assert not hasattr(model.config, "quantization_config")
    assert {leaf.dtype for leaf in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("Review:").input_ids == [21465, 42]
    # It is a language model, and not random: it continues an easy sentence.
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    cached = [smollm2.load_smollm2(torch.bfloat16, "nf4")[0] for _ in range(2)]
    assert capfd.readouterr() == ("", "")
    assert cached[1].lm_head.weight is cached[1].model.embed_tokens.weight
    for one in cached:
        assert_same_bits(one, quantize_model(model, "nf4"))
