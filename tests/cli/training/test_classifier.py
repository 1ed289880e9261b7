"""`demo` and `train` on a tiny model with a tiny tokenizer, and once on the real model."""

import csv

import pytest
import torch

import vera_func as vf
from vera_func.cli import inspection
from vera_func.cli.training.classifier import train_classifier
from vera_func.cli.training.settings import Recipe, Run
from vera_func.data.assets import load_snippets
from vera_func.data.examples import polar_examples
from vera_func.data.metadata import Metadata, read_metadata
from vera_func.data.models import load_base
from vera_func.model.batch import unstack_adapters


def test_demo_with_one_adapter(run, folder, reviews, tmp_path):
    out = tmp_path / "one"
    line = f"demo --model {folder} --data {reviews} --quant int8 --r 16 --steps 4 --batch-size 4 --dtype float32"
    status, said, _ = run(*line.split(), "--out", out)
    assert status == 0
    for words in ("linear layers in int8", "Before: ", "12 held-out examples", "Trained ", "After: ", "loaded again"):
        assert words in said
    assert sorted(path.name for path in out.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "vera_func.json"),
    ]
    assert read_metadata(out) == Metadata("int8", ["bad", "good"], "Review: {text}\nSentiment:")


def test_demo_with_a_sweep(trained):
    bank = vf.open_bank(trained / "bank.safetensors")
    assert bank.names == ("lr0.005-d0.1", "lr0.005-d0.5", "lr0.04-d0.1", "lr0.04-d0.5")
    assert bank.config.r == 16
    assert read_metadata(bank.path) == read_metadata(trained)
    # The best one is in the bank as it was saved; the others differ from it and from each other.
    best = vf.load_adapter(trained, load_base(bank.config.base_model_name_or_path, "nf4", torch.float32).model)
    rows = unstack_adapters(bank.read())
    same = [all(torch.equal(row[k], best.params[k]) for k in row) for row in rows]
    assert sum(same) == 1
    assert best.config.d_initial == [0.1, 0.5, 0.1, 0.5][same.index(True)]
    keys = [next(k for k in row if k.endswith("lambda_b")) for row in rows]
    assert len({tuple(row[k].tolist()) for row, k in zip(rows, keys, strict=True)}) == 4


def test_a_sweep_learns_and_chooses_the_least_loss(folder, reviews, tmp_path):
    said = []
    settings = Run(
        tmp_path, Recipe(8), str(folder), "none", torch.float32, r=32, steps=[60], learning_rates=[0.1],
        targets=["q_proj", "v_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    result = train_classifier(settings, data=reviews, adapters=4, progress=False, say=said.append)
    assert [row["name"] for row in result.sweep] == list(vf.open_bank(result.bank).names)
    best = min(result.sweep, key=lambda row: row["loss"])
    assert any(f"Best: {best['name']}" in line for line in said)
    assert any(
        "30 steps" in line and "of 4 examples" in line and "10 validation examples then trains alone for 60" in line
        for line in said
    )
    assert result.after > max(0.9, result.before)
    assert result.difference < 1e-3


def test_every_adapter_diverging_is_said(folder, reviews, tmp_path):
    out = tmp_path / "no"
    settings = Run(out, Recipe(4), str(folder), "none", torch.float32, r=8, steps=[8], learning_rates=[1e38])
    with (
        pytest.warns(RuntimeWarning, match="not finite"),
        pytest.raises(RuntimeError, match="use a learning rate below"),
    ):
        train_classifier(settings, data=reviews, adapters=2, progress=False, say=lambda line: None)
    assert not out.exists()


def test_train_says_numbers_only(run, run_json, folder, reviews, tmp_path):
    line = f"train --model {folder} --data {reviews} --r 8 --steps 2 --batch-size 4 --dtype float32".split()
    result = run_json(*line, "--out", tmp_path / "a")
    assert result["held_out"] == 12
    assert result["out"] == str(tmp_path / "a")
    assert result["bank"] is result["sweep"] is None
    assert 0 <= result["before"] <= 1
    status, said, _ = run(*line, "--out", tmp_path / "b[1]", "--prompt", r"{text}\nSentiment:")
    assert status == 0
    assert "after: " in said
    assert read_metadata(tmp_path / "b[1]").prompt == "{text}\nSentiment:"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b[1]"]  # no checkpoint is left


# The real thing


@pytest.mark.network
@pytest.mark.slow
def test_the_real_model_learns_at_ci_size(tmp_path):
    """SmolLM2 in nf4, r 64, 20 steps of 8 short movie snippets, 100 of them held out."""
    short = [example for example in polar_examples(load_snippets("movie")) if 20 < len(example.text) < 60]
    texts = [example for label in ("positive", "negative") for example in short if example.label == label]
    texts = texts[:250] + texts[-250:]
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "group"])
        writer.writerows(texts)
    settings = Run(tmp_path / "out", Recipe(8), dtype=torch.float32, r=64, steps=[20])
    result = train_classifier(settings, data=path, progress=False, say=lambda line: None)
    assert result.held_out == 100
    assert result.trained == 30 * (576 + 192 + 2 * 64)
    assert result.after > result.before + 0.05
    assert result.after > 0.8
    assert result.difference < 1e-3
    assert inspection.inspect_path(str(tmp_path / "out"))["quant"] == "nf4"
