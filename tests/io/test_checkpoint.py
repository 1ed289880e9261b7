"""Files: what is saved is what is loaded, a crash leaves a whole adapter, and a damaged file says what is wrong."""

import json
import os

import peft
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import vera_func as vf

from helpers import llama, randomized, relative_error


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 5), nn.LayerNorm(5)).to(dtype)


def adapter(seed=1, dtype=torch.float32, **fields):
    """`(params, frozen, config)` of something trained, with projections of its own where they are saved."""
    config = vf.VeraConfig(**({"r": 3, "target_modules": ["0", "2"]} | fields))
    _, params, frozen, config = vf.adapt(model(), config, dtype=dtype)
    if config.save_projection:
        frozen = randomized(frozen, seed)
    return randomized(params, seed), frozen, config


def write(folder, **fields):
    """A good adapter to damage."""
    return vf.save_adapter(folder, *adapter(**fields))


def edit_config(folder, **fields):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(folder, change):
    """Apply `change` to the tensors of the file, which is then one as PEFT would have written it."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def content(folder):
    """What the files say; safetensors writes the same metadata in any order."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, file.metadata(), json.loads((folder / CONFIG).read_text())


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value), key


FIELDS = {
    "plain": {},
    "drawn": {"save_projection": False, "projection_prng_key": 5},
    "biases": {"bias": "vera_only"},
    "all biases": {"bias": "all"},
    "a module": {"target_modules": ["0"], "modules_to_save": ["2", "3"]},
    "a regular expression": {"target_modules": "[02]"},
    "everything": {
        "target_modules": ["2"],
        "bias": "all",
        "modules_to_save": ["3"],
        "vera_dropout": 0.25,
        "d_initial": 0.5,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere",
        "revision": "main",
        "fan_in_fan_out": True,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_loads_what_was_saved(fields, dtype, tmp_path):
    params, frozen, config = adapter(dtype=dtype, **fields)
    assert vf.save_adapter(tmp_path / "a" / "b", params, frozen, config) == tmp_path / "a" / "b"
    base = model()
    apply, *loaded = vf.load_adapter(tmp_path / "a" / "b", base, dtype=dtype)
    assert_same(loaded[0], params)
    assert_same(loaded[1], frozen)
    assert loaded[2] == config
    x = torch.ones(2, 7)
    expected = vf.adapt(base, vf.VeraConfig(**({"r": 3, "target_modules": ["0", "2"]} | fields))).apply
    assert torch.equal(apply(*loaded[:2], x), expected(params, frozen, x))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.booleans(), st.sampled_from(["none", "vera_only", "all"]), st.integers(-(2**40), 2**40))
def test_saving_again_writes_the_same(tmp_path_factory, r, save_projection, bias, key):
    folder = tmp_path_factory.mktemp("adapter")
    fields = {"r": r, "save_projection": save_projection, "bias": bias, "projection_prng_key": key}
    vf.save_adapter(folder / "first", *adapter(**fields))
    _, *loaded = vf.load_adapter(folder / "first", model())
    vf.save_adapter(folder / "second", *loaded)
    assert content(folder / "first") == content(folder / "second")


def test_keys_and_shapes_are_those_of_peft(tmp_path):
    write(tmp_path, target_modules=["2"], bias="all", modules_to_save=["3"])
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        assert file.metadata()["format"] == "pt"
    assert shapes == {
        "base_model.vera_A": (3, 13),
        "base_model.vera_B": (5, 3),
        "base_model.model.2.vera_lambda_b": (5,),
        "base_model.model.2.vera_lambda_d": (3,),
        "base_model.model.2.base_layer.bias": (5,),
        "base_model.model.0.bias": (13,),
        "base_model.model.3.weight": (5,),
        "base_model.model.3.bias": (5,),
    }
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert list(fields) == sorted(fields)
    assert (fields["peft_type"], fields["inference_mode"], fields["target_modules"]) == ("VERA", True, ["2"])


def test_a_row_of_a_stack_is_saved_by_itself(tmp_path):
    # safetensors would write a view's whole memory, or refuse it.
    params, frozen, config = adapter()
    row = vf.unstack_adapters(vf.stack_adapters([params] * 50))[3]
    vf.save_adapter(tmp_path / "row", row, frozen, config)
    vf.save_adapter(tmp_path / "own", params, frozen, config)
    assert content(tmp_path / "row") == content(tmp_path / "own")
    assert len((tmp_path / "row" / WEIGHTS).read_bytes()) == len((tmp_path / "own" / WEIGHTS).read_bytes())


def test_what_is_being_trained_is_saved_as_it_is(tmp_path):
    # Leaves of a graph, and a view whose memory is in another order.
    params, frozen, config = adapter()
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    view = {**frozen, "vera_B": frozen["vera_B"].t().contiguous().t()}
    assert not view["vera_B"].is_contiguous()
    vf.save_adapter(tmp_path, leaves, view, config)
    _, loaded, projections, _ = vf.load_adapter(tmp_path, model())
    assert_same(loaded, params)
    assert_same(projections, frozen)


def test_nothing_given_is_changed(tmp_path):
    params, frozen, config = adapter(bias="all")
    before = {key: value.clone() for key, value in (params | frozen).items()}
    base = model()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    vf.save_adapter(tmp_path, params, frozen, config)
    _, loaded, *_ = vf.load_adapter(tmp_path, base)
    for value in loaded.values():
        value.zero_()  # what was loaded shares nothing with the model, nor with the file
    assert_same(params | frozen, before)
    assert_same(dict(base.state_dict()), state)
    assert_same(vf.load_adapter(tmp_path, base).params, params)


def test_own_parameters_come_in_the_dtype_of_the_model(tmp_path):
    write(tmp_path, target_modules=["0"], modules_to_save=["2"])
    _, params, frozen, _ = vf.load_adapter(tmp_path, model(torch.bfloat16))
    assert params["0.lambda_b"].dtype == frozen["vera_A"].dtype == torch.float32
    assert params["2.weight"].dtype == torch.bfloat16


def test_several_adapters_in_one_directory(tmp_path):
    adapters = {name: adapter(seed) for seed, name in enumerate(["default", "other", "default2"])}
    for name, parts in adapters.items():
        vf.save_adapter(tmp_path, *parts, adapter_name=name)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "other", "default2"}
    for name, (params, frozen, _) in adapters.items():
        _, *loaded = vf.load_adapter(tmp_path, model(), adapter_name=name)
        assert_same(loaded[0], params)
        assert_same(loaded[1], frozen)


