"""Update the configuration of a transformers model after its weights have changed.

`save_pretrained` stores the configuration with the weights, and `from_pretrained` loads the weights according to the
stored configuration.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import private
from ..core.keys import split_key
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.value import Quantized4bit
from .linears import linear_sizes


# Models of T5's family also scale their outputs if `tie_word_embeddings` is True, so this flag has to stay True.
# transformers does not tie two weights if the file has both and they differ.
_SCALED_IF_TIED = ("t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "udop")


def describe_ties(model: nn.Module) -> None:
    """Set `tie_word_embeddings` to False if the model's class ties weights that now differ.

    If `tie_word_embeddings` becomes False, parameters that are still tied are replaced by copies. Otherwise
    `save_pretrained` would omit the tied parameters, and `from_pretrained` would not restore the omitted parameters.
    Only transformers models are changed.

    Args:
        model: Any module; it is modified in place.

    Example:
        >>> describe_ties(nn.Linear(2, 3))
    """
    ties: dict[int, list[tuple[Any, dict[str, str]]]] = {}  # keyed by configuration, because submodels may share one
    for part in model.modules():
        expanded: Any = getattr(part, "get_expanded_tied_weights_keys", None)  # transformers 5
        if expanded is not None and (pairs := expanded()):
            ties.setdefault(id(part.config), []).append((part, pairs))
    for parts in ties.values():
        if all(_get(part, one) is _get(part, other) for part, pairs in parts for one, other in pairs.items()):
            continue
        config = parts[0][0].config
        config.tie_word_embeddings = config.model_type in _SCALED_IF_TIED
        seen: dict[tuple[int, str], Tensor | None] = {}
        for part, pairs in parts:
            for name in dict.fromkeys((*pairs.values(), *pairs)):
                _separate(part, name, seen)


def describe_dtype(model: Any, dtype: torch.dtype) -> None:
    """Update the configuration of a transformers model whose weights are now dense tensors of dtype `dtype`."""
    private.forget_quantization(model)
    model.config.dtype = dtype


def describe_quantization(model: Any) -> None:
    """Set `quantization_config`: the format of the quantized layers, and the names of the layers that are dense.

    Args:
        model: A transformers model, modified in place. A model without quantized layers is not modified.
    """
    linears = [(name, module) for name, module in model.named_modules() if linear_sizes(module) is not None]
    quantized = [name for name, module in linears if is_bnb_linear(module)]
    if not quantized:
        return
    from transformers import BitsAndBytesConfig

    first, _ = from_bnb(model.get_submodule(quantized[0]))
    options: dict[str, Any] = {"load_in_8bit": True}
    if isinstance(first, Quantized4bit):
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": first.quant_type,
            "bnb_4bit_use_double_quant": first.nested is not None,
            "bnb_4bit_compute_dtype": first.compute_dtype or model.dtype,
            "bnb_4bit_quant_storage": first.packed.dtype,
        }
    dense = [name for name, module in linears if not is_bnb_linear(module)]
    skip = skip_list(dense, quantized)
    model.config.quantization_config = BitsAndBytesConfig(**options, llm_int8_skip_modules=skip)


def skip_list(dense: Sequence[str], quantized: Sequence[str]) -> list[str]:
    """Return transformers' `llm_int8_skip_modules` for the dense layers of a model, given the names of all linear
    layers.

    transformers skips a layer if its name ends with an entry, or if an entry, as a regular expression, matches the
    beginning of the name. A name that would also match a quantized layer is therefore written as an anchored
    expression. Names that match no quantized layer are written unchanged, because other programs that read the list
    compare names.

    Example:
        >>> skip_list(["lm_head", "classifier"], ["pre_classifier"])
        ['lm_head', '^classifier$']
    """

    def is_ambiguous(name: str) -> bool:
        try:
            return any(other.endswith(name) or re.match(name, other) for other in quantized)
        except re.error:  # a name may contain any character except a dot
            return True

    return [f"^{re.escape(name)}$" if is_ambiguous(name) else name for name in dense]


def _separate(part: nn.Module, name: str, seen: dict[tuple[int, str], Tensor | None]) -> None:
    """Replace a parameter by a copy if `seen` has the same parameter under another name."""
    owner, leaf = split_key(name)
    value, place = _get(part, name), (id(part.get_submodule(owner)), leaf)
    if place in seen:
        return
    if any(value is other for other in seen.values()) and isinstance(value, nn.Parameter):
        value = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        setattr(part.get_submodule(owner), leaf, value)
    seen[place] = value


def _get(model: Any, name: str) -> Tensor | None:
    try:
        return model.get_parameter_or_buffer(name)
    except AttributeError:
        return None
