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
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

from .examples import Example
from .many import Params, vmap_adapters
from .model import Adapted
from .optim import AdamWState
from .pretrained import Base
from .sentiment import (
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
from .train import Fit


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


def fit_row(run: Fit, i: int) -> Fit:
    """The run of adapter `i` of stacked ones: what it would be, had it been trained alone.

    Example:
        >>> from vera_func import fit
        >>> loss = lambda params, batch: params["p"].square().sum(-1)
        >>> start, rates = {"p": torch.ones(2, 3)}, [0.1, 0.2]
        >>> run = fit(loss, start, int, steps=4, learning_rate=rates, num_adapters=2, progress=False)
        >>> fit_row(run, 1).losses.shape
        torch.Size([4])
    """
    state = AdamWState(
        run.state.step[i],
        {key: leaf[i] for key, leaf in run.state.mean.items()},
        {key: leaf[i] for key, leaf in run.state.var.items()},
    )
    params = {key: leaf[i] for key, leaf in run.params.items()}
    return Fit(params, state, run.losses[:, i], run.metrics[:, i], run.stopped[i], run.diverged[i])


def join_fits(runs: Sequence[Fit]) -> Fit:
    """The runs of groups of stacked adapters as one; NaN stands for the losses of a group that ended earlier.

    Example:
        >>> from vera_func import fit
        >>> loss = lambda params, batch: params["p"].square().sum(-1)
        >>> options = {"steps": 4, "learning_rate": 0.1, "progress": False}
        >>> runs = [fit(loss, {"p": torch.ones(n, 3)}, int, num_adapters=n, **options) for n in (2, 1)]
        >>> join_fits(runs).losses.shape
        torch.Size([4, 3])
    """

    def history(leaves: Sequence[Tensor]) -> Tensor:
        longest = max(map(len, leaves))
        return torch.cat([pad(leaf, (0, 0, 0, longest - len(leaf)), value=torch.nan) for leaf in leaves], dim=1)

    joined: Fit = tree_map(
        lambda *leaves: torch.cat(leaves), *(run._replace(losses=run.stopped, metrics=run.stopped) for run in runs)
    )
    losses, metrics = (history([getattr(run, name) for run in runs]) for name in ("losses", "metrics"))
    return joined._replace(losses=losses, metrics=metrics)
