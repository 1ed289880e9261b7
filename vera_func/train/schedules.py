"""Learning-rate schedules: functions that map a step, counted from 0, to the factor that multiplies the learning rate.

`schedule_of` selects a schedule by name, for adapters that train for different numbers of steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


Schedule = Literal["cosine", "linear", "constant"]


def constant(step: int | Tensor) -> Float[Tensor, "*n"]:
    """The constant schedule: 1 for every step, with the shape of `step`, in float64.

    Args:
        step: One step (a number or a 0-d tensor), or a tensor of n steps (n,).

    Example:
        >>> constant(7)
        tensor(1., dtype=torch.float64)
    """
    return torch.ones_like(as_step(step))


def linear_warmup_cosine(
    step: int | Tensor, *, warmup: int, total: int, peak: float = 1.0, final: float = 0.0
) -> Float[Tensor, "*n"]:
    """Linear warmup to `peak` in `warmup` steps, then cosine decay to `final` at step `total`.

        step < warmup:  peak (step + 1) / (warmup + 1)
        from then on:   final + (peak - final) (1 + cos(pi (step - warmup) / (total - warmup))) / 2

    The result is float64, with the shape of `step`.

    Raises:
        ValueError: If `warmup` is negative or is not less than `total`.

    Example:
        >>> linear_warmup_cosine(torch.tensor([0, 1, 3, 8, 13]), warmup=3, total=13)
        tensor([0.2500, 0.5000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)

    Reference:
        https://arxiv.org/abs/1608.03983, without restarts.
    """
    if not 0 <= warmup < total:
        raise ValueError(f"linear_warmup_cosine needs 0 <= warmup < total, got warmup={warmup}, total={total}.")
    step = as_step(step)
    rising = peak * (step + 1) / (warmup + 1)
    progress = ((step - warmup) / (total - warmup)).clamp(0, 1)
    falling = final + (peak - final) * (1 + torch.cos(math.pi * progress)) / 2
    return torch.where(step < warmup, rising, falling)


def linear_warmup_linear(step: int | Tensor, *, warmup: int, total: int) -> Float[Tensor, "*n"]:
    """Linear warmup to 1 at step `warmup`, then linear decay to 0 at step `total`.

        step < warmup:  (step + 1) / (warmup + 1)
        from then on:   (total - step) / (total - warmup)

    Raises:
        ValueError: If `warmup` is negative or is not less than `total`.

    Example:
        >>> linear_warmup_linear(torch.tensor([0, 1, 3, 8, 13]), warmup=3, total=13)
        tensor([0.2500, 0.5000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if not 0 <= warmup < total:
        raise ValueError(f"linear_warmup_linear needs 0 <= warmup < total, got warmup={warmup}, total={total}.")
    step = as_step(step)
    return torch.where(step < warmup, (step + 1) / (warmup + 1), ((total - step) / (total - warmup)).clamp(0, 1))


def schedule_of(name: Schedule, warmup: float, totals: Sequence[int]) -> Callable[[int], Float[Tensor, " n"]]:
    """Return a schedule of one factor per adapter, for `fit`. The factor of an adapter is 0 after its last step.

    Args:
        name: Shape of the schedule after warmup: "cosine", "linear" or "constant".
        warmup: Number of warmup steps. A value below 1 is a fraction of the steps of each adapter.
        totals: Number of steps of each adapter.

    Raises:
        ValueError: If `name` is unknown, or if `warmup` is negative or takes all steps of an adapter.

    Example:
        >>> factors = schedule_of("constant", 0, [1, 3])
        >>> factors(0), factors(1)
        (tensor([1., 1.], dtype=torch.float64), tensor([0., 1.], dtype=torch.float64))
    """
    shapes = {"cosine": linear_warmup_cosine, "linear": linear_warmup_linear, "constant": _linear_warmup}
    if name not in shapes:
        raise ValueError(f"the schedule must be one of {', '.join(shapes)}, got {name!r}.")
    warmups = [int(warmup * total) if warmup < 1 else int(warmup) for total in totals]
    for steps, total in zip(warmups, totals, strict=True):
        if not 0 <= steps < total:
            raise ValueError(
                f"warmup must be at least 0 and less than the {total} steps of an adapter, got {warmup:g}."
            )

    def factors(step: int) -> Tensor:
        rising = [shapes[name](step, warmup=w, total=t) for w, t in zip(warmups, totals, strict=True)]
        return torch.stack(rising) * (step < torch.tensor(totals, device="cpu"))

    return factors


def as_step(step: int | Tensor) -> Float[Tensor, "*n"]:
    """Convert a step to a float64 tensor; a number becomes a tensor on the CPU, whatever the default device is.

    Example:
        >>> as_step(3)
        tensor(3., dtype=torch.float64)
    """
    return step.double() if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64, device="cpu")


def _linear_warmup(step: int | Tensor, *, warmup: int, total: int) -> Float[Tensor, "*n"]:
    return ((as_step(step) + 1) / (warmup + 1)).clamp(max=1)
