"""VeraConfig: each field's values, and PEFT's names and defaults."""

import dataclasses
from pathlib import Path

import peft
import pytest

import vera_func as vf

from helpers import llama
from refused import (
    Refused,
)


# ------------------------------------------------------------------------------------------------------- the fields

WRONG = [
    ("r", 0, "r must be positive, got 0"),
    ("r", -1, "r must be positive, got -1"),
    ("r", 8.0, r"r must be an integer, got 8\.0"),
    ("r", True, "r must be an integer, got True"),
    ("projection_prng_key", "0", "projection_prng_key must be an integer"),
    ("projection_prng_key", None, "projection_prng_key must be an integer"),
    ("save_projection", 1, "save_projection must be True or False, got 1"),
    ("fan_in_fan_out", None, "fan_in_fan_out must be True or False"),
    ("init_weights", "lora", "init_weights must be True or False, got 'lora'"),
    ("vera_dropout", -0.5, r"vera_dropout must be at least 0 and below 1, got -0\.5"),
    ("vera_dropout", 1, "vera_dropout must be at least 0 and below 1"),
    ("vera_dropout", float("nan"), "vera_dropout must be at least 0 and below 1"),
    ("vera_dropout", "0.1", "vera_dropout must be a number"),
    ("d_initial", float("nan"), "d_initial must be finite"),
    ("d_initial", float("-inf"), "d_initial must be finite"),
    ("d_initial", None, "d_initial must be a number"),
    ("bias", "some", "bias must be 'none', 'vera_only' or 'all', got 'some'"),
    ("bias", None, "bias must be"),
    ("task_type", "causal_lm", "task_type must be None or one of"),
    ("target_modules", "(", r"target_modules='\(' is not a regular expression"),
    ("target_modules", [""], "target_modules must contain names only"),
    ("target_modules", [1], r"target_modules must contain names only, got \[1\]"),
    ("modules_to_save", "head", "modules_to_save must be a sequence of names, got the string 'head'"),
    ("layers_to_transform", [1.0], "layers_to_transform must be an integer"),
    ("layers_to_transform", [True], "layers_to_transform must be an integer"),
    ("layers_pattern", "layers", "layers_pattern needs layers_to_transform"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG)
def test_a_wrong_value_names_its_field(field, value, message):
    with pytest.raises(ValueError, match=message):
        vf.VeraConfig(**{field: value})


def test_layers_do_not_apply_to_a_regular_expression():
    with pytest.raises(ValueError, match="layers_to_transform does not apply to a regular expression"):
        vf.VeraConfig(target_modules=r".*q_proj", layers_to_transform=[0])
    # PEFT adapts both layers.
    theirs = peft.VeraConfig(r=2, target_modules=r".*q_proj", layers_to_transform=[0])
    assert len(peft.get_peft_model(llama(), theirs).base_model.targeted_module_names) == 2


OF_DVORA = {"use_dora", "differentiate_norm"}  # which PEFT does not have


def test_fields_and_defaults_are_those_of_peft():
    theirs = {field.name: field for field in dataclasses.fields(peft.VeraConfig)}
    ours, defaults = dataclasses.asdict(vf.VeraConfig()), dataclasses.asdict(peft.VeraConfig())
    assert {name: ours.pop(name) for name in OF_DVORA} == dict.fromkeys(OF_DVORA, False)
    assert ours == {name: defaults[name] for name in ours}
    of_the_file = {"peft_type", "auto_mapping", "peft_version", "inference_mode"}
    assert theirs.keys() - ours.keys() <= of_the_file | {"runtime_config", "target_parameters"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"target_modules": ["b", "a"]}, {"target_modules": ("b", "a")}),
        pytest.param({"target_modules": {"b", "a"}}, {"target_modules": ("a", "b")}, id="a set"),  # in no fixed order
        ({"target_modules": []}, {"target_modules": None}),
        ({"layers_to_transform": 0}, {"layers_to_transform": (0,)}),
        ({"layers_to_transform": []}, {"layers_to_transform": None}),
        ({"layers_to_transform": 0, "layers_pattern": ""}, {"layers_pattern": None}),
        ({"task_type": "SEQ_CLS"}, {"modules_to_save": ("classifier", "score")}),
        (
            {"task_type": "SEQ_CLS", "modules_to_save": ["score", "x"]},
            {"modules_to_save": ("score", "x", "classifier")},
        ),
        ({"task_type": "QUESTION_ANS"}, {"modules_to_save": ("qa_outputs",)}),
        ({"task_type": "CAUSAL_LM"}, {"modules_to_save": None}),
    ],
    ids=str,
)
def test_one_form_of_each_value(given, kept):
    config = vf.VeraConfig(**given)
    assert {name: getattr(config, name) for name in kept} == kept
    assert hash(config) == hash(dataclasses.replace(config))
    assert dataclasses.replace(config) == config


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        vf.VeraConfig().r = 8


# What is refused

bad = Refused()


for field, value, message in (
    ("r", 2**70, "r must be below 2"),
    ("target_modules", 5, "target_modules must be a name or a sequence of names, got 5"),
    ("target_modules", {"q": 1}, "target_modules must be a name or a sequence"),
    ("target_modules", "(a", "not a regular expression"),
    ("modules_to_save", 5, "modules_to_save must be a name or a sequence"),
    ("layers_to_transform", 1.5, "layers_to_transform must be an index or a sequence of indices, got 1.5"),
    ("base_model_name_or_path", 5, "base_model_name_or_path must be a string or None, got 5"),
    ("revision", ["x"], "revision must be a string or None"),
    ("d_initial", 10**400, "d_initial must be finite"),
    ("d_initial", 1e308, "d_initial must be finite in float32"),
    ("vera_dropout", 10**400, "vera_dropout must be at least 0 and below 1"),
    ("bias", ["x_only"], "bias must be"),
    ("bias", Path("x_only"), "bias must be"),
    ("task_type", 5, "task_type must be None or one of"),
):
    bad("VeraConfig", f"{field}={str(value)[:12]}", lambda _, f=field, v=value: vf.VeraConfig(**{f: v}), message)

bad("VeraConfig", "a LoRA field", lambda _: vf.VeraConfig(lora_alpha=8), "lora_alpha", TypeError)
bad(
    "VeraConfig", "layers_pattern=(",
    lambda _: vf.VeraConfig(target_modules=["q"], layers_to_transform=1, layers_pattern="("),
    r"layers_pattern='\(' is not a regular expression",
)  # fmt: skip


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
