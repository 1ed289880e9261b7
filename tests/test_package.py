"""The package as a whole: what importing it does, which file may import which, whether its names are explained."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vera_func as vf

from refused import Refused


PACKAGE = Path(vf.__file__).parent
# From the ground up; a folder imports only from itself and from those before it.
ROOMS = ["core", "quant", "model", "merging", "io", "train", "data", "cli"]
# Modules of version 0.1 that scripts import from; they will be removed in the next version.
OLD = {"pretrained": "quantize_model", "bnb": "is_bnb_linear"}
PUBLIC = {name: getattr(vf, name) for name in vf.__all__}


def imports(path, types=True):
    """The modules of the package that a file imports, anywhere in it, as parts below the package.

    Without `types`, imports for type checkers alone are left out.
    """
    package = path.relative_to(PACKAGE).parts[:-1]
    nodes = [ast.parse(path.read_text())]
    for node in nodes:
        if types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            names = [alias.name for alias in node.names] if not any(parts) else [""]
            yield from (tuple(part for part in (*parts, name) if part) for name in names)


def test_every_file_has_its_room():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "private", *OLD}


@pytest.mark.parametrize("room", [*ROOMS, "model.rows", "cli.training"])
def test_a_room_says_what_each_of_its_files_is_for(room):
    said = re.findall(r"`(\w+)`", importlib.import_module(f"vera_func.{room}").__doc__)
    files = {path.stem for path in PACKAGE.joinpath(*room.split(".")).iterdir()} - {"__init__", "__pycache__"}
    assert files <= set(said)
    assert {name for name in said if name.islower()} - {"apply"} <= files


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_below(room):
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "private"}
    for path in (PACKAGE / room).rglob("*.py"):
        odd = [module for module in imports(path) if module[0] not in allowed]
        assert not odd, f"{path.relative_to(PACKAGE)} imports {odd}"


def test_no_two_files_import_each_other():
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    graph = {name: set(imports(path, types=False)) for name, path in files.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_private_names_of_others_stand_in_one_file():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "private.py":
            text = path.read_text()
            names = ("torch.utils._", "debug_unwrap", "torch.ops", "_keep_in_fp32", "torch._")
            found = [name for name in names if name in text]
            assert not found, f"{path.relative_to(PACKAGE)} names {found}"


def test_import_is_light_and_silent():
    code = """
import sys, torch
loaded = set(sys.modules)
state = torch.get_default_dtype(), torch.random.get_rng_state().sum()
import vera_func
heavy = {"bitsandbytes", "transformers", "peft", "tqdm", "matplotlib"} & (set(sys.modules) - loaded)
assert not heavy, heavy
assert state == (torch.get_default_dtype(), torch.random.get_rng_state().sum())
vera_func.adapt  # whose modules do not import the compiler, which takes a second
assert "torch._dynamo" not in sys.modules
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


def test_the_reference_names_every_public_name():
    reference = set(re.findall(r"\w+", vf.__doc__))
    assert not [name for name in PUBLIC if name not in reference]
    assert len(PUBLIC) <= 65


def test_type_checkers_see_the_names_that_are_imported_when_they_are_used():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(module, name) for module, names in vf._MODULES.items() for name in names}


@pytest.mark.parametrize("name", vf._RENAMED)
def test_a_name_that_is_gone_says_what_to_use(name):
    with pytest.raises(AttributeError, match=f"vera_func.{name} was renamed in version 0.2: use ") as error:
        getattr(vf, name)
    for module, new in re.findall(r"(vera_func\.[\w.]+)\.(\w+)", vf._RENAMED[name]):
        assert callable(getattr(importlib.import_module(module), new)), error
    for new in re.findall(r"\bvf\.(\w+)", vf._RENAMED[name]):
        assert new in vf.__all__


# Records of results, which nobody but this library makes; their fields are read where they are used.
NO_ROWS = {"MergeReport", "Fit", "Apply", "Quantized4bit", "Quantized8bit"}


def test_every_public_function_refuses_something():
    for path in Path(__file__).parent.glob("*/**/test_*.py"):
        importlib.import_module(".".join(path.relative_to(Path(__file__).parents[1]).with_suffix("").parts))
    tried = {name.partition(":")[0] for name in Refused.all}
    assert {*vf.__all__} - tried == NO_ROWS
    assert not NO_ROWS & tried
    assert len(Refused.all) >= 150


@pytest.mark.parametrize("room", ["core", "quant", "model", "merging", "io", "train"])
def test_tensors_do_not_depend_on_the_default_device_and_dtype(room):
    floats = {"zeros", "ones", "empty", "full", "rand", "randn", "eye", "linspace"}  # of the default dtype
    numbers = {"tensor", "as_tensor", "arange", "randperm", "randint"}
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
            if ast.unparse(node.func) == f"torch.{name}" and name in floats | numbers and None not in given:
                needed = {"device", "dtype"} if name in floats else {"device"}
                assert needed <= given, f"{path.name}:{node.lineno}: torch.{name} without {needed - given}"


def test_no_pickle():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            assert not (
                called and (node.value.id, node.attr) in {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}
            )


@pytest.mark.parametrize("module", OLD)
def test_an_old_module_says_what_to_use(module):
    sys.modules.pop(f"vera_func.{module}", None)
    with pytest.warns(DeprecationWarning, match=f"vera_func.{module} will be removed in the next version: use "):
        imported = importlib.import_module(f"vera_func.{module}")
    assert callable(getattr(imported, OLD[module]))
