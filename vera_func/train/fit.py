"""A training loop for one adapter or many at once, whose whole state is one value.

    losses, grads = value_and_grad(loss)(params, batch)
    updates, state = optimizer.update(clip_by_norm(grads, max_norm), state, params)
    params = apply_updates(params, updates, learning_rate * schedule(step))

Stacked adapters are independent, so the gradient of the sum of their losses holds each one's own:
`n` train in one backward pass, and the update of one is mapped over all with `torch.func.vmap`.
Data order and schedules are functions of the step. So a run is its `Fit`, and resuming is exact.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..private import tree_map
from .gradient import LossFn, gradient_of, require_shape
from .optim import (
    Gradient,
    Optimizer,
    adamw_update,
    apply_updates,
    as_optimizer,
    clip_by_norm,
    constant,
    global_norm,
)
from .run import Fit, PathLike, Tree, load_fit, require_like, save_fit, start_run


Numbers = float | Sequence[float] | Tensor  # one for all adapters, or one per adapter
Accumulate = Callable[[Callable[[Any], Gradient], Any], Gradient]
LOOK_EVERY = 16  # steps between two looks at what an accelerator computed: each look waits for it


def fit(
    loss_fn: LossFn,
    params: Tree,
    batches: Callable[[int], Any],
    *,
    steps: int,
    learning_rate: Numbers | None = None,
    weight_decay: Numbers = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    optimizer: Optimizer | None = None,
    max_norm: Numbers | None = None,
    schedule: Callable[[int], float | Tensor] = constant,
    num_adapters: int | None = None,
    evaluate: Callable[[dict[str, Tensor], int], float | Tensor] | None = None,
    evaluate_every: int = 1,
    patience: int | None = None,
    resume: Fit | PathLike | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_every: int = 100,
    accumulate: Accumulate | None = None,
    progress: bool = True,
) -> Fit:
    """Minimizes `loss_fn(params, batches(step))` over one adapter or many at once, with AdamW or another optimizer.

    A step costs a forward and a backward of `loss_fn`, and the update of some vectors. An adapter
    that stopped is still computed with the others, but neither it nor its optimizer state changes
    by a bit. One whose loss, gradient or update is not finite stops before that update, with a
    warning, and disturbs no other. The run ends early when all have stopped. On an accelerator the warning
    may come some steps later, since `fit` does not wait for every step.

    Args:
        loss_fn: `(params, batch)` to one loss, or to (n,) losses, each of its own adapter alone.
        params: Flat dict of what is trained; with `num_adapters`, every leaf is (n, ...).
        batches: The step, from 0, to its batch. Nothing else may matter; see `batch_indices`.
        steps: Number of steps in all, those of a run to resume included.
        learning_rate: One for all or one per adapter, as are `weight_decay` and `max_norm`. With an `optimizer`, a
            factor on its updates, 1 if None; else it must be given.
        weight_decay, betas, eps: As in `adamw_update`; another optimizer brings its own.
        optimizer: A pair of pure functions of one adapter, `init(params)` to a state, any pytree of tensors, and
            `update(grads, state, params)` to `(updates, state)`, such as an `Optimizer` or one of torchopt's. It is
            mapped over stacked adapters with `torch.func.vmap`. None is AdamW.
        max_norm: Largest norm of an adapter's gradient; None clips nothing.
        schedule: The step to a factor on `learning_rate`, one for all or one per adapter.
        num_adapters: `n`, if params are stacked.
        evaluate, evaluate_every: `(params, steps made)` to one metric or (n,); lower is better.
        patience: An adapter stops after so many evaluations in a row without a new best.
        resume: A run to go on from, or its checkpoint. All other arguments should be as they were.
        checkpoint, checkpoint_every: File to hold the run, always whole, and steps between writes.
        accumulate: `(gradient, batch)` to the grads and losses of a step, where `gradient(part)` gives those of a
            part of the batch, as plain tensors; None is `gradient(batch)`. See `mean_over_micro_batches`.
        progress: Shows a bar if tqdm is installed, and nothing if it is not.

    Raises:
        ValueError: If arguments, shapes, or the run to resume do not fit together; if no leaf of `params` gets a
            gradient, or if in the first step one gets none that the loss depends on (see `gradient_of`).

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
    _check_options(batches, evaluate, evaluate_every, patience, checkpoint, checkpoint_every)
    advance = _advance_of(optimizer, learning_rate, weight_decay, betas, eps)
    run = _begin(params, n, optimizer, resume, steps)
    done, device = len(run.losses), run.stopped.device
    rates = _spread("learning_rate", 1.0 if learning_rate is None else learning_rate, n, device)
    decays = _spread("weight_decay", weight_decay, n, device)
    norms = _spread("max_norm", float("inf") if max_norm is None else max_norm, n, device)
    update = torch.func.vmap(partial(_update, advance)) if n else partial(_update, advance)
    losses_room = _room(run.losses, steps - done)
    metrics_room = _room(run.metrics, steps // evaluate_every - done // evaluate_every if evaluate else 0)
    saves, judges = checkpoint is not None, evaluate is not None

    # No graph from one step to the next, even where the model's own weights require grad.
    with torch.no_grad(), _bar(done, steps, progress) as bar:
        watch = _Watch(run, bar, [every for every, due in ((checkpoint_every, saves), (evaluate_every, judges)) if due])
        for step in range(done, steps):
            if watch.due(step) and watch.look(run):
                break
            gradient = partial(gradient_of, loss_fn, run.params, n, step == 0)
            batch = batches(step)
            grads, losses = gradient(batch) if accumulate is None else accumulate(gradient, batch)
            hyper = {"learning_rate": rates * _factor(schedule, step, device), "weight_decay": decays}
            moved = update(grads, losses, run.state, run.params, run.stopped < 0, norms, hyper)
            run = _record(run, _append(losses_room, step, losses), *moved)
            if evaluate is not None and (step + 1) % evaluate_every == 0:
                run = _judge(run, metrics_room, evaluate(run.params, step + 1), patience)
            if checkpoint is not None and (step + 1) % checkpoint_every == 0:
                save_fit(checkpoint, run)
            if bar is not None:
                bar.update()
        watch.look(run)
    run = _until_all_stopped(run, done)
    if checkpoint is not None:
        save_fit(checkpoint, run)
    return run


def batch_indices(step: int, *, num_examples: int, batch_size: int, key: int) -> Int[Tensor, " batch"]:
    """Which examples are the batch of this step: each once per epoch, in an order of its own.

    A function of the arguments alone, so that a resumed run sees what it would have seen. The last
    batch of an epoch is smaller if `batch_size` does not divide `num_examples`; none is dropped.
    Another `key` is another order. Costs a permutation of `num_examples` per call.

    Raises:
        ValueError: If a size is not positive, the step is negative, or a number no integer.

    Example:
        >>> [len(batch_indices(step, num_examples=5, batch_size=2, key=0)) for step in range(4)]
        [2, 2, 1, 2]
    """
    if not all(isinstance(number, int) for number in (step, num_examples, batch_size, key)):
        raise ValueError(f"must be integers: {step=}, {num_examples=}, {batch_size=}, {key=}.")
    if step < 0 or num_examples < 1 or batch_size < 1:
        raise ValueError(f"out of range: {step=}, {num_examples=}, {batch_size=}.")
    epoch, batch = divmod(step, -(-num_examples // batch_size))
    return epoch_order(num_examples, key=key, epoch=epoch)[batch * batch_size : (batch + 1) * batch_size]


def epoch_order(num_examples: int, *, key: int | str, epoch: int) -> Int[Tensor, " num_examples"]:
    """The order of the examples in one epoch: a permutation that depends on the arguments alone.

    Args:
        num_examples: How many examples there are.
        key: Of the run; another key gives another order.
        epoch: The number of the epoch.

    Example:
        >>> sorted(epoch_order(4, key=0, epoch=7).tolist())
        [0, 1, 2, 3]
    """
    # Hashed, since key + epoch would give epoch 1 of key 0 the order of epoch 0 of key 1.
    seed = int.from_bytes(hashlib.sha256(f"{key} {epoch}".encode()).digest()[:4], "big")
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))


class _Watch:
    """What is read of a run while it goes on. Each look waits for the device, and a CPU has nothing to wait for.

    Looks come at least every `LOOK_EVERY` steps, and before and after those steps that read the run anyway, which are
    every so many of `marks`.
    """

    def __init__(self, run: Fit, bar: Any, marks: Sequence[int]) -> None:
        self.bar, self.marks, self.first = bar, marks, len(run.losses)
        self.known = run.diverged.cpu()
        self.every = _look_every(run.stopped.device)

    def due(self, step: int) -> bool:
        """Whether to look before this step."""
        marked = any(step % mark in (0, mark - 1) for mark in self.marks)
        return step == self.first or step % self.every == 0 or marked

    def look(self, run: Fit) -> bool:
        """Warn of adapters that diverged, show how far the run is, and return whether all adapters have stopped."""
        stopped, diverged = run.stopped.cpu(), run.diverged.cpu()
        new, self.known = diverged & ~self.known, diverged
        for step in stopped[new].unique().tolist():
            which = (new & (stopped == step)).nonzero().flatten().tolist() if new.ndim else "the only one"
            warnings.warn(
                f"step {step} is not finite and stops adapter {which} before the update.", RuntimeWarning, stacklevel=3
            )
        if self.bar is not None and len(run.losses):
            left = f", {(stopped < 0).sum()} training" if stopped.ndim else ""
            self.bar.set_postfix_str(f"loss {run.losses[-1].nanmean():.4f}{left}")
        return bool((stopped >= 0).all())


def _look_every(device: torch.device) -> int:
    return 1 if device.type == "cpu" else LOOK_EVERY


def _advance_of(
    optimizer: Any, learning_rate: Numbers | None, weight_decay: Numbers, betas: tuple[float, float], eps: float
) -> Callable[..., Any]:
    """`(grads, state, params, learning_rate=, weight_decay=)` to the new params and the new state."""
    if optimizer is None:
        if learning_rate is None:
            raise ValueError("learning_rate must be given, such as learning_rate=1e-2, or an optimizer.")
        return partial(adamw_update, betas=betas, eps=eps)
    own = {"weight_decay": (weight_decay, 0.0), "betas": (betas, [0.9, 0.999]), "eps": (eps, 1e-8)}
    for name, (value, default) in own.items():
        if torch.as_tensor(value, dtype=torch.float64).tolist() != default:
            raise ValueError(
                f"{name} is an option of AdamW without an optimizer; give it to the optimizer, as in adamw."
            )
    return partial(_advance, as_optimizer(optimizer))


def _advance(
    optimizer: Optimizer, grads: Tree, state: Any, params: Tree, *, learning_rate: Tensor, weight_decay: Tensor
) -> tuple[dict[str, Tensor], Any]:
    """As `adamw_update`, by an optimizer, which brings its own weight decay."""
    updates, state = optimizer.update(grads, state, params)
    return apply_updates(params, updates, learning_rate), state


def _update(advance, grads, loss, state, params, training, max_norm, hyper):
    """The step of one adapter, not taken if it stopped or if anything is not finite."""
    new, new_state = advance(clip_by_norm(grads, max_norm), state, params, **hyper)
    finite = loss.isfinite() & global_norm(grads).isfinite() & global_norm(new).isfinite()

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        if old.shape != new.shape:
            raise ValueError(f"shape {tuple(new.shape)} is not {tuple(old.shape)}.")
        return torch.where(training & finite, new, old).to(old.dtype)

    try:
        return tree_map(chosen, params, new), tree_map(chosen, state, new_state), finite
    except ValueError as error:
        raise ValueError(f"optimizer.update must return a state like the one that it was given: {error}") from error


def _begin(params: Tree, n: tuple[int, ...], optimizer: Any, resume: Fit | PathLike | None, steps: int) -> Fit:
    """The run before the first step that is to be made."""
    run = start_run(params, n, optimizer)
    if isinstance(resume, Fit):
        require_like(resume, run, "resume")
        run = resume
    elif resume is not None:
        run = load_fit(resume, params, num_adapters=n[0] if n else None, optimizer=optimizer)
    if len(run.losses) > steps:
        raise ValueError(f"steps={steps} counts all steps, and {len(run.losses)} are done already.")
    return run


def _room(rows: Tensor, more: int) -> Tensor:
    """The rows, and memory for more."""
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])


