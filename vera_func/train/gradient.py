"""The gradient of a training step, with a check that no layer is detached from the autograd graph."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.grad import gradients
from ..core.keys import split_key
from .optim import Gradient


LossFn = Callable[[dict[str, Tensor], Any], Tensor]
_ADVICE = (
    "Activation checkpointing also prevents gradients of params: call model.gradient_checkpointing_disable() before "
    "adapt or load_adapter, or train to_module(adapted)."
)


def gradient_of(loss_fn: LossFn, params: dict[str, Tensor], n: tuple[int, ...], first: bool, batch: Any) -> Gradient:
    """Return the gradient of each adapter's loss, and the losses.

    A leaf of `params` outside of the autograd graph gets a gradient of zero. Zero is correct if the loss does not
    depend on the leaf, for example if the leaf belongs to an unused pooler, or to an expert that gets no tokens. Zero
    is wrong if a layer runs under `torch.no_grad`, or if the output of the layer is detached. To detect wrong zeros,
    the first step adds 0.1 to the leaves without a gradient and computes the losses again. If the losses change, an
    error is raised.

    Args:
        loss_fn: Loss function, as for `fit`.
        params: First argument of `loss_fn`.
        n: Shape of the losses.
        first: Whether to check leaves without a gradient, as in the first step.
        batch: Second argument of `loss_fn`.

    Raises:
        ValueError: If the losses do not have shape `n`, if no leaf gets a gradient, or if the losses depend on a leaf
            that gets no gradient.

    Example:
        >>> gradient_of(lambda params, batch: (params["p"] * batch).sum(), {"p": torch.ones(2)}, (), True, 3.0)
        ({'p': tensor([3., 3.])}, tensor(6.))
    """
    devices = sorted({p.device.index for p in params.values() if p.is_cuda})
    before = _random_state(devices) if first else []

    def total(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        losses = loss_fn(dict(zip(params, leaves, strict=True)), batch)
        require_shape("loss_fn", losses, n)
        if losses.is_complex():
            raise ValueError(f"loss_fn must return real numbers, got {losses.dtype}.")
        if not losses.requires_grad:
            raise ValueError(
                f"the losses of loss_fn do not depend on params; check that the losses are not detached. {_ADVICE}"
            )
        return losses.sum(), losses

    try:
        _, losses, grads = gradients(total, list(params.values()))
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ValueError(f"loss_fn calls checkpoint(use_reentrant=True): {error} {_ADVICE}") from error
        raise
    absent = [key for key, grad in zip(params, grads, strict=True) if grad is None]
    if len(absent) == len(params):
        raise ValueError(
            f"no leaf of params gets a gradient from loss_fn: compute the losses from the argument params. {_ADVICE}"
        )
    if first and absent:
        with torch.random.fork_rng(devices):
            _require_independent(loss_fn, params, batch, losses, absent, partial(_rewind, before, devices))
    filled = (torch.zeros_like(p) if grad is None else grad for p, grad in zip(params.values(), grads, strict=True))
    return dict(zip(params, filled, strict=True)), losses


def _require_independent(
    loss_fn: LossFn,
    params: dict[str, Tensor],
    batch: Any,
    losses: Tensor,
    absent: list[str],
    rewind: Callable[[], None],
) -> None:
    """Raise an error if the losses depend on a leaf without a gradient."""

    def changes(modules: Sequence[str]) -> bool:
        rewind()
        shifted = {k: p + 0.1 if k in absent and split_key(k)[0] in modules else p for k, p in params.items()}
        with torch.enable_grad():  # for a bitwise equal computation
            return not torch.equal(loss_fn({k: p.detach().requires_grad_() for k, p in shifted.items()}, batch), losses)

    modules = list(dict.fromkeys(split_key(key)[0] for key in absent))
    if changes([]) or not changes(modules):  # a loss that is random by itself can't be checked
        return
    while len(modules) > 1:
        half = modules[: len(modules) // 2]
        modules = half if changes(half) else modules[len(half) :]
    key = next(key for key in absent if split_key(key)[0] in modules)
    raise ValueError(
        f"the losses of loss_fn depend on {key!r}, but this leaf gets no gradient; check that no layer is "
        f"detached. {_ADVICE}"
    )


def _random_state(devices: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _rewind(states: Sequence[Tensor], devices: Sequence[int]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def require_shape(name: str, value: Tensor, n: tuple[int, ...]) -> None:
    """Check that `value` is a tensor of shape `n`; `name` names the function that returned `value`."""
    expected = f"one value per adapter (shape {tuple(n)})" if n else "one value (shape ())"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must return a tensor with {expected}, got {type(value).__name__}.")
    if value.shape != n:
        hint = "" if n else "; if params are stacked, pass num_adapters"
        raise ValueError(f"{name} must return {expected}, got shape {tuple(value.shape)}{hint}.")


def require_gradient(result: Any, n: tuple[int, ...]) -> Gradient:
    """Return the result of `accumulate` (see `fit`), after checking that it consists of gradients and losses.

    Raises:
        ValueError: If the result is not a pair of a dict and losses of shape `n`.

    Example:
        >>> require_gradient(({"p": torch.ones(2)}, torch.tensor(3.0)), ())
        ({'p': tensor([1., 1.])}, tensor(3.))
    """
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Mapping)):
        raise ValueError(
            f"accumulate must return (gradients, losses), a dict and a tensor, got {type(result).__name__}."
        )
    require_shape("accumulate", result[1], n)
    return dict(result[0]), result[1]
