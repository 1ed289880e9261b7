"""A model with its linear layers quantized, or dequantized."""

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .. import private
from ..core.shapes import require_float
from ..quant.bnb import from_bnb, is_bnb_linear, to_bnb
from ..quant.value import QUANTIZERS, dequantize
from .tree import copy_tree, copy_with_weights


Format = str | torch.dtype
Model = TypeVar("Model", bound=nn.Module)


def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy of the model with every bitsandbytes layer as an `nn.Linear` of its dequantized weight.

    For those with memory to spare: `adapt` it, and no forward or backward dequantizes anything any more. In the dtype
    of the activations the numbers are the same, bit for bit. It costs 2 bytes a weight in 16 bits instead of about
    half a byte. Everything else shares its memory with the model, which stays as it was.

    An adapter goes on with the `frozen` that it has: over 16-bit weights, as in PEFT, a new draw is rounded to 16 bits.

    Args:
        model: Any module.
        dtype: Of these weights, that of the model's activations.

    Raises:
        ValueError: If the model is no module, or the dtype not a floating-point one.

    Example:
        >>> from vera_func import quantize_4bit
        >>> model = nn.Sequential(to_bnb(quantize_4bit(torch.ones(32, 64))), nn.Linear(32, 2))
        >>> dense = dequantize_model(model, torch.float32)
        >>> dense[0], dense[1].weight is model[1].weight
        (Linear(in_features=64, out_features=32, bias=False), True)
    """

    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
    require_float("dtype", dtype)

    def weight_of(name: str, module: nn.Module) -> Tensor | None:
        return dequantize(from_bnb(module)[0], dtype) if is_bnb_linear(module) else None

    dense = copy_with_weights(model, weight_of, {id(parameter): parameter for parameter in model.parameters()})
    if hasattr(dense, "save_pretrained"):
        private.forget_quantization(dense)
    return dense


def check_format(to: Format | None) -> None:
    if to is not None and to not in QUANTIZERS and not (isinstance(to, torch.dtype) and to.is_floating_point):
        raise ValueError(f"to must be one of {sorted(QUANTIZERS)} or a floating-point dtype, got {to!r}.")


def quantize_model(model: Model, quant: str, skip: Sequence[str] | None = None) -> Model:
    """A copy of a model whose `nn.Linear`s are bitsandbytes modules; all other tensors are shared.

    The model itself stays as it is, and so do linears that are bitsandbytes' already.

    Args:
        model: Any module.
        quant: "nf4", "fp4" or "int8".
        skip: Ends of the names of modules to leave as they are. None is the head, which is often the embedding, and
            what the model's class keeps in float32, such as T5's `wo`, whose dtype it looks at.

    Raises:
        ValueError: If the format is unknown, or nothing was quantized.

    Example:
        >>> quantize_model(nn.Sequential(nn.Linear(64, 32)), "nf4")[0]
        Linear4bit(in_features=64, out_features=32, bias=True)
    """
    if quant not in QUANTIZERS:
        raise ValueError(f"quant must be one of {sorted(QUANTIZERS)}, got {quant!r}.")
    skip = ("lm_head", *private.float32_modules(model)) if skip is None else skip
    ends = tuple(f".{end}" for end in skip)
    found = []

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        # bitsandbytes' linears are a subclass.
        if not isinstance(module, nn.Linear) or is_bnb_linear(module) or f".{name}".endswith(ends):
            return None
        found.append(name)
        return to_bnb(QUANTIZERS[quant](module.weight.detach()), module.bias).train(module.training)

    new = copy_tree(model, replace, {id(leaf): leaf for leaf in (*model.parameters(), *model.buffers())})
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize, {list(skip)} aside.")
    return cast(Model, new)
