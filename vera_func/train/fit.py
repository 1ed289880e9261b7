"""A training loop for one adapter or for many at once. The complete state of a run is one value, a `Fit`.

    losses, grads = value_and_grad(loss)(params, batch)
    updates, state = optimizer.update(clip_by_norm(grads, max_norm), state, params)
    params = apply_updates(params, updates, learning_rate * schedule(step))

The losses of stacked adapters are independent, so one backward pass of their sum computes the gradient of every loss.
`torch.func.vmap` maps the update of one adapter over the stack. Batches and schedules are functions of the step, so
training resumes exactly from a `Fit`.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.shapes import require_integer
from ..private import in_transform, tree_map
from .gradient import LossFn, gradient_of, require_gradient, require_shape
from .optim import (
    Gradient,
    Optimizer,
    adamw_update,
    apply_updates,
    as_optimizer,
    clip_by_norm,
    global_norm,
)
from .order import batch_indices as batch_indices  # part of this module's API
from .run import Fit, PathLike, Tree, load_fit, require_like, save_fit, start_run, step_numbers
from .schedules import constant


PerAdapter = float | Sequence[float] | Tensor  # one value for all adapters, or one per adapter
Accumulate = Callable[[Callable[[Any], Gradient], Any], Gradient]
OnStep = Callable[[int, dict[str, float]], Any]
SYNC_EVERY = 16  # steps between two reads of an accelerator's results; each read synchronizes with the device


def fit(
    loss_fn: LossFn,
    params: Tree,
    batches: Callable[[int], Any],
    *,
    steps: int,
    learning_rate: PerAdapter | None = None,
    weight_decay: PerAdapter = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    optimizer: Optimizer | None = None,
    max_norm: PerAdapter | None = None,
    schedule: Callable[[int], float | Tensor] = constant,
    num_adapters: int | None = None,
    evaluate: Callable[[dict[str, Tensor], int], float | Tensor] | None = None,
    evaluate_every: int = 1,
    patience: int | None = None,
    resume: Fit | PathLike | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_every: int = 100,
    accumulate: Accumulate | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Fit:
    """Minimize `loss_fn(params, batches(step))` for one adapter or many at once, with AdamW or another optimizer.

    If the loss, gradient or updated params of an adapter are not finite, `fit` warns, skips the update of this adapter,
    and stops the adapter. Other adapters are not affected. The loss of a stopped adapter is still computed, but its
    params and optimizer state no longer change. The run ends when all adapters have stopped. On an accelerator,
    warnings may come some steps late, since `fit` does not synchronize at every step.

    Args:
        loss_fn: Function `(params, batch)` that returns one loss, or n losses (n,) if params are stacked. Loss `i` must
            depend on adapter `i` only.
        params: Initial params, a flat dict of floating-point tensors; leaves of n stacked adapters are (n, ...).
        batches: Function that maps the step, counted from 0, to a batch. The batch must depend on the step only; see
            `batch_indices`.
        steps: Total number of steps, including those of a resumed run.
        learning_rate: One value, or n values for stacked adapters; required without an `optimizer`. With an
            `optimizer`, factor that multiplies the optimizer's updates (default 1).
        weight_decay, betas, eps: Options of AdamW (see `adamw_update`); not allowed together with an `optimizer`.
            `weight_decay` is one value or n values.
        optimizer: A pair of pure functions for one adapter, such as an `Optimizer` or an optimizer of torchopt; None
            means AdamW. `init(params)` returns the initial state (any pytree of tensors). `update(grads, state,
            params)` returns `(updates, state)`. `torch.func.vmap` maps both functions over stacked adapters.
        max_norm: Maximum norm of an adapter's gradient, one value or n values; None means no clipping.
        schedule: Function that maps the step to one factor, or n factors, by which `learning_rate` is multiplied.
        num_adapters: Number n of stacked adapters; None for one adapter.
        evaluate: Function `(params, steps_done)` that returns one metric, or n metrics (n,); lower is better.
        evaluate_every: Number of steps between two calls of `evaluate`.
        patience: Number of consecutive evaluations without improvement after which an adapter stops.
        resume: The run to continue, as a `Fit` or as the path of its checkpoint. A resumed run needs the same arguments
            as the original run; only `steps` may be larger.
        checkpoint: Path of the file to which the `Fit` is written atomically, during the run and at the end.
        checkpoint_every: Number of steps between two writes of `checkpoint`.
        accumulate: Function `(gradient, batch)` that returns the gradients and losses of a step, such as
            `mean_over_micro_batches`. `gradient(micro_batch)` computes the gradients and losses of a micro-batch. None
            means `gradient(batch)`.
        on_step: Function `(steps_done, numbers)` that is called after each step, for example to log the numbers.
            `numbers` is a flat dict of floats with the keys `loss`, `learning_rate` and, after an evaluation, `metric`.
            For stacked adapters, keys end in the index of the adapter: `loss/0`, `loss/1` and so on. On an accelerator,
            `on_step` synchronizes with the device at each step.
        progress: Whether to show a progress bar, if tqdm is installed.

    Examples of `on_step` for three loggers:

        TensorBoard:  writer = torch.utils.tensorboard.SummaryWriter("runs/first")
                      lambda step, numbers: [writer.add_scalar(name, x, step) for name, x in numbers.items()]
        W&B:          wandb.init(project="vera")
                      lambda step, numbers: wandb.log(numbers, step=step)
        MLflow:       mlflow.start_run()
                      lambda step, numbers: mlflow.log_metrics(numbers, step=step)

    Raises:
        ValueError: If an argument is out of range or has the wrong shape, if `resume` is a run with other params or
            another optimizer, if no leaf of `params` gets a gradient, or if the loss of the first step depends on a
            leaf that gets no gradient (see `gradient_of`).

    Example:
        >>> loss_fn = lambda params, batch: (params["p"] - batch).square().sum(1)
        >>> run = fit(loss_fn, {"p": torch.zeros(2, 3)}, lambda step: torch.ones(3), steps=50,
        ...           learning_rate=[0.1, 0.001], num_adapters=2, progress=False)
        >>> run.losses[-1] < 0.1
        tensor([ True, False])
        >>> descent = (lambda params: (), lambda grads, state, params: ({k: -g for k, g in grads.items()}, state))
        >>> fit(loss_fn, {"p": torch.zeros(2, 3)}, lambda step: torch.ones(3), steps=1, optimizer=descent,
        ...     learning_rate=[0.5, 0.1], num_adapters=2, progress=False).params["p"][:, 0]
        tensor([1.0000, 0.2000])
    """
    n = () if num_adapters is None else (num_adapters,)
    functions = {"loss_fn": loss_fn, "schedule": schedule, "evaluate": evaluate, "accumulate": accumulate}
    _check_functions(batches, functions | {"on_step": on_step})
    _check_numbers(steps, num_adapters, evaluate, evaluate_every, patience, checkpoint, checkpoint_every)
    advance = _advance_of(optimizer, learning_rate, weight_decay, betas, eps)
    run = _initial_run(params, n, optimizer, resume, steps)
    done, device = len(run.losses), run.stopped.device
    rates = _per_adapter("learning_rate", 1.0 if learning_rate is None else learning_rate, n, device)
    update = _update_of(advance, weight_decay, max_norm, n, device)
    losses_buffer = _buffer(run.losses, steps - done)
    metrics_buffer = _buffer(run.metrics, steps // evaluate_every - done // evaluate_every if evaluate else 0)
    used = ((checkpoint_every, checkpoint), (evaluate_every, evaluate))
    intervals = [every for every, what in used if what is not None]
    # No graph may connect several steps, even if weights of the model require grad.
    with torch.no_grad(), _bar(done, steps, progress) as bar:
        monitor = _Monitor(run, bar, intervals)
        for step in range(done, steps):
            if monitor.due(step) and monitor.sync(run):
                break
            gradient = partial(gradient_of, loss_fn, run.params, n, step == 0)
            if accumulate is None:
                grads, losses = gradient(batches(step))
            else:
                grads, losses = require_gradient(accumulate(gradient, batches(step)), n)
            rate = rates * _factor(schedule, step, n, device)
            updated = update(rate, grads, losses, run.state, run.params, run.stopped < 0)
            run = _record(run, _append(losses_buffer, step, losses), *updated)
            evaluated = evaluate is not None and (step + 1) % evaluate_every == 0
            if evaluate is not None and evaluated:
                run = _record_metric(run, metrics_buffer, evaluate(run.params, step + 1), patience)
            if checkpoint is not None and (step + 1) % checkpoint_every == 0:
                save_fit(checkpoint, run)
            if on_step is not None:
                on_step(step + 1, step_numbers(run, rate, evaluated))
            if bar is not None:
                bar.update()
        monitor.sync(run)
    run = _trim(run, done)
    if checkpoint is not None:
        save_fit(checkpoint, run)
    return run


class _Monitor:
    """Warns of diverged adapters and updates the progress bar.

    Reading a `Fit` synchronizes with the device, which costs time on an accelerator. So `sync` is called only every
    `SYNC_EVERY` steps, and before and after each checkpoint and evaluation, because these synchronize anyway.
    """

    def __init__(self, run: Fit, bar: Any, intervals: Sequence[int]) -> None:
        self.bar, self.intervals, self.first = bar, intervals, len(run.losses)
        self.known = run.diverged.cpu()
        self.every = _sync_every(run.stopped.device)

    def due(self, step: int) -> bool:
        """Whether to call `sync` before this step."""
        synchronized = any(step % interval in (0, interval - 1) for interval in self.intervals)
        return step == self.first or step % self.every == 0 or synchronized

    def sync(self, run: Fit) -> bool:
        """Warn about diverged adapters, update the progress bar, and return whether all adapters have stopped."""
        stopped, diverged = run.stopped.cpu(), run.diverged.cpu()
        new, self.known = diverged & ~self.known, diverged
        for step in stopped[new].unique().tolist():
            which = f"adapter {(new & (stopped == step)).nonzero().flatten().tolist()}" if new.ndim else "the adapter"
            warnings.warn(
                f"step {step}: loss, gradient or update of {which} is not finite, so training of {which} stops.",
                RuntimeWarning,
                stacklevel=3,
            )
        if self.bar is not None and len(run.losses):
            left = f", {(stopped < 0).sum()} training" if stopped.ndim else ""
            self.bar.set_postfix_str(f"loss {run.losses[-1].nanmean():.4f}{left}")
        return bool((stopped >= 0).all())


def _sync_every(device: torch.device) -> int:
    return 1 if device.type == "cpu" else SYNC_EVERY


def _advance_of(
    optimizer: Any, learning_rate: PerAdapter | None, weight_decay: PerAdapter, betas: tuple[float, float], eps: float
) -> Callable[..., Any]:
    """Return a function `(grads, state, params, *, learning_rate, weight_decay) -> (new params, new state)`."""
    if optimizer is None:
        if learning_rate is None:
            raise ValueError(
                "fit needs a learning_rate or an optimizer, got neither: pass learning_rate, such as 1e-2."
            )
        return partial(adamw_update, betas=betas, eps=eps)
    adamw_only = {"weight_decay": (weight_decay, 0.0), "betas": (betas, [0.9, 0.999]), "eps": (eps, 1e-8)}
    for name, (value, default) in adamw_only.items():
        if torch.as_tensor(value, dtype=torch.float64, device="cpu").tolist() != default:
            raise ValueError(
                f"{name}={value} has no effect with an optimizer: pass {name} to the optimizer, as in adamw(...)."
            )
    return partial(_advance, as_optimizer(optimizer))


def _advance(
    optimizer: Optimizer, grads: Tree, state: Any, params: Tree, *, learning_rate: Tensor, weight_decay: Tensor
) -> tuple[dict[str, Tensor], Any]:
    """Update params with any optimizer; the signature is that of `adamw_update`, but `weight_decay` is ignored."""
    updates, state = optimizer.update(grads, state, params)
    return apply_updates(params, updates, learning_rate), state


def _update_of(
    advance: Callable[..., Any],
    weight_decay: PerAdapter,
    max_norm: PerAdapter | None,
    n: tuple[int, ...],
    device: torch.device,
) -> Callable[..., Any]:
    """Return a function `(learning_rate, grads, loss, state, params, training)` that updates all adapters."""
    decays = _per_adapter("weight_decay", weight_decay, n, device)
    norms = _per_adapter("max_norm", float("inf") if max_norm is None else max_norm, n, device)
    update = partial(_update, advance)
    return partial(torch.func.vmap(update) if n else update, decays, norms)


def _update(advance, weight_decay, max_norm, learning_rate, grads, loss, state, params, training):
    """Update one adapter if `training` is true and all values are finite; return params, state and `finite`."""
    clipped = clip_by_norm(grads, max_norm)
    new, new_state = advance(clipped, state, params, learning_rate=learning_rate, weight_decay=weight_decay)
    finite = loss.isfinite() & global_norm(grads).isfinite() & global_norm(new).isfinite()

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        if old.shape != new.shape:
            raise ValueError(f"expected shape {tuple(old.shape)}, got {tuple(new.shape)}.")
        return torch.where(training & finite, new, old).to(old.dtype)

    try:
        return tree_map(chosen, params, new), tree_map(chosen, state, new_state), finite
    except ValueError as error:
        raise ValueError(f"optimizer.update must keep the structure and shapes of the state: {error}") from error


def _initial_run(params: Tree, n: tuple[int, ...], optimizer: Any, resume: Fit | PathLike | None, steps: int) -> Fit:
    """The state of a new run, or of the run to resume."""
    run = start_run(params, n, optimizer)
    if isinstance(resume, Fit):
        require_like(resume, run, "resume")
        run = resume
    elif not isinstance(resume, str | os.PathLike | None):
        raise ValueError(f"resume must be a Fit or the path of a checkpoint, got {type(resume).__name__}.")
    elif resume is not None:
        run = load_fit(resume, params, num_adapters=n[0] if n else None, optimizer=optimizer)
    if len(run.losses) > steps:
        done = len(run.losses)
        raise ValueError(f"steps must be at least {done} (the run has completed {done} steps), got {steps}.")
    return run


def _buffer(rows: Tensor, more: int) -> Tensor:
    """Append `more` rows of zeros, which later steps overwrite."""
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])


def _append(buffer: Tensor, i: int, row: Tensor) -> Tensor:
    buffer[i] = row
    return buffer[: i + 1]


def _record(run: Fit, losses: Tensor, params: dict, state: Any, finite: Tensor) -> Fit:
    """The state after a step; adapters with non-finite values stop."""
    failed = (run.stopped < 0) & ~finite
    stopped = run.stopped.masked_fill(failed, len(losses) - 1)
    return Fit(params, state, losses, run.metrics, stopped, run.diverged | failed)


def _record_metric(run: Fit, buffer: Tensor, metric: float | Tensor, patience: int | None) -> Fit:
    """The state after an evaluation; adapters without improvement for `patience` evaluations stop."""
    metric = _numbers("the metric of evaluate", metric, run.stopped.device)
    require_shape("evaluate", metric, run.stopped.shape)
    run = run._replace(metrics=_append(buffer, len(run.metrics), metric))
    if patience is None:
        return run
    # argmin returns the first minimum, so equal metrics do not count as improvement. NaN is replaced because argmin
    # would return it.
    best = run.metrics.nan_to_num(nan=float("inf")).argmin(dim=0)
    stops = (run.stopped < 0) & (len(run.metrics) - 1 - best >= patience)
    return run._replace(stopped=run.stopped.masked_fill(stops, len(run.losses)))


def _trim(run: Fit, done: int) -> Fit:
    """If all adapters have stopped, drop the losses after the last stop, but keep those of the first `done` steps."""
    if (run.stopped < 0).any():
        return run
    # The step in which an adapter diverges has a loss but no update.
    steps = max((run.stopped + run.diverged).flatten().tolist(), default=0)
    return run._replace(losses=run.losses[: max(steps, done)].clone())


def _factor(schedule: Callable[[int], float | Tensor], step: int, n: tuple[int, ...], device: torch.device) -> Tensor:
    factor = _numbers(f"schedule({step})", schedule(step), torch.device("cpu"))
    if factor.shape not in ((), n):
        count = f" or {n[0]} numbers" if n else ""
        raise ValueError(f"schedule({step}) must be one number{count}, got shape {tuple(factor.shape)}.")
    if not all(value >= 0 for value in factor.flatten().tolist()):
        raise ValueError(f"schedule({step}) must be at least 0, got {factor.tolist()}.")
    return factor.to(device, non_blocking=True)


def _check_functions(batches: Any, functions: Mapping[str, Any]) -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError("fit computes gradients: call it outside of torch.inference_mode().")
    if in_transform():
        raise ValueError("fit has no derivative: call it outside of torch.func transforms.")
    if not callable(batches):
        raise ValueError(
            f"batches must be a function of the step, got {type(batches).__name__}. For a list, pass "
            "lambda step: batches[step % len(batches)]."
        )
    for name, function in functions.items():
        if not callable(function) and (function is not None or name in ("loss_fn", "schedule")):
            raise ValueError(f"{name} must be a function, got {type(function).__name__}.")


def _check_numbers(
    steps: int,
    num_adapters: int | None,
    evaluate: Any,
    evaluate_every: int,
    patience: int | None,
    checkpoint: Any,
    checkpoint_every: int,
) -> None:
    require_integer("steps", steps, 0)
    options = {"num_adapters": num_adapters, "patience": patience}
    intervals = {"evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}
    for name, value in {**intervals, **{k: v for k, v in options.items() if v is not None}}.items():
        require_integer(name, value, 1)
    if patience is not None and evaluate is None:
        raise ValueError(f"patience={patience} requires evaluations: pass evaluate.")
    if checkpoint is not None and not (folder := Path(checkpoint).parent).is_dir():
        raise ValueError(f"checkpoint must be in an existing folder, but {folder} does not exist: create it first.")


def _bar(done: int, steps: int, progress: bool) -> AbstractContextManager[Any]:
    if not progress or find_spec("tqdm") is None:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(initial=done, total=steps, unit="step")


def _per_adapter(name: str, value: PerAdapter, n: tuple[int, ...], device: torch.device) -> Tensor:
    values = _numbers(name, value, device)
    if values.shape not in ((), n):
        expected = f"one value or {n[0]} values" if n else "one value; if params are stacked, also pass num_adapters"
        raise ValueError(f"{name} has shape {tuple(values.shape)}: pass {expected}.")
    if not (values >= 0).all():
        raise ValueError(f"{name} must be at least 0, got {value}.")
    return values.expand(n)


def _numbers(name: str, value: Any, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number, or a list or 1-d tensor of numbers, got {value!r}.") from error
