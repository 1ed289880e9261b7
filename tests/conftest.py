"""How the suite runs (in parallel, one thread a process, without a download unless asked), and shared fixtures."""

import os


# Before torch is imported, and for the processes that tests start: two that fight for two cores are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may depend on a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import pytest
import torch


collect_ignore = ["mutation.py"]  # needs cosmic-ray, for which the suite does not ask
LEFT_OUT = ("slow", "network")
MOST_WORKERS = 8  # each takes 1 to 2 GB of memory


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests that are marked slow or network")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A process for each core; none beside this one for single tests, where starting them would take longest."""
    if _names_tests(config):
        return 0
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else MOST_WORKERS
    return min(psutil.cpu_count(logical=False) or 1, allowed, MOST_WORKERS)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs CUDA")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)
    if not _leaves_out(config):
        return
    kept = [item for item in items if not any(mark in item.keywords for mark in LEFT_OUT)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    if _leaves_out(config):
        terminalreporter.write_line("Tests marked slow or network were left out: `pytest --all` runs everything.")


def _leaves_out(config):
    return not (config.option.all or config.option.markexpr or _names_tests(config))


def _names_tests(config):
    return any("::" in argument for argument in config.args)


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
