"""The best params of a run (those with the lowest metric), in memory and in a file for resumed runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from ..io.files import read_safetensors, replacing


class Best(NamedTuple):
    """The params with the lowest metric, for one adapter (`*n` is ()) or for each of n stacked adapters (`*n` is (n,)).

    Attributes:
        params: Params with the lowest metric.
        metric: The lowest metric of each adapter; infinite before the first evaluation.
        step: Number of training steps after which each adapter reached its lowest metric.
    """

    params: dict[str, Tensor]
    metric: Float[Tensor, "*n"]
    step: Float[Tensor, "*n"]


def start_best(params: Mapping[str, Tensor], n: tuple[int, ...] = ()) -> Best:
    """Return the initial `Best` of a run, before any evaluation.

    Args:
        params: Initial params.
        n: Shape of the metric: (n,) for n stacked adapters, () for one adapter.
    """
    infinite = torch.full(n, torch.inf, dtype=torch.float64, device=next(iter(params.values())).device)
    return Best(dict(params), infinite, torch.zeros_like(infinite))


def better(best: Best, params: Mapping[str, Tensor], metric: Float[Tensor, "*n"], step: int) -> Best:
    """Return an updated `best`, with new params for each adapter whose metric is lower than in `best`.

    A metric of NaN never counts as an improvement.

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
    """Write `best` to a safetensors file, atomically."""
    tensors = {f"params.{k}": t.contiguous().cpu().clone() for k, t in best.params.items()}
    with replacing(path) as file:
        file.write_bytes(save(tensors | {"metric": best.metric.clone(), "step": best.step.clone()}))


def load_best(path: Path, like: Best) -> Best:
    """Read a `Best` from a file, and move its params to the devices of `like.params`.

    Raises:
        ValueError: If the file is damaged, or if its keys or shapes are not those of `like`.
    """
    _, tensors = read_safetensors(path)
    expected = {f"params.{k}": t for k, t in like.params.items()} | {"metric": like.metric, "step": like.step}
    if {k: t.shape for k, t in tensors.items()} != {k: t.shape for k, t in expected.items()}:
        raise ValueError(
            f"{path} belongs to another run: its params have other keys or shapes than those of this run. Delete the "
            "file to start anew."
        )
    params = {k: tensors[f"params.{k}"].to(t.device) for k, t in like.params.items()}
    return Best(params, tensors["metric"], tensors["step"])
