"""The runner of mutants makes those it should, of a module of a few lines; `python -m tests.mutation` runs them."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCE = '''
from a import b
Both: TypeAlias = int | str
def f(x: int | str, *, n: int = 1) -> int | None:
    """Two times x."""
    y: int | None = 2 * x
    if n < 0:
        raise ValueError(f"{n + 1} is {3 * 3}")
    return g(y, key=n)
'''


def test_every_place_but_those_that_are_spared():
    pytest.importorskip("cosmic_ray")
    from cosmic_ray.mutating import mutate_code
    from mutation import changed, places

    made = {changed(SOURCE, mutate_code(SOURCE, operator, i)).replace(" ", "") for _, operator, i in places(SOURCE)}
    assert made == {
        "-deff(x:int|str,*,n:int=1)->int|None:/+deff(x:int|str,*,n:int=2)->int|None:",
        "-deff(x:int|str,*,n:int=1)->int|None:/+deff(x:int|str,*,n:int=0)->int|None:",
        *("-y:int|None=2*x/+" + new for new in ("y:int|None=3*x", "y:int|None=1*x", "y:int|None=2/x", "pass")),
        *("-ifn<0:/+" + new for new in ("ifnotn<0:", "ifn<=0:", "ifn>=0:", "ifn<1:", "ifn<-1:")),
        "-returng(y,key=n)/+returng(y,**{})",
    }


def test_the_modules_and_their_tests_are_there():
    """Read, not imported: cosmic-ray, which the runner needs, is no part of the suite."""
    tree = ast.parse((Path(__file__).parent / "mutation.py").read_text("utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "MORE_TESTS")
    for module, files in ast.literal_eval(table).items():
        assert (ROOT / "vera_func" / f"{module}.py").exists(), module
        assert all((ROOT / "tests" / f"{file}.py").exists() for file in files), files
