"""Compute the hidden states of a language model without its output head, and logits only for some positions or tokens.

    hidden = hidden_states(apply, params, frozen, input_ids=ids)  # (b, seq, width), the input of the head
    head_logits(apply, params, frozen, hidden)  ==  apply(params, frozen, input_ids=ids).logits
    hidden, head = hidden_and_head(apply, params, frozen, input_ids=ids)  # for next_token_loss(hidden, head, labels)

With a large vocabulary, the head costs as much as many layers, and its logits are the largest tensor of a training
step. A loss needs only the logits at labelled positions, and a classifier needs only the logits of a few tokens.

The hidden states are computed by the model's own forward, with the identity in place of the head. Replacing the head is
correct for every model that returns the output of its head as logits. Models that transform the logits are detected,
and run with their head. For example, Gemma 2 caps the logits, Granite scales them, and BART adds a bias.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from ..private import unwrap
from .apply import Apply
from .base_layers import DenseLinear, RowwiseAffine
from .batch import Params


# Maps a module tree to whether its model returns the head's logits unchanged, so that each model is tested only once.
_UNCHANGED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def hidden_states(
    apply: Apply, params: Params, frozen: Params, *args: Any, **kwargs: Any
) -> Float[Tensor, "b seq width"]:
    """Return the input of a language model's output head, without running the head.

    Args:
        apply: An `Apply` from `adapt`, for a model with `get_output_embeddings`, such as transformers' language models.
        params: Params of one adapter, or of one adapter per row.
        frozen: From `adapt`.
        *args: Positional arguments of the model.
        **kwargs: Keyword arguments of the model. If the model supports `logits_to_keep`, hidden states are returned
            only for the positions that this argument selects.

    Raises:
        ValueError: If the model has no output head, or if its logits are not the output of the head.

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
            f"the logits of a {type(apply.model).__name__} are not the output of its head (the model scales or caps "
            "them, or the head has hooks): use the logits of apply(params, frozen, ...)."
        )
    return hidden


def head_logits(
    apply: Apply,
    params: Params,
    frozen: Params,
    hidden: Float[Tensor, "b seq width"],
    tokens: Sequence[int] | None = None,
) -> Float[Tensor, "b seq tokens"]:
    """Compute the logits of hidden states, for all tokens or for some tokens.

    If the head is a dense layer without an adapter, only the logits of `tokens` are computed. For any other head, the
    logits of all tokens are computed, and the logits of `tokens` are selected.

    Args:
        apply: See `hidden_states`.
        params: Params of one adapter, or of one adapter per row.
        frozen: From `adapt`.
        hidden: Hidden states from `hidden_states`, at all positions or at some.
        tokens: Token ids. None means the whole vocabulary.

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
    """Compute `apply(params, frozen, *args, **kwargs).logits[..., tokens]`, if possible without computing other logits.

    `tokens` are token ids. All arguments except `tokens` are those of `hidden_states`; the model's output must have
    `.logits`.

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
    logits = _without_head(apply, _some_logits, params, frozen, (tuple(tokens), *args), kwargs)
    return apply(params, frozen, *args, **kwargs).logits[..., list(tokens)] if logits is None else logits


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RowHead:
    """The output head of a batch with one adapter per row: row `i` of `head(hidden)` uses the adapter of row `i`.

    `hidden_and_head` returns a `RowHead` if the head may differ between rows.

    Attributes:
        apply: From `adapt`.
        params: Params of one adapter per row.
        frozen: From `adapt`.
    """

    apply: Apply
    params: Params
    frozen: Params

    def __call__(self, hidden: Float[Tensor, "rows seq width"]) -> Float[Tensor, "rows seq vocab"]:
        return head_logits(self.apply, self.params, self.frozen, hidden)


class HiddenAndHead(NamedTuple):
    """The result of `hidden_and_head`."""

    hidden: Float[Tensor, "b seq width"]
    head: Tensor | Callable[[Tensor], Tensor] | None


