"""Quantize or dequantize the linear layers of a model."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .. import private
from ..core.keys import join_key
from ..core.shapes import require_float
from ..quant.bnb import from_bnb, is_bnb_linear, to_bnb
from ..quant.quantize import QUANTIZERS, dequantize
from ..quant.value import format_of
from .config import HEADS
from .describe import describe_quantization, describe_ties
from .linears import linear_sizes
from .tree import copy_tree, copy_with_weights, require_weights, unwrap


Format = str | torch.dtype
Model = TypeVar("Model", bound=nn.Module)


def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return a copy of a model in which dense `nn.Linear` layers replace all bitsandbytes layers.

    Adapting the copy instead of the model trades memory for speed: the copy does not dequantize weights in the forward
    and backward pass, but a 4-bit weight takes 2 bytes in a 16-bit dtype instead of about half a byte. If `dtype` is
    the dtype of the activations, the copy computes the same outputs as the model, bit for bit. All tensors outside the
    replaced layers are shared with the model, which is not modified.

    To use an existing adapter with the copy, pass the `frozen` of that adapter. The projections that `adapt` draws for
    a copy with 16-bit weights would differ: as in PEFT, new projections are rounded to 16 bits.

    Args:
        model: Any module.
        dtype: Dtype of the dequantized weights; use the dtype of the model's activations.

    Raises:
        ValueError: If the model is not a module, if it is offloaded or wrapped by PEFT, or if the dtype is not a
            floating-point dtype.

    Example:
        >>> from vera_func import quantize_4bit
        >>> model = nn.Sequential(to_bnb(quantize_4bit(torch.ones(32, 64))), nn.Linear(32, 2))
        >>> dense = dequantize_model(model, torch.float32)
        >>> dense[0], dense[1].weight is model[1].weight
        (Linear(in_features=64, out_features=32, bias=False), True)
    """
    model = unwrap(model)
    require_float("dtype", dtype)
    require_weights(model, "dequantize")

    def weight_of(name: str, module: nn.Module) -> Tensor | None:
        return dequantize(from_bnb(module)[0], dtype) if is_bnb_linear(module) else None

    dense = copy_with_weights(model, weight_of, {id(parameter): parameter for parameter in model.parameters()})
    if hasattr(dense, "save_pretrained"):
        private.forget_quantization(dense)
        describe_ties(dense)
    return dense


def check_format(to: Format | None) -> None:
    """Raise a `ValueError` unless `to` is None, a quantization format or a floating-point dtype."""
    if to is not None and to not in QUANTIZERS and not (isinstance(to, torch.dtype) and to.is_floating_point):
        raise ValueError(f"to must be one of {sorted(QUANTIZERS)} or a floating-point dtype, got {to!r}.")


def quantize_model(model: Model, quant: str, skip: Sequence[str] | None = None) -> Model:
    """Return a copy of a model in which bitsandbytes modules replace the `nn.Linear` layers.

    The model is not modified, and shares all tensors outside the replaced layers with the copy. Layers that are already
    bitsandbytes modules are kept. Some layers stay dense: subclasses of `nn.Linear` that do not compute `x Wᵀ + b`,
    layers whose weight is computed (weight_norm), and the output layer of `nn.MultiheadAttention`, which is never
    called. bitsandbytes can't quantize 3-D parameters, such as the fused experts of Mixtral, Qwen-MoE or gpt-oss in
    transformers 5. If 3-D parameters exceed 5 % of the weights, a warning reports their share. transformers'
    `save_pretrained` and `from_pretrained` save and load the copy.

    Args:
        model: Any module.
        quant: "nf4", "fp4" or "int8".
        skip: Modules that stay dense, including all modules inside them. Each entry is the full name of a module, or a
            part of the name between dots. By default, the heads `lm_head`, `classifier`, `score` and `qa_outputs` stay
            dense. The layers that transformers leaves dense also stay dense by default: tied weights, output
            embeddings, a last layer without bias, and layers that the model's class keeps in float32, such as T5's
            `wo`.

    Raises:
        ValueError: If no layer can be quantized, if the format is unknown, or if the model is offloaded or wrapped by
            PEFT.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(64, 64), "classifier": nn.Linear(64, 2)})
        >>> quantize_model(model, "nf4")
        ModuleDict(
          (body): Linear4bit(in_features=64, out_features=64, bias=True)
          (classifier): Linear(in_features=64, out_features=2, bias=True)
        )
    """
    if quant not in QUANTIZERS:
        raise ValueError(f"quant must be one of {', '.join(map(repr, QUANTIZERS))}, got {quant!r}.")
    model = unwrap(model)
    require_weights(model, "quantize")
    layers = quantizable_layers(model, skip)
    if not layers:
        skipped = "its heads" if skip is None else f"skip={list(skip)}"
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to quantize, apart from {skipped} (kept dense). To quantize "
            "every linear layer, pass skip=[]."
        )

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name not in layers:
            return None
        return to_bnb(QUANTIZERS[quant](layers[name].weight.detach()), layers[name].bias)

    memo = {id(leaf): leaf for leaf in (*model.parameters(), *model.buffers())}
    new = copy_tree(model, replace, memo)
    for module in new.modules():
        private.skip_fused_encoder_path(module)
    if hasattr(new, "save_pretrained"):
        describe_quantization(new)
        describe_ties(new)
    if (share := dense_share(model, layers)).fused > 0.05:
        first = share.names[0]
        warnings.warn(
            f"{share.total * 100:.0f} % of the weights stay in {str(model.get_parameter(first).dtype)[6:]}: "
            f"{share.fused * 100:.0f} % are in 3-D parameters such as {first!r} (fused experts), which bitsandbytes "
            "can't quantize.",
            stacklevel=2,
        )
    return cast(Model, new)


