"""What `test_distributed.py` computes alone, and under torchrun, where this file is the program."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import vera_func as vf
from vera_func.cli import main as cli
from vera_func.cli.training import labels, loop, selection
from vera_func.model.batch import num_adapters
from vera_func.train.distributed import furthest, map_sharded, mean_over_micro_batches, process_group, rank
from vera_func.train.fit import batch_indices


ADAPTERS, GROUP, ROWS, LENGTH, STEPS = 5, 2, 23, 9, 20


def results():
    """Adapters evaluated and trained in groups, and one trained on uneven parts of uneven batches."""
    from helpers import llama, quantized, randomized  # not for those that are killed: it takes seconds

    apply, params, frozen, _ = vf.adapt(
        quantized(llama(), "nested"), vf.VeraConfig(r=8, target_modules=["q_proj", "v_proj"])
    )
    stacked = vf.stack_adapters([randomized(params, seed) for seed in range(ADAPTERS)])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 67, (ROWS, LENGTH), generator=generator)
    real = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (ROWS, 1), generator=generator)
    many = vf.vmap_adapters(lambda p, f, ids: apply(p, f, input_ids=ids).logits, in_dims=None)

    def group(i):
        return {key: leaf[i : i + GROUP] for key, leaf in stacked.items()}

    def losses(params, step):
        rows = ids[batch_indices(step, num_examples=ROWS, batch_size=6, key=0)]
        logits = many(params, frozen, rows)[..., :-1, :]  # (n, rows, tokens - 1, vocab)
        wanted = rows[:, 1:].expand(logits.shape[:-1])
        return cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view(len(logits), -1).mean(1)

    def loss(params, rows):
        logits = apply(params, frozen, input_ids=ids[rows], attention_mask=real[rows].long()).logits
        return cross_entropy(logits[:, :-1][real[rows][:, 1:]], ids[rows][:, 1:][real[rows][:, 1:]])

    def tokens(rows):
        return int(real[rows][:, 1:].sum())

    def batch(step):  # the last one of an epoch is smaller
        return batch_indices(step, num_examples=ROWS, batch_size=7, key=1)

    starts = range(0, ADAPTERS, GROUP)
    train = partial(vf.fit, steps=STEPS, learning_rate=2e-2, max_norm=1.0, progress=False)
    by_adapter = map_sharded(
        lambda i: train(losses, group(i), int, num_adapters=num_adapters(group(i)), steps=4), starts
    )
    by_part = train(
        loss, params, lambda step: batch(step).split(2), accumulate=partial(mean_over_micro_batches, weight=tokens)
    )
    evolved = vf.evolve(
        lambda stacked: -losses(stacked, 0), params, steps=3, sigma=0.05, learning_rate=0.1, seed=0, population=10,
        chunk_size=4,
    )  # fmt: skip
    with torch.no_grad():
        logits = map_sharded(lambda i: many(group(i), frozen, ids[:4]), starts)
    found = {
        "logits": torch.cat(logits),
        "furthest": torch.tensor(furthest(rank(), rank())),
        "lazily": torch.tensor(map_sharded(lambda i: 10 * i, (i for i in range(7)))),
        **{f"adapters.{key}": torch.cat([run.params[key] for run in by_adapter]) for key in params},
        **{f"evolved.{key}": leaf for key, leaf in evolved.params.items()},
        "evolved.fitness": evolved.fitness,
        **{f"parts.{key}": leaf for key, leaf in by_part.params.items()},
        "parts.losses": by_part.losses,
    }
    # What it should be near: whole batches, a mean over all real tokens.
    return found, train(loss, params, batch) if rank() == 0 else None


def killed_at(whole, step, who):
    """Batches, or their rows, that kill process `who` of the first attempt when it asks for this step."""

    def ordered(*args, **options):
        batches = whole(*args, **options)

        def batch(i):
            if rank() == 0:
                print(f"asked for step {i}.", file=sys.stderr)
            if (i, rank(), os.environ.get("TORCHELASTIC_RESTART_COUNT")) == (step, who, "0"):
                os.kill(os.getpid(), signal.SIGKILL)
            return batches(i)

        return batch

    return ordered


def missing(what, who):
    """Items of which one process never finishes its third."""

    def item(i):
        if rank() == who and i // 3 == 2:
            if what == "fail":
                raise ValueError("this rank fails")
            time.sleep(600)
        return i

    with process_group(timeout=5.0):
        map_sharded(item, range(12))


def assert_no_threads_of_gloo():
    """They would abort the process now and then when it ends."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name], names


if __name__ == "__main__":
    what, where, *line = sys.argv[1:]
    if what in ("hang", "fail"):
        missing(what, int(where))
    if what == "kill":
        loop.CHECKPOINT_EVERY = selection.CHECKPOINT_EVERY = 4
        when = [int(number) for number in where.split(",")]
        labels.batch_order = killed_at(labels.batch_order, *when)
        selection.train_batches = killed_at(selection.train_batches, *when)
        sys.exit(cli.main(line))
    torch.set_num_threads(1)
    status = cli.main(line)
    assert_no_threads_of_gloo()
    with process_group():  # a second time, in the store that the first one left
        found, _ = results()
        save_file({key: value.contiguous() for key, value in found.items()}, f"{where}/{rank()}.safetensors")
    assert_no_threads_of_gloo()
    sys.exit(status)
