"""Labelled texts: files of both formats, splits that keep groups together."""

import json

import pytest
from hypothesis import given, settings, strategies as st

from vera_func.data.assets import Snippet
from vera_func.data.examples import Example, polar_examples, read_examples, read_texts, split

from refused import Refused


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.ndjson", "a.CSV"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_csv_and_jsonl_hold_the_same(tmp_path, name, bom):
    rows = [("A joy, \u2028 it is.", "good"), ('He said "no".\nTwice.', "bad"), ("x", "good")]
    if name.lower().endswith("csv"):
        quoted = (f'"{text.replace(chr(34), chr(34) * 2)}",{label},9\r\n' for text, label in rows)
        content = "text,label,stars\r\n" + "".join(quoted)
    else:
        lines = (json.dumps({"label": label, "text": text, "stars": 9}) for text, label in rows)
        content = "\n\n".join(lines)
    read = read_examples(write(tmp_path, name, bom + content))
    assert read == [Example(text, label, text) for text, label in rows]


def test_labels_may_be_numbers_and_groups_are_read(tmp_path):
    path = write(
        tmp_path,
        "a.jsonl",
        '{"text": "a", "label": 1, "group": 7}\n{"text": "b", "label": false, "group": 7}',
    )
    assert read_examples(path) == [Example("a", "1", "7"), Example("b", "False", "7")]


BAD = {
    "no-label.csv": ("text,label\na,good\nb,\n", "line 3: 'label'"),
    "short-row.csv": ("text,label\na,good\nb\n", "line 3: 'label'"),
    "no-text.csv": ("text,label\n  ,good\n", "line 2: 'text'"),
    "header.csv": ("review,label\na,good\n", r"line 1: .*: add 'text'"),
    "empty.csv": (
        "",
        r"line 1: the header must have the columns text and label, got \[\]: add 'label' and 'text'",
    ),
    "commas.csv": ("text,label\na, b,good\n", "line 2: the row has more fields"),
    "quote.csv": ('text,label\n"a"b,good\n', "line 2: "),
    "latin.csv": (b"text,label\n\xe9,good\n", "not UTF-8"),
    "one.csv": ("text,label\na,good\nb,good\n", r"two labels, but has \['good'\]"),
    "none.jsonl": ("", r"two labels, but has \[\]"),
    "cut.jsonl": ('{"text": "a", "label": "b"}\n{"text": "a", "lab', "line 2 is not JSON"),
    "list.jsonl": ('["a", "b"]', "line 1: expected an object"),
    "null.jsonl": ('\n{"text": null, "label": "b"}', "line 2: 'text'"),
    "number.jsonl": ('{"text": 5, "label": "b"}', "line 1: 'text'.*got 5"),
    "missing.jsonl": ('{"text": "a"}', "line 1: 'label'.*got None"),
    "reviews.txt": ("a", r"suffix.*\.csv or \.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_name_file_and_line(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_examples(write(tmp_path, name, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.csv"):
        read_examples(tmp_path / "gone.csv")


def test_texts_need_no_labels(tmp_path):
    assert read_texts(write(tmp_path, "a.csv", "id,text\n1,A joy.\n2,Dull.\n")) == ["A joy.", "Dull."]
    assert read_texts(write(tmp_path, "a.jsonl", '{"text": "A joy.", "label": 3}\n')) == ["A joy."]
    for name, content, message in (
        ("a.csv", "id,label\n1,x\n", "must have the columns text, got .*: add 'text'"),
        ("a.csv", "text\nA joy.\n  \n", "line 3: 'text' must be a non-empty string"),
        ("a.jsonl", '{"text": 3}', "line 1: 'text' must be a non-empty string"),
    ):
        with pytest.raises(ValueError, match=message):
            read_texts(write(tmp_path, name, content))


def test_polar_examples():
    snippets = [
        Snippet("3_1", 1.0, "at the border"),
        Snippet("3_2", 1.1, "good"),
        Snippet("4", -3.0, "bad"),
        Snippet("5", -2.0, "good"),
    ]
    assert polar_examples(snippets) == [
        Example("good", "positive", "3"),
        Example("bad", "negative", "4"),
    ]
    assert len(polar_examples(snippets, threshold=2.5)) == 1


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.integers(0, 6), min_size=2, max_size=40),
    held_out=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_split_is_a_partition_that_keeps_groups_together(groups, held_out, seed):
    examples = [Example(f"text {i}", "a", str(group)) for i, group in enumerate(groups)]
    try:
        train, test = split(examples, held_out, seed=seed)
    except ValueError:
        assert held_out > len(examples) - max(map(groups.count, groups))
        return
    assert sorted(train + test) == sorted(examples)
    assert len(test) >= held_out
    assert not {e.group for e in train} & {e.group for e in test}
    assert (train, test) == split(examples, held_out, seed=seed)


def test_split_that_cannot_be():
    one_group = [Example(str(i), "a", "g") for i in range(5)]
    with pytest.raises(ValueError, match="5 examples in 1 groups"):
        split(one_group, 2, seed=0)
    with pytest.raises(ValueError, match="0 held-out"):
        split([*one_group, Example("x", "a", "h")], 0, seed=0)


# What is refused

bad = Refused()


for what, suffix, content, message in (
    ("binary", ".csv", b"\xff\xfe\x00", "is not UTF-8"),
    ("a cut line", ".jsonl", b'{"text": "a", "la', "line 1 is not JSON"),
    ("a deep line", ".jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ("one label", ".csv", b"text,label\na,b\n", "at least two labels"),
):

    def texts(folder, suffix=suffix, content=content):
        (folder / f"data{suffix}").write_bytes(content)
        return read_examples(folder / f"data{suffix}")

    bad("read_examples", what, texts, f"data{suffix}.*{message}")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
