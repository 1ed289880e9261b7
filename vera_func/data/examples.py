"""Labelled examples: read from files or made from rated snippets, and split into training and held-out examples."""

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from .assets import Snippet

Rows = Iterator[tuple[int, dict[str, Any]]]  # number of the line, columns


class Example(NamedTuple):
    """A labelled text; `group` is its source document, never split across training and held-out examples."""

    text: str
    label: str
    group: str


def read_examples(path: str | Path) -> list[Example]:
    """Read examples from a JSON Lines or CSV file with the columns `text` and `label`.

    An optional column `group` names the source document of a text. Without it, texts are in the same group only if they
    are equal. Other columns and empty lines are ignored.

    Args:
        path: A `.csv`, `.jsonl` or `.ndjson` file.

    Raises:
        ValueError: If the suffix is not supported, a row is incomplete (the message names file and line), or there are
            fewer than two labels.
        OSError: If the file can't be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "reviews.csv"
        >>> _ = path.write_text("text,label\\nA joy.,positive\\nToo long.,negative\\n")
        >>> read_examples(path)[0]
        Example(text='A joy.', label='positive', group='A joy.')
    """
    path = Path(path)
    examples = [
        Example(_field(path, line, row, "text"), _field(path, line, row, "label").strip(), _group(row))
        for line, row in _read_rows(path, {"text", "label"})
    ]
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        raise ValueError(f"{path} must have at least two labels, but has {labels}.")
    return examples


def read_texts(path: str | Path) -> list[str]:
    """Read the column `text` of a JSON Lines or CSV file; other columns are ignored.

    Args:
        path: A `.csv`, `.jsonl` or `.ndjson` file.

    Raises:
        ValueError: If the suffix is not supported, or a text is missing or empty (the message names file and line).
        OSError: If the file can't be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "reviews.csv"
        >>> _ = path.write_text("id,text\\n7,A joy.\\n")
        >>> read_texts(path)
        ['A joy.']
    """
    path = Path(path)
    return [_field(path, line, row, "text") for line, row in _read_rows(path, {"text"})]


def polar_examples(snippets: "Iterable[Snippet]", threshold: float = 1.0) -> list[Example]:
    """Convert rated snippets to examples with the labels "positive" and "negative".

    Snippets whose rating is at most `threshold` in absolute value are omitted. Of several snippets with the same text,
    only the first is used.

    Example:
        >>> from vera_func.data.assets import Snippet
        >>> polar_examples([Snippet("7_1", 2.5, "A joy."), Snippet("7_2", -0.2, "It is a film.")])
        [Example(text='A joy.', label='positive', group='7')]
    """
    first: dict[str, Snippet] = {}
    for snippet in snippets:
        first.setdefault(snippet.text, snippet)
    return [
        Example(text, "positive" if rating > 0 else "negative", id.partition("_")[0])
        for id, rating, text in first.values()
        if abs(rating) > threshold
    ]


def split(examples: Sequence[Example], held_out: int, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples into shuffled training and held-out examples, without splitting a group.

    Args:
        examples: All examples.
        held_out: Minimum number of examples to hold out; whole groups are held out until it is reached.
        seed: Seed of the shuffles.

    Raises:
        ValueError: If no example is left for training, or none is held out.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    rng = random.Random(seed)
    names = list(groups)
    rng.shuffle(names)
    train: list[Example] = []
    test: list[Example] = []
    for name in names:
        (test if len(test) < held_out else train).extend(groups[name])
    if not train or not test:
        raise ValueError(
            f"{len(examples)} examples in {len(groups)} groups can't be split into at least {held_out} held-out "
            "examples and at least one training example."
        )
    rng.shuffle(train)
    return train, test


def _read_rows(path: Path, columns: set[str]) -> list[tuple[int, dict[str, Any]]]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    csv_rows = partial(_csv_rows, columns=columns)
    readers: dict[str, Callable[[Path], Rows]] = {".csv": csv_rows, ".jsonl": _json_rows, ".ndjson": _json_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: the suffix selects the file format; it must be {' or '.join(readers)}.")
    try:
        return list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from error


def _csv_rows(path: Path, columns: set[str]) -> Rows:
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            header = list(reader.fieldnames or ())
            if missing := columns - set(header):
                raise ValueError(
                    f"{path}, line 1: the header must have the columns {' and '.join(sorted(columns, reverse=True))}, "
                    f"got {header}, without {sorted(missing)}."
                )
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: the row has more fields than the header; quote texts that "
                        "contain commas with double quotes."
                    )
                yield reader.line_num, row
        except csv.Error as error:
            # line_num counts parsed lines only.
            raise ValueError(f"{path}, line {reader.line_num + 1}: {error}.") from error


def _json_rows(path: Path) -> Rows:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object, got {line.strip()[:60]}.")
            yield number, row


def _field(path: Path, line: int, row: dict[str, Any], name: str) -> str:
    """The value of a column, a non-empty string; a label may also be a JSON number or boolean."""
    value = row.get(name)
    if name == "label" and isinstance(value, bool | int | float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path}, line {line}: {name!r} must be a non-empty string, got {value!r}.")
    return value


def _group(row: dict[str, Any]) -> str:
    return str(row.get("group") or row["text"])
