"""Sample data sets of each kind except labelled texts, for the notebooks and to try `vera-func train`:

    python -m vera_func.data.samples text verses.jsonl
    vera-func train --data verses.jsonl --out king-james

    `text`: chapters of the King James Bible; each of the 66 books is a group.
    `completion`: trivia questions with answers.
    `chat`: questions about programming and trivia, with answers.
    `preference`: sentences from movie reviews; the chosen sentence has a higher rating than the rejected sentence.

`assets` downloads and caches the files.
"""

import json
import random
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from .assets import KING_JAMES, QUESTIONS, Snippet, fetch, load_snippets


Rows = list[dict[str, Any]]
MIN_GAP = 3.0  # minimum difference between the ratings, from -4 to 4, of a chosen and a rejected sentence
WORDS = (6, 20)  # minimum and maximum number of words in a sentence


def chapters() -> Rows:
    """The 1,189 chapters of the King James Bible, as rows with `text` and `group` (the name of the book)."""
    with (fetch(KING_JAMES) / "kjv.jsonl").open(encoding="utf-8") as lines:
        verses = [json.loads(line) for line in lines]
    found = groupby(verses, key=lambda verse: (verse["book"], verse["chapter"]))
    return [{"text": "\n".join(verse["text"] for verse in some), "group": book} for (book, _), some in found]


def trivia() -> Rows:
    """About 260 questions with short answers, as rows with `prompt` and `completion`."""
    return [
        {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
        for question, answer in _questions("trivia")
    ]


def chats() -> Rows:
    """About 100 questions on programming and the questions of `trivia`, with answers, as rows with `messages`."""
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for topic in ("coding", "trivia")
        for question, answer in _questions(topic)
    ]


def movie_pairs() -> Rows:
    """About 1,800 pairs of sentences from movie reviews, as preferences; see `pairs`."""
    return pairs(load_snippets("movie"), seed=0)


def pairs(snippets: Iterable[Snippet], *, seed: int) -> Rows:
    """Pair sentences of similar length whose ratings (from -4 to 4) differ by at least 3.

    Each sentence is in at most one pair. All prompts are equal, so without a `group`, all rows would form a single
    group. Therefore each row has a different `group`.

    Args:
        snippets: Rated sentences. Of several snippets with equal texts, only the first is used.
        seed: Seed of the order of the pairs.

    Example:
        >>> rated = [Snippet("1", 3.1, "A joy for anyone who likes the sea.")]
        >>> rated += [Snippet("2", -1.5, "It has neither a plot nor good actors.")]
        >>> pairs(rated, seed=0)[0]["rejected"]
        ' It has neither a plot nor good actors.'
    """
    first: dict[str, Snippet] = {}
    for snippet in snippets:
        if WORDS[0] <= len(snippet.text.split()) <= WORDS[1]:
            first.setdefault(snippet.text, snippet)
    ordered = sorted(first.values(), key=lambda one: (len(one.text), one.text))
    good = [one for one in ordered if one.rating >= MIN_GAP / 2]
    bad = [one for one in ordered if one.rating <= -MIN_GAP / 2]
    # The longer list is sampled at even intervals, so that long sentences are paired with long sentences.
    count = min(len(good), len(bad))
    good, bad = ([side[i * len(side) // count] for i in range(count)] for side in (good, bad))
    rows = [
        {"prompt": "Review:", "chosen": f" {a.text}", "rejected": f" {b.text}", "group": f"{a.id}, {b.id}"}
        for a, b in zip(good, bad, strict=True)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def write_rows(rows: Rows, path: str | Path) -> None:
    """Write rows to a JSON Lines file."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


SAMPLES: dict[str, Callable[[], Rows]] = {
    "text": chapters,
    "completion": trivia,
    "chat": chats,
    "preference": movie_pairs,
}


def _questions(topic: str) -> Iterable[tuple[str, str]]:
    """Questions and answers; repeated questions are omitted."""
    import yaml

    with (fetch(QUESTIONS) / f"{topic}.yml").open(encoding="utf-8") as file:
        found = [[said.strip() for said in one] for one in yaml.safe_load(file)["conversations"] if len(one) == 2]
    first: dict[str, str] = {}
    for question, answer in found:
        first.setdefault(question, answer)
    return first.items()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SAMPLES:
        sys.exit(f"usage: python -m vera_func.data.samples {{{','.join(SAMPLES)}}} FILE.jsonl")
    write_rows(SAMPLES[sys.argv[1]](), sys.argv[2])
