"""The state of a training run, and its file format.

A run is stored as one safetensors file. Params are stored as `params.KEY`. Leaves of the optimizer state are stored
under their pytree paths, such as `state.mean['KEY']`. Other fields of `Fit` are stored under the field name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor

from ..io.files import read_safetensors, replacing
from ..private import tree_flatten, tree_flatten_with_path, tree_unflatten
from .optim import Optimizer, adamw_init, as_optimizer, require_trainable


Tree = Mapping[str, Tensor]
PathLike = str | os.PathLike[str]


class Fit(NamedTuple):
    """The state of a training run of one adapter (`*n` is ()) or of n stacked adapters (`*n` is (n,)).

    Attributes:
        params: Params after the last step, not necessarily those with the lowest metric.
        state: State of the optimizer, a pytree of tensors. For AdamW, the state is an `AdamWState`, whose `step` is the
            number of updates of each adapter.
        losses: Losses at each step, before the update, including losses of stopped adapters.
        metrics: Metrics that `evaluate` returned.
        stopped: Number of updates after which each adapter stopped; -1 for an adapter that has not stopped.
        diverged: Whether each adapter stopped because a value was not finite.
    """

    params: dict[str, Tensor]
    state: Any
    losses: Float[Tensor, " steps *n"]
    metrics: Float[Tensor, " evaluations *n"]
    stopped: Int[Tensor, "*n"]
    diverged: Bool[Tensor, "*n"]


def start_run(params: Tree, n: tuple[int, ...], optimizer: Optimizer | None = None) -> Fit:
    """Return the state of a run before its first step.

    Args:
        params: Initial params, a flat dict of floating-point tensors.
        n: Shape of a loss: (n,) for n stacked adapters, () for one adapter.
        optimizer: Optimizer, as for `fit`; None means AdamW.

    Raises:
        ValueError: If `params` is empty or is not a dict of floating-point tensors, or if a tensor of stacked params
            does not have shape (n, ...).

    Example:
        >>> start_run({"p": torch.ones(2, 3)}, (2,)).stopped
        tensor([-1, -1])
    """
    require_trainable(params)
    for key, p in params.items():
        if n and p.shape[:1] != n:
            raise ValueError(
                f"num_adapters={n[0]} does not match params[{key!r}] of shape {tuple(p.shape)}: stack n adapters with "
                "stack_adapters, and pass num_adapters=n."
            )
    params = {k: p.detach() for k, p in params.items()}
    init = adamw_init if optimizer is None else as_optimizer(optimizer).init
    state = (torch.func.vmap(init) if n else init)(params)
    device = next(iter(params.values())).device
    empty = torch.zeros(0, *n, dtype=torch.float64, device=device)
    stopped = torch.full(n, -1, dtype=torch.int64, device=device)
    return Fit(params, state, empty, empty, stopped, diverged=torch.zeros_like(stopped).bool())


def require_like(run: Fit, other: Fit, source: PathLike) -> None:
    """Check that params and optimizer states of two runs agree in keys, shapes and dtypes; errors name `source`."""
    _check_run(_flatten(run), other, source)


def save_fit(path: PathLike, run: Fit) -> Path:
    """Write a run as one safetensors file, atomically, and return its path.

    Args:
        path: The file.
        run: State of the run, from `fit`.

    Raises:
        ValueError: If `run` is not a `Fit`.
        OSError: If the file can't be written; an existing file is then kept.

    Example:
        >>> import tempfile
        >>> from vera_func import fit
        >>> params, loss_fn = {"p": torch.ones(3)}, lambda params, batch: params["p"].sum()
        >>> run = fit(loss_fn, params, int, steps=2, learning_rate=0.1, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_fit(f"{folder}/run.safetensors", run)
        ...     load_fit(path, params).losses
        tensor([3.0000, 2.7000], dtype=torch.float64)
    """
    if not isinstance(run, Fit):
        raise ValueError(f"run must be a Fit returned by fit, got {type(run).__name__}.")
    # Cloned, since safetensors rejects tensors that share memory.
    tensors = {k: t.contiguous().cpu().clone() for k, t in _flatten(run).items()}
    path = Path(path)
    with replacing(path) as file:
        file.write_bytes(save(tensors))
    return path


def load_fit(
    path: PathLike, params: Tree, *, num_adapters: int | None = None, optimizer: Optimizer | None = None
) -> Fit:
    """Load a run that `save_fit` wrote, onto the device of `params`.

    Args:
        path: The file.
        params: Params with the keys, shapes and dtypes of the stored params; their values are not used.
        num_adapters: Number of stacked adapters; None for one adapter.
        optimizer: Optimizer of the stored run, as for `fit`; None means AdamW.

    Raises:
        ValueError: If the file is damaged, or contains a run with other params or another optimizer.

    Example:
        >>> import tempfile
        >>> from vera_func import fit
        >>> params, loss_fn = {"p": torch.ones(3)}, lambda params, batch: params["p"].sum()
        >>> run = fit(loss_fn, params, int, steps=2, learning_rate=0.1, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_fit(f"{folder}/run.safetensors", run)
        ...     load_fit(path, params).params["p"]
        tensor([0.8000, 0.8000, 0.8000])
    """
    _, tensors = read_safetensors(Path(path))
    like = start_run(params, () if num_adapters is None else (num_adapters,), optimizer)
    if not any(key.startswith("state") for key in tensors):  # version 0.1 supported AdamW only, with shorter names
        old = {f"{name}.{k}": f"state.{name}[{k!r}]" for name in ("mean", "var") for k in params}
        tensors = {(old | {"step": "state.step"}).get(key, key): tensor for key, tensor in tensors.items()}
    _check_run(tensors, like, path)
    tensors = {k: t.to(like.stopped.device) for k, t in tensors.items()}
    state = tree_unflatten([tensors[path] for path in _state_leaves(like)], tree_flatten(like.state)[1])
    # Norms are summed in the order of params, which the file does not preserve.
    return Fit({k: tensors[f"params.{k}"] for k in params}, state, *(tensors[name] for name in Fit._fields[2:]))


def _flatten(run: Fit) -> dict[str, Tensor]:
    params = {f"params.{k}": t for k, t in run.params.items()}
    return {**params, **_state_leaves(run), **dict(zip(run._fields[2:], run[2:], strict=True))}


def _state_leaves(run: Fit) -> dict[str, Tensor]:
    return {f"state{path}": leaf for path, leaf in tree_flatten_with_path(run.state)}


def _check_run(tensors: Tree, like: Fit, source: PathLike) -> None:
    expected = _flatten(like)
    if differing := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(
            f"{source} is a run with other params or another optimizer: the keys {differing} differ. Pass the "
            "params and the optimizer of that run."
        )
    for key, right in expected.items():
        found = tensors[key]
        if key in ("losses", "metrics") and found.ndim:  # any number of rows is valid
            found = found[:0]
        if (found.shape, found.dtype) != (right.shape, right.dtype):
            raise ValueError(
                f"{source}: {key!r} is {tuple(found.shape)} {found.dtype}, but params and "
                f"num_adapters imply {tuple(right.shape)} {right.dtype}: pass the params and num_adapters of that run."
            )


def step_numbers(run: Fit, learning_rate: Tensor, evaluated: bool) -> dict[str, float]:
    """Return loss, learning rate and metric of the last step as a flat dict of floats; see `on_step` of `fit`.

    Args:
        run: The run after the step.
        learning_rate: Learning rate of the step, () or (n,).
        evaluated: Whether an evaluation followed the step.

    Example:
        >>> run = start_run({"p": torch.zeros(2, 3)}, (2,), None)._replace(losses=torch.tensor([[0.5, 0.25]]))
        >>> step_numbers(run, torch.ones(2), evaluated=False)
        {'loss/0': 0.5, 'loss/1': 0.25, 'learning_rate/0': 1.0, 'learning_rate/1': 1.0}
    """
    values = {"loss": run.losses[-1], "learning_rate": learning_rate}
    if evaluated:
        values["metric"] = run.metrics[-1]
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if value.ndim:
            numbers |= {f"{name}/{i}": number for i, number in enumerate(value.tolist())}
        else:
            numbers[name] = value.item()
    return numbers
