"""Calibrated merging of a classifier, and how many of its predictions stay.

Calibration minimizes the error of the gap between the logits of the two best labels: the inputs of each layer are
weighted by their effect on that gap (`second_moments`). The merge is evaluated on texts that it was not calibrated on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.keys import split_key
from ..merging.second_moments import calibrate_weights, second_moments
from ..model.adapt import Adapted, adapt
from ..quant.value import Quantized
from .prompts import Encoded, batches_by_length
from .task import Task, logits_of


class Answers(NamedTuple):
    """How the predictions of a merged model compare with those of the adapter, from `compare_answers`.

    Attributes:
        same: Share of the texts with the same prediction.
        error: Mean change of the labels' logits by merging, relative to the change by leaving the adapter out.
        texts: Number of texts.
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
    """Merged 4-bit weights that preserve the predictions, for `merge(..., weights=...)`.

    Args:
        model: The base model, its adapted layers in 4 bits.
        adapted: The adapter to merge.
        task: What the adapter classifies.
        rows: About 200 texts (several thousand tokens), from `encode_examples`.
        batch_size: Texts in a batch.
        progress: Wraps the batches, and then the names of the layers, as tqdm does.

    Raises:
        ValueError: As for `calibrate_weights`.
    """
    last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in task.accepts else {}
    batches = [
        {name: batch[name] for name in batch.keys() & task.accepts} | last
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

    Both are computed from the stored weights. bitsandbytes' own forward may round activations, or repack the weights.

    Args:
        adapted: The adapter that was merged.
        merged: From `merge`.
        task: What they classify.
        rows: Texts that were not used for calibration.
        progress: Wraps the batches, three times, as tqdm does.
    """
    # With a fresh adapter, whose update is 0, `apply` computes the model as its weights are stored.
    plain = adapt(merged.eval(), adapted.config)
    nothing = {k: torch.zeros_like(v) if split_key(k)[1] == "lambda_b" else v for k, v in adapted.params.items()}
    wanted = _answers(adapted, adapted.params, task, rows, progress)
    dropped = _answers(adapted, nothing, task, rows, progress)
    actual = _answers(plain, plain.params, task, rows, progress)
    effect = (dropped - wanted).abs().mean()
    return Answers(
        same=(actual.argmax(1) == wanted.argmax(1)).float().mean().item(),
        error=((actual - wanted).abs().mean() / effect).item() if effect > 0 else 0.0,
        texts=len(rows),
    )


def _answers(
    adapted: Adapted,
    params: Mapping[str, Tensor],
    task: Task,
    rows: Sequence[Encoded],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Tensor:
    """The logits (texts, labels) less their mean over the labels, which changes no prediction; ordered by length."""
    labels = partial(logits_of(adapted, task), params)
    batches = progress(batches_by_length(rows, 32, task.pad_id))
    logits = torch.cat([labels(batch).float() for batch in batches])
    return logits - logits.mean(1, keepdim=True)
