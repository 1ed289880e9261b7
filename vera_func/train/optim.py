"""AdamW, clipping and schedules as pure functions of dicts of tensors.

    mean' = b1 mean + (1 - b1) g          var' = b2 var + (1 - b2) g^2
    p'    = (1 - lr wd) p - lr (mean' / (1 - b1^t)) / (sqrt(var' / (1 - b2^t)) + eps)

Every function is written for one adapter and writes to none of its inputs; many adapters are
`torch.func.vmap` of it. So hyper-parameters are floats or 0-d tensors, which can be differentiated.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class AdamWState(NamedTuple):
    """The number of updates, and the running moments of the gradient, keyed like `params`."""

    step: Int[Tensor, ""]
    mean: dict[str, Tensor]
    var: dict[str, Tensor]


def adamw_init(params: Mapping[str, Tensor]) -> AdamWState:
    """The state before the first update: `step = 0`, both moments zero, float32 or wider.

    Args:
        params: Flat dict of what is trained.

    Raises:
        ValueError: If it is empty, or a leaf is not of floating-point numbers.

    Example:
        >>> adamw_init({"p": torch.ones(2)})
        AdamWState(step=tensor(0), mean={'p': tensor([0., 0.])}, var={'p': tensor([0., 0.])})
    """
    if not params:
        raise ValueError("params is empty: there is nothing to train.")
    for key, p in params.items():
        if not p.is_floating_point():
            raise ValueError(f"params[{key!r}] is {p.dtype}; only floating-point numbers can be trained.")
    moments = {k: torch.zeros_like(p, dtype=_wide(p)) for k, p in params.items()}
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
    """One step of AdamW: `p - lr * (mean_hat / (sqrt(var_hat) + eps) + wd * p)`, as new tensors.

    About 15 operations per entry, and a second copy of `params` and `state`. Clips nothing.

    Args:
        grads: Gradients, keyed and shaped like `params`.
        state: From `adamw_init` or the last update.
        params: Values before the update.
        learning_rate: `lr`, a float or a 0-d tensor, as are all that follow.
        betas: Decay rates `b1, b2` of the two moments.
        eps: Added to the root, against division by zero.
        weight_decay: `wd`, decoupled from the gradient.

    Raises:
        ValueError: If keys or shapes differ, or if a hyper-parameter is not a single number, or out of range (which a
            tensor's value is not asked).

    Example:
        >>> # A learning rate per adapter. vmap does not map keyword arguments, hence the lambda.
        >>> params, grads = {"p": torch.ones(2, 1)}, {"p": torch.ones(2, 1)}
        >>> state = torch.func.vmap(adamw_init)(params)
        >>> update = torch.func.vmap(lambda g, s, p, lr: adamw_update(g, s, p, learning_rate=lr))
        >>> params, state = update(grads, state, params, torch.tensor([0.1, 0.5]))
        >>> params["p"].squeeze(1), state.step
        (tensor([0.9000, 0.5000]), tensor([1, 1]))

    Reference:
        https://arxiv.org/abs/1711.05101, in the form of `torch.optim.AdamW`. Deviation: 16-bit
        leaves are updated in float32 and cast once.
    """
    _check_like("grads", grads, params)
    _check_like("state.mean", state.mean, params)
    _check_like("state.var", state.var, params)
    if state.step.ndim:
        raise ValueError("state is that of stacked adapters: map over them with torch.func.vmap.")
    learning_rate = _number("learning_rate", learning_rate)
    beta1, beta2 = (_number("betas", beta, below=1.0) for beta in betas)
    eps, weight_decay = _number("eps", eps), _number("weight_decay", weight_decay)
    step = state.step + 1
    # float ** int64 would be float32, and 1 - b2^t lose four digits to cancellation.
    correction1, correction2 = 1 - beta1 ** step.double(), 1 - beta2 ** step.double()
    new_params, mean, var = {}, {}, {}
    for key, p in params.items():
        m, v, g = state.mean[key], state.var[key], grads[key].to(_wide(p))
        # The casts are for 0-d leaves, which a 0-d float64 hyper-parameter would promote.
        mean[key] = m = (m + (1 - beta1) * (g - m)).to(m.dtype)
        var[key] = v = (beta2 * v + (1 - beta2) * g * g).to(v.dtype)
        direction = (m / correction1) / (_sqrt(v) / correction2.sqrt() + eps)
        decayed = p * (1 - learning_rate * weight_decay)
        new_params[key] = (decayed - learning_rate * direction).to(p.dtype)
    return new_params, AdamWState(step, mean, var)


def global_norm(tree: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """`sqrt(sum of squares)` over all leaves, in float32 or wider; its derivative at 0 is 0.

    Args:
        tree: Flat dict of tensors.

    Raises:
        ValueError: If it is empty.

    Example:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        tensor(5.)
    """
    if not tree:
        raise ValueError("the norm of an empty dict of tensors is not defined.")
    norms = [torch.linalg.vector_norm(leaf, dtype=_wide(leaf)) for leaf in tree.values()]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_by_norm(grads: Mapping[str, Tensor], max_norm: float | Tensor) -> dict[str, Tensor]:
    """`g * min(1, max_norm / (norm + 1e-6))`, with the norm over all leaves of one adapter.

    Per adapter it is `torch.func.vmap(clip_by_norm)(grads, max_norms)`. A `max_norm` of infinity
    clips nothing. A norm that is not finite is not hidden: NaN comes out, as it does in torch.

    Raises:
        ValueError: If `grads` is empty, or `max_norm` is not a single number, or negative or NaN.

    Example:
        >>> clip_by_norm({"p": torch.tensor([3.0, 4.0])}, 1.0)
        {'p': tensor([0.6000, 0.8000])}

    Reference:
        https://arxiv.org/abs/1211.5063, in the form of `torch.nn.utils.clip_grad_norm_`.
    """
    max_norm = _number("max_norm", max_norm)
    scale = (max_norm / (global_norm(grads) + 1e-6)).clamp(max=1)
    return {k: (g * scale).to(g.dtype) for k, g in grads.items()}


def constant(step: int | Tensor, *, value: float = 1.0) -> Float[Tensor, "*n"]:
    """`value` at every step, in the shape of `step` and in float64.

    Args:
        step: () or (n,).
        value: What to return.

    Example:
        >>> constant(7)
        tensor(1., dtype=torch.float64)
    """
    return torch.full_like(torch.as_tensor(step, dtype=torch.float64), value)


def linear_warmup_cosine(
    step: int | Tensor, *, warmup: int, total: int, peak: float = 1.0, final: float = 0.0
) -> Float[Tensor, "*n"]:
    """Up to `peak` in `warmup` steps, then half a cosine down to `final` at step `total`.

        step < warmup:  peak (step + 1) / (warmup + 1)
        from then on:   final + (peak - final) (1 + cos(pi (step - warmup) / (total - warmup))) / 2

    Steps count from 0, which has a rate already. The result has the shape of `step`, in float64.

    Raises:
        ValueError: If not `0 <= warmup < total`.

    Example:
        >>> linear_warmup_cosine(torch.tensor([0, 1, 3, 8, 13]), warmup=3, total=13)
        tensor([0.2500, 0.5000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)

    Reference:
        https://arxiv.org/abs/1608.03983, without restarts.
    """
    if not 0 <= warmup < total:
        raise ValueError(f"must be 0 <= warmup < total, got warmup={warmup}, total={total}.")
    step = torch.as_tensor(step, dtype=torch.float64)
    rising = peak * (step + 1) / (warmup + 1)
    progress = ((step - warmup) / (total - warmup)).clamp(0, 1)
    falling = final + (peak - final) * (1 + torch.cos(math.pi * progress)) / 2
    return torch.where(step < warmup, rising, falling)


def _wide(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)


def _sqrt(x: Tensor) -> Tensor:
    """The root, with derivative 0 at 0: `lambda_d` has no gradient while `lambda_b` is zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def _number(name: str, value: float | Tensor, below: float | None = None) -> float | Tensor:
    if not isinstance(value, Tensor):
        if not value >= 0 or (below is not None and value >= below):
            bound = "" if below is None else f" and below {below:g}"
            raise ValueError(f"{name} must be at least 0{bound}, got {value}.")
        return value
    if value.ndim:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but one adapter takes one number. Map: "
            "torch.func.vmap(lambda g, s, p, lr: adamw_update(g, s, p, learning_rate=lr))."
        )
    return value.double()


def _check_like(name: str, tree: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(params.keys() - tree.keys()), sorted(tree.keys() - params.keys())
    if missing or unknown:
        raise ValueError(f"{name} must have the keys of params: lacks {missing}, adds {unknown}.")
    for key, p in params.items():
        if (shape := tree[key].shape) != p.shape:
            raise ValueError(f"{name}[{key!r}] is {tuple(shape)}, but params {tuple(p.shape)}.")


Gradient = tuple[dict[str, Tensor], Tensor]  # of every adapter's own loss, and the losses
