"""Adapters as PEFT's LoRA directories: exact, or the best of a smaller rank."""

import copy
import dataclasses

import peft
import pytest
import torch
from torch import nn

import vera_func as vf
from vera_func.io.lora import truncate

from helpers import IDS, MODELS, llama, logits_of, make_adapted, relative_error
from refused import (
    CONFIGURATION,
    FROZEN,
    NAN,
    PARAMS,
    Refused,
    filled,
    small_model,
)


# Trained biases and heads; the warning is tested with the servers' rules.
pytestmark = pytest.mark.filterwarnings("ignore:a server may refuse:UserWarning")


@pytest.mark.parametrize("use_dora", [False, True], ids=["VeRA", "DVoRA"])
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_lora_is_exact(name, base, use_dora, tmp_path):
    model, adapted = make_adapted(name, base, use_dora=use_dora)
    report = vf.export_lora(tmp_path, *adapted[1:], model)
    assert set(report.error.values()) == {0.0}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert theirs.peft_config["default"].use_dora is use_dora
    # In training mode PEFT multiplies by the dequantized weights; there is no dropout left to matter.
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits = theirs.train()(input_ids=IDS).logits
    assert relative_error(logits, logits_of(adapted)) < 1e-5


def test_lora_of_a_smaller_rank(tmp_path):
    model, adapted = make_adapted("llama")
    report = vf.export_lora(tmp_path, *adapted[1:], model, rank=5)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    for name, error in report.error.items():
        layer = theirs.base_model.model.get_submodule(name)
        vectors = {leaf: adapted.params[f"{name}.{leaf}"] for leaf in ("lambda_b", "lambda_d")}
        delta = vf.delta_weight(vectors, adapted.frozen, layer.in_features)
        singular = torch.linalg.svdvals(delta)
        assert error == pytest.approx((singular[5:].norm() / singular.norm()).item(), rel=1e-3)
        actual = ((layer.get_delta_weight("default") - delta).norm() / delta.norm()).item()
        assert actual == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (7, 3, 5, 4), (2, 3, 5, 4), (11, 13, 5, 5)])
def test_truncate_is_the_best_approximation(sizes):
    in_, out, r, rank = sizes
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(r, in_, generator=generator), torch.randn(out, r, generator=generator)
    left, right, error = truncate(A, B, rank)
    assert (left.shape, right.shape) == ((rank, in_), (out, rank))
    S = torch.linalg.svdvals(B @ A)
    assert error == pytest.approx((S[rank:].norm() / S.norm()).item(), abs=1e-5)
    assert ((right @ left - B @ A).norm() / S.norm()).item() == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.9.self_attn.q_proj.lambda_b": torch.ones(64)}, "no linear layer"),
        ({"model.layers.0.self_attn.q_proj.lambda_b": torch.ones(63)}, "needs a lambda_b"),
        ({"model.layers.0.self_attn.q_proj.lambda_b": torch.full((64,), torch.nan)}, "q_proj.lambda_b.*NaN"),
        ({"model.norm.weights": torch.ones(64)}, "not a parameter of the model"),
        ({"model.norm.weight": torch.ones(63)}, r"must have shape \(64,\)"),
    ],
)
def test_params_that_do_not_fit(change, message):
    model, adapted = make_adapted("llama")
    with pytest.raises(ValueError, match=message):
        vf.merge(model, adapted.params | change, adapted.frozen)


def test_sizes_of_a_model_are_checked_before_anything_is_written(tmp_path):
    _, adapted = make_adapted("llama")
    with pytest.raises(ValueError, match="needs a lambda_b"):
        vf.export_lora(tmp_path / "lora", *adapted[1:], llama(hidden_size=128))
    assert not (tmp_path / "lora").exists()


# What is refused

bad = Refused()


def export(folder, params=None, frozen=None, config=None, base=None, **options):
    params, frozen = PARAMS | (params or {}), FROZEN if frozen is None else frozen
    return vf.export_lora(folder / "lora", params, frozen, config or CONFIGURATION, base or small_model(), **options)


for rank in (0, 5, -1, 1.5, "2", True):
    bad(
        "export_lora",
        f"rank={rank!r}",
        lambda t, rank=rank: export(t, rank=rank),
        f"rank must be an integer from 1 to 4.*got {rank!r}",
    )

bad("export_lora", "NaN in the pair", lambda t: export(t, frozen=filled(FROZEN, NAN)), "'vera_A' holds NaN or inf")
bad("export_lora", "a dict for the config", lambda t: export(t, config={"r": 4}), "vera_func's VeraConfig, got dict")
bad(
    "export_lora",
    "the adapter's own folder",
    lambda t: vf.export_lora(
        vf.save_adapter(t / "own", PARAMS, FROZEN, CONFIGURATION), PARAMS, FROZEN, CONFIGURATION, small_model()
    ),
    "own contains a VeRA adapter, which the LoRA would replace",
    FileExistsError,
)
bad("export_lora", "no pair", lambda t: export(t, frozen={}), r"keys 'vera_A' and 'vera_B', got \[\]")
bad(
    "export_lora",
    "a narrow A",
    lambda t: export(t, frozen=vf.init_projections(4, 5, 5)),
    r"vera_A must have at least 7 columns, .* got \(4, 5\)",
)
bad("export_lora", "a short B", lambda t: export(t, frozen=vf.init_projections(4, 7, 3)), "with out <= 3")
bad(
    "export_lora",
    "another rank",
    lambda t: export(t, config=dataclasses.replace(CONFIGURATION, r=2)),
    r"must have shape \(2,\)",
)
bad(
    "export_lora",
    "overflow",
    lambda t: export(t, filled(PARAMS, 1e38), filled(FROZEN, 1e38)),
    "overflow torch.float32",
)
bad(
    "export_lora",
    "another model",
    lambda t: export(t, base=nn.Sequential(nn.Linear(7, 6))),
    "needs a lambda_b of shape .6,.|'2.lambda_b'",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
