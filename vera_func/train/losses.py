"""Losses of language models as pure functions: next-token loss, and log-probabilities of sequences.

    total, count = next_token_loss(hidden, head, labels)  # sum of -log p(label | previous tokens), number of labels
    sequence_logprobs(hidden, head, labels)  ==  -total

The logits of a language model are the product of hidden states (tokens, width) and the output head (vocab, width). The
logits are usually the largest tensor of a training step. To avoid storing the logits of all positions, the loss
functions apply the head only to positions with a label, one chunk of positions at a time. The log-softmax is computed
in float32. With `model.head.hidden_and_head`, the loss of a model is

    hidden, head = hidden_and_head(apply, params, frozen, input_ids=ids, attention_mask=mask)
    total, count = next_token_loss(hidden, head, labels)
    loss = total.sum() / count.sum()

To average losses over micro-batches or ranks, weight the loss of each micro-batch by the `count.sum()` of that
micro-batch. If the rows of a batch have different adapters, average over the rows of each adapter separately. For
stacked adapters, apply `vmap_adapters` to a function that returns the losses of rows:

    def row_losses(params, frozen, input_ids, labels):
        return next_token_loss(*hidden_and_head(apply, params, frozen, input_ids=input_ids), labels)

    total, count = vmap_adapters(row_losses, in_dims=None)(stacked, frozen, ids, labels)  # each (n, rows)

Axes: `rows` (of a batch), `seq` (tokens of a row), `width` (of a hidden state), `vocab` (of the tokenizer).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.shapes import described
from ..model.head import RowHead
from ..private import has_values
from .chunked import function_losses, weight_losses
from .preferences import PreferenceLoss as PreferenceLoss, dpo_loss as dpo_loss  # part of this module's API


Head = Tensor | Callable[[Tensor], Tensor]
IGNORED = -100  # label of positions without a target, as in transformers


class TokenLoss(NamedTuple):
    """The loss and the number of labels of each row; `total / count` is the mean loss per label.

    Attributes:
        total: Sum of `-log p(label)` over the labels of each row, in float32 (float64 if the hidden states are
            float64).
        count: Number of labels of each row.
    """

    total: Float[Tensor, "*rows"]
    count: Int[Tensor, "*rows"]  # type: ignore[assignment]  # in place of the method of tuples


def next_token_loss(
    hidden: Float[Tensor, "*rows seq width"],
    head: Head | None,
    labels: Int[Tensor, "*rows seq"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    chunk_size: int | None = None,
) -> TokenLoss:
    """Return, for each row, the negative sum of the log-probabilities of its labels.

    As in transformers, `labels` are the input ids, with -100 at positions without a target (prompts, padding). The
    hidden state at position `t` predicts the label at position `t + 1`. The head is applied only to positions with a
    target, `chunk_size` positions at a time. If `head` is a weight, the backward pass needs no stored logits, even
    under `torch.func` transforms: one tensor of the size of `hidden` is stored instead. If `head` is a function, plain
    autograd and `vera_func.grad` recompute the logits of each chunk in the backward pass; transforms of `torch.func`
    store the logits.

    Under `torch.compile`, and under `vmap` over the labels, the values of `labels` are unknown, so the head is applied
    to every position. If the values of `labels` are unknown, a negative label other than -100 does not raise an error;
    the total of the row is NaN. Keep `labels` on the CPU, since reading labels from an accelerator synchronizes with
    the device.

    Args:
        hidden: Input of the output head, or the logits if `head` is None.
        head: Weight of the head (vocab, width); or a function that maps (tokens, width) to logits (tokens, vocab), such
            as a quantized or adapted layer; or a `RowHead` from `hidden_and_head`. None if `hidden` are logits.
        labels: Token ids, and -100 for positions without a target. Stacked adapters can share labels (rows, seq) if
            `hidden` is (n, rows, seq, width).
        bias: Bias of the head, allowed only if `head` is a weight.
        chunk_size: Number of positions whose logits are in memory at once. The default is a quarter of the positions,
            with an upper limit. If `head` is a weight or None, the logits of a chunk have at most 2^23 elements (2^26
            on a GPU). If `head` is a function, a chunk has at most 128 positions (1024 on a GPU).

    Returns:
        `(total, count)`, see `TokenLoss`.

    Raises:
        ValueError: If shapes or dtypes do not match, or if a label is neither a token id nor -100.

    Example:
        >>> hidden, weight = torch.zeros(2, 4, 8), torch.ones(10, 8)
        >>> labels = torch.tensor([[1, 2, 3, 4], [-100, -100, -100, 5]])
        >>> total, count = next_token_loss(hidden, weight, labels)
        >>> total / count, count  # log 10 for each of the labels
        (tensor([2.3026, 2.3026]), tensor([3, 1]))
    """
    vocab = _check(hidden, head, labels, bias, chunk_size)
    rows, positions = hidden.shape[:-2], hidden.shape[-2] - 1
    x, targets = hidden[..., :-1, :], labels[..., 1:].long().expand(*rows, positions)
    counted = targets != IGNORED
    count = counted.sum(-1).to(hidden.device)
    if isinstance(head, RowHead):
        nll = _rowwise_losses(x, head, targets, counted, chunk_size)
    else:
        nll = _losses(x.reshape(-1, x.shape[-1]), head, bias, targets.reshape(-1), vocab, chunk_size)
        nll = nll.reshape(*rows, positions)
    return TokenLoss(nll.sum(-1), count)


def sequence_logprobs(
    hidden: Float[Tensor, "*rows seq width"],
    head: Head | None,
    labels: Int[Tensor, "*rows seq"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    chunk_size: int | None = None,
) -> Float[Tensor, "*rows"]:
    """Return the log-probability of the labels of each row, for example of an answer, given its prompt.

    Args:
        hidden: See `next_token_loss`.
        head: See `next_token_loss`.
        labels: Token ids, and -100 at positions of prompt and padding; see `next_token_loss`.
        bias: See `next_token_loss`.
        chunk_size: See `next_token_loss`.

    Returns:
        The log-probability of each row; 0 for a row without targets.

    Raises:
        ValueError: See `next_token_loss`.

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> sequence_logprobs(logits, None, torch.tensor([[0, 1, 2]]))  # 2 log 1/4
        tensor([-2.7726])
    """
    return -next_token_loss(hidden, head, labels, bias=bias, chunk_size=chunk_size).total


def _losses(
    x: Tensor, head: Head | None, bias: Tensor | None, targets: Tensor, vocab: int | None, chunk_size: int | None
) -> Tensor:
    """The losses (tokens,), which are 0 at positions without a target."""
    counted = targets != IGNORED
    index, largest = None, -1
    if has_values(targets):
        index = counted.nonzero()[:, 0]
        targets = targets[index]
        largest = _largest(targets)
        _check_vocabulary(largest, vocab)
        index = index.to(x.device)
        chosen = x.index_select(0, index)
    else:
        wrong = (counted & (targets < 0)).to(x.device)
        counted, targets = counted.to(x.device), targets.clamp(min=0)
        chosen = torch.where(counted[:, None], x, 0)  # not x * counted, since NaN * 0 is NaN
    targets = targets.to(x.device)
    chunk = chunk_size or _default_chunk(len(chosen), vocab, x)
    if isinstance(head, Tensor):
        nll = weight_losses(chosen, head, bias, targets, chunk)
    else:
        nll = function_losses(chosen, partial(_logits, head, largest), targets, chunk)
    if index is None:
        return torch.where(counted, nll.masked_fill(wrong, float("nan")), 0)
    return nll.new_zeros(len(x)).index_copy(0, index, nll)


def _rowwise_losses(x: Tensor, head: RowHead, targets: Tensor, counted: Tensor, chunk_size: int | None) -> Tensor:
    """The losses (*rows, k), after moving the targets of each row to the front of the row."""
    largest = -1
    if has_values(targets):
        largest = _largest(targets[counted])
        most = int(counted.sum(-1).max()) if counted.numel() else 0
        order = torch.argsort(counted.to(torch.uint8), dim=-1, descending=True, stable=True)[..., :most]
        targets, counted = targets.gather(-1, order), counted.gather(-1, order)
        order = order.to(x.device)
        x = x.gather(-2, order[..., None].expand(*order.shape, x.shape[-1]))
    wrong = (counted & (targets < 0)).to(x.device)
    counted, targets = counted.to(x.device), targets.clamp(min=0).to(x.device)
    x = torch.where(counted[..., None], x, 0)
    rows = max(counted[..., :1].numel(), 1)
    chunk = max((chunk_size or _default_chunk(counted.numel(), None, x)) // rows, 1)
    nll = function_losses(x, partial(_logits, head, largest), targets, chunk)
    return torch.where(counted, nll.masked_fill(wrong, float("nan")), 0)


def _logits(head: Callable[[Tensor], Tensor] | None, largest: int, x: Tensor) -> Tensor:
    """The logits of a chunk, after checks; `largest` is the largest label."""
    logits = x if head is None else head(x)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != x.shape[:-1] or not logits.is_floating_point():
        expected = (*x.shape[:-1], "vocab")
        raise ValueError(
            f"head must return logits ({', '.join(map(str, expected))}) for an input of shape {tuple(x.shape)}, got "
            f"{described(logits)}."
        )
    _check_vocabulary(largest, logits.shape[-1])
    return logits


def _default_chunk(tokens: int, vocab: int | None, x: Tensor) -> int:
    """The default number of positions per chunk; see `next_token_loss`."""
    most = (1024 if x.is_cuda else 128) if vocab is None else (2**26 if x.is_cuda else 2**23) // vocab
    return max(min(most, tokens // 4 + 1), 1)


def _check(
    hidden: Tensor, head: Head | None, labels: Tensor, bias: Tensor | None, chunk_size: int | None
) -> int | None:
    """Check shapes and dtypes; returns the vocabulary size, or None if `head` is a function."""
    if not isinstance(hidden, Tensor) or hidden.dim() < 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be a floating-point tensor (*rows, seq, width), got {described(hidden)}.")
    if isinstance(head, Tensor) and not head.is_floating_point() and labels is None:
        raise ValueError(
            "head is an integer tensor, and labels is None: to pass logits, call next_token_loss(logits, None, labels)."
        )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be an integer tensor of token ids and -100, got {described(labels)}.")
    rows = hidden.shape[:-1]
    if not labels.dim() or labels.dim() > len(rows) or labels.shape != rows[len(rows) - labels.dim() :]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not match hidden {tuple(hidden.shape)}: pass labels of shape "
            f"{tuple(rows)}, one label for each position; do not shift labels."
        )
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f"chunk_size must be a positive number of positions or None, got {chunk_size!r}.")
    if head is None or not isinstance(head, Tensor):
        if bias is not None:
            raise ValueError(
                "bias was passed, but head is not a weight: add the bias in the head function, or to the logits."
            )
        if head is not None and not callable(head):
            raise ValueError(f"head must be a weight (vocab, width), a function or None, got {type(head).__name__}.")
        return hidden.shape[-1] if head is None else None
    if head.dim() != 2 or head.shape[1] != hidden.shape[-1] or head.dtype != hidden.dtype:
        raise ValueError(
            f"head {tuple(head.shape)} {head.dtype} does not fit hidden {tuple(hidden.shape)} {hidden.dtype}: pass the "
            f"head's weight (vocab, {hidden.shape[-1]}) in the dtype of hidden; if hidden are logits, pass head=None."
        )
    if bias is not None and not isinstance(bias, Tensor):
        raise ValueError(f"bias must be a tensor of shape ({head.shape[0]},) or None, got {type(bias).__name__}.")
    if bias is not None and (bias.shape != head.shape[:1] or bias.dtype != head.dtype):
        raise ValueError(
            f"bias must have shape ({head.shape[0]},) and dtype {head.dtype} to match head, got {tuple(bias.shape)} "
            f"{bias.dtype}."
        )
    return head.shape[0]


def _largest(targets: Tensor) -> int:
    """The largest target, or -1 if there are no targets. A negative target raises an error."""
    if not targets.numel():
        return -1
    low, high = (int(value) for value in targets.aminmax())
    if low < 0:
        raise ValueError(f"labels must be token ids, or {IGNORED} for positions without a target, got {low}.")
    return high


def _check_vocabulary(largest: int, vocab: int | None) -> None:
    if vocab is not None and largest >= vocab:
        raise ValueError(f"labels must be token ids from 0 to {vocab - 1}, or {IGNORED}, got {largest}.")
