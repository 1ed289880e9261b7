"""The servers' own rules, each as its source states it, for what `export_lora` writes."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn

import vera_func as vf
from vera_func.io.servers import check_lora

from helpers import build, randomized
from refused import CONFIGURATION, FROZEN, PARAMS, small_model


def exported(folder, *, r=8, rank=None, **fields):
    """The directory, and the text of the warning, if any."""
    model = nn.Sequential(nn.Linear(700, 600), nn.Tanh(), nn.Linear(600, 3))
    adapted = vf.adapt(model, vf.VeraConfig(r=r, target_modules=["0"], **fields))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = vf.export_lora(folder, *adapted[1:], model, rank=rank).path
    assert all(warning.filename == __file__ for warning in caught)
    (text,) = [str(warning.message) for warning in caught] or [None]
    return path, text


def servers(path):
    return [(refusal.server, refusal.reason) for refusal in check_lora(path)]


@pytest.mark.parametrize(
    ("r", "rank", "reason", "repair"),
    [
        # vLLM: MaxLoRARanks = 1, 8, 16, 32, 64, 128, 256, 320, 512; max_lora_rank = 16 by default.
        (16, None, None, None),
        (17, None, "rank 17 is above its default maximum of 16", "--max-lora-rank 32"),
        (256, None, "rank 256 is above its default maximum of 16", "--max-lora-rank 256"),
        (300, None, "rank 300 is above its default maximum of 16", "--max-lora-rank 320"),
        (513, None, "rank 513 is above its maximum of 512", "rank=512"),
        (513, 16, None, None),
    ],
)
def test_ranks(r, rank, reason, repair, tmp_path):
    path, text = exported(tmp_path, r=r, rank=rank)
    assert servers(path) == ([("vLLM", reason)] if reason else [])
    assert (text is None) == (reason is None)
    assert reason is None or (reason in text and repair in text)


@pytest.mark.parametrize(
    ("fields", "key"), [({"modules_to_save": ["2"]}, "2.bias"), ({"bias": "vera_only"}, "0.base_layer.bias")]
)
def test_trained_heads_and_biases(fields, key, tmp_path):
    path, text = exported(tmp_path, **fields)
    reason = f"a trained head or bias ({key})"
    assert servers(path) == [(server, reason) for server in ("vLLM", "SGLang", "llama.cpp")]
    assert text == f"a server may refuse this LoRA. vLLM, SGLang, llama.cpp: {reason} (merge the adapter)."


def test_what_others_have_written(tmp_path):
    # DoRA, which this library does not export.
    path, _ = exported(tmp_path)
    fields = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(fields | {"use_dora": True}))
    assert servers(path) == [(server, "DoRA") for server in ("vLLM", "SGLang", "llama.cpp")]
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the configuration of a LoRA"):
        check_lora(path)
    (path / "adapter_config.json").write_text(json.dumps(fields))
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="adapter_model"):
        check_lora(path)


def test_the_folder_is_what_the_servers_parse(tmp_path):
    # vllm/lora/utils.py: "base_model.model.{module}.lora_A.weight"; peft_helper.py: required r, lora_alpha, targets.
    adapted = build("llama")
    params = randomized(adapted.params)
    path = vf.export_lora(tmp_path, params, adapted.frozen, adapted.config, adapted.apply.model).path
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert all(name.startswith("base_model.model.model.layers.") for name in shapes)
    assert {name.split(".", 7)[-1] for name in shapes} == {"lora_A.weight", "lora_B.weight"}
    fields = json.loads((path / "adapter_config.json").read_text())
    ranks = {shape[0 if ".lora_A." in name else 1] for name, shape in shapes.items()}
    assert ranks == {fields["r"]} == {fields["lora_alpha"]}
    assert (fields["bias"], fields["modules_to_save"], fields.get("use_dora", False)) == ("none", None, False)
    # SGLang matches the ends of the names.
    assert fields["target_modules"] == ["q_proj", "v_proj"]


def test_ends_of_names_that_other_layers_share_are_not_written(tmp_path):
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(7, 5)}), "b": nn.ModuleDict({"q": nn.Linear(7, 5)})})
    adapted = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["a.q"]))
    vf.export_lora(tmp_path, *adapted[1:], model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a.q"]


def test_the_files_are_whole_where_warnings_are_errors(tmp_path):
    config = dataclasses.replace(CONFIGURATION, modules_to_save=("2",), target_modules=("0",))
    params = {key: value for key, value in PARAMS.items() if key.startswith("0.")} | {"2.weight": torch.ones(3, 5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a server may refuse"):
            vf.export_lora(tmp_path, params, FROZEN, config, small_model())
    assert len(check_lora(tmp_path)) == 3
