"""Pairs from made-up ratings, and the real rows, which are valid data sets of their kinds."""

import pytest

from vera_func.data.assets import Snippet
from vera_func.data.dataset import open_dataset, split_rows
from vera_func.data.samples import SAMPLES, pairs, write_rows


def snippet(i, rating, words):
    return Snippet(str(i), rating, " ".join([f"word{i}", *["more"] * (words - 1)]))


def test_pairs_use_each_sentence_once_and_sentences_of_the_same_rank_in_length():
    good = [snippet(i, 1.5 + i / 100, 6 + i) for i in range(10)]
    bad = [snippet(100 + i, -1.5 - i / 100, 6 + i // 2) for i in range(20)]
    rating = {one.text: one.rating for one in good + bad}
    rows = pairs([*good, *reversed(bad)], seed=0)
    chosen, rejected = ([row[name].removeprefix(" ") for row in rows] for name in ("chosen", "rejected"))
    assert len(rows) == len(set(chosen)) == len(set(rejected)) == len({row["group"] for row in rows}) == 10
    assert all(rating[a] - rating[b] >= 3 for a, b in zip(chosen, rejected, strict=True))
    assert all(len(a.split()) == len(b.split()) for a, b in zip(chosen, rejected, strict=True))
    assert rows == pairs([*good, *reversed(bad)], seed=0)
    assert sorted(map(str, rows)) == sorted(map(str, pairs([*good, *bad], seed=1))), "the seed is of the order only"


def test_sentences_that_are_undecided_short_long_or_repeated_are_left_out():
    good, bad = snippet(0, 3.0, 8), snippet(1, -3.0, 8)
    others = [snippet(2, 1.4, 8), snippet(3, -1.4, 8), snippet(4, 3.0, 5), snippet(5, 3.0, 21)]
    assert len(pairs([good, bad, *others, good._replace(id="6"), bad._replace(id="7")], seed=0)) == 1
    assert pairs([good], seed=0) == []


def test_rows_are_written_as_they_are(tmp_path):
    rows = [{"text": "a\nb \N{LEFT DOUBLE QUOTATION MARK}c", "group": "d"}]
    write_rows(rows, tmp_path / "rows.jsonl")
    assert open_dataset(tmp_path / "rows.jsonl").rows[0] == {"text": rows[0]["text"]}


@pytest.mark.network
@pytest.mark.parametrize(("kind", "count"), [("text", 1189), ("completion", 260), ("chat", 356), ("preference", 1828)])
def test_real_rows(tmp_path, kind, count):
    write_rows(SAMPLES[kind](), tmp_path / "rows.jsonl")
    data = open_dataset(tmp_path / "rows.jsonl")
    assert (data.kind, len(data.rows)) == (kind, count)
    train, test = split_rows(data.groups, 40, seed=0)
    assert len(test) >= 40
    assert not set(data.groups[train].tolist()) & set(data.groups[test].tolist())
