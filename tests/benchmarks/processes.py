"""Several processes: the evaluation of 128 adapters by one and by two, an all-reduce, and the same on paper."""

import json
import math
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import vera_func as vf
from vera_func.train.distributed import map_sharded, process_group, rank, world_size

from .common import llama, table


ADAPTERS, CHUNK, TEXTS, TOKENS = 128, 8, 4, 16
# Layers, and the out features of what is adapted in each.
MODELS = {
    "8B, q and v": (32, [4096, 1024]),
    "8B, all": (32, [4096, 1024, 1024, 4096, 14336, 14336, 4096]),
    "70B, q and v": (80, [8192, 1024]),
    "70B, all": (80, [8192, 1024, 1024, 8192, 28672, 28672, 8192]),
}
R, REPEATS = 256, 4


def run():
    """Print what two processes measure here, and what the model of an all-reduce says of many GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.benchmarks.processes"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rows = [
        {"clock": clock, "by one process, s": one, "by two, s": two, "times as fast": one / two}
        for clock, (one, two) in found["evaluation"].items()
    ]
    table(f"{ADAPTERS} adapters, {TEXTS} x {TOKENS} tokens, nf4, width 512, 4 layers, one thread each", rows)
    sizes, seconds = zip(*found["all_reduce"], strict=True)
    # Two processes: 2 messages one after another, and the whole buffer sent once by each.
    latency = seconds[0] / 2
    bandwidth = (sizes[-1] - sizes[0]) / (seconds[-1] - seconds[0])
    rows = [
        {"MB": size / 1e6, "measured, ms": 1e3 * s, "model, ms": 1e3 * model(size, 2, latency, bandwidth)}
        for size, s in found["all_reduce"]
    ]
    title = f"all-reduce by gloo, two processes; the model with {1e6 * latency:.0f} us and {bandwidth / 1e9:.2f} GB/s"
    table(f"{title} from the first and the last row", rows)
    paper()


def paper(latency=10e-6, bandwidth=25e9):
    """Print bytes and time of a step's all-reduce on many GPUs, for an assumed network."""
    rows = []
    for name, (layers, outs) in MODELS.items():
        numbers = layers * sum(out + R for out in outs)
        row = {"base, adapted": name, "numbers": numbers, "buffer, MB": 8 * numbers / 1e6}
        for gpus in (1, 8, 64, 1024):
            sent, seconds = 2 * (gpus - 1) / gpus * 8 * numbers, model(8 * numbers, gpus, latency, bandwidth)
            row[f"{gpus} GPUs: MB, ms"] = f"{sent / 1e6:.3g}, {1e3 * seconds:.2g}"
        rows.append(row)
    table(f"A step over the data, r {R}, at {1e6 * latency:.0f} us and {bandwidth / 1e9:.0f} GB/s a GPU", rows)


def model(size, processes, latency, bandwidth):
    """Seconds: a tree up and down for the latency, 2 (p - 1) / p of the buffer sent by each for the bandwidth."""
    return 2 * math.log2(processes) * latency + 2 * (processes - 1) / processes * size / bandwidth


def evaluation():
    """Seconds of rank 0 alone, and of both, in turns; the best of some, by two clocks.

    The CPU's clock is that of the process that took longest. On an idle machine it tells what the wall's does, waiting
    and sending aside; on a busy one it is what is left to tell.
    """
    adapted = vf.adapt(
        llama(width=512, layers=4, dtype=torch.float32), vf.VeraConfig(r=R, target_modules=["q_proj", "v_proj"])
    )
    stacked = vf.stack_adapters([adapted.params] * ADAPTERS)
    ids = torch.randint(0, 512, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    many = vf.vmap_adapters(adapted.apply, in_dims=None)

    @torch.no_grad()
    def loss(start):
        part = {key: leaf[start : start + CHUNK] for key, leaf in stacked.items()}
        logits = many(part, adapted.frozen, input_ids=ids).logits
        return logits.logsumexp(-1).mean((1, 2))

    starts = range(0, ADAPTERS, CHUNK)
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    best = {name: [math.inf, math.inf] for name in clocks}
    for _ in range(REPEATS):
        for i, mapped in enumerate((map, map_sharded)):
            dist.barrier()
            begin = {name: clock() for name, clock in clocks.items()}
            if i == 1 or rank() == 0:
                list(mapped(loss, starts))
            took = {name: clock() - begin[name] for name, clock in clocks.items()}
            both = map_sharded(lambda _, took=took: took, range(world_size()))
            for name in clocks:
                best[name][i] = min(best[name][i], max(seconds[name] for seconds in both))
    return best


def all_reduce():
    """`(bytes, seconds)` for buffers of some sizes, those of `MODELS` among them."""
    found = []
    for numbers in (1_000, 180_224, 778_240, 1_433_600, 6_860_800):
        buffer, best = torch.zeros(numbers, dtype=torch.float64), math.inf
        for _ in range(4 * REPEATS):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(buffer)
            best = min(best, time.perf_counter() - begin)
        found.append((8 * numbers, best))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        assert world_size() == 2
        result = {"evaluation": evaluation(), "all_reduce": all_reduce()}
        if rank() == 0:
            print(json.dumps(result))
