"""The options of the commands, as annotated types."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import typer

from .parsers import fraction, names, newlines, not_negative, numbers, positive


Format = Literal["nf4", "fp4", "int8", "float32", "bfloat16", "float16"]
ADAPTER, MODEL, DATA, TRAINING = "Adapter", "Base model", "Data", "Training"  # panels of the help


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


def _micro_batches(*names: str) -> Any:
    return number(
        *names,
        help="Micro-batches per step (in a sweep: groups of adapters), sharded across the ranks of torchrun. The "
        "result depends on this number by rounding only, and not on the number of ranks (default: 4 under torchrun, "
        "else 1).",
        panel=TRAINING,
    )


def _data(help: str) -> Any:
    return option("--data", help=help, metavar="FILE", panel=DATA)


# The adapters.
Adapter = Annotated[str | None, option("--adapter", help="A PEFT directory or hub id.", metavar="DIR", panel=ADAPTER)]
Bank = Annotated[str | None, option("--bank", help="An adapter bank.", metavar="FILE", panel=ADAPTER)]
Names = Annotated[
    list[str] | None,
    option(
        "--name",
        help="An adapter of the bank; repeat for several (default: all; merge and export-lora take one).",
        metavar="NAME",
        panel=ADAPTER,
    ),
]

# The base model.
Model = Annotated[str | None, _model("default: the adapter's, else SmolLM2-135M")]
ModelToMerge = Annotated[str | None, _model("of an adapter: adds the size of its updates and what a merge retains")]
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
        help="Pack several texts into each row of a batch, without attention between them.",
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
MaxLengthOfRows = Annotated[
    int | None,
    number(
        "--max-length",
        help="Maximum number of tokens of a sequence (default: as in training, else 256 with labels and 512 without).",
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
MicroBatches = Annotated[int | None, _micro_batches("--parts")]
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
Accumulate = Annotated[int | None, _micro_batches("--parts", "--accumulate")]
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
Dora = Annotated[
    bool, option("--dora", help="Train DVoRA: also the magnitudes of the rows of the adapted weights.", panel=TRAINING)
]
Checkpointing = Annotated[
    bool,
    option("--checkpointing", help="Recompute activations in the backward pass, to save memory.", panel=TRAINING),
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
        help="For preferences: beta of DPO (default: 0.1); an adapter is trained for each value.",
        metavar="X,...",
        panel=TRAINING,
        parser=numbers(float),
    ),
]
Reference = Annotated[
    str | None,
    option(
        "--reference",
        help="For preferences: the reference, a PEFT directory; also the initial adapter (default: the base).",
        metavar="DIR",
        panel=TRAINING,
    ),
]
Together = Annotated[int, number("--together", help="Adapters that train together.", panel=TRAINING)]

# Evaluation.
Chunk = Annotated[int, number("--chunk", help="Adapters per forward pass.")]
BatchSize = Annotated[int, number("--batch-size", help="Examples per forward pass.")]
Ray = Annotated[
    str | None,
    option(
        "--ray",
        help="Evaluate on the Ray cluster at this address: auto, host:port, ray://host:port, or local.",
        metavar="ADDRESS",
    ),
]

# Output.
Table = Annotated[str | None, option("--out", help="Write the table to this .csv or .json file.", metavar="FILE")]
Json = Annotated[bool, option("--json", help="Print JSON.")]
