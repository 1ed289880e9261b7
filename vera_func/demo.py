"""The main job from end to end: a quantized language model, a VeRA adapter, held-out accuracy.

frozen nf4 model -> adapt -> fit with torch.func.grad -> PEFT directory -> loaded back, same logits

With N adapters, a sweep comes first: all N train in one run for half as many steps, on the same texts, in batches of
2 / N times the size, so that together they are twice as many rows as one adapter's. Then the one that answers best on
texts kept for this choice goes on alone for all its steps with full batches, its optimizer and schedule as they are.
So the training costs twice that of one adapter and the choice, whatever N is, up to twice the batch size.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .assets import load_snippets
from .bank import save_bank
from .checkpoint import load_adapter, save_adapter
from .config import VeraConfig
from .examples import Example, polar_examples, read_examples, split
from .many import stack_adapters
from .model import Adapted, adapt
from .optim import linear_warmup_cosine
from .pretrained import (
    Note,
    describe_base,
    load_base,
    native_dtype as native_dtype,
    quantize_model as quantize_model,
    write_note,
)
from .report import bar, format_table
from .sentiment import PROMPT, Batch, Encoded, collate, train_batches
from .task import Task, check_prompt, encode_examples, fit_row, logits_of, loss_of, make_task, score_of
from .train import Fit, fit, sweep, sweep_table


HELD_OUT, CHOOSING, MAX_STEPS, MIN_STEPS = 1000, 200, 100, 50
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
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"out must be a folder, or not there yet; {out} is a file.")
    # The cheap steps first: a bad row should not cost the time to load a model.
    examples = demo_examples() if data is None else read_examples(data)
    train, test = split_examples(examples, HELD_OUT, seed=seed)
    train, choosing = (train, []) if adapters == 1 else split_examples(train, CHOOSING, seed=seed)
    if len(train) < batch_size:
        raise ValueError(f"{len(train)} examples to train on do not fill a batch of {batch_size}.")
    base = load_base(model, quant, dtype)
    say(describe_base(base))
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
    before = score_of(adapted, task, adapted.params, rows, progress=bar("before", progress)).accuracy.item()
    say(f"Before: {before:.1%} of {len(test):,} held-out texts answered rightly.")

    steps = steps or min(max(len(train) // batch_size, MIN_STEPS), MAX_STEPS)
    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed, "progress": progress}
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
    after = score_of(adapted, task, params, rows, progress=bar("after", progress)).accuracy.item()
    say(f"After: {after:.1%} of the same {len(test):,}.")

    note = Note(base.quant, task.labels, task.prompt)
    save_adapter(out, params, adapted.frozen, config)
    write_note(out, note)
    batch = collate(rows[:batch_size], task.pad_id)
    difference = _reload_difference(out, adapted, task, params, batch)
    say(f"Saved in {out}, loaded back: the logits differ by at most {difference:.1g}.")
    bank = None
    if found is not None:
        names = [row["name"] for row in found.table]
        bank = save_bank(Path(out) / BANK, found.stacked, adapted.frozen, adapted.config, names)
        write_note(bank, note)
        say(f"All {adapters} are in {bank}: vera-func evaluate --bank {bank}")
    say(f"Next: vera-func inspect {out}; vera-func generate --adapter {out} 'One day'; vera-func train --help")
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
) -> dict[str, Tensor]:
    """The params after training on these rows."""
    batches = train_batches(train, batch_size, seed=seed, pad_id=task.pad_id)
    run = _fit(loss_of(adapted, task), adapted.params, batches, learning_rate, steps, steps, progress)
    return run.params


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

    Raises:
        RuntimeError: If all diverged.
    """
    half = max(1, steps // 2)
    n, rates = len(grid), [row["learning_rate"] for row in grid]
    small, full = (
        train_batches(train, size, seed=seed, pad_id=task.pad_id) for size in (small_batch(batch_size, n), batch_size)
    )
    start = stack_adapters([_start(adapted.params, row["d_initial"]) for row in grid])
    run = _fit(loss_of(adapted, task, stacked=True), start, small, rates, half, half + steps, progress, num_adapters=n)
    options = {"batch_size": max(1, 256 // n), "progress": bar("choosing", progress)}
    score = score_of(adapted, task, run.params, choosing, **options)
    loss = torch.where(run.diverged, torch.inf, score.loss).nan_to_num(nan=torch.inf)
    row = int(loss.argmin())
    if run.diverged[row]:
        raise RuntimeError(f"every adapter diverged: lower the learning rate, which went from {min(rates)} on.")
    one = fit_row(run, row)
    one = _fit(loss_of(adapted, task), one.params, full, rates[row], half + steps, half + steps, progress, resume=one)
    stacked = {k: torch.cat([v[:row], one.params[k][None], v[row + 1 :]]) for k, v in run.params.items()}
    names = [f"lr{start['learning_rate']:.2g}-d{start['d_initial']:.2g}" for start in grid]
    table = sweep_table(grid, {"name": names, "loss": score.loss, "accuracy": score.accuracy})
    return Sweep(one.params, row, stacked, [{"name": line["name"], **line} for line in table])


def _fit(
    loss: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    batches: Callable[[int], Batch],
    learning_rate: Any,
    steps: int,
    total: int,
    progress: bool,
    **options: Any,
) -> Fit:
    schedule = partial(linear_warmup_cosine, warmup=0, total=total)
    options |= {"steps": steps, "learning_rate": learning_rate, "schedule": schedule, "progress": progress}
    return fit(loss, params, batches, max_norm=1.0, **options)


def _start(params: Mapping[str, Tensor], d_initial: float) -> dict[str, Tensor]:
    return {k: torch.full_like(v, d_initial) if k.endswith("lambda_d") else v for k, v in params.items()}


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