def test_the_order_of_the_tensors_in_the_file_does_not_matter(tmp_path):
    write(tmp_path)
    before = vf.load_adapter(tmp_path, model()).params
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(dict(reversed(tensors.items())), tmp_path / WEIGHTS)
    assert_same(vf.load_adapter(tmp_path, model()).params, before)


# --------------------------------------------------------------------------------------------------- atomicity


class Crash(BaseException):
    """Not an Exception: nothing may catch it but what cleans up."""


def crash_at(call, monkeypatch):
    """Let the process die in the `call`-th replacement of a file."""
    calls, replace = [], os.replace

    def dying(*args):
        calls.append(args)
        if len(calls) == call:
            raise Crash
        return replace(*args)

    monkeypatch.setattr(os, "replace", dying)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(
    "new",
    [{}, {"r": 2}, {"target_modules": ["0"]}, {"save_projection": False}, {"bias": "all"}, {"modules_to_save": ["3"]}],
    ids=str,
)
def test_a_crash_leaves_the_old_adapter_or_the_new_one(call, new, tmp_path, monkeypatch):
    adapters = {"old": adapter(seed=1), "new": adapter(seed=2, **new)}
    vf.save_adapter(tmp_path, *adapters["old"])
    crash_at(call, monkeypatch)
    with pytest.raises(Crash):
        vf.save_adapter(tmp_path, *adapters["new"])
    assert files(tmp_path).keys() == {WEIGHTS, CONFIG}  # no temporary file is left
    _, *loaded = vf.load_adapter(tmp_path, model())
    params, frozen, config = adapters["old" if call == 1 else "new"]
    assert_same(loaded[0], params)
    assert_same(loaded[1], frozen)
    assert loaded[2] == config


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    write(tmp_path)
    before = files(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        vf.save_adapter(tmp_path, *adapter(seed=2))
    assert files(tmp_path) == before


def test_saving_over_what_peft_wrote(tmp_path, monkeypatch):
    write(tmp_path)
    edit_weights(tmp_path, lambda tensors: None)  # PEFT's file says nothing about its configuration
    crash_at(2, monkeypatch)
    new = adapter(seed=2, r=2)
    with pytest.raises(Crash):
        vf.save_adapter(tmp_path, *new)
    assert_same(vf.load_adapter(tmp_path, model()).params, new[0])


# ------------------------------------------------------------------------------------------------- what is refused


def stacked(params):
    return vf.stack_adapters([params, params])


NOT_SAVED = {
    "stacked": (lambda p, f, c: (stacked(p), f, c), r"'0\.lambda_b' must have shape \(out,\).*unstack_adapters"),
    "stacked lambda_d": (
        lambda p, f, c: (p | {"0.lambda_d": torch.ones(2, 3)}, f, c),
        r"'0\.lambda_d' must have shape \(3,\), got \(2, 3\)",
    ),
    "a sum": (
        lambda p, f, c: (vf.select_adapters(stacked(p), [[0, 1]]), f, c),
        r"'0\.lambda_b' must have|mixture",
    ),
    "a mixture": (
        lambda p, f, c: (p | {"0.mixture": torch.ones(())}, f, c),
        r"'0\.mixture' belongs to a sum",
    ),
    "NaN": (lambda p, f, c: (p | {"2.lambda_b": torch.full((5,), float("nan"))}, f, c), r"'2\.lambda_b' holds NaN"),
    "inf": (lambda p, f, c: (p, f | {"vera_B": f["vera_B"] / 0}, c), "'vera_B' holds NaN or inf"),
    "half a layer": (
        lambda p, f, c: ({k: v for k, v in p.items() if k != "2.lambda_d"}, f, c),
        r"'2\.lambda_b', but lacks '2\.lambda_d'",
    ),
    "nothing": (lambda p, f, c: ({}, f, c), "the 'lambda_b' of at least one layer"),
    **{
        f"inside of a wrapper: {key}": (
            lambda p, f, c, key=key: (p | {key: torch.ones(13)}, f, c),
            f"'{key}' contains the name of a PEFT wrapper",
        )
        for key in ("0.base_layer.bias", "3.base_layer.weight", "3.modules_to_save.bias", "3.original_module.bias")
    },
    "no tensor": (lambda p, f, c: (p | {"2.lambda_b": 1.0}, f, c), r"'2\.lambda_b' must be a tensor, got float"),
    "no projections": (
        lambda p, f, c: (p, {"vera_A": f["vera_A"]}, c),
        r"keys 'vera_A' and 'vera_B', got \['vera_A'\]",
    ),
    "another rank": (lambda p, f, c: (p, vf.init_projections(4, 13, 13), c), r"vera_A must have .* got \(4, 13\)"),
    "narrow projections": (lambda p, f, c: (p, vf.init_projections(3, 13, 4), c), r"'0\.lambda_b' must have .* <= 4"),
    "default targets": (lambda p, f, c: (p, f, vf.VeraConfig(r=3)), "target_modules must be explicit names"),
    "all-linear": (
        lambda p, f, c: (p, f, vf.VeraConfig(r=3, target_modules="All-Linear")),
        "target_modules must be explicit names",
    ),
}


@pytest.mark.parametrize("case", NOT_SAVED)
def test_what_is_not_an_adapter_is_not_saved(case, tmp_path):
    change, message = NOT_SAVED[case]
    with pytest.raises(ValueError, match=message):
        vf.save_adapter(tmp_path / "new", *change(*adapter()))
    assert not (tmp_path / "new").exists()


def test_a_layer_that_is_called_base_layer(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.head = nn.Linear(7, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.base_layer(x))

    config = vf.VeraConfig(r=3, target_modules=["base_layer"], bias="all")
    for module in (Wrapper(), nn.Sequential(Wrapper())):
        adapted = vf.adapt(module, config)
        params = randomized(adapted.params)
        vf.save_adapter(tmp_path, params, *adapted[2:])
        assert_same(vf.load_adapter(tmp_path, module).params, params)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\\b", "a\0"])
def test_names_of_adapters_stay_in_the_directory(name, tmp_path):
    with pytest.raises(ValueError, match="adapter_name must be a valid folder name"):
        vf.save_adapter(tmp_path, *adapter(), adapter_name=name)
    with pytest.raises(ValueError, match="adapter_name must be a valid folder name"):
        vf.load_adapter(tmp_path, model(), adapter_name=name)
    assert not any(tmp_path.iterdir())


def test_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter directory .*nowhere"):
        vf.load_adapter(tmp_path / "nowhere", model())


def test_a_directory_of_named_adapters_says_their_names(tmp_path):
    for name in ("german", "english"):
        vf.save_adapter(tmp_path, *adapter(), adapter_name=name)
    with pytest.raises(FileNotFoundError, match=r"adapters \['english', 'german'\]: pass adapter_name"):
        vf.load_adapter(tmp_path, model())


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_half_a_directory(name, tmp_path):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        vf.load_adapter(tmp_path, model())


def test_a_pickle_is_refused_with_the_way_out(tmp_path):
    write(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    vf.load_adapter(tmp_path, model())  # beside the safetensors file, it does no harm
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin, a pickle.*Convert it.*save_pretrained"):
        vf.load_adapter(tmp_path, model())


def refused(folder, message, base=None):
    """Loading fails with this message, which names the file, and writes nothing."""
    before = files(folder)
    with pytest.raises(ValueError, match=message) as error:
        vf.load_adapter(folder, base or model())
    assert str(folder) in str(error.value)
    assert files(folder) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:40],
        lambda data: data[:-4],
        lambda data: data + b"\0",
        lambda data: b"PK\3\4" + data,
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: b"\2" + b"\0" * 7 + b"[]",
        lambda data: data.replace(b'"F32"', b'"F99"'),
    ],
    ids=["empty", "5 bytes", "header cut", "data cut", "data added", "a zip", "huge header", "a list", "unknown dtype"],
)
def test_damaged_weights(damage, tmp_path):
    file = write(tmp_path) / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    refused(tmp_path, r"adapter_model\.safetensors is not a complete safetensors file")


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    file = write(tmp_path) / WEIGHTS
    data = file.read_bytes()
    for i in range(0, len(data), 7):
        file.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            vf.load_adapter(tmp_path, model())
        except ValueError as error:
            assert WEIGHTS in str(error)  # noqa: PT017 (a flipped byte of a number need not raise)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"peft_type": "VERA", ', "is not JSON"),
        ("\0\1\2", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must contain a JSON object, got list"),
        ("null", "must contain a JSON object, got NoneType"),
        ("{}", "has peft_type None; only 'VERA'"),
        ('{"peft_type": "LORA", "r": 8}', "has peft_type 'LORA'; only 'VERA'"),
    ],
    ids=["empty", "cut", "garbage", "deep", "a list", "null", "no type", "LoRA"],
)
def test_damaged_configuration(text, message, tmp_path):
    write(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    refused(tmp_path, rf"adapter_config\.json {message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be positive"),
        ({"r": "3"}, "r must be an integer, got '3'"),
        ({"r": True}, "r must be an integer, got True"),
        ({"target_modules": 5}, "target_modules|not iterable"),
        ({"target_modules": [5]}, r"target_modules must contain names only, got \[5\]"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be an integer"),
        ({"bias": "some"}, "bias must be"),
        ({"task_type": "GUESSING"}, "task_type must be"),
        ({"vera_dropout": 1.0}, "vera_dropout must be"),
        ({"modules_to_save": "2"}, "modules_to_save must be a sequence"),
        ({"alpha_pattern": {"0": 2}}, r"unknown field alpha_pattern=\{'0': 2\}, which may change"),
        ({"use_dora": True}, "unknown field use_dora=True"),
    ],
    ids=str,
)
def test_a_wrong_field(fields, message, tmp_path):
    write(tmp_path)
    edit_config(tmp_path, **fields)
    refused(tmp_path, rf"adapter_config\.json.*({message})")


