"""Text classification by a causal language model that answers: prompts, batches, loss, accuracy.

    P(label | text) = softmax over all labels of the logit of " label" after the prompt

Only the first token of each answer is looked at, at the last position of the prompt. Prompts are
padded on the left, so that this is position -1 of every row.

Shapes: `b` rows of a batch, `seq` tokens, `labels`, `vocab`.
"""

import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .examples import Example

PROMPT = "Review: {text}\nSentiment:"
Batch = dict[str, Tensor]


class Encoded(NamedTuple):
    """A prompt in tokens and the index of its label."""

    ids: list[int]
    label: int


class Score(NamedTuple):
    """Of one adapter, or of each of `n`: the share of right answers, and the mean loss."""

    accuracy: Float[Tensor, "*n"]
    loss: Float[Tensor, "*n"]


def answer_ids(
    tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str], prompt: str = PROMPT
) -> Int[Tensor, " labels"]:
    """The first token of each answer, " label" after the prompt.

    Raises:
        ValueError: If two answers begin with the same token: they could not be told apart.
    """
    stem = prompt.format(text="")
    begin = tokenizer(stem).input_ids
    first = []
    for label in labels:
        ids = tokenizer(f"{stem} {label}").input_ids
        # Not simply the token at len(begin): some tokenizers close a text with one of their own.
        first.append(next(b for a, b in zip_longest(begin, ids) if a != b))
    if len(set(first)) < len(labels):
        same = [label for label, id in zip(labels, first, strict=True) if first.count(id) > 1]
        raise ValueError(
            f"the answers {same} begin with the same token for this model, which cannot tell them "
            "apart then: rename these labels so that each begins with a word of its own."
        )
    return torch.tensor(first)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Sequence[Example]",
    labels: Sequence[str],
    *,
    max_tokens: int = 256,
    prompt: str = PROMPT,
) -> list[Encoded]:
    """Examples as prompts in tokens. What is too long loses the end of its text, not the prompt's.

    Args:
        tokenizer: The model's.
        examples: What to encode.
        labels: All labels; an example's becomes its index in them.
        max_tokens: Longest prompt.
        prompt: With `{text}` in it.
    """
    index = {label: i for i, label in enumerate(labels)}
    texts = tokenizer([prompt.format(text=example.text.strip()) for example in examples]).input_ids
    tail = tokenizer(prompt.partition("{text}")[2], add_special_tokens=False).input_ids
    return [
        Encoded(
            ids if len(ids) <= max_tokens else ids[: max_tokens - len(tail)] + tail,
            index[example.label],
        )
        for ids, example in zip(texts, examples, strict=True)
    ]


def collate(rows: Sequence[Encoded], pad_id: int = 0) -> Batch:
    """A batch, padded on the left: `input_ids`, `attention_mask`, `position_ids` and `label` (b,).

    Example:
        >>> collate([Encoded([5, 6, 7], 1), Encoded([8], 0)])["attention_mask"]
        tensor([[1, 1, 1],
                [0, 0, 1]])
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row.ids)) + row.ids for row in rows])
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        # Absolute positions, as GPT-2 has them, begin at the first token, not at the padding.
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "label": torch.tensor([row.label for row in rows]),
    }


def batches_by_length(rows: Sequence[Encoded], batch_size: int, pad_id: int = 0) -> list[Batch]:
    """All rows in batches of like length, so that little is padding; `"row"` (b,) says where each was.

    Example:
        >>> rows = [Encoded([5, 6, 7], 1), Encoded([8], 0), Encoded([5, 6], 0)]
        >>> [batch["row"].tolist() for batch in batches_by_length(rows, 2)]
        [[1, 2], [0]]
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [{**collate([rows[i] for i in part], pad_id), "row": torch.tensor(part)} for part in parts]


