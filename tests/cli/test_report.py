"""What is printed on a terminal, on a pipe, and by progress bars; what is said of a merge."""

import io
import re
import sys

import pytest
from rich.text import Text

import vera_func as vf
from vera_func.cli.report import bar, describe, format_table, make_table, merge_advice, show, show_error

from refused import Refused


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def shown(self):
        """What was written, without colours and styles."""
        return re.sub(r"\x1b\[[\d;]*m", "", self.getvalue())


@pytest.fixture
def terminal(monkeypatch):
    """Makes stdout and stderr a terminal of 40 columns, and returns what appears there."""

    def call():
        for name, value in (("COLUMNS", "40"), ("TERM", "xterm")):
            monkeypatch.setenv(name, value)
        streams = Terminal(), Terminal()
        monkeypatch.setattr("sys.stdout", streams[0])
        monkeypatch.setattr("sys.stderr", streams[1])
        return streams

    return call


LONG = "a text of many words that is longer than a line of a terminal with [red]brackets[/red] and :smile:"
ROWS = [{"text": LONG, "label": "good", "loss": 0.25}, {"text": "short", "label": "bad", "loss": 12}]


@pytest.mark.parametrize("colours", [{}, {"FORCE_COLOR": "1"}], ids=["", "forced"])
def test_a_pipe_gets_a_line_for_each_row(capsys, monkeypatch, colours):
    monkeypatch.setenv("COLUMNS", "40")
    for name, value in colours.items():
        monkeypatch.setenv(name, value)
    show(make_table(ROWS), Text(LONG), f"{LONG}\t|")
    header, first, second, *rest = capsys.readouterr().out.splitlines()
    width = len(LONG)
    assert header == f"{'text'.ljust(width)}  label  loss"
    assert first == f"{LONG}  good   0.25"
    assert second == f"{'short'.ljust(width)}  bad      12"
    assert rest == [LONG, f"{LONG}\t|"]
    assert "\n".join([header, first, second]) == format_table(ROWS)


def test_a_terminal_gets_what_fits(terminal):
    out, _ = terminal()
    path = f"/{'long' * 20}"  # in one piece, to be copied
    show(make_table(ROWS), *describe({"advice": LONG, "out": path}), f"vera-func inspect {path}")
    *lines, name, shown, command = out.shown().splitlines()
    assert max(map(len, lines)) <= 40
    table = " ".join(line[: lines[0].index("label")].strip() for line in lines[1:5])
    assert table.replace(" ", "").startswith(LONG.replace(" ", "")[:60])
    assert " ".join(" ".join(lines).split()).endswith(f"advice: {LONG}")
    assert (name.strip(), shown, command) == ("out:", path, f"vera-func inspect {path}")


def test_names_of_wide_tables_break_at_their_underscores(terminal):
    out, _ = terminal()
    show(make_table([{"a_long_name_of_a_column": 1, "another_long_name_of_a_column": 2}]), make_table([{"a_name": 1}]))
    words = out.shown().split()
    assert sorted(words[:-4]) == sorted(
        ["a", "long", "name", "of", "a", "column", "another", "long", "name", "of", "a", "column"]
    )
    assert words[-4:] == ["1", "2", "a_name", "1"]


def test_a_failure_is_printed_as_it_is(terminal):
    _, err = terminal()
    show_error(LONG)
    assert " ".join(err.shown().split()) == f"vera-func: {LONG}"


def test_bars_end_where_the_work_ends(terminal):
    _, err = terminal()
    assert list(bar("[b]reading", True)(range(3))) == [0, 1, 2]
    assert "[b]reading" in err.shown()
    assert "3/3 batch" in err.shown()
    streams = sys.stdout, sys.stderr

    def interrupted():
        for item in bar("reading", True)(iter(range(3))):
            if item == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert err.shown().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, and the bar is gone
    assert (sys.stdout, sys.stderr) == streams


def test_bars_on_a_pipe_are_a_line(capsys, monkeypatch):
    assert list(bar("reading", True, "step")(range(3))) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "3/3 step" in err
    monkeypatch.setattr("vera_func.train.distributed.rank", lambda: 1)
    assert bar("reading", True) is iter
    show("a line")
    assert capsys.readouterr() == ("", "")


# What is refused

bad = Refused()

bad(
    "merge_advice",
    "one report",
    lambda _: merge_advice(vf.MergeReport(1.0, 0.0, 1.0)),
    "got reports of type MergeReport, expected a dict",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
