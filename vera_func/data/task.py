"""Adapters that make a language model answer with one of some labels: what to train, measure, and choose.

A `Task` holds what does not depend on the adapter, and the functions here bind it to `apply`: to one adapter, or to
stacked ones (n, ...), which then share every batch in a single forward.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.adapt import Adapted
from ..model.batch import Params
from ..model.vmap import vmap_adapters
from .examples import Example
from .models import Base
from .prompts import (
    PROMPT,
    Batch,
    Encoded,
    Score,
    accepted_arguments,
    answer_ids,
    answer_logits,
    answer_loss,
    encode,
    score,
)


class Task(NamedTuple):
    """Texts to be answered with a label.

    Attributes:
        labels: The answers.
        prompt: With `{text}` in it.
        answers: The first token of each label.
        pad_id: For the padding.
        accepts: Arguments that the model takes.
    """

    labels: list[str]
    prompt: str
    answers: Tensor
    pad_id: int
    accepts: frozenset[str]


def make_task(base: Base, labels: Sequence[str], prompt: str = PROMPT) -> Task:
    """The task of these labels for this model.

    Raises:
        ValueError: If the prompt has no place for the text, or two labels begin with the same token.
    """
    answers = answer_ids(base.tokenizer, labels, check_prompt(prompt))
    return Task(list(labels), prompt, answers, base.tokenizer.pad_token_id or 0, accepted_arguments(base.model))


def check_prompt(prompt: str) -> str:
    """The prompt, if it has one place for a text and no other.

    Example:
        >>> check_prompt("Review: {text}")
        'Review: {text}'
    """
    try:
        right = prompt.count("{text}") == 1 and bool(prompt.format(text=""))
    except (KeyError, IndexError, ValueError):
        right = False
    if not right:
        raise ValueError(
            f"a prompt must have {{text}} in it once, no other braces, and words around it; got {prompt!r}."
        )
    return prompt


def encode_examples(base: Base, task: Task, examples: Sequence[Example]) -> list[Encoded]:
    """Examples as prompts in tokens.

    Raises:
        ValueError: If an example has a label that the task lacks.
    """
    odd = sorted({example.label for example in examples} - set(task.labels))
    if odd:
        raise ValueError(f"the data has the label {odd[0]!r}, but the adapter was trained to answer {task.labels}.")
    return encode(base.tokenizer, examples, task.labels, prompt=task.prompt)


def logits_of(
    adapted: Adapted, task: Task, *, stacked: bool = False
) -> Callable[[Params, Batch], Float[Tensor, "*n b vocab"]]:
    """`(params, batch) -> logits` at the end of the prompts, of one adapter or of each in a stack."""

    def logits(params: Params, frozen: Params, **inputs: Tensor) -> Tensor:
        return answer_logits(partial(adapted.apply, params, frozen), inputs, task.accepts)

    many = vmap_adapters(logits, in_dims=None) if stacked else logits

    def bound(params: Params, batch: Batch) -> Tensor:
        return many(params, adapted.frozen, **{name: batch[name] for name in batch.keys() & task.accepts})

    return bound


def loss_of(adapted: Adapted, task: Task, *, stacked: bool = False) -> Callable[[Params, Batch], Float[Tensor, "*n"]]:
    """`(params, batch) -> loss`, what `fit` takes; of a stack, each adapter's own."""
    logits = logits_of(adapted, task, stacked=stacked)
    loss = torch.func.vmap(answer_loss, (0, None, None)) if stacked else answer_loss

    def bound(params: Params, batch: Batch) -> Tensor:
        return loss(logits(params, batch), batch["label"], task.answers)

    return bound


def score_of(adapted: Adapted, task: Task, params: Params, rows: Sequence[Encoded], **options: Any) -> Score:
    """How well an adapter, or each of stacked ones, answers.

    Args:
        adapted: Its `apply` and `frozen` are used.
        task: What to answer.
        params: Of one adapter, or stacked.
        rows: From `encode_examples`.
        **options: Of `score`.
    """
    stacked = any(value.shape != adapted.apply.slots[key].shape for key, value in params.items())
    logits = partial(logits_of(adapted, task, stacked=stacked), params)
    return score(logits, rows, task.answers, pad_id=task.pad_id, **options)