def test_fields_that_are_off_or_only_peft_s_are_passed_over(tmp_path):
    write(tmp_path)
    before = vf.load_adapter(tmp_path, model())
    edit_config(
        tmp_path, alpha_pattern={}, exclude_modules=None, use_dora=False, loftq_config="", peft_version="9.9.9",
        auto_mapping={"base_model_class": "Sequential"}, runtime_config={"ephemeral": True},
    )  # fmt: skip
    after = vf.load_adapter(tmp_path, model())
    assert after.config == before.config
    assert_same(after.params, before.params)


def test_what_is_unknown_is_ignored_on_demand(tmp_path):
    write(tmp_path)
    before = vf.load_adapter(tmp_path, model())
    edit_config(tmp_path, use_dora=True, alpha_pattern={"0": 2})
    edit_weights(tmp_path, replaced("base_model.model.0.vera_magnitude", torch.ones(13)))
    with pytest.raises(ValueError, match=r"alpha_pattern=.*pass load_adapter\(\.\.\., ignore_unknown=True\)"):
        vf.load_adapter(tmp_path, model())
    with pytest.warns(UserWarning, match="ignored") as warned:
        after = vf.load_adapter(tmp_path, model(), ignore_unknown=True)
    assert [str(w.message).partition(str(tmp_path))[2].partition(" ")[2] for w in warned] == [
        "has unknown fields, which are ignored: alpha_pattern, use_dora.",
        "has 1 unknown tensors, which are ignored, first '0.magnitude'.",
    ]
    assert all(w.filename == __file__ for w in warned)
    assert after.config == before.config
    assert_same(after.params, before.params)
    assert_same(after.frozen, before.frozen)
    # What is missing or has another shape is an error all the same.
    for change in (
        without("base_model.model.0.vera_lambda_b"),
        replaced("base_model.model.2.vera_lambda_b", torch.ones(4)),
    ):
        edit_weights(tmp_path, change)
        with pytest.raises(ValueError, match="lacks '0"), pytest.warns(UserWarning, match="ignored"):
            vf.load_adapter(tmp_path, model(), ignore_unknown=True)


