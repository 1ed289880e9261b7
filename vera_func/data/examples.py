"""Read labelled examples from files or from rated snippets, and split examples for training and evaluation."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .assets import Snippet, load_snippets
from .files import Row, source_rows
from .kinds import check_row, text


HELD_OUT = 1000  # examples or rows that the demo and `vera-func train` hold out at most


class Example(NamedTuple):
    """A labelled text; `group` is its source document, never split across training and held-out examples."""

    text: str
    label: str
    group: str


def read_examples(path: str | Path) -> list[Example]:
    """Read examples from files with the columns `text` and `label`.

    An optional column `group` names the source document of a text. Without the column `group`, only equal texts form a
    group. Other columns and empty lines are ignored.

    Args:
        path: A CSV, JSON Lines or Parquet file, or a folder or glob pattern of such files; see `find_files`.

    Raises:
        ValueError: If the suffix of a file is not supported, if a row is incomplete, or if there are fewer than two
            labels. If some labels are numbers and other labels are strings. The message names the file and the line of
            an invalid row.
        OSError: If the file can't be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "reviews.csv"
        >>> _ = path.write_text("text,label\\nA joy.,positive\\nToo long.,negative\\n")
        >>> read_examples(path)[0]
        Example(text='A joy.', label='positive', group='A joy.')
    """
    examples, numeric = [], None
    for place, row in _rows(path, ("text", "label")):
        try:
            fields = check_row("label", row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if isinstance(row["label"], str) is numeric:
            kind = "numbers" if numeric else "strings"
            raise ValueError(
                f"{place}: 'label' is {row['label']!r}, but the previous labels are {kind}: use one type in all rows."
            )
        numeric = not isinstance(row["label"], str)
        examples.append(Example(**fields, group=str(row.get("group") or fields["text"])))
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        raise ValueError(f"{path} must have at least two labels, but has {labels}: add examples of another label.")
    return examples


def read_texts(path: str | Path) -> list[str]:
    """Read the column `text` of files; other columns are ignored.

    Args:
        path: A CSV, JSON Lines or Parquet file, or a folder or glob pattern of such files.

    Raises:
        ValueError: If the suffix of a file is not supported, or if a text is missing or empty.
        OSError: If the file can't be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "reviews.csv"
        >>> _ = path.write_text("id,text\\n7,A joy.\\n")
        >>> read_texts(path)
        ['A joy.']
    """
    texts = []
    for place, row in _rows(path, ("text",)):
        try:
            texts.append(text("text", row.get("text")))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return texts


def polar_examples(snippets: Iterable[Snippet], threshold: float = 1.0) -> list[Example]:
    """Convert rated snippets to examples with the labels "positive" and "negative".

    A snippet is omitted if its rating is at most `threshold` in absolute value, or if an earlier snippet has the same
    text.

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
    """Return the training examples and the held-out examples, in random order and without splitting a group.

    Args:
        examples: All examples.
        held_out: Minimum number of held-out examples. Whole groups are held out until there are at least `held_out`
            examples.
        seed: Seed of the shuffles.

    Raises:
        ValueError: If no example is left for training, or if no example is held out.
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
            "examples and at least one training example, because a group is never split: add examples of other groups."
        )
    rng.shuffle(train)
    return train, test


def demo_examples() -> list[Example]:
    """The demo's data: snippets of movie reviews that are clearly positive or negative."""
    return polar_examples(load_snippets("movie"))


def num_held_out(count: int, most: int = HELD_OUT) -> int:
    """The number of examples to hold out, given their total `count`: a fifth, but no more than `most`.

    Example:
        >>> num_held_out(12), num_held_out(9000)
        (3, 1000)
    """
    return min(most, -(-count // 5))


def split_examples(
    examples: Sequence[Example], most: int = HELD_OUT, *, seed: int, source: str | Path | None = None
) -> tuple[list[Example], list[Example]]:
    """Split examples with `split`, and hold out `num_held_out` examples.

    Raises:
        ValueError: As for `split`; the message begins with `source`.
    """
    try:
        return split(examples, num_held_out(len(examples), most), seed=seed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None


def _rows(source: str | Path, columns: Sequence[str]) -> Iterator[Row]:
    def check_header(header: list[str], place: str) -> None:
        if missing := sorted(set(columns) - set(header)):
            raise ValueError(
                f"{place}: the header must have the columns {' and '.join(columns)}, got {header}: add "
                f"{' and '.join(map(repr, missing))}."
            )

    return source_rows(source, check_header)
