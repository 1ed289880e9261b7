"""The runner of mutants makes those it should, of a module of a few lines; `python -m tests.mutation` runs them."""

from pathlib import Path

import pytest


pytest.importorskip("cosmic_ray")

from cosmic_ray.mutating import mutate_code
from mutation import TESTS, changed, places, test_files as files_of


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
    made = {changed(SOURCE, mutate_code(SOURCE, operator, i)).replace(" ", "") for _, operator, i in places(SOURCE)}
    assert made == {
        "-deff(x:int|str,*,n:int=1)->int|None:/+deff(x:int|str,*,n:int=2)->int|None:",
        "-deff(x:int|str,*,n:int=1)->int|None:/+deff(x:int|str,*,n:int=0)->int|None:",
        *("-y:int|None=2*x/+" + new for new in ("y:int|None=3*x", "y:int|None=1*x", "y:int|None=2/x", "pass")),
        *("-ifn<0:/+" + new for new in ("ifnotn<0:", "ifn<=0:", "ifn>=0:", "ifn<1:", "ifn<-1:")),
        "-returng(y,key=n)/+returng(y,**{})",
    }


@pytest.mark.parametrize("module", TESTS)
def test_the_files_are_there(module):
    assert all((ROOT / file).exists() for file in files_of(module))
