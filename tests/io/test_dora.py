"""DVoRA in files: loaded as it was saved, refused by PEFT, in banks and model cards."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vera_func as vf
from vera_func.io.card import card_text
from vera_func.model.dora import keep_norm_statistics

from helpers import assert_near, assert_same, llama, logits, quantized, randomized, several, small, tokens
from refused import ADAPTED, FROZEN, Refused, small_model


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DORA = vf.adapt(small_model(), vf.VeraConfig(r=4, target_modules=["0", "2"], use_dora=True))
DORA = DORA._replace(params=randomized(DORA.params))


@pytest.mark.parametrize("fields", [{}, {"differentiate_norm": True, "save_projection": False}], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_loads_what_was_saved(base, fields, tmp_path):
    model = quantized(llama(), base)
    config = vf.VeraConfig(r=8, target_modules=["q_proj"], use_dora=True, **fields)
    adapted = vf.adapt(model, config)
    adapted = adapted._replace(params=randomized(adapted.params))
    vf.save_adapter(tmp_path, *adapted[1:])
    loaded = vf.load_adapter(tmp_path, model)
    assert loaded.config == adapted.config
    assert list(loaded.params) == list(adapted.params)
    assert_same(loaded.params, adapted.params)
    out = loaded.apply(loaded.params, loaded.frozen, input_ids=tokens())
    assert torch.equal(logits(out), logits(adapted.apply(adapted.params, adapted.frozen, input_ids=tokens())))


def test_norm_statistics_are_not_stored(tmp_path):
    model = small_model()
    apply, params, frozen, config = vf.adapt(model, vf.VeraConfig(r=4, target_modules=["0", "2"], use_dora=True))
    kept = keep_norm_statistics(apply, frozen)
    folder, bank = vf.save_adapter(tmp_path / "one", params, kept, config), tmp_path / "bank.safetensors"
    vf.save_bank(bank, vf.stack_adapters([params] * 2), kept, config, ["a", "b"])
    with pytest.warns(UserWarning, match="a server may refuse this LoRA"):
        vf.export_lora(tmp_path / "lora", params, kept, config, model)
    for loaded in (vf.load_adapter(folder, model).frozen, vf.open_bank(bank).adapted(model, ["a"]).frozen):
        assert_same(loaded, dict(frozen))


def test_magnitudes_are_not_rounded_to_sixteen_bits(tmp_path):
    vf.save_adapter(tmp_path, *DORA[1:])
    loaded = vf.load_adapter(tmp_path, small_model(), dtype=torch.bfloat16)
    assert loaded.params["0.lambda_d"].dtype == torch.bfloat16
    assert_same(loaded.params["0.magnitude"], DORA.params["0.magnitude"])


def test_peft_refuses_it(tmp_path):
    vf.save_adapter(tmp_path, *DORA[1:])
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert (fields["peft_type"], fields["use_dora"], fields["differentiate_norm"]) == ("DVERA", True, False)
    with pytest.raises(KeyError, match="DVERA"):
        peft.PeftModel.from_pretrained(small_model(), tmp_path)


def test_files_of_vera_are_as_before(tmp_path):
    vf.save_adapter(tmp_path, *ADAPTED[1:])
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["peft_type"] == "VERA"
    assert not {"use_dora", "differentiate_norm"} & fields.keys()


def test_banks(tmp_path):
    adapted = small(use_dora=True)
    stacked = several(adapted)
    path = vf.save_bank(tmp_path / "bank", stacked, adapted.frozen, adapted.config, ["a", "b", "c", "d"])
    bank = vf.open_bank(path)
    assert_same(bank.read(["c", "a"]), {key: value[[2, 0]] for key, value in stacked.items()})
    loaded, x = bank.adapted(adapted.apply.model), torch.ones(4, 7)
    assert_near(loaded.apply(loaded.params, loaded.frozen, x), adapted.apply(stacked, adapted.frozen, x))


def test_a_module_saves_it(tmp_path):
    model = llama()
    adapted = vf.adapt(model, vf.VeraConfig(r=8, target_modules=["q_proj"], use_dora=True))
    params = randomized(adapted.params)
    vf.to_module(adapted._replace(params=params)).save_pretrained(tmp_path)
    assert_same(vf.load_adapter(tmp_path, model).params, params)


def test_its_card_does_not_promise_peft():
    text = card_text(DORA.params, DORA.config)
    assert "PeftModel" not in text
    assert 'library_name: "vera_func"' in text
    assert "| method | DVoRA |" in text
    assert "PeftModel" in card_text(ADAPTED.params, ADAPTED.config)


bad = Refused()


def saved(params=DORA.params, config=DORA.config):
    return lambda folder: vf.save_adapter(folder / "new", params, FROZEN, config)


def damaged(config=(), drop=()):
    def call(folder):
        vf.save_adapter(folder, *DORA[1:])
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | dict(config)))
        save_file({k: v for k, v in load_file(folder / WEIGHTS).items() if k not in drop}, folder / WEIGHTS)
        vf.load_adapter(folder, small_model())

    return call


def bank_without(key):
    def call(folder):
        stacked = {k: v[None] for k, v in DORA.params.items()}
        path = vf.save_bank(folder / "bank", stacked, FROZEN, DORA.config, ["a"])
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({k: v for k, v in load_file(path).items() if k != key}, path, metadata)
        vf.open_bank(path)

    return call


WITHOUT = {key: value for key, value in DORA.params.items() if key != "2.magnitude"}
FOLDED = vf.fold_magnitude(DORA.apply, DORA.params, FROZEN)
PREFIX = "base_model.model."
bad("save_adapter", "no magnitude", saved(WITHOUT), "use_dora is True, but params lacks '2.magnitude'")
bad("save_adapter", "a magnitude of VeRA", saved(config=ADAPTED.config), "use_dora is False, but params has '0.magn")
bad("save_adapter", "folded params", saved(FOLDED), "'0.output_scale' was made by fold_magnitude")
bad(
    "save_adapter",
    "another size",
    saved(DORA.params | {"0.magnitude": torch.ones(4)}),
    r"must have shape \(5,\), the shape of lambda_b",
)
bad("load_adapter", "no magnitude", damaged(drop=[f"{PREFIX}0.vera_magnitude"]), "lacks '0.magnitude'")
bad(
    "load_adapter",
    "a type that contradicts",
    damaged({"use_dora": False}),
    r"'DVERA' \(DVoRA\), which requires use_dora=true, got False",
)
bad(
    "load_adapter",
    "magnitudes of VeRA",
    damaged({"use_dora": False, "peft_type": "VERA"}),
    "magnitude', but the adapted model has no such",
)
bad(
    "open_bank",
    "no magnitude",
    bank_without("0.magnitude"),
    r"'0.magnitude' must have shape \(\d, 5\), the shape of '0.lambda_b', got None",
)
STACK = {key: value[None] for key, value in FOLDED.items()}
bad("save_bank", "folded params", lambda folder: vf.save_bank(
    folder / "new", STACK, FROZEN, DORA.config, ["a"]), "was made by fold_magnitude")  # fmt: skip
bad("export_lora", "folded params", lambda folder: vf.export_lora(
    folder / "lora", FOLDED, FROZEN, DORA.config, small_model()), "was made by fold_magnitude")  # fmt: skip
bad("export_lora", "DVoRA for llama.cpp", lambda folder: vf.export_lora(
    folder / "lora", *DORA[1:], small_model(), format="gguf"), "llama.cpp does not support DoRA")  # fmt: skip


@pytest.mark.parametrize("case", bad.rows)
def test_refuses(case, tmp_path):
    bad.check(case, tmp_path)
