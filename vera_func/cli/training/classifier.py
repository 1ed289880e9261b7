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
from .jobs import num_steps, value_of
from .labels import train_classifiers
from .outputs import BANK, checkpoint_path, classifier_metadata, delete_checkpoints, new_adapter, output_folder
from .selection import Sweep, small_batch, sweep_grid, train_sweep
from .settings import Recipe, Run


VALIDATION = 200


class ClassifierResult(NamedTuple):
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
    """The trained adapter and its configuration; in a sweep, the best adapter. `sweep` contains all adapters."""

    params: dict[str, Tensor]
    config: VeraConfig
    sweep: Sweep | None = None


def train_classifier(
    run: Run,
    *,
    data: str | Path | None = None,
    prompt: str = PROMPT,
    adapters: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> ClassifierResult:
    """Quantize a language model, train a VeRA adapter that classifies texts, save the adapter and load it again.

    A fifth of the examples, at most 1,000, is held out.

    Args:
        run: Options of the run. A sweep supports only these options of `run.recipe`: `batch_size`, `micro_batches`,
            `seed` and `dora`. VeRA needs a large learning rate, such as 2e-2. A sweep tries learning rates from a
            quarter of the given rate to twice the given rate. If `run.max_length` is None, prompts have at most 256
            tokens; the text of a longer prompt is truncated at the end.
        data: Path or hub id of labelled examples (see `read_examples`); None means rated movie reviews from PyPI.
        prompt: Prompt template that contains `{text}` and ends where the label begins.
        adapters: Number of adapters to train. Several adapters are trained as a sweep; see the module `selection`.
        progress: Whether to show progress bars.
        say: Function that is called with each line of the log.

    Raises:
        ValueError: If an option or the data is invalid.
        OSError: If a file or the model is not found, or if the machine is offline (ConnectionError).
        RuntimeError: If every adapter of a sweep diverged, or if the logits of the loaded adapter differ from those of
            the saved adapter.
    """
    if rank() > 0:
        progress, say = False, lambda line: None
    recipe, out, max_length = run.recipe, output_folder(run.out), run.max_length or MAX_TOKENS
    _require_supported(recipe, adapters)
    check_prompt(prompt)
    # Read the data first, so that an invalid row is reported before a model is loaded.
    examples = demo_examples() if data is None else read_examples(data)
    train, validation, test = _split(examples, adapters, recipe, data)
    steps = num_steps(len(train) // recipe.batch_size, run.steps, run.epochs, 0, 1)
    rate = value_of("--learning-rate", run.learning_rates, 0, 1)
    base = load_base(run.model, run.quant, run.dtype, max_tokens=max_length, device=run.device)
    say(describe_base(base))
    task = make_task(base, sorted({example.label for example in examples}), prompt)._replace(max_tokens=max_length)
    adapted = new_adapter(base, run.r, run.targets, recipe)
    rows = encode_examples(base, task, test)
    measure = partial(score_of, adapted, task, rows=rows, map=map_sharded)
    before = measure(adapted.params, progress=bar("before", progress)).accuracy.item()
    say(f"Before: accuracy {percent(before, 1)} on {len(test):,} held-out examples.")
    state = (base.name, base.quant, base.dtype, adapted.config, recipe._replace(log=None), steps, rate, adapters)
    checkpoint = checkpoint_path(out, *state, prompt, max_length, examples)
    start = time.perf_counter()
    train_rows, validation_rows = (encode_examples(base, task, part) if part else rows for part in (train, validation))
    trained = _train(
        adapted, task, train_rows, validation_rows, recipe,
        steps=steps, learning_rate=rate, adapters=adapters, checkpoint=checkpoint, progress=progress, say=say,
    )  # fmt: skip
    seconds, leaves = time.perf_counter() - start, trained.params.values()
    values, size = sum(leaf.numel() for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    say(f"Trained {values:,} parameters ({size / 1024:,.0f} KiB) in {steps} steps and {seconds:.0f} s.")
    after = measure(trained.params, progress=bar("after", progress)).accuracy.item()
    say(f"After: accuracy {percent(after, 1)} on the same examples.")
    metadata = classifier_metadata(base, task.prompt, max_length)._replace(labels=task.labels)
    save = partial(_save_and_reload, out, adapted, trained, task, collate(rows[: recipe.batch_size], task.pad_id))
    (difference,) = map_sharded(save, [metadata])  # on rank 0
    delete_checkpoints(checkpoint)
    bank, table = (None, None) if trained.sweep is None else (out / BANK, trained.sweep.table)
    result = ClassifierResult(before, after, len(test), values, seconds, difference, out, bank, table)
    _say_where(result, adapters, say)
    return result


def _say_where(result: ClassifierResult, adapters: int, say: Callable[[str], None]) -> None:
    out, bank = result.out, result.bank
    say(f"Saved in {out} and loaded again: the logits differ by at most {result.difference:.1g}.")
    if bank is not None:
        say(f"All {adapters} adapters are in {bank}: vera-func evaluate --bank {bank}")
    following = (f"inspect {out}", f"predict --adapter {out} 'A new text.'", "train --help")
    say("\n  vera-func ".join(["Next:", *following]))


def _require_supported(recipe: Recipe, adapters: int) -> None:
    supported = Recipe(recipe.batch_size, recipe.micro_batches, dora=recipe.dora, seed=recipe.seed)
    if adapters > 1 and recipe != supported:
        given = [field for field in Recipe._fields if getattr(recipe, field) != getattr(supported, field)]
        options = ", ".join(f"--{field.replace('_', '-')}" for field in given)
        raise ValueError(
            f"--adapters starts a sweep, which does not support {options}: leave out --adapters, or {options}."
        )
    if recipe.checkpointing and recipe.dropout:
        raise ValueError("--checkpointing can't be combined with --dropout: leave out --checkpointing or --dropout.")


def _split(
    examples: Sequence[Example], adapters: int, recipe: Recipe, source: str | Path | None
) -> list[list[Example]]:
    """Split examples into training examples, validation examples (none without a sweep) and held-out examples."""
    batch_size, seed = recipe.batch_size, recipe.seed
    train, test = split_examples(examples, seed=seed, source=source)
    train, validation = (train, []) if adapters == 1 else split_examples(train, VALIDATION, seed=seed)
    if len(train) < batch_size:
        where = "" if source is None else f"{source}: "
        raise ValueError(
            f"{where}{len(train)} training examples do not fill a batch of {batch_size} ({len(test)} more are held "
            f"out): pass --batch-size {len(train)} or less."
        )
    return [train, validation, test]


def _train(
    adapted: Adapted,
    task: Task,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    recipe: Recipe,
    *,
    steps: int,
    learning_rate: float,
    adapters: int,
    checkpoint: Path,
    progress: bool,
    say: Callable[[str], None],
) -> Trained:
    batch_size = recipe.batch_size
    if world_size() > recipe.micro_batches:
        say(f"Only {recipe.micro_batches} of {world_size()} ranks have a micro-batch: pass --parts {world_size()}.")
    if adapters == 1:
        one = train_classifiers(
            adapted, [task], [train], recipe, steps=[steps], learning_rates=[learning_rate],
            evaluate=lambda params: score_of(adapted, task, params, validation, map=map_sharded).loss,
            checkpoint=checkpoint, progress=progress,
        )  # fmt: skip
        return Trained(one.params, adapted.config)
    say(
        f"Sweep: {adapters} adapters in one run, {max(1, steps // 2)} steps of {small_batch(batch_size, adapters)} "
        f"examples each; the best on {len(validation)} validation examples then trains alone for {steps} steps."
    )
    found = train_sweep(
        adapted, task, sweep_grid(adapters, learning_rate), train, validation, recipe, steps=steps, progress=progress,
        checkpoint=checkpoint,
    )  # fmt: skip
    best = found.table[found.row]
    say(format_table(found.table))
    say(f"Best: {best['name']}, which then trained alone with {batch_size} examples per step.")
    return Trained(found.best, dataclasses.replace(adapted.config, d_initial=best["d_initial"]), found)


def _save_and_reload(
    out: Path, adapted: Adapted, trained: Trained, task: Task, batch: Batch, metadata: Metadata
) -> float:
    """Save the adapter (and the bank of a sweep), load the adapter, and return the largest change of a logit."""
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
