"""Fixtures that several folders share."""

import pytest
import torch


collect_ignore = ["mutation.py"]  # needs cosmic-ray, for which the suite does not ask


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs CUDA")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Every test compiles from nothing: Dynamo's recompile limit counts over the whole process."""
    yield
    torch.compiler.reset()


# What the command line reads: a tiny model, and texts that it can learn.
GOOD, BAD = ["joy", "great"], ["bore", "dull"]
WORDS = ["Review", ":", "Sentiment", "good", "bad", *GOOD, *BAD, "a", "the", "and", "was", "one", "two", "three"]
NOUNS = ["film", "plot", "actor", "scene", "end"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Llama of two layers and a tokenizer of words, as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from helpers import llama

    path = tmp_path_factory.mktemp("model") / "tiny"
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS, *NOUNS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(path)
    llama().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """60 texts, whose label is said by one of their words."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    lines = []
    for i in range(60):
        word = (GOOD if i % 2 else BAD)[i // 2 % 2]
        text = f"the {NOUNS[i % 5]} was {word} and the {NOUNS[i // 5 % 5]} {'a ' * (i // 25)}"
        lines.append(f"{text},{['bad', 'good'][i % 2]}")
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path
