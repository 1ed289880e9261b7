"""Optimizers and clipping as pure functions of dicts of tensors.

    mean' = b1 mean + (1 - b1) g          var' = b2 var + (1 - b2) g^2
    p'    = (1 - lr wd) p - lr (mean' / (1 - b1^t)) / (sqrt(var' / (1 - b2^t)) + eps)

Every function handles one adapter and does not modify its inputs; use `torch.func.vmap` for stacked adapters.
Hyper-parameters are floats or 0-d tensors. Results are differentiable with respect to hyper-parameters that are
tensors.
"""

import inspect
import numbers
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.shapes import require_dict
from ..private import tree_map
from .schedules import constant as constant, linear_warmup_cosine as linear_warmup_cosine  # part of this module's API


class AdamWState(NamedTuple):
    """State of AdamW: the number of updates, and the running moments of the gradient, with the keys of `params`."""

    step: Int[Tensor, ""]
    mean: dict[str, Tensor]
    var: dict[str, Tensor]


def adamw_init(params: Mapping[str, Tensor]) -> AdamWState:
    """Return the initial state of AdamW: `step = 0`, and moments of zero in float32 or wider.

    Args:
        params: Flat dict of floating-point tensors.

    Raises:
        ValueError: If `params` is empty, or a leaf does not have a floating-point dtype.

    Example:
        >>> adamw_init({"p": torch.ones(2)})
        AdamWState(step=tensor(0), mean={'p': tensor([0., 0.])}, var={'p': tensor([0., 0.])})
    """
    require_trainable(params)
    moments = {k: torch.zeros_like(p, dtype=wide(p)) for k, p in params.items()}
    step = torch.zeros((), dtype=torch.int64, device=next(iter(params.values())).device)
    return AdamWState(step, moments, {k: m.clone() for k, m in moments.items()})


def adamw_update(
    grads: Mapping[str, Tensor],
    state: AdamWState,
    params: Mapping[str, Tensor],
    *,
    learning_rate: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
) -> tuple[dict[str, Tensor], AdamWState]:
    """Compute one step of AdamW: `p - lr * (mean_hat / (sqrt(var_hat) + eps) + wd * p)`, as new tensors.

    Gradients are not clipped.

    Args:
        grads: Gradients with the keys and shapes of `params`.
        state: State from `adamw_init` or from the previous update.
        params: Values before the update.
        learning_rate: `lr`. Hyper-parameters are floats or 0-d tensors.
        betas: Decay rates `b1, b2` of the two moments.
        eps: Term added to the denominator to avoid division by zero.
        weight_decay: `wd`, decoupled from the gradient.

    Raises:
        ValueError: If keys or shapes differ, or if a hyper-parameter is out of range or not a scalar. Ranges of tensors
            are not checked.

    Example:
        >>> # A learning rate per adapter. vmap does not map keyword arguments, hence the lambda.
        >>> params, grads = {"p": torch.ones(2, 1)}, {"p": torch.ones(2, 1)}
        >>> state = torch.func.vmap(adamw_init)(params)
        >>> update = torch.func.vmap(lambda g, s, p, lr: adamw_update(g, s, p, learning_rate=lr))
        >>> params, state = update(grads, state, params, torch.tensor([0.1, 0.5]))
        >>> params["p"].squeeze(1), state.step
        (tensor([0.9000, 0.5000]), tensor([1, 1]))

    Reference:
        https://arxiv.org/abs/1711.05101, as implemented in `torch.optim.AdamW`. Deviation: 16-bit leaves are updated in
        float32, and rounded once.
    """
    learning_rate, weight_decay = _number("learning_rate", learning_rate), _number("weight_decay", weight_decay)
    directions, state = _adam(grads, state, params, betas, eps)
    new_params = {}
    for key, p in params.items():
        decayed = p * (1 - learning_rate * weight_decay)
        new_params[key] = (decayed - learning_rate * directions[key]).to(p.dtype)
    return new_params, state


def _adam(
    grads: Mapping[str, Tensor], state: AdamWState, params: Mapping[str, Tensor], betas: Any, eps: float | Tensor
) -> tuple[dict[str, Tensor], AdamWState]:
    """`mean_hat / (sqrt(var_hat) + eps)` of each leaf, and the next state."""
    _check_like("grads", grads, params)
    _check_like("state.mean", state.mean, params)
    _check_like("state.var", state.var, params)
    if state.step.ndim:
        raise ValueError(
            f"state.step must have shape (), got {tuple(state.step.shape)}: for stacked adapters, use torch.func.vmap."
        )
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers (b1, b2), got {betas!r}.")
    beta1, beta2 = (_number("betas", beta, below=1.0) for beta in betas)
    eps = _number("eps", eps)
    step = state.step + 1
    # float ** int64 would be float32, and 1 - b2^t would lose four digits to cancellation.
    correction1, correction2 = 1 - beta1 ** step.double(), 1 - beta2 ** step.double()
    directions, mean, var = {}, {}, {}
    for key, p in params.items():
        m, v, g = state.mean[key], state.var[key], grads[key].to(wide(p))
        # A 0-d float64 hyper-parameter would promote 0-d leaves, hence the casts.
        mean[key] = m = (m + (1 - beta1) * (g - m)).to(m.dtype)
        var[key] = v = (beta2 * v + (1 - beta2) * g * g).to(v.dtype)
        directions[key] = (m / correction1) / (_sqrt(v) / correction2.sqrt() + eps)
    return directions, AdamWState(step, mean, var)