@pytest.mark.parametrize("ours", [vf.save_adapter, vf.export_lora], ids=["VeRA", "LoRA"])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_auto_classes_of_peft_find_the_base(task_type, ours, tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = vf.adapt(base, vf.VeraConfig(r=3, target_modules=["q_proj"], task_type=task_type))
    adapted = adapted._replace(params=randomized(adapted.params))
    ours(tmp_path / "adapter", *adapted[1:], **({} if ours is vf.save_adapter else {"model": base}))
    auto = peft.AutoPeftModel if task_type is None else peft.AutoPeftModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 12)[None]
    expected = adapted.apply(adapted.params, adapted.frozen, input_ids=ids).logits
    assert relative_error(theirs(input_ids=ids).logits, expected) < 1e-5
    config = vf.open_bank(
        vf.save_bank(tmp_path / "bank.safetensors", vf.stack_adapters([adapted.params]), *adapted[2:], ["a"])
    ).config
    assert config.base_model_name_or_path == str(tmp_path / "base")


def test_layers_that_peft_ignored_are_passed_over(tmp_path):
    # It writes them beside a regular expression, to which it does not apply them.
    write(tmp_path, target_modules="[02]")
    edit_weights(tmp_path, lambda tensors: None)
    before = vf.load_adapter(tmp_path, model()).params
    edit_config(tmp_path, layers_to_transform=[1], layers_pattern="layers")
    assert_same(vf.load_adapter(tmp_path, model()).params, before)


