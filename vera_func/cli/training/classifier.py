"""Train a VeRA adapter of a quantized language model to classify texts, and measure the accuracy of the adapter.

The command `demo` calls this module, and so does `train` for a single data set with labels. An interrupted run resumes
from the checkpoint `OUT.training-<hash>`, which is deleted on success.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.examples import Example, demo_examples, read_examples, split_examples
from ...data.metadata import Metadata, write_metadata
from ...data.models import describe_base, load_base
from ...data.prompts import MAX_TOKENS, PROMPT, Batch, Encoded, collate
from ...data.task import Task, check_prompt, encode_examples, logits_of, make_task, score_of
from ...io.bank import save_bank
from ...io.checkpoint import load_adapter, save_adapter
from ...model.adapt import Adapted
from ...model.config import VeraConfig
from ...train.distributed import map_sharded, rank, world_size
from ..report import bar, format_table, percent
from .jobs import num_steps
from .outputs import BANK, checkpoint_path, classifier_metadata, delete_checkpoints, new_adapter, output_folder
from .selection import Sweep, small_batch, sweep_grid, train_one, train_sweep
from .settings import Recipe, micro_batches


VALIDATION = 200


class DemoResult(NamedTuple):
    """Measurements of a run.

    Attributes:
        before: Accuracy of the base model on the held-out examples.
        after: Accuracy of the trained adapter on the held-out examples; in a sweep, accuracy of the best adapter.
        held_out: Number of held-out examples.
        trained: Number of trained parameters per adapter.
        seconds: Training time in seconds; in a sweep, including the time for validation.
        difference: Largest absolute difference between the adapter's logits before saving and after loading.
        out: Folder of the saved adapter.
        bank: For a sweep, the path of the bank of all adapters.
        sweep: For a sweep, the hyper-parameters, validation loss and validation accuracy of each adapter.
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


