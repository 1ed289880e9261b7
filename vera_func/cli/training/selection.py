"""Train a text classifier for the commands `demo` and `train`: one adapter, or a sweep that selects the best adapter.

A sweep of n adapters has two phases. In the first phase, all adapters train in one run for half the steps. The batch
size of each adapter is 2 / n times the given batch size, so all adapters together process as many examples as a single
run. In the second phase, the adapter with the lowest validation loss continues alone for all steps, with the given
batch size. In total, a sweep processes about twice the training examples of a single run, plus 200 validation examples
per adapter.

Under torchrun, the `parts` micro-batches of each step are sharded across ranks. In the first phase of a sweep, `parts`
groups of adapters are sharded instead. `parts` changes the results by rounding only. The number of ranks does not
change the results.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.keys import split_key
from ...data.objective import with_dropout
from ...data.prompts import Batch, Encoded, answer_loss, num_rows, split_batch, train_batches
from ...data.task import Task, loss_of, score_of
from ...model.adapt import Adapted
from ...model.batch import num_adapters, stack_adapters
from ...train.checkpointing import checkpointed_loss
from ...train.distributed import furthest, map_sharded, mean_over_micro_batches, rank
from ...train.fit import Fit, fit, load_fit
from ...train.schedules import linear_warmup_cosine
from ...train.sweep import fit_row, join_fits, sweep, sweep_table
from ..report import bar
from .loop import CHECKPOINT_EVERY, for_training, to_device, train_together
from .settings import Recipe


class Sweep(NamedTuple):
    """The result of `train_sweep`.

    Attributes:
        best: Final params of the best adapter.
        row: Index of the best adapter.
        stacked: Final params of all adapters, including the best one.
        table: One row per adapter: its name, hyper-parameters, validation loss and validation accuracy.
    """

    best: dict[str, Tensor]
    row: int
    stacked: dict[str, Tensor]
    table: list[dict[str, Any]]


def train_one(
    adapted: Adapted,
    task: Task,
    train: Sequence[Encoded],
    held_out: Sequence[Encoded],
    recipe: Recipe,
    *,
    steps: int,
    learning_rate: float,
    progress: bool,
    checkpoint: Path | None = None,
) -> dict[str, Tensor]:
    """Train one adapter; return the final params, or with evaluations, the params with the lowest held-out loss."""
    order = train_batches(train, recipe.batch_size, seed=recipe.seed, pad_id=task.pad_id)
    kept = for_training(adapted)

    def batches(step: int) -> list[Any]:
        parts = split_batch(order(step), recipe.micro_batches)
        return [{**part, "step": step, "micro_batch": i} for i, part in enumerate(parts) if num_rows(part)]

    def classify(module: Any, batch: Any) -> Tensor:
        inputs = {name: batch[name].to(module.device) for name in batch.keys() & task.accepts}
        logits = module(**inputs, use_cache=False).logits[:, -1, task.answers]
        return answer_loss(logits, batch["label"].to(logits.device))

    def loss(params: Mapping[str, Tensor], batch: Any) -> Tensor:
        model = with_dropout(kept, recipe.seed, batch) if recipe.dropout else kept
        return loss_of(model, task)(params, batch)

    return train_together(
        checkpointed_loss(adapted, classify) if recipe.checkpointing else loss,
        adapted.params,
        batches,
        recipe,
        steps=[steps],
        learning_rates=[learning_rate],
        evaluate=lambda params: score_of(kept, task, dict(params), held_out, map=map_sharded).loss,
        checkpoint=checkpoint,
        progress=progress,
        weight=num_rows,
    ).params


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
    *,
    steps: int,
    batch_size: int,
    seed: int,
    progress: bool,
    parts: int = 1,
    checkpoint: Path | None = None,
) -> Sweep:
    """Train all adapters for half the steps in one run, then the best adapter alone for all steps.

    Args:
        adapted: A new adapter, from `adapt`.
        task: The task of the adapters.
        grid: Hyper-parameters of each adapter, from `sweep_grid`.
        train: Training examples.
        validation: Validation examples; the best adapter is the adapter with the lowest mean validation loss.
        steps, batch_size: Number of steps and batch size of the second phase.
        seed: Seed of the order of the examples.
        progress: Whether to show progress bars.
        parts: Number of groups of adapters in the first phase, and of micro-batches per batch in the second.
        checkpoint: Checkpoint of the second phase. In the first phase, the index of each group is appended to the path.

    Raises:
        RuntimeError: If every adapter diverged.
    """
    adapted = for_training(adapted)
    half = max(1, steps // 2)
    n, rates = len(grid), [row["learning_rate"] for row in grid]
    small, full = (
        train_batches(train, size, seed=seed, pad_id=task.pad_id) for size in (small_batch(batch_size, n), batch_size)
    )
    start = stack_adapters([_start(adapted.params, row["d_initial"]) for row in grid])
    size = -(-n // parts)
    groups = [slice(i, i + size) for i in range(0, n, size)]
    stacks = [{k: leaf[group] for k, leaf in start.items()} for group in groups]
    files = [checkpoint and checkpoint.with_name(f"{checkpoint.name}-{i}") for i in range(len(groups))]
    # All ranks resume all groups, because `_resume` communicates. Afterwards, each rank trains its own groups.
    runs = [_resume(file, stack, num_adapters(stack)) for file, stack in zip(files, stacks, strict=True)]
    common: dict[str, Any] = {"total": half + steps, "progress": progress}

    def train_group(i: int) -> Fit:
        options = {"resume": runs[i], "checkpoint": files[i], "num_adapters": num_adapters(stacks[i]), **common}
        loss = loss_of(adapted, task, stacked=True)
        return _fit(loss, stacks[i], small, learning_rate=rates[groups[i]], steps=half, **options)

    run = join_fits(map_sharded(train_group, range(len(groups))))
    options = {"batch_size": max(1, 256 // n), "progress": bar("validation", progress), "map": map_sharded}
    score = score_of(adapted, task, run.params, validation, **options)
    loss = torch.where(run.diverged, torch.inf, score.loss).nan_to_num(nan=torch.inf)
    row = int(loss.argmin())
    if run.diverged[row]:
        raise RuntimeError(f"all {n} adapters of the sweep diverged: use a learning rate below {min(rates):.2g}.")
    one, alone = fit_row(run, row), loss_of(adapted, task)
    common |= {"learning_rate": rates[row], "steps": half + steps}
    one = _fit_parts(alone, one.params, full, parts, checkpoint, resume=one, **common)
    stacked = {k: torch.cat([v[:row], one.params[k][None], v[row + 1 :]]) for k, v in run.params.items()}
    names = [f"lr{start['learning_rate']:.2g}-d{start['d_initial']:.2g}" for start in grid]
    table = sweep_table(grid, {"name": names, "loss": score.loss, "accuracy": score.accuracy})
    return Sweep(one.params, row, stacked, [{"name": line["name"], **line} for line in table])


def _fit(
    loss: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    batches: Callable[[int], Any],
    *,
    total: int,
    **options: Any,
) -> Fit:
    schedule = partial(linear_warmup_cosine, warmup=0, total=total)
    return fit(loss, params, batches, schedule=schedule, max_norm=1.0, checkpoint_every=CHECKPOINT_EVERY, **options)


def _fit_parts(
    loss: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    batches: Callable[[int], Batch],
    parts: int,
    checkpoint: Path | None,
    *,
    resume: Fit | None = None,
    **options: Any,
) -> Fit:
    """Train one adapter with micro-batches sharded across ranks; rank 0 writes the checkpoint."""
    options |= {"resume": _resume(checkpoint, params) or resume, "checkpoint": None if rank() else checkpoint}
    accumulate = partial(mean_over_micro_batches, weight=num_rows)
    return _fit(loss, params, lambda step: split_batch(batches(step), parts), accumulate=accumulate, **options)


def _resume(checkpoint: Path | None, params: Mapping[str, Tensor], num_adapters: int | None = None) -> Fit | None:
    """Load the checkpoint; every rank gets the checkpoint of the rank with the most steps."""
    run = None
    if checkpoint is not None and checkpoint.is_file():
        run = load_fit(checkpoint, params, num_adapters=num_adapters)
    return to_device(furthest(run, -1 if run is None else len(run.losses)), params)


def _start(params: Mapping[str, Tensor], d_initial: float) -> dict[str, Tensor]:
    return {k: torch.full_like(v, d_initial) if split_key(k)[1] == "lambda_d" else v for k, v in params.items()}
