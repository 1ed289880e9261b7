"""Schedules as pure functions, and by name, for adapters with steps of their own."""

import math
from functools import partial

import pytest
import torch
from torch.func import vmap
from torch.testing import assert_close

from vera_func.train.schedules import constant, linear_warmup_cosine, linear_warmup_linear, schedule_of

from refused import NAN, Refused


EXACT = {"rtol": 1e-12, "atol": 1e-14}
SCHEDULES = {
    "constant": constant,
    "cosine": partial(linear_warmup_cosine, warmup=3, total=11, peak=2.0, final=0.5),
    "no-warmup": partial(linear_warmup_cosine, warmup=0, total=7),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_takes_ints_tensors_and_transforms(name):
    schedule, steps = SCHEDULES[name], torch.arange(15)
    values = torch.stack([schedule(int(step)) for step in steps])
    assert values.dtype == torch.float64
    assert_close(schedule(steps), values, **EXACT)
    assert_close(vmap(schedule)(steps), values, **EXACT)
    compiled = torch.compile(schedule, fullgraph=True, backend="eager")
    assert_close(compiled(steps), values, **EXACT)


def test_warmup_cosine_values():
    schedule = SCHEDULES["cosine"]
    expected = [0.5, 1.0, 1.5, 2.0]
    assert_close(schedule(torch.arange(4)), torch.tensor(expected, dtype=torch.float64))
    middle = 0.5 + 1.5 * (1 + math.cos(math.pi * 4 / 8)) / 2
    assert_close(float(schedule(7)), middle)
    assert float(schedule(11)) == float(schedule(1000)) == 0.5
    with pytest.raises(ValueError, match="warmup=5, total=5"):
        linear_warmup_cosine(0, warmup=5, total=5)


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


# What is refused

bad = Refused()
bad("constant", "no step", lambda _: constant("a"), "data type 'str'", TypeError)
bad("linear_warmup_cosine", "no steps", lambda _: linear_warmup_cosine(0, warmup=0, total=0), "warmup=0, total=0")
bad("linear_warmup_cosine", "warmup=-1", lambda _: linear_warmup_cosine(0, warmup=-1, total=3), "warmup=-1")
bad("linear_warmup_cosine", "warmup of NaN", lambda _: linear_warmup_cosine(0, warmup=NAN, total=3), "warmup=nan")


@pytest.mark.parametrize("case", bad.rows)
def test_is_refused(case, tmp_path):
    bad.check(case, tmp_path)
