"""The best params of a run so far, kept in memory and in a file, so that a resumed run keeps the same ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from ..io.files import read_safetensors, replacing


class Best(NamedTuple):
    """The params with the lowest metric, for one adapter (`*n` is empty) or for each of `n` adapters.

    Attributes:
        params: These params.
        metric: Their metrics; infinite before the first evaluation.
        step: The numbers of steps after which they were evaluated.
    """

    params: dict[str, Tensor]
    metric: Float[Tensor, "*n"]
    step: Float[Tensor, "*n"]


def start_best(params: Mapping[str, Tensor], n: tuple[int, ...] = ()) -> Best:
    """The state before the first evaluation.

    Args:
        params: Initial params.
        n: `(number of stacked adapters,)`, or `()`.
    """
    infinite = torch.full(n, torch.inf, dtype=torch.float64)
    return Best(dict(params), infinite, torch.zeros_like(infinite))


def better(best: Best, params: Mapping[str, Tensor], metric: Float[Tensor, "*n"], step: int) -> Best:
    """The state after an evaluation: adapters whose metric is lower than before are replaced; NaN is not lower.

    Example:
        >>> best = start_best({"p": torch.zeros(2, 3)}, (2,))
        >>> best = better(best, {"p": torch.ones(2, 3)}, torch.tensor([1.0, 2.0]), 1)
        >>> better(best, {"p": torch.full((2, 3), 5.0)}, torch.tensor([2.0, 1.0]), 2).params["p"][:, 0]
        tensor([1., 5.])
    """
    metric = metric.detach().cpu().double()
    wins = metric < best.metric

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(wins.to(new.device).reshape(*wins.shape, *[1] * (new.dim() - wins.dim())), new.detach(), old)

    params = {key: chosen(old, params[key]) for key, old in best.params.items()}
    return Best(params, torch.where(wins, metric, best.metric), torch.where(wins, float(step), best.step))


def save_best(path: Path, best: Best) -> None:
    """Write the state to a safetensors file, atomically."""
    tensors = {f"params.{k}": t.contiguous().cpu().clone() for k, t in best.params.items()}
    with replacing(path) as file:
        file.write_bytes(save(tensors | {"metric": best.metric.clone(), "step": best.step.clone()}))


def load_best(path: Path, like: Best) -> Best:
    """Read the state from a file, onto the devices of `like`.

    Raises:
        ValueError: If the file is damaged, or is of another run.
    """
    _, tensors = read_safetensors(path)
    expected = {f"params.{k}": t for k, t in like.params.items()} | {"metric": like.metric, "step": like.step}
    if {k: t.shape for k, t in tensors.items()} != {k: t.shape for k, t in expected.items()}:
        raise ValueError(f"{path} has other params than this run: delete it to start again.")
    params = {k: tensors[f"params.{k}"].to(t.device) for k, t in like.params.items()}
    return Best(params, tensors["metric"], tensors["step"])
