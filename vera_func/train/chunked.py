"""Cross-entropy over an output head, in chunks of positions.

    losses(x, weight, bias, targets, chunk) = logsumexp(z) - z[targets],    z = x weight^T + bias

The logits z (tokens, vocab) are computed and discarded `chunk` positions at a time. From the same logits, the forward
pass also computes the gradient of the losses with respect to x: (softmax(z) - onehot(targets)) weight. If the head is
frozen, chunks do not add floating-point operations to a training step. If the head is trained, the backward pass
recomputes the logits.

Higher derivatives are computed by `torch.func`, chunk by chunk.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, log_softmax
from torch.utils.checkpoint import checkpoint

from ..private import in_transform, keep_signature, requires_plain_form


def weight_losses(
    x: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    chunk: int,
) -> Float[Tensor, " tokens"]:
    """Compute `-log p(target)` of each position, with the output head given as a weight.

    Args:
        x: Input of the head.
        weight: Weight of the head.
        bias: Bias of the head, or None.
        targets: Token ids.
        chunk: Number of positions whose logits are computed at once.

    Example:
        >>> weight_losses(torch.zeros(3, 8), torch.ones(4, 8), None, torch.tensor([0, 1, 2]), 2)
        tensor([1.3863, 1.3863, 1.3863])
    """
    # Dynamo (torch 2.13) does not support a Function with a jvp, and the compiler itself decides what to save. With
    # gradients disabled, nothing is saved.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or requires_plain_form():
        parts = [_losses(linear(x[i], weight, bias), targets[i]) for i in _chunks(len(x), chunk)]
        return torch.cat(parts)
    return _ChunkedLosses.apply(x, weight, bias, targets, chunk)[0]


def function_losses(
    x: Float[Tensor, "*rows tokens width"],
    head: Callable[[Tensor], Tensor],
    targets: Int[Tensor, "*rows tokens"],
    chunk: int,
) -> Float[Tensor, "*rows tokens"]:
    """Compute `-log p(target)` of each position, with the output head given as a function.

    Under plain autograd, the backward pass recomputes the logits of each chunk.

    Args:
        x: Input of the head.
        head: Function that maps `x` (*rows, chunk, width) to logits (*rows, chunk, vocab). `head` must be
            deterministic, since the backward pass calls it again.
        targets: Token ids.
        chunk: Number of positions of each row whose logits are computed at once.

    Example:
        >>> function_losses(torch.zeros(3, 4), torch.nn.Identity(), torch.tensor([0, 1, 2]), 2)
        tensor([1.3863, 1.3863, 1.3863])
    """
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not in_transform()
    parts = []
    for i in _chunks(x.shape[-2], chunk):
        args = head, x[..., i, :], targets[..., i]
        parts.append(checkpoint(_function_losses, *args, use_reentrant=False) if again else _function_losses(*args))
    return torch.cat(parts, -1)


def _function_losses(head: Callable[[Tensor], Tensor], x: Tensor, targets: Tensor) -> Tensor:
    return _losses(head(x), targets)


def _chunks(size: int, chunk: int) -> Iterator[slice]:
    """Slices of length `chunk` that cover `range(size)`; if `size` is 0, one empty slice."""
    return (slice(start, start + chunk) for start in range(0, max(size, 1), chunk))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return -_log_probs(logits).gather(-1, targets[..., None])[..., 0]


def _log_probs(logits: Tensor) -> Tensor:
    return log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _losses_and_slopes(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each position, and the gradients of the losses with respect to `x`."""
    log_probs = _log_probs(linear(x, weight, bias))
    losses = -log_probs.gather(-1, targets[..., None])[..., 0]
    return losses, _errors(log_probs, targets).to(x.dtype) @ weight


def _errors(log_probs: Tensor, targets: Tensor) -> Tensor:
    """softmax(z) - onehot(targets), the gradient of the losses with respect to z; may overwrite `log_probs`."""
    index, ones = targets[..., None], log_probs.new_ones(()).expand(*targets.shape, 1)
    if torch.is_grad_enabled() or in_transform():
        return log_probs.exp().scatter_add(-1, index, -ones)
    return log_probs.exp_().scatter_add_(-1, index, -ones)  # in place, since a chunk of logits is large


@keep_signature
class _ChunkedLosses(torch.autograd.Function):
    """Autograd function that returns the losses and their gradients with respect to `x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, targets, chunk):
        parts = [_losses_and_slopes(x[i], weight, bias, targets[i]) for i in _chunks(len(x), chunk)]
        losses, slopes = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(slopes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, targets, ctx.chunk = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, targets, output[1])
        ctx.save_for_forward(x, weight, bias, targets)

    @staticmethod
    def backward(ctx, grad, grad_slopes):
        x, weight, bias, targets, slopes = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None, None]
        if grad is not None:
            if ctx.needs_input_grad[0]:
                grads[0] = (grad[:, None] * slopes).to(x.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                grads[1:] = _head_gradients(x, weight, bias, targets, ctx.chunk, grad)
        if grad_slopes is not None:  # backward itself is differentiated
            more = _slope_gradients(x, weight, bias, targets, ctx.chunk, grad_slopes)
            grads = [b if a is None else a + b for a, b in zip_longest(grads, more)]
        return *grads, None, None

    @staticmethod
    def jvp(ctx, x_t, weight_t, bias_t, targets_t, chunk_t):
        x, weight, bias, targets = ctx.saved_tensors
        parts = []
        for i in _chunks(len(x), ctx.chunk):
            primals, tangents = (x[i], weight, bias), (None if x_t is None else x_t[i], weight_t, bias_t)
            parts.append(_tangents(primals, tangents, targets[i]))
        losses, slopes = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(slopes)


def _head_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, grad: Tensor
) -> list[Tensor | None]:
    """The gradients of `grad @ losses` with respect to weight and bias, accumulated in float32 or wider."""
    of_weight = of_bias = None
    for i in _chunks(len(x), chunk):
        errors = grad[i, None] * _errors(_log_probs(linear(x[i], weight, bias)), targets[i])
        product = (errors.to(x.dtype).mT @ x[i]).to(errors.dtype)
        of_weight = product if of_weight is None else of_weight + product
        if bias is not None:
            of_bias = errors.sum(0) if of_bias is None else of_bias + errors.sum(0)
    assert of_weight is not None
    return [of_weight.to(weight.dtype), None if bias is None or of_bias is None else of_bias.to(bias.dtype)]


def _slope_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, grad: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `(grad * slopes).sum()` with respect to x, weight and bias; `slopes` is d losses / d x."""

    def slopes(targets: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _losses_and_slopes(x, weight, bias, targets)[1]

    head = (weight,) if bias is None else (weight, bias)
    of_x, of_head = [], [torch.zeros_like(leaf) for leaf in head]
    for i in _chunks(len(x), chunk):
        part, *more = torch.func.vjp(partial(slopes, targets[i]), x[i], *head)[1](grad[i])
        of_x.append(part)
        of_head = [a + b for a, b in zip(of_head, more, strict=True)]
    return torch.cat(of_x), *of_head


def _tangents(primals: tuple[Any, ...], tangents: tuple[Any, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
    """The tangents of a chunk's losses, and of d losses / d x. None in `tangents` means a tangent of zero."""
    moving = [k for k, tangent in enumerate(tangents) if tangent is not None]

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, bias = (dict(zip(moving, given, strict=True)).get(k, primals[k]) for k in range(3))
        return _losses_and_slopes(x, weight, bias, targets)

    return torch.func.jvp(function, tuple(primals[k] for k in moving), tuple(tangents[k] for k in moving))[1]
