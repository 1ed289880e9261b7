"""A live PeftModel taken over: the same bits as through PEFT's files, and nothing about it changes."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import vera_func as vf

from helpers import MODELS, TARGETS, assert_same, exact, llama, quantized, relative_error
from refused import Refused, small_model


IDS = torch.randint(3, 67, (3, 7), generator=torch.Generator().manual_seed(0))


def wrapped(model, *, name="default", seed=1, **fields):
    """The model in a PeftModel, its adapter with something learned, in training mode without dropout of the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of Conv1D's layout, and of projections that are not saved
        peft_model = peft.get_peft_model(model, peft.VeraConfig(**({"r": 8} | fields)), name)
    learn(peft_model, seed)
    return exact(peft_model)


def learn(peft_model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def through_files(peft_model, folder, base, name="default"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        peft_model.save_pretrained(folder, selected_adapters=[name])
    return vf.load_adapter(folder, base, adapter_name=name, dtype=None)


def assert_equal(actual, expected):
    assert actual.params.keys() == expected.params.keys()
    for got, right in ((actual.params, expected.params), (actual.frozen, expected.frozen)):
        for key, value in right.items():
            assert_same(got[key], value)
    for field in (
        "r",
        "bias",
        "modules_to_save",
        "vera_dropout",
        "projection_prng_key",
        "save_projection",
        "task_type",
    ):
        assert getattr(actual.config, field) == getattr(expected.config, field)
    assert {*actual.apply.targets} == {*expected.apply.targets}


CASES = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*layers\.1\..*\.(q|v)_proj"},
    "one layer of each": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "no projections": {"save_projection": False, "projection_prng_key": 3},
    "dropout": {"vera_dropout": 0.25},
    "a head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "biases": {"target_modules": ["q_proj", "o_proj"], "bias": "vera_only"},
    "all biases and a head": {"bias": "all", "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_same_bits_as_through_files(fields, tmp_path):
    base = llama(attention_bias=True, mlp_bias=True)
    before = copy.deepcopy(base)
    peft_model = wrapped(base, **({"target_modules": ["q_proj", "v_proj"]} | fields))
    adapted = vf.from_peft(peft_model)
    expected = through_files(peft_model, tmp_path, before)
    assert_equal(adapted, expected)
    if "vera_dropout" not in fields:
        theirs = peft_model(input_ids=IDS).logits
        assert relative_error(adapted.apply(*adapted[1:3], input_ids=IDS).logits, theirs) < 1e-6
    ours = expected.apply(*expected[1:3], input_ids=IDS).logits
    assert torch.equal(adapted.apply(*adapted[1:3], input_ids=IDS).logits, ours)


@pytest.mark.parametrize(
    ("name", "base"), [("llama", "nested"), ("llama", "int8"), ("gpt2", "dense"), ("gpt2", "nf4"), ("bert", "nf4")]
)
def test_every_base(name, base, tmp_path):
    model = quantized(MODELS[name](), base)
    before = copy.deepcopy(model)
    peft_model = wrapped(model, target_modules=TARGETS[name], bias="vera_only")
    adapted = vf.from_peft(peft_model)
    assert_equal(adapted, through_files(peft_model, tmp_path, before))
    theirs = exact(peft_model)(input_ids=IDS).logits
    assert relative_error(adapted.apply(*adapted[1:3], input_ids=IDS).logits, theirs) < 1e-5


@pytest.mark.parametrize("options", [{"int8_activations": True}, {"product_dtype": torch.bfloat16}], ids=str)
def test_multiplies_as_adapt_does(options):
    model = quantized(llama(), "int8")
    before = copy.deepcopy(model)
    peft_model = wrapped(model, target_modules=["q_proj", "v_proj"])
    adapted = vf.from_peft(peft_model, **options)
    expected = vf.adapt(before, adapted.config, **options).apply(*adapted[1:3], input_ids=IDS).logits
    assert torch.equal(adapted.apply(*adapted[1:3], input_ids=IDS).logits, expected)
    assert not torch.equal(vf.from_peft(peft_model).apply(*adapted[1:3], input_ids=IDS).logits, expected)


def test_heads_of_a_task(tmp_path):
    model = MODELS["bert"]()
    before = copy.deepcopy(model)
    peft_model = wrapped(model, target_modules=["query"], task_type="SEQ_CLS")
    adapted = vf.from_peft(peft_model)
    assert "classifier.weight" in adapted.params
    assert_equal(adapted, through_files(peft_model, tmp_path, before))
    # An adapter that a row leaves out leaves out its head as well: the base has its own.
    base = adapted.apply(vf.select_adapters(vf.stack_adapters([adapted.params]), [-1] * 3), adapted.frozen, IDS)
    assert relative_error(base.logits, before(input_ids=IDS).logits) < 1e-5


def test_dtypes_stay_as_they_are(tmp_path):
    model = llama(torch.bfloat16)
    before = copy.deepcopy(model)
    config = peft.VeraConfig(r=8, target_modules=["q_proj"])
    peft_model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    learn(peft_model, 1)
    adapted = vf.from_peft(peft_model)
    assert {value.dtype for value in (*adapted.params.values(), *adapted.frozen.values())} == {torch.bfloat16}
    assert_equal(adapted, through_files(peft_model, tmp_path, before))


def test_the_active_adapter_or_the_one_that_is_named(tmp_path):
    base = llama()
    before = copy.deepcopy(base)
    peft_model = wrapped(base, target_modules=["q_proj", "v_proj"])
    peft_model.add_adapter("other", peft.VeraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    peft_model.set_adapter("other")
    learn(peft_model, 2)
    for name, adapted in (
        ("other", vf.from_peft(peft_model)),
        ("default", vf.from_peft(peft_model, adapter_name="default")),
    ):
        peft_model.set_adapter(name)
        assert_equal(adapted, through_files(peft_model, tmp_path, before, name))
        theirs = peft_model(input_ids=IDS).logits
        assert relative_error(adapted.apply(*adapted[1:3], input_ids=IDS).logits, theirs) < 1e-6
    assert "lm_head.weight" in vf.from_peft(peft_model, adapter_name="other").params
    assert len(vf.from_peft(peft_model).apply.targets) == 4


def test_the_way_back(tmp_path):
    model = llama()
    before = copy.deepcopy(model)
    peft_model = wrapped(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    vf.save_adapter(tmp_path, *vf.from_peft(peft_model)[1:])
    again = peft.PeftModel.from_pretrained(before, tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, peft_model(input_ids=IDS).logits)


def test_the_peft_model_stays_as_it_is_and_its_training_changes_nothing_here():
    peft_model = wrapped(quantized(llama(), "nf4"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    state = {key: value.clone() for key, value in peft_model.state_dict().items()}
    modules = [(name, id(module)) for name, module in peft_model.named_modules()]
    flags = [parameter.requires_grad for parameter in peft_model.parameters()]
    adapted = vf.from_peft(peft_model)
    kept = {key: value.clone() for key, value in (adapted.params | adapted.frozen).items()}
    vf.value_and_grad(lambda p: adapted.apply(p, adapted.frozen, input_ids=IDS).logits.sum())(adapted.params)
    assert [(name, id(module)) for name, module in peft_model.named_modules()] == modules
    assert [parameter.requires_grad for parameter in peft_model.parameters()] == flags
    for key, value in peft_model.state_dict().items():
        assert_same(value, state[key])
    learn(peft_model, 5)
    peft_model.base_model.vera_A["default"].zero_()
    for key, value in kept.items():
        assert_same((adapted.params | adapted.frozen)[key], value)


def test_layers_that_the_configuration_does_not_name(tmp_path):
    # PEFT can adapt the layers of a state dict, whatever the configuration says.
    model = small_model()
    peft_model = wrapped(model, target_modules=["0"])
    peft_model.peft_config["default"].target_modules = {"2"}
    adapted = vf.from_peft(peft_model)
    assert adapted.config.target_modules == ("0",)
    vf.save_adapter(tmp_path, *adapted[1:])
    assert vf.load_adapter(tmp_path, small_model()).apply.targets == ("0",)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_around_the_peft_model(wrap):
    adapted = vf.from_peft(wrap(wrapped(small_model(), target_modules=["0"])))
    assert list(adapted.params) == ["0.lambda_b", "0.lambda_d"]


def test_disabled_is_not_merged():
    peft_model = wrapped(small_model(), target_modules=["0"])
    with peft_model.disable_adapter():
        adapted = vf.from_peft(peft_model)
    x = torch.ones(2, 7)
    assert torch.equal(adapted.apply(*adapted[1:3], x), peft_model(x))


bad = Refused()


def merged(**how):
    peft_model = wrapped(small_model(), target_modules=["0"])
    peft_model.merge_adapter(**how)
    return peft_model


def two_active():
    peft_model = wrapped(small_model(), target_modules=["0"])
    peft_model.add_adapter("other", peft.VeraConfig(r=8, target_modules=["0"]))
    peft_model.base_model.set_adapter(["default", "other"])
    return peft_model


def lower_rank():
    peft_model = wrapped(small_model(), target_modules=["0"])
    peft_model.add_adapter("other", peft.VeraConfig(r=4, target_modules=["0"]))
    peft_model.set_adapter("other")
    return peft_model


def with_field(**fields):
    peft_model = wrapped(small_model(), target_modules=["0"])
    for key, value in fields.items():
        setattr(peft_model.peft_config["default"], key, value)
    to_dict = peft_model.peft_config["default"].to_dict
    peft_model.peft_config["default"].to_dict = lambda: to_dict() | fields
    return peft_model


def batch_statistics():
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    peft_model = wrapped(model, target_modules=["0"], modules_to_save=["1"])
    peft_model(torch.rand(4, 7))
    return peft_model


def on_meta():
    model = peft.get_peft_model(small_model(), peft.VeraConfig(r=4, target_modules=["0"]), low_cpu_mem_usage=True)
    model.base_model.model[0].vera_lambda_b["default"] = nn.Parameter(torch.empty(5, device="meta"))
    return model


def with_nan():
    peft_model = wrapped(small_model(), target_modules=["0", "2"])
    with torch.no_grad():
        peft_model.base_model.model[0].vera_lambda_d["default"][1] = torch.nan
    return peft_model


def other_projections():
    peft_model = wrapped(small_model(), target_modules=["0", "2"])
    layer = peft_model.base_model.model[2]
    layer.vera_A = copy.deepcopy(layer.vera_A)
    layer.vera_A["default"] += 1
    return peft_model


LORA = peft.LoraConfig(r=2, target_modules=["0"])
bad("from_peft", "a base model", lambda _: vf.from_peft(small_model()), "takes a peft.PeftModel, got Sequential")
bad("from_peft", "no module", lambda _: vf.from_peft(None), "takes a peft.PeftModel, got NoneType")
bad(
    "from_peft",
    "LoRA",
    lambda _: vf.from_peft(peft.get_peft_model(small_model(), LORA)),
    "'default' of .* has the peft_type LORA; only",
)
bad(
    "from_peft",
    "a mixed model",
    lambda _: vf.from_peft(peft.get_peft_model(small_model(), LORA, mixed=True)),
    "takes a peft.PeftModel, got PeftMixedModel",
)
bad(
    "from_peft",
    "an unknown name",
    lambda _: vf.from_peft(wrapped(small_model(), target_modules=["0"]), adapter_name="x"),
    r"no adapter 'x': adapter_name must be one of \['default'\]",
)
bad(
    "from_peft",
    "a list of names",
    lambda _: vf.from_peft(wrapped(small_model(), target_modules=["0"]), adapter_name=["default"]),
    r"no adapter \['default'\]: adapter_name must be one of",
)
bad("from_peft", "NaN", lambda _: vf.from_peft(with_nan()), "'0.lambda_d' of the PeftModel holds NaN or inf")
bad("from_peft", "two active", lambda _: vf.from_peft(two_active()), r"are \['default', 'other'\]: pass adapter_name")
bad(
    "from_peft",
    "a merged adapter",
    lambda _: vf.from_peft(merged()),
    r"has merged .*\['default'\].*unmerge_adapter\(\)",
)
bad("from_peft", "a lower rank", lambda _: vf.from_peft(lower_rank()), "'other' has rank 4, but .* rank 8")
bad(
    "from_peft",
    "a field of the future",
    lambda _: vf.from_peft(with_field(rank_pattern={"0": 3})),
    "field rank_pattern",
)
bad("from_peft", "batch statistics", lambda _: vf.from_peft(batch_statistics()), "buffer 'running_mean' of '1'")
bad("from_peft", "no data", lambda _: vf.from_peft(on_meta()), "'0.lambda_b' .* on the meta device")
bad(
    "from_peft",
    "several projections",
    lambda _: vf.from_peft(other_projections()),
    "'0' and '2' have different projections",
)


@pytest.mark.parametrize("case", bad.rows)
def test_bad_input_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
