"""Merge a classification adapter with calibration, and measure how many predictions the merge preserves.

The calibration minimizes the error in the gap between the two largest label logits. In the second moments of a layer's
inputs, the weight of a token is the squared norm of the gradient of this gap with respect to the layer's output.
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
    """Comparison of a merged model with the unmerged adapter, returned by `compare_answers`.

    Attributes:
        same: Fraction of the examples whose predicted label is unchanged by merging.
        error: Mean absolute change of the label logits due to merging, divided by the mean absolute change due to
            removing the adapter.
        texts: Number of examples.
    """

    same: float
    error: float
    texts: int


def calibrate_answers(
    adapted: Adapted,
    task: Task,
    rows: Sequence[Encoded],
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Quantized]:
    """Return merged 4-bit weights for `merge(..., weights=...)`, calibrated to preserve the classifier's predictions.

    Args:
        adapted: A model with the adapter to merge; all adapted layers must be 4-bit.
        task: The task of the adapter.
        rows: About 200 examples (several thousand tokens) for calibration, from `encode_examples`.
        progress: Progress bar for the batches and for the layers, such as `tqdm.tqdm`.

    Raises:
        ValueError: As for `calibrate_weights`.
    """
    device = next(adapted.apply.model.parameters()).device
    batches = [
        {name: batch[name].to(device) for name in batch.keys() & task.accepts} | task.last_position
        for batch in batches_by_length(rows, 16, task.pad_id)
    ]
    moments = second_moments(
        adapted, progress(batches), readout=lambda output: answer_gap(output.logits[:, -1, task.answers])
    )
    return calibrate_weights(adapted, moments, progress=progress)


def answer_gap(logits: Float[Tensor, "b labels"]) -> Float[Tensor, " b"]:
    """The largest logit of each row minus the second largest logit.

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
    """Compare the predictions of a merged model with the predictions of the unmerged adapter.

    All logits are computed with `apply`, because the forward pass of bitsandbytes may round activations.

    Args:
        adapted: The adapter that was merged.
        merged: From `merge`.
        task: The task of the adapter.
        rows: Examples that were not used for calibration.
        progress: Progress bar for the batches, such as `tqdm.tqdm`; called once for each of three passes over `rows`.
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
    """Label logits minus their mean over the labels, (examples, labels); examples are sorted by prompt length."""
    label_logits = partial(logits_of(adapted, task), params)
    batches = progress(batches_by_length(rows, 32, task.pad_id))
    logits = torch.cat([label_logits(batch).float() for batch in batches])
    return logits - logits.mean(1, keepdim=True)
