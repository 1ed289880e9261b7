"""Output of the commands: text and tables on stdout, progress bars and errors on stderr, tables in files."""

import csv
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import StringIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


if TYPE_CHECKING:
    from ..merging.report import MergeReport

Row = Mapping[str, Any]
WIDE = 1_000_000  # console width that disables wrapping

COLUMNS = Text(
    "kept: retained fraction of the update ΔW (kept_least: in the worst layer); error: norm of the deviation from the "
    "exact merge W + ΔW, divided by the norm of ΔW; size: norm of ΔW, divided by the norm of W."
)


def show(*things: str | Text | Table) -> None:
    """Print text and tables on stdout, on rank 0 only.

    On a terminal, `Text` and tables are wrapped to the width of the terminal; `str` is not wrapped.
    """
    from ..train.distributed import rank

    if rank() == 0:
        for thing in things:
            _print(thing, sys.stdout)


def show_result(result: Any, json: bool, *things: str | Text | Table) -> None:
    """Print `result` as JSON if `json` is True; otherwise print `things`, which describe the result."""
    show(*([to_json(result)] if json else things))


def show_rows(rows: Sequence[Row], out: str | None, json: bool) -> None:
    """Print rows as JSON or as a table. If `out` is given, the table is written to this file and not printed."""
    from ..train.distributed import rank

    if out and rank() == 0:
        write_table(out, rows)
    show_result(rows, json, f"{len(rows)} rows written to {out}" if out else make_table(rows))


def show_error(message: str) -> None:
    """Print an error message on stderr; the message is wrapped only on a terminal."""
    _print(Text.assemble(("vera-func: ", "bold red"), message), sys.stderr)


def bar(title: str, progress: bool, unit: str = "batch") -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Return a wrapper of iterables that shows a progress bar on stderr.

    If `progress` is False or the rank is above 0, the wrapper is the builtin `iter`, which shows no bar. If stderr is
    not a terminal, only the finished bar is printed, as one line.

    Example:
        >>> list(bar("reading", False)([1, 2]))
        [1, 2]
    """
    from ..train.distributed import rank

    return partial(_track, title, unit) if progress and rank() == 0 else iter


def _track(title: str, unit: str, items: Iterable[Any]) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(elapsed_when_finished=True), console=console, transient=console.is_terminal
    ) as shown:
        yield from shown.track(items, description=Text(title).markup)


def adapters_title(start: int, names: Sequence[str], of: Sequence[str]) -> str:
    """The title of the progress bar for the adapters `names`, where `start` is the index of `names[0]` in `of`.

    Example:
        >>> adapters_title(2, ["c", "d"], "abcde")
        'adapters 3-4 of 5'
    """
    return f"adapters {start + 1}-{start + len(names)} of {len(of)}"


@contextmanager
def training_bar(done: int, steps: int, progress: bool) -> Iterator[Callable[[Any, Any], None]]:
    """Show a progress bar of training on stderr, with the loss, tokens per second and the remaining time.

    Yield a function of the micro-batches and losses of a step, to be called after each step. Losses on an accelerator
    are read only every `SYNC_EVERY` steps, because each read waits for the accelerator. If `progress` is False or
    the rank is above 0, no bar is shown.
    """
    from ..train.distributed import rank
    from ..train.fit import SYNC_EVERY

    if not progress or rank():
        yield lambda micro, losses: None
        return
    console = Console(stderr=True)
    words = "loss {task.fields[loss]}, {task.fields[speed]} tokens/s"
    columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn(f"step, {words}"))
    time_left = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, time_left, console=console, transient=console.is_terminal) as shown:
        task = shown.add_task("train", total=steps, completed=done, loss="", speed="")
        tokens, start, step = 0, time.perf_counter(), done

        def show(micro: Sequence[Mapping[str, Any]], losses: Any) -> None:
            nonlocal tokens, step
            step += 1
            tokens += sum(batch["input_ids"].numel() for batch in micro)
            fields: dict[str, Any] = {"speed": f"{tokens / (time.perf_counter() - start):,.0f}"}
            if losses.device.type == "cpu" or step % SYNC_EVERY == 0 or step == steps:
                training = losses[losses > 0]  # adapters that have finished have the loss 0
                fields["loss"] = f"{training.mean().item():.4f}" if training.numel() else "0"
            shown.update(task, advance=1, **fields)

        yield show


def make_table(rows: Sequence[Row]) -> Table:
    """Convert rows to a table for `show`, with numbers right-aligned. The columns are the keys of the first row."""
    table = Table(box=None, pad_edge=False)
    columns = list(rows[0] if rows else ())
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_value(row.get(column))) for column in columns))
    return table


def format_table(rows: Sequence[Row]) -> str:
    """Format rows as a plain-text table, with one line per row.

    Example:
        >>> print(format_table([{"name": "a", "loss": 0.25}, {"name": "bc", "loss": 12}]))
        name  loss
        a     0.25
        bc      12
    """
    return _plain(make_table(rows))


def format_value(value: Any) -> str:
    """Format a value: floats with four digits, integers with thousands separators, long lists abbreviated.

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


