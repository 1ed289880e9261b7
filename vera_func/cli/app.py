"""The typer application of `vera-func`: its commands, in the order of the help.

Each command is a function whose signature and docstring define its options, help and completion. Heavy imports are
inside of the functions, so that torch and transformers are not imported for help, completion or invalid arguments.
"""

from typing import Annotated

import typer

from .file_commands import convert, export_lora, inspect, merge, push
from .groups import flatten
from .text_commands import demo, evaluate, generate, predict, train


app = typer.Typer(rich_markup_mode="rich")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"vera-func {version('vera-func')}")
        raise typer.Exit


@app.callback()
def vera_func(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """VeRA adapters over quantized language models.

    Exit status 2: invalid arguments or input files; 1: environment failure
    (network, missing package, I/O); 130: interrupted. Downloads are cached in
    $VERA_FUNC_CACHE (default: ~/.cache/vera_func).
    """


for _command in (demo, train, evaluate, predict, generate, merge, export_lora, inspect, convert, push):
    app.command(_command.__name__.replace("_", "-"))(flatten(_command))
