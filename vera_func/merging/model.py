"""A plain model for tools that know nothing of adapters: merged, or dequantized.

W' = round(W + ΔW), layer by layer, in a new model of the user's own class
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import private
from ..core.keys import is_vector
from ..model.adapt import Adapted
from ..model.convert import Format, check_format
from ..model.targets import adapted_layers, is_conv1d, linear_sizes
from ..model.tree import copy_with_weights
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.value import QUANTIZERS, Quantized, Quantized4bit, dequantize, format_of
from .layer import MergeReport, merge_dense, merge_quantized, merge_report


def merge(
    model: nn.Module,
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    to: Format | None = None,
    *,
    weights: Mapping[str, Quantized | Tensor] | None = None,
) -> nn.Module:
    """A new plain model with the adapter in its weights; the user's model stays as it was.

    What is neither merged nor quantized shares its memory with the user's model. transformers' `save_pretrained`
    writes the result and `from_pretrained` reads it back. To unmerge, go on with the old model.
    `model_merge_report` tells what a merge to 4 or 8 bits loses; a merge to 16 bits loses next to nothing.

    Args:
        model: The base model.
        params: Of a single adapter; trained biases and `modules_to_save` are put in their places.
        frozen: The projections.
        to: Format of the adapted layers and of all that are quantized: "nf4", "fp4", "int8", or a dtype
            for a dense model. None keeps each layer's own format.
        weights: Merged weights to use instead of rounding, by module name (`merge_calibrated`'s, for instance).

    Raises:
        ValueError: If the adapter does not fit the model or holds NaN or inf (nothing is merged then), or a layer would
            be quantized that the model's class keeps in float32.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> merged = merge(model, adapted.params, adapted.frozen)
        >>> torch.equal(merged(torch.ones(3, 8)), model(torch.ones(3, 8)))
        True
    """
    check_format(to)
    layers = adapted_layers(model, params)
    if odd := sorted((weights or {}).keys() - layers.keys()):
        raise ValueError(f"weights has {odd[0]!r}, which is no adapted module; those are {sorted(layers)[:3]}, ...")
    float32 = tuple(f".{end}" for end in private.float32_modules(model))
    if isinstance(to, str) and (odd := [name for name in layers if f".{name}".endswith(float32)]):
        raise ValueError(
            f"{odd[0]!r} can't be merged into {to}: a {type(model).__name__} keeps it in float32, and reads its dtype. "
            "Merge to a dtype, or keep each layer's format (to=None)."
        )
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = parameter
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for key, value in params.items():
        if not is_vector(key):
            own = _own_parameter(model, key, value)
            memo[id(own)] = nn.Parameter(value.detach().to(own.dtype).clone(), requires_grad=own.requires_grad)

    def weight_of(name: str, module: nn.Module) -> Quantized | Tensor | None:
        # A bitsandbytes module rewrites its weight as it runs, so not even what is not merged may be shared.
        if name not in layers and not is_bnb_linear(module):
            return None
        given = (weights or {}).get(name)
        return _merged_weight(module, layers.get(name), frozen, to) if given is None else given

    merged: Any = copy_with_weights(model, weight_of, memo)
    if hasattr(merged, "save_pretrained"):
        _describe_quantization(merged, to)
        # These are no longer the weights that the base's name stands for: an adapter of them must not say so.
        merged.name_or_path = merged.config.name_or_path = ""
    return merged


def model_merge_report(
    adapted: Adapted, to: Format | None = None, inputs: Mapping[str, Tensor] | None = None
) -> dict[str, MergeReport]:
    """The `merge_report` of each adapted layer, for `merge(model, params, frozen, to)`.

    Layers whose update is zero are left out.

    Args:
        adapted: From `adapt` or `load_adapter`, with a single adapter.
        to: As for `merge`.
        inputs: Inputs (tokens, in) of the layers, by name, for the errors of their outputs.

    Returns:
        Reports by the name of the layer.

    Raises:
        ValueError: If the adapter does not fit the model or holds NaN or inf, or `inputs` names another layer.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> params = {key: torch.ones_like(value) for key, value in adapted.params.items()}
        >>> model_merge_report(adapted._replace(params=params), torch.float32)["0"].kept > 0.99
        True
    """
    check_format(to)
    model, frozen = adapted.apply.model, adapted.frozen
    layers = adapted_layers(model, adapted.params)
    if odd := sorted((inputs or {}).keys() - layers.keys()):
        raise ValueError(f"inputs has {odd[0]!r}, which is no adapted module; those are {sorted(layers)[:3]}, ...")
    reports = {}
    for name, vectors in layers.items():
        module = model.get_submodule(name)
        base = _base_weight(module)
        merged = _merged_weight(module, vectors, frozen, to)
        if not vectors["lambda_b"].any() or not vectors["lambda_d"].any():
            continue
        reports[name] = merge_report(base, vectors, frozen, (inputs or {}).get(name), merged=merged)
    return reports


def _base_weight(module: Any) -> Quantized | Tensor:
    if is_bnb_linear(module):
        return from_bnb(module)[0]
    return module.weight.detach().T if is_conv1d(module) else module.weight.detach()


def _merged_weight(
    module: nn.Module, vectors: Mapping[str, Tensor] | None, frozen: Mapping[str, Tensor], to: Format | None
) -> Quantized | Tensor:
    base = _base_weight(module)
    if vectors is None:
        assert not isinstance(base, Tensor)
        if to in (None, format_of(base)):
            return base
        return dequantize(base, to) if isinstance(to, torch.dtype) else QUANTIZERS[to](dequantize(base, torch.float32))
    if isinstance(to, torch.dtype):
        return merge_dense(base, vectors, frozen, to)
    if isinstance(base, Tensor):
        dense = merge_dense(base, vectors, frozen, base.dtype)
        return dense if to is None else QUANTIZERS[to](dense)
    if to in (None, format_of(base)):
        return merge_quantized(base, vectors, frozen)
    return QUANTIZERS[to](merge_dense(base, vectors, frozen, torch.float32))


def _own_parameter(model: nn.Module, key: str, value: Tensor) -> nn.Parameter:
    try:
        own = model.get_parameter(key)
    except AttributeError as error:
        raise ValueError(f"params has {key!r}, which is no parameter of the model.") from error
    if own.shape != value.shape:
        raise ValueError(f"{key!r} must be {tuple(own.shape)}, got {tuple(value.shape)}.")
    return own


def _describe_quantization(model: Any, to: Format | None) -> None:
    """Make the config of a transformers model say what its weights are now."""
    if isinstance(to, torch.dtype):
        private.forget_quantization(model)
        model.config.dtype = to
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(to)  # a new parameter, of the merged model alone
        return
    linears = [(name, module) for name, module in model.named_modules() if linear_sizes(module) is not None]
    quantized = [from_bnb(module)[0] for _, module in linears if is_bnb_linear(module)]
    if not quantized:
        return
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if isinstance(quantized[0], Quantized4bit):
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantized[0].quant_type,
            "bnb_4bit_use_double_quant": quantized[0].nested is not None,
            "bnb_4bit_compute_dtype": quantized[0].compute_dtype or model.dtype,
            "bnb_4bit_quant_storage": quantized[0].packed.dtype,
        }
    dense = [name for name, module in linears if not is_bnb_linear(module)]
    model.config.quantization_config = BitsAndBytesConfig(**options, llm_int8_skip_modules=dense)
