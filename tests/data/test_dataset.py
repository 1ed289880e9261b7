"""Data sets of every kind and format: their rows as written, bad ones refused with their place, splits by groups."""

import gc
import json
import sys
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vera_func.data import files
from vera_func.data.dataset import open_dataset, peek_kind, split_rows
from vera_func.data.examples import read_examples
from vera_func.data.files import is_hub_id

from hostile import ASSISTANT, CHATS, GOOD, USER, hostile, jsonl


ODD = ["NA", "None", "null", "nan", "01", "1e5", "true", "2026-11-26", "2026-11-26T00:00:00Z", "  a\u2028b ", '"', "ä"]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    return hostile(tmp_path_factory.mktemp("hostile"))


def read(path):
    """As `train` does: labels by `read_examples`, anything else by `open_dataset`."""
    return read_examples(path) if peek_kind(path) == "label" else open_dataset(path)


def test_hostile_files_are_refused_with_file_and_row(bad_files):
    assert len(bad_files) >= 120
    for name, (path, place, said) in bad_files.items():
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read(path)
        message = str(error.value)
        assert place in message, (name, message)
        assert said in message, (name, message)
        assert Path(path).name.partition("*")[0] in message, (name, message)
        assert len(message) < 500, (name, message)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", GOOD)
def test_rows_are_as_written(tmp_path, kind, suffix):
    rows = [GOOD[kind] | {"id": 7}] + [dict.fromkeys(GOOD[kind], text) | {"id": 7} for text in ODD]
    if kind == "chat":
        rows = [{"messages": [USER, {"role": "assistant", "content": text}]} for text in ODD]
    if kind == "preference":
        rows = [row | {"rejected": "x" + row["rejected"]} for row in rows]
    if kind == "label":
        rows = [row | {"label": row["label"].strip()} for row in rows]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        if kind == "chat":
            return  # CSV has no lists
        quoted = (",".join('"' + str(v).replace('"', '""') + '"' for v in row.values()) for row in rows)
        path.write_text("\ufeff" + ",".join(rows[0]) + "\r\n" + "\r\n".join(quoted) + "\r\n", newline="")
    elif suffix == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert peek_kind(path) == kind
    if kind == "label":
        assert [(e.text, e.label) for e in read_examples(path)] == [(row["text"], row["label"]) for row in rows]
        return
    data = open_dataset(path)
    assert (data.source, data.kind, len(data.rows), len(data.groups)) == (str(path), kind, len(rows), len(rows))
    assert list(data.rows) == [{k: row[k] for k in GOOD[kind]} for row in rows]


def test_preferences_of_messages(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl([CHATS, CHATS]))
    assert list(open_dataset(path).rows) == [CHATS, CHATS]


def test_folders_and_globs_are_all_their_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jsonl", "sub/c.ndjson", "c.json", ".hidden/d.jsonl"):
        (tmp_path / name).write_text(jsonl([{"text": name}]))
    (tmp_path / "a.csv").write_text("text\na.csv\n")
    (tmp_path / "README.md").write_text("no data")
    assert open_dataset(tmp_path).rows["text"][:] == ["a.csv", "b.jsonl", "c.json", "sub/c.ndjson"]
    assert open_dataset(str(tmp_path / "[ab].*")).rows["text"][:] == ["a.csv", "b.jsonl"]


def test_rows_lie_in_a_file_that_goes_with_them(tmp_path, monkeypatch):
    """In memory there is one batch, whatever the size; nothing is left behind, not even by an error."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("vera_func.data.dataset.BATCH", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl([{"text": f"{i} " * 100} for i in range(500)]))
    data = open_dataset(path)
    (file,) = (Path(entry["filename"]) for entry in data.rows.cache_files)
    assert file.stat().st_size > 100_000
    assert data.rows.data.nbytes > 100_000
    assert [row["text"] for row in data.rows] == [f"{i} " * 100 for i in range(500)]
    del data
    gc.collect()
    path.write_text(jsonl([{"text": "a"}] * 1500 + [{"text": ""}]))
    with pytest.raises(ValueError, match="line 1501"):
        open_dataset(path)
    gc.collect()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_limit_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW", 100)
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'a' * 99}\n")
    assert len(open_dataset(path).rows) == 1
    path.write_text(f"text\na\n{'a' * 100}\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3 has more than 100 characters"):
        open_dataset(path)


def test_a_data_set_of_the_hub(monkeypatch):
    class ClassLabel:
        names = ("bad", "good")

    class Rows(list):
        column_names = ("text", "label")
        features = {"label": ClassLabel()}  # noqa: RUF012

    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return Rows([{"text": "a", "label": 1}, {"text": "b", "label": 0}])

    module = ModuleType("datasets")
    module.load_dataset, module.ClassLabel = load_dataset, ClassLabel
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [(e.text, e.label) for e in read_examples("owner/name:test")] == [("a", "good"), ("b", "bad")]
    assert peek_kind("owner/name") == "label"
    assert calls == [("owner/name", "test"), ("owner/name", "train")]


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "all").mkdir(parents=True)
    for source in ("data/all", "./data", "data/gone.csv", "/data/all", "data", "data/gone", "a/b/c", "a/*"):
        assert not is_hub_id(source)
    for source in ("owner/name", "owner/name:train[:10%]"):
        assert is_hub_id(source)


@settings(max_examples=50, deadline=None)
@given(groups=st.lists(st.integers(0, 6), min_size=2, max_size=40), held_out=st.integers(1, 20), seed=st.integers(0, 9))
def test_split_is_a_partition_that_keeps_groups_together(groups, held_out, seed):
    tensor = torch.tensor(groups)
    try:
        train, test = split_rows(tensor, held_out, seed=seed)
    except ValueError:
        assert held_out > len(groups) - max(map(groups.count, groups))
        return
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(groups)))
    assert held_out <= len(test) < held_out + max(map(groups.count, groups))
    assert not set(tensor[train].tolist()) & set(tensor[test].tolist())


def test_rows_with_a_prompt_in_common_are_a_group(tmp_path):
    path = tmp_path / "a.jsonl"
    pairs = [GOOD["preference"], GOOD["preference"] | {"rejected": "5"}, GOOD["preference"] | {"prompt": "2 + 2 ="}]
    path.write_text(jsonl(pairs))
    first, second, third = open_dataset(path).groups.tolist()
    assert first == second != third
    path.write_text(jsonl([{"messages": [USER, ASSISTANT]}, {"messages": [USER, CHATS["rejected"][0]]}]))
    first, second = open_dataset(path).groups.tolist()
    assert first == second
    path.write_text(jsonl([{"text": "a", "group": 1}, {"text": "b", "group": 1}, {"text": "b"}]))
    first, second, third = open_dataset(path).groups.tolist()
    assert first == second != third
