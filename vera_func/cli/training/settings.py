"""The options of a training run."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...train.distributed import under_torchrun
from ...train.schedules import Schedule


PARTS = 4  # default number of micro-batches per step under torchrun


class Recipe(NamedTuple):
    """Options of a training run that do not depend on the data set.

    Attributes:
        batch_size: Number of rows per adapter and step.
        micro_batches: Number of micro-batches per step.
        schedule: Decay of the learning rates; see `schedule_of`.
        warmup: Number of warmup steps; a value below 1 is a fraction of an adapter's steps.
        weight_decay: Weight decay of AdamW.
        clip: Maximum norm of an adapter's gradient.
        dropout: Dropout probability of an adapter.
        dora: Whether new adapters are DVoRA adapters.
        checkpointing: Whether the backward pass recomputes activations.
        eval_every: Number of steps between two evaluations; None means no evaluations during training.
        patience: Number of evaluations without improvement after which the training of an adapter stops.
        seed: Seed of the held-out split, the order of the rows, the projections and dropout.
        log: Folder for the training log; None means no log.
    """

    batch_size: int = 16
    micro_batches: int = 1
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    dropout: float = 0.0
    dora: bool = False
    checkpointing: bool = False
    eval_every: int | None = None
    patience: int | None = None
    seed: int = 0
    log: str | None = None


class Run(NamedTuple):
    """Options of a run of `train`, except for the data.

    Attributes:
        out: Folder for the adapter, or for the bank of several adapters.
        recipe: Training options.
        model, quant, dtype, device: As for `load_base`.
        r: Rank of the projections.
        targets: Suffixes of the names of the layers to adapt, or "all-linear"; None means PEFT's default.
        steps: Number of training steps, as one value or one per adapter.
        epochs: Number of passes over the training rows of an adapter, if `steps` is None; see `num_steps`.
        learning_rates: Peak of the learning rate, as one value or one per adapter.
        max_length: Maximum number of tokens of a sequence; None means the default for the kind of data.
        together: Maximum number of adapters that train at once.
    """

    out: str
    recipe: Recipe
    model: str | None = None
    quant: str | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    r: int = 256
    targets: str | Sequence[str] | None = None
    steps: Sequence[int] | None = None
    epochs: float | None = None
    learning_rates: Sequence[float] = (2e-2,)
    max_length: int | None = None
    together: int = 64


def micro_batches(parts: int | None) -> int:
    """The number of micro-batches per step: `parts`; if None, 4 under torchrun and 1 otherwise."""
    return parts or (PARTS if under_torchrun() else 1)
