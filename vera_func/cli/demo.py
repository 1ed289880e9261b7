"""The main job from end to end: a quantized language model, a VeRA adapter, held-out accuracy.

frozen nf4 model -> adapt -> fit with torch.func.grad -> PEFT directory -> loaded back, same logits

With N adapters, a sweep comes first: all N train in one run for half as many steps, on the same texts, in batches of
2 / N times the size, so that together they are twice as many rows as one adapter's. Then the one that answers best on
texts kept for this choice goes on alone for all its steps with full batches, its optimizer and schedule as they are.
So the training costs twice that of one adapter and the choice, whatever N is, up to twice the batch size.

The work is cut into `parts`, which several processes share: the rows of a batch of one adapter, or the adapters of a
sweep. The result depends on the number of parts, by rounding, and not on that of processes. A run that was interrupted
goes on from its last checkpoint, which lies beside the folder of the result until that is there.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.keys import split_key
from ..data.assets import load_snippets
from ..data.examples import Example, polar_examples, read_examples, split
from ..data.models import Note, describe_base, load_base, native_dtype as native_dtype, write_note
from ..data.prompts import PROMPT, Batch, Encoded, collate, num_rows, split_batch, train_batches
from ..data.task import Task, check_prompt, encode_examples, logits_of, loss_of, make_task, score_of
from ..io.bank import save_bank
from ..io.checkpoint import load_adapter, save_adapter
from ..model.adapt import Adapted, adapt
from ..model.batch import num_adapters, stack_adapters
from ..model.config import VeraConfig
from ..model.convert import quantize_model as quantize_model
from ..train.distributed import furthest, map_sharded, mean_over_micro_batches, rank, under_torchrun, world_size
from ..train.fit import Fit, fit, load_fit
from ..train.optim import linear_warmup_cosine
from ..train.sweep import fit_row, join_fits, sweep, sweep_table
from .report import bar, format_table


HELD_OUT, CHOOSING, MAX_STEPS, MIN_STEPS = 1000, 200, 100, 50
PARTS, CHECKPOINT_EVERY = 4, 10
BANK = "bank.safetensors"


class DemoResult(NamedTuple):
    """What a demo measured.

    Attributes:
        before: Share of held-out examples that the model answers rightly without an adapter.
        after: The same with the trained adapter, the best one of a sweep.
        held_out: Number of those examples.
        trained: Number of trained values of an adapter.
        seconds: Duration of the training, and in a sweep of the choice, too.
        difference: Largest absolute difference between logits before saving and after loading.
        out: Where the adapter lies.
        bank: Where all adapters of a sweep lie.
        sweep: A row for each of its adapters: how it started, and how it answered when the choice was made.
    """

    before: float
    after: float
    held_out: int
    trained: int
    seconds: float
    difference: float
    out: Path
    bank: Path | None = None
    sweep: list[dict[str, Any]] | None = None


class Sweep(NamedTuple):
    """What `train_sweep` gave.

    Attributes:
        best: Params of the best adapter, which went on alone.
        row: Which one that is.
        stacked: All of them as their training ended, the best one included.
        table: A row for each: name, how it started, and its loss and accuracy when the choice was made.
    """

    best: dict[str, Tensor]
    row: int
    stacked: dict[str, Tensor]
    table: list[dict[str, Any]]


def demo(
    *,
    model: str | None = None,
    data: str | Path | None = None,
    quant: str | None = None,
    r: int = 256,
    targets: Sequence[str] | None = None,
    steps: int | None = None,
    adapters: int = 1,
    out: str | Path = "vera-demo",
    seed: int = 0,
    learning_rate: float = 2e-2,
    batch_size: int = 16,
    parts: int | None = None,
    dtype: torch.dtype | None = None,
    prompt: str = PROMPT,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Quantize a causal language model, train a VeRA adapter to classify texts, save and reload it.

    Held out are 1,000 examples, or a fifth of them if there are fewer than 5,000.

    Args:
        model: A local folder or a hub id; None is SmolLM2-135M-Instruct, from PyPI.
        data: A JSONL or CSV file with text and label; None is rated movie snippets, from PyPI.
        quant: "nf4", "fp4", "int8" or "none"; None is the model's own format, or nf4.
        r: Rank of the projections.
        targets: Ends of names of the modules to adapt; None is PEFT's choice for the model type.
        steps: Training steps; None is one epoch, but between 50 and 100.
        adapters: How many to train; more than one are a sweep before these steps, see the module.
        out: Folder for the adapter, in PEFT's format, and for the bank of a sweep.
        seed: Of the split, the order and the projections.
        learning_rate: At the beginning; it falls along a cosine. VeRA wants a large one. A sweep goes
            from a quarter to twice this.
        batch_size: Examples in a step.
        parts: How many processes can share the work; None is 4 under `torchrun`, and 1 alone.
        dtype: Of what is not quantized, and of the arithmetic; None is `native_dtype()`.
        prompt: With `{text}` in it; the label is the word that follows.
        progress: Shows progress bars.
        say: What to do with each line of the report.

    Raises:
        ValueError: If an option or the data cannot be used.
        OSError: If a file, the model, or (ConnectionError) the network is missing.
        RuntimeError: If every adapter of a sweep diverged, or the loaded one does not give the logits of the saved one.
    """
    check_prompt(prompt)
    if rank() > 0:
        progress, say = False, lambda line: None
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"out must be a folder, or not there yet; {out} is a file.")
    # The cheap steps first: a bad row should not cost the time to load a model.
    examples = demo_examples() if data is None else read_examples(data)
    train, test = split_examples(examples, HELD_OUT, seed=seed)
    train, choosing = (train, []) if adapters == 1 else split_examples(train, CHOOSING, seed=seed)
    if len(train) < batch_size:
        raise ValueError(f"{len(train)} examples to train on do not fill a batch of {batch_size}.")
    parts = parts or (PARTS if under_torchrun() else 1)
    base = load_base(model, quant, dtype)
    say(describe_base(base))
    if world_size() > parts:
        say(f"Only {parts} of {world_size()} processes have something to do: pass --parts {world_size()}.")
    task = make_task(base, sorted({example.label for example in examples}), prompt)
    config = VeraConfig(
        base_model_name_or_path=base.name,
        task_type="CAUSAL_LM",
        r=r,
        target_modules=list(targets) if targets is not None else None,
        projection_prng_key=seed,
    )
    adapted = adapt(base.model, config)
    rows = encode_examples(base, task, test)
    measure = partial(score_of, adapted, task, rows=rows, map=map_sharded)
    before = measure(adapted.params, progress=bar("before", progress)).accuracy.item()
    say(f"Before: {before:.1%} of {len(test):,} held-out texts answered rightly.")

    steps = steps or min(max(len(train) // batch_size, MIN_STEPS), MAX_STEPS)
    # A checkpoint of another run, with other options or data, is none of this one.
    run = (base.name, base.quant, base.dtype, adapted.config, steps, adapters, learning_rate, batch_size, parts, prompt)
    name = hashlib.sha256(repr((*run, seed, examples)).encode()).hexdigest()[:16]
    checkpoint = Path(f"{Path(out)}.training-{name}")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed, "progress": progress}
    options |= {"parts": parts, "checkpoint": checkpoint}
    start, found = time.perf_counter(), None
    encoded = encode_examples(base, task, train)
    if adapters == 1:
        params = train_one(adapted, task, encoded, learning_rate=learning_rate, **options)
        config = adapted.config
    else:
        say(
            f"Sweep: {adapters} adapters in one run, {max(1, steps // 2)} steps on the same texts, "
            f"{small_batch(batch_size, adapters)} at a time; the best on {len(choosing)} others goes on for {steps}."
        )
        grid = sweep_grid(adapters, learning_rate)
        found = train_sweep(adapted, task, grid, encoded, encode_examples(base, task, choosing), **options)
        params, best = found.best, found.table[found.row]
        config = dataclasses.replace(adapted.config, d_initial=best["d_initial"])
        say(format_table(found.table))
        say(f"Best: {best['name']}, which went on alone, {batch_size} texts at a time.")
    seconds = time.perf_counter() - start
    values = sum(leaf.numel() for leaf in params.values())
    size = sum(leaf.numel() * leaf.element_size() for leaf in params.values())
    say(f"Trained {values:,} numbers ({size / 1024:,.0f} KiB) in {steps} steps and {seconds:.0f} s.")
    after = measure(params, progress=bar("after", progress)).accuracy.item()
    say(f"After: {after:.1%} of the same {len(test):,}.")

    def write(note: Note) -> float:
        save_adapter(out, params, adapted.frozen, config)
        write_note(out, note)
        if found is not None:
            names = [row["name"] for row in found.table]
            write_note(save_bank(Path(out) / BANK, found.stacked, adapted.frozen, adapted.config, names), note)
        return _reload_difference(out, adapted, task, params, collate(rows[:batch_size], task.pad_id))

    (difference,) = map_sharded(write, [Note(base.quant, task.labels, task.prompt)])  # the first process does it
    # Also what a process that was killed had begun to write.
    for file in (*checkpoint.parent.glob(f"{checkpoint.name}*"), *checkpoint.parent.glob(f".{checkpoint.name}*")):
        file.unlink(missing_ok=True)
    say(f"Saved in {out}, loaded back: the logits differ by at most {difference:.1g}.")
    bank = None if found is None else Path(out) / BANK
    if bank is not None:
        say(f"All {adapters} are in {bank}: vera-func evaluate --bank {bank}")
    say(f"Next: vera-func inspect {out}; vera-func predict --adapter {out} 'A new text.'; vera-func train --help")
    return DemoResult(
        before, after, len(test), values, seconds, difference, Path(out), bank, found.table if found else None
    )


def demo_examples() -> list[Example]:
    """The demo's texts: movie snippets that are clearly positive or negative."""
    return polar_examples(load_snippets("movie"))


def split_examples(examples: Sequence[Example], most: int, *, seed: int) -> tuple[list[Example], list[Example]]:
    """What to train on, and the part held out from it: `most` examples, or a fifth if that is less."""
    return split(examples, min(most, -(-len(examples) // 5)), seed=seed)


def train_one(
    adapted: Adapted,
    task: Task,
    train: Sequence[Encoded],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    progress: bool,
    parts: int = 1,
    checkpoint: Path | None = None,
) -> dict[str, Tensor]:
    """The params after training on these rows."""
    batches = train_batches(train, batch_size, seed=seed, pad_id=task.pad_id)
    return _fit_parts(
        loss_of(adapted, task),
        adapted.params,
        batches,
        parts,
        checkpoint,
        learning_rate=learning_rate,
        steps=steps,
        total=steps,
        progress=progress,
    ).params


def sweep_grid(adapters: int, learning_rate: float) -> list[dict[str, Any]]:
    """How each adapter of a sweep starts: two values of `d_initial` times learning rates, or these alone if odd.

    The projections, VeRA's seed, are shared by all; what is left to start with is the scale of `lambda_d`.

    Example:
        >>> [tuple(row.values()) for row in sweep_grid(4, 0.02)]
        [(0.005, 0.1), (0.005, 0.5), (0.04, 0.1), (0.04, 0.5)]
    """
    scales = [0.1, 0.5] if adapters % 2 == 0 else [0.1]
    count = adapters // len(scales)
    powers = [-2 + 3 * i / (count - 1) for i in range(count)] if count > 1 else [0.0]
    return sweep({"learning_rate": [learning_rate * 2**power for power in powers], "d_initial": scales})


def small_batch(batch_size: int, adapters: int) -> int:
    """Texts for each adapter in a step of a sweep: all together have twice the rows of one alone.

    Example:
        >>> small_batch(16, 8)
        4
    """
    return max(1, 2 * batch_size // adapters)


def train_sweep(
    adapted: Adapted,
    task: Task,
    grid: Sequence[Mapping[str, Any]],
    train: Sequence[Encoded],
    choosing: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    progress: bool,
    parts: int = 1,
    checkpoint: Path | None = None,
) -> Sweep:
    """Train all for half as many steps in one run, and then the best one for all its steps; see the module.

    Args:
        adapted: From `adapt`.
        task: What to answer.
        grid: From `sweep_grid`, a row for each adapter.
        train: Rows to train on.
        choosing: Other rows: the adapter with the least mean loss on them is the best.
        steps: Of the best one when it is alone; before, all of them make half as many.
        batch_size: Of the best one when it is alone.
        seed: Of the order.
        progress: Shows progress bars.
        parts: How many groups of adapters train, each in one run of its own, and parts of a batch of the best one.
        checkpoint: What the names of the files that hold the runs begin with.

    Raises:
        RuntimeError: If all diverged.
    """
    half = max(1, steps // 2)
    n, rates = len(grid), [row["learning_rate"] for row in grid]
    small, full = (
        train_batches(train, size, seed=seed, pad_id=task.pad_id) for size in (small_batch(batch_size, n), batch_size)
    )
    start = stack_adapters([_start(adapted.params, row["d_initial"]) for row in grid])
    size = -(-n // parts)
    groups = [slice(i, i + size) for i in range(0, n, size)]
    stacks = [{k: leaf[group] for k, leaf in start.items()} for group in groups]
    files = [checkpoint and checkpoint.with_name(f"{checkpoint.name}-{i}") for i in range(len(groups))]
    # By all processes, before each goes its own way.
    runs = [_resume(file, stack, num_adapters(stack)) for file, stack in zip(files, stacks, strict=True)]
    common: dict[str, Any] = {"total": half + steps, "progress": progress}

    def train_group(i: int) -> Fit:
        options = {"resume": runs[i], "checkpoint": files[i], "num_adapters": num_adapters(stacks[i]), **common}
        loss = loss_of(adapted, task, stacked=True)
        return _fit(loss, stacks[i], small, learning_rate=rates[groups[i]], steps=half, **options)

    run = join_fits(map_sharded(train_group, range(len(groups))))
    options = {"batch_size": max(1, 256 // n), "progress": bar("choosing", progress), "map": map_sharded}
    score = score_of(adapted, task, run.params, choosing, **options)
    loss = torch.where(run.diverged, torch.inf, score.loss).nan_to_num(nan=torch.inf)
    row = int(loss.argmin())
    if run.diverged[row]:
        raise RuntimeError(f"every adapter diverged: lower the learning rate, which went from {min(rates)} on.")
    one, alone = fit_row(run, row), loss_of(adapted, task)
    common |= {"learning_rate": rates[row], "steps": half + steps}
    one = _fit_parts(alone, one.params, full, parts, checkpoint, resume=one, **common)
    stacked = {k: torch.cat([v[:row], one.params[k][None], v[row + 1 :]]) for k, v in run.params.items()}
    names = [f"lr{start['learning_rate']:.2g}-d{start['d_initial']:.2g}" for start in grid]
    table = sweep_table(grid, {"name": names, "loss": score.loss, "accuracy": score.accuracy})
    return Sweep(one.params, row, stacked, [{"name": line["name"], **line} for line in table])


def _fit(
    loss: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    batches: Callable[[int], Any],
    *,
    total: int,
    **options: Any,
) -> Fit:
    schedule = partial(linear_warmup_cosine, warmup=0, total=total)
    return fit(loss, params, batches, schedule=schedule, max_norm=1.0, checkpoint_every=CHECKPOINT_EVERY, **options)


def _fit_parts(
    loss: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    batches: Callable[[int], Batch],
    parts: int,
    checkpoint: Path | None,
    *,
    resume: Fit | None = None,
    **options: Any,
) -> Fit:
    """A run whose steps are shared by all processes; the first of them writes the checkpoint."""
    options |= {"resume": _resume(checkpoint, params) or resume, "checkpoint": None if rank() else checkpoint}
    accumulate = partial(mean_over_micro_batches, weight=num_rows)
    return _fit(loss, params, lambda step: split_batch(batches(step), parts), accumulate=accumulate, **options)


def _resume(checkpoint: Path | None, params: Mapping[str, Tensor], num_adapters: int | None = None) -> Fit | None:
    """The run in the file, from whichever process has it: not all machines need to see the same folder."""
    run = None
    if checkpoint is not None and checkpoint.is_file():
        run = load_fit(checkpoint, params, num_adapters=num_adapters)
    return furthest(run, -1 if run is None else len(run.losses))


def _start(params: Mapping[str, Tensor], d_initial: float) -> dict[str, Tensor]:
    return {k: torch.full_like(v, d_initial) if split_key(k)[1] == "lambda_d" else v for k, v in params.items()}


def _reload_difference(
    path: str | Path, adapted: Adapted, task: Task, params: dict[str, Tensor], batch: Batch
) -> float:
    loaded = load_adapter(path, adapted.apply.model)
    with torch.no_grad():
        expected = logits_of(adapted, task)(params, batch)
        got = logits_of(loaded, task)(loaded.params, batch)
    difference = (got - expected).abs().max().item()
    if not difference <= 1e-3 * expected.abs().max().item():
        raise RuntimeError(
            f"the adapter loaded from {path} gives other logits than the trained one, by up to "
            f"{difference:.3g}: the file or the model changed in between."
        )
    return difference