def replaced(name, value):
    return lambda tensors: tensors.update({name: value})


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


LAYER = "base_model.model.2."
DAMAGED_TENSORS = {
    "missing vector": (without(LAYER + "vera_lambda_d"), r"lacks '2\.lambda_d'"),
    "missing layer": (without(LAYER + "vera_lambda_d", LAYER + "vera_lambda_b"), r"lacks '2\.lambda_b'.*2 problems"),
    "another layer": (
        replaced("base_model.model.7.vera_lambda_b", torch.ones(5)),
        r"has '7\.lambda_b', but the adapted model has no such",
    ),
    "a LoRA key": (replaced(LAYER + "lora_A.weight", torch.ones(3, 13)), r"has '2\.lora_A\.weight', but the"),
    "a foreign key": (
        replaced("lm_head.weight", torch.ones(2)),
        "tensor 'lm_head.weight', which does not belong to a VeRA",
    ),
    "lambda_b too long": (replaced(LAYER + "vera_lambda_b", torch.ones(6)), r"'2\.lambda_b' of shape \(6,\).*\(5,\)"),
    "lambda_d of another rank": (
        replaced(LAYER + "vera_lambda_d", torch.ones(4)),
        r"'2\.lambda_d' of shape \(4,\), but .*\(3,\)",
    ),
    "stacked": (replaced(LAYER + "vera_lambda_b", torch.ones(2, 5)), r"'2\.lambda_b' of shape \(2, 5\)"),
    "a scalar": (replaced(LAYER + "vera_lambda_b", torch.ones(())), r"'2\.lambda_b' of shape \(\)"),
    "NaN": (replaced(LAYER + "vera_lambda_b", torch.full((5,), float("nan"))), r"'.*2\.vera_lambda_b' holds NaN"),
    "inf": (
        replaced(LAYER + "vera_lambda_d", torch.full((3,), -float("inf"))),
        r"'.*2\.vera_lambda_d' holds NaN or inf",
    ),
    "NaN in a projection": (replaced("base_model.vera_A", torch.full((3, 13), float("nan"))), r"vera_A' holds NaN"),
    "no projections": (
        without("base_model.vera_A", "base_model.vera_B"),
        "must contain base_model.vera_A and .*got neither",
    ),
    "half the projections": (without("base_model.vera_B"), "must contain .*, got vera_A"),
    "projections of another rank": (replaced("base_model.vera_A", torch.ones(4, 13)), r"vera_A .*got \(4, 13\)"),
    "vera_A too narrow": (replaced("base_model.vera_A", torch.ones(3, 12)), r"vera_A .*\(3, >= 13\), got \(3, 12\)"),
    "vera_B too narrow": (replaced("base_model.vera_B", torch.ones(12, 3)), r"vera_B .*\(>= 13, 3\), got \(12, 3\)"),
    "a flat projection": (replaced("base_model.vera_B", torch.ones(39)), r"vera_B .*got \(39,\)"),
}


