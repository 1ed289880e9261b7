"""Grids, their tables, and single rows of a run of many."""

import pytest
import torch
from torch.testing import assert_close

import vera_func as vf
from vera_func.train.sweep import fit_row, sweep, sweep_table

from refused import Refused


def test_a_row_of_a_run_goes_on_as_if_it_had_been_alone():
    def loss_fn(params, batch):
        return (params["p"] - batch).square().sum(-1)

    def batches(step):
        return torch.full((3,), float(step))

    start, rates = {"p": torch.ones(2, 3)}, [0.1, 0.3]
    many = vf.fit(loss_fn, start, batches, steps=4, learning_rate=rates, num_adapters=2, progress=False)
    row = fit_row(many, 1)
    went_on = vf.fit(loss_fn, row.params, batches, steps=7, learning_rate=0.3, resume=row, progress=False)
    alone = vf.fit(loss_fn, {"p": torch.ones(3)}, batches, steps=7, learning_rate=0.3, progress=False)
    assert_close(went_on.params, alone.params)
    assert_close(went_on.losses, alone.losses)
    assert went_on.state.step == 7


def test_sweep_and_its_table():
    rows = sweep({"rate": [0.1, 0.2], "seed": (0, 1, 2)})
    assert [tuple(r.values()) for r in rows] == [(r, s) for r in (0.1, 0.2) for s in (0, 1, 2)]
    table = sweep_table(rows, {"loss": torch.arange(6) / 2, "name": list("abcdef")})
    assert table[5] == {"rate": 0.2, "seed": 2, "loss": 2.5, "name": "f"}
    assert rows[5] == {"rate": 0.2, "seed": 2}
    for grid in ({"seed": []}, {"seed": "abc"}):
        with pytest.raises(ValueError, match=r"grid\['seed'\]"):
            sweep(grid)
    with pytest.raises(ValueError, match=r"'loss'\] must have 6 values, one per row, got 2"):
        sweep_table(rows, {"loss": [1, 2]})
    with pytest.raises(ValueError, match=r"already have a column 'seed'"):
        sweep_table(rows, {"seed": range(6)})


# What is refused

bad = Refused()


for values in ("xy", [], 0.1):
    bad("sweep", f"{values!r}", lambda _, v=values: sweep({"a": v}), r"grid\['a'\] must be a non-empty list of values")

bad("sweep_table", "one of two", lambda _: sweep_table(sweep({"a": [1, 2]}), {"b": [1]}), r"'b'\] must have 2 values")
bad(
    "sweep_table",
    "a column twice",
    lambda _: sweep_table(sweep({"a": [1]}), {"a": [1]}),
    r"already have a column 'a'",
)


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