class Trained(NamedTuple):
    """The trained adapter and its configuration. After a sweep, the best adapter, and the results of all adapters."""

    params: dict[str, Tensor]
    config: VeraConfig
    sweep: Sweep | None = None


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
    device: str = "auto",
    epochs: float | None = None,
    recipe: Recipe | None = None,
    max_length: int = MAX_TOKENS,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Quantize a language model, train a VeRA adapter that classifies texts, save the adapter and load it again.

    A fifth of the examples, at most 1,000, is held out.

    Args:
        model, quant, dtype, device: As for `load_base`.
        data: Labelled examples, as for `read_examples`; None means rated snippets of movie reviews from PyPI.
        r: Rank of the projections.
        targets: Suffixes of the names of the layers to adapt; None means PEFT's default for the model type.
        steps, epochs: Number of training steps, or number of passes over the training examples; see `num_steps`.
        adapters: Number of adapters to train. Several adapters are trained as a sweep; see the module `training`.
        out: Folder for the adapter, in PEFT's format, and for the bank of a sweep.
        seed: Seed of the held-out split, of the order of the examples, and of the projections.
        learning_rate: Peak of the learning rate; VeRA needs a large value, such as 2e-2. A sweep tries learning rates
            from a quarter of `learning_rate` to twice `learning_rate`.
        batch_size: Number of examples per training step.
        parts: Number of micro-batches per step; None means 4 under torchrun, else 1.
        prompt: Prompt template that contains `{text}` and ends where the label begins.
        recipe: Other options of training; the fields `batch_size`, `micro_batches` and `seed` are ignored. A sweep
            supports only the option `dora`.
        max_length: Maximum number of tokens of a prompt; the text of a longer prompt is truncated at the end.
        progress: Whether to show progress bars.
        say: Function that is called with each line of the log.

    Raises:
        ValueError: If an option or the data is invalid.
        OSError: If a file or the model is not found, or if the machine is offline (ConnectionError).
        RuntimeError: If every adapter of a sweep diverged, or if the logits of the loaded adapter differ from those of
            the saved adapter.
    """
    check_prompt(prompt)
    if rank() > 0:
        progress, say = False, lambda line: None
    out = output_folder(out)
    # Read the data first, so that an invalid row is reported before a model is loaded.
    examples = demo_examples() if data is None else read_examples(data)
    train, validation, test = _split(examples, adapters, batch_size, seed, data)
    steps = num_steps(len(train) // batch_size, [steps] if steps else None, epochs, 0, 1)
    recipe = recipe or Recipe()
    of_run = Recipe(batch_size, micro_batches(parts), seed=seed, dora=recipe.dora)
    recipe = _checked(recipe, of_run, adapters)
    base = load_base(model, quant, dtype, max_tokens=max_length, device=device)
    say(describe_base(base))
    task = make_task(base, sorted({example.label for example in examples}), prompt)._replace(max_tokens=max_length)
    adapted = new_adapter(base, r, targets, recipe)
    rows = encode_examples(base, task, test)
    measure = partial(score_of, adapted, task, rows=rows, map=map_sharded)
    before = measure(adapted.params, progress=bar("before", progress)).accuracy.item()
    say(f"Before: accuracy {percent(before, 1)} on {len(test):,} held-out examples.")
    options: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate}
    state = (base.name, base.quant, base.dtype, adapted.config, options, recipe._replace(log=None), adapters)
    checkpoint = checkpoint_path(out, *state, prompt, max_length, examples)
    options |= {"checkpoint": checkpoint, "progress": progress}
    start = time.perf_counter()
    train_rows, validation_rows = (encode_examples(base, task, s) if s else rows for s in (train, validation))
    trained = _train(adapted, task, train_rows, validation_rows, adapters, say, recipe, **options)
    seconds, leaves = time.perf_counter() - start, trained.params.values()
    values, size = sum(leaf.numel() for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    say(f"Trained {values:,} parameters ({size / 1024:,.0f} KiB) in {steps} steps and {seconds:.0f} s.")
    after = measure(trained.params, progress=bar("after", progress)).accuracy.item()
    say(f"After: accuracy {percent(after, 1)} on the same examples.")
    metadata = classifier_metadata(base, task.prompt, max_length)._replace(labels=task.labels)
    save = partial(_save_and_reload, out, adapted, trained, task, collate(rows[:batch_size], task.pad_id))
    (difference,) = map_sharded(save, [metadata])  # on rank 0
    delete_checkpoints(checkpoint)
    bank, table = (None, None) if trained.sweep is None else (out / BANK, trained.sweep.table)
    result = DemoResult(before, after, len(test), values, seconds, difference, out, bank, table)
    _say_where(result, adapters, say)
    return result


def _say_where(result: DemoResult, adapters: int, say: Callable[[str], None]) -> None:
    out, bank = result.out, result.bank
    say(f"Saved in {out} and loaded again: the logits differ by at most {result.difference:.1g}.")
    if bank is not None:
        say(f"All {adapters} adapters are in {bank}: vera-func evaluate --bank {bank}")
    following = (f"inspect {out}", f"predict --adapter {out} 'A new text.'", "train --help")
    say("\n  vera-func ".join(["Next:", *following]))


def _split(
    examples: Sequence[Example], adapters: int, batch_size: int, seed: int, source: str | Path | None
) -> list[list[Example]]:
    """Split examples into training examples, validation examples (none without a sweep) and held-out examples."""
    train, test = split_examples(examples, seed=seed, source=source)
    train, validation = (train, []) if adapters == 1 else split_examples(train, VALIDATION, seed=seed)
    if len(train) < batch_size:
        where = "" if source is None else f"{source}: "
        raise ValueError(
            f"{where}{len(train)} training examples do not fill a batch of {batch_size} ({len(test)} more are held "
            f"out): pass --batch-size {len(train)} or less."
        )
    return [train, validation, test]


def _checked(recipe: Recipe, of_run: Recipe, adapters: int) -> Recipe:
    """The recipe with the batch size, micro-batches and seed of `of_run`; raise if options exclude each other."""
    recipe = recipe._replace(batch_size=of_run.batch_size, micro_batches=of_run.micro_batches, seed=of_run.seed)
    if adapters > 1 and recipe != of_run:
        given = [field for field in Recipe._fields if getattr(recipe, field) != getattr(of_run, field)]
        options = ", ".join(f"--{field.replace('_', '-')}" for field in given)
        raise ValueError(
            f"--adapters starts a sweep, which does not support {options}: leave out --adapters, or {options}."
        )
    if recipe.checkpointing and recipe.dropout:
        raise ValueError("--checkpointing can't be combined with --dropout: leave out --checkpointing or --dropout.")
    return recipe


def _train(
    adapted: Adapted,
    task: Task,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    adapters: int,
    say: Callable[[str], None],
    recipe: Recipe,
    *,
    learning_rate: float,
    **options: Any,
) -> Trained:
    if world_size() > recipe.micro_batches:
        say(f"Only {recipe.micro_batches} of {world_size()} ranks have a micro-batch: pass --parts {world_size()}.")
    if adapters == 1:
        params = train_one(adapted, task, train, validation, recipe, learning_rate=learning_rate, **options)
        return Trained(params, adapted.config)
    steps, batch_size = options["steps"], recipe.batch_size
    options |= {"batch_size": batch_size, "seed": recipe.seed, "parts": recipe.micro_batches}
    say(
        f"Sweep: {adapters} adapters in one run, {max(1, steps // 2)} steps of {small_batch(batch_size, adapters)} "
        f"examples each; the best on {len(validation)} validation examples then trains alone for {steps} steps."
    )
    found = train_sweep(adapted, task, sweep_grid(adapters, learning_rate), train, validation, **options)
    best = found.table[found.row]
    say(format_table(found.table))
    say(f"Best: {best['name']}, which then trained alone with {batch_size} examples per step.")
    return Trained(found.best, dataclasses.replace(adapted.config, d_initial=best["d_initial"]), found)


def _save_and_reload(
    out: Path, adapted: Adapted, trained: Trained, task: Task, batch: Batch, metadata: Metadata
) -> float:
    """Save the adapter (and the bank of a sweep), load the adapter, and return the largest change of its logits."""
    save_adapter(out, trained.params, adapted.frozen, trained.config)
    write_metadata(out, metadata)
    if trained.sweep is not None:
        names = [row["name"] for row in trained.sweep.table]
        write_metadata(save_bank(out / BANK, trained.sweep.stacked, adapted.frozen, adapted.config, names), metadata)
    loaded = load_adapter(out, adapted.apply.model, product_dtype=adapted.apply.product_dtype)
    with torch.no_grad():
        expected = logits_of(adapted, task)(trained.params, batch)
        got = logits_of(loaded, task)(loaded.params, batch)
    difference = (got - expected).abs().max().item()
    if not difference <= 1e-3 * expected.abs().max().item():
        raise RuntimeError(
            f"saving the adapter to {out} and loading it again changed the logits by up to {difference:.3g}: another "
            "process may have changed the files; run the command again."
        )
    return difference
