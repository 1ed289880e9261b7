"""Text classification by a causal language model: prompts, batches, loss and accuracy.

The logit of a label is the model's logit for the label's first token, at the last position of the prompt. A label is
tokenized with a preceding space. The softmax over the label logits gives the probabilities of the labels. Prompts are
padded on the left, so that the last position is position -1 in every row.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from .batches import batch_order


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .examples import Example

PROMPT = "Review: {text}\nSentiment:"
MAX_TOKENS = 256  # default maximum length of a prompt
Batch = dict[str, Tensor]


class Encoded(NamedTuple):
    """A tokenized prompt and the index of its label."""

    ids: list[int]
    label: int


class Score(NamedTuple):
    """Accuracy and mean loss: scalars for one adapter, and (n,) for stacked adapters."""

    accuracy: Float[Tensor, "*n"]
    loss: Float[Tensor, "*n"]


def answer_ids(
    tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str], prompt: str = PROMPT
) -> Int[Tensor, " labels"]:
    """The first token of each label, as tokenized after the prompt.

    Args:
        tokenizer: Tokenizer of the model.
        labels: All labels.
        prompt: Prompt template with `{text}`.

    Raises:
        ValueError: If two labels begin with the same token, so that their logits would be equal.
    """
    stem = prompt.format(text="")
    begin = tokenizer(stem).input_ids
    first = []
    for label in labels:
        ids = tokenizer(f"{stem} {label}").input_ids
        # Not ids[len(begin)], since some tokenizers append a special token to every text.
        first.append(next(b for a, b in zip_longest(begin, ids) if a != b))
    if len(set(first)) < len(labels):
        same = [label for label, id in zip(labels, first, strict=True) if first.count(id) > 1]
        raise ValueError(
            f"the labels {same} begin with the same token in this model's vocabulary, so their predictions would be "
            "equal. Rename the labels so that each label begins with a different word."
        )
    return torch.tensor(first)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Sequence[Example]",
    labels: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
    prompt: str = PROMPT,
) -> list[Encoded]:
    """Tokenize examples as prompts. In a prompt of more than `max_tokens` tokens, the end of the text is cut off.

    Args:
        tokenizer: Tokenizer of the model.
        examples: The examples.
        labels: All labels. `Encoded.label` is an index into `labels`.
        max_tokens: Maximum length of a prompt.
        prompt: Prompt template with `{text}`.
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
    """Make a batch of `input_ids`, `attention_mask`, `position_ids` (b, seq) and `label` (b,), padded on the left.

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
        # Absolute positions (GPT-2) count from the first token, not from the padding.
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "label": torch.tensor([row.label for row in rows]),
    }


def batches_by_length(rows: Sequence[Encoded], batch_size: int, pad_id: int = 0) -> list[Batch]:
    """Return batches of examples of similar length, to reduce padding; `"row"` (b,) is each example's index in `rows`.

    Example:
        >>> rows = [Encoded([5, 6, 7], 1), Encoded([8], 0), Encoded([5, 6], 0)]
        >>> [batch["row"].tolist() for batch in batches_by_length(rows, 2)]
        [[1, 2], [0]]
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [{**collate([rows[i] for i in batch], pad_id), "row": torch.tensor(batch)} for batch in batches]


def train_batches(
    rows: Sequence[Encoded], batch_size: int, *, seed: int, pad_id: int = 0, window: int = 16
) -> Callable[[int], Batch]:
    """Return a function `step -> batch` that shuffles each epoch and batches examples of similar length.

    See `batch_order`.

    Args:
        rows: From `encode`.
        batch_size: Examples per batch.
        seed: Seed of the order.
        pad_id: Token to pad with.
        window: Batches per window; with `window=1`, rows are not grouped by length.

    Raises:
        ValueError: If there are fewer examples than `batch_size`.
    """
    order = batch_order([len(row.ids) for row in rows], batch_size, seed=seed, window=window)
    return lambda step: collate([rows[i] for i in order(step)], pad_id)


def accepted_arguments(model: torch.nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's forward; some models lack `position_ids` or `logits_to_keep`."""
    return frozenset(inspect.signature(model.forward).parameters)


def answer_loss(logits: Float[Tensor, "b labels"], label: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the labels, in float32.

    Args:
        logits: Logits of the labels at the last position of the prompt.
        label: Index of the correct label.

    Example:
        >>> answer_loss(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        tensor(0.6931)
    """
    return cross_entropy(logits.float(), label)


@torch.no_grad()
def score(
    logits_fn: Callable[[Batch], Float[Tensor, "*n b labels"]],
    rows: Sequence[Encoded],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    map: Callable[..., Iterable[Any]] = map,
) -> Score:
    """Compute the accuracy and the mean loss of one adapter, or of each of `n` stacked adapters.

    Args:
        logits_fn: Function that returns the label logits of a batch.
        rows: From `encode`.
        batch_size: Examples per batch.
        pad_id: Token to pad with.
        progress: Progress bar for the batches, such as `tqdm.tqdm`.
        map: Replacement for the built-in `map`; `map_sharded` shards the batches across ranks.
    """

    def sums(batch: Batch) -> tuple[Tensor, Tensor]:
        logits = logits_fn(batch).double()  # (*n, b, labels)
        label = batch["label"].to(logits.device)
        correct = label.expand(logits.shape[:-1])[..., None]
        loss = -logits.log_softmax(-1).gather(-1, correct).sum((-2, -1))
        return (logits.argmax(-1) == label).sum(-1), loss

    batches = progress(batches_by_length(rows, batch_size, pad_id))
    right, loss = (sum(column) for column in zip(*map(sums, batches), strict=True))
    return Score(right.double() / len(rows), loss / len(rows))
