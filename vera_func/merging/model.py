"""Merge an adapter into the weights of a whole model, for tools without adapter support.

W' = round(W + ΔW)        in each adapted layer of a new model of the same class
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .. import private
from ..core.keys import VECTORS, join_key, own_parameters, split_key
from ..core.shapes import described, require_dict, require_finite
from ..model.adapt import Adapted, require_adapted
from ..model.convert import Format, check_format, is_plain
from ..model.describe import describe_dtype, describe_quantization, describe_ties
from ..model.linears import is_conv1d, linear_sizes, require_one_device
from ..model.targets import adapted_layers
from ..model.tree import copy_with_weights, held_parameters, parameter_aliases, require_weights, unwrap
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.quantize import QUANTIZERS, dequantize
from ..quant.value import FLOATS, NO_DATA, Quantized, Quantized4bit, Quantized8bit, flatten, format_of
from .layer import checked_delta, merge_dense, merge_quantized
from .report import MergeReport, merge_report


_FLOATS = (*FLOATS, torch.float64)


def merge(
    model: nn.Module,
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    to: Format | None = None,
    *,
    weights: Mapping[str, Quantized | Tensor] | None = None,
) -> nn.Module:
    """Return a new model with the adapter merged into its weights. `model` is not modified.

    Dense parameters that the merge does not change share memory with `model`. transformers' `save_pretrained` and
    `from_pretrained` save and load the result. Tied weights that differ after the merge are untied in the result and
    in its configuration. To unmerge, use `model` again. A merge to 16 bits loses almost nothing; `model_merge_report`
    measures the loss of a merge to 4 or 8 bits.

    Args:
        model: The base model.
        params: Params of a single adapter. Trained biases and `modules_to_save` in `params` replace those of the model.
        frozen: The projections.
        to: Format of the adapted layers and of all quantized layers: "nf4", "fp4", "int8", or a dtype for a dense
            model. None keeps the format of each layer.
        weights: Merged weights, keyed by module name, for example from `calibrate_weights`. Adapted layers without an
            entry are merged by `merge_quantized` or `merge_dense`.

    Raises:
        ValueError: If the adapter does not fit the model, or holds NaN or inf. If the model is offloaded, is wrapped by
            PEFT, or has adapted layers on several devices. If `to` would quantize a layer that the model's class keeps
            in float32. If an adapted layer computes its weight in each forward pass (weight_norm), does not return `x
            Wᵀ + b`, or has a weight dtype that can't represent the result (float8).

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> merged = merge(model, adapted.params, adapted.frozen)
        >>> torch.equal(merged(torch.ones(3, 8)), model(torch.ones(3, 8)))
        True
    """
    check_format(to)
    model = unwrap(model)
    layers = adapted_layers(model, params)
    _require_layers("weights", weights or {}, layers)
    parameters = dict(held_parameters(model))
    own = {key: _checked_parameter(parameters, key, params[key]) for key in own_parameters(params)}
    _require_mergeable(model, layers, to)
    require_one_device(model, list(layers), list(own))
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = parameter
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)

    def weight_of(name: str, module: nn.Module) -> Quantized | Tensor | None:
        # A bitsandbytes module rewrites its weight when it runs, so modules without an adapter are copied as well.
        if name not in layers and not is_bnb_linear(module):
            return None
        if (given := (weights or {}).get(name)) is not None:
            _require_weight(name, given, module)
            return given
        base = _base_weight(name, module, to, own.get(join_key(name, "weight")))
        return _merged_weight(base, layers.get(name), frozen, to)

    merged: Any = copy_with_weights(model, weight_of, memo)
    _set_parameters(merged, model, {key: value for key, value in own.items() if not _is_merged(key, layers)}, memo)
    if isinstance(to, torch.dtype):
        for parameter in merged.parameters():
            if parameter.is_floating_point() and type(parameter) is nn.Parameter:
                parameter.data = parameter.data.to(to)  # not shared with `model`
    if hasattr(merged, "save_pretrained"):
        _describe(merged, to)
    return merged


def model_merge_report(
    adapted: Adapted, to: Format | None = None, inputs: Mapping[str, Tensor] | None = None
) -> dict[str, MergeReport]:
    """Return the `merge_report` of each adapted layer for `merge(model, params, frozen, to)`.

    Layers whose update is zero are omitted.

    Args:
        adapted: Result of `adapt` or `load_adapter`, with a single adapter.
        to: See `merge`.
        inputs: Inputs of the layers, of shape (*tokens, in), keyed by layer name. If None, the reports have no
            `output_kept` and `output_error`.

    Returns:
        Reports, keyed by layer name.

    Raises:
        ValueError: If the adapter does not fit the model or holds NaN or inf, or if `inputs` names a layer that is not
            adapted.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> params = {key: torch.ones_like(value) for key, value in adapted.params.items()}
        >>> model_merge_report(adapted._replace(params=params), torch.float32)["0"].kept > 0.99
        True
    """
    check_format(to)
    require_adapted(adapted)
    model, frozen = adapted.apply.model, adapted.frozen
    layers = adapted_layers(model, adapted.params)
    require_weights(model, "merge")
    _require_layers("inputs", inputs or {}, layers)
    reports = {}
    for name, vectors in layers.items():
        base = _base_weight(name, model.get_submodule(name), to, adapted.params.get(join_key(name, "weight")))
        merged = _merged_weight(base, vectors, frozen, to)
        if not ((vectors["lambda_b"].any() and vectors["lambda_d"].any()) or _is_rescaled(base, vectors, frozen)):
            continue
        reports[name] = merge_report(base, vectors, frozen, (inputs or {}).get(name), merged=merged)
    return reports


def _require_layers(argument: str, given: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    """Raise an error if `given`, a mapping by module name, names a layer that is not adapted."""
    require_dict(argument, given)
    if odd := sorted(given.keys() - layers.keys()):
        raise ValueError(
            f"{argument} has {odd[0]!r}, which is not an adapted layer: use names such as {sorted(layers)[:3]}."
        )


def _require_weight(name: str, given: Any, module: nn.Module) -> None:
    """Raise an error if `given` can't be the merged weight of a layer."""
    shape = (linear_sizes(module) or ())[::-1]
    dense = isinstance(given, Tensor) and given.is_floating_point()
    if not (dense or isinstance(given, Quantized4bit | Quantized8bit)) or tuple(given.shape) != shape:
        raise ValueError(
            f"the weight of {name!r} must be a quantized weight or a floating-point tensor of shape {shape}, got "
            f"{described(given) if isinstance(given, Tensor) else repr(given)}."
        )
    for leaf in [given] if isinstance(given, Tensor) else flatten(given)[0]:
        if leaf.is_meta:
            raise ValueError(f"the weight of {name!r} has no data: {NO_DATA}")
        if leaf.is_floating_point() and dense:
            require_finite(f"the weight of {name!r}", leaf, "nothing was merged")


