"""Hyper-parameter sweeps over stacked adapters: grids, tables of results, and functions that slice or join runs."""

from collections.abc import Mapping, Sequence, Sized
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..private import tree_map
from .run import Fit


def sweep(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return all combinations of the values of a grid, one row per adapter. The last hyper-parameter varies fastest.

    Row `i` belongs to adapter `i`: pass `learning_rate=[row["learning_rate"] for row in rows]` to `fit`.

    Args:
        grid: Maps names of hyper-parameters to lists of values.

    Raises:
        ValueError: If the values of a hyper-parameter are empty or are not a list.

    Example:
        >>> sweep({"learning_rate": [0.1, 0.01], "seed": [0]})
        [{'learning_rate': 0.1, 'seed': 0}, {'learning_rate': 0.01, 'seed': 0}]
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sized) or len(values) == 0:
            raise ValueError(f"grid[{name!r}] must be a non-empty list of values, got {values!r}.")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def sweep_table(
    rows: Sequence[Mapping[str, Any]], results: Mapping[str, Tensor | Sequence[Any]]
) -> list[dict[str, Any]]:
    """Add columns of results to the rows of a sweep, for example for `pandas.DataFrame`. Tensors become Python numbers.

    Args:
        rows: From `sweep`, one per adapter.
        results: Maps names of columns to values, one value per row.

    Raises:
        ValueError: If a column does not have one value per row, or if `rows` already have a column of that name.

    Example:
        >>> sweep_table(sweep({"seed": [3, 4]}), {"loss": torch.tensor([0.5, 0.25])})
        [{'seed': 3, 'loss': 0.5}, {'seed': 4, 'loss': 0.25}]
    """
    columns = {k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in results.items()}
    for name, column in columns.items():
        if len(column) != len(rows):
            raise ValueError(f"results[{name!r}] must have {len(rows)} values, one per row, got {len(column)}.")
        if any(name in row for row in rows):
            raise ValueError(f"the rows already have a column {name!r}: rename results[{name!r}].")
    return [{**row, **{k: c[i] for k, c in columns.items()}} for i, row in enumerate(rows)]


def fit_row(run: Fit, i: int) -> Fit:
    """Return the run of adapter `i` of a stack, as if this adapter had been trained alone.

    Example:
        >>> from vera_func import fit
        >>> loss = lambda params, batch: params["p"].square().sum(-1)
        >>> start, rates = {"p": torch.ones(2, 3)}, [0.1, 0.2]
        >>> run = fit(loss, start, int, steps=4, learning_rate=rates, num_adapters=2, progress=False)
        >>> fit_row(run, 1).losses.shape
        torch.Size([4])
    """
    params, state = tree_map(lambda leaf: leaf[i], (run.params, run.state))
    return Fit(params, state, run.losses[:, i], run.metrics[:, i], run.stopped[i], run.diverged[i])


def join_fits(runs: Sequence[Fit]) -> Fit:
    """Concatenate the runs of several stacks; shorter histories of losses and metrics are padded with NaN.

    Example:
        >>> from vera_func import fit
        >>> loss = lambda params, batch: params["p"].square().sum(-1)
        >>> options = {"steps": 4, "learning_rate": 0.1, "progress": False}
        >>> runs = [fit(loss, {"p": torch.ones(n, 3)}, int, num_adapters=n, **options) for n in (2, 1)]
        >>> join_fits(runs).losses.shape
        torch.Size([4, 3])
    """

    def history(leaves: Sequence[Tensor]) -> Tensor:
        longest = max(map(len, leaves))
        return torch.cat([pad(leaf, (0, 0, 0, longest - len(leaf)), value=torch.nan) for leaf in leaves], dim=1)

    joined: Fit = tree_map(
        lambda *leaves: torch.cat(leaves), *(run._replace(losses=run.stopped, metrics=run.stopped) for run in runs)
    )
    losses, metrics = (history([getattr(run, name) for run in runs]) for name in ("losses", "metrics"))
    return joined._replace(losses=losses, metrics=metrics)
