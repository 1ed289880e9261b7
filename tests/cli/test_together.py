"""Adapters that train together are those that train alone.

In float64 they differ by rounding alone. In float32 Adam divides each value of a gradient by its own size, so that the
rounding of a value near 0 becomes a part of a whole step: single values differ by up to 1e-3 of themselves, and the
vectors of an adapter by about 1e-5 of their norm.
"""

import pytest
import torch

from vera_func.cli import demo, label_sets, language, outputs
from vera_func.cli.recipe import Recipe

from hostile import jsonl


WORDS = ["film", "plot", "actor", "scene", "end", "joy", "great", "bore", "dull", "one", "two", "three"]
STEPS = 12
FORMATS = [(torch.float64, "none"), (torch.float32, "nf4"), (torch.bfloat16, "nf4")]


def words(i):
    return " ".join(WORDS[(i * k + k // 2) % 12] for k in range(1, 4 + i % 5))


@pytest.fixture(scope="module")
def data(tmp_path_factory, reviews):
    """Two data sets of each kind, the first of which has longer rows."""
    path = tmp_path_factory.mktemp("data")
    header, *lines = reviews.read_text().splitlines()
    for name, some in (("a", lines[:36]), ("b", lines[36:])):
        (path / f"{name}.csv").write_text("\n".join([header, *some]) + "\n")
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

    for module in (language, label_sets, demo):
        monkeypatch.setattr(module, "new_adapter", new_adapter)
    monkeypatch.setattr(demo, "_reload_difference", lambda *args: 0.0)
    monkeypatch.setattr(demo, "_save", lambda out, adapted, found, note: trained.append([found.params]))
    for module in (language, label_sets):
        monkeypatch.setattr(module, "save_adapters", lambda out, adapted, params, names, note: trained.append(params))

    def call(function, *args, **options):
        options |= {"model": str(folder), "quant": quant, "dtype": dtype, "r": 8, "progress": False}
        result = function(*args, out=tmp_path / "out", **options)
        return result, trained.pop()

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
    found, params = train(language.train_language, sources, **options)
    alone, own = zip(*(train(language.train_language, [source], **options) for source in sources), strict=True)
    check(train.dtype, params, own, ([row["loss"] for row in found["adapters"]], [row["loss"] for row in alone]))


def test_data_sets_and_betas_of_preferences(train, data):
    options = {"recipe": Recipe(4), "steps": [STEPS], "learning_rates": [0.1]}
    sources, betas = [data / f"{name}.pairs.jsonl" for name in "ab"], [0.05, 0.5]
    found, params = train(language.train_language, sources, betas=betas, **options)
    pairs = [(source, beta) for source in sources for beta in betas]
    runs = (train(language.train_language, [source], betas=[beta], **options) for source, beta in pairs)
    alone, own = zip(*runs, strict=True)
    check(train.dtype, params, own, ([row["loss"] for row in found["adapters"]], [row["loss"] for row in alone]))


def test_data_sets_with_labels(train, data):
    """`vera-func train` on one data set with labels is another loop, that of `demo`."""
    sources, options = [str(data / f"{name}.csv") for name in "ab"], {"recipe": Recipe(4), "learning_rates": [0.1]}
    found, params = train(label_sets.train_label_sets, sources, steps=[STEPS], **options)
    loop = {"batch_size": 4, "steps": STEPS, "learning_rate": 0.1, "device": "cpu", "say": lambda line: None}
    own = [train(demo.demo, data=source, **loop)[1][0] for source in sources]
    alone = [train(label_sets.train_label_sets, [source], steps=[STEPS], **options)[0] for source in sources]
    losses = [[row["loss"] for row in result["adapters"]] for result in (found, *alone)]
    check(train.dtype, params, own, (losses[0], losses[1] + losses[2]))
