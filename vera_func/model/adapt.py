"""Create a pure function and a fresh adapter from a model and a configuration.

    apply, params, frozen, config = adapt(model, VeraConfig(r=256, target_modules=["q_proj", "v_proj"]))
    apply(params, frozen, input_ids=ids)  ==  model(input_ids=ids)  +  the adapter's update

The model itself is never called or modified.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import private
from ..core.dora import row_norms
from ..core.keys import BASE_SHARE, MAGNITUDE, MIXTURE, OUTPUT_SCALE, SCALES, is_vector, join_key, split_key
from ..core.projection import init_projections
from ..core.shapes import require_float, require_product_dtype
from ..quant.bnb import from_bnb, is_bnb_linear
from .apply import Apply, Root, Slot
from .base_layers import copy_base_layer, has_rows
from .checkout import Trees
from .closures import copy_module
from .config import VeraConfig
from .layers import Projections, layer_class
from .rows import path_in_model
from .targets import layer_device, linear_sizes, peft_dtype, require_one_device, resolve, trained_with
from .tree import copy_tree, frozen_alias, no_data_error, parameter_aliases, unwrap


class Adapted(NamedTuple):
    """A model as a pure function, with the params of one adapter.

    Attributes:
        apply: `apply(params, frozen, *args, **kwargs)` returns the output of the adapted model.
        params: The trained parameters: `"{module}.lambda_b"` of shape (out,), `"{module}.lambda_d"` of shape (r,), and
            for DVoRA `"{module}.magnitude"` of shape (out,). Also those of the model's own parameters that the
            configuration trains.
        frozen: `{"vera_A": (r, max in), "vera_B": (max out, r)}`, shared by all layers and adapters.
        config: The configuration, in which names replace default targets and "all-linear".
    """

    apply: Apply
    params: dict[str, Tensor]
    frozen: dict[str, Tensor]
    config: VeraConfig


def adapt(
    model: nn.Module,
    config: VeraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    int8_activations: bool = False,
    generator: torch.Generator | None = None,
    product_dtype: torch.dtype | None = None,
) -> Adapted:
    """Create a pure function from a model, and a fresh adapter for the model. The model is not modified.

    The adapter is initialized as in PEFT: `lambda_b` is 0, and each entry of a magnitude is the norm of its row of the
    weight. The output therefore equals that of the base model. The function runs a copy of the module tree that shares
    the parameters' memory; buffers are copied. Before calling `adapt`, move the model to its device, and call
    `model.eval()` or `model.train()`. This mode controls the base's own dropout.

    Args:
        model: Any module with `nn.Linear`, bitsandbytes' linear layers or transformers' `Conv1D`. Wrappers of
            `torch.compile`, `DataParallel` and `DistributedDataParallel` are removed; compile `apply` instead. Dense
            layers that accelerate has offloaded run with accelerate's hooks; offloaded quantized layers raise an error.
            The adapted layers must be on one device.
        config: The layers to adapt, the rank and the initial values.
        dtype: Dtype of the vectors and of the adapter's arithmetic, independent of the base's dtype.
        int8_activations: Whether to multiply 8-bit layers as LLM.int8() does; see `quantized_linear`.
        generator: Source of the random vectors if `config.init_weights` is False; ignored otherwise.
        product_dtype: Dtype of the products with the projections. `torch.bfloat16` or `torch.float16` is PEFT's
            arithmetic under autocast; `vera_forward` states the errors. For many rows, a 16-bit dtype is faster on
            GPUs, and on CPUs that have instructions for this dtype. A single row on a CPU is multiplied in the vectors'
            dtype if no gradients are recorded, because this is faster there, and more accurate. None means the vectors'
            dtype, as in PEFT without autocast. The vectors and `frozen` have `dtype` in either case. Each call converts
            the projections once, or not at all if `frozen` is passed in this dtype.

    Returns:
        `(apply, params, frozen, config)`. In the configuration, the names of the targets and of the base are filled in.

    Raises:
        ValueError: If no module matches the configuration, or if a match cannot be adapted. Also if the model is
            wrapped by PEFT, is quantized by a library other than bitsandbytes, or has adapted layers on several
            devices. Also if `dtype` is not a floating-point dtype, or if `product_dtype` is not a 16-bit dtype.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> apply, params, frozen, config = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> x = torch.ones(3, 8)
        >>> torch.equal(apply(params, frozen, x), model(x))
        True
        >>> {name: tuple(value.shape) for name, value in params.items()}
        {'0.lambda_b': (6,), '0.lambda_d': (4,)}

    Reference:
        https://arxiv.org/abs/2310.11454
    """
    model = unwrap(model)
    targets, config = resolve(model, config)
    require_float("dtype", dtype)
    require_product_dtype(product_dtype)
    if not config.init_weights and not isinstance(generator, torch.Generator):
        raise ValueError("init_weights=False draws random vectors: pass adapt(..., generator=torch.Generator()).")
    frozen = draw_projections(model, config, targets, dtype=dtype)
    trained = trained_with(model, config, targets)
    apply = make_apply(model, config, targets, trained, int8_activations=int8_activations, product_dtype=product_dtype)
    params = {}
    drawn: Any = {"dtype": torch.float32, "device": "cpu" if generator is None else generator.device}
    for name in targets:
        layer = model.get_submodule(name)
        device = frozen["vera_A"].device
        via = peft_dtype(layer) or torch.float32
        out_features = apply.slots[join_key(name, "lambda_b")].shape[0]
        if config.init_weights:
            lambda_b = torch.zeros(out_features, **drawn)
            lambda_d = torch.full((config.r,), config.d_initial, **drawn)
        else:
            lambda_b = torch.ones(out_features, **drawn)
            lambda_d = torch.randn(config.r, generator=generator, **drawn)
        params[join_key(name, "lambda_b")] = lambda_b.to(device, via).to(dtype)
        params[join_key(name, "lambda_d")] = lambda_d.to(device, via).to(dtype)
        if config.use_dora:
            adapted: Any = apply.trees.root.get_submodule(join_key("model", name))
            params[join_key(name, MAGNITUDE)] = row_norms(adapted.base_weight(dtype)).detach().to(device)
    for name in trained:
        params[name] = model.get_parameter(name).detach().clone()
    return Adapted(apply, params, frozen, with_origin(config, model))


class ParameterCount(NamedTuple):
    """The numbers of trainable parameters and of all parameters.

    Attributes:
        trainable: Number of values in `params`.
        total: Number of the model's parameters plus the number of values in the adapter vectors. A quantized weight
            counts with its logical size, `out * in`.
        percent: `100 * trainable / total`.
    """

    trainable: int
    total: int
    percent: float


def num_parameters(adapted: Adapted) -> ParameterCount:
    """Count the trainable parameters of an adapter and all parameters of the adapted model.

    The frozen projections are not counted, as in PEFT's `print_trainable_parameters`.

    Args:
        adapted: From `adapt` or `load_adapter`, with a single adapter.

    Raises:
        ValueError: If `adapted` is something else, such as params.

    Example:
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> num_parameters(adapted)
        ParameterCount(trainable=10, total=64, percent=15.625)
    """
    if not isinstance(adapted, Adapted):
        raise ValueError(f"adapted must be an Adapted, made by adapt or load_adapter, got {type(adapted).__name__}.")
    model, params = adapted.apply.model, adapted.params
    trainable = sum(value.numel() for value in params.values())
    vectors = sum(value.numel() for key, value in params.items() if is_vector(key))
    packed = {
        id(module.weight): math.prod(from_bnb(module)[0].shape) for module in model.modules() if is_bnb_linear(module)
    }
    total = vectors + sum(packed.get(id(leaf), leaf.numel()) for leaf in model.parameters())
    return ParameterCount(trainable, total, 100 * trainable / total)


def draw_projections(
    model: nn.Module, config: VeraConfig, targets: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Draw the projections that PEFT would draw for these targets, on the device of the first target.

    Over a 16-bit base the values are rounded to 16 bits (see `peft_dtype`) and then cast to `dtype`.

    Args:
        model: The base model.
        config: Its `r` and `projection_prng_key` are used.
        targets: Names of the adapted modules; the widest ones determine the sizes.
        dtype: Dtype of the result.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 20))
        >>> {k: tuple(v.shape) for k, v in draw_projections(model, VeraConfig(r=4), ["0", "1"]).items()}
        {'vera_A': (4, 8), 'vera_B': (20, 4)}
    """
    layers = [model.get_submodule(name) for name in targets]
    sizes = [linear_sizes(layer) or (0, 0) for layer in layers]
    frozen = init_projections(
        config.r, max(size[0] for size in sizes), max(size[1] for size in sizes), config.projection_prng_key
    )
    for via in dict.fromkeys(peft_dtype(layer) for layer in layers):
        if via is not None:
            frozen = {name: value.to(via) for name, value in frozen.items()}
    device = layer_device(layers[0])
    return {name: value.to(device, dtype) for name, value in frozen.items()}


