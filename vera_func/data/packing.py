"""Pack several documents into each row of a batch, without attention between documents.

    `split` cuts a long document into pieces of at most `max_length` tokens.
    `pack` groups documents into rows of at most `max_length` tokens, with little padding.
    `packed_batch` makes a batch in which each document attends only to itself, and positions restart at each document.
    `is_packable` tests whether a model supports packed documents.

A document in a packed row has the same logits and losses as in a row without other documents.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..train.losses import IGNORED


Document = tuple[Sequence[int], Sequence[int]]  # token ids, and labels
T = TypeVar("T", bound=Sequence[int])


def split(document: T, max_length: int) -> list[T]:
    """Cut a sequence into pieces of at most `max_length` tokens; an empty sequence has no pieces.

    Example:
        >>> split([5, 6, 7, 8, 9], 2)
        [[5, 6], [7, 8], [9]]
    """
    _check_length(max_length)
    return [document[start : start + max_length] for start in range(0, len(document), max_length)]  # type: ignore[misc]


def pack(lengths: Iterable[int], max_length: int) -> list[list[int]]:
    """Group documents into rows of at most `max_length` tokens; return the indices of the documents of each row.

    Best-fit decreasing: the longest remaining document goes into the fullest row that has room for the document. The
    documents of a row are in their original order. Rows are ordered by their first document.

    Args:
        lengths: Number of tokens of each document.
        max_length: Maximum number of tokens of a row.

    Raises:
        ValueError: If a length is not positive, or if a length is greater than `max_length`.

    Example:
        >>> pack([5, 2, 4, 3], 8)
        [[0, 3], [1, 2]]
    """
    _check_length(max_length)
    lengths = list(lengths)
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # rows by their number of free tokens
    spaces: list[int] = []  # the keys of `by_space`, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not 0 < lengths[i] <= max_length:
            raise ValueError(
                f"document {i} has {lengths[i]} tokens, but must have 1 to {max_length}: cut long documents with split."
            )
        at = bisect_left(spaces, lengths[i])
        if at == len(spaces):
            row, space = len(rows), max_length
            rows.append([])
        else:
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        rows[row].append(i)
        left = space - lengths[i]
        if left not in by_space:
            by_space[left] = []
            insort(spaces, left)
        by_space[left].append(row)
    return sorted(sorted(row) for row in rows)


def packed_batch(
    rows: Sequence[Sequence[Document]], *, pad_id: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Make a batch of packed rows, padded on the right.

    The attention mask is block-diagonal and causal. The mask replaces the model's mask, including any sliding window.
    Therefore each token attends to all previous tokens of its document.

    Args:
        rows: The documents of each row. A document is a pair of token ids and labels, with the label -100 where there
            is no target. For language modelling, the labels are the token ids.
        pad_id: Token to pad with.
        dtype: Dtype of the attention mask; must be the dtype of the model's activations.

    Returns:
        `input_ids`, `position_ids` and `labels` (b, seq), and `attention_mask` (b, 1, seq, seq). The mask is added to
        the attention scores. The label of the first token of each document is -100.

    Raises:
        ValueError: If there are no rows, if a row or a document is empty, or if the token ids and the labels of a
            document differ in length.

    Example:
        >>> batch = packed_batch([[([5, 6], [5, 6]), ([7, 8, 9], [-100, 8, 9])], [([5, 6, 7], [5, 6, 7])]])
        >>> batch["labels"]
        tensor([[-100,    6, -100,    8,    9],
                [-100,    6,    7, -100, -100]])
        >>> batch["position_ids"]
        tensor([[0, 1, 0, 1, 2],
                [0, 1, 2, 0, 1]])
        >>> (batch["attention_mask"][0, 0] == 0).int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [0, 0, 1, 0, 0],
                [0, 0, 1, 1, 0],
                [0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    if not rows or not all(rows) or not all(len(ids) for row in rows for ids, _ in row):
        raise ValueError(
            "there are no rows, or a row has no documents, or a document has no tokens: remove empty rows and "
            "documents, and pass at least one row."
        )
    for tokens, targets in (document for row in rows for document in row):
        if len(tokens) != len(targets):
            raise ValueError(f"a document has {len(tokens)} tokens and {len(targets)} labels: pass a label per token.")
    width = max(sum(len(ids) for ids, _ in row) for row in rows)
    shape = len(rows), width
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    positions, owner = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        # The padding is one more document, so that each position attends at least to itself.
        padding = width - sum(len(ids) for ids, _ in row)
        begin = 0
        for k, (tokens, targets) in enumerate([*row, ([pad_id] * padding, [IGNORED] * padding)]):
            end = begin + len(tokens)
            ids[i, begin:end] = torch.as_tensor(tokens)
            labels[i, begin:end] = torch.as_tensor(targets)
            labels[i, begin : begin + 1] = IGNORED
            positions[i, begin:end] = torch.arange(len(tokens))
            owner[i, begin:end] = k
            begin = end
    sees = (owner[:, :, None] == owner[:, None, :]).tril()
    mask = torch.zeros(len(rows), 1, width, width, dtype=dtype)
    mask = mask.masked_fill(~sees[:, None], torch.finfo(dtype).min)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


@torch.no_grad()
def is_packable(
    logits: Callable[..., Tensor],
    max_length: int,
    *,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> bool:
    """Test on two short documents whether a model processes the documents of a packed row independently.

    Models with recurrent or convolutional layers (Mamba, RWKV, Jamba, Qwen3-Next, LFM2) fail the test: these layers
    ignore the attention mask, and carry state from one document to the next. Models that do not accept a mask of 4
    dimensions (BLOOM) also fail the test.

    Args:
        logits: Function that returns logits (b, seq, vocab). The function is called with the keyword
            arguments `input_ids` (token ids from 1 to 6) and, for packed rows, `position_ids` and `attention_mask`.
        max_length: Maximum number of tokens of a document.
        window: Size of the model's sliding attention window; None means no window. The mask of packed rows replaces the
            window, so `is_packable` returns False if `max_length` is larger than `window`.
        dtype: Dtype of the model's activations.
        device: Device of the model.

    Example:
        >>> def embeddings(input_ids, **_):
        ...     return torch.nn.functional.one_hot(input_ids, 7).float()
        >>> is_packable(embeddings, 8), is_packable(embeddings, 8, window=4)
        (True, False)
        >>> is_packable(lambda input_ids, **_: embeddings(input_ids).cumsum(1), 8)  # a recurrent model
        False
    """
    if window is not None and window < max_length:
        return False
    document = [6, 4, 2]

    def after(first: list[int]) -> Tensor:
        batch = packed_batch([[(first, first), (document, document)]], dtype=dtype)
        del batch["labels"]
        return logits(**{name: leaf.to(device) for name, leaf in batch.items()})[0, len(first) :].float()

    try:
        packed, other = after([1, 2, 3, 4, 5]), after([5, 1, 4, 2, 3])
    except Exception:  # a model may raise anything
        return False
    alone = logits(input_ids=torch.tensor([document], device=device))[0].float()
    # If documents do not attend to each other, another first document changes only the last bits of the logits. Another
    # shape of the batch changes more bits.
    exact, rounded = (1e-5, 0.01) if dtype == torch.float32 else (1e-3, 0.1)
    size = alone.norm()
    return bool((packed - other).norm() < exact * size) and bool((packed - alone).norm() < rounded * size)


def _check_length(max_length: int) -> None:
    if not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length must be a positive number of tokens, got {max_length!r}.")
