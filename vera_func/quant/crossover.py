"""Measure the number of rows up to which a kernel on packed weights is faster than a dense product.

For few rows, a dense product takes longer than a packed kernel, because the dense product dequantizes the weight or
reads four times as many bytes. But the time of a dense product grows more slowly with the number of rows. The number of
rows at which both products take the same time depends on the CPU and on the shape.

Packed and dense products round differently. Each process therefore measures the limit for a format and shape only once,
so that equal inputs give bitwise equal outputs. Different processes may measure different limits. A fixed `max_rows` in
`fused_weight` or `Apply.with_fused_weights` avoids differences between processes.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


ROWS = (1, 4, 16, 64, 256)
# Limits are rounded down to one of these numbers, so that processes on the same machine usually agree.
STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
REPEATS = 5

_LIMITS: dict[Hashable, int] = {}
_LOCK = threading.Lock()

Product = Callable[[Tensor], Tensor]


def measured_rows(kind: Hashable, in_features: int, products: Callable[[], tuple[Product, Product]]) -> int:
    """Return the number of rows up to which the packed product is faster, measured at the first call for each `kind`.

    Args:
        kind: Hashable description of the products: the format, the shape, and the alternative product.
        in_features: Input size. The inputs have shape (rows, in), in bfloat16 on the CPU.
        products: Function that returns the packed product and the alternative product. Called only for a measurement.

    Example:
        >>> quick, slow = lambda x: x, lambda x: (time.sleep(0.001), x)[1]
        >>> measured_rows("example", 4, lambda: (quick, slow)), measured_rows("example", 4, lambda: None)
        (256, 256)
    """
    limit = _LIMITS.get(kind)
    if limit is None:
        with _LOCK:
            if kind not in _LIMITS:
                # A new thread does not inherit the caller's transforms, autocast and inference mode.
                with ThreadPoolExecutor(1) as thread:
                    _LIMITS[kind] = thread.submit(_measure, in_features, *products()).result()
        limit = _LIMITS[kind]
    return limit


def crossover(rows: Sequence[int], packed: Sequence[float], other: Sequence[float]) -> int:
    """Return the largest number of rows for which the packed product is faster than the alternative product.

    Between measured numbers of rows, times are interpolated linearly. The result is rounded down to one of `STEPS`.

    Args:
        rows: Increasing numbers of rows, starting at 1.
        packed: Seconds that the packed product takes, for each number of rows. The sequence may end after the first
            number of rows for which the packed product is slower.
        other: Seconds that the alternative product takes, for each number of rows.

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
            x = torch.ones(count, in_features, dtype=torch.bfloat16, device="cpu")
            best = [float("inf")] * 2
            for _ in range(REPEATS):  # alternate, so that other work on the machine disturbs both products
                for i, product in enumerate((packed, other)):
                    start = time.perf_counter()
                    product(x)
                    best[i] = min(best[i], time.perf_counter() - start)
            for known, seconds in zip(times, best, strict=True):
                known.append(seconds)
            if best[0] > best[1]:
                break
    return crossover(ROWS, *times)
