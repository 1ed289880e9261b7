"""Build the `Apply` of a model: copy its module tree with adapted layers, and list the keys that params may have."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import private
from ..core.keys import BASE_SHARE, MAGNITUDE, MIXTURE, OUTPUT_SCALE, SCALES, join_key, split_key
from ..quant.bnb import is_bnb_linear
from .apply import Apply, Root
from .base_layers import copy_base_layer, may_have_rows
from .binding import Schema, Slot
from .checkout import Trees
from .closures import copy_module
from .config import VeraConfig
from .layers import AdaptedLinear, Projections, layer_class
from .linears import require_one_device, widest_sizes
from .rows.plans import path_in_model
from .tree import copy_tree, frozen_alias, no_data_error, parameter_aliases


def make_apply(
    model: nn.Module,
    config: VeraConfig,
    targets: Sequence[str],
    trained: Sequence[str] = (),
    *,
    int8_activations: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Apply:
    """Create an `Apply`, which runs a copy of a model with adapted layers; see also `adapt`.

    Only `r`, `vera_dropout`, `use_dora` and `differentiate_norm` of `config` are used. `targets` are the names of the
    modules to adapt. `trained` are the names of the model's own parameters that are trained, and that `params` must
    therefore contain. `int8_activations` and `product_dtype` are those of `adapt`.

    Raises:
        ValueError: If a target cannot be adapted, or if the targets are on several devices.

    Example:
        >>> make_apply(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4), ["0"])
        Apply(Sequential, 1 adapted layers)
    """
    require_one_device(model, targets, trained)
    projections = _placeholders(model, config.r, targets, product_dtype)
    tree = _adapted_tree(model, config, targets, trained, projections, int8_activations)
    slots: dict[str, Slot] = {}
    for name in targets:
        layer: Any = tree.get_submodule(name)
        slots |= _vector_slots(name, layer.out_features, config)
    magnitudes = [key for key in slots if split_key(key)[1] == MAGNITUDE]
    own, tied, offloaded = _parameter_slots(model, tree, trained)
    schema = Schema(
        slots | own, tied, offloaded, {key: join_key(split_key(key)[0], OUTPUT_SCALE) for key in magnitudes}
    )
    paths = {id(module): path for path, module in tree.named_modules()}
    for slot in schema.slots.values():
        for name in slot.names if slot.rows else ():
            layer = tree.get_submodule(path_in_model(split_key(name)[0]))
            layer.path, layer.projections = paths[id(layer)], projections
    trees = Trees(Root(tree, projections))
    return Apply(model, tuple(targets), schema, trees, int8_activations, product_dtype, absent=_absent(model))


def _adapted_tree(
    model: nn.Module,
    config: VeraConfig,
    targets: Sequence[str],
    trained: Sequence[str],
    projections: Projections,
    int8_activations: bool,
) -> nn.Module:
    """Return a copy of the model with adapted layers in place of the targets."""
    modules = dict(model.named_modules())
    owners = {split_key(name)[0] for name in trained}
    memo: dict[int, Any] = {id(p): frozen_alias(p) for p in model.parameters()}

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name not in targets:
            return copy_base_layer(module, memo, rows=name in owners, int8_activations=int8_activations)
        _require_called(name, modules)
        if is_bnb_linear(module):
            base: Any = copy_base_layer(module, memo, int8_activations=int8_activations)
        else:
            base = copy_module(module, memo)
        if config.use_dora and private.offload_hook(module) is not None and base.weight.is_meta:
            raise ValueError(no_data_error(name, "adapt with use_dora=True"))
        return _adapted_layer(base, config, projections)

    tree = copy_tree(model, replace, memo)
    for module in tree.modules():
        private.skip_fused_encoder_path(module)
    return tree


def _adapted_layer(base: nn.Module, config: VeraConfig, projections: Projections) -> AdaptedLinear:
    layer = layer_class(base)(
        base,
        "default",
        projections.vera_A,
        projections.vera_B,
        config.r,
        config.vera_dropout,
        use_dora=config.use_dora,
        differentiate_norm=config.differentiate_norm,
    )
    layer.projections = projections
    return layer


def _placeholders(model: nn.Module, r: int, targets: Sequence[str], product_dtype: torch.dtype | None) -> Projections:
    """Return projections on the meta device. A layer that runs before projections are bound then raises an error."""
    widest_in, widest_out = widest_sizes(model, targets)
    A = torch.empty(r, widest_in, dtype=torch.float32, device="meta")
    B = torch.empty(widest_out, r, dtype=torch.float32, device="meta")
    return Projections(A, B, product_dtype)


def _vector_slots(name: str, out_features: int, config: VeraConfig) -> dict[str, Slot]:
    """Return the `Slot` of each vector of one layer, by key."""
    sizes: list[tuple[str, str, tuple[int, ...], bool]] = [  # key, name in the layer, shape, required
        ("lambda_b", "lambda_b", (out_features,), True),
        ("lambda_d", "lambda_d", (config.r,), True),
        (MIXTURE, MIXTURE, (), False),
    ]
    for scale in SCALES if config.use_dora else ():
        sizes.append((scale, scale, (out_features,), False))
        sizes.append((join_key(scale, BASE_SHARE), "scale_share", (), False))
    return {
        join_key(name, key): Slot((join_key("model", name, leaf),), shape, True, required)
        for key, leaf, shape, required in sizes
    }


def _parameter_slots(
    model: nn.Module, tree: nn.Module, trained: Sequence[str]
) -> tuple[dict[str, Slot], dict[str, str], frozenset[str]]:
    """Return the `Slot` of each parameter of the model, by key, and the fields `tied` and `offloaded` of `Schema`."""
    places = dict(tree.named_modules())
    slots: dict[str, Slot] = {}
    tied: dict[str, str] = {}
    offloaded = set()
    for key, aliases in parameter_aliases(model, trained).items():
        owner, leaf = split_key(key)
        module, parameter = model.get_submodule(owner), model.get_parameter(key)
        if (is_bnb_linear(module) and leaf == "weight") or owner not in places:
            continue  # a packed weight, or a parameter of an adapted layer's parametrization
        if parameter.is_meta and private.offload_hook(module) is not None:
            if key in trained:
                raise ValueError(no_data_error(key, "train"))
            offloaded.add(key)  # the hook would overwrite a value from params
            continue
        first, *others = aliases
        shape = tuple(parameter.shape)
        rows = may_have_rows(module) or is_bnb_linear(module)
        where = tuple(join_key("model", name) for name in aliases)
        slots[key] = Slot(where, shape, rows and key in trained, key in trained)
        if slots[key].rows:
            slots[join_key(key, BASE_SHARE)] = Slot((), (), True, False)
        if key not in trained:
            tied |= dict.fromkeys(others, first)
            slots |= {name: Slot((join_key("model", name),), shape, False, False) for name in others}
    return slots, tied, frozenset(offloaded)


def _absent(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if private.offload_hook(module) is None:
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    return join_key(name, leaf)
    return None


def _require_called(name: str, modules: Mapping[str, nn.Module]) -> None:
    parent = modules[split_key(name)[0]] if name else None
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"target module {name!r} is never called: nn.MultiheadAttention uses the weight without calling the layer, "
            f"so an adapter would have no effect. Remove {name!r} from target_modules."
        )
