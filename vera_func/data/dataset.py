"""Read data sets of any kind, and check them row by row.

A large data set is stored in a memory-mapped Arrow file, which may be larger than memory. Small data sets are kept in
memory, so that a run can have thousands of them.
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
        source: The file, folder, pattern or hub id from which they were read.
        kind: Their kind.
        rows: The rows; `rows[i]` has the columns of the kind, see `COLUMNS`.
        groups: For each row, a hash of its column `group`; if there is no such column, a hash of its prompt or text.
            Rows with equal hashes are never split between training and held-out rows.
    """

    source: str
    kind: Kind
    rows: "datasets.Dataset"
    groups: Int[Tensor, " rows"]


def open_dataset(source: str | Path) -> DataSet:
    """Read and check all rows of a data set.

    All rows are checked, in bounded memory, before the function returns. The temporary file of a large data set is in
    `$TMPDIR`, and is deleted with the result.

    Args:
        source: A CSV, JSON Lines or Parquet file, a folder or glob pattern of such files, or a data set of the Hugging
            Face hub as `owner/name` or `owner/name:split` (default: `train`).

    Raises:
        ValueError: If a row is invalid, or there are no rows. The message names the file, row and column.
        OSError: If a file is not found or can't be read, or if the machine is offline (ConnectionError).

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
    """The kind of a data set, which its first row determines.

    Raises:
        ValueError, OSError: As for `open_dataset`, for the first row.
    """
    return next(checked_rows(source))[0]


def checked_rows(source: str | Path) -> Iterator[tuple[Kind, Row]]:
    """Yield `(kind, row)` for each row of a data set; all rows are of the same kind.

    A row has the columns of its kind, and the column `group`, an int.

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
    """Split rows without splitting a group: return the indices of the training rows and of the held-out rows.

    Both are in increasing order.

    Args:
        groups: From `DataSet`.
        held_out: Minimum number of rows to hold out. Whole groups are held out until this number is reached.
        seed: Seed of the choice.

    Raises:
        ValueError: If no row is left for training, or none is held out.

    Example:
        >>> split_rows(torch.tensor([7, 7, 8, 9]), 1, seed=0)
        (tensor([0, 1, 2]), tensor([3]))
    """
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    before = counts[order].cumsum(0) - counts[order]  # rows of the groups that come first
    test = torch.zeros(len(counts), dtype=torch.bool)
    test[order[before < held_out]] = True
    test = test[index]
    if test.all() or not test.any():
        raise ValueError(
            f"{len(groups)} rows in {len(counts)} groups can't be split into at least {held_out} held-out rows and at "
            "least one training row."
        )
    return (~test).nonzero().flatten(), test.nonzero().flatten()


def _check_like(values: dict[str, Any], first: dict[str, Any]) -> None:
    for name, value in values.items():
        if type(value) is not type(first[name]):
            said, expected = ("text" if isinstance(one, str) else "messages" for one in (value, first[name]))
            raise ValueError(f"{name!r} is {said}, but {expected} in the first row: use one of them in all rows.")


def _group(values: dict[str, Any], given: Any) -> int:
    """A hash of the group if it is given, else a hash of the prompt or the text."""
    value = given or next(iter(values.values()))
    if isinstance(value, list) and given is None:
        value = next((message["content"] for message in value if message["role"] == "user"), value)
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:8], "big", signed=True)


def _store(rows: Iterator[dict[str, Any]]) -> "datasets.Dataset":
    """Keep rows in memory if they fit in one batch. Otherwise write them to an Arrow file, and memory-map it."""
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
