"""Per-example gradients over a plain step, and evolution's peak memory over that of inference."""

import multiprocessing
import os
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import vera_func as vf

from .common import interleave, llama, table


TARGETS = ["q_proj", "v_proj"]
SAMPLE = 4  # a loop is linear in the examples: this many are timed, and multiplied
WAYS = ["inference", "evolve", "a training step"]


def run(dtype, cases=((32, 16), (32, 64))):
    """Print a row for each `(examples, tokens)`, and the memory of evolution."""
    adapted = vf.adapt(llama(dtype=dtype), vf.VeraConfig(r=256, target_modules=TARGETS))
    rows = [measure(adapted, n, tokens) for n, tokens in cases]
    table(f"Per-example gradients, nf4, width 1024, 6 layers, r 256 on q and v, {str(dtype)[6:]}", rows)
    # Freed tensors go back to the system at once, so that the process has what is live; read when a process starts.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows = []
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append({"": way, "peak above the model, MB": pool.apply(peak, (way, dtype)) / 1e6})
    table(f"Memory of 8 adapters x 8 rows x 32 tokens, the same model, {str(dtype)[6:]}", rows)


def losses_of(adapted):
    """`(params, ids) -> (rows,)`, the next-token loss of each row."""

    def losses(params, ids):
        logits = adapted.apply(params, adapted.frozen, input_ids=ids).logits[:, :-1].float()
        return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    return losses


def measure(adapted, n, tokens):
    """One row: `n` examples of so many tokens."""
    ids = torch.randint(0, 512, (n, tokens), generator=torch.Generator().manual_seed(0))
    losses, params = losses_of(adapted), adapted.params
    plain = vf.grad(lambda params, ids: losses(params, ids).mean())
    generator = torch.Generator().manual_seed(0)

    def private():
        grads = vf.per_example_grads(losses, params, ids)
        vf.private_step(grads, 1.0, noise_multiplier=1.0, generator=generator)

    best = interleave(
        {
            "plain": lambda: plain(params, ids),
            "rows": lambda: vf.per_example_grads(losses, params, ids),
            "private": private,
            "loop": lambda: [plain(params, row[None]) for row in ids[:SAMPLE]],
        }
    )
    return {
        "examples x tokens": f"{n} x {tokens}",
        "plain step, s": best["plain"],
        "per-example / plain": best["rows"] / best["plain"],
        "private step / plain": best["private"] / best["plain"],
        "loop / per-example": n / SAMPLE * best["loop"] / best["rows"],
    }


def peak(way, dtype, adapters=8, rows=8, tokens=32):
    """Bytes by which the memory rises: of a mixed batch, of evolution over such batches, of a training step."""
    adapted = vf.adapt(llama(dtype=dtype), vf.VeraConfig(r=256, target_modules=TARGETS))
    ids = torch.randint(0, 512, (rows, tokens), generator=torch.Generator().manual_seed(0))
    losses = losses_of(adapted)
    many = vf.vmap_adapters(lambda params, frozen, ids: losses(params, ids), in_dims=None)
    stacked = vf.stack_adapters([adapted.params] * adapters)
    with torch.no_grad():  # what every forward needs, loaded before the count
        many(vf.stack_adapters([adapted.params] * 2), adapted.frozen, ids[:2, :8])
    Path("/proc/self/clear_refs").write_text("5")  # of Linux: the peak is what there is now
    before = _memory("VmRSS")
    if way == "inference":
        with torch.no_grad():
            for _ in range(4):
                many(stacked, adapted.frozen, ids)
    elif way == "evolve":
        options = {"steps": 2, "sigma": 0.01, "learning_rate": 0.01, "seed": 0, "population": 16}
        fitness = lambda stacked: -many(stacked, adapted.frozen, ids).mean(1)
        vf.evolve(fitness, adapted.params, chunk_size=adapters, **options)
    else:
        vf.grad(lambda stacked: many(stacked, adapted.frozen, ids).sum())(stacked)
    return _memory("VmHWM") - before


def _memory(field):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{field}:")[2].split()[0])
