"""Schedules by name, for adapters with steps of their own."""

import pytest
import torch
from torch.testing import assert_close

from vera_func.train.optim import linear_warmup_cosine
from vera_func.train.schedules import linear_warmup_linear, schedule_of


def test_each_adapter_has_the_schedule_of_its_own_steps():
    factors = schedule_of("cosine", 2, [10, 5])
    for step in range(10):
        right = [linear_warmup_cosine(step, warmup=2, total=total) for total in (10, 5)]
        assert_close(factors(step), torch.stack(right))
    assert factors(5)[1] == 0


def test_shapes():
    steps = range(10)
    linear = [schedule_of("linear", 0.2, [10])(step).item() for step in steps]
    assert linear == pytest.approx([1 / 3, 2 / 3, *(1 - i / 8 for i in range(8))])
    constant = [schedule_of("constant", 3, [10])(step).item() for step in steps]
    assert constant == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)
    assert schedule_of("constant", 0, [10])(10).item() == 0


def test_what_is_refused():
    with pytest.raises(ValueError, match="the schedule must be one of cosine, linear, constant, got 'step'"):
        schedule_of("step", 0, [5])
    with pytest.raises(ValueError, match="warmup must be at least 0 and less than the 5 steps of an adapter, got 5"):
        schedule_of("cosine", 5, [9, 5])
    with pytest.raises(ValueError, match="0 <= warmup < total"):
        linear_warmup_linear(0, warmup=3, total=3)
