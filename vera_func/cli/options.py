"""Options that commands share, so that they have one name and one meaning, and the parsers of their values."""

import argparse
from typing import Any

from ..data.prompts import PROMPT


QUANTS = ["nf4", "fp4", "int8", "none"]
DTYPES = ["float32", "bfloat16", "float16"]


def model(parser: Any, which: str) -> None:
    """The model and what it computes in; `which` says what the default is."""
    add = parser.add_argument
    add("--model", metavar="DIR_OR_HUB_ID", help=f"a causal language model ({which})")
    add("--quant", choices=QUANTS, help="format of its linears (default: the adapter's, or the model's own, or nf4)")
    add("--dtype", choices=DTYPES, help="of the arithmetic (default: bfloat16 where the CPU has it, else float32)")


def source(parser: Any, which: str = "default: all; may be repeated") -> None:
    """Adapters, and the model under them; `which` says what one may take of a bank."""
    add = parser.add_argument
    add("--adapter", metavar="DIR", help="a PEFT directory")
    add("--bank", metavar="FILE", help="many adapters in a file")
    add("--name", action="append", metavar="NAME", help=f"an adapter of the bank ({which})")
    model(parser, "default: what the adapter names, or SmolLM2-135M")


def data(parser: Any, help: str, required: bool = False) -> None:
    """Labelled texts, and how they are put to the model."""
    add = parser.add_argument
    add("--data", metavar="FILE", required=required, help=help)
    help = f"with {{text}} in it, \\n for a new line, before the label (default: the adapter's, or {PROMPT!r})"
    add("--prompt", type=newlines, metavar="TEXT", help=help)


def positive(kind: type) -> Any:
    """A parser of numbers above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


def names(text: str) -> list[str]:
    """The parts of `a,b`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("must be names separated by commas, such as q_proj,v_proj")
    return parts


def newlines(text: str) -> str:
    r"""The text with a line break for each `\n` typed as two characters, as a shell passes it on."""
    return text.replace("\\n", "\n")