def train_batches(
    rows: Sequence[Encoded], batch_size: int, *, seed: int, pad_id: int = 0, window: int = 16
) -> Callable[[int], Batch]:
    """`step -> batch`: shuffled epochs, endless, with rows of like length together.

    An epoch is cut into windows of `window` batches, sorted by length within them and shuffled
    again by the batch: a third fewer tokens, since little is padding. Rows at its end that fill no
    batch wait for another epoch.

    Raises:
        ValueError: If there are fewer rows than a batch takes.
    """
    per_epoch = len(rows) // batch_size
    if per_epoch == 0:
        raise ValueError(f"{len(rows)} examples to train on do not fill a batch of {batch_size}.")
    epochs: dict[int, list[list[int]]] = {}

    def batch(step: int) -> Batch:
        epoch, position = divmod(step, per_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = _epoch(rows, batch_size, window, random.Random(f"{seed} {epoch}"))
        return collate([rows[i] for i in epochs[epoch][position]], pad_id)

    return batch


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The rows of a batch in parts of like size, some of them empty if there are more parts than rows.

    Example:
        >>> [part["label"].tolist() for part in split_batch({"label": torch.arange(5)}, 2)]
        [[0, 1, 2], [3, 4]]
    """
    columns = [leaf.tensor_split(parts) for leaf in batch.values()]
    return [dict(zip(batch, leaves, strict=True)) for leaves in zip(*columns, strict=True)]


def num_rows(batch: Batch) -> int:
    """Of a batch, the number that its loss is a mean of.

    Example:
        >>> num_rows({"label": torch.zeros(3)})
        3
    """
    return len(batch["label"])


def answer_logits(forward: Callable[..., Any], batch: Batch, accepts: frozenset[str]) -> Float[Tensor, "b vocab"]:
    """The logits at the last position, the only ones computed where the model has `logits_to_keep`.

    Args:
        forward: A model, or a partial of `apply`: its output has `.logits` (b, seq, vocab).
        batch: From `collate`.
        accepts: Arguments that the model takes, from `accepted_arguments`.
    """
    arguments: dict[str, Any] = {name: batch[name] for name in batch.keys() & accepts}
    if "logits_to_keep" in accepts:
        arguments["logits_to_keep"] = 1
    return forward(**arguments).logits[:, -1]


def accepted_arguments(model: torch.nn.Module) -> frozenset[str]:
    """The names that its forward takes: not all know `position_ids` or `logits_to_keep`."""
    return frozenset(inspect.signature(model.forward).parameters)


def answer_loss(
    logits: Float[Tensor, "b vocab"], label: Int[Tensor, " b"], answers: Int[Tensor, " labels"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the answers alone, in float32.

    Args:
        logits: At the last position.
        label: Indices into `answers`.
        answers: From `answer_ids`.

    Example:
        >>> import torch
        >>> answer_loss(torch.zeros(3, 10), torch.tensor([0, 1, 1]), torch.tensor([4, 7]))
        tensor(0.6931)
    """
    return cross_entropy(logits[:, answers].float(), label)


@torch.no_grad()
def score(
    logits_fn: Callable[[Batch], Float[Tensor, "*n b vocab"]],
    rows: Sequence[Encoded],
    answers: Int[Tensor, " labels"],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    map: Callable[..., Iterable[Any]] = map,
) -> Score:
    """How well one adapter, or each of `n`, answers. Batches are of like length.

    Args:
        logits_fn: `batch -> logits` at the last position.
        rows: From `encode`.
        answers: From `answer_ids`.
        batch_size: Rows in a batch.
        pad_id: For the padding.
        progress: Wraps the list of batches, as tqdm does.
        map: Computes the batches; `spread` deals them to several processes.
    """

    def sums(batch: Batch) -> tuple[Tensor, Tensor]:
        logits = logits_fn(batch)[..., answers].double()  # (*n, b, labels)
        wanted = batch["label"].expand(logits.shape[:-1])[..., None]
        loss = -logits.log_softmax(-1).gather(-1, wanted).sum((-2, -1))
        return (logits.argmax(-1) == batch["label"]).sum(-1), loss

    batches = progress(batches_by_length(rows, batch_size, pad_id))
    right, loss = (sum(column) for column in zip(*map(sums, batches), strict=True))
    return Score(right.double() / len(rows), loss / len(rows))


def _epoch(rows: Sequence[Encoded], batch_size: int, window: int, rng: random.Random) -> list[list[int]]:
    order = rng.sample(range(len(rows)), len(rows) // batch_size * batch_size)
    batches = []
    for start in range(0, len(order), window * batch_size):
        near = sorted(order[start : start + window * batch_size], key=lambda i: len(rows[i].ids))
        part = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        rng.shuffle(part)
        batches += part
    return batches
