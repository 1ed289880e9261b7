"""The number of rows up to which a kernel on packed weights is faster than a dense product, measured once per process.

The time of a packed kernel grows with each row from little; a dense product is slow to start (it dequantizes the
weight, or reads four times as many bytes) and grows slower. Where they cross depends on the CPU and on the shape: 2 to
100 rows on machines that were measured.

The two kernels round differently. A limit is therefore never measured a second time in a process, so that equal
arguments give equal bits. Between processes the limit may differ; a fixed number of rows avoids that (`max_rows` of
`fused_weight` and `Apply.with_fused_weights`).
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


ROWS = (1, 4, 16, 64, 256)
# Limits are rounded down to these, so that processes on the same machine usually agree.
STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
REPEATS = 5

_LIMITS: dict[Hashable, int] = {}
_LOCK = threading.Lock()

Product = Callable[[Tensor], Tensor]


def measured_rows(kind: Hashable, in_features: int, products: Callable[[], tuple[Product, Product]]) -> int:
    """Return the number of rows up to which the packed product of this kind is used; measured at the first call.

    Args:
        kind: What the times depend on: format, shape, and the alternative.
        in_features: Size of the products' inputs, which are (rows, in) bfloat16 on the CPU.
        products: Returns the packed product and its alternative; called only if they have to be measured.

    Example:
        >>> quick, slow = lambda x: x, lambda x: (time.sleep(0.001), x)[1]
        >>> measured_rows("example", 4, lambda: (quick, slow)), measured_rows("example", 4, lambda: None)
        (256, 256)
    """
    limit = _LIMITS.get(kind)
    if limit is None:
        with _LOCK:
            if kind not in _LIMITS:
                # A new thread does not inherit transforms, autocast, modes and inference mode of the caller.
                with ThreadPoolExecutor(1) as thread:
                    _LIMITS[kind] = thread.submit(_measure, in_features, *products()).result()
        limit = _LIMITS[kind]
    return limit


def crossover(rows: Sequence[int], packed: Sequence[float], other: Sequence[float]) -> int:
    """Return the largest number of rows for which the packed product is faster, given the times of both.

    Between measured numbers of rows, times are interpolated linearly. The result is rounded down to one of `STEPS`.

    Args:
        rows: Increasing numbers of rows, from 1.
        packed: Seconds of the packed product for the first of them, at least up to the first that is slower.
        other: Seconds of its alternative.

    Example:
        >>> crossover((1, 4, 16), (1.0, 4.0, 16.0), (9.0, 9.0, 9.0)), crossover((1, 4), (2.0,), (1.0,))
        (8, 0)
    """
    limit, before = 0.0, 0.0
    for count, mine, others in zip(rows, packed, other, strict=False):
        gain = others - mine
        if gain < 0:
            if limit:
                limit += (count - limit) * before / (before - gain)
            break
        limit, before = float(count), gain
    return max(step for step in STEPS if step <= limit)


def _measure(in_features: int, packed: Product, other: Product) -> int:
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for count in ROWS:
            x = torch.ones(count, in_features, dtype=torch.bfloat16)
            best = [float("inf")] * 2
            for _ in range(REPEATS):  # in turn: other work on the machine then disturbs both
                for i, product in enumerate((packed, other)):
                    start = time.perf_counter()
                    product(x)
                    best[i] = min(best[i], time.perf_counter() - start)
            for known, seconds in zip(times, best, strict=True):
                known.append(seconds)
            if best[0] > best[1]:
                break
    return crossover(ROWS, *times)
