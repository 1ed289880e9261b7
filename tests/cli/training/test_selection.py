"""The training of `demo` and `train`: what a sweep starts with, and which adapter it chooses."""

import pytest
import torch
from torch.testing import assert_close

import vera_func as vf
from vera_func.cli.training import selection
from vera_func.cli.training.settings import Recipe
from vera_func.data.examples import read_examples
from vera_func.data.models import load_base
from vera_func.data.task import encode_examples, loss_of, make_task
from vera_func.train.optim import linear_warmup_cosine


def test_the_sweep_grid():
    for adapters in range(2, 17):
        grid = selection.sweep_grid(adapters, 0.02)
        assert len(grid) == len({tuple(row.values()) for row in grid}) == adapters
        rates = [row["learning_rate"] for row in grid]
        if adapters > 3:
            assert min(rates) == pytest.approx(0.005)
            assert max(rates) == pytest.approx(0.04)
        assert adapters * selection.small_batch(16, adapters) <= 32
    assert [row["learning_rate"] for row in selection.sweep_grid(8, 0.02)[::2]] == pytest.approx(
        [0.005, 0.01, 0.02, 0.04]
    )
    assert selection.sweep_grid(2, 0.02)[0]["learning_rate"] == 0.02


@pytest.fixture
def sweeping(folder, reviews):
    """`(adapted, task, call)`: `call(grid)` trains a sweep of 6 steps, at most 4 texts at a time."""
    base = load_base(str(folder), "none", torch.float32)
    task = make_task(base, ["bad", "good"])
    rows = encode_examples(base, task, read_examples(reviews))
    adapted = vf.adapt(base.model, vf.VeraConfig(r=8))
    options = {"steps": 6, "progress": False}
    return (
        adapted,
        task,
        rows[:40],
        lambda grid: selection.train_sweep(adapted, task, grid, rows[:40], rows[40:], Recipe(4), **options),
    )


def test_the_best_of_a_sweep_is_what_it_would_be_alone(sweeping):
    adapted, task, rows, call = sweeping
    found = call(selection.sweep_grid(4, 0.02))
    grid = found.table[found.row]
    small, full = (selection.train_batches(rows, size, seed=0) for size in (2, 4))
    start = {k: torch.full_like(v, grid["d_initial"]) if "lambda_d" in k else v for k, v in adapted.params.items()}
    alone = vf.fit(
        loss_of(adapted, task), start, lambda step: (small if step < 3 else full)(step), steps=9, progress=False,
        learning_rate=grid["learning_rate"], max_norm=1.0,
        schedule=lambda step: linear_warmup_cosine(step, warmup=0, total=9),
    )  # fmt: skip
    assert_close(found.best, alone.params, rtol=1e-3, atol=1e-5)


def test_an_adapter_that_diverged_is_not_chosen(sweeping):
    """Not even if it stopped where it was better than the others are."""
    _, _, _, call = sweeping
    with pytest.warns(RuntimeWarning, match="not finite"):
        found = call([{"learning_rate": 1e38, "d_initial": 0.1}, {"learning_rate": 9.0, "d_initial": 0.1}])
    assert found.table[0]["loss"] < found.table[1]["loss"]
    assert found.row == 1
