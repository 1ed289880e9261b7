"""Groups of options: each of their fields is an option, and the command gets them as one value."""

import inspect
from typing import Annotated, NamedTuple

import typer

from vera_func.cli.groups import AdapterOptions, BaseOptions, TrainOptions, flatten
from vera_func.cli.training.settings import Recipe


class Size(NamedTuple):
    """Two options."""

    width: Annotated[int, typer.Option(help="Width.")] = 2
    height: Annotated[int, typer.Option(help="Height.")] = 3


def test_a_command_gets_its_groups_as_values():
    calls = []

    def command(*, name: str, size: Size, color: str = "red") -> None:
        """Paint."""
        calls.append((name, size, color))

    flat = flatten(command)
    parameters = inspect.signature(flat).parameters
    assert list(parameters) == ["name", "width", "height", "color"]
    assert [each.default for each in parameters.values()] == [inspect.Parameter.empty, 2, 3, "red"]
    assert parameters["height"].annotation == Size.__annotations__["height"]
    assert (flat.__name__, flat.__doc__) == ("command", "Paint.")
    call = flat(name="a", width=5, height=7, color="blue")
    assert calls == []  # it runs later
    call()
    assert calls == [("a", Size(5, 7), "blue")]


def test_no_option_is_in_two_groups():
    fields = [field for group in (AdapterOptions, BaseOptions, TrainOptions) for field in group._fields]
    assert len(fields) == len({*fields})


def test_every_option_of_a_recipe_is_one_of_the_command():
    assert {*Recipe._fields} - {*TrainOptions._fields} == {"micro_batches"}  # from --parts
