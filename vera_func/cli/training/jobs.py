"""The adapters of a run, each with a name, data set, beta, rows, number of steps and learning rate."""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.batches import Part
from ...data.dataset import DataSet, split_rows
from ...data.examples import num_held_out
from ...data.files import find_files, is_hub_id
from ...data.tokens import TokenRows
from .settings import Run


MIN_STEPS, MAX_STEPS = 50, 100  # limits of the default number of steps, which is one epoch


class Job(NamedTuple):
    """An adapter to train.

    Attributes:
        name: Name of the adapter in the bank and in tables.
        data: Index of the data set.
        train: Training rows.
        held_out: Held-out rows.
        steps: Number of training steps.
        learning_rate: Peak of the learning rate.
        num_rows: Number of training rows before packing.
    """

    name: str
    data: int
    train: Part
    held_out: Part
    steps: int
    learning_rate: float
    num_rows: int


def expand_sources(sources: Sequence[str], each: bool) -> list[str]:
    """The data sets of `--data`. If `each` is True, every file or sub-folder in a folder is a separate data set.

    Raises:
        ValueError: If a folder has no data.
        FileNotFoundError: If a file does not exist.
    """
    if not each:
        return list(sources)
    found: list[str] = []
    for source in sources:
        if is_hub_id(source):
            found.append(source)
        elif not Path(source).is_dir():
            found += [str(file) for file in find_files(source)]
        else:
            files = find_files(source)
            found += sorted({str(Path(source, file.relative_to(source).parts[0])) for file in files})
    return found


def make_jobs(
    sets: Sequence[DataSet],
    rows: Sequence[TokenRows],
    references: Sequence[Tensor | None],
    run: Run,
    *,
    betas: Sequence[float],
    pack_to: int | None = None,
) -> list[Job]:
    """The jobs of a run: one job per data set, or, for preferences, one job per pair of a data set and a beta.

    Args:
        sets: The data sets.
        rows: Tokenized rows of each data set.
        references: For preferences, the reference's log-probabilities of the rows of each data set.
        run: Options of the run.
        betas: For preferences, the values of DPO's beta.
        pack_to: Maximum number of tokens of a packed training row; None means no packing.

    Raises:
        ValueError: If the length of `run.steps` or `run.learning_rates` is neither 1 nor the number of jobs, if two
            jobs have the same name, or if a data set is too small to be split.
    """
    pairs = list(product(range(len(sets)), betas if rows[0].width == 2 else [None]))
    names = adapter_names([data.source for data in sets], pairs)
    splits = [_split(one.groups, run.recipe.seed, data.source) for data, one in zip(sets, rows, strict=True)]
    jobs = []
    for i, (data, beta) in enumerate(pairs):
        train, test = splits[data]
        own = Part(rows[data], train, beta, references[data])
        held_out = own._replace(use=test)
        if pack_to is not None:
            packed = rows[data].pack(train, pack_to)
            own = own._replace(rows=packed, use=torch.arange(len(packed.packed or ())))
        batches = max(len(own.use) // run.recipe.batch_size, 1)
        count = num_steps(batches, run.steps, run.epochs, i, len(pairs))
        rate = value_of("--learning-rate", run.learning_rates, i, len(pairs))
        jobs.append(Job(names[i], data, own, held_out, count, rate, len(train)))
    return jobs


def _split(groups: Tensor, seed: int, source: str) -> tuple[Tensor, Tensor]:
    """Split rows into training and held-out rows. If all rows are from one document, the last rows are held out."""
    held_out = num_held_out(len(groups))
    if len(groups) > 1 and bool((groups == groups[0]).all()):
        first, last = torch.arange(len(groups)).split([len(groups) - held_out, held_out])
        return first, last
    try:
        return split_rows(groups, held_out, seed=seed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def num_steps(batches: int, steps: Sequence[int] | None, epochs: float | None, i: int, n: int) -> int:
    """The number of steps of adapter `i` of `n`: the adapter's value in `steps`, or `epochs` times `batches`.

    If `steps` and `epochs` are None, training takes one epoch, but at least 50 and at most 100 steps.

    Example:
        >>> num_steps(8, None, None, 0, 1), num_steps(8, None, 2.0, 0, 1), num_steps(8, [5, 6], None, 1, 2)
        (50, 16, 6)
    """
    if steps is not None:
        return value_of("--steps", steps, i, n)
    return min(max(batches, MIN_STEPS), MAX_STEPS) if epochs is None else max(round(batches * epochs), 1)


def value_of(option: str, values: Sequence[Any], i: int, n: int) -> Any:
    """The value of an option for adapter `i` of `n`.

    Raises:
        ValueError: If the number of values is neither 1 nor `n`.
    """
    if len(values) not in (1, n):
        adapters, expected = ("1 adapter", "a single value") if n == 1 else (f"{n} adapters", f"1 or {n} values")
        raise ValueError(f"{option} got {len(values)} values for {adapters}: pass {expected}.")
    return values[i if len(values) > 1 else 0]


def adapter_names(sources: Sequence[str], pairs: Sequence[tuple[int, float | None]]) -> list[str]:
    """The adapter name for each pair of a data set and a beta, such as `reviews`, `beta0.1` or `reviews-beta0.1`.

    Raises:
        ValueError: If two pairs are equal.

    Example:
        >>> adapter_names(["a.jsonl", "b.jsonl"], [(0, None), (1, None)])
        ['a', 'b']
    """
    stems = [Path(source.partition(":")[0].rstrip("/")).stem or "data" for source in sources]
    counts, several = Counter(stems), len({beta for _, beta in pairs}) > 1
    names: list[str] = []
    for data, beta in pairs:
        stem = stems[data] if counts[stems[data]] == 1 else f"{stems[data]}-{data + 1}"
        parts = [stem] if len(sources) > 1 or not several else []
        names.append("-".join([*parts, *([f"beta{beta:g}"] if several else [])]))
    if len(set(names)) < len(names):
        raise ValueError(
            f"got adapters with the names {names}, expected distinct names: rename a data set, or pass each beta once."
        )
    return names
