"""Predict the labels of texts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..data.examples import Example
from ..data.models import Base
from ..data.prompts import batches_by_length
from ..data.sources import Source, by_labels, load_adapters, task_of
from ..data.task import encode_examples, logits_of
from .report import adapters_title, bar


def predict(
    source: Source,
    base: Base,
    texts: Sequence[str],
    *,
    labels: Sequence[str] = (),
    prompt: str | None = None,
    chunk: int = 8,
    batch_size: int = 32,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Predict the label of each text with each adapter; return one dict per pair of adapter and text.

    Probabilities are a softmax over the logits of the labels' first tokens. The most probable label is predicted.

    Args:
        texts: Texts to classify.
        labels: Labels to choose from if the metadata of the adapters contains no labels.
        source, base, prompt, chunk, batch_size, progress: As for `evaluate`.

    Raises:
        ValueError: If `texts` is empty or contains an empty text, if neither the metadata nor `labels` gives at least
            two labels, or if the adapters do not fit the model.
    """
    require_texts("text", texts)
    return [
        row
        for part in by_labels(source)
        for row in _predict(
            part, base, texts, labels=labels, prompt=prompt, chunk=chunk, batch_size=batch_size, progress=progress
        )
    ]


def _predict(
    source: Source,
    base: Base,
    texts: Sequence[str],
    *,
    labels: Sequence[str],
    prompt: str | None,
    chunk: int,
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """Predict with adapters that share one set of labels."""
    task = task_of(source, base, labels, prompt)
    rows = encode_examples(base, task, [Example(text, task.labels[0], text) for text in texts])
    batches = batches_by_length(rows, batch_size, task.pad_id)
    position = torch.cat([batch["row"] for batch in batches]).argsort()  # restores the order of texts
    adapted, read = load_adapters(source, base.model, base.product_dtype)
    found = []
    for start in range(0, len(source.names), chunk):
        names = source.names[start : start + chunk]
        logits = partial(logits_of(adapted, task, stacked=True), read(names))
        show = bar(adapters_title(start, names, source.names), progress)
        with torch.no_grad():
            outputs = [logits(batch) for batch in show(batches)]
        best, label = torch.cat(outputs, dim=1)[:, position].double().softmax(-1).max(-1)  # (adapters, texts)
        found += [
            {"text": text, "adapter": name, "label": task.labels[label[i, j]], "probability": best[i, j].item()}
            for i, name in enumerate(names)
            for j, text in enumerate(texts)
        ]
    return found


def check_labels_option(source: Source, labels: Sequence[str] | None) -> None:
    """Check that `--labels` is given only if the metadata contains no labels.

    Raises:
        ValueError: If labels are given, but the metadata of an adapter contains labels.
    """
    known = [part.metadata.labels for part in by_labels(source) if part.metadata.labels]
    if labels and known:
        raise ValueError(
            f"--labels has no effect on an adapter that was trained on the labels {known[0]}: leave out --labels."
        )


def require_texts(kind: str, texts: Sequence[str]) -> None:
    """Check that there are texts and that no text is empty.

    Args:
        kind: Noun for a text in the error message, such as "prompt".
        texts: The texts.

    Raises:
        ValueError: If there are no texts, or if a text is empty.
    """
    if not texts:
        raise ValueError(f"got no {kind}s, expected at least one {kind}: pass a {kind} as an argument or on stdin.")
    for i, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"{kind} {i} of {len(texts)} is empty: remove this {kind}.")
