"""What is refused of adapter directories, damaged or wrong, and of adapters that can't be saved."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import ones

import vera_func as vf

from refused import ADAPTED, CONFIGURATION, FROZEN, NAN, PARAMS, RAW, STACK, UNREADABLE, Refused, small_model


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
bad = Refused()


def save(folder, params=None, frozen=None, config=CONFIGURATION, name="default"):
    return vf.save_adapter(folder / "new", PARAMS | (params or {}), frozen or FROZEN, config, adapter_name=name)


bad(
    "save_adapter",
    "integers",
    lambda t: save(t, {"0.lambda_b": ones(5).long()}),
    "'0.lambda_b' must be one of",
)


bad(
    "save_adapter",
    "no configuration",
    lambda t: save(t, config=None),
    "config must be vera_func's VeraConfig, got None",
)


bad("save_adapter", "a dict", lambda t: save(t, config={"r": 4}), "config must be vera_func's VeraConfig, got dict")


bad(
    "save_adapter",
    "flat projections",
    lambda t: save(t, frozen={k: v.flatten() for k, v in FROZEN.items()}),
    "vera_A|vera_B",
)


for name in (5, None, CONFIG, WEIGHTS):
    bad(
        "save_adapter",
        f"the name {name!r}",
        lambda t, n=name: save(t, name=n),
        "adapter_name must be a valid folder name",
    )


def occupied(folder):
    (folder / "new").write_text("a file")
    with pytest.raises(FileExistsError) as error:
        save(folder)
    assert (folder / "new").read_text() == "a file"
    (folder / "new").unlink()
    raise error.value


bad("save_adapter", "a file in the way", occupied, "new", FileExistsError)


def load(folder, tensors=None, fields=None, raw=None, metadata=None, **options):
    """Write an adapter, change what the files hold, and read it."""
    saved = vf.save_adapter(folder / "adapter", PARAMS, FROZEN, CONFIGURATION)
    changed = load_file(saved / WEIGHTS) | (tensors or {})
    save_file({k: v for k, v in changed.items() if v is not None}, saved / WEIGHTS, metadata)
    config = json.loads((saved / CONFIG).read_text()) | (fields or {})
    (saved / CONFIG).write_text(json.dumps(config))
    if raw is not None:
        (saved / WEIGHTS).write_bytes(raw)
    return vf.load_adapter(saved, small_model(), **options)


for what, raw in RAW.items():
    bad(
        "load_adapter",
        what,
        lambda t, raw=raw: load(t, raw=raw),
        f"{WEIGHTS} {'lacks' if what == 'no tensors' else UNREADABLE}",
    )


LAMBDA = "base_model.model.0.vera_lambda_b"


for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
    bad(
        "load_adapter", f"vectors in {dtype}", lambda t, d=dtype: load(t, {LAMBDA: ones(5).to(d)}),
        rf"{WEIGHTS}: the dtype of '.*0.vera_lambda_b' must be .*got {dtype}",
    )  # fmt: skip


bad(
    "load_adapter",
    "float64 beyond float32",
    lambda t: load(t, {LAMBDA: ones(5).double() * 1e300}),
    rf"{WEIGHTS}: '0.lambda_b' overflows torch.float32",
)


bad("load_adapter", "NaN", lambda t: load(t, {LAMBDA: ones(5) * NAN}), f"{WEIGHTS}: '.*vera_lambda_b' holds NaN or inf")


bad("load_adapter", "an empty vector", lambda t: load(t, {LAMBDA: ones(0)}), r"'0.lambda_b' of shape \(0,\).*\(5,\)")


for what, fields, message in (
    ("r of 2^70", {"r": 2**70}, "r must be below"),
    ("r beyond memory", {"r": 10**9}, r"needs the shape \(1000000000,\)"),
    ("a list for a type", {"peft_type": ["VERA"]}, r"peft_type \['VERA'\]"),
    ("a path for a module", {"target_modules": ["../../x"]}, "no module matches"),
    ("a dunder for a module", {"target_modules": ["__class__"]}, "no module matches"),
    ("a dict for a path", {"base_model_name_or_path": {"a": 1}}, "must be a string or None"),
    ("a field of the future", {"future_scaling": 2.0}, "unknown field future_scaling=2.0"),
    ("the text NaN", {"d_initial": "NaN"}, "d_initial must be a number"),
    ("modules that are numbers", {"modules_to_save": [5]}, "modules_to_save must contain names"),
):
    bad(
        "load_adapter",
        what,
        lambda t, fields=fields: load(t, fields=fields),
        rf"{CONFIG}.*{message}|{WEIGHTS}.*{message}",
    )


for what, text in (("cut", "{"), ("a list", "[]"), ("of LoRA", '{"peft_type": "LORA"}')):
    bad(
        "load_adapter", f"a note of its configuration {what}",
        lambda t, text=text: load(t, metadata={"vera_func.config": text}), WEIGHTS,
    )  # fmt: skip


bad("load_adapter", "integers wanted", lambda t: load(t, dtype=torch.int8), "dtype must be a floating-point dtype")


bad("load_adapter", "no path", lambda _: vf.load_adapter(None, small_model()), "NoneType", TypeError)


def a_bank(folder):
    return vf.save_bank(folder / "bank.safetensors", STACK, FROZEN, CONFIGURATION, ["a", "b", "c"])


bad(
    "load_adapter",
    "a bank",
    lambda t: vf.load_adapter(a_bank(t), small_model()),
    "the path is a file",
    FileNotFoundError,
)
for what, args in {"an Adapted": (ADAPTED, FROZEN), "no projections": (PARAMS, None)}.items():
    bad(
        "save_adapter",
        what,
        lambda t, args=args: vf.save_adapter(t / "new", *args, CONFIGURATION),
        "params must be a dict of tensors, got Adapted: pass its attribute params|frozen must be a dict",
    )


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
