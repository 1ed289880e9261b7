"""Read rows and their line numbers from CSV, JSON Lines and Parquet files, and from the Hugging Face hub.

Files are read row by row in bounded memory. In CSV and JSON Lines, strings such as `NA`, `None`, `01` and dates remain
strings.
"""

import codecs
import csv
import glob
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO


MAX_ROW = 2**23  # characters; a longer line or field nearly always lacks a quote or a line break
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^/]+)?")
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".json", ".parquet")


class Row(NamedTuple):
    """A row of a data set; `place` is its file and line, such as "reviews.csv, line 3"."""

    place: str
    values: dict[str, Any]


_FORMATS = {  # first bytes of other formats; name and repair for the error message
    codecs.BOM_UTF16_LE: ("UTF-16", "save the file as UTF-8"),
    codecs.BOM_UTF16_BE: ("UTF-16", "save the file as UTF-8"),
    b"\x1f\x8b": ("gzip", "unpack the file"),
    b"PK\3\4": ("zip, as archives and spreadsheets are", "unpack it, or save the table as CSV in UTF-8"),
    b"PAR1": ("Parquet", "end the name of the file in .parquet"),
}

CheckHeader = Callable[[list[str], str], None]


def source_rows(source: str | Path, check_header: CheckHeader) -> Iterator[Row]:
    """Yield the rows of a file, of a folder or glob pattern of files, or of a data set of the Hugging Face hub.

    Args:
        source: See `find_files` and `is_hub_id`.
        check_header: Function `(columns, place)`, called once for each file with a header; see `read_rows`.

    Raises:
        ValueError: As for `find_files` and `read_rows`, or if the hub's data set does not have the given split.
        OSError: As for `find_files` and `read_rows`, or if the hub can't be reached or does not have the data set.
    """
    if is_hub_id(source):
        yield from _hub_rows(str(source), check_header)
        return
    for file in find_files(source):
        yield from read_rows(file, check_header)


def is_hub_id(source: str | Path) -> bool:
    """Whether a source names a data set of the hub, such as `owner/name:split`, rather than a file.

    Example:
        >>> is_hub_id("owner/name:train"), is_hub_id("data/reviews.csv"), is_hub_id("/data/all")
        (True, False, False)
    """
    path = Path(source)
    if path.exists() or path.suffix or str(source).startswith((".", "~")) or path.parent.is_dir():
        return False  # for example the name of a missing file in an existing folder
    return HUB_ID.fullmatch(str(source)) is not None


def find_files(source: str | Path) -> list[Path]:
    """Return sorted file paths: a single file, all data files below a folder, or all matches of a glob pattern.

    Raises:
        FileNotFoundError: If the path does not exist, or if no file matches the pattern.
        ValueError: If the path is empty or a pipe, if a folder contains no data file, or if the suffix of a file is not
            supported.
    """
    path = Path(source)
    if not str(source):
        raise ValueError("the name of the data is empty: pass the path of a file, a folder or a glob pattern.")
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if _is_data(file, path)]
        if not found:
            raise ValueError(f"the folder {path} contains no data: no file ends in {' or '.join(SUFFIXES)}.")
        return found
    if not path.exists():
        found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
        found = [file for file in found if file.is_file()]
        if not found:
            raise FileNotFoundError(f"there is no file {path}: pass an existing file, folder or glob pattern.")
        return [_supported(file) for file in found]
    if not _supported(path).is_file():
        raise ValueError(f"{path} is a pipe or device, which can't be read twice: write the rows to a file.")
    return [path]


def read_rows(path: Path, check_header: CheckHeader) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        path: A file with a suffix in `SUFFIXES`.
        check_header: Function `(columns, place)` that is called before the first row of a CSV or Parquet file.
            `columns` are the column names, and `place` is a string such as "reviews.csv, line 1".

    Raises:
        ValueError: If the file is damaged or not UTF-8, or if a row is too long.
        OSError: If the file can't be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "reviews.csv"
        >>> _ = path.write_text("text,label\\nA joy.,01\\n")
        >>> next(read_rows(path, lambda columns, place: None)).values
        {'text': 'A joy.', 'label': '01'}
    """
    suffix = _supported(path).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path, check_header)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as stream:
            yield from _csv_rows(path, stream, check_header) if suffix == ".csv" else _json_rows(path, stream)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _hub_rows(source: str, check_header: CheckHeader) -> Iterator[Row]:
    from datasets import ClassLabel, load_dataset

    name, _, split = source.partition(":")
    rows = load_dataset(name, split=split or "train")
    check_header(list(rows.column_names), f"{source}, row 1")
    names = {column: kind.names for column, kind in rows.features.items() if isinstance(kind, ClassLabel)}
    for number, row in enumerate(rows, start=1):
        named = {column: names[column][row[column]] for column in names if row[column] is not None}
        yield Row(f"{source}, row {number}", {**row, **named})


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and file.suffix.lower() in SUFFIXES


def _supported(path: Path) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} has the suffix {path.suffix!r}: use a file that ends in {' or '.join(SUFFIXES)}.")
    return path


def _lines(path: Path, stream: TextIO) -> Iterator[str]:
    for number, line in enumerate(iter(partial(stream.readline, MAX_ROW + 1), ""), start=1):
        if len(line) > MAX_ROW:
            raise ValueError(f"{path}, line {number} has more than {MAX_ROW:,} characters: split the line into rows.")
        if "\0" in line:
            raise ValueError(f"{path}, line {number} contains a NUL character: save the file as UTF-8 text.")
        yield line


def _csv_rows(path: Path, stream: TextIO, check_header: CheckHeader) -> Iterator[Row]:
    limit = csv.field_size_limit(MAX_ROW)
    reader = csv.DictReader(_lines(path, stream), strict=True)
    try:
        header = list(reader.fieldnames or ())
        if twice := sorted({name for name in header if name and header.count(name) > 1}):
            raise ValueError(f"{path}, line 1: the header has the column {twice[0]!r} twice: rename one of the two.")
        check_header(header, f"{path}, line 1")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(
                    f"{place}: the row has more fields than the header: put texts that contain commas in double quotes."
                )
            if short := [name for name, value in row.items() if value is None]:
                raise ValueError(f"{place}: {short[0]!r} is missing: write a field for each column of the header.")
            yield Row(place, row)
    except csv.Error as error:
        # line_num counts parsed lines only.
        raise ValueError(f"{path}, line {reader.line_num + 1}: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path, stream: TextIO) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, stream), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits raises a plain ValueError
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            hint = "; write one object per line, not an array" if line.lstrip().startswith("[") else ""
            hint = "; write an object in one line" if line.strip() == "{" else hint
            raise ValueError(f"{place} is not JSON: {what}{hint}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, got {line.strip()[:60]}.")
        yield Row(place, row)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the object has the key {twice!r} twice; remove one of the two")
    return row


def _parquet_rows(path: Path, check_header: CheckHeader) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            check_header(file.schema_arrow.names, f"{path}, row 1")
            for batch in file.iter_batches(batch_size=64):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        said = str(error).rstrip(".")
        raise ValueError(
            f"{path}, row {number + 1}: the file is not a complete Parquet file ({said}): write it again as Parquet."
        ) from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            for begin, (what, repair) in _FORMATS.items() if number == 1 else ():
                if line.startswith(begin):
                    return ValueError(f"{path}, line 1 is not UTF-8 but {what}: {repair}.")
            try:
                line.decode()
            except UnicodeDecodeError as found:
                return ValueError(f"{path}, line {number} is not UTF-8: {found}; save the file as UTF-8.")
    return ValueError(f"{path} is not UTF-8: {error}.")
