"""The options of the commands, as annotated types."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import typer

from .parsers import fraction, names, newlines, not_negative, numbers, positive


Format = Literal["nf4", "fp4", "int8", "float32", "bfloat16", "float16"]
ADAPTER, MODEL, DATA, TRAINING = "Adapter", "Base model", "Data", "Training"  # panels of the help


def option(*names: str, help: str, metavar: str | None = None, panel: str | None = None, parser: Any = None) -> Any:
    """A typer option, with shorter keywords."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, parser=parser)


def number(*names: str, help: str, panel: str | None = None, kind: Callable[[Any], Any] = int) -> Any:
    """An option that takes a positive number."""
    return option(*names, help=help, metavar="N" if kind is int else "X", panel=panel, parser=positive(kind))


def folder(help: str) -> Any:
    """The option `--out` of a command that writes a folder."""
    return option("--out", help=help, metavar="DIR")


def format_option(help: str, panel: str | None = None) -> Any:
    """The option `--to`; the help text lists the formats, because the list is too long for the metavar column."""
    return option("--to", help=f"{help}: {', '.join(get_args(Format))}.", metavar="FORMAT", panel=panel)


def _model(help: str) -> Any:
    return option("--model", help=help, metavar="ID", panel=MODEL)


def _micro_batches(*names: str) -> Any:
    return number(
        *names,
        help="Number of micro-batches per step (in a sweep: number of groups of adapters) to shard across the ranks of "
        "torchrun. The number changes the result by rounding only (default: 4 under torchrun, else 1).",
        panel=TRAINING,
    )


def _data(help: str) -> Any:
    return option("--data", help=help, metavar="FILE", panel=DATA)


# The adapters.
Adapter = Annotated[str | None, option("--adapter", help="PEFT directory or hub id.", metavar="DIR", panel=ADAPTER)]
Bank = Annotated[str | None, option("--bank", help="Adapter bank, a .safetensors file.", metavar="FILE", panel=ADAPTER)]
Names = Annotated[
    list[str] | None,
    option(
        "--name",
        help="Name of an adapter in the bank; repeat the option for several adapters (default: all adapters; merge and "
        "export-lora require exactly one).",
        metavar="NAME",
        panel=ADAPTER,
    ),
]

