"""A sweep: train several adapters, select the best adapter, and train the best adapter further.

A sweep of n adapters has two phases. In the first phase, all adapters train in one run for half the given number of
steps. The batch size of each adapter is 2 / n times the given batch size, so the first phase processes as many examples
as a single run. In the second phase, the adapter with the lowest validation loss continues alone for the given number
of steps, with the given batch size. In total, a sweep processes about twice the training examples of a single run, plus
200 validation examples per adapter.

Under torchrun, the first phase shards groups of adapters across ranks, and the second phase shards the micro-batches of
each step. The option `micro_batches` sets the number of micro-batches and the maximum number of groups. This option
changes the results only by rounding errors. The number of ranks does not change the results.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.keys import split_key
from ...data.prompts import Encoded, train_batches
from ...data.task import Task, loss_of, score_of
from ...model.adapt import Adapted
from ...model.batch import num_adapters, stack_adapters
from ...train.distributed import map_sharded
from ...train.fit import Fit, fit
from ...train.schedules import linear_warmup_cosine
from ...train.sweep import fit_row, join_fits, sweep, sweep_table
from ..report import bar
from .labels import train_classifiers
from .loop import CHECKPOINT_EVERY, for_training, resume_run
from .settings import Recipe


class Sweep(NamedTuple):
    """The result of `train_sweep`.

    Attributes:
        best: Final params of the best adapter.
        row: Index of the best adapter.
        stacked: Final params of all adapters, including the best adapter.
        table: One row per adapter: its name, hyper-parameters, validation loss and validation accuracy.
    """

    best: dict[str, Tensor]
    row: int
    stacked: dict[str, Tensor]
    table: list[dict[str, Any]]


def sweep_grid(adapters: int, learning_rate: float) -> list[dict[str, Any]]:
    """Hyper-parameters of each adapter of a sweep, from a grid of learning rates and values of `d_initial`.

    The grid has two values of `d_initial`, or one value if the number of adapters is odd. All adapters share the
    projections, so the projection seed is not part of the grid.

    Example:
        >>> [tuple(row.values()) for row in sweep_grid(4, 0.02)]
        [(0.005, 0.1), (0.005, 0.5), (0.04, 0.1), (0.04, 0.5)]
    """
    scales = [0.1, 0.5] if adapters % 2 == 0 else [0.1]
    count = adapters // len(scales)
    powers = [-2 + 3 * i / (count - 1) for i in range(count)] if count > 1 else [0.0]
    return sweep({"learning_rate": [learning_rate * 2**power for power in powers], "d_initial": scales})


def small_batch(batch_size: int, adapters: int) -> int:
    """The batch size of each adapter of a sweep, such that all adapters together process two full batches per step.

    Example:
        >>> small_batch(16, 8)
        4
    """
    return max(1, 2 * batch_size // adapters)


def train_sweep(
    adapted: Adapted,
    task: Task,
    grid: Sequence[Mapping[str, Any]],
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    recipe: Recipe,
    *,
    steps: int,
    progress: bool,
    checkpoint: Path | None = None,
) -> Sweep:
    """Train all adapters in one run for `steps` / 2 steps, then the best adapter alone for `steps` more steps.

    Args:
        adapted: A new adapter, from `adapt`.
        task: The task of the adapters.
        grid: Hyper-parameters of each adapter, from `sweep_grid`.
        train: Training examples.
        validation: Validation examples; the best adapter is the adapter with the lowest mean validation loss.
        recipe: Training options. In the first phase, `small_batch` gives the batch size of each adapter, and
            `micro_batches` is the maximum number of groups of adapters.
        steps: Number of steps of the second phase.
        progress: Whether to show progress bars.
        checkpoint: Checkpoint of the second phase. In the first phase, the index of each group is appended to the path.

    Raises:
        RuntimeError: If every adapter diverged.
    """
    half = max(1, steps // 2)
    rates = [row["learning_rate"] for row in grid]
    run = _train_all(adapted, task, grid, train, recipe, half, half + steps, progress, checkpoint)
    score = score_of(
        adapted, task, run.params, validation, batch_size=max(1, 256 // len(grid)), map=map_sharded,
        progress=bar("validation", progress),
    )  # fmt: skip
    loss = torch.where(run.diverged, torch.inf, score.loss).nan_to_num(nan=torch.inf)
    row = int(loss.argmin())
    if run.diverged[row]:
        raise RuntimeError(
            f"all {len(grid)} adapters of the sweep diverged: use a learning rate below {min(rates):.2g}."
        )
    one = train_classifiers(
        adapted, [task], [train], recipe, steps=[half + steps], learning_rates=[rates[row]],
        evaluate=lambda params: score_of(adapted, task, params, validation, map=map_sharded).loss,
        checkpoint=checkpoint, start=fit_row(run, row), progress=progress,
    )  # fmt: skip
    stacked = {k: torch.cat([v[:row], one.params[k][None], v[row + 1 :]]) for k, v in run.params.items()}
    names = [f"lr{start['learning_rate']:.2g}-d{start['d_initial']:.2g}" for start in grid]
    table = sweep_table(grid, {"name": names, "loss": score.loss, "accuracy": score.accuracy})
    return Sweep(one.params, row, stacked, [{"name": line["name"], **line} for line in table])


def _train_all(
    adapted: Adapted,
    task: Task,
    grid: Sequence[Mapping[str, Any]],
    train: Sequence[Encoded],
    recipe: Recipe,
    steps: int,
    total: int,
    progress: bool,
    checkpoint: Path | None,
) -> Fit:
    """Train all adapters on the same batches for the first `steps` steps of a schedule of `total` steps."""
    adapted, n = for_training(adapted), len(grid)
    rates = [row["learning_rate"] for row in grid]
    batches = train_batches(train, small_batch(recipe.batch_size, n), seed=recipe.seed, pad_id=task.pad_id)
    start = stack_adapters([_start(adapted.params, row["d_initial"]) for row in grid])
    size = -(-n // recipe.micro_batches)
    groups = [slice(i, i + size) for i in range(0, n, size)]
    stacks = [{k: leaf[group] for k, leaf in start.items()} for group in groups]
    files = [checkpoint and checkpoint.with_name(f"{checkpoint.name}-{i}") for i in range(len(groups))]
    # All ranks resume all groups, because `resume_run` communicates. Afterwards, each rank trains its own groups.
    runs = [resume_run(file, stack, num_adapters(stack)) for file, stack in zip(files, stacks, strict=True)]

    def train_group(i: int) -> Fit:
        return fit(
            loss_of(adapted, task, stacked=True), stacks[i], batches, steps=steps, learning_rate=rates[groups[i]],
            schedule=partial(linear_warmup_cosine, warmup=0, total=total), max_norm=recipe.clip,
            num_adapters=num_adapters(stacks[i]), resume=runs[i], checkpoint=files[i],
            checkpoint_every=CHECKPOINT_EVERY, progress=progress,
        )  # fmt: skip

    return join_fits(map_sharded(train_group, range(len(groups))))


def _start(params: Mapping[str, Tensor], d_initial: float) -> dict[str, Tensor]:
    return {k: torch.full_like(v, d_initial) if split_key(k)[1] == "lambda_d" else v for k, v in params.items()}
