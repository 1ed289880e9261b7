"""Evaluate adapters on data of any kind. The results are one dict per adapter."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.batches import Part
from ..data.dataset import DataSet, open_dataset
from ..data.examples import Example, demo_examples, read_examples, split_examples
from ..data.models import Base
from ..data.objective import reference_logprobs, score_rows
from ..data.prompts import Score
from ..data.sources import Source, by_labels, check_labels, load_adapters, task_of, unadapted
from ..data.task import encode_examples, score_of
from ..data.tokens import tokenize
from ..io.bank import open_bank
from ..io.checkpoint import load_adapter
from ..train.distributed import map_sharded, rank, world_size
from .data_kinds import kind_of, refuse_options
from .report import adapters_title, bar


MAX_LENGTH = 512  # the default
BETA = 0.1  # the default for preferences, as in TRL


def evaluate(
    source: Source,
    load: Callable[[], Base],
    data: str | None,
    *,
    prompt: str | None,
    limit: int | None,
    chunk: int,
    batch_size: int | None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run the command `evaluate`, on data of any kind. All rows are checked before the model is loaded."""
    if data is None and source.metadata.kind is not None:
        raise ValueError(
            f"the default data has labels, but the adapter was trained on data of the kind {source.metadata.kind!r}: "
            f"pass --data with data of the kind {source.metadata.kind!r}."
        )
    if data is not None and kind_of(data) != "label":
        refuse_options({"--prompt": prompt, "--batch-size": batch_size}, "without labels")
        rows = open_dataset(data)
        return evaluate_language(source, load(), rows, limit=limit, chunk=chunk, progress=progress)
    examples = read_examples(data) if data else split_examples(demo_examples(), seed=0)[1]
    check_labels(source, {example.label for example in examples})
    return evaluate_labels(
        source, load(), examples[:limit], prompt=prompt, chunk=chunk, batch_size=batch_size or 32, progress=progress
    )


def evaluate_labels(
    source: Source,
    base: Base,
    examples: Sequence[Example],
    *,
    prompt: str | None = None,
    chunk: int = 8,
    batch_size: int = 32,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Accuracy and mean loss of each adapter on the same examples, as one dict per adapter.

    Under torchrun, chunks of adapters are sharded across ranks. If there are fewer chunks than ranks, batches of
    examples are sharded instead. Every rank returns the rows of all adapters.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        examples: Labelled examples.
        prompt: Prompt template with `{text}`; None means the template used in training.
        chunk: Number of adapters per forward pass.
        batch_size: Number of examples per adapter and forward pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the adapters do not fit the model, or if an example has a label that the adapters were not
            trained on.
    """
    return [
        row
        for part in by_labels(source)
        for row in _evaluate(part, base, examples, prompt=prompt, chunk=chunk, batch_size=batch_size, progress=progress)
    ]


def _evaluate(
    source: Source,
    base: Base,
    examples: Sequence[Example],
    *,
    prompt: str | None,
    chunk: int,
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Evaluate adapters that share one set of labels."""
    task = task_of(source, base, {example.label for example in examples}, prompt)
    rows = encode_examples(base, task, examples)
    starts = range(0, len(source.names), chunk)
    by_chunk = len(starts) >= world_size()
    own = starts[rank()] if by_chunk else 0
    adapted, read = load_adapters(
        source._replace(names=source.names[own : own + chunk]), base.model, base.product_dtype
    )

    def evaluate_chunk(start: int) -> Score:
        names = source.names[start : start + chunk]
        params = read(names) if len(names) > 1 else {k: v[0] for k, v in read(names).items()}
        return score_of(
            adapted, task, params, rows, batch_size=batch_size, map=map if by_chunk else map_sharded,
            progress=bar(adapters_title(start, names, source.names), progress),
        )  # fmt: skip

    scores = map_sharded(evaluate_chunk, starts) if by_chunk else [evaluate_chunk(start) for start in starts]
    accuracy, loss = (torch.cat([value.reshape(-1) for value in column]) for column in zip(*scores, strict=True))
    return [
        {"name": name, "accuracy": right.item(), "loss": mean.item(), "texts": len(rows)}
        for name, right, mean in zip(source.names, accuracy, loss, strict=True)
    ]


def evaluate_language(
    source: Source,
    base: Base,
    data: DataSet,
    *,
    limit: int | None = None,
    chunk: int = 8,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure the loss and perplexity of each adapter; for preferences, the loss, reward accuracy and reward margin.

    Sequences are truncated as in training, and rewards are relative to the reference used in training.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        data: From `open_dataset`.
        limit: Number of rows to use; None means all rows.
        chunk: Number of adapters per forward pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the adapters or the reference do not fit the model.
        FileNotFoundError: If the reference is not found.
    """
    side: Any = source.metadata.truncate_side or "end"
    rows = tokenize(data, base.tokenizer, max_length=length_of(base, source.metadata.max_length), side=side)
    use = torch.arange(len(rows.groups))[:limit]
    adapted, read = load_adapters(source, base.model, base.product_dtype)
    device, reference = base.model.device, None
    if rows.width == 2:
        if source.metadata.reference:
            initial = load_adapter(source.metadata.reference, base.model, product_dtype=base.product_dtype)
        else:
            initial = unadapted(base.model)
        reference = reference_logprobs(
            initial, initial.params, Part(rows, use), pad_id=base.pad_id, device=device, map=map_sharded,
            progress=bar("reference", progress),
        )  # fmt: skip
    found = []
    for start in range(0, len(source.names), chunk):
        names = source.names[start : start + chunk]
        parts = [Part(rows, use, _beta(source, name), reference) for name in names]
        scores = score_rows(
            adapted, read(names), parts, stacked=True, pad_id=base.pad_id, device=device, map=map_sharded,
            progress=bar(adapters_title(start, names, source.names), progress),
        )  # fmt: skip
        found += [{"name": name, **scores.row(i), "rows": len(use)} for i, name in enumerate(names)]
    return found


def length_of(base: Base, given: int | None) -> int:
    """Return `given`; for None, return the smaller of `MAX_LENGTH` and the model's maximum number of positions.

    Raises:
        ValueError: If `given` exceeds the model's maximum number of positions.
    """
    most = getattr(base.model.config, "max_position_embeddings", None) or given or MAX_LENGTH
    if given is not None and given > most:
        raise ValueError(
            f"got --max-length {given}, but {base.name} has {most} positions: pass --max-length {most} or less."
        )
    return min(given or MAX_LENGTH, most)


def _beta(source: Source, name: str) -> float:
    """The beta of DPO in an adapter's metadata; 0.1 if the metadata has no beta."""
    if source.path is None:
        return BETA
    betas = source.metadata.beta or [BETA]
    if len(betas) == 1 or source.path.is_dir():
        return betas[0]
    return dict(zip(open_bank(source.path).names, betas, strict=False)).get(name, BETA)
