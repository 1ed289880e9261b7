"""What `--log` writes: TensorBoard's files where it is installed, else lines of JSON."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vera_func.cli.training import logs
from vera_func.cli.training.logs import step_logger

from hostile import jsonl


@pytest.fixture
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_lines_of_json(without_tensorboard, tmp_path):
    for start in (1, 3):  # a resumed run appends
        with step_logger(str(tmp_path / "a" / "b")) as log:
            log(start, {"loss": float("nan"), "learning_rate": 0.5})
            assert len(lines(tmp_path / "a" / "b" / "steps.jsonl")) == (start + 1) // 2  # at once
    assert lines(tmp_path / "a" / "b" / "steps.jsonl")[1] == {"step": 3, "loss": None, "learning_rate": 0.5}


def test_groups_of_adapters_have_folders_of_their_own(without_tensorboard, tmp_path):
    run = "out.training-0123456789012345"
    for name in (run, f"{run}-0", f"{run}-12"):
        with step_logger(str(tmp_path), tmp_path / name) as log:
            log(1, {"loss": 1.0})
    assert {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("*.jsonl")} == {
        ".",
        "group-0",
        "group-12",
    }


def test_tensorboard(tmp_path, monkeypatch):
    kept, closed = [], []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *_):
            closed.append(self.folder)

        def add_scalar(self, name, value, step):
            kept.append((name, value, step))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(logs, "find_spec", lambda name: name)
    with step_logger(str(tmp_path / "a")) as log:
        log(2, {"loss/0": 1.0, "loss/1": 3.0})
    assert kept == [("loss/0", 1.0, 2), ("loss/1", 3.0, 2)]
    assert closed == [str(tmp_path / "a")]
    assert not [*(tmp_path / "a").iterdir()]


def test_no_folder_no_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with step_logger(None) as log:
        assert log is None
    assert not [*tmp_path.iterdir()]


def test_the_command(without_tensorboard, run_json, folder, reviews, tmp_path):
    words = ("train", "--data", reviews, "--model", folder, "--r", 8, "--steps", 4, "--dtype", "float32")
    run_json(*words, "--eval-every", 2, "--out", tmp_path / "out", "--log", tmp_path / "log")
    rows = lines(tmp_path / "log" / "steps.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ["metric" in row for row in rows] == [False, True, False, True]
    assert rows[0]["learning_rate"] == 0.02
    assert all(row["loss"] > 0 for row in rows)


def test_several_adapters(without_tensorboard, run_json, folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(jsonl([{"text": f"the film was {name} {i % 7}"} for i in range(20)]))
    data = ("--data", tmp_path / "a.jsonl", "--data", tmp_path / "b.jsonl", "--batch-size", 4)
    words = ("train", *data, "--model", folder, "--r", 8, "--steps", 2, "--dtype", "float32")
    run_json(*words, "--out", tmp_path / "out", "--log", tmp_path / "log")
    rows = lines(tmp_path / "log" / "steps.jsonl")
    assert [{*row} for row in rows] == [{"step", "loss/0", "loss/1", "learning_rate/0", "learning_rate/1"}] * 2