def _append(room: Tensor, i: int, row: Tensor) -> Tensor:
    room[i] = row
    return room[: i + 1]


def _record(run: Fit, losses: Tensor, params: dict, state: Any, finite: Tensor) -> Fit:
    """The run after a step, in which those that were not finite stopped."""
    failed = (run.stopped < 0) & ~finite
    stopped = run.stopped.masked_fill(failed, len(losses) - 1)
    return Fit(params, state, losses, run.metrics, stopped, run.diverged | failed)


def _judge(run: Fit, room: Tensor, metric: float | Tensor, patience: int | None) -> Fit:
    """The run after an evaluation, in which those whose best is `patience` old stopped."""
    metric = torch.as_tensor(metric, dtype=torch.float64, device=run.stopped.device)
    require_shape("evaluate", metric, run.stopped.shape)
    run = run._replace(metrics=_append(room, len(run.metrics), metric))
    if patience is None:
        return run
    # argmin takes the first of equal ones, so that a plateau is no progress, and NaN for the least.
    best = run.metrics.nan_to_num(nan=float("inf")).argmin(dim=0)
    stops = (run.stopped < 0) & (len(run.metrics) - 1 - best >= patience)
    return run._replace(stopped=run.stopped.masked_fill(stops, len(run.losses)))


def _until_all_stopped(run: Fit, done: int) -> Fit:
    """The run without steps that were made, of `done` on, before it was seen that all adapters had stopped."""
    if (run.stopped < 0).any():
        return run
    # A step that diverged has a loss, but no update.
    steps = max((run.stopped + run.diverged).flatten().tolist(), default=0)
    return run._replace(losses=run.losses[: max(steps, done)].clone())


