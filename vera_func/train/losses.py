"""Losses of language models as pure functions: next-token loss, log-probabilities of sequences, and DPO.

    total, count = next_token_loss(hidden, head, labels)  # sum of -log p(label | previous tokens), number of labels
    sequence_logprobs(hidden, head, labels)  ==  -total
    dpo_loss(...).losses  ==  -log sigmoid(beta ((chosen - reference_chosen) - (rejected - reference_rejected)))

The logits of a language model are the product of hidden states (tokens, width) and the output head (vocab, width),
usually the largest tensor of a training step. The functions here apply the head only to positions with a label, one
chunk of positions at a time, so they do not store the logits of all positions. The log-softmax is computed in float32.
With `model.head.hidden_and_head`, the loss of a model is

    hidden, head = hidden_and_head(apply, params, frozen, input_ids=ids, attention_mask=mask)
    total, count = next_token_loss(hidden, head, labels)
    loss = total.sum() / count.sum()

To average losses over micro-batches or ranks, weight each loss by its `count.sum()`. In a mixed batch, average over the
rows of each adapter separately. For stacked adapters, apply `vmap_adapters` to a function that returns the losses of
rows:

    def row_losses(params, frozen, input_ids, labels):
        return next_token_loss(*hidden_and_head(apply, params, frozen, input_ids=input_ids), labels)

    total, count = vmap_adapters(row_losses, in_dims=None)(stacked, frozen, ids, labels)  # each (n, rows)

DPO needs the log-probabilities of a reference model. No second model is needed: the id -1 of `select_adapters` selects
the base model as the reference. The log-probabilities of the reference do not depend on beta and are computed once. In
this example, the first half of the rows of `ids` are the chosen answers, and one run trains an adapter for each beta:

    def logprobs(params, frozen, input_ids, labels):
        return sequence_logprobs(*hidden_and_head(apply, params, frozen, input_ids=input_ids), labels)

    base = select_adapters(stacked, [-1] * len(ids))  # or [k] * len(ids), another adapter of a stack
    with torch.no_grad():
        reference = logprobs(base, frozen, ids, labels)  # (2 * pairs,)

    def loss(stacked, batch):  # batch: indices of pairs; returns (n,)
        rows = torch.cat([batch, batch + len(ids) // 2])
        policy = vmap_adapters(logprobs, in_dims=None)(stacked, frozen, ids[rows], labels[rows])  # (n, 2 * rows)
        return dpo_loss(*policy.chunk(2, -1), *reference[rows].chunk(2), betas).losses.mean(-1)

    run = fit(loss, stacked, batches, steps=100, learning_rate=1e-2, num_adapters=len(betas))

Axes: `rows` (of a batch), `seq` (tokens of a row), `width` (of a hidden state), `vocab` (of the tokenizer).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.shapes import described, require_positive
from ..model.head import RowHead
from ..private import has_values
from .chunked import function_losses, weight_losses


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


class PreferenceLoss(NamedTuple):
    """The DPO loss and the reward margin of each pair of answers.

    Attributes:
        losses: `-log sigmoid(margins)`.
        margins: Reward of the chosen answer minus reward of the rejected answer. A reward is `beta * (log p - log
            p_reference)`. The reward accuracy is `(margins > 0).float().mean()`.
    """

    losses: Float[Tensor, "*pairs"]
    margins: Float[Tensor, "*pairs"]


def next_token_loss(
    hidden: Float[Tensor, "*rows seq width"],
    head: Head | None,
    labels: Int[Tensor, "*rows seq"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    chunk_size: int | None = None,
) -> TokenLoss:
    """Sum the negative log-probabilities of the labels of each row, from hidden states and the output head.

    As in transformers, `labels` are the input ids, with -100 at positions without a target (prompts, padding), and the
    hidden state at position `t` predicts the label at position `t + 1`. The head is applied only to positions with a
    target, `chunk_size` positions at a time. If `head` is a weight, no logits are stored for the backward pass, only
    one tensor of the size of `hidden`, also under transforms. If `head` is a function, plain autograd and
    `vera_func.grad` recompute the logits of each chunk in the backward pass; transforms of `torch.func` store the
    logits.

    Under `torch.compile`, and under `vmap` over the labels, the values of `labels` are unknown, so the head is applied
    to every position, and the total of a row with a negative label other than -100 is NaN. Reading `labels` from an
    accelerator synchronizes with the device; leave `labels` on the CPU to avoid it.

    Args:
        hidden: Input of the output head, or the logits if `head` is None.
        head: Weight of the head (vocab, width); or a function that maps (tokens, width) to logits (tokens, vocab), such
            as a quantized or adapted layer; or a `RowHead` from `hidden_and_head`. None if `hidden` are logits.
        labels: Token ids, and -100 for positions without a target. Stacked adapters, with hidden states (n, rows, seq,
            width), can share labels (rows, seq).
        bias: Bias of the head, allowed only if `head` is a weight.
        chunk_size: Number of positions whose logits are in memory at once. Default: a quarter of all positions, but at
            most 2^23 logits (2^26 on a GPU), or 128 positions (1024 on a GPU) if `head` is a function.

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
    """Sum the log-probabilities of the labels of each row: the log-probability of an answer, given its prompt.

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


def dpo_loss(
    chosen: Float[Tensor, "*pairs"],
    rejected: Float[Tensor, "*pairs"],
    reference_chosen: Float[Tensor, "*pairs"],
    reference_rejected: Float[Tensor, "*pairs"],
    beta: Float[Tensor, "*n"] | float,
) -> PreferenceLoss:
    """Compute the loss of direct preference optimization (DPO) for pairs of answers from their log-probabilities.

    Compute the log-probabilities of the reference once, under `torch.no_grad`, with the base model (id -1 of
    `select_adapters`) or with another adapter. Adapters with different `beta` can share the reference.

    Args:
        chosen: Log-probabilities of the better answers, from `sequence_logprobs`: (pairs,), or (n, pairs) for stacked
            adapters.
        rejected: Log-probabilities of the worse answers.
        reference_chosen: Log-probabilities of the better answers under the reference; (pairs,) if stacked adapters
            share the reference.
        reference_rejected: Log-probabilities of the worse answers under the reference.
        beta: Positive coefficient; larger values keep the policy closer to the reference. A tensor has the leading axes
            of `chosen`, such as (n,) for one value per stacked adapter.

    Returns:
        `(losses, margins)`, each with the shape of `chosen`.

    Raises:
        ValueError: If the shapes do not match, or if `beta` is a number that is not positive.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]), torch.zeros(2)
        >>> losses, margins = dpo_loss(chosen, rejected, reference, reference, beta=0.1)
        >>> margins, (margins > 0).float().mean()
        (tensor([ 0.1000, -0.1000]), tensor(0.5000))

        Three stacked adapters with different beta share the reference:

        >>> betas = torch.tensor([0.05, 0.1, 0.5])
        >>> policy = torch.randn(3, 4), torch.randn(3, 4)  # from vmap_adapters
        >>> dpo_loss(*policy, torch.zeros(4), torch.zeros(4), betas).losses.mean(-1).shape
        torch.Size([3])

    Reference:
        Rafailov et al. (2023), Direct Preference Optimization, equation 7.
    """
    given = {"chosen": chosen, "rejected": rejected}
    references = {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    for name, value in {**given, **references}.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a tensor of log-probabilities, from sequence_logprobs, got {described(value)}."
            )
        fits = value.shape == chosen.shape
        if name in references:  # may be shared along leading axes
            fits = value.dim() <= chosen.dim() and value.shape == chosen.shape[chosen.dim() - value.dim() :]
        if not fits:
            raise ValueError(
                f"{name} is {tuple(value.shape)}, but chosen is {tuple(chosen.shape)}: pass one value per pair."
            )
    if not isinstance(beta, Tensor):
        require_positive("beta", beta)
    elif beta.dim():
        if beta.shape != chosen.shape[: beta.dim()]:
            raise ValueError(
                f"beta has shape {tuple(beta.shape)}, but chosen is {tuple(chosen.shape)}: pass one value, or one "
                "value per stacked adapter."
            )
        beta = beta.to(chosen.dtype).reshape(*beta.shape, *[1] * (chosen.dim() - beta.dim()))
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return PreferenceLoss(-logsigmoid(margins), margins)


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
    """The losses (*rows, k) of the targets; the targets of a row are moved to its front."""
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
            f"head must return logits ({', '.join(map(str, expected))}) for an input {tuple(x.shape)}, got "
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
            "head is a tensor of integers, and labels is None: call next_token_loss(logits, None, labels)."
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
            f"head's weight (vocab, {hidden.shape[-1]}) in the dtype of hidden, or None for logits."
        )
    if bias is not None and (bias.shape != head.shape[:1] or bias.dtype != head.dtype):
        raise ValueError(
            f"bias must be ({head.shape[0]},) {head.dtype}, to match head, got {tuple(bias.shape)} {bias.dtype}."
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
