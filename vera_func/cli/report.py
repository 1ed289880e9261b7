"""What a command shows and writes: progress bars on stderr, tables on stdout or as CSV and JSON files."""

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..io.files import replacing
from ..merging.layer import MergeReport
from ..train.distributed import rank


Row = Mapping[str, Any]


def bar(title: str, progress: bool, unit: str = "batch") -> Callable[[Iterable[Any]], Iterable[Any]]:
    """What to wrap an iterable in: a progress bar, or nothing, as in all processes but the first.

    Example:
        >>> list(bar("reading", False)([1, 2]))
        [1, 2]
    """
    if not progress or rank() > 0:
        return iter
    from tqdm import tqdm

    return partial(tqdm, desc=title, unit=unit, leave=False)


def format_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as lines of text under a header, numbers to the right.

    Args:
        rows: One for each line.
        columns: Which to show; None is those of the first row.

    Example:
        >>> print(format_table([{"name": "a", "loss": 0.25}, {"name": "bc", "loss": 12}]))
        name  loss
        a     0.25
        bc      12
    """
    columns = list(rows[0] if rows else ()) if columns is None else columns
    cells = [[format_value(row.get(column)) for column in columns] for row in rows]
    numeric = [all(isinstance(row.get(column), int | float | None) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in [list(columns), *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def format_value(value: Any) -> str:
    """A value for a reader: four digits of a float, separators in a large integer, the start of a long list.

    Example:
        >>> format_value(1234567), format_value(0.123456), format_value(None), format_value(["q", "v"])
        ('1,234,567', '0.1235', '', 'q, v')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, list | tuple):
        return str(value).replace("\n", r"\n")
    return ", ".join(map(str, value[:8])) + (f", ... ({len(value):,})" if len(value) > 8 else "")


def describe(fields: Row, table: str | None = None) -> str:
    """Fields as lines `name: value`, without those that are None, and one of them as a table at the end.

    Example:
        >>> print(describe({"r": 8, "model": None, "modules": [{"modules": "q", "count": 2}]}, "modules"))
        r: 8
        modules  count
        q            2
    """
    lines = [f"{name}: {format_value(value)}" for name, value in fields.items() if name != table and value is not None]
    rows = fields.get(table) if table else None
    return "\n".join(lines + ([format_table(rows)] if rows else []))


def to_json(value: Any) -> str:
    """JSON that every parser takes: numbers that are not finite become null, and paths texts.

    Example:
        >>> to_json({"loss": float("nan")})
        '{\\n  "loss": null\\n}'
    """
    return json.dumps(_finite(value), indent=2, default=str, allow_nan=False)


def write_table(path: str | os.PathLike[str], rows: Sequence[Row]) -> Path:
    """Write rows as CSV or JSON, by the suffix; an old file is replaced as a whole.

    Raises:
        ValueError: If the suffix is another.

    Example:
        >>> import tempfile
        >>> path = write_table(Path(tempfile.mkdtemp()) / "table.csv", [{"name": "a", "loss": 0.25}])
        >>> path.read_text()
        'name,loss\\na,0.25\\n'
    """
    path = check_table_path(path)
    with replacing(path) as file, file.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix.lower() == ".json":
            stream.write(to_json([dict(row) for row in rows]))
        elif rows:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return path


def check_table_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a table can be written there: to be asked before the work that makes the table.

    Raises:
        ValueError: If the suffix is neither .csv nor .json.
        FileNotFoundError: If the folder is not there.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"{path}: the suffix says what to write; it must be .csv or .json.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to.")
    return path


def merge_advice(reports: Mapping[str, MergeReport]) -> str:
    """In a sentence or two, whether to merge.

    Args:
        reports: From `model_merge_report`.

    Raises:
        ValueError: If they are not by module.

    Example:
        >>> from vera_func import MergeReport
        >>> merge_advice({"q_proj": MergeReport(kept=0.02, error=1.07, size=0.01)})[:55]
        'Do not merge like this: 2 % of the update is kept on av'
    """
    if not isinstance(reports, Mapping):
        raise ValueError(f"reports must be those of model_merge_report, by module, got {type(reports).__name__}.")
    if not reports:
        return "There is nothing to merge: the adapter adds nothing to any layer."
    kept = sum(report.kept for report in reports.values()) / len(reports)
    error = sum(report.error for report in reports.values()) / len(reports)
    worst = min(reports, key=lambda name: reports[name].kept)
    share = f"{kept:.0%} of the update is kept on average (at worst {reports[worst].kept:.0%}, in {worst})".replace(
        "%", " %"
    )
    if error < 0.1:
        return f"Merging is safe: {share}, with an error of {error:.2g} times the update."
    if error < 0.5 and kept > 0.95:
        return (
            f"Merging keeps the update: {share}. Rounding adds noise of {error:.2f} times its size, spread over all "
            "weights, which the outputs hardly show as a rule: vera-func evaluate compares them."
        )
    if error < 0.5:
        return (
            f"Merging changes the adapter's effect: {share}, with an error of {error:.2f} times the update. Compare "
            "the outputs before you use it (vera-func evaluate)."
        )
    return (
        f"Do not merge like this: {share}, and the rounding adds an error of {error:.2f} times the update. Merge to a "
        "16-bit dtype, merge with calibration, or export a LoRA, which is exact."
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