@pytest.mark.parametrize("case", DAMAGED_TENSORS)
def test_damaged_tensors(case, tmp_path):
    change, message = DAMAGED_TENSORS[case]
    write(tmp_path)
    edit_weights(tmp_path, change)
    refused(tmp_path, rf"adapter_model\.safetensors.*{message}")


def test_an_adapter_of_another_model(tmp_path):
    write(tmp_path)
    refused(tmp_path, r"adapter_config\.json does not fit this model: .*'model\.layers\.0' is a Llama", llama())
    refused(tmp_path, r"adapter_config\.json does not fit this model: no module matches", nn.Linear(7, 13))
    other = nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 6))
    refused(tmp_path, r"'2\.lambda_b' of shape \(5,\), but this model needs the shape \(6,\)", other)


def test_a_head_that_is_missing(tmp_path):
    write(tmp_path, target_modules=["0"], modules_to_save=["2"])
    edit_weights(tmp_path, without(LAYER + "weight"))
    refused(tmp_path, r"lacks '2\.weight'")


def test_projections_that_are_stored_but_not_wanted(tmp_path):
    params, frozen, _ = adapter()
    write(tmp_path)
    edit_weights(tmp_path, lambda tensors: None)
    edit_config(tmp_path, save_projection=False)
    with pytest.warns(UserWarning, match=r"adapter_model\.safetensors contains projections, but save_projection is"):
        _, loaded, drawn, _ = vf.load_adapter(tmp_path, model())
    assert_same(loaded, params)
    assert_same(drawn, vf.init_projections(3, 13, 13))
    assert not torch.equal(drawn["vera_A"], frozen["vera_A"])


@pytest.mark.parametrize("wider", [0, 4])
def test_projections_drawn_for_a_wider_layer_are_read(wider, tmp_path):
    # As when another adapter of the same PEFT model adapted one.
    params, _, config = adapter()
    frozen = vf.init_projections(3, 13 + wider, 13 + wider)
    vf.save_adapter(tmp_path, params, frozen, config)
    _, loaded, projections, _ = vf.load_adapter(tmp_path, model())
    assert_same(loaded, params)
    assert_same(projections, frozen)


def test_equal_adapters_are_equal_bytes(tmp_path):
    """safetensors would write the metadata in another order each time."""
    adapted = vf.adapt(nn.Sequential(nn.Linear(4, 3)), vf.VeraConfig(r=2, target_modules=["0"]))
    folders = [vf.save_adapter(tmp_path / str(i), *adapted[1:]) for i in range(9)]
    stacked = vf.stack_adapters([adapted.params] * 2)
    banks = [vf.save_bank(tmp_path / f"{i}.safetensors", stacked, *adapted[2:], ["a", "ö"]) for i in range(9)]
    assert len({(folder / WEIGHTS).read_bytes() for folder in folders}) == 1
    assert len({bank.read_bytes() for bank in banks}) == 1
    assert vf.open_bank(banks[0]).names == ("a", "ö")