class Optimizer(NamedTuple):
    """An optimizer for one adapter, as in optax: two pure functions that do not modify their inputs.

    Attributes:
        init: Function `params -> state` that returns the initial state, a pytree of tensors.
        update: Function `(grads, state, params) -> (updates, state)`; the new params are `params + updates`.
    """

    init: Callable[[Mapping[str, Tensor]], Any]
    update: Callable[[Mapping[str, Tensor], Any, Mapping[str, Tensor]], tuple[Mapping[str, Tensor], Any]]


def adamw(
    learning_rate: float | Tensor,
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
) -> Optimizer:
    """Return AdamW as an `Optimizer`.

    Args:
        learning_rate: As in `adamw_update`.
        betas: As in `adamw_update`.
        eps: As in `adamw_update`.
        weight_decay: As in `adamw_update`.

    Raises:
        ValueError: `update` raises the same errors as `adamw_update`.

    Example:
        >>> optimizer, params = adamw(0.1), {"p": torch.ones(2)}
        >>> updates, state = optimizer.update({"p": torch.ones(2)}, optimizer.init(params), params)
        >>> apply_updates(params, updates)
        {'p': tensor([0.9000, 0.9000])}
    """
    options = {"learning_rate": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return Optimizer(adamw_init, partial(_adamw_updates, **options))


def _adamw_updates(grads, state, params, *, learning_rate, betas, eps, weight_decay):
    learning_rate, weight_decay = _number("learning_rate", learning_rate), _number("weight_decay", weight_decay)
    directions, state = _adam(grads, state, params, betas, eps)
    return {k: (-learning_rate * (directions[k] + weight_decay * p)).to(wide(p)) for k, p in params.items()}, state


def apply_updates(
    params: Mapping[str, Tensor], updates: Mapping[str, Tensor], scale: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """Return `params + scale * updates`, computed in float32 or wider and rounded once.

    Args:
        params: Values before the update.
        updates: Updates from an optimizer, with the keys and shapes of `params`.
        scale: Factor that multiplies the updates, a float or 0-d tensor.

    Raises:
        ValueError: If keys or shapes differ.

    Example:
        >>> apply_updates({"p": torch.ones(2)}, {"p": torch.tensor([1.0, -1.0])}, 0.5)
        {'p': tensor([1.5000, 0.5000])}
    """
    _check_like("updates", updates, params)
    return {k: (p + scale * updates[k].to(wide(p))).to(p.dtype) for k, p in params.items()}


def as_optimizer(pair: Any) -> Optimizer:
    """Convert a pair of functions, such as a torchopt transformation, to an `Optimizer` whose state has only tensors.

    The `update` of the returned `Optimizer` takes `params` by position, and does not modify the gradients. (The
    `update` of torchopt takes `params` by keyword, and by default modifies the gradients.) Python numbers in a state,
    such as the step count of torchopt's Adamax, become tensors.

    Args:
        pair: `(init, update)`, such as an `Optimizer`.

    Raises:
        ValueError: If `pair` is not a pair of functions. The returned `Optimizer` raises ValueError if a leaf of a
            state is neither a tensor nor a number, or if `update` does not return `(updates, state)`.

    Example:
        >>> descent = as_optimizer((lambda params: (), lambda grads, state, *, params: (grads, state)))
        >>> descent.update({"p": torch.ones(2)}, (), {"p": torch.zeros(2)})
        ({'p': tensor([1., 1.])}, ())
    """
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair))):
        raise ValueError(
            "optimizer must be a pair of pure functions, init(params) -> state and update(grads, state, params) -> "
            f"(updates, state), such as vera_func.train.optim.adamw(1e-2), got {type(pair).__name__}."
        )
    init, update = pair
    parameters = inspect.signature(update).parameters
    options = {"inplace": False} if "inplace" in parameters else {}
    named = "params" in parameters and parameters["params"].kind is inspect.Parameter.KEYWORD_ONLY
    return Optimizer(partial(_init, init), partial(_update, update, named, options))