def describe(fields: Row, table: str | None = None) -> list[Text | Table]:
    """Format each field as a line `name: value`, unless its value is None. The field named `table` becomes a table.

    Example:
        >>> show(*describe({"r": 8, "model": None, "modules": [{"modules": "q", "count": 2}]}, "modules"))
        r: 8
        modules  count
        q            2
    """
    shown = {name: value for name, value in fields.items() if name != table and value is not None}
    rows = fields.get(table) if table else None
    return [
        *(Text(f"{name}: {format_value(value)}") for name, value in shown.items()),
        *([make_table(rows)] if rows else []),
    ]


def to_json(value: Any) -> str:
    """Convert a value to strict JSON: NaN and inf become null, and paths become strings.

    Example:
        >>> to_json({"loss": float("nan")})
        '{\\n  "loss": null\\n}'
    """
    return json.dumps(_finite(value), indent=2, default=str, allow_nan=False)


def write_table(path: str | os.PathLike[str], rows: Sequence[Row]) -> Path:
    """Write rows to a file as CSV or JSON, depending on the suffix of the path; the write is atomic.

    Raises:
        ValueError: If the suffix is neither .csv nor .json.

    Example:
        >>> import tempfile
        >>> path = write_table(Path(tempfile.mkdtemp()) / "table.csv", [{"name": "a", "loss": 0.25}])
        >>> path.read_text()
        'name,loss\\na,0.25\\n'
    """
    from ..io.files import replacing

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
    """Check the suffix and the folder of a path for `write_table`, and return the path.

    Raises:
        ValueError: If the suffix is neither .csv nor .json.
        FileNotFoundError: If the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"the suffix of {path} must be .csv or .json: rename the file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to: create the folder first.")
    return path


def merge_advice(reports: Mapping[str, "MergeReport"]) -> str:
    """Recommend whether to merge, in one or two sentences.

    Args:
        reports: From `model_merge_report`.

    Raises:
        ValueError: If `reports` is not a mapping.

    Example:
        >>> from vera_func import MergeReport
        >>> merge_advice({"q_proj": MergeReport(kept=0.02, error=1.07, size=0.01)})[:55]
        'Do not merge like this: 2 % of the update is retained o'
    """
    if not isinstance(reports, Mapping):
        raise ValueError(
            f"got reports of type {type(reports).__name__}, expected a dict: pass the result of model_merge_report."
        )
    if not reports:
        return "Nothing to merge: the update is zero in every layer."
    kept = sum(report.kept for report in reports.values()) / len(reports)
    error = sum(report.error for report in reports.values()) / len(reports)
    worst = min(reports, key=lambda name: reports[name].kept)
    share = f"{percent(kept)} of the update is retained on average ({percent(reports[worst].kept)} in {worst})"
    if error < 0.1:
        return f"Merging is safe: {share}, with an error of {error:.2g} times the update's norm."
    if error < 0.5 and kept > 0.95:
        return (
            f"Merging keeps the update: {share}. Rounding adds noise of {error:.2f} times the update's norm, spread "
            "over all weights, which rarely changes the outputs: check with vera-func evaluate."
        )
    if error < 0.5:
        return (
            f"Merging changes the adapter's effect: {share}, with an error of {error:.2f} times the update's norm. "
            "Compare the outputs with vera-func evaluate before using the merged model."
        )
    return (
        f"Do not merge like this: {share}, with an error of {error:.2f} times the update's norm. Merge into a 16-bit "
        "dtype, calibrate the merge, or export a LoRA, which is exact."
    )


def percent(value: float, digits: int = 0) -> str:
    """Format a fraction as a percentage.

    Example:
        >>> percent(0.905), percent(0.0234, 1)
        ('90 %', '2.3 %')
    """
    return f"{value:.{digits}%}".replace("%", " %")


def _print(thing: str | Text | Table, stream: TextIO) -> None:
    if isinstance(thing, str):
        print(thing, file=stream, flush=True)
    elif stream.isatty():
        console = Console(file=stream)
        if isinstance(thing, Text):
            # Rich would break long words such as paths, which then could not be copied.
            filled = fill(thing.plain, console.width, break_long_words=False, break_on_hyphens=False)
            thing = Text(filled, spans=thing.spans)
        elif console.measure(thing, options=console.options.update(width=WIDE)).maximum > console.width:
            for column in thing.columns:
                column.header = Text(str(column.header).replace("_", " "))  # so that long headers can wrap
        console.print(thing, soft_wrap=isinstance(thing, Text))
    else:
        print(_plain(thing), file=stream, flush=True)


def _plain(thing: Text | Table) -> str:
    if isinstance(thing, Text):
        return thing.plain
    console = Console(file=StringIO(), width=WIDE, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(thing)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