def quantized_format(model: nn.Module) -> str | None:
    """Return the format of a model's first bitsandbytes layer ("nf4", "fp4" or "int8"), or None if none exists.

    Example:
        >>> quantized_format(quantize_model(nn.Sequential(nn.Linear(64, 64)), "fp4", skip=[]))
        'fp4'
    """
    layer = next((module for module in model.modules() if is_bnb_linear(module)), None)
    return None if layer is None else format_of(from_bnb(layer)[0])


def quantizable_layers(model: nn.Module, skip: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """Return the layers that `quantize_model` quantizes, by name.

    Example:
        >>> list(quantizable_layers(nn.ModuleDict({"body": nn.Linear(64, 64), "score": nn.Linear(64, 2)})))
        ['body']
    """
    if skip is None:
        skip, kept = _heads(model), _tied_modules(model)
    else:
        kept = set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            kept.update(map(id, module.children()))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not is_bnb_linear(module)  # a subclass of nn.Linear
        and id(module) not in kept
        and not any(f".{entry}." in f".{name}." for entry in skip)
        and is_plain(module)
    }


class DenseShare(NamedTuple):
    """The shares of a model's weights that `quantize_model` leaves dense.

    Attributes:
        total: Share of all weights that stay dense.
        fused: Share of all weights that are in 3-D parameters, such as fused experts.
        names: Names of the 3-D parameters.
    """

    total: float
    fused: float
    names: list[str]


def dense_share(model: nn.Module, layers: Mapping[str, nn.Module]) -> DenseShare:
    """Compute the share of a model's weights that stay dense if the given layers are quantized.

    Args:
        model: Any module. All bitsandbytes layers of the model count as quantized.
        layers: Layers by name, as from `quantizable_layers`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False))
        >>> dense_share(model, {"0": model[0]}).total
        0.3333333333333333
    """
    dense = quantized = fused = 0
    names, seen = [], set()
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if leaf == "weight" and (name in layers or is_bnb_linear(module)):
                in_features, out_features = linear_sizes(module) or (0, 0)
                quantized += in_features * out_features
                continue
            dense += parameter.numel()
            # A parametrization, such as weight_norm's, holds the parameters of a convolution.
            convolution = isinstance(module, nn.Conv1d | nn.ConvTranspose1d | ParametrizationList)
            if parameter.dim() == 3 and parameter.shape[0] > 1 and not convolution:
                fused += parameter.numel()
                names.append(join_key(name, leaf))
    whole = max(dense + quantized, 1)
    return DenseShare(dense / whole, fused / whole, names)


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer computes `x Wᵀ + b` with a parameter `W`. Some subclasses of `nn.Linear` scale the output.

    Example:
        >>> is_plain(nn.Linear(3, 2)), is_plain(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
        (True, False)
    """
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return False
    if type(layer).forward is nn.Linear.forward or layer.weight.is_meta:
        return True
    probe = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()}).eval()
    x = torch.linspace(-1, 1, layer.in_features, dtype=torch.float32, device="cpu").to(layer.weight)[None]
    try:
        with torch.no_grad():
            actual, expected = probe(x), nn.functional.linear(x, layer.weight, layer.bias)
            return (actual - expected).norm().item() < 0.01 * expected.norm().item()
    except Exception:  # a different forward may raise anything
        return False


def _heads(model: nn.Module) -> list[str]:
    names = ["lm_head", *(name for heads in HEADS.values() for name in heads), *private.float32_modules(model)]
    find_head = getattr(model, "get_output_embeddings", None)  # transformers' convention
    if find_head is not None:
        head = find_head()
        names += [name for name, module in model.named_modules() if module is head]
        last = [name for name, _ in model.named_parameters()][-1:]
        names += [name.removesuffix(".weight") for name in last]  # such as CLIP's projection
    return names


def _tied_modules(model: nn.Module) -> set[int]:
    """Return the ids of modules that share a parameter with another module."""
    owners: dict[int, list[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(id(module))
    return {module for modules in owners.values() if len({*modules}) > 1 for module in modules}
