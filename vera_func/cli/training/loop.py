"""The training loop: one adapter, or several adapters at once."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.batches import Batch
from ...model.adapt import Adapted
from ...model.batch import Params, stack_adapters
from ...model.dora import keep_norm_statistics
from ...private import tree_map
from ...train.best import Best, better, load_best, save_best, start_best
from ...train.distributed import furthest, map_sharded, mean_over_micro_batches, rank, world_size
from ...train.fit import Fit, fit, load_fit
from ...train.optim import Gradient
from ...train.schedules import schedule_of
from ..report import training_bar
from .logs import step_logger
from .settings import Recipe


CHECKPOINT_EVERY = 10


def for_training(adapted: Adapted) -> Adapted:
    """Add norm statistics to the `frozen` of a DVoRA adapter, so that the statistics are computed only once."""
    if not adapted.apply.schema.magnitudes:
        return adapted
    return adapted._replace(frozen=keep_norm_statistics(adapted.apply, adapted.frozen))


class Trained(NamedTuple):
    """The result of `train_together`.

    Attributes:
        params: The params with the lowest metric if there were evaluations, else the params of the last step.
        steps: Number of training steps that led to `params`, for each adapter.
        loss: Training loss of each adapter in its last step.
        diverged: Whether each adapter stopped because its loss, gradient or update was not finite.
    """

    params: dict[str, Tensor]
    steps: list[int]
    loss: list[float]
    diverged: list[bool]


def train_together(
    loss: Callable[..., Tensor],
    params: Params,
    batches: Callable[[int], list[Batch]],
    recipe: Recipe,
    *,
    steps: Sequence[int],
    learning_rates: Sequence[float],
    evaluate: Callable[[Params], Tensor],
    checkpoint: Path | None,
    progress: bool = True,
    shared: bool = True,
    start: Fit | None = None,
) -> Trained:
    """Train one adapter, or several adapters at once, each with its own learning rate and number of steps.

    Args:
        loss: Function `(params, batch) -> loss`, such as `loss_of_rows` returns.
        params: Initial params; stacked if `steps` has several values.
        batches: Function `step -> micro-batches`, such as `training_batches` returns.
        recipe: Training options.
        steps: Number of steps of each adapter.
        learning_rates: Peak of the learning rate of each adapter.
        evaluate: Function from params to one metric per adapter, where a lower metric is better.
        checkpoint: Checkpoint file; None means no checkpoint.
        progress: Whether to show a progress bar.
        shared: Whether all ranks train the adapters, with micro-batches sharded across ranks. If False, only this rank
            trains the adapters.
        start: A run to continue if there is no checkpoint; None means that training begins at step 0.

    Raises:
        ValueError: If `recipe` has `patience` without `eval_every`, or if the warmup takes all steps.
    """
    n = len(steps)
    stacked = n > 1
    if recipe.patience is not None and not recipe.eval_every:
        raise ValueError("--patience has no effect without evaluations: pass --eval-every as well.")
    state = _Evaluations(params, (n,) if stacked else (), evaluate, checkpoint, shared)
    schedule = schedule_of(recipe.schedule, recipe.warmup, steps)
    resume = resume_run(checkpoint, params, n if stacked else None, shared=shared) or start
    done = 0 if resume is None else len(resume.losses)
    writes = rank() == 0 or not shared
    with (
        training_bar(done, max(steps), progress) as show,
        step_logger(recipe.log if writes else None, checkpoint) as on_step,
    ):
        run = fit(
            loss,
            params,
            batches,
            steps=max(steps),
            learning_rate=list(learning_rates) if stacked else learning_rates[0],
            weight_decay=recipe.weight_decay,
            max_norm=recipe.clip,
            schedule=schedule if stacked else lambda step: schedule(step)[0],
            num_adapters=n if stacked else None,
            resume=resume,
            checkpoint=checkpoint if writes else None,
            checkpoint_every=CHECKPOINT_EVERY,
            accumulate=partial(_accumulate, show, shared),
            on_step=on_step,
            progress=False,
            evaluate=state if recipe.eval_every else None,
            evaluate_every=recipe.eval_every or 1,
            patience=recipe.patience,
        )
    if not recipe.eval_every:
        return _result(run, None, steps)
    if len(run.losses) % recipe.eval_every:
        state(run.params, len(run.losses))
    return _result(run, state.best, steps)


def train_chunks(
    n: int, chunk: int, checkpoint: Path, train: Callable[[slice, Path, bool], Trained], device: torch.device
) -> Trained:
    """Train `n` adapters in chunks of at most `chunk` adapters.

    Under torchrun, chunks are sharded across ranks. If there is only one chunk, its micro-batches are sharded instead.

    Args:
        n: Number of adapters.
        chunk: Maximum number of adapters per chunk.
        checkpoint: Path of the checkpoint; if there are several chunks, the index of a chunk is appended to the path.
        train: Function `(slice of adapters, checkpoint, shared) -> Trained`, which trains one chunk.
        device: Device of the params.
    """
    parts = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    by_chunk = len(parts) > 1 and world_size() > 1

    def one(i: int) -> Trained:
        file = checkpoint if len(parts) == 1 else checkpoint.with_name(f"{checkpoint.name}-{i}")
        return train(parts[i], file, not by_chunk)

    found = map_sharded(one, range(len(parts))) if by_chunk else [one(i) for i in range(len(parts))]
    if n == 1:
        return found[0]
    stacks = [each.params if len(each.steps) > 1 else stack_adapters([each.params]) for each in found]
    params = {key: torch.cat([stack[key].to(device) for stack in stacks]) for key in stacks[0]}
    lists = zip(*(each[1:] for each in found), strict=True)
    return Trained(params, *([value for part in column for value in part] for column in lists))


class _Evaluations:
    """The argument `evaluate` of `fit`: computes the metric, and saves each adapter's params with the lowest metric."""

    def __init__(
        self, params: Params, n: tuple[int, ...], metric: Callable[[Params], Tensor], file: Path | None, shared: bool
    ) -> None:
        self.n, self.metric = n, metric
        self.file = None if file is None else file.with_name(f"{file.name}-best")
        self.best: Best = start_best(params, n)
        self.writes = rank() == 0 or not shared
        if self.file is not None:
            found = load_best(self.file, self.best) if self.file.is_file() else None
            found = furthest(found, -1 if found is None else 0) if shared else found
            if found is not None:
                self.best = found._replace(params=to_device(found.params, params))

    def __call__(self, params: Params, step: int) -> Tensor:
        metric = self.metric(params).cpu().reshape(self.n)
        self.best = better(self.best, params, metric, step)
        if self.file is not None and self.writes:
            save_best(self.file, self.best)
        return metric


