"""The typer application of `vera-func`.

Each command is a function: the signature defines the options, and the docstring is the help text. Commands import torch
and transformers when they run, so that `--help`, completion and usage errors are fast.
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
    """Train, evaluate, merge and export VeRA adapters of quantized language models.

    Exit status 0: success; 1: environment failure (network, missing package,
    I/O); 2: invalid arguments or input files; 130: interrupted. Downloads are
    cached in $VERA_FUNC_CACHE (default: ~/.cache/vera_func).
    """


for _command in (demo, train, evaluate, predict, generate, merge, export_lora, inspect, convert, push):
    app.command(_command.__name__.replace("_", "-"))(flatten(_command))
