"""A calibrated merge of a model that answers with labels, and whether its answers stay.

What is read off the model is the gap between its two best answers. Each layer's inputs are weighted by what they do
to that gap (`grams`), and the merge is judged on texts that it has not seen.
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
from .prompts import Encoded, answer_logits, batches_by_length
from .task import Task


class Answers(NamedTuple):
    """How the answers of a merged model compare with those of the adapter, from `compare_answers`.

    Attributes:
        same: Share of the texts with the same answer.
        error: Mean change of the answers' logits by the merge, relative to that by leaving the adapter out.
        texts: How many there were.
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
    """Merged 4-bit weights that keep the answers, for `merge(..., weights=...)`.

    Args:
        model: The base model, its adapted layers in 4 bits.
        adapted: The adapter to merge.
        task: What it answers.
        rows: Some 200 texts (several thousand tokens), from `encode_examples`.
        batch_size: Texts at once.
        progress: Wraps the batches, and then the names of the layers, as tqdm does.

    Raises:
        ValueError: As for `calibrate_weights`.
    """
    batches = [
        {name: batch[name] for name in batch.keys() & task.accepts}
        for batch in batches_by_length(rows, batch_size, task.pad_id)
    ]
    gap = partial(answer_gap, answers=task.answers)
    moments = second_moments(adapted, progress(batches), readout=lambda output: gap(output.logits[:, -1]))
    return calibrate_weights(adapted, moments, progress=progress)


def answer_gap(logits: Float[Tensor, "b vocab"], answers: Tensor) -> Float[Tensor, " b"]:
    """The best answer's logit minus the second best's.

    Example:
        >>> answer_gap(torch.tensor([[1.0, 9.0, 3.0, 2.5]]), torch.tensor([0, 2, 3]))
        tensor([0.5000])
    """
    best = logits[:, answers].float().topk(2).values
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
    """How well a merged model answers as the adapter does.

    Both are computed from the weights as they are stored: bitsandbytes' own forward may round activations, or repack.

    Args:
        adapted: The adapter that was merged.
        merged: From `merge`.
        task: What they answer.
        rows: Texts that the merge has not been calibrated on.
        progress: Wraps the batches, three times, as tqdm does.
    """
    # An adapter that adds nothing, so that the forward is that of the weights.
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
    """The logits of the labels (texts, labels), less their mean, which answers nothing; in the order of length."""
    forward = partial(adapted.apply, params, adapted.frozen)
    batches = progress(batches_by_length(rows, 32, task.pad_id))
    logits = torch.cat([answer_logits(forward, batch, task.accepts)[:, task.answers].float() for batch in batches])
    return logits - logits.mean(1, keepdim=True)