# The base model.
Model = Annotated[
    str | None,
    _model(
        "Folder or hub id of a causal language model (default: the model that the adapter names; without an adapter, "
        "SmolLM2-135M)."
    ),
]
ModelToMerge = Annotated[
    str | None,
    _model("Folder or hub id of an adapter's base model; adds a report on a merge of the adapter into this model."),
]
Quant = Annotated[
    Literal["nf4", "fp4", "int8", "none"] | None,
    option(
        "--quant",
        help="Quantization format of the linear layers (default: the format in which the adapter was trained; if "
        "unknown, the format of the stored model, or nf4 if the stored model is not quantized).",
        panel=MODEL,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    option(
        "--dtype",
        help="Dtype of the arithmetic (default: bfloat16 on a GPU, or on a CPU with bfloat16 instructions; else "
        "float32).",
        panel=MODEL,
    ),
]

Device = Annotated[
    str | None,
    option(
        "--device",
        help="Device of the model: auto, cpu, cuda or cuda:N (default: auto, which selects a GPU if there is one).",
        metavar="NAME",
        panel=MODEL,
    ),
]

Packing = Annotated[
    bool | None,
    typer.Option(
        "--packing/--no-packing",
        help="Pack several texts into each training row, without attention between different texts (default: packing).",
        rich_help_panel=DATA,
    ),
]

# The data.
DataSets = Annotated[
    list[str],
    _data(
        "CSV, JSON Lines or Parquet file, folder or glob pattern of such files, or hub data set (owner/name:split); "
        "repeat the option for several data sets. The columns are text and label; text; prompt and completion; "
        "messages; or prompt, chosen and rejected."
    ),
]
Each = Annotated[
    bool,
    option("--each", help="Train one adapter for each file or sub-folder in the folders of --data.", panel=DATA),
]
MaxLength = Annotated[
    int | None,
    number(
        "--max-length",
        help="Maximum number of tokens of a sequence (default: 256 for data with labels, else 512).",
        panel=DATA,
    ),
]
MaxLengthOfRows = Annotated[
    int | None,
    number(
        "--max-length",
        help="Maximum number of tokens of a sequence (default: the maximum used in training; without an adapter, 256 "
        "for data with labels, else 512).",
        panel=DATA,
    ),
]
TruncateSide = Annotated[
    Literal["end", "start"] | None,
    option(
        "--truncate-side",
        help="Side on which completions, chats and preferences that exceed --max-length are truncated (default: end).",
        panel=DATA,
    ),
]
ExamplesOrReviews = Annotated[
    str | None,
    _data("CSV, JSON Lines or Parquet file with the columns text and label (default: the demo's movie reviews)."),
]
RowsOrReviews = Annotated[
    str | None, _data("Data of any kind that the command train accepts (default: the demo's held-out movie reviews).")
]
Texts = Annotated[str | None, _data("CSV, JSON Lines or Parquet file with the column text.")]
Prompt = Annotated[
    str | None,
    option(
        "--prompt",
        help=r"Prompt template that contains {text} and ends where the label begins; write \n for a line break "
        r"(default: the template used in training, else 'Review: {text}\nSentiment:').",
        metavar="TEXT",
        panel=DATA,
        parser=newlines,
    ),
]
Labels = Annotated[  # typer would repeat an option of type list[str]
    Any,
    option(
        "--labels",
        help="Comma-separated labels, used if the adapter has no labels in its metadata.",
        metavar="A,B",
        panel=DATA,
        parser=names,
    ),
]

# Training.
Rank = Annotated[
    int, number("--r", "--rank", help="Rank of the projections (under torchrun, write --rank).", panel=TRAINING)
]
Targets = Annotated[
    Any,
    option(
        "--targets",
        help="Comma-separated suffixes of the names of the layers to adapt, or all-linear (default: PEFT's default for "
        "the model type, such as q_proj,v_proj).",
        metavar="A,B",
        panel=TRAINING,
        parser=names,
    ),
]
Steps = Annotated[
    int | None,
    number(
        "--steps",
        help="Number of training steps (default: one epoch, but at least 50 and at most 100 steps).",
        panel=TRAINING,
    ),
]
TrainingBatch = Annotated[
    int, number("--batch-size", help="Number of examples per training step and adapter.", panel=TRAINING)
]
LearningRate = Annotated[
    float,
    number("--learning-rate", help="Initial learning rate, with cosine decay.", panel=TRAINING, kind=float),
]
Adapters = Annotated[
    int,
    number(
        "--adapters",
        help="Number of adapters; if N > 1, run a sweep over the learning rate and d_initial (the initial value of "
        "lambda_d), save the best adapter in OUT, and save all adapters in OUT/bank.safetensors.",
        panel=TRAINING,
    ),
]
MicroBatches = Annotated[int | None, _micro_batches("--parts")]
TrainingSeed = Annotated[
    int,
    option(
        "--seed",
        help="Seed of the held-out split, of the order of the examples, and of the projections.",
        metavar="N",
        panel=TRAINING,
        parser=int,
    ),
]

TrainSteps = Annotated[
    Any,
    option(
        "--steps",
        help="Number of training steps, as one value or one per adapter (default: one epoch, but at least 50 and at "
        "most 100 steps).",
        metavar="N,...",
        panel=TRAINING,
        parser=numbers(int),
    ),
]
Epochs = Annotated[
    float | None,
    number("--epochs", help="Number of passes over the training rows, instead of --steps.", panel=TRAINING, kind=float),
]
LearningRates = Annotated[
    Any,
    option(
        "--learning-rate",
        help="Peak of the learning rate, as one value or one per adapter.",
        metavar="X,...",
        panel=TRAINING,
        parser=numbers(float),
    ),
]
Accumulate = Annotated[int | None, _micro_batches("--parts", "--accumulate")]
ScheduleName = Annotated[
    Literal["cosine", "linear", "constant"],
    option("--schedule", help="Decay of the learning rate.", panel=TRAINING),
]
Warmup = Annotated[
    float,
    option(
        "--warmup",
        help="Number of warmup steps; a value below 1 is a fraction of the training steps.",
        metavar="X",
        panel=TRAINING,
        parser=not_negative,
    ),
]
WeightDecay = Annotated[
    float,
    option("--weight-decay", help="Weight decay of AdamW.", metavar="X", panel=TRAINING, parser=not_negative),
]
Clip = Annotated[float, number("--clip", help="Maximum norm of an adapter's gradient.", panel=TRAINING, kind=float)]
Dropout = Annotated[
    float,
    option("--dropout", help="Dropout probability of the adapter.", metavar="X", panel=TRAINING, parser=fraction),
]
Dora = Annotated[
    bool,
    option(
        "--dora",
        help="Train DVoRA adapters, which also have a magnitude for each row of an adapted weight.",
        panel=TRAINING,
    ),
]
Checkpointing = Annotated[
    bool,
    option("--checkpointing", help="Recompute activations in the backward pass, to save memory.", panel=TRAINING),
]
EvalEvery = Annotated[
    int | None,
    number(
        "--eval-every",
        help="Measure the held-out loss every N steps, and save the params with the lowest loss (default: save the "
        "params of the last step).",
        panel=TRAINING,
    ),
]
Patience = Annotated[
    int | None,
    number(
        "--patience",
        help="Number of evaluations without improvement after which the training of an adapter stops.",
        panel=TRAINING,
    ),
]
Log = Annotated[
    str | None,
    option(
        "--log",
        "--log-steps",
        help="Folder for a log of the loss of each step: TensorBoard's files, or steps.jsonl if tensorboard is not "
        "installed (under torchrun, write --log-steps).",
        metavar="DIR",
        panel=TRAINING,
    ),
]
Betas = Annotated[
    Any,
    option(
        "--beta",
        help="For preferences: beta of DPO; one adapter is trained per value (default: 0.1).",
        metavar="X,...",
        panel=TRAINING,
        parser=numbers(float),
    ),
]
Reference = Annotated[
    str | None,
    option(
        "--reference",
        help="For preferences: PEFT directory of the reference, from which training also starts (default: the base "
        "model is the reference, and training starts from a new adapter).",
        metavar="DIR",
        panel=TRAINING,
    ),
]
Together = Annotated[int, number("--together", help="Maximum number of adapters that train at once.", panel=TRAINING)]

# Evaluation.
Chunk = Annotated[int, number("--chunk", help="Number of adapters per forward pass.")]
BatchSize = Annotated[int, number("--batch-size", help="Number of texts per adapter and forward pass.")]
ExamplesPerPass = Annotated[
    int | None,
    number(
        "--batch-size",
        help="Number of labelled examples per adapter and forward pass (default: 32); not for data without labels.",
    ),
]
Ray = Annotated[
    str | None,
    option(
        "--ray",
        help="Address of a Ray cluster for the evaluation: auto, host:port, ray://host:port, or local.",
        metavar="ADDRESS",
    ),
]

# Output.
Table = Annotated[str | None, option("--out", help="Write the table to this .csv or .json file.", metavar="FILE")]
Json = Annotated[bool, option("--json", help="Print the result as JSON.")]
