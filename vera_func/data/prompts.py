"""Text classification by a causal language model: prompts, batches, loss, accuracy.

    P(label | text) = softmax over the labels of the logit of the first token of " label" after the prompt

A label is told by its first token, at the last position of the prompt. Prompts are padded on the left, so that this is
position -1 in every row.

Shapes: `b` rows of a batch, `seq` tokens, `labels`.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..train.fit import epoch_order


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .examples import Example

PROMPT = "Review: {text}\nSentiment:"
Batch = dict[str, Tensor]


class Encoded(NamedTuple):
    """A tokenized prompt and the index of its label."""

    ids: list[int]
    label: int


class Score(NamedTuple):
    """Accuracy and mean loss of one adapter (`*n` is nothing) or of each of `n`."""

    accuracy: Float[Tensor, "*n"]
    loss: Float[Tensor, "*n"]


def answer_ids(
    tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str], prompt: str = PROMPT
) -> Int[Tensor, " labels"]:
    """The first token of each label, as it is tokenized after the prompt.

    Args:
        tokenizer: The model's.
        labels: All labels.
        prompt: With `{text}` in it.

    Raises:
        ValueError: If two labels begin with the same token, so that the model cannot tell them apart.
    """
    stem = prompt.format(text="")
    begin = tokenizer(stem).input_ids
    first = []
    for label in labels:
        ids = tokenizer(f"{stem} {label}").input_ids
        # Not simply the token at len(begin): some tokenizers end every text with a special token.
        first.append(next(b for a, b in zip_longest(begin, ids) if a != b))
    if len(set(first)) < len(labels):
        same = [label for label, id in zip(labels, first, strict=True) if first.count(id) > 1]
        raise ValueError(
            f"the labels {same} begin with the same token in this model's vocabulary, so the model cannot tell them "
            "apart. Rename them so that each begins with a different word."
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
    """Examples as tokenized prompts. In a prompt that is too long, the end of the text is cut off.

    Args:
        tokenizer: The model's.
        examples: What to encode.
        labels: All labels; an example's becomes its index in them.
        max_tokens: Length of the longest prompt.
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
    """A batch, padded on the left: `input_ids`, `attention_mask`, `position_ids` (b, seq) and `label` (b,).

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
    """All rows in batches of similar length, to save padding; `"row"` (b,) is each row's index in `rows`.

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
    """`step -> batch`, over shuffled epochs without end, with rows of similar length in a batch.

    The order of an epoch, from `epoch_order`, is cut into windows of `window` batches. Rows are sorted by length within
    a window, and then the batches are shuffled. This saves a third of the tokens, which would be padding. The last rows
    of an epoch are left out of it if they do not fill a batch.

    Args:
        rows: From `encode`.
        batch_size: Rows in a batch.
        seed: Of the order.
        pad_id: Token to pad with.
        window: Batches in a window; 1 leaves the order as it is.

    Raises:
        ValueError: If there are fewer rows than a batch takes.
    """
    per_epoch = len(rows) // batch_size
    if per_epoch == 0:
        raise ValueError(f"{len(rows)} training examples do not fill a batch of {batch_size}.")
    epochs: dict[int, list[list[int]]] = {}

    def batches_of(epoch: int) -> list[list[int]]:
        order = epoch_order(len(rows), key=seed, epoch=epoch)[: per_epoch * batch_size].tolist()
        windows = (order[start : start + window * batch_size] for start in range(0, len(order), window * batch_size))
        order = [i for part in windows for i in sorted(part, key=lambda i: len(rows[i].ids))]
        shuffled = epoch_order(per_epoch, key=f"{seed}, batches", epoch=epoch).tolist()
        return [order[i * batch_size : (i + 1) * batch_size] for i in shuffled]

    def batch(step: int) -> Batch:
        epoch, position = divmod(step, per_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = batches_of(epoch)
        return collate([rows[i] for i in epochs[epoch][position]], pad_id)

    return batch


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` micro-batches of nearly equal size; some are empty if there are more of them than rows.

    Example:
        >>> [part["label"].tolist() for part in split_batch({"label": torch.arange(5)}, 2)]
        [[0, 1, 2], [3, 4]]
    """
    columns = [leaf.tensor_split(parts) for leaf in batch.values()]
    return [dict(zip(batch, leaves, strict=True)) for leaves in zip(*columns, strict=True)]


def num_rows(batch: Batch) -> int:
    """The number of rows of a batch: the weight of its mean loss.

    Example:
        >>> num_rows({"label": torch.zeros(3)})
        3
    """
    return len(batch["label"])


def accepted_arguments(model: torch.nn.Module) -> frozenset[str]:
    """The names of the arguments of a model's forward; not all models take `position_ids` or `logits_to_keep`."""
    return frozenset(inspect.signature(model.forward).parameters)


def answer_loss(logits: Float[Tensor, "b labels"], label: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the labels, in float32.

    Args:
        logits: Of each label, at the end of the prompt.
        label: Index of the right one.

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
    """Accuracy and mean loss of one adapter, or of each of `n`, in batches of similar length.

    Args:
        logits_fn: From a batch to the logits of each label.
        rows: From `encode`.
        batch_size: Rows in a batch.
        pad_id: Token to pad with.
        progress: Wraps the list of batches, as tqdm does.
        map: Computes the batches; `map_sharded` shards them across processes.
    """

    def sums(batch: Batch) -> tuple[Tensor, Tensor]:
        logits = logits_fn(batch).double()  # (*n, b, labels)
        wanted = batch["label"].expand(logits.shape[:-1])[..., None]
        loss = -logits.log_softmax(-1).gather(-1, wanted).sum((-2, -1))
        return (logits.argmax(-1) == batch["label"]).sum(-1), loss

    batches = progress(batches_by_length(rows, batch_size, pad_id))
    right, loss = (sum(column) for column in zip(*map(sums, batches), strict=True))
    return Score(right.double() / len(rows), loss / len(rows))
