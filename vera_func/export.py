"""A plain model for tools that know nothing of adapters: merged, or dequantized.

W' = round(W + ΔW), layer by layer, in a new model of the user's own class
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import require_float
from .bnb import from_bnb, is_bnb_linear, to_bnb
from .config import is_conv1d, linear_sizes
from .merge import MergeReport, merge_dense, merge_quantized, merge_report
from .quantized import (
    Quantized,
    Quantized4bit,
    dequantize,
    quantize_4bit,
    quantize_8bit,
)


Format = str | torch.dtype
_FORMATS: dict[str, Callable[[Tensor], Quantized]] = {
    "nf4": lambda weight: quantize_4bit(weight, "nf4"),
    "fp4": lambda weight: quantize_4bit(weight, "fp4"),
    "int8": quantize_8bit,
}


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
    `merge_reports` tells what a merge to 4 or 8 bits loses; a merge to 16 bits loses next to nothing.

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
    _check_format(to)
    layers = adapted_layers(model, params)
    if odd := sorted((weights or {}).keys() - layers.keys()):
        raise ValueError(f"weights has {odd[0]!r}, which is no adapted module; those are {sorted(layers)[:3]}, ...")
    float32 = tuple(f".{end}" for end in getattr(model, "_keep_in_fp32_modules", None) or ())
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
        if key.rpartition(".")[2] not in ("lambda_b", "lambda_d"):
            own = _own_parameter(model, key, value)
            memo[id(own)] = nn.Parameter(value.detach().to(own.dtype).clone(), requires_grad=own.requires_grad)

    def weight_of(name: str, module: nn.Module) -> Quantized | Tensor | None:
        # A bitsandbytes module rewrites its weight as it runs, so not even what is not merged may be shared.
        if name not in layers and not is_bnb_linear(module):
            return None
        given = (weights or {}).get(name)
        return _merged_weight(module, layers.get(name), frozen, to) if given is None else given

    merged = _copy_with(model, weight_of, memo)
    if hasattr(merged, "save_pretrained"):
        _describe_quantization(merged, to)
    return merged


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

    dense = _copy_with(model, weight_of, {id(parameter): parameter for parameter in model.parameters()})
    if hasattr(dense, "save_pretrained"):
        _forget_quantization(dense)
    return dense


def merge_reports(
    model: nn.Module,
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    to: Format | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> dict[str, MergeReport]:
    """What `merge(model, params, frozen, to)` would keep of the adapter, module by module.

    Args:
        model: The base model.
        params: Of a single adapter.
        frozen: The projections.
        to: As for `merge`.
        inputs: Inputs (tokens, in) of the modules, by name, for the errors of their outputs.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> params = {key: torch.ones_like(value) for key, value in adapted.params.items()}
        >>> merge_reports(model, params, adapted.frozen, to=torch.float32)["0"].kept > 0.99
        True
    """
    _check_format(to)
    layers = adapted_layers(model, params)
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


def merge_advice(reports: Mapping[str, MergeReport]) -> str:
    """In a sentence or two, whether to merge.

    Args:
        reports: From `merge_reports`.

    Raises:
        ValueError: If they are not by module.

    Example:
        >>> merge_advice({"q_proj": MergeReport(kept=0.02, error=1.07, size=0.01)})[:55]
        'Do not merge like this: 2 % of the update is kept on av'
    """
    if not isinstance(reports, Mapping):
        raise ValueError(f"reports must be those of merge_reports, by module, got {type(reports).__name__}.")
    if not reports:
        return "There is nothing to merge: the adapter adds nothing to any layer."
    kept = sum(report.kept for report in reports.values()) / len(reports)
    error = sum(report.error for report in reports.values()) / len(reports)
    worst = min(reports, key=lambda name: reports[name].kept)
    share = f"{kept:.0%} of the update is kept on average (at worst {reports[worst].kept:.0%}, in {worst})".replace(
        "%", " %"
    )
    if error < 0.1:
        return f"Merging is safe: {share}, with an error of {error:.2g} times the update."
    if error < 0.5 and kept > 0.95:
        return (
            f"Merging keeps the update: {share}. Rounding adds noise of {error:.2f} times its size, spread over all "
            "weights, which the outputs hardly show as a rule: vera-func evaluate compares them."
        )
    if error < 0.5:
        return (
            f"Merging changes the adapter's effect: {share}, with an error of {error:.2f} times the update. Compare "
            "the outputs before you use it (vera-func evaluate)."
        )
    return (
        f"Do not merge like this: {share}, and the rounding adds an error of {error:.2f} times the update. Merge to a "
        "16-bit dtype, merge with calibration, or export a LoRA, which is exact."
    )


def adapted_layers(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The vectors of each adapted module, `{name: {"lambda_b", "lambda_d"}}`, checked against the model.

    Raises:
        ValueError: If a module is missing, can't be adapted, or lacks one of its vectors, or a value is not finite.

    Example:
        >>> params = {"0.lambda_b": torch.ones(6), "0.lambda_d": torch.ones(4)}
        >>> list(adapted_layers(nn.Sequential(nn.Linear(8, 6)), params))
        ['0']
    """
    modules = dict(model.named_modules())
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in params.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "mixture":
            raise ValueError(f"{key!r} marks a sum of adapters; merge or export them one by one.")
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} must be a tensor, got {type(value).__name__}.")
        if not value.isfinite().all():
            raise ValueError(f"{key!r} holds NaN or inf: the adapter is broken, and nothing was written.")
        if leaf in ("lambda_b", "lambda_d"):
            if name not in modules or linear_sizes(modules[name]) is None:
                raise ValueError(f"params has {key!r}, but the model has no linear layer {name!r}.")
            layers.setdefault(name, {})[leaf] = value
    for name, vectors in layers.items():
        sizes = linear_sizes(modules[name])
        if vectors.keys() != {"lambda_b", "lambda_d"} or vectors["lambda_b"].shape != (sizes or (0, 0))[1:]:
            shapes = {leaf: tuple(value.shape) for leaf, value in vectors.items()}
            raise ValueError(
                f"{name!r} needs lambda_b ({(sizes or (0, 0))[1]},) and lambda_d (r,) of one adapter, got {shapes}."
            )
    if not layers:
        raise ValueError(f"params has no 'lambda_b' of any layer, only {sorted(params)[:3]}.")
    return layers