def _init(init: Callable[..., Any], params: Mapping[str, Tensor]) -> Any:
    return tree_map(partial(_state_tensor, next(iter(params.values())).device), init(params))


def _update(update, named, options, grads, state, params):
    result = update(grads, state, params=params, **options) if named else update(grads, state, params, **options)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Mapping)):
        raise ValueError(
            f"optimizer.update must return (updates, state) with a dict of updates, got {type(result).__name__}."
        )
    updates, state = result
    return updates, tree_map(partial(_state_tensor, next(iter(params.values())).device), state)


def _state_tensor(device: torch.device, leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, int | float):
        return torch.tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None, device=device)
    raise ValueError(
        f"the state of an optimizer must be a pytree of tensors and numbers, got a leaf of type {type(leaf).__name__}."
    )


def require_trainable(params: Mapping[str, Tensor]) -> None:
    """Check that `params` is a non-empty dict of floating-point tensors."""
    require_dict("params", params)
    if not params:
        raise ValueError("params is empty: there is nothing to train.")
    for key, p in params.items():
        if not isinstance(p, Tensor):
            raise ValueError(f"params[{key!r}] must be a tensor, got {type(p).__name__}.")
        if not p.is_floating_point():
            raise ValueError(f"params[{key!r}] is {p.dtype}; only floating-point tensors can be trained.")


def global_norm(tree: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return `sqrt(sum of squares)` over all leaves, in float32 or wider. The derivative at 0 is 0.

    Args:
        tree: Flat dict of tensors.

    Raises:
        ValueError: If `tree` is empty.

    Example:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        tensor(5.)
    """
    if not tree:
        raise ValueError("the norm of an empty dict is undefined: pass at least one tensor.")
    norms = [torch.linalg.vector_norm(leaf, dtype=wide(leaf)) for leaf in tree.values()]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_by_norm(grads: Mapping[str, Tensor], max_norm: float | Tensor) -> dict[str, Tensor]:
    """Clip gradients by their global norm: `g * min(1, max_norm / (norm + 1e-6))`.

    For stacked adapters use `torch.func.vmap(clip_by_norm)(grads, max_norms)`. If the norm is not finite, the result
    contains NaN, as in torch.

    Args:
        grads: Gradients, a flat dict of tensors.
        max_norm: Maximum norm, a float or 0-d tensor.

    Raises:
        ValueError: If `grads` is empty, or if `max_norm` is negative, NaN or not a scalar.

    Example:
        >>> clip_by_norm({"p": torch.tensor([3.0, 4.0])}, 1.0)
        {'p': tensor([0.6000, 0.8000])}

    Reference:
        https://arxiv.org/abs/1211.5063, as implemented in `torch.nn.utils.clip_grad_norm_`.
    """
    max_norm = _number("max_norm", max_norm)
    scale = (max_norm / (global_norm(grads) + 1e-6)).clamp(max=1)
    return {k: (g * scale).to(g.dtype) for k, g in grads.items()}


def wide(leaf: Tensor) -> torch.dtype:
    """Return the wider of float32 and the dtype of a tensor.

    Example:
        >>> wide(torch.ones(2, dtype=torch.bfloat16)), wide(torch.ones(2, dtype=torch.float64))
        (torch.float32, torch.float64)
    """
    return torch.promote_types(leaf.dtype, torch.float32)


def _sqrt(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, instead of infinity.

    While `lambda_b` is 0, the gradients of `lambda_d` are 0, so their second moments are 0.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def _number(name: str, value: float | Tensor, below: float | None = None) -> float | Tensor:
    if not isinstance(value, Tensor):
        if not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number, got {value!r}.")
        if not value >= 0 or (below is not None and value >= below):
            bound = "" if below is None else f" and below {below:g}"
            raise ValueError(f"{name} must be at least 0{bound}, got {value}.")
        return value
    if value.ndim:
        raise ValueError(
            f"{name} must be a scalar for one adapter, got shape {tuple(value.shape)}. For stacked adapters use "
            "torch.func.vmap, as in torch.func.vmap(lambda g, s, p, lr: adamw_update(g, s, p, learning_rate=lr))."
        )
    return value.double()


def _check_like(name: str, tree: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(params.keys() - tree.keys()), sorted(tree.keys() - params.keys())
    if missing or unknown:
        raise ValueError(f"{name} must have the keys of params; missing keys: {missing}, unknown keys: {unknown}.")
    for key, p in params.items():
        if (shape := tree[key].shape) != p.shape:
            raise ValueError(f"{name}[{key!r}] has shape {tuple(shape)}, but params[{key!r}] has {tuple(p.shape)}.")


Gradient = tuple[dict[str, Tensor], Tensor]  # gradients of the losses, and the losses
