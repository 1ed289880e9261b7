"""Train one adapter for each of several data sets with labels, in one run.

The labels of the data sets may differ. Logits are computed for the labels of all data sets, but the loss of a row uses
only the logits for the labels of the row's data set.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.examples import read_examples, split_examples
from ...data.metadata import with_labels
from ...data.models import load_base
from ...data.prompts import MAX_TOKENS, PROMPT, Encoded, Score
from ...data.task import (
    Task,
    check_prompt,
    encode_examples,
    make_task,
    score_of,
)
from ...model.adapt import Adapted
from ...model.batch import Params, unstack_adapters
from ...train.distributed import map_sharded
from ..report import bar
from .jobs import adapter_names, num_steps, value_of
from .labels import train_classifiers
from .loop import Trained, train_chunks
from .outputs import (
    BANK,
    checkpoint_path,
    classifier_metadata,
    delete_checkpoints,
    new_adapter,
    output_folder,
    save_adapters,
)
from .settings import Run


def train_label_sets(sources: Sequence[str], run: Run, *, prompt: str = PROMPT) -> dict[str, Any]:
    """Train an adapter for each data set with labels, and measure held-out accuracy before and after training.

    Args:
        sources: Paths or hub ids of the data sets (see `read_examples`).
        run: Options of the run. If `run.max_length` is None, prompts have at most 256 tokens.
        prompt: Prompt template that contains `{text}` and ends where the label begins.

    Raises:
        ValueError: If an option or a row is invalid.
        OSError: If a file or the model is not found, or if the machine is offline (ConnectionError).
    """
    check_prompt(prompt)
    recipe, max_length = run.recipe, run.max_length or MAX_TOKENS
    if recipe.checkpointing:
        raise ValueError("--checkpointing supports one data set: to save memory, increase --accumulate instead.")
    out = output_folder(run.out)
    examples = [read_examples(source) for source in sources]
    labels = [sorted({example.label for example in some}) for some in examples]
    splits = [
        split_examples(some, seed=recipe.seed, source=source) for source, some in zip(sources, examples, strict=True)
    ]
    n, names = len(sources), adapter_names(sources, [(i, None) for i in range(len(sources))])
    counts = [
        num_steps(len(train) // recipe.batch_size, run.steps, run.epochs, i, n) for i, (train, _) in enumerate(splits)
    ]
    rates = [value_of("--learning-rate", run.learning_rates, i, n) for i in range(n)]
    base = load_base(run.model, run.quant, run.dtype, max_tokens=max_length, device=run.device)
    tasks = [make_task(base, own, prompt)._replace(max_tokens=max_length) for own in labels]
    adapted = new_adapter(base, run.r, run.targets, recipe)
    train, held_out = (
        [encode_examples(base, task, part) for task, part in zip(tasks, side, strict=True)]
        for side in zip(*splits, strict=True)
    )
    state = (base.name, base.quant, base.dtype, adapted.config, recipe._replace(log=None), counts, rates)
    checkpoint = checkpoint_path(out, *state, prompt, max_length, run.together, examples)
    scores = partial(_scores, adapted)
    before = scores(tasks, held_out, [adapted.params] * n, map=map_sharded)
    start = time.perf_counter()

    def group(part: slice, file: Path, shared: bool) -> Trained:
        mapping: Any = map_sharded if shared else map

        def measure(params: Params) -> Tensor:
            own = _unstacked(params, len(tasks[part]))
            return torch.stack([score.loss for score in scores(tasks[part], held_out[part], own, map=mapping)])

        return train_classifiers(
            adapted, tasks[part], train[part], recipe, steps=counts[part], learning_rates=rates[part],
            evaluate=measure, checkpoint=file, shared=shared,
        )  # fmt: skip

    trained = train_chunks(n, run.together, checkpoint, group, base.model.device)
    seconds = time.perf_counter() - start
    after = scores(tasks, held_out, _unstacked(trained.params, n), map=map_sharded, progress=bar("after", True))
    metadata = classifier_metadata(base, prompt, max_length)._replace(data=list(sources))
    metadata = with_labels(metadata, labels)
    map_sharded(partial(save_adapters, out, adapted, trained.params, names), [metadata])  # on rank 0
    delete_checkpoints(checkpoint)
    table = _table(names, sources, rates, train, held_out, trained, before, after)
    size = sum(leaf.numel() for leaf in adapted.params.values())
    places = {"out": str(out), "bank": str(out / BANK)}
    return {"kind": "label", "trained": size, "seconds": seconds, **places, "adapters": table}


def _table(
    names: Sequence[str],
    sources: Sequence[str],
    rates: Sequence[float],
    train: Sequence[Sequence[Encoded]],
    held_out: Sequence[Sequence[Encoded]],
    trained: Trained,
    before: Sequence[Score],
    after: Sequence[Score],
) -> list[dict[str, Any]]:
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
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _unstacked(params: Params, n: int) -> list[Params]:
    """The params of each of `n` adapters; `params` is stacked if `n` is above 1."""
    return [params] if n == 1 else [*unstack_adapters(params)]


def _scores(
    adapted: Adapted,
    tasks: Sequence[Task],
    held_out: Sequence[Sequence[Encoded]],
    params: Sequence[Params],
    *,
    map: Any,
    progress: Any = iter,
) -> list[Score]:
    """Score each adapter on the held-out rows of the adapter's task."""
    cases = progress(list(zip(tasks, params, held_out, strict=True)))
    return [score_of(adapted, task, own, rows, map=map) for task, own, rows in cases]
