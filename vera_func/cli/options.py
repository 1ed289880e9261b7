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


def numbers(kind: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """A parser for comma-separated positive numbers of type `kind`.

    Example:
        >>> numbers(float)("0.05,0.1")
        [0.05, 0.1]
    """
    one = positive(kind)
    return lambda text: [one(item) for item in str(text).split(",")]


def fraction(text: str) -> float:
    """Parse a number from 0 to below 1.

    Example:
        >>> fraction("0.1")
        0.1
    """
    value = not_negative(text)
    if value >= 1:
        raise ValueError(f"must be below 1, got {text}")
    return value


def not_negative(text: Any) -> float:
    """Parse a finite number that is at least 0.

    Example:
        >>> not_negative("0")
        0.0
    """
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"invalid float value: {text!r}") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"must be at least 0, got {text}")
    return value


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
        "--dtype",
        help="Dtype of the arithmetic (default: bfloat16 on GPUs and CPUs that support it, else float32).",
        panel=MODEL,
    ),
]

Device = Annotated[
    str | None,
    option(
        "--device",
        help="Device of the model: auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one).",
        metavar="NAME",
        panel=MODEL,
    ),
]

Packing = Annotated[
    bool,
    typer.Option(
        "--packing/--no-packing",
        help="Put several texts into each row of a batch; they do not see each other.",
        rich_help_panel=DATA,
    ),
]

# The data.
DataSets = Annotated[
    list[str],
    _data(
        "CSV, JSON Lines or Parquet with text and label; text; prompt and completion; messages; or prompt, chosen and "
        "rejected. A file, a folder, a glob pattern, or owner/name:split of the hub; repeat for several."
    ),
]
Each = Annotated[
    bool, option("--each", help="Train an adapter for each file or sub-folder of the folders of --data.", panel=DATA)
]
MaxLength = Annotated[
    int | None,
    number(
        "--max-length",
        help="Maximum number of tokens of a sequence (default: 256 with labels, else 512).",
        panel=DATA,
    ),
]
TruncateSide = Annotated[
    Literal["end", "start"],
    option("--truncate-side", help="Which end of longer sequences is cut off; long texts are split.", panel=DATA),
]
ExamplesOrReviews = Annotated[
    str | None, _data("CSV or JSONL with text and label (default: the demo's movie reviews).")
]
RowsOrReviews = Annotated[str | None, _data("Rows of any kind that train takes (default: the demo's movie reviews).")]
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
        help="Comma-separated ends of the names of the layers to adapt, or all-linear (default: q_proj,v_proj or the "
        "like).",
        metavar="A,B",
        panel=TRAINING,
        parser=names,
    ),
]
Steps = Annotated[int | None, number("--steps", help="Training steps (default: one epoch, 50 to 100).", panel=TRAINING)]
TrainingBatch = Annotated[int, number("--batch-size", help="Examples per step and adapter.", panel=TRAINING)]
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

TrainSteps = Annotated[
    Any,
    option(
        "--steps",
        help="Training steps, or one number for each adapter (default: one epoch, 50 to 100).",
        metavar="N,...",
        panel=TRAINING,
        parser=numbers(int),
    ),
]
Epochs = Annotated[
    float | None,
    number("--epochs", help="Passes over the training rows, in place of --steps.", panel=TRAINING, kind=float),
]
LearningRates = Annotated[
    Any,
    option(
        "--learning-rate",
        help="Peak of the learning rate, or one for each adapter.",
        metavar="X,...",
        panel=TRAINING,
        parser=numbers(float),
    ),
]
Accumulate = Annotated[
    int | None,
    number(
        "--parts",
        "--accumulate",
        help="Micro-batches per step (in a sweep: groups of adapters), sharded across the ranks of torchrun; the "
        "result depends on it by rounding only, not on the number of ranks (default: 4 under torchrun, else 1).",
        panel=TRAINING,
    ),
]
ScheduleName = Annotated[
    Literal["cosine", "linear", "constant"],
    option("--schedule", help="How the learning rate decays.", panel=TRAINING),
]
Warmup = Annotated[
    float,
    option(
        "--warmup",
        help="Steps in which the learning rate rises, or a fraction of the steps if below 1.",
        metavar="X",
        panel=TRAINING,
        parser=not_negative,
    ),
]
WeightDecay = Annotated[
    float,
    option("--weight-decay", help="Weight decay of AdamW.", metavar="X", panel=TRAINING, parser=not_negative),
]
Clip = Annotated[float, number("--clip", help="Maximum norm of a gradient.", panel=TRAINING, kind=float)]
Dropout = Annotated[
    float,
    option("--dropout", help="Probability of the adapter's dropout.", metavar="X", panel=TRAINING, parser=fraction),
]
Checkpointing = Annotated[
    bool,
    option("--checkpointing", help="Compute activations again in the backward pass, to save memory.", panel=TRAINING),
]
EvalEvery = Annotated[
    int | None,
    number(
        "--eval-every",
        help="Measure the held-out loss every N steps, and keep the best adapter (default: keep the last).",
        panel=TRAINING,
    ),
]
Patience = Annotated[
    int | None,
    number("--patience", help="Evaluations without improvement after which an adapter stops.", panel=TRAINING),
]
Log = Annotated[
    str | None,
    option(
        "--log",
        "--log-steps",
        help="Write the loss of each step to this folder: TensorBoard's files, or steps.jsonl if tensorboard is not "
        "installed (torchrun takes --log for itself).",
        metavar="DIR",
        panel=TRAINING,
    ),
]
Betas = Annotated[
    Any,
    option(
        "--beta",
        help="Of preferences: strength of the reference (default: 0.1); an adapter is trained for each value.",
        metavar="X,...",
        panel=TRAINING,
        parser=numbers(float),
    ),
]
Reference = Annotated[
    str | None,
    option(
        "--reference",
        help="Of preferences: a PEFT directory, the reference and the initial adapter (default: the base).",
        metavar="DIR",
        panel=TRAINING,
    ),
]
Together = Annotated[int, number("--together", help="Adapters that train together.", panel=TRAINING)]

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


def load_base(source: "Source", quant: str | None, dtype: str | None, device: str | None = None) -> "Base":
    """Load the base model of a command, given `--quant`, `--dtype` and `--device`."""
    from ..data.sources import base_of

    return base_of(source, quant, dtype_of(dtype), device or "auto")
