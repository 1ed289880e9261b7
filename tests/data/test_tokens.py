"""Tokenized rows: what is a target, what is cut off, and which documents share a row."""

import gc
import json

import pytest
import torch

from vera_func.data.dataset import open_dataset
from vera_func.data.tokens import Tokens, chat_prompt, prompt_tokens, tokenize
from vera_func.train.losses import IGNORED

from hostile import jsonl


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Words and characters as tokens: "joyful" is " joy" and "ful", but "joy" alone another token at the end."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[EOS]", "[UNK]", "<user>", "<assistant>", "<end>", *"abcdefgh", "ab", "abc"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def rows(tmp_path, tokenizer):
    def call(*rows, max_length=20, side="end", **changes):
        path = tmp_path / "rows.jsonl"
        path.write_text(jsonl(rows))
        return tokenize(open_dataset(path), tokenizer, max_length=max_length, side=side, **changes)

    return call


def words(tokenizer, tokens):
    """The tokens, with targets in capitals."""
    texts = tokenizer.convert_ids_to_tokens(tokens.ids)
    pairs = zip(texts, tokens.ids, tokens.labels, strict=True)
    assert all(label in (IGNORED, id) for _, id, label in pairs)
    pairs = zip(texts, tokens.labels, strict=True)
    return " ".join(text if label == IGNORED else text.upper() for text, label in pairs)


def test_texts_end_with_the_end_token(rows, tokenizer):
    found = rows({"text": "a b c"}, {"text": "d"})
    assert [words(tokenizer, found.row(i)[0]) for i in range(2)] == ["A B C [EOS]", "D [EOS]"]
    assert found.lengths().tolist() == [4, 2]
    assert [found.num_targets(i) for i in range(2)] == [3, 1]  # nothing predicts the first token


def test_long_texts_are_split_and_keep_their_group(rows, tokenizer):
    found = rows({"text": "a b c d e f g"}, {"text": "h"}, max_length=3)
    assert [words(tokenizer, found.row(i)[0]) for i in range(4)] == ["A B C", "D E F", "G [EOS]", "H [EOS]"]
    first, *others, last = found.groups.tolist()
    assert others == [first] * 2
    assert last != first


def test_completions(rows, tokenizer):
    found = rows({"prompt": "a b ", "completion": "c d"}, {"prompt": "a ", "completion": "ab"})
    assert [words(tokenizer, found.row(i)[0]) for i in range(2)] == ["a b C D [EOS]", "a AB [EOS]"]


def test_a_token_that_straddles_the_end_of_the_prompt_is_a_target(rows, tokenizer):
    found = rows({"prompt": "d a", "completion": "b e"})
    assert words(tokenizer, found.row(0)[0]) == "d AB E [EOS]"
    assert prompt_tokens([5, 6], [5, 6, 7]) == Tokens([5, 6], [IGNORED, IGNORED])


def test_preferences_have_two_sequences(rows, tokenizer):
    found = rows({"prompt": "a b ", "chosen": "c", "rejected": "d e"}, {"prompt": "f ", "chosen": "g", "rejected": "h"})
    texts = [[words(tokenizer, one) for one in found.row(i)] for i in range(2)]
    assert texts == [["a b C [EOS]", "a b D E [EOS]"], ["f G [EOS]", "f H [EOS]"]]
    assert found.lengths().tolist() == [5, 3]
    assert len(found.groups) == 2


def test_chats(rows, tokenizer):
    user, other = {"role": "user", "content": "a b"}, {"role": "user", "content": "e"}
    answer, last = {"role": "assistant", "content": "c d"}, {"role": "assistant", "content": "f"}
    found = rows({"messages": [user, answer, other, last]})
    said = "<user> a b <end> <assistant> C D <END> <user> e <end> <assistant> F <END>"
    assert words(tokenizer, found.row(0)[0]) == said
    pair = rows({"prompt": [user, answer, other], "chosen": [last], "rejected": [answer]})
    before = "<user> a b <end> <assistant> c d <end> <user> e <end> <assistant>"
    assert [words(tokenizer, one) for one in pair.row(0)] == [f"{before} F <END>", f"{before} C D <END>"]
    one = rows({"prompt": [user], "completion": [answer]})
    assert words(tokenizer, one.row(0)[0]) == "<user> a b <end> <assistant> C D <END>"
    assert tokenizer.decode(chat_prompt(tokenizer, "a b")) == "<user> a b <end> <assistant>"


def test_which_end_is_cut_off(rows, tokenizer):
    row = {"prompt": "a b c d ", "completion": "e f"}
    assert words(tokenizer, rows(row, max_length=5).row(0)[0]) == "a b c d E"
    assert words(tokenizer, rows(row, max_length=5, side="start").row(0)[0]) == "c d E F [EOS]"
    short = {"prompt": "a ", "completion": "b"}
    kept = rows(row, short, max_length=3)
    assert (kept.omitted, words(tokenizer, kept.row(0)[0])) == (1, "a B [EOS]")
    assert len(kept.groups) == 1
    with pytest.raises(ValueError, match=r"rows\.jsonl: no row has a target .* to 3 tokens.*--truncate-side start"):
        rows(row, max_length=3)
    # Of a pair, both answers have to be left.
    pair = {"prompt": "a b ", "chosen": "c", "rejected": "d"}
    assert rows(pair, pair, max_length=3).omitted == 0


def test_packing(rows, tokenizer):
    found = rows(*({"text": text} for text in ("a b c", "d", "e f", "g h a b")), max_length=6)
    packed = found.pack(torch.tensor([0, 1, 3]), 6)
    assert packed.lengths().tolist() == [6, 5]
    assert [[words(tokenizer, one) for one in packed.row(i)] for i in range(2)] == [
        ["A B C [EOS]", "D [EOS]"],
        ["G H A B [EOS]"],
    ]
    assert [packed.num_targets(i) for i in range(2)] == [4, 4]


def test_many_rows_are_flushed_to_a_file(rows, tokenizer, monkeypatch, tmp_path):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("vera_func.data.tokens.FLUSH", 10)
    monkeypatch.setattr("vera_func.data.tokens.CHUNK", 7)
    found = rows(*({"text": " ".join("abcdefgh"[: 1 + i % 8])} for i in range(50)))
    for i in range(50):
        assert words(tokenizer, found.row(i)[0]) == " ".join(["A B C D E F G H"[: 2 * (i % 8) + 1], "[EOS]"])
    with pytest.raises(ValueError, match="no row has a target"):
        rows(*({"text": "a"} for _ in range(50)), max_length=1)
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


def test_bad_chats_name_the_row(rows, tokenizer, monkeypatch):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    strict = "{% if messages[0].content == 'c' %}{{ raise_exception('no c, please') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    bad = json.loads(json.dumps(chat).replace('"a"', '"c"'))
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 3: the chat template refuses the messages: no c, please"):
        rows(chat, chat, bad)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="row 1: the tokenizer has no chat template"):
        rows(chat)
    with pytest.raises(ValueError, match="leave out --chat"):
        chat_prompt(tokenizer, "a")