def _accumulate(show: Callable[..., None], shared: bool, gradient: Callable[..., Gradient], micro: list[Batch]) -> Any:
    if shared:
        grads, losses = mean_over_micro_batches(gradient, micro, weight=lambda batch: 1.0)
    else:
        grads, losses = _mean([gradient(batch) for batch in micro])
    show(micro, losses)
    return grads, losses


def _mean(results: list[Gradient]) -> Gradient:
    """Average gradients and losses over micro-batches, on this rank alone."""
    grads = {k: torch.stack([g[k].double() for g, _ in results]).mean(0).to(v) for k, v in results[0][0].items()}
    losses = torch.stack([loss.double() for _, loss in results]).mean(0).to(results[0][1])
    return grads, losses


def resume_run(checkpoint: Path | None, params: Params, n: int | None, *, shared: bool = True) -> Fit | None:
    """Load the checkpoint. If `shared`, every rank gets the checkpoint of the rank with the most steps."""
    run = load_fit(checkpoint, params, num_adapters=n) if checkpoint is not None and checkpoint.is_file() else None
    return to_device(furthest(run, -1 if run is None else len(run.losses)), params) if shared else run


def to_device(value: Any, params: Params) -> Any:
    """Move the tensors of a pytree to the device of `params`."""
    device = next(iter(params.values())).device
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def _result(run: Fit, best: Best | None, steps: Sequence[int]) -> Trained:
    losses = run.losses.reshape(len(run.losses), -1)
    stopped, diverged = run.stopped.reshape(-1).tolist(), run.diverged.reshape(-1).tolist()
    ends = [min(end if end >= 0 else total, total) for end, total in zip(stopped, steps, strict=True)]
    last = [losses[max(end - 1, 0), i].item() for i, end in enumerate(ends)]
    if best is None:
        return Trained(run.params, ends, last, diverged)
    kept = [min(int(step), end) for step, end in zip(best.step.reshape(-1).tolist(), ends, strict=True)]
    return Trained(best.params, kept, last, diverged)