def _require_mergeable(model: nn.Module, layers: Mapping[str, Any], to: Format | None) -> None:
    """Raise an error if the weights of a model are absent, or if its layers can't be converted to `to`."""
    float32 = tuple(f".{end}" for end in private.float32_modules(model))
    if isinstance(to, str) and (odd := [name for name in layers if f".{name}".endswith(float32)]):
        raise ValueError(
            f"{odd[0]!r} can't be merged to {to}: {type(model).__name__} keeps this layer in float32. "
            "Merge to a dtype, or keep the format of each layer (to=None)."
        )
    require_weights(model, "merge")
    if isinstance(to, torch.dtype):
        for name, module in model.named_modules():
            if linear_sizes(module) is not None and not is_bnb_linear(module):
                _require_plain_weight(name, module, to)


def _is_rescaled(base: Quantized | Tensor, vectors: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> bool:
    """Whether DVoRA changes the weight of a layer whose `lambda_b` or `lambda_d` is zero."""
    return len(vectors) > len(VECTORS) and bool(checked_delta(base, vectors, frozen).any())


def _base_weight(name: str, module: Any, to: Format | None, given: Tensor | None) -> Quantized | Tensor:
    """Return the base weight (out, in) of a merge: the trained weight `given`, or the weight of the layer."""
    if is_bnb_linear(module):
        return from_bnb(module)[0]
    _require_plain_weight(name, module, to)
    if not is_conv1d(module) and not is_plain(module):
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, whose output is not x Wᵀ + b, so the update can't be merged "
            "into the weight. Use apply or to_module, or leave the layer out of target_modules."
        )
    weight = module.weight.detach() if given is None else given.detach().to(module.weight)
    weight = weight if weight.dtype in _FLOATS else weight.float()  # torch has few operations on float8
    return weight.T if is_conv1d(module) else weight


