"""Adapters that train together are those that train alone.

In float64 they differ by rounding alone. In float32 Adam divides each value of a gradient by its own size, so that the
rounding of a value near 0 becomes a part of a whole step: single values differ by up to 1e-3 of themselves, and the
vectors of an adapter by about 1e-5 of their norm.
"""

import pytest
import torch

from vera_func.cli.training import classifier, label_sets, outputs, unlabelled
from vera_func.cli.training.settings import Recipe, Run
from vera_func.data.metadata import read_metadata

from hostile import jsonl


WORDS = ["film", "plot", "actor", "scene", "end", "joy", "great", "bore", "dull", "one", "two", "three"]
STEPS = 12
FORMATS = [(torch.float64, "none"), (torch.float32, "nf4"), (torch.bfloat16, "nf4")]


def words(i):
    return " ".join(WORDS[(i * k + k // 2) % 12] for k in range(1, 4 + i % 5))


@pytest.fixture(scope="module")
def data(tmp_path_factory, reviews):
    """Two data sets of each kind, the first of which has longer rows, and one with other labels."""
    path = tmp_path_factory.mktemp("data")
    header, *lines = reviews.read_text().splitlines()
    for name, some in (("a", lines[:36]), ("b", lines[36:])):
        (path / f"{name}.csv").write_text("\n".join([header, *some]) + "\n")
    film = "".join(
        f"the {('film', 'plot', 'end')[i % 3]} was {words(i)},{('one', 'two', 'three')[i % 3]}\n" for i in range(45)
    )
    (path / "c.csv").write_text(f"{header}\n{film}")
    for name, start, tail in (("a", 0, " and the end was great"), ("b", 100, "")):
        texts = [{"text": words(start + i) + tail} for i in range(30)]
        pairs = [{"prompt": f"{words(start + i)}{tail} :", "chosen": " joy", "rejected": " a bore"} for i in range(30)]
        (path / f"{name}.text.jsonl").write_text(jsonl(texts))
        (path / f"{name}.pairs.jsonl").write_text(jsonl(pairs))
    return path


@pytest.fixture(params=FORMATS, ids=lambda one: str(one[0])[6:])
def train(request, folder, tmp_path, monkeypatch):
    """Trains in one arithmetic: `(function, *arguments) -> (the result, the params of each adapter)`."""
    dtype, quant = request.param
    trained = []

    def new_adapter(*args):
        new = outputs.new_adapter(*args)
        if dtype == torch.float64:
            params, frozen = ({k: v.double() for k, v in leaves.items()} for leaves in (new.params, new.frozen))
            new = new._replace(params=params, frozen=frozen)
        return new

    for module in (unlabelled, label_sets, classifier):
        monkeypatch.setattr(module, "new_adapter", new_adapter)
    monkeypatch.setattr(
        classifier, "_save_and_reload", lambda out, adapted, found, *more: trained.append(found.params) or 0.0
    )
    for module in (unlabelled, label_sets):
        monkeypatch.setattr(
            module, "save_adapters", lambda out, adapted, params, names, metadata: trained.append(params)
        )

    def call(function, *args, **options):
        run = {name: options.pop(name) for name in Run._fields if name in options}
        run |= {"model": str(folder), "quant": quant, "dtype": dtype, "r": 8, "out": tmp_path / "out"}
        args = (Run(**run),) if function is classifier.train_classifier else (*args, Run(**run))
        return function(*args, **options), trained.pop()

    call.dtype = dtype
    return call


def check(dtype, together, alone, losses):
    """Losses agree in each arithmetic, and params in float64 and float32: (n, ...) and those of the adapters alone."""
    one, other = losses
    assert one == pytest.approx(other, rel={torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype])
    if dtype == torch.bfloat16:
        return
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    for i, params in enumerate(alone):
        for key, value in params.items():
            assert (together[key][i] - value).norm() <= bound * value.norm(), key


def test_data_sets_of_texts(train, data):
    options = {"recipe": Recipe(4), "steps": [STEPS], "learning_rates": [0.1], "max_length": 24}
    sources = [data / f"{name}.text.jsonl" for name in "ab"]
    found, params = train(unlabelled.train_language, sources, **options)
    alone, own = zip(*(train(unlabelled.train_language, [source], **options) for source in sources), strict=True)
    check(train.dtype, params, own, ([row["loss"] for row in found["adapters"]], [row["loss"] for row in alone]))


def test_data_sets_and_betas_of_preferences(train, data):
    options = {"recipe": Recipe(4), "steps": [STEPS], "learning_rates": [0.1]}
    sources, betas = [data / f"{name}.pairs.jsonl" for name in "ab"], [0.05, 0.5]
    found, params = train(unlabelled.train_language, sources, betas=betas, **options)
    pairs = [(source, beta) for source in sources for beta in betas]
    runs = (train(unlabelled.train_language, [source], betas=[beta], **options) for source, beta in pairs)
    alone, own = zip(*runs, strict=True)
    check(train.dtype, params, own, ([row["loss"] for row in found["adapters"]], [row["loss"] for row in alone]))


def test_data_sets_with_labels(train, data):
    """Also as `vera-func train` and `demo` train on one data set with labels. The third set has other labels."""
    sources, options = [str(data / f"{name}.csv") for name in "abc"], {"recipe": Recipe(4), "learning_rates": [0.1]}
    found, params = train(label_sets.train_label_sets, sources, steps=[STEPS], **options)
    more = {"steps": [STEPS], "say": lambda line: None, **options}
    own = [train(classifier.train_classifier, data=source, **more)[1] for source in sources]
    alone = [train(label_sets.train_label_sets, [source], steps=[STEPS], **options)[0] for source in sources]
    losses = [[row["loss"] for row in result["adapters"]] for result in (found, *alone)]
    check(train.dtype, params, own, (losses[0], [own[0] for own in losses[1:]]))


def test_a_bank_whose_adapters_have_different_labels(run, run_json, data, folder, tmp_path):
    """Each is used with its own labels: alone, in groups, and through directories and back."""
    base = ("--model", folder, "--dtype", "float32")
    sources = [word for name in "abc" for word in ("--data", data / f"{name}.csv")]
    steps = ("--steps", "30", "--learning-rate", "0.1", "--batch-size", "8", "--r", "8")
    found = run_json("train", *sources, *steps, *base, "--out", tmp_path / "out")
    assert [row["after"] for row in found["adapters"]] > [0.7] * 3
    bank = found["bank"]
    labels = [["bad", "good"], ["bad", "good"], ["one", "three", "two"]]
    assert (read_metadata(bank).labels, read_metadata(bank).label_sets) == (None, labels)
    assert run_json("inspect", bank)["labels"] == labels
    text = "the plot was dull"
    rows = run_json("predict", "--bank", bank, text, *base)
    assert [row["adapter"] for row in rows] == ["a", "b", "c"]
    assert all(row["label"] in own for row, own in zip(rows, labels, strict=True))
    for name, row in zip("abc", rows, strict=True):
        (alone,) = run_json("predict", "--bank", bank, "--name", name, text, *base)
        assert alone == {**row, "probability": pytest.approx(row["probability"], rel=1e-5)}
    both = run_json("evaluate", "--bank", bank, "--name", "b", "--name", "a", "--data", data / "a.csv", *base)
    assert [row["name"] for row in both] == ["b", "a"]
    (third,) = run_json("evaluate", "--bank", bank, "--name", "c", "--data", data / "c.csv", *base)
    assert third["accuracy"] > 0.7
    refused = run("evaluate", "--bank", bank, "--data", data / "c.csv", *base)
    assert refused == (2, "", refused[2])
    assert (
        "'one', but the adapter 'a' was trained on the labels ['bad', 'good']: choose adapters with --name"
        in refused[2]
    )
    run_json("convert", bank, "--out", tmp_path / "each")
    assert [read_metadata(tmp_path / "each" / name).labels for name in "abc"] == labels
    run_json("convert", *(tmp_path / "each" / name for name in "ca"), "--out", tmp_path / "two.safetensors")
    assert read_metadata(tmp_path / "two.safetensors").label_sets == [labels[2], labels[0]]
    run_json("convert", *(tmp_path / "each" / name for name in "ab"), "--out", tmp_path / "same.safetensors")
    assert read_metadata(tmp_path / "same.safetensors").labels == labels[0]