def make_apply(
    model: nn.Module,
    config: VeraConfig,
    targets: Sequence[str],
    trained: Sequence[str] = (),
    *,
    int8_activations: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Apply:
    """Create the `Apply` of a model. It runs a copy of the module tree with adapted layers; see also `adapt`.

    Args:
        model: The base model.
        config: Its `r`, `vera_dropout`, `use_dora` and `differentiate_norm` are used.
        targets: Names of the modules to adapt.
        trained: Names of the model's own parameters that `params` must contain. Their values may have an axis of rows.
        int8_activations: See `quantized_linear`.
        product_dtype: See `vera_forward`.

    Raises:
        ValueError: If a target cannot be adapted, or if the targets are on several devices.

    Example:
        >>> make_apply(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4), ["0"])
        Apply(Sequential, 1 adapted layers)
    """
    require_one_device(model, targets, trained)
    modules = dict(model.named_modules())
    owners = {split_key(name)[0] for name in trained}
    memo: dict[int, Any] = {id(p): frozen_alias(p) for p in model.parameters()}
    projections = _placeholders(modules, config.r, targets, product_dtype)
    slots: dict[str, Slot] = {}

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name not in targets:
            return copy_base_layer(module, memo, rows=name in owners, int8_activations=int8_activations)
        _require_called(name, modules)
        if is_bnb_linear(module):
            layer: Any = copy_base_layer(module, memo, int8_activations=int8_activations)
        else:
            layer = copy_module(module, memo)
        if config.use_dora and private.offload_hook(module) is not None and layer.weight.is_meta:
            raise ValueError(no_data_error(name, "adapt with use_dora=True"))
        layer = layer_class(layer)(
            layer,
            "default",
            projections.vera_A,
            projections.vera_B,
            config.r,
            config.vera_dropout,
            use_dora=config.use_dora,
            differentiate_norm=config.differentiate_norm,
        )
        layer.projections = projections
        slots.update(_vector_slots(name, layer.out_features, config))
        return layer

    tree = copy_tree(model, replace, memo)
    for module in tree.modules():
        private.skip_fused_encoder_path(module)
    own, tied, offloaded = _parameter_slots(model, tree, trained)
    paths = {id(module): path for path, module in tree.named_modules()}
    for slot in (*slots.values(), *own.values()):
        for name in slot.names if slot.rows else ():
            layer: Any = tree.get_submodule(path_in_model(split_key(name)[0]))
            layer.path, layer.projections = paths[id(layer)], projections
    return Apply(
        model,
        tuple(targets),
        slots | own,
        Trees(Root(tree, projections)),
        int8_activations,
        product_dtype,
        tied=tied,
        offloaded=offloaded,
        absent=_absent(model),
        magnitudes={key: join_key(split_key(key)[0], OUTPUT_SCALE) for key in slots if split_key(key)[1] == MAGNITUDE},
    )


def _placeholders(
    modules: Mapping[str, nn.Module], r: int, targets: Sequence[str], product_dtype: torch.dtype | None
) -> Projections:
    """Return projections on the meta device, so that running a layer without bound tensors raises an error."""
    sizes = [linear_sizes(modules[name]) or (0, 0) for name in targets]
    widest_in, widest_out = map(max, zip(*sizes, strict=True))
    options: Any = {"dtype": torch.float32, "device": "meta"}
    A, B = torch.empty(r, widest_in, **options), torch.empty(widest_out, r, **options)
    return Projections(A, B, product_dtype)


def _vector_slots(name: str, out_features: int, config: VeraConfig) -> dict[str, Slot]:
    """Return the slots of the vectors of one layer."""
    sizes: list[tuple[str, str, tuple[int, ...], bool]] = [  # key, name in the layer, shape, whether it is required
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
    """Return the slots of the model's own parameters, and the fields `tied` and `offloaded` of `Apply`."""
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
        rows = has_rows(module) or is_bnb_linear(module)
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


def with_origin(config: VeraConfig, model: nn.Module) -> VeraConfig:
    """Fill in the base model's name if the configuration has none, and the model's class for `AutoPeftModel`."""
    named = (getattr(owner, "name_or_path", None) for owner in (model, getattr(model, "config", None)))
    # A transformers model that was created from a configuration has the name "".
    name = config.base_model_name_or_path or next((n for n in named if isinstance(n, str) and n), None)
    mapping = config.auto_mapping
    if name is not None and mapping is None and config.task_type is None:
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return dataclasses.replace(config, base_model_name_or_path=name, auto_mapping=mapping)


def _require_called(name: str, modules: Mapping[str, nn.Module]) -> None:
    parent = modules[split_key(name)[0]] if name else None
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"target module {name!r} is never called: nn.MultiheadAttention uses its weight directly, so an adapter "
            "would have no effect. Remove it from target_modules."
        )
