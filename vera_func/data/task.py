"""Text classification as a task: logits, loss and score functions of adapters.

A `Task` contains the labels and the prompt, which do not depend on the adapter. `logits_of`, `loss_of` and `score_of`
combine a task with one adapter or with stacked adapters (n, ...). Stacked adapters share each forward pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..model.adapt import Adapted
from ..model.batch import Params
from ..model.dora import fold_if_dora
from ..model.head import token_logits
from ..model.vmap import vmap_adapters
from .examples import Example
from .models import Base
from .prompts import (
    MAX_TOKENS,
    PROMPT,
    Batch,
    Encoded,
    Score,
    accepted_arguments,
    answer_ids,
    answer_loss,
    encode,
    score,
)


class Task(NamedTuple):
    """A text classification task for one model.

    Attributes:
        labels: All labels.
        prompt: Prompt template with `{text}`.
        answers: Id of the first token of each label.
        pad_id: Token to pad with.
        accepts: Names of the arguments of the model's forward.
        max_tokens: Maximum number of tokens of a prompt.
    """

    labels: list[str]
    prompt: str
    answers: Tensor
    pad_id: int
    accepts: frozenset[str]
    max_tokens: int = MAX_TOKENS

    @property
    def last_position(self) -> dict[str, Any]:
        """`{"logits_to_keep": 1}`, for logits at the last position only, or `{}` if the model lacks this argument."""
        return {"logits_to_keep": 1} if "logits_to_keep" in self.accepts else {}


def make_task(base: Base, labels: Sequence[str], prompt: str = PROMPT) -> Task:
    """Make the task of assigning one of `labels` to a text.

    Raises:
        ValueError: If `check_prompt` rejects the prompt, or if two labels begin with the same token.
    """
    answers = answer_ids(base.tokenizer, labels, check_prompt(prompt))
    return Task(list(labels), prompt, answers, base.pad_id, accepted_arguments(base.model))


def join_tasks(tasks: Sequence[Task]) -> tuple[Task, Int[Tensor, "n labels"]]:
    """Join tasks into one task with the answers of all tasks, for batches whose rows belong to different tasks.

    Args:
        tasks: Tasks with the same prompt and model, but different labels.

    Returns:
        The joint task, and the indices of each task's answers in the `answers` of the joint task. The indices are
        padded with -1; see `own_logits`. All fields of the joint task except `answers` are those of the first task.

    Example:
        >>> tasks = [Task([*labels], "{text}:", torch.tensor(ids), 0, frozenset()) for labels, ids in
        ...          ((("a", "b"), [7, 3]), (("c", "d", "e"), [9, 7, 5]))]
        >>> joint, places = join_tasks(tasks)
        >>> joint.answers, places
        (tensor([3, 5, 7, 9]), tensor([[ 2,  0, -1],
                [ 3,  2,  1]]))
    """
    answers = torch.cat([task.answers for task in tasks]).unique()
    places = torch.full((len(tasks), max(len(task.answers) for task in tasks)), -1)
    for own, task in zip(places, tasks, strict=True):
        own[: len(task.answers)] = torch.searchsorted(answers, task.answers)
    return tasks[0]._replace(answers=answers), places


def own_logits(logits: Float[Tensor, "b answers"], places: Int[Tensor, "b labels"]) -> Float[Tensor, "b labels"]:
    """Select the logits of each row's labels from the logits of all answers; where `places` is -1, the logit is -inf.

    Example:
        >>> own_logits(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2, 0, -1]]))
        tensor([[2., 0., -inf]])
    """
    return logits.gather(1, places.clamp(min=0)).masked_fill(places < 0, -torch.inf)


def check_prompt(prompt: str) -> str:
    """Return a prompt template, which must contain exactly one `{text}`, some other text, and no other braces.

    Raises:
        ValueError: If the template is invalid.

    Example:
        >>> check_prompt("Review: {text}")
        'Review: {text}'
    """
    try:
        valid = prompt.count("{text}") == 1 and bool(prompt.format(text=""))
    except (KeyError, IndexError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"a prompt must contain {{text}} exactly once, some other text, and no other braces; got {prompt!r}: pass "
            f"a prompt such as {PROMPT!r}."
        )
    return prompt


def encode_examples(base: Base, task: Task, examples: Sequence[Example]) -> list[Encoded]:
    """Tokenize examples as prompts of a task; in a prompt that is too long, the end of the text is cut off.

    Raises:
        ValueError: If the label of an example is not one of the task's labels.
    """
    odd = sorted({example.label for example in examples} - set(task.labels))
    if odd:
        raise ValueError(
            f"the data has the label {odd[0]!r}, but the adapter was trained on the labels {task.labels}: rename the "
            "label."
        )
    return encode(base.tokenizer, examples, task.labels, max_tokens=task.max_tokens, prompt=task.prompt)


def logits_of(
    adapted: Adapted, task: Task, *, stacked: bool = False
) -> Callable[[Params, Batch], Float[Tensor, "*n b labels"]]:
    """Return a function `(params, batch) -> label logits`, for one adapter or for stacked adapters.

    The output head computes only the logits of the labels' tokens (see `token_logits`). If the model accepts
    `logits_to_keep`, the head is applied only at the last position.
    """
    answers = task.answers.tolist()

    def logits(params: Params, frozen: Params, **inputs: Tensor) -> Tensor:
        return token_logits(adapted.apply, params, frozen, answers, **inputs, **task.last_position)[:, -1]

    many = vmap_adapters(logits, in_dims=None) if stacked else logits

    def bound(params: Params, batch: Batch) -> Tensor:
        device = next(iter(params.values())).device
        if stacked:  # one norm for each adapter, not for each row
            params = fold_if_dora(adapted.apply, params, adapted.frozen)
        return many(params, adapted.frozen, **{name: batch[name].to(device) for name in batch.keys() & task.accepts})

    return bound


def loss_of(adapted: Adapted, task: Task, *, stacked: bool = False) -> Callable[[Params, Batch], Float[Tensor, "*n"]]:
    """Return the loss function `(params, batch) -> loss` for `fit`; stacked adapters have one loss each."""
    logits = logits_of(adapted, task, stacked=stacked)
    loss = torch.func.vmap(answer_loss, (0, None)) if stacked else answer_loss

    def bound(params: Params, batch: Batch) -> Tensor:
        found = logits(params, batch)
        return loss(found, batch["label"].to(found.device))

    return bound


def score_of(adapted: Adapted, task: Task, params: Params, rows: Sequence[Encoded], **options: Any) -> Score:
    """Accuracy and mean loss of an adapter, or of each adapter in a stack.

    Args:
        adapted: The adapted model; `adapted.params` are ignored.
        task: From `make_task`.
        params: Params of one adapter, or stacked params.
        rows: From `encode_examples`.
        **options: Keyword arguments of `score`.
    """
    params = fold_if_dora(adapted.apply, params, adapted.frozen)  # once for all batches
    stacked = any(value.shape != adapted.apply.slots[key].shape for key, value in params.items())
    logits = partial(logits_of(adapted, task, stacked=stacked), params)
    return score(logits, rows, pad_id=task.pad_id, **options)
