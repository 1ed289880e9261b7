"""Read data sets of any kind, and check each row.

A large data set is stored in a memory-mapped Arrow file, which may be larger than memory. Small data sets are kept in
memory, so that a run with thousands of data sets does not create thousands of files.
"""

import hashlib
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .files import Row, source_rows
from .kinds import Kind, check_row, require_kind, require_same_kind


if TYPE_CHECKING:
    import datasets
    import pyarrow

BATCH = 2**23  # characters of the rows that are written to the Arrow file at once


class DataSet(NamedTuple):
    """Checked rows of one kind.

    Attributes:
        source: The file, folder, glob pattern or hub id from which the rows were read.
        kind: Kind of the rows.
        rows: The rows; `rows[i]` is a dict with the columns `COLUMNS[kind]`.
        groups: For each row, a hash of its `group`; without a `group`, a hash of the prompt, text or first user
            message. See `split_rows`.
    """

    source: str
    kind: Kind
    rows: "datasets.Dataset"
    groups: Int[Tensor, " rows"]


def open_dataset(source: str | Path) -> DataSet:
    """Read a data set, and check all rows, in bounded memory.

    The temporary file of a large data set is in `$TMPDIR`, and is deleted when `DataSet.rows` is garbage-collected.

    Args:
        source: A CSV, JSON Lines or Parquet file, a folder or glob pattern of such files, or a data set of the Hugging
            Face hub, written `owner/name` or `owner/name:split`. The default split is `train`.

    Raises:
        ValueError: If a row is invalid, or if there are no rows. The message names the file, the row and the column.
        OSError: If a file is not found or can't be read, or if the hub can't be reached (ConnectionError).

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "sums.csv"
        >>> _ = path.write_text("prompt,completion\\n1 + 1 =,2\\n")
        >>> data = open_dataset(path)
        >>> data.kind, data.rows[0]
        ('completion', {'prompt': '1 + 1 =', 'completion': '2'})
    """
    rows, groups = checked_rows(source), array("q")
    kind, first = next(rows)

    def values() -> Iterator[dict[str, Any]]:
        for row in chain([first], (row for _, row in rows)):
            groups.append(row.values.pop("group"))
            yield row.values

    return DataSet(str(source), kind, _store(values()), torch.tensor(groups))


def peek_kind(source: str | Path) -> Kind:
    """Return the kind of a data set, determined by its first row.

    Raises:
        ValueError, OSError: As for `open_dataset`, but only the first row is checked.
    """
    return next(checked_rows(source))[0]


def checked_rows(source: str | Path) -> Iterator[tuple[Kind, Row]]:
    """Yield `(kind, row)` for each row of a data set; `kind` is the same for all rows.

    Besides the columns of the kind, `row.values` contains `group`, an integer hash of the row's group.

    Raises:
        ValueError, OSError: As for `open_dataset`.
    """
    kind: Kind | None = None
    first: dict[str, Any] | None = None

    def check_header(columns: list[str], place: str) -> None:
        nonlocal kind
        if not columns:
            raise ValueError(f"{place}: the file is empty.")
        try:
            found = require_kind(columns)
            require_same_kind(found, kind or found)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        kind = found

    for place, row in source_rows(source, check_header):
        try:
            kind = kind or require_kind(name for name, value in row.items() if value is not None)
            values = check_row(kind, row)
            first = first or values
            _check_like(values, first)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        yield kind, Row(place, {**values, "group": _group(values, row.get("group"))})
    if first is None:
        where = "line 2: there are no rows after the header" if kind else "line 1: there are no rows"
        raise ValueError(f"{source}, {where}.")


def split_rows(
    groups: Int[Tensor, " rows"], held_out: int, *, seed: int
) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """Return the sorted indices of the training rows and of the held-out rows, without splitting a group.

    Args:
        groups: From `DataSet`.
        held_out: Minimum number of held-out rows. Whole groups are held out until there are at least `held_out` rows.
        seed: Seed of the choice.

    Raises:
        ValueError: If no row is left for training, or if no row is held out.

    Example:
        >>> split_rows(torch.tensor([7, 7, 8, 9]), 1, seed=0)
        (tensor([0, 1, 2]), tensor([3]))
    """
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    before = counts[order].cumsum(0) - counts[order]  # number of rows in the preceding groups
    test = torch.zeros(len(counts), dtype=torch.bool)
    test[order[before < held_out]] = True
    test = test[index]
    if test.all() or not test.any():
        raise ValueError(
            f"{len(groups)} rows in {len(counts)} groups can't be split into at least {held_out} held-out rows and at "
            "least one training row, because a group is never split: add rows of other groups."
        )
    return (~test).nonzero().flatten(), test.nonzero().flatten()


def _check_like(values: dict[str, Any], first: dict[str, Any]) -> None:
    for name, value in values.items():
        if type(value) is not type(first[name]):
            said, expected = ("a string" if isinstance(one, str) else "a list" for one in (value, first[name]))
            raise ValueError(f"{name!r} is {said}, but {expected} in the first row: use {expected} in all rows.")


def _group(values: dict[str, Any], given: Any) -> int:
    """Hash the given group, or else the row's prompt, text or first user message."""
    value = given or next(iter(values.values()))
    if isinstance(value, list) and given is None:
        value = next((message["content"] for message in value if message["role"] == "user"), value)
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:8], "big", signed=True)


def _store(rows: Iterator[dict[str, Any]]) -> "datasets.Dataset":
    """Keep up to one batch of rows in memory; write a larger data set to a memory-mapped Arrow file."""
    import pyarrow
    from datasets import Dataset

    first = next(rows)
    schema = _schema(first)
    batches = _batches(first, rows)
    start = list(islice(batches, 2))
    if len(start) == 1:
        return Dataset(pyarrow.Table.from_pylist(start[0], schema))
    folder = tempfile.mkdtemp(prefix="vera_func-")
    try:
        path = Path(folder) / "rows.arrow"
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            for batch in chain(start, batches):
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
        data = Dataset.from_file(str(path))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(data, shutil.rmtree, folder, ignore_errors=True)
    return data


def _schema(row: dict[str, Any]) -> "pyarrow.Schema":
    import pyarrow

    messages = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    return pyarrow.schema(
        [(name, pyarrow.string() if isinstance(value, str) else messages) for name, value in row.items()]
    )


def _batches(first: dict[str, Any], rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch, size = [first], 0
    for row in rows:
        batch.append(row)
        size += sum(map(len, map(str, row.values())))
        if size > BATCH or len(batch) == 1000:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