def _require_plain_weight(name: str, module: Any, to: Format | None) -> None:
    """Raise an error if a layer computes its weight, or has a weight dtype that can't represent a merged weight."""
    if "weight" not in dict(module.named_parameters(recurse=False)):
        remedy = "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"
        if is_parametrized(module, "weight"):
            remedy = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        raise ValueError(f"{name!r} computes its weight in each forward pass: call {remedy} before the merge.")
    dtype = module.weight.dtype
    if dtype in _FLOATS:
        return
    if type(module).forward is not nn.Linear.forward:
        raise ValueError(
            f"{name!r} is a {type(module).__name__} with a scaled {dtype} weight, which can't be merged: dequantize "
            "the model first."
        )
    if to is None:
        raise ValueError(f"{name!r} is stored in {dtype}, which can't hold a merged weight: pass to=torch.bfloat16.")


def _merged_weight(
    base: Quantized | Tensor, vectors: Mapping[str, Tensor] | None, frozen: Mapping[str, Tensor], to: Format | None
) -> Quantized | Tensor:
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


def _checked_parameter(parameters: Mapping[str, nn.Parameter], key: str, value: Tensor) -> Tensor:
    """Return the trained value of a parameter of the model, in the parameter's dtype and on its device."""
    if key not in parameters:
        raise ValueError(f"params has {key!r}, which is not a parameter of the model.")
    own = parameters[key]
    if type(own) is not nn.Parameter:
        raise ValueError(
            f"params has {key!r}, but {key!r} of the model has type {type(own).__name__}, which can't be replaced."
        )
    if own.shape != value.shape:
        raise ValueError(f"{key!r} must have shape {tuple(own.shape)}, got {tuple(value.shape)}.")
    return value.detach().to(own)


def _describe(merged: Any, to: Format | None) -> None:
    """Describe the weights of a merged transformers model in its configuration."""
    if isinstance(to, torch.dtype):
        describe_dtype(merged, to)
    else:
        describe_quantization(merged)
    describe_ties(merged)
    # An adapter trained on the merged weights must not name the original model as its base.
    merged.name_or_path = merged.config.name_or_path = ""


def _is_merged(key: str, layers: Collection[str]) -> bool:
    name, leaf = split_key(key)
    return leaf == "weight" and name in layers


def _set_parameters(merged: nn.Module, model: nn.Module, own: Mapping[str, Tensor], memo: Mapping[int, Any]) -> None:
    """Replace parameters by their trained values. Tied parameters stay tied if the trained values are equal."""
    shared: dict[int, list[nn.Parameter]] = {}
    for key, names in parameter_aliases(model, [*own]).items():
        if key not in own:
            continue
        base = model.get_parameter(key)
        known = shared.setdefault(id(base), [memo[id(base)]])
        parameter = next((one for one in known if torch.equal(one, own[key])), None)
        if parameter is None:
            parameter = nn.Parameter(own[key].clone(), requires_grad=base.requires_grad)
            known.append(parameter)
        for name in names:
            owner, leaf = split_key(name)
            setattr(merged.get_submodule(owner), leaf, parameter)