def hidden_and_head(apply: Apply, params: Params, frozen: Params, *args: Any, **kwargs: Any) -> HiddenAndHead:
    """Return a model's hidden states and output head, the first two arguments of the losses in `train.losses`.

    If the model has no output head, or transforms the head's output (Gemma 2, Granite), the result is `(logits, None)`,
    which the losses also accept.

    Args:
        apply: An `Apply` from `adapt`; the model's output must have `.logits`.
        params: Params of one adapter, or of one adapter per row.
        frozen: From `adapt`.
        *args: Positional arguments of the model.
        **kwargs: Keyword arguments of the model.

    Returns:
        `(hidden, head)`. If the output head is dense, is the same for all rows, and has neither a bias nor an adapter,
        `head` is its weight (vocab, width). For any other output head, `head` is a function of the hidden states; with
        one adapter per row, this function is a `RowHead`.

    Raises:
        ValueError: If the head has an adapter with dropout (`apply.with_dropout`). A loss may compute the logits twice,
            and each computation would draw a different mask.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from vera_func import VeraConfig, adapt
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)).eval()
        >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["q_proj"]))
        >>> hidden, head = hidden_and_head(apply, params, frozen, input_ids=torch.ones(2, 5, dtype=torch.long))
        >>> hidden.shape, head.shape
        (torch.Size([2, 5, 8]), torch.Size([30, 8]))
    """
    found = _without_head(apply, _hidden_and_weights, params, frozen, args, kwargs)
    if found is None:
        return HiddenAndHead(apply(params, frozen, *args, **kwargs).logits, None)
    hidden, weight, bias = found
    if weight is not None:
        return HiddenAndHead(hidden, weight if bias is None else partial(linear, weight=weight, bias=bias))
    if apply.generator is not None and _is_adapted(apply):
        raise ValueError(
            "the output head has an adapter with dropout, and a loss that computes logits twice would draw two masks: "
            "pass hidden=apply(params, frozen, ...).logits and head=None to the loss, or do not adapt the head."
        )
    if any(value.shape != apply.slots[key].shape for key, value in params.items()):
        return HiddenAndHead(hidden, RowHead(apply, params, frozen))
    return HiddenAndHead(hidden, partial(head_logits, apply, params, frozen))


class _Tap(nn.Module):
    """A module that replaces an output head, records its input, and returns the input unchanged."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.seen: Tensor | None = None
        self.version: int | None = 0
        self.values: Tensor | None = None

    weight = property(lambda self: self.head.weight)
    bias = property(lambda self: self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen, self.version = hidden, _version(hidden)
        self.values = unwrap(hidden).clone() if self.version is None else None
        return hidden

    def is_unchanged(self) -> bool:
        """Whether the recorded input still has the values that it had when it was recorded."""
        assert self.seen is not None
        if self.values is None:
            return self.version == _version(self.seen)
        return torch.allclose(unwrap(self.seen), unwrap(self.values), rtol=0, atol=0, equal_nan=True)


def _hidden(model: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the hidden states, or None if the model's logits are not the output of its head."""
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
    return logits if tap.is_unchanged() else None


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


def _hidden_and_weights(model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...] | None:
    """Return `(hidden, weight, bias)`. Weight and bias are None unless the head is dense and all rows share it."""
    hidden = _hidden(model, *args, **kwargs)
    if hidden is None:
        return None
    head = model.get_output_embeddings()
    if not (isinstance(head, DenseLinear) or (isinstance(head, RowwiseAffine) and type(head.base_layer) is nn.Linear)):
        return hidden, None, None
    weight, bias = head.weight, head.bias
    plain = weight.dim() == 2 and weight.dtype == hidden.dtype and not weight.is_meta
    return (hidden, weight, bias) if plain and (bias is None or bias.dim() == 1) else (hidden, None, None)


def _without_head(
    apply: Apply, function: Callable[..., Any], params: Params, frozen: Params, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Return the result of `function(model, *args, **kwargs)`, or None if the model transforms the logits.

    `function` runs the model without the head. Each model is tested once for transformed logits. If forward passes draw
    random numbers, the test is an extra forward pass that leaves the caller's random state unchanged.
    """
    root: Any = apply.trees.root
    if not _has_head(apply.model):
        return None
    if torch.compiler.is_compiling():
        return apply.method(function, params, frozen, *args, **kwargs)
    unchanged = _UNCHANGED.get(root)
    if unchanged is False:
        return None
    if unchanged is None and (root.model.training or apply.generator is not None):
        devices = sorted({value.device.index for value in params.values() if value.is_cuda})
        generator = None if apply.generator is None else torch.Generator(apply.generator.device)
        trial = dataclasses.replace(apply, generator=generator)
        with torch.no_grad(), torch.random.fork_rng(devices):
            found = trial.method(function, params, frozen, *args, **kwargs)
    else:
        found = apply.method(function, params, frozen, *args, **kwargs)
        if found is not None:
            return found
    _UNCHANGED[root] = found is not None
    return None if found is None else apply.method(function, params, frozen, *args, **kwargs)


def _is_adapted(apply: Apply) -> bool:
    model: Any = apply.model
    head = model.get_output_embeddings()
    return any(model.get_submodule(name) is head for name in apply.targets)


def _place(model: nn.Module, head: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the parent module of the head (usually the model itself), and the head's name in the parent."""
    for owner in model.modules():
        for name, child in owner._modules.items():
            if child is head:
                return owner, name
    return None, ""


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _version(tensor: Tensor) -> int | None:
    """Return the version counter of a tensor, or None for an inference tensor, which has no counter."""
    if torch.compiler.is_compiling():
        return 0  # Dynamo (torch 2.13) cannot compare versions
    tensor = unwrap(tensor)
    return None if tensor.is_inference() else tensor._version


def _has_head(model: Any) -> bool:
    """Whether `get_output_embeddings` returns an output head, as in transformers' language models."""
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def _require_head(apply: Apply) -> None:
    if not _has_head(apply.model):
        raise ValueError(
            f"a {type(apply.model).__name__} has no output head: get_output_embeddings() must return the head, as "
            "in transformers' language models."
        )
