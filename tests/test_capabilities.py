"""The table of capabilities in `tests/README.md` says yes or no, and each row names a test that exists."""

import ast
from pathlib import Path

import pytest


TESTS = Path(__file__).parent


def rows():
    """`(capability, with PEFT, here, test)` of each row."""
    _, _, table = (TESTS / "README.md").read_text().partition("| | PEFT's VeRA | here | test |\n")
    lines = table.partition("\n\n")[0].splitlines()[1:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def test_every_row_says_yes_or_no():
    assert len(rows()) >= 40
    assert len({name for name, *_ in rows()}) == len(rows())
    for name, theirs, ours, _ in rows():
        assert {cell.partition(",")[0] for cell in (theirs, ours)} <= {"yes", "no"}, name


@pytest.mark.parametrize(("name", "test"), [(name, test) for name, _, _, test in rows()])
def test_the_test_of_a_row_exists(name, test):
    file, _, function = test.strip("`").partition("::")
    tree = ast.parse((TESTS / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}, name
