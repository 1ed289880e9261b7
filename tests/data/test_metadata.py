"""The metadata files of adapters and banks."""

import pytest

from vera_func.data.metadata import (
    Metadata,
    join_metadata,
    metadata_file,
    read_metadata,
    split_metadata,
    write_metadata,
)

from refused import Refused


def test_metadata(tmp_path):
    folder, bank = tmp_path, tmp_path / "all.safetensors"
    assert metadata_file(folder) == folder / "vera_func.json"
    assert read_metadata(folder) == read_metadata(bank) == Metadata()
    for path in (folder, bank):
        write_metadata(path, Metadata("int8", ["a", "b"], "{text}: "))
        assert read_metadata(path) == Metadata("int8", ["a", "b"], "{text}: ")
    for damaged in ("{", "[]", '{"labels": "ab"}', '{"quant": 4}'):
        metadata_file(bank).write_text(damaged)
        with pytest.raises(ValueError, match=r"all\.json"):
            read_metadata(bank)


# What is refused


def test_labels_of_each_adapter():
    one, two = Metadata("nf4", ["a", "b"], "{text}:"), Metadata("nf4", ["c", "d", "e"], "{text}:")
    both = join_metadata([one, two, one])
    assert (both.labels, both.label_sets) == (None, [["a", "b"], ["c", "d", "e"], ["a", "b"]])
    assert [split_metadata(both, i) for i in range(3)] == [one, two, one]
    assert join_metadata([one, one]) == one
    assert join_metadata([one, one._replace(labels=None)]) is None
    assert join_metadata([one, two._replace(prompt="{text}?")]) is None
    with pytest.raises(ValueError, match="labels of 3 adapters, but not of adapter 3"):
        split_metadata(both, 3)


bad = Refused()

for what, text, message in (
    ("empty", "", "is not JSON"),
    ("a list", "[]", "must contain a JSON object, got list"),
    ("labels of numbers", '{"labels": [5]}', "labels must be a list of strings"),
    ("a list for a prompt", '{"prompt": ["a"]}', "prompt must be a string, got \\['a'\\]"),
    ("a number of data sets", '{"data": 5}', "data must be a list of strings, got 5"),
    ("a flag for a length", '{"max_length": true}', "max_length must be an integer, got True"),
    ("a flag for beta", '{"beta": [true]}', "beta must be a list of numbers"),
    ("a number for a side", '{"truncate_side": 7}', 'truncate_side must be "start" or "end", got 7'),
    ("a list for a reference", '{"reference": [1]}', "reference must be a string"),
    ("a list for a kind", '{"kind": ["text"]}', "kind must be one of"),
    ("label sets of numbers", '{"label_sets": [["a"], [5]]}', "label_sets must be a list of lists of strings"),
    ("a number of label sets", '{"label_sets": 2}', "label_sets must be a list of lists of strings"),
    ("deep", "[" * 100_000, "is not JSON"),
):

    def metadata(folder, text=text):
        (folder / "vera_func.json").write_text(text)
        return read_metadata(folder)

    bad("read_metadata", what, metadata, f"vera_func.json.*{message}")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
