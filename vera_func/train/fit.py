"""A training loop for one adapter or many at once, whose whole state is one value.

    grads = grad(loss)(params, batch)
    params, state = adamw_update(clip_by_norm(grads, max_norm), state, params, learning_rate=lr)

Stacked adapters are independent, so the gradient of the sum of their losses holds each one's own:
`n` train in one backward pass, and the update of one is mapped over all with `torch.func.vmap`.
Data order and schedules are functions of the step. So a run is its `Fit`, and resuming is exact.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor

from ..io.files import read_safetensors, replacing
from .gradient import LossFn, gradient_of, require_shape
from .optim import AdamWState, Gradient, adamw_init, adamw_update, clip_by_norm, constant, global_norm


Tree = Mapping[str, Tensor]
PathLike = str | os.PathLike[str]
Numbers = float | Sequence[float] | Tensor  # one for all adapters, or one per adapter
Accumulate = Callable[[Callable[[Any], Gradient], Any], Gradient]


class Fit(NamedTuple):
    """A run so far, of one adapter (`*n` is nothing) or of stacked ones.

    Attributes:
        params: The last values, which need not be the best.
        state: State of the optimizer; `state.step` counts the updates of each adapter.
        losses: What `loss_fn` gave before each step's update, for stopped adapters too.
        metrics: What `evaluate` gave.
        stopped: The number of updates after which an adapter stopped, -1 if it did not.
        diverged: True where it stopped because something was not finite.
    """

    params: dict[str, Tensor]
    state: AdamWState
    losses: Float[Tensor, " steps *n"]
    metrics: Float[Tensor, " evaluations *n"]
    stopped: Int[Tensor, "*n"]
    diverged: Bool[Tensor, "*n"]


def fit(
    loss_fn: LossFn,
    params: Tree,
    batches: Callable[[int], Any],
    *,
    steps: int,
    learning_rate: Numbers,
    weight_decay: Numbers = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
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
    """Minimizes `loss_fn(params, batches(step))` with AdamW, over one adapter or many at once.

    A step costs a forward and a backward of `loss_fn`, and the update of some vectors. An adapter
    that stopped is still computed with the others, but neither it nor its optimizer state changes
    by a bit. One whose loss, gradient or update is not finite stops before that update, with a
    warning, and disturbs no other. The run ends early when all have stopped.

    Args:
        loss_fn: `(params, batch)` to one loss, or to (n,) losses, each of its own adapter alone.
        params: Flat dict of what is trained; with `num_adapters`, every leaf is (n, ...).
        batches: The step, from 0, to its batch. Nothing else may matter; see `batch_indices`.
        steps: Number of steps in all, those of a run to resume included.
        learning_rate: One for all or one per adapter, as are `weight_decay` and `max_norm`.
        weight_decay, betas, eps: As in `adamw_update`.
        max_norm: Largest norm of an adapter's gradient; None clips nothing.
        schedule: The step to a factor on the learning rate, one for all or one per adapter.
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
    """
    n = () if num_adapters is None else (num_adapters,)
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
    run = _start(params, n)
    if isinstance(resume, Fit):
        _check_run(_flatten(resume), run, "resume")
        run = resume
    elif resume is not None:
        run = load_fit(resume, params, num_adapters=num_adapters)
    if len(run.losses) > steps:
        raise ValueError(f"steps={steps} counts all steps, and {len(run.losses)} are done already.")

    device = run.stopped.device
    rates = _spread("learning_rate", learning_rate, n, device)
    decays = _spread("weight_decay", weight_decay, n, device)
    norms = _spread("max_norm", float("inf") if max_norm is None else max_norm, n, device)
    one = partial(_update, betas=betas, eps=eps)
    update = torch.func.vmap(one) if n else one

    # No graph from one step to the next, even where the model's own weights require grad.
    with torch.no_grad(), _bar(len(run.losses), steps, progress) as bar:
        for step in range(len(run.losses), steps):
            if (run.stopped >= 0).all():
                break
            gradient = partial(gradient_of, loss_fn, run.params, n, step == 0)
            batch = batches(step)
            grads, losses = gradient(batch) if accumulate is None else accumulate(gradient, batch)
            factor = torch.as_tensor(schedule(step), dtype=torch.float64)
            if not (factor >= 0).all():
                raise ValueError(f"schedule({step}) must be 0 or more, got {factor.tolist()}.")
            hyper = {"learning_rate": rates * factor.to(device), "weight_decay": decays}
            moved = update(grads, losses, run.state, run.params, run.stopped < 0, norms, hyper)
            run = _record(run, losses, *moved)
            if evaluate is not None and (step + 1) % evaluate_every == 0:
                run = _judge(run, evaluate(run.params, step + 1), patience)
            if checkpoint is not None and (step + 1) % checkpoint_every == 0:
                save_fit(checkpoint, run)
            if bar is not None:
                bar.update()
                left = f", {(run.stopped < 0).sum()} training" if num_adapters else ""
                bar.set_postfix_str(f"loss {losses.nanmean():.4f}{left}")
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


def save_fit(path: PathLike, run: Fit) -> None:
    """Write a run as one safetensors file, atomically.

    Args:
        path: The file.
        run: From `fit`.

    Raises:
        ValueError: If it is not a `Fit`.
        OSError: If the file can't be written; an old one is still there.

    Example:
        >>> import tempfile
        >>> params, loss_fn = {"p": torch.ones(3)}, lambda params, batch: params["p"].sum()
        >>> run = fit(loss_fn, params, int, steps=2, learning_rate=0.1, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_fit(f"{folder}/run.safetensors", run)
        ...     load_fit(f"{folder}/run.safetensors", params).losses
        tensor([3.0000, 2.7000], dtype=torch.float64)
    """
    if not isinstance(run, Fit):
        raise ValueError(f"run must be a Fit, as fit returns it, got {type(run).__name__}.")
    # Cloned, since safetensors refuses tensors that share memory.
    tensors = {k: t.contiguous().cpu().clone() for k, t in _flatten(run).items()}
    with replacing(Path(path)) as file:
        file.write_bytes(save(tensors))


def load_fit(path: PathLike, params: Tree, *, num_adapters: int | None = None) -> Fit:
    """Read a run that `save_fit` wrote, onto the device of `params`.

    Args:
        path: The file.
        params: Params of the same keys, shapes and dtypes; their values do not matter.
        num_adapters: `n`, if they are stacked.

    Raises:
        ValueError: If the file is damaged or of other params; the file and the key are named.

    Example:
        >>> import tempfile
        >>> params, loss_fn = {"p": torch.ones(3)}, lambda params, batch: params["p"].sum()
        >>> run = fit(loss_fn, params, int, steps=2, learning_rate=0.1, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_fit(f"{folder}/run.safetensors", run)
        ...     load_fit(f"{folder}/run.safetensors", params).params["p"]
        tensor([0.8000, 0.8000, 0.8000])
    """
    _, tensors = read_safetensors(Path(path))
    like = _start(params, () if num_adapters is None else (num_adapters,))
    _check_run(tensors, like, path)
    tensors = {k: t.to(like.stopped.device) for k, t in tensors.items()}
    # In the order of params, which the file does not keep: norms are sums in that order.
    moved, mean, var = ({k: tensors[f"{t}.{k}"] for k in params} for t in ("params", "mean", "var"))
    state = AdamWState(tensors["step"], mean, var)
    return Fit(moved, state, *(tensors[name] for name in Fit._fields[2:]))


def _start(params: Tree, n: tuple[int, ...]) -> Fit:
    for key, p in params.items():
        if n and p.shape[:1] != n:
            raise ValueError(f"num_adapters={n[0]}, but params[{key!r}] is {tuple(p.shape)}; use stack_adapters.")
    params = {k: p.detach() for k, p in params.items()}
    state = torch.func.vmap(adamw_init)(params) if n and params else adamw_init(params)
    empty = torch.zeros(0, *n, dtype=torch.float64, device=state.step.device)
    stopped = torch.full_like(state.step, -1)
    return Fit(params, state, empty, empty, stopped, diverged=torch.zeros_like(stopped).bool())


def _update(grads, loss, state, params, training, max_norm, hyper, **fixed):
    """The step of one adapter, not taken if it stopped or if anything is not finite."""
    new, new_state = adamw_update(clip_by_norm(grads, max_norm), state, params, **hyper, **fixed)
    finite = loss.isfinite() & global_norm(grads).isfinite() & global_norm(new).isfinite()
    params, mean, var = (
        {k: torch.where(training & finite, new[k], old[k]) for k in old}
        for old, new in ((params, new), (state.mean, new_state.mean), (state.var, new_state.var))
    )
    step = torch.where(training & finite, new_state.step, state.step)
    return params, AdamWState(step, mean, var), finite


def _record(run: Fit, losses: Tensor, params: dict, state: AdamWState, finite: Tensor) -> Fit:
    """The run after a step, in which those that were not finite stopped."""
    failed = (run.stopped < 0) & ~finite
    if failed.any():
        which = failed.nonzero().flatten().tolist() if failed.ndim else "the only one"
        warnings.warn(
            f"step {len(run.losses)} is not finite and stops adapter {which} before the update.",
            RuntimeWarning,
            stacklevel=3,
        )
    stopped = torch.where(failed, len(run.losses), run.stopped)
    losses = torch.cat([run.losses, losses[None]])
    return Fit(params, state, losses, run.metrics, stopped, run.diverged | failed)


def _judge(run: Fit, metric: float | Tensor, patience: int | None) -> Fit:
    """The run after an evaluation, in which those whose best is `patience` old stopped."""
    metric = torch.as_tensor(metric, dtype=torch.float64, device=run.stopped.device)
    require_shape("evaluate", metric, run.stopped.shape)
    run = run._replace(metrics=torch.cat([run.metrics, metric[None]]))
    if patience is None:
        return run
    # argmin takes the first of equal ones, so that a plateau is no progress, and NaN for the least.
    best = run.metrics.nan_to_num(nan=float("inf")).argmin(dim=0)
    stops = (run.stopped < 0) & (len(run.metrics) - 1 - best >= patience)
    return run._replace(stopped=torch.where(stops, len(run.losses), run.stopped))


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


def _flatten(run: Fit) -> dict[str, Tensor]:
    trees = {"params": run.params, "mean": run.state.mean, "var": run.state.var}
    leaves = {f"{name}.{k}": t for name, tree in trees.items() for k, t in tree.items()}
    return {**leaves, "step": run.state.step, **dict(zip(run._fields[2:], run[2:], strict=True))}


def _check_run(tensors: Tree, like: Fit, source: PathLike) -> None:
    wanted = _flatten(like)
    if differing := sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{source} is a run of other params: only one of them has {differing}.")
    for key, right in wanted.items():
        found = tensors[key]
        if key in ("losses", "metrics") and found.ndim:  # of which any number of rows is right
            found = found[:0]
        if (found.shape, found.dtype) != (right.shape, right.dtype):
            raise ValueError(
                f"{source}: {key!r} is {tuple(found.shape)} {found.dtype}, but params and "
                f"num_adapters imply {tuple(right.shape)} {right.dtype}."
            )
