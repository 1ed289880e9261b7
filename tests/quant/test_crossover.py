"""Where a packed kernel stops being faster: from given times by arithmetic, from a machine's once in a process."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vera_func.quant.crossover import ROWS, STEPS, crossover, measured_rows


@pytest.mark.parametrize(
    ("packed", "other", "limit"),
    [
        ((2, 8, 32, 128, 512), (1, 1, 1, 1, 1), 0),  # never faster
        ((1, 4, 16, 64, 256), (1, 4, 16, 64, 256), 256),  # never slower
        ((1, 4, 16, 64, 256), (40, 40, 40, 40, 40), 32),  # equal at 40 rows
        ((1, 4, 16, 64, 256), (48, 48, 48, 48, 48), 48),
        ((1, 4, 16, 64), (40, 40, 40, 40), 32),  # the larger ones were not measured
        ((1, 4, 16, 64, 256), (2, 3, 40, 40, 40), 2),  # faster again, by chance
    ],
)
def test_the_limit_is_where_the_times_cross(packed, other, limit):
    assert crossover(ROWS, packed, other) == limit
    assert limit in STEPS


def test_the_choice_is_never_slower_at_a_measured_number_of_rows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        slope, start, slope_2, start_2 = torch.rand(4, generator=generator).tolist()
        packed = [start / 9 + slope * rows for rows in ROWS]
        other = [start_2 * 9 + slope_2 * rows / 4 for rows in ROWS]
        limit = crossover(ROWS, packed, other)
        for rows, mine, others in zip(ROWS, packed, other, strict=True):
            assert (mine if rows <= limit else others) == min(mine, others)


def test_is_measured_once_whatever_runs_meanwhile():
    threads, seen = set(), []

    def sleeping(seconds):
        def product(x):
            threads.add(threading.get_ident())
            seen.append((x.dtype, x.shape[-1], torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            time.sleep(seconds)

        return product

    products = lambda: (sleeping(0), sleeping(0.002))
    kind = object()
    with ThreadPoolExecutor(4) as pool:
        limits = list(pool.map(lambda _: measured_rows(kind, 8, products), range(4)))
    assert limits == [ROWS[-1]] * 4
    assert len(threads) == 1
    assert set(seen) == {(torch.bfloat16, 8, False, False)}
    count = len(seen)
    assert measured_rows(kind, 8, products) == ROWS[-1]
    assert len(seen) == count
    with torch.inference_mode():
        assert measured_rows(object(), 8, lambda: (sleeping(0.002), sleeping(0))) == 0
    assert set(seen) == {(torch.bfloat16, 8, False, False)}
