"""Calibrated merging of a classifier, and the share of its predictions that the merge preserves.

Calibration minimizes the error of the difference between the logits of the two best labels: `second_moments` weights
the inputs of each layer by their effect on that difference. The merge is evaluated on held-out examples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..merging.second_moments import calibrate_weights, second_moments
from ..model.adapt import Adapted, adapt
from ..model.algebra import without_update
from ..quant.value import Quantized
from .prompts import Encoded, batches_by_length
from .task import Task, logits_of


class Answers(NamedTuple):
    """Comparison of a merged model with its adapter, from `compare_answers`.

    Attributes:
        same: Share of the examples with the same prediction.
        error: Mean absolute change of the labels' logits due to the merge, divided by their change when the adapter is
            removed.
        texts: Number of examples.
    """

    same: float
    error: float
    texts: int


def calibrate_answers(
    model: nn.Module,
    adapted: Adapted,
    task: Task,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 16,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Quantized]:
    """Return merged 4-bit weights that preserve the predictions, for `merge(..., weights=...)`.

    Args:
        model: The base model; its adapted layers must be 4-bit.
        adapted: The adapter to merge.
        task: The task of the adapter.
        rows: About 200 examples (several thousand tokens), from `encode_examples`.
        batch_size: Examples per batch.
        progress: Wrapper of the iterables of batches and of layer names, such as `tqdm.tqdm`.

    Raises:
        ValueError: As for `calibrate_weights`.
    """
    last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in task.accepts else {}
    device = next(model.parameters()).device
    batches = [
        {name: batch[name].to(device) for name in batch.keys() & task.accepts} | last
        for batch in batches_by_length(rows, batch_size, task.pad_id)
    ]
    moments = second_moments(
        adapted, progress(batches), readout=lambda output: answer_gap(output.logits[:, -1, task.answers])
    )
    return calibrate_weights(adapted, moments, progress=progress)


def answer_gap(logits: Float[Tensor, "b labels"]) -> Float[Tensor, " b"]:
    """The largest logit of each row minus the second largest.

    Example:
        >>> answer_gap(torch.tensor([[1.0, 3.0, 2.5]]))
        tensor([0.5000])
    """
    best = logits.float().topk(2).values
    return best[:, 0] - best[:, 1]


@torch.no_grad()
def compare_answers(
    adapted: Adapted,
    merged: nn.Module,
    task: Task,
    rows: Sequence[Encoded],
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Answers:
    """Compare the predictions of a merged model with those of the adapter.

    `apply` computes both from the stored weights, because bitsandbytes' own forward pass may round activations.

    Args:
        adapted: The adapter that was merged.
        merged: From `merge`.
        task: The task of the adapter.
        rows: Examples that were not used for calibration.
        progress: Wrapper of the iterable of batches, such as `tqdm.tqdm`; called three times.
    """
    # A new adapter, whose update is 0, makes `apply` compute the merged model from its stored weights.
    plain = adapt(merged.eval(), adapted.config)
    zero = without_update(adapted.params)
    expected = _centered_logits(adapted, adapted.params, task, rows, progress)
    base = _centered_logits(adapted, zero, task, rows, progress)
    actual = _centered_logits(plain, plain.params, task, rows, progress)
    effect = (base - expected).abs().mean()
    return Answers(
        same=(actual.argmax(1) == expected.argmax(1)).float().mean().item(),
        error=((actual - expected).abs().mean() / effect).item() if effect > 0 else 0.0,
        texts=len(rows),
    )


def _centered_logits(
    adapted: Adapted,
    params: Mapping[str, Tensor],
    task: Task,
    rows: Sequence[Encoded],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Tensor:
    """Logits (examples, labels) minus their mean over the labels; the examples are ordered by length."""
    label_logits = partial(logits_of(adapted, task), params)
    batches = progress(batches_by_length(rows, 32, task.pad_id))
    logits = torch.cat([label_logits(batch).float() for batch in batches])
    return logits - logits.mean(1, keepdim=True)
