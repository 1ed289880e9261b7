"""Options shared by the commands, as annotated types."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer


if TYPE_CHECKING:
    import torch

    from ..data.models import Base
    from ..data.sources import Source


Format = Literal["nf4", "fp4", "int8", "float32", "bfloat16", "float16"]
ADAPTER, MODEL, DATA, TRAINING = "Adapter", "Base model", "Data", "Training"  # panels of the help


def positive(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A parser for positive, finite numbers of type `kind`.

    Example:
        >>> positive(int)("8")
        8
    """

    def parse(text: Any) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"invalid {kind.__name__} value: {text!r}") from None
        if not 0 < value < float("inf"):
            raise ValueError(f"must be positive, got {text}")
        return value

    return parse


def names(text: str) -> list[str]:
    """Parse a comma-separated list of names.

    Example:
        >>> names("q_proj, v_proj")
        ['q_proj', 'v_proj']
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ValueError("must be names separated by commas, such as q_proj,v_proj")
    return found


def newlines(text: str) -> str:
    r"""Replace each two-character `\n`, as typed in a shell, by a line break.

    Example:
        >>> newlines(r"Review: {text}\nSentiment:")
        'Review: {text}\nSentiment:'
    """
    return text.replace("\\n", "\n")


def option(*names: str, help: str, metavar: str | None = None, panel: str | None = None, parser: Any = None) -> Any:
    """A typer option, with shorter keyword names."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, parser=parser)


def number(*names: str, help: str, panel: str | None = None, kind: Callable[[Any], Any] = int) -> Any:
    """An option that takes a positive number."""
    return option(*names, help=help, metavar="N" if kind is int else "X", panel=panel, parser=positive(kind))


def folder(help: str) -> Any:
    """The option `--out` of a command that writes a folder."""
    return option("--out", help=help, metavar="DIR")


def format_option(help: str, panel: str | None = None) -> Any:
    """The option `--to`; its choices are part of the help text, since they are too long for the metavar column."""
    return option("--to", help=f"{help}: {', '.join(get_args(Format))}.", metavar="FORMAT", panel=panel)


def _model(default: str) -> Any:
    return option(
        "--model", help=f"Folder or hub id of a causal language model ({default}).", metavar="ID", panel=MODEL
    )


def _name(default: str) -> Any:
    return option("--name", help=f"An adapter of the bank ({default}).", metavar="NAME", panel=ADAPTER)


def _data(help: str) -> Any:
    return option("--data", help=help, metavar="FILE", panel=DATA)


# The adapters.
Adapter = Annotated[str | None, option("--adapter", help="A PEFT directory or hub id.", metavar="DIR", panel=ADAPTER)]
Bank = Annotated[str | None, option("--bank", help="An adapter bank.", metavar="FILE", panel=ADAPTER)]
Names = Annotated[list[str] | None, _name("default: all; repeat for several")]
OneName = Annotated[list[str] | None, _name("required if it holds several")]

# The base model.
ModelToTrain = Annotated[str | None, _model("default: SmolLM2-135M")]
ModelOfAdapter = Annotated[str | None, _model("default: the adapter's, else SmolLM2-135M")]
ModelToMerge = Annotated[str | None, _model("under an adapter: adds the size of its updates and what a merge retains")]
Quant = Annotated[
    Literal["nf4", "fp4", "int8", "none"] | None,
    option(
        "--quant", help="Format of its linear layers (default: the adapter's, else the model's, else nf4).", panel=MODEL
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    option(
        "--dtype", help="Dtype of the arithmetic (default: bfloat16 if the CPU supports it, else float32).", panel=MODEL
    ),
]

# The data.
Examples = Annotated[str, _data("CSV or JSONL with text and label.")]
ExamplesOrReviews = Annotated[
    str | None, _data("CSV or JSONL with text and label (default: the demo's movie reviews).")
]
Texts = Annotated[str | None, _data("CSV or JSONL with text.")]
Prompt = Annotated[
    str | None,
    option(
        "--prompt",
        help=r"Prompt that the label follows, with {text} in it and \n for a line break "
        r"(default: the adapter's, else 'Review: {text}\nSentiment:').",
        metavar="TEXT",
        panel=DATA,
        parser=newlines,
    ),
]
Labels = Annotated[  # typer would repeat an option of type list[str]
    Any, option("--labels", help="Comma-separated (default: the adapter's).", metavar="A,B", panel=DATA, parser=names)
]

# Training.
Rank = Annotated[
    int, number("--r", "--rank", help="Rank of the projections (torchrun takes --r for itself).", panel=TRAINING)
]
Targets = Annotated[
    Any,
    option(
        "--targets",
        help="Comma-separated ends of the names of the layers to adapt (default: q_proj,v_proj or the like).",
        metavar="A,B",
        panel=TRAINING,
        parser=names,
    ),
]
Steps = Annotated[int | None, number("--steps", help="Training steps (default: one epoch, 50 to 100).", panel=TRAINING)]
TrainingBatch = Annotated[int, number("--batch-size", help="Examples per step.", panel=TRAINING)]
LearningRate = Annotated[
    float, number("--learning-rate", help="Initial value, decayed along a cosine.", panel=TRAINING, kind=float)
]
Adapters = Annotated[
    int,
    number(
        "--adapters",
        help="With N > 1: run a sweep over learning rate and d_initial, and save all adapters in OUT/bank.safetensors.",
        panel=TRAINING,
    ),
]
MicroBatches = Annotated[
    int | None,
    number(
        "--parts",
        help="Micro-batches per step (in a sweep: groups of adapters), sharded across the ranks of torchrun; the "
        "result depends on it by rounding only, not on the number of ranks (default: 4 under torchrun, else 1).",
        panel=TRAINING,
    ),
]
TrainingSeed = Annotated[
    int, option("--seed", help="Seed of split, order and projections.", metavar="N", panel=TRAINING, parser=int)
]

# Evaluation.
Chunk = Annotated[int, number("--chunk", help="Adapters per forward pass.")]
BatchSize = Annotated[int, number("--batch-size", help="Examples per forward pass.")]

# Output.
Table = Annotated[str | None, option("--out", help="Write the table to this .csv or .json file.", metavar="FILE")]
Json = Annotated[bool, option("--json", help="Print JSON.")]


def dtype_of(name: str | None) -> "torch.dtype | None":
    """The torch dtype for a value of `--dtype`."""
    import torch

    return getattr(torch, name) if name else None


def load_base(source: "Source", model: str | None, quant: str | None, dtype: str | None) -> "Base":
    """Load the base model of a command, given `--model`, `--quant` and `--dtype`."""
    from ..data.sources import base_of

    return base_of(source, model, quant, dtype_of(dtype))