def _check_format(to: Format | None) -> None:
    if to is not None and to not in _FORMATS and not (isinstance(to, torch.dtype) and to.is_floating_point):
        raise ValueError(f"to must be one of {sorted(_FORMATS)} or a floating-point dtype, got {to!r}.")


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
        if to in (None, _format(base)):
            return base
        return dequantize(base, to) if isinstance(to, torch.dtype) else _FORMATS[to](dequantize(base, torch.float32))
    if isinstance(to, torch.dtype):
        return merge_dense(base, vectors, frozen, to)
    if isinstance(base, Tensor):
        dense = merge_dense(base, vectors, frozen, base.dtype)
        return dense if to is None else _FORMATS[to](dense)
    if to in (None, _format(base)):
        return merge_quantized(base, vectors, frozen)
    return _FORMATS[to](merge_dense(base, vectors, frozen, torch.float32))


def _copy_with(
    model: nn.Module, weight_of: Callable[[str, nn.Module], Quantized | Tensor | None], memo: dict[int, Any]
) -> nn.Module:
    """A copy with other weights where there are some; `memo` says what is shared, as in `deepcopy`."""
    replaced: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        weight = weight_of(name, module)
        if weight is not None:
            bias = getattr(module, "bias", None)
            bias = None if bias is None else memo[id(bias)].detach()
            replaced[id(module)] = _module_with(module, weight, bias, memo)
    return copy.deepcopy(model, memo | replaced)


def _module_with(module: Any, weight: Quantized | Tensor, bias: Tensor | None, memo: dict[int, Any]) -> nn.Module:
    if not isinstance(weight, Tensor):
        return to_bnb(weight, bias).train(module.training)
    if is_bnb_linear(module):
        new: Any = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta")
        bias = None if bias is None else bias.to(weight.dtype).clone()
    else:
        new = copy.deepcopy(module, dict(memo))
        weight = weight.T.contiguous() if is_conv1d(module) else weight
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.train(module.training)


def _format(q: Quantized) -> str:
    return q.quant_type if isinstance(q, Quantized4bit) else "int8"


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
        _forget_quantization(model)
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


def _forget_quantization(model: Any) -> None:
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)


def describe_reports(reports: Mapping[str, MergeReport]) -> Sequence[dict[str, Any]]:
    """The reports as plain rows, one a module, for a table.

    Example:
        >>> describe_reports({"q_proj": MergeReport(0.5, 0.25, 0.125)})[0]["kept"]
        0.5
    """
    return [{"module": name, **report._asdict()} for name, report in reports.items()]
