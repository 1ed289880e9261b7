"""The package as a whole: what importing it does, which file may import which, whether its names are explained."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vera_func as vf


PACKAGE = Path(vf.__file__).parent
# From the ground up; a file imports only from those before it.
ORDER = [
    *("files", "projection", "adapter", "optim", "train", "distributed", "quantized", "bnb", "calibrate", "merge"),
    *("config", "layers", "model", "many", "algebra", "checkpoint", "bank", "export", "lora", "grams", "assets"),
    *("pretrained", "examples", "report", "sentiment", "task", "answers", "demo", "sources", "commands", "inspection"),
    *("options", "cli"),
]
PUBLIC = {
    name: getattr(vf, name) for name in dir(vf) if not name.startswith("_") and not inspect.ismodule(getattr(vf, name))
}


def test_every_file_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_below(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert imported <= set(ORDER[: ORDER.index(name)])


def test_import_is_light_and_silent():
    code = """
import sys, torch
loaded = set(sys.modules)
state = torch.get_default_dtype(), torch.random.get_rng_state().sum()
import vera_func
heavy = {"bitsandbytes", "transformers", "peft", "tqdm", "matplotlib"} & (set(sys.modules) - loaded)
assert not heavy, heavy
assert state == (torch.get_default_dtype(), torch.random.get_rng_state().sum())
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_explained(name):
    doc = inspect.getdoc(PUBLIC[name]) or ""
    assert doc, f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"the docstring of {name} was made by a machine"
    if inspect.isfunction(PUBLIC[name]):
        assert ">>>" in doc, f"{name} shows no example"
        for parameter in inspect.signature(PUBLIC[name]).parameters:
            if parameter not in ("args", "kwargs"):
                assert parameter in doc, f"{name} does not say what {parameter} is"


def test_the_readme_names_every_public_name():
    readme = (PACKAGE.parent / "README.md").read_text()
    assert not [name for name in PUBLIC if name not in readme]


def test_no_pickle():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            assert not (
                called and (node.value.id, node.attr) in {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}
            )