def _factor(schedule: Callable[[int], float | Tensor], step: int, device: torch.device) -> Tensor:
    factor = torch.as_tensor(schedule(step), dtype=torch.float64)
    if not all(number >= 0 for number in factor.flatten().tolist()):
        raise ValueError(f"schedule({step}) must be 0 or more, got {factor.tolist()}.")
    return factor.to(device, non_blocking=True)


def _check_options(
    batches: Any, evaluate: Any, evaluate_every: int, patience: int | None, checkpoint: Any, checkpoint_every: int
) -> None:
    if not callable(batches):
        raise ValueError(
            f"batches must be a function of the step, got {type(batches).__name__}. For a list: "
            "lambda step: batches[step % len(batches)]."
        )
    if patience is not None and evaluate is None:
        raise ValueError(f"patience={patience} counts evaluations: pass evaluate too.")
    if min(evaluate_every, checkpoint_every, 1 if patience is None else patience) < 1:
        raise ValueError(f"must be positive: {evaluate_every=}, {checkpoint_every=}, {patience=}.")
    if checkpoint is not None and not (folder := Path(checkpoint).parent).is_dir():
        raise ValueError(f"the folder {folder} of checkpoint does not exist.")


def _bar(done: int, steps: int, progress: bool) -> AbstractContextManager[Any]:
    if not progress or find_spec("tqdm") is None:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(initial=done, total=steps, unit="step")


def _spread(name: str, value: Numbers, n: tuple[int, ...], device: torch.device) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float64, device=device)
    if numbers.shape not in ((), n):
        right = f"one number or {n[0]}" if n else "one number, or num_adapters too"
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}; pass {right}.")
    if not (numbers >= 0).all():
        raise ValueError(f"{name} must be 0 or more, got {value}.")
    return numbers.expand(n)
