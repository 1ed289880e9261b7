"""Evaluate a language model without its output head, and the head for some positions or tokens only.

    hidden = hidden_states(apply, params, frozen, input_ids=ids)  # (b, seq, width), the input of the head
    head_logits(apply, params, frozen, hidden)  ==  apply(params, frozen, input_ids=ids).logits

With a large vocabulary, the head costs as much as many layers, and its logits are the largest tensor of a training
step. A loss needs only the logits at labelled positions, and a classifier only those of a few tokens.

The hidden states are computed by the model's own forward, with the identity in place of the head. This is correct for
every model that returns the output of its head as logits. A model that transforms the logits (Gemma 2 caps them,
Granite scales them, BART adds a bias) is detected, and its head is not skipped.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..private import unwrap
from .apply import Apply
from .base_layers import DenseLinear, RowwiseAffine
from .batch import Params


# Roots of models that transform their logits, so that `token_logits` does not try to skip their head again.
_CHANGED_LOGITS: WeakSet[nn.Module] = WeakSet()


def hidden_states(
    apply: Apply, params: Params, frozen: Params, *args: Any, **kwargs: Any
) -> Float[Tensor, "b seq width"]:
    """Return the input of a language model's output head: `apply(params, frozen, *args, **kwargs)` without the head.

    Args:
        apply: From `adapt`, for a model with `get_output_embeddings`, such as transformers' language models.
        params: Params of one adapter, or of one adapter per row.
        frozen: From `adapt`.
        *args: Positional arguments of the model.
        **kwargs: Keyword arguments of the model. With `logits_to_keep`, if the model supports it, the result has only
            these positions.

    Raises:
        ValueError: If the model has no output head, or its logits are not the output of the head.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from vera_func import VeraConfig, adapt
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)).eval()
        >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["q_proj"]))
        >>> hidden = hidden_states(apply, params, frozen, input_ids=torch.ones(2, 5, dtype=torch.long))
        >>> hidden.shape, head_logits(apply, params, frozen, hidden, [3, 4]).shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 2]))
    """
    _require_head(apply)
    hidden = apply.method(_hidden, params, frozen, *args, **kwargs)
    if hidden is None:
        raise ValueError(
            f"the logits of a {type(apply.model).__name__} are not what its output head returns (the model scales or "
            "bounds them, or the head has hooks): use the logits of apply(params, frozen, ...)."
        )
    return hidden


def head_logits(
    apply: Apply,
    params: Params,
    frozen: Params,
    hidden: Float[Tensor, "b seq width"],
    tokens: Sequence[int] | None = None,
) -> Float[Tensor, "b seq tokens"]:
    """Compute the logits of hidden states, for all tokens or for some.

    If the head is a dense layer without an adapter, trained or frozen, only the rows of `tokens` are multiplied. Any
    other head computes all logits, and those of `tokens` are selected.

    Args:
        apply: See `hidden_states`.
        params: Params of one adapter, or of one adapter per row.
        frozen: From `adapt`.
        hidden: The result of `hidden_states`, or some of its positions.
        tokens: Token ids; None selects the whole vocabulary.

    Raises:
        ValueError: If the model has no output head.

    Example:
        See `hidden_states`.
    """
    _require_head(apply)
    return apply.method(_logits, params, frozen, hidden, None if tokens is None else tuple(tokens))


def token_logits(
    apply: Apply, params: Params, frozen: Params, tokens: Sequence[int], *args: Any, **kwargs: Any
) -> Float[Tensor, "b seq tokens"]:
    """Compute `apply(params, frozen, *args, **kwargs).logits[..., tokens]`, and only these logits if possible.

    Args:
        apply: From `adapt`; the model's output must have `.logits`.
        params: Params of one adapter, or of one adapter per row.
        frozen: From `adapt`.
        tokens: Token ids.
        *args: Positional arguments of the model.
        **kwargs: Keyword arguments of the model.

    Example:
        >>> from types import SimpleNamespace
        >>> from vera_func import VeraConfig, adapt
        >>> class Model(nn.Sequential):
        ...     def forward(self, x):
        ...         return SimpleNamespace(logits=super().forward(x))
        >>> apply, params, frozen, _ = adapt(Model(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> token_logits(apply, params, frozen, [1, 5], torch.ones(3, 8)).shape
        torch.Size([3, 2])
    """
    root: Any = apply.trees.root
    compiling = torch.compiler.is_compiling()
    # In training mode, a second forward would draw other dropout masks.
    if _has_head(apply.model) and not root.model.training and (compiling or root not in _CHANGED_LOGITS):
        logits = apply.method(_some_logits, params, frozen, tuple(tokens), *args, **kwargs)
        if logits is not None:
            return logits
        if not compiling:
            _CHANGED_LOGITS.add(root)
    return apply(params, frozen, *args, **kwargs).logits[..., list(tokens)]


class _Tap(nn.Module):
    """The identity in place of a head; it records its input."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.seen: Tensor | None = None
        self.version = 0

    weight = property(lambda self: self.head.weight)
    bias = property(lambda self: self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        self.version = _version(hidden)
        return hidden


def _hidden(model: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the input of a model's head, or None if the model's logits are not the output of its head."""
    head = model.get_output_embeddings()
    owner, name = _place(model, head)
    if owner is None or _has_hooks(head):
        return None
    tap = _Tap(head)
    setattr(owner, name, tap)
    try:
        logits = getattr(model(*args, **kwargs), "logits", None)
    except Exception:
        if tap.seen is None:
            raise
        return None  # the model could not process hidden states in place of logits
    finally:
        setattr(owner, name, head)
    if not isinstance(logits, Tensor) or logits is not tap.seen:
        return None
    return logits if 0 <= tap.version == _version(logits) else None


def _logits(model: Any, hidden: Tensor, tokens: tuple[int, ...] | None) -> Tensor:
    head = model.get_output_embeddings()
    if tokens is None:
        return head(hidden)
    trained = isinstance(head, RowwiseAffine) and isinstance(head.base_layer, nn.Linear)
    if not (trained or isinstance(head, DenseLinear)) or _has_hooks(head):
        return head(hidden)[..., list(tokens)]
    index = torch.tensor(tokens, device=head.weight.device)
    some = {"weight": head.weight.index_select(-2, index)}
    if head.bias is not None:
        some["bias"] = head.bias.index_select(-1, index)
    return functional_call(head, some, (hidden,), tie_weights=False)


def _some_logits(model: Any, tokens: tuple[int, ...], *args: Any, **kwargs: Any) -> Tensor | None:
    hidden = _hidden(model, *args, **kwargs)
    return None if hidden is None else _logits(model, hidden, tokens)


def _place(model: nn.Module, head: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the module that holds the head (usually the model itself), and the head's name in that module."""
    for owner in model.modules():
        for name, child in owner._modules.items():
            if child is head:
                return owner, name
    return None, ""


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _version(tensor: Tensor) -> int:
    """The version counter of a tensor; -1 for inference tensors, which have none."""
    if torch.compiler.is_compiling():
        return 0  # Dynamo (2.13) cannot compare versions
    tensor = unwrap(tensor)
    return -1 if tensor.is_inference() else tensor._version


def _has_head(model: Any) -> bool:
    """Whether `get_output_embeddings` returns an output head, as in transformers' language models."""
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def _require_head(apply: Apply) -> None:
    if not _has_head(apply.model):
        raise ValueError(
            f"a {type(apply.model).__name__} has no output head: get_output_embeddings() must return it, as in "
            "transformers' language models."
        )
