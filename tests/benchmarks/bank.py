"""A bank of many adapters: the time and the memory that stacking them takes."""

import resource
import tempfile
import time
from pathlib import Path

import vera_func as vf
from vera_func.model.batch import num_adapters

from .common import llama, table


def run(n):
    """Stacking from a bank: time, and memory beside the adapters' own bytes."""
    model = llama()
    adapted = vf.adapt(model, vf.VeraConfig(r=256, target_modules=["q_proj", "v_proj"]))
    stacked = {key: value.expand(n, *value.shape).contiguous() for key, value in adapted.params.items()}
    size = sum(leaf.numel() * leaf.element_size() for leaf in stacked.values())
    with tempfile.TemporaryDirectory() as folder:
        path = vf.save_bank(Path(folder) / "bank.safetensors", stacked, *adapted[2:], names=[str(i) for i in range(n)])
        del stacked
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter()
        opened = vf.open_bank(path)
        everything = opened.read()
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        opened.read([str(i * 7919 % n) for i in range(64)])
        few = time.perf_counter() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    row = {
        "adapters": n, "bytes each": size // n, "MB in all": size / 1e6, "stacked, s": seconds, "64 of them, s": few,
        "peak above the start / own bytes": max(0.0, grown / size),
    }  # fmt: skip
    table("A bank of adapters", [row])
    assert num_adapters(everything) == n
