"""Convert the VeRA adapter of a `peft.PeftModel` in memory.

The conversion from PEFT, and back:

    adapted = from_peft(peft_model)
    save_adapter(path, *adapted[1:])  # then PeftModel.from_pretrained(model, path)
"""

import dataclasses
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import private
from ..core.keys import VECTORS, split_key
from ..core.shapes import require_finite, require_product_dtype
from ..model.adapt import Adapted, with_origin
from ..model.apply import Apply
from ..model.build import make_apply
from ..model.config import VeraConfig
from ..model.targets import exact_targets, resolve, trained_with
from ..model.tree import unwrap, without_wrappers
from .config import config_from_json


def from_peft(
    peft_model: nn.Module,
    *,
    adapter_name: str | None = None,
    int8_activations: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Adapted:
    """Return the adapter of a `peft.PeftModel` in memory, and the base model as a pure function.

    Saving the adapter in PEFT and loading it with `load_adapter(..., dtype=None)` would give the same values, bit for
    bit. The vectors, projections and trained parameters are copies, so training the PEFT model further does not change
    the result. Parameters that are not trained share memory with the PEFT model. The base model keeps the training mode
    of the PEFT model. PEFT trains biases in place, so trained biases are in `params` and also in the base model.

    Args:
        peft_model: A `PeftModel` with a VeRA adapter, which is not modified. The `PeftModel` may be wrapped by
            `torch.compile`, `DataParallel` or `DistributedDataParallel`.
        adapter_name: Name of the adapter. None means the active adapter.
        int8_activations: See `adapt`.
        product_dtype: See `adapt`.

    Returns:
        `(apply, params, frozen, config)`, as from `adapt`, with the dtypes and devices of the PEFT model.

    Raises:
        ValueError: If `peft_model` is not a `PeftModel`, or has no VeRA adapter of the given name; if an adapter is
            merged into the base; if several adapters are active and `adapter_name` is None; or if the adapter holds NaN
            or inf, or uses PEFT features that `params` can't represent.

    Example:
        >>> import peft
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> peft_model = peft.get_peft_model(model, peft.VeraConfig(r=4, target_modules=["0"]))
        >>> apply, params, frozen, config = from_peft(peft_model)
        >>> x = torch.ones(3, 8)
        >>> torch.equal(apply(params, frozen, x), peft_model(x))
        True

    Reference:
        https://huggingface.co/docs/peft/package_reference/vera
    """
    require_product_dtype(product_dtype)
    live, name = _named_adapter(peft_model, adapter_name)
    base, layers, heads = _without_peft(live.base_model.model, name)
    merged = {adapter for layer in layers.values() for adapter in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"the PeftModel has merged the adapters {sorted(merged)} into its base. Call peft_model.unmerge_adapter() "
            "first. If the base is quantized or 16-bit, load the base model again instead, because unmerging does not "
            "restore such weights exactly."
        )
    layers = {path: layer for path, layer in layers.items() if name in layer.vera_lambda_d}
    config = _config(live.peft_config[name], base, tuple(layers), name)
    frozen = _projections(layers, name, config.r)
    apply = make_apply(
        base,
        config,
        tuple(layers),
        trained_with(base, config, tuple(layers)),
        int8_activations=int8_activations,
        product_dtype=product_dtype,
    )
    return Adapted(apply, _params(apply, base, layers, heads, name), frozen, config)


def _named_adapter(peft_model: Any, adapter_name: str | None) -> tuple[Any, str]:
    """Return the `PeftModel` without wrappers, and the name of the adapter to convert."""
    while isinstance(peft_model, nn.Module) and (below := private.wrapped_module(peft_model)) is not None:
        peft_model = below
    peft: Any = sys.modules.get("peft")  # if PEFT was not imported, there is no PeftModel
    if peft is None or not isinstance(peft_model, peft.PeftModel):
        raise ValueError(
            f"from_peft takes a peft.PeftModel, got {type(peft_model).__name__}. For a base model, use adapt, or "
            "load_adapter with the adapter's directory."
        )
    configs = peft_model.peft_config
    active = peft_model.active_adapters if adapter_name is None else [adapter_name]
    if len(active) != 1:
        raise ValueError(
            f"the active adapters of the PeftModel are {active}: pass adapter_name, one of {sorted(configs)}."
        )
    name = active[0]
    if not isinstance(name, str) or name not in configs:
        raise ValueError(f"the PeftModel has no adapter {name!r}: adapter_name must be one of {sorted(configs)}.")
    if configs[name].peft_type != "VERA":
        kind = getattr(configs[name].peft_type, "value", configs[name].peft_type)
        raise ValueError(f"the adapter {name!r} of the PeftModel has the peft_type {kind}; only VERA is supported.")
    return peft_model, name


def _without_peft(root: nn.Module, name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Return the base model, and two dicts by module name: PEFT's VeRA layers, and the trained `modules_to_save`."""
    vera, utils = import_module("peft.tuners.vera"), import_module("peft.utils")

    def inside(module: Any) -> nn.Module | None:
        if isinstance(module, vera.VeraLayer):
            return module.base_layer
        if isinstance(module, utils.ModulesToSaveWrapper):
            return module.original_module
        return private.wrapped_module(module)

    wrappers: list[Any] = [module for module in root.modules() if inside(module) is not None]
    base, replaced = without_wrappers(root, inside)
    other = next((path for path, m in base.named_modules() if isinstance(m, utils.AuxiliaryTrainingWrapper)), None)
    if other is not None:
        kind = type(base.get_submodule(other)).__name__
        raise ValueError(f"{other!r} is wrapped by PEFT's {kind}, which vera_func does not support.")
    base = unwrap(base)  # raises an error if layers of another PEFT method are left
    paths = {id(module): path for path, module in base.named_modules()}
    placed = {paths[key]: wrapper for wrapper in wrappers if (key := id(replaced[id(wrapper)])) in paths}
    layers = {path: wrapper for path, wrapper in placed.items() if isinstance(wrapper, vera.VeraLayer)}
    heads = {
        path: wrapper.modules_to_save[name]
        for path, wrapper in placed.items()
        if isinstance(wrapper, utils.ModulesToSaveWrapper) and name in wrapper.modules_to_save
    }
    for path, head in heads.items():
        original = dict(base.get_submodule(path).named_buffers())
        changed = [leaf for leaf, buffer in head.named_buffers() if not torch.equal(buffer, original[leaf])]
        if changed:
            raise ValueError(
                f"PEFT has updated the buffer {changed[0]!r} of {path!r}, which is one of the modules_to_save. An "
                "adapter can store trained parameters, but not buffers such as batch statistics."
            )
    return base, layers, heads


def _config(peft_config: Any, base: nn.Module, targets: tuple[str, ...], name: str) -> VeraConfig:
    """Return an adapter's configuration, with `target_modules` that match exactly the layers that PEFT has adapted."""
    fields = {key: getattr(value, "value", value) for key, value in peft_config.to_dict().items()}
    given = config_from_json(fields, f"peft_config[{name!r}]")
    exact = exact_targets(base, targets, given)
    explicit: Any = {"target_modules": exact, "layers_to_transform": None, "layers_pattern": None}
    for config in (given, dataclasses.replace(given, **explicit)):
        try:
            names, config = resolve(base, config, strict=False)
        except ValueError:  # in PEFT, layers can also be adapted by other means than target_modules
            continue
        if {*names} == {*targets}:
            return with_origin(config, base)
    raise ValueError(
        f"the adapter {name!r} can't be converted: no target_modules match exactly its adapted layers, such as "
        f"{sorted(targets)[:3]}."
    )


def _projections(layers: Mapping[str, Any], name: str, r: int) -> dict[str, Tensor]:
    (first, layer), *others = layers.items()
    frozen = {"vera_A": layer.vera_A[name], "vera_B": layer.vera_B[name]}
    if frozen["vera_A"].shape[0] != r:
        raise ValueError(
            f"the adapter {name!r} has rank {r}, but this PeftModel has projections of rank "
            f"{frozen['vera_A'].shape[0]} from another adapter. Load the adapter into a separate PeftModel."
        )
    for path, other in others:
        pair = (other.vera_A[name], other.vera_B[name])
        if not all(a is b or torch.equal(a, b) for a, b in zip(frozen.values(), pair, strict=True)):
            raise ValueError(
                f"the layers {first!r} and {path!r} have different projections, but all layers of an adapter must "
                "share vera_A and vera_B."
            )
    return {key: _copy(key, tensor) for key, tensor in frozen.items()}


def _params(
    apply: Apply, base: nn.Module, layers: Mapping[str, Any], heads: Mapping[str, nn.Module], name: str
) -> dict[str, Tensor]:
    params = {}
    for key, slot in apply.slots.items():
        if not slot.required:
            continue
        owner, leaf = split_key(key)
        head = next((path for path in heads if f"{key}.".startswith(f"{path}.")), None)
        if leaf in VECTORS:
            value = getattr(layers[owner], f"vera_{leaf}")[name]
        elif head is not None:
            value = heads[head].get_parameter(key.removeprefix(head).removeprefix("."))
        else:
            value = base.get_parameter(key)
        if value.shape != slot.shape:
            raise ValueError(f"{key!r} of the PeftModel must have shape {slot.shape}, got {tuple(value.shape)}.")
        params[key] = _copy(key, value)
    return params


def _copy(key: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise ValueError(f"{key!r} of the PeftModel is on the meta device and has no data: load the adapter first.")
    require_finite(f"{key!r} of the PeftModel", value, "the adapter is invalid")
    return value.detach().clone()
