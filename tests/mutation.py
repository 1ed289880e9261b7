"""Mutants of the core, and which of them the tests tell from the original: `python -m tests.mutation core/adapter`.

A mutant is the source of one module with one small thing wrong: `<` for `<=`, 2 for 1, a statement or a keyword left
out. What survives shows a test that is missing, code that is not needed, or the same function written otherwise.
Annotations, imports and what is raised are left alone. The libraries are imported once; a fork for each mutant imports
`vera_func` with the mutated module, and runs the module's tests, the quickest first, until one fails.
"""

import argparse
import ast
import difflib
import gc
import importlib
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis
import parso
import pytest
import torch
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator


ROOT = Path(__file__).parents[1]
FOLDERS = ["core", "quant", "model", "merging", "train"]
MODULES = sorted(
    path.relative_to(ROOT / "vera_func").with_suffix("").as_posix()
    for folder in FOLDERS
    for path in (ROOT / "vera_func" / folder).rglob("[a-z]*.py")
)
# What runs beside a module's own doctests and the test file of its name.
MORE_TESTS = {
    "core/keys": ["model/test_apply", "io/test_checkpoint"],
    "core/shapes": ["core/test_adapter"],
    "core/autograd": ["core/test_adapter", "core/test_transforms"],
    "core/adapter": ["core/test_transforms", "test_laws"],
    "quant/value": ["quant/test_bnb"],
    "quant/linear": ["quant/test_kernels", "quant/test_bnb"],
    "quant/cpu_layout": ["quant/test_kernels", "quant/test_bnb"],
    "model/config": ["model/test_targets"],
    "model/targets": ["model/test_adapt"],
    "model/linears": ["model/test_targets", "model/test_adapt"],
    "model/binding": ["model/test_adapt", "model/test_apply"],
    "model/build": ["model/test_adapt"],
    "model/rows/axes": ["model/rows/test_plans"],
    "model/rows/rehearse": ["model/rows/test_plans"],
    "model/base_layers": ["model/test_adapt", "io/test_module"],
    "model/layers": ["model/test_adapt"],
    "model/tree": ["model/test_adapt", "model/test_convert", "merging/test_model"],
    "model/checkout": ["model/test_apply"],
    "model/apply": ["model/test_adapt"],
    "model/adapt": ["model/test_apply", "core/test_autograd", "model/test_batch"],
    "model/module": ["io/test_module"],
    "model/batch": ["model/test_vmap", "model/test_pool", "test_laws"],
    "merging/calibrate": ["merging/test_layer"],
    "merging/layer": ["test_laws"],
    "merging/model": ["merging/test_second_moments"],
    "train/fit": ["train/test_sweep"],
}
OPTIONS = "--doctest-modules --import-mode=importlib"  # one process, which is a fork
LONGEST = 3.0  # seconds that a test of mutants may take; what takes longer compiles something
# Of cosmic-ray's operators those whose mutants are not all killed by the first call.
NAMES = [
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot"),
    *("NumberReplacer", "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    "ExceptionReplacer",
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub", "Invert")),
    *(f"ReplaceBinaryOperator_{name}" for name in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul")),
    *(f"ReplaceBinaryOperator_{name}" for name in ("Pow_Mul", "Mod_FloorDiv", "BitOr_BitAnd", "BitAnd_BitOr")),
    *(f"ReplaceBinaryOperator_{name}" for name in ("RShift_LShift", "LShift_RShift")),
    *(f"ReplaceComparisonOperator_{name}" for name in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *(f"ReplaceComparisonOperator_{name}" for name in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_GtE", "Gt_LtE")),
]


class Remove:
    """An operator like cosmic-ray's, which leaves a node out."""

    def __init__(self, what: str, instead: str) -> None:
        self.what, self.instead = what, instead

    def mutation_positions(self, node: Any) -> Iterator[tuple]:
        statement = node.type == "expr_stmt" or (node.type == "atom_expr" and node.parent.type == "simple_stmt")
        keyword = node.type == "argument" and getattr(node.children[1], "value", "") == "="
        if {"statement": statement, "keyword": keyword}[self.what]:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return parso.python.tree.Name(self.instead, node.start_pos, node.get_first_leaf().prefix)


class Outcome(NamedTuple):
    status: int
    seconds: dict[str, float]  # of each test


def places(source: str) -> list[tuple[int, Any, int]]:
    """Where something can be wrong: line, operator, and which of the operator's places it is."""
    spared = _spared(source)
    operators = [
        *(get_operator(f"core/{name}")() for name in NAMES),
        Remove("statement", "pass"),
        Remove("keyword", "**{}"),
    ]
    nodes, found = list(ast_nodes(parso.parse(source))), []
    for operator in operators:
        spans = [span for node in nodes for span in operator.mutation_positions(node)]
        for i, (start, stop) in enumerate(spans):
            if not any(first <= start and stop <= last for first, last in spared):
                found.append((start[0], operator, i))
    return found


def _spared(source: str) -> list[tuple]:
    """Annotations, imports, what is raised, assertions such as zip's `strict`, and the star before keywords."""
    nodes: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        strict = isinstance(node, ast.keyword) and node.arg == "strict"
        if strict or isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.Assert | ast.JoinedStr):
            nodes.append(node)
        elif isinstance(node, ast.AnnAssign):
            nodes.append(node if ast.unparse(node.annotation) == "TypeAlias" else node.annotation)
        elif isinstance(node, ast.arg):
            nodes.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            nodes.append(node.returns)
    spans = [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes if n is not None]
    stars = [leaf for leaf in ast_nodes(parso.parse(source)) if leaf.type == "operator" and leaf.value == "*"]
    return spans + [(star.start_pos, star.end_pos) for star in stars if star.parent.type == "parameters"]


class Quickest:
    """A plugin of pytest: the quickest tests first, and how long each took."""

    def __init__(self, before: dict[str, float]) -> None:
        self.before, self.seconds = before, Counter()

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if self.before.get(item.nodeid, 0.0) <= LONGEST]
        items.sort(key=lambda item: self.before.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration


class Mutated(SourceFileLoader):
    """Loads other code than that of the file."""

    def __init__(self, name: str, path: str, code: str) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, name: str) -> Any:
        return self.source_to_code(self.code.encode(), self.path)


def test_files(module: str) -> list[str]:
    folder, _, name = module.rpartition("/")
    own = f"tests/{folder}/test_{name}.py"
    found = [own] if (ROOT / own).exists() else []
    return [f"vera_func/{module}.py", *found, *(f"tests/{name}.py" for name in MORE_TESTS.get(module, []))]


def run(module: str, code: str, before: dict[str, float], quiet: bool, results: Any) -> None:
    """In a fork: the tests of a module that has this code."""
    full, file = f"vera_func.{module.replace('/', '.')}", str(ROOT / "vera_func" / f"{module}.py")

    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        return spec_from_file_location(name, loader=Mutated(name, file, code)) if name == full else None

    assert "vera_func" not in sys.modules
    if quiet:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.meta_path.insert(0, SimpleNamespace(find_spec=find_spec))
    importlib.import_module(full)
    plugin = Quickest(before)
    flags = ["-x", "-q", "--no-header", "--assert=plain", "-p", "no:cacheprovider", "-o", f"addopts={OPTIONS}"]
    status = pytest.main([*flags, *test_files(module)], plugins=[plugin])
    results.send(Outcome(int(status), dict(plugin.seconds)))


def outcome(module: str, code: str, before: dict[str, float], limit: float, quiet: bool = True) -> Outcome | None:
    """What the tests say of this code; None if they do not end in time, or take Python down."""
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=run, args=(module, code, before, quiet, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv() if mine.poll(limit) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def changed(source: str, code: str) -> str:
    lines = difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm="")
    return " / ".join(f"{line[0]} {line[1:].strip()}" for line in lines if line[0] in "-+" and line[1:3] != line[0] * 2)


def survivors(module: str, sample: int, seed: int, lines: list[int]) -> tuple[int, list[str]]:
    """How many mutants there were, and those that no test told from the original."""
    source = (ROOT / "vera_func" / f"{module}.py").read_text()
    original = outcome(module, source, {}, 3600, quiet=False)
    if original is None or original.status:
        raise SystemExit(f"the tests of {module} fail without a mutant")
    chosen = [place for place in places(source) if not lines or place[0] in lines]
    chosen = random.Random(seed).sample(chosen, min(sample, len(chosen)))
    limit, found, count = 60 + 3 * sum(original.seconds.values()), [], 0
    for line, operator, i in sorted(chosen, key=lambda place: place[0]):
        code = mutate_code(source, operator, i)
        try:
            compile(code, module, "exec")
        except SyntaxError:
            continue
        count += 1
        start = time.monotonic()
        result = outcome(module, code, original.seconds, limit)
        word = "killed" if result is None or result.status else "SURVIVED"
        mutant = f"{module}.py:{line}: {changed(source, code)}"
        print(f"{word:8} {time.monotonic() - start:5.1f} s  {mutant}", flush=True)
        if word == "SURVIVED":
            found.append(mutant)
    return count, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="+", choices=MODULES, metavar="module", help=", ".join(MODULES))
    parser.add_argument("--sample", type=int, default=60, help="mutants of each module, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs="+", default=[], help="only the mutants that start in these")
    options = parser.parse_args()

    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.chdir(ROOT)
    for name in ("bitsandbytes", "peft", "torch._dynamo", "torch.testing", "jaxtyping", "safetensors.torch"):
        importlib.import_module(name)
    for name in ("llama", "gpt2", "bert"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.set_num_threads(1)  # a thread would not be there after the fork
    hypothesis.settings.register_profile("mutation", database=None, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("mutation")
    gc.freeze()  # pytest collects garbage at its end, and should not look at all this again

    rows, left = [("module", "mutants", "killed", "survived", "score")], []
    for module in options.modules:
        count, found = survivors(module, options.sample, options.seed, options.lines)
        left += found
        score = f"{1 - len(found) / max(count, 1):.0%}"
        rows.append((module, str(count), str(count - len(found)), str(len(found)), score))
    table = [f"{name:24}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in rows]
    print("", *left, "", *table, sep="\n")


if __name__ == "__main__":
    main()
