"""Train classifiers on labelled examples: one adapter, or several adapters at once, each with its own labels.

Logits are computed for the labels of all adapters, but the loss of a row uses only the logits for the labels of the
row's adapter.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.batches import Batch, batch_order
from ...data.objective import with_dropout
from ...data.prompts import Encoded, collate
from ...data.task import Task, join_tasks, logits_of, own_logits
from ...model.adapt import Adapted
from ...model.batch import Params, select_adapters, stack_adapters
from ...model.dora import fold_if_dora
from ...train.checkpointing import checkpointed_loss
from ...train.fit import Fit
from .loop import Trained, for_training, train_together
from .settings import Recipe


def train_classifiers(
    adapted: Adapted,
    tasks: Sequence[Task],
    rows: Sequence[Sequence[Encoded]],
    recipe: Recipe,
    *,
    steps: Sequence[int],
    learning_rates: Sequence[float],
    evaluate: Callable[[Params], Tensor],
    checkpoint: Path | None,
    start: Fit | None = None,
    progress: bool = True,
    shared: bool = True,
) -> Trained:
    """Train one adapter per task. Each adapter starts from the params of `adapted`.

    Args:
        adapted: A new adapter.
        tasks: The task of each adapter; all tasks must have the same prompt.
        rows: The training rows of each adapter.
        recipe: Training options; `checkpointing` supports one adapter without dropout.
        steps, learning_rates, evaluate, checkpoint, start, progress, shared: As for `train_together`.
    """
    n, kept = len(tasks), for_training(adapted)
    task, places = join_tasks(tasks)

    def losses_of(logits: Tensor, batch: Batch) -> Tensor:
        """The weighted loss of each row."""
        own = own_logits(logits, places[batch["adapter"]].to(logits.device))
        losses = cross_entropy(own.float(), batch["label"].to(own.device), reduction="none")
        return losses * batch["weight"].to(own.device)

    def loss(params: Params, batch: Batch) -> Tensor:
        model = with_dropout(kept, recipe.seed, batch) if recipe.dropout else kept
        if n == 1:
            return losses_of(logits_of(model, task)(params, batch), batch).sum()
        owner = batch["adapter"].to(next(iter(params.values())).device)
        # Folded, so that norms are computed once per adapter, not once per row.
        params = select_adapters(fold_if_dora(model.apply, params, model.frozen), owner)
        losses = losses_of(logits_of(model, task)(params, batch), batch)
        return losses.new_zeros(n).index_add(0, owner, losses)

    def checkpointed(module: Any, batch: Batch) -> Tensor:
        inputs = {name: batch[name].to(module.device) for name in batch.keys() & task.accepts}
        return losses_of(module(**inputs, use_cache=False).logits[:, -1, task.answers], batch).sum()

    return train_together(
        checkpointed_loss(adapted, checkpointed) if recipe.checkpointing else loss,
        stack_adapters([adapted.params] * n) if n > 1 else adapted.params,
        _batches(rows, steps, recipe, task.pad_id),
        recipe,
        steps=steps,
        learning_rates=learning_rates,
        evaluate=evaluate,
        checkpoint=checkpoint,
        start=start,
        progress=progress,
        shared=shared,
    )


def _batches(
    rows: Sequence[Sequence[Encoded]], steps: Sequence[int], recipe: Recipe, pad_id: int
) -> Callable[[int], list[Batch]]:
    """A function `step -> micro-batches`, with `batch_size` rows for each adapter that is still training.

    The row weights make the average of an adapter's micro-batch losses equal the mean loss of the adapter's rows.
    """
    sizes = [min(recipe.batch_size, len(own)) for own in rows]
    orders = [
        batch_order([len(row.ids) for row in own], size, seed=recipe.seed)
        for own, size in zip(rows, sizes, strict=True)
    ]

    def batches(step: int) -> list[Batch]:
        items = [(i, k) for i, order in enumerate(orders) if step < steps[i] for k in order(step)]
        size = -(-len(items) // recipe.micro_batches)
        micro = [items[start : start + size] for start in range(0, len(items), size)]
        return [
            {
                **collate([rows[i][k] for i, k in some], pad_id),
                "adapter": torch.tensor([i for i, _ in some]),
                "weight": torch.tensor([len(micro) / sizes[i] for i, _ in some]),
                "step": step,
                "micro_batch": number,
            }
            for number, some in enumerate(micro)
        ]

    return batches
