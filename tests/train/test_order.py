"""The order of examples: each once in an epoch, another one in each epoch and for each key."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vera_func.train.order import batch_indices

from refused import Refused


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 40), size=st.integers(1, 17), key=st.integers(0, 99))
def test_every_epoch_holds_each_example_once(num, size, key):
    batches = -(-num // size)
    draw = partial(batch_indices, num_examples=num, batch_size=size, key=key)
    for epoch in (0, 3):
        rows = [draw(epoch * batches + i) for i in range(batches)]
        assert torch.cat(rows).sort().values.tolist() == list(range(num))
        assert all(len(r) == size for r in rows[:-1])
        assert rows[0].dtype == torch.int64


def test_orders_are_independent_and_global_randomness_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw = lambda key, epoch: batch_indices(epoch, num_examples=99, batch_size=99, key=key)
    orders = [tuple(draw(key, epoch).tolist()) for key in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert tuple(draw(0, 0).tolist()) == orders[0]
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="batch_size=0"):
        batch_indices(0, num_examples=3, batch_size=0, key=0)


# What is refused

bad = Refused()
for what, change in (
    ("key=None", {"key": None}),
    ("2.5 rows", {"batch_size": 2.5}),
    ("2.5 examples", {"num_examples": 2.5}),
):
    options = {"num_examples": 5, "batch_size": 2, "key": 0} | change
    bad("batch_indices", what, lambda _, o=options: batch_indices(0, **o), "must be integers")

bad("batch_indices", "step -1", lambda _: batch_indices(-1, num_examples=5, batch_size=2, key=0), "step=-1")
bad("batch_indices", "no rows", lambda _: batch_indices(0, num_examples=5, batch_size=0, key=0), "batch_size=0")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
