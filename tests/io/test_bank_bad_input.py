"""What is refused of banks, damaged or wrong, and of adapters that can't be stored in one."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn, ones

import vera_func as vf
from vera_func.io.bank import append_to_bank, export_adapters, import_adapters

from refused import ADAPTED, CONFIGURATION, FROZEN, NAN, PARAMS, RAW, STACK, UNREADABLE, Refused, filled, small_model


bad = Refused()


def saved_bank(folder, stacked=STACK, frozen=FROZEN, config=CONFIGURATION, names=("a", "b", "c")):
    return vf.save_bank(folder / "bank.safetensors", stacked, frozen, config, names)


def rewritten(folder, tensors=None, **metadata):
    """A bank whose tensors or metadata were changed; opened."""
    path = saved_bank(folder)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | metadata
    changed = load_file(path) | (tensors or {})
    save_file({k: v for k, v in changed.items() if v is not None}, path, metadata)
    return vf.open_bank(path)


def open_raw(folder, raw):
    (folder / "bank").write_bytes(raw)
    return vf.open_bank(folder / "bank")


for what, raw in RAW.items():
    wrong = "is a safetensors file, but not an adapter bank" if what == "no tensors" else UNREADABLE
    bad("open_bank", what, lambda t, raw=raw: open_raw(t, raw), f"bank {wrong}")


broken = STACK | {"0.lambda_b": STACK["0.lambda_b"] + torch.tensor([[0.0], [NAN], [0.0]])}


bad(
    "save_bank",
    "no adapters",
    lambda t: saved_bank(t, {k: v[:0] for k, v in STACK.items()}, names=()),
    "stacked has 0 adapters",
)


bad(
    "save_bank",
    "NaN in one",
    lambda t: saved_bank(t, broken),
    "'0.lambda_b' of the adapter 'b' holds NaN or inf; nothing was written",
)


bad("save_bank", "NaN in the pair", lambda t: saved_bank(t, frozen=filled(FROZEN, NAN)), "'vera_A' holds NaN or inf")


bad("save_bank", "another rank", lambda t: saved_bank(t, frozen=vf.init_projections(5, 7, 5)), r"got \(5, 7\)")


bad("save_bank", "a short B", lambda t: saved_bank(t, frozen=vf.init_projections(4, 7, 3)), "with out <= 3")


bad(
    "save_bank",
    "half a layer",
    lambda t: saved_bank(t, {k: v for k, v in STACK.items() if k != "0.lambda_d"}),
    "lacks '0.lambda_d'",
)


bad(
    "save_bank",
    "integers",
    lambda t: saved_bank(t, {k: v.long() for k, v in STACK.items()}),
    "must be one of .*got torch.int64",
)


bad(
    "save_bank", "targets not spelled out", lambda t: saved_bank(t, config=vf.VeraConfig(r=4)), "must be explicit names"
)


bad("save_bank", "a text for names", lambda t: saved_bank(t, names="abc"), r"sequence of names, got the string 'abc'")


bad("save_bank", "no folder", lambda t: saved_bank(t / "none"), "bank.safetensors could not be written", OSError)


for what, tensors, message in (
    ("A of another rank", {"vera_A": ones(5, 7)}, r"vera_A must have shape \(4, in\), got \(5, 7\)"),
    ("a flat A", {"vera_A": ones(28)}, r"vera_A must have .*got \(28,\)"),
    ("B of another rank", {"vera_B": ones(5, 3)}, r"vera_B must have shape \(out, 4\), got \(5, 3\)"),
    ("a short B", {"vera_B": ones(2, 4)}, r"out <= 2 \(the number of rows of vera_B\)"),
    ("lambda_d of another rank", {"0.lambda_d": ones(3, 9)}, r"'0.lambda_d' must have shape \(3, 4\) .*\(3, 9\)"),
    ("lambda_b with an axis more", {"0.lambda_b": ones(3, 2, 5)}, r"'0.lambda_b' must .*got \(3, 2, 5\)"),
    ("integers", {"0.lambda_b": ones(3, 5).long()}, "'0.lambda_b' must have a floating-point dtype, got I64"),
    ("half a layer", {"0.lambda_d": None}, "has '0.lambda_b', but lacks '0.lambda_d'"),
):
    bad("open_bank", what, lambda t, tensors=tensors: rewritten(t, tensors), f"bank.safetensors.*{message}")


bad("open_bank", "a folder", lambda t: vf.open_bank(t), "the path is a folder, but a bank is a file", FileNotFoundError)


bad("open_bank", "an empty name", lambda t: rewritten(t, names='["a", "b", ""]'), "list of distinct names")


other = json.dumps({"peft_type": "VERA", "r": 7, "target_modules": ["0"]})


bad("open_bank", "another rank", lambda t: rewritten(t, config=other), "for r=")


bad("open_bank", "an old format", lambda t: rewritten(t, format="vera_func.bank.0"), "not an adapter bank")


bad(
    "Bank",
    "a row too far",
    lambda t: vf.open_bank(saved_bank(t)).read([5]),
    r"has no adapter 5\. Its 3 adapters are: a, b, c\.$",
)


bad("Bank", "half a row", lambda t: vf.open_bank(saved_bank(t)).read([1.5]), "has no adapter 1.5")


bad(
    "Bank",
    "a text for names",
    lambda t: vf.open_bank(saved_bank(t)).read("abc"),
    "sequence of names, got the string 'abc'",
)


bad(
    "Bank",
    "another model",
    lambda t: vf.open_bank(saved_bank(t)).adapted(nn.Linear(7, 5)),
    "has params for the layer '0', but",
)


bad(
    "Bank",
    "a key too many",
    lambda t: rewritten(t, {"x": ones(3, 2)}).adapted(small_model()),
    "has 'x', but the adapted model has no such parameter",
)


bad(
    "Bank", "projections too narrow for a model",
    lambda t: ADAPTED.apply(PARAMS, rewritten(t, {"vera_A": ones(4, 6)}).frozen(), ones(2, 7)),
    "were drawn for at most 6 -> 5",
)  # fmt: skip


def append(folder, stacked=STACK, names=("d", "e", "f"), **options):
    """Append, and see that the bank is as it was."""
    path = saved_bank(folder)
    before = path.read_bytes()
    try:
        return append_to_bank(path, stacked, names, **options)
    finally:
        assert path.read_bytes() == before


bad("append_to_bank", "NaN", lambda t: append(t, broken), "'0.lambda_b' of the adapter 'e' holds NaN or inf")


bad(
    "append_to_bank",
    "too few names",
    lambda t: append(t, names=["d"]),
    "3 distinct names, .*got 1",
)


bad("append_to_bank", "a name twice", lambda t: append(t, names=["a", "d", "e"]), "already has an adapter 'a'")


bad(
    "append_to_bank",
    "no bank",
    lambda t: append_to_bank(t / "none", STACK, "abc"),
    "there is no bank",
    FileNotFoundError,
)


bad(
    "export_adapters",
    "an unknown name",
    lambda t: export_adapters(vf.open_bank(saved_bank(t)), t / "out", ["z"]),
    "no adapter 'z'",
)


hostile = ("a", "../b", "c")


bad(
    "export_adapters", "a path for a name",
    lambda t: export_adapters(vf.open_bank(saved_bank(t, names=hostile)), t / "out", ["../b"]),
    "adapter_name must be a valid folder name without slashes, got '../b'",
)  # fmt: skip


bad("import_adapters", "nothing", lambda t: import_adapters(t / "bank", {}, small_model()), "folders is empty")


bad(
    "import_adapters",
    "no folder",
    lambda t: import_adapters(t / "bank", {"a": t / "x"}, small_model()),
    "no adapter directory",
    FileNotFoundError,
)


bad(
    "import_adapters",
    "an empty folder",
    lambda t: import_adapters(t / "bank", {"a": t}, small_model()),
    "has no adapter_config",
    FileNotFoundError,
)
for names in (3, [True], [[0]]):
    bad(
        "Bank.read",
        f"names={names}",
        lambda t, names=names: vf.open_bank(vf.save_bank(t / "b", STACK, FROZEN, CONFIGURATION, ["a", "b", "c"])).read(
            names
        ),
        "names must be a sequence of names, got int|has no adapter",
    )
bad("save_bank", "no names", lambda t: vf.save_bank(t / "b", STACK, FROZEN, CONFIGURATION, None), "names must be a seq")
bad("save_bank", "a list", lambda t: vf.save_bank(t / "b", [PARAMS], FROZEN, CONFIGURATION, ["a"]), "must be a dict of")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
