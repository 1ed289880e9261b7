"""Training on several data sets with labels: one adapter for each, all in one run.

The data sets have the same labels, so that the bank has one task, as the bank of a sweep.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.batches import batch_order
from ..data.examples import HELD_OUT, Example, read_examples, split_examples
from ..data.metadata import Metadata
from ..data.models import load_base
from ..data.objective import with_dropout
from ..data.prompts import PROMPT, Batch, Encoded, Score, collate
from ..data.task import Task, check_prompt, encode_examples, logits_of, make_task, score_of
from ..model.adapt import Adapted
from ..model.batch import Params, select_adapters
from ..train.distributed import map_sharded
from .checkpoints import checkpoint_path, delete_checkpoints
from .jobs import adapter_names, num_steps, value_of
from .outputs import BANK, new_adapter, output_folder, save_adapters
from .recipe import Recipe, Run, Trained, train_chunks, train_together
from .report import bar


def train_label_sets(sources: Sequence[str], run: Run, *, prompt: str = PROMPT) -> dict[str, Any]:
    """Train an adapter for each data set with labels, and measure its accuracy on held-out examples before and after.

    Args:
        sources: The data sets, with the same labels.
        run: The options of the run; its `max_length` is 256 if it is None.
        prompt: Prompt template with `{text}`, which the label follows.

    Raises:
        ValueError: If an option or a row is invalid, or the labels differ.
        OSError: If a file or the model is not found, or there is no network (ConnectionError).
    """
    check_prompt(prompt)
    recipe, max_length = run.recipe, run.max_length or 256
    if recipe.checkpointing:
        raise ValueError("--checkpointing trains one adapter: leave it out, or raise --accumulate.")
    out = output_folder(run.out)
    examples = [read_examples(source) for source in sources]
    labels = _same_labels(sources, examples)
    splits = [
        split_examples(some, HELD_OUT, seed=recipe.seed, source=source)
        for source, some in zip(sources, examples, strict=True)
    ]
    n, names = len(sources), adapter_names(sources, [(i, None) for i in range(len(sources))])
    counts = [
        num_steps(len(train) // recipe.batch_size, run.steps, run.epochs, i, n) for i, (train, _) in enumerate(splits)
    ]
    rates = [value_of("--learning-rate", run.learning_rates, i, n) for i in range(n)]
    base = load_base(run.model, run.quant, run.dtype, max_tokens=max_length, device=run.device)
    task = make_task(base, labels, prompt)._replace(max_tokens=max_length)
    adapted = new_adapter(base, run.r, run.targets, recipe)
    train, held_out = ([encode_examples(base, task, part) for part in side] for side in zip(*splits, strict=True))
    state = (base.name, base.quant, base.dtype, adapted.config, recipe._replace(log=None), counts, rates)
    checkpoint = checkpoint_path(out, *state, prompt, max_length, run.chunk, examples)
    before = [score_of(adapted, task, adapted.params, rows, map=map_sharded) for rows in held_out]
    start = time.perf_counter()

    def group(part: slice, file: Path, shared: bool) -> Trained:
        mapping: Any = map_sharded if shared else map
        measure = partial(_scores, adapted, task, held_out[part], map=mapping)
        return _train_group(adapted, task, train[part], recipe, counts[part], rates[part], measure, file, shared=shared)

    trained = train_chunks(n, run.chunk, checkpoint, group, base.model.device)
    seconds = time.perf_counter() - start
    after = _scores(adapted, task, held_out, trained.params, map=map_sharded, progress=bar("after", True))
    metadata = Metadata(
        base.quant, labels, prompt, data=list(sources), max_length=None if max_length == 256 else max_length
    )
    map_sharded(partial(save_adapters, out, adapted, trained.params, names), [metadata])  # on rank 0
    delete_checkpoints(checkpoint)
    columns = {
        "name": names,
        "data": sources,
        "learning_rate": rates,
        "rows": [len(rows) for rows in train],
        "held_out": [len(rows) for rows in held_out],
        "steps": trained.steps,
        "before": [score.accuracy.item() for score in before],
        "after": [score.accuracy.item() for score in after],
        "loss": [score.loss.item() for score in after],
        "diverged": trained.diverged,
    }
    table = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    size = sum(leaf.numel() for leaf in adapted.params.values())
    places = {"out": str(out), "bank": str(out / BANK)}
    return {"kind": "label", "trained": size, "seconds": seconds, **places, "adapters": table}


def _same_labels(sources: Sequence[str], examples: Sequence[Sequence[Example]]) -> list[str]:
    labels = [sorted({example.label for example in some}) for some in examples]
    for source, own in zip(sources, labels, strict=True):
        if own != labels[0]:
            raise ValueError(
                f"data sets with labels must have the same ones to be trained in one run, but {sources[0]} has "
                f"{labels[0]} and {source} has {own}: train them one by one."
            )
    return labels[0]


def _scores(
    adapted: Adapted,
    task: Task,
    held_out: Sequence[Sequence[Encoded]],
    params: Params,
    *,
    map: Any,
    progress: Any = iter,
) -> list[Score]:
    """The scores of stacked adapters (or of one), each on its own rows."""
    stacked = len(held_out) > 1
    rows = [{k: v[i] for k, v in params.items()} if stacked else dict(params) for i in range(len(held_out))]
    return [score_of(adapted, task, row, own, map=map) for row, own in progress(list(zip(rows, held_out, strict=True)))]


def _train_group(
    adapted: Adapted,
    task: Task,
    rows: Sequence[Sequence[Encoded]],
    recipe: Recipe,
    steps: Sequence[int],
    rates: Sequence[float],
    measure: Any,
    file: Path,
    *,
    shared: bool,
) -> Trained:
    n = len(rows)
    orders = [
        batch_order([len(row.ids) for row in own], min(recipe.batch_size, len(own)), seed=recipe.seed) for own in rows
    ]

    def batches(step: int) -> list[Batch]:
        items = [(i, rows[i][k]) for i in range(n) if step < steps[i] for k in orders[i](step)]
        size = -(-len(items) // recipe.micro_batches)
        micro = [items[start : start + size] for start in range(0, len(items), size)]
        return [_collate(some, task, rows, recipe, len(micro), step, k) for k, some in enumerate(micro)]

    def loss(params: Params, batch: Any) -> Tensor:
        model = with_dropout(adapted, recipe.seed, batch) if recipe.dropout else adapted
        owner = batch["adapter"].to(next(iter(params.values())).device)
        logits = logits_of(model, task)(select_adapters(params, owner) if n > 1 else params, batch)
        losses = cross_entropy(logits.float(), batch["label"].to(logits.device), reduction="none")
        losses = losses * batch["weight"].to(logits.device)
        return losses.new_zeros(n).index_add(0, owner, losses) if n > 1 else losses.sum()

    return train_together(
        loss,
        {k: v.expand(n, *v.shape).clone() for k, v in adapted.params.items()} if n > 1 else adapted.params,
        batches,
        recipe,
        steps=steps,
        learning_rates=rates,
        evaluate=lambda params: torch.stack([score.loss for score in measure(params)]),
        checkpoint=file,
        shared=shared,
    )


def _collate(
    items: Sequence[tuple[int, Encoded]],
    task: Task,
    rows: Sequence[Sequence[Encoded]],
    recipe: Recipe,
    scale: int,
    step: int,
    number: int,
) -> dict[str, Any]:
    """A micro-batch, whose weights make the losses of all micro-batches add up to the mean of each adapter."""
    weight = [scale / min(recipe.batch_size, len(rows[i])) for i, _ in items]
    batch: dict[str, Any] = collate([row for _, row in items], task.pad_id)
    more = {"adapter": torch.tensor([i for i, _ in items]), "weight": torch.tensor(weight)}
    return {**batch, **more, "step": step, "micro_batch": number}
