"""Prompts and batches: answers, padding, order, the loss over the answers, and scores."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from vera_func.data.examples import Example
from vera_func.data.prompts import (
    Encoded,
    answer_ids,
    answer_loss,
    collate,
    encode,
    score,
    train_batches,
)


class Words:
    """A tokenizer that splits at spaces and line ends; `begin` and `end` are special tokens."""

    def __init__(self, begin=(), end=(), digits=False):
        self.begin, self.end, self.digits = list(begin), list(end), digits
        self.vocabulary = {}

    def ids(self, text, add_special_tokens):
        words = text.replace("\n", " \n ").replace(":", " : ").split(" ")
        words = [word for word in words if word]
        if self.digits:
            words = [part for word in words for part in (word if word.isdigit() else [word])]
        ids = [self.vocabulary.setdefault(word, 10 + len(self.vocabulary)) for word in words]
        return self.begin + ids + self.end if add_special_tokens else ids

    def __call__(self, text, add_special_tokens=True):
        one = isinstance(text, str)
        ids = [self.ids(t, add_special_tokens) for t in ([text] if one else text)]
        return SimpleNamespace(input_ids=ids[0] if one else ids)

    def decode(self, ids):
        back = {id: word for word, id in self.vocabulary.items()}
        return " ".join(back.get(id, "*") for id in ids)


@pytest.mark.parametrize("special", [{}, {"begin": [1]}, {"begin": [1], "end": [2]}])
def test_answer_ids_are_first_tokens(special):
    tokenizer = Words(**special)
    ids = answer_ids(tokenizer, ["very good", "bad", "so so"])
    assert tokenizer.decode(ids.tolist()) == "very bad so"


def test_answers_that_begin_alike_are_refused():
    with pytest.raises(ValueError, match=r"\['very good', 'very bad'\].*Rename"):
        answer_ids(Words(), ["very good", "neutral", "very bad"])


@pytest.mark.parametrize("special", [{}, {"begin": [1]}])
def test_encode_cuts_the_text_and_not_the_prompt(special):
    tokenizer = Words(**special)
    examples = [Example(" a b ", "bad", ""), Example("a b c d e f g h", "good", "")]
    short, long = encode(tokenizer, examples, ("bad", "good"), max_tokens=9)
    assert tokenizer.decode(short.ids).removeprefix("* ") == "Review : a b \n Sentiment :"
    assert len(long.ids) == 9
    kept = "a b c" if special else "a b c d"
    assert tokenizer.decode(long.ids).removeprefix("* ") == f"Review : {kept} \n Sentiment :"
    assert (short.label, long.label) == (0, 1)


def test_collate_pads_on_the_left():
    batch = collate([Encoded([5, 6, 7], 1), Encoded([8], 0)], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [3, 3, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch["label"].tolist() == [1, 0]


def rows(n, seed=0):
    rng = random.Random(seed)
    return [Encoded([i] * rng.randint(1, 30), i % 2) for i in range(n)]


def test_train_batches_are_epochs_and_functions_of_the_step():
    data = rows(37)
    batches = train_batches(data, 5, seed=1, window=3)

    def names(step):
        return batches(step)["input_ids"][:, -1].tolist()

    epochs = [[name for step in range(7) for name in names(step + start)] for start in (0, 7)]
    assert [len(set(epoch)) for epoch in epochs] == [35, 35]
    assert epochs[0] != epochs[1]
    assert names(3) == train_batches(data, 5, seed=1, window=3)(3)["input_ids"][:, -1].tolist()
    assert names(3) != train_batches(data, 5, seed=2, window=3)(3)["input_ids"][:, -1].tolist()


def test_train_batches_have_rows_of_like_length():
    data = rows(320)
    tokens = [
        sum(batches(step)["input_ids"].numel() for step in range(20))
        for batches in (train_batches(data, 16, seed=0, window=w) for w in (1, 16))
    ]
    assert tokens[1] < 0.75 * tokens[0]


def test_too_few_examples_for_a_batch():
    with pytest.raises(ValueError, match=r"3 training examples.*batch of 4"):
        train_batches(rows(3), 4, seed=0)


def test_answer_loss_is_the_cross_entropy_over_the_answers():
    logits = torch.randn(7, 11, dtype=torch.float64)
    answers, label = torch.tensor([3, 9, 4]), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    p = logits.exp()
    expected = -(p[range(7), answers[label]] / p[:, answers].sum(1)).log().mean()
    assert_close(answer_loss(logits[:, answers], label), expected.float())


def test_answer_loss_composes():
    logits, label = torch.randn(4, 5, 3), torch.randint(3, (4, 5))
    together = torch.func.vmap(torch.func.grad(answer_loss))(logits, label)
    for i in range(4):
        assert_close(together[i], torch.func.grad(answer_loss)(logits[i], label[i]))


def odd_or_even(batch):
    """Logits for label 0 where a text has an odd length, for label 1 where it is even."""
    odd = batch["attention_mask"].sum(1) % 2
    return torch.stack([odd, 1 - odd], 1).float()


def test_score_counts_every_row_once():
    data = [Encoded([1] * n, int(n < 10)) for n in range(1, 24)]
    expected = sum(1 - len(row.ids) % 2 == row.label for row in data) / len(data)
    seen = []
    got = score(odd_or_even, data, batch_size=4, progress=lambda steps: seen.append(len(steps)) or steps)
    assert got.accuracy.item() == pytest.approx(expected)
    assert seen == [6]


def test_score_of_many_is_that_of_each():
    data = [Encoded([1] * n, n % 3) for n in range(1, 20)]
    table = torch.randn(4, 20, 3)

    def logits(batch, which=slice(None)):
        return table[which, batch["attention_mask"].sum(1)]

    many = score(logits, data, batch_size=5)
    for i in range(4):
        alone = score(lambda batch, i=i: logits(batch, i), data, batch_size=7)
        assert_close(many.accuracy[i], alone.accuracy)
        assert_close(many.loss[i], alone.loss)
        everything = torch.tensor([row.label for row in data])
        expected = answer_loss(table[i, 1:20], everything)
        assert_close(many.loss[i].float(), expected)
