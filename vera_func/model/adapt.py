"""Create a pure function and a new adapter from a model and a configuration.

apply, params, frozen, config = adapt(model, VeraConfig(r=256, target_modules=["q_proj", "v_proj"]))
apply(params, frozen, input_ids=ids)  ==  model(input_ids=ids)  +  the adapter's update
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.dora import row_norms
from ..core.keys import MAGNITUDE, is_vector, join_key
from ..core.projection import init_projections
from ..core.shapes import require_float, require_product_dtype
from ..quant.bnb import from_bnb, is_bnb_linear
from .apply import Apply
from .build import make_apply
from .config import VeraConfig
from .linears import layer_device, peft_dtype, widest_sizes
from .targets import resolve, trained_with
from .tree import unwrap


class Adapted(NamedTuple):
    """An adapted model as a pure function, with the params, projections and configuration of one adapter.

    Attributes:
        apply: `apply(params, frozen, *args, **kwargs)` returns the output of the adapted model.
        params: The trainable parameters: `"{module}.lambda_b"` of shape (out,), `"{module}.lambda_d"` of shape (r,),
            and for DVoRA `"{module}.magnitude"` of shape (out,). Trained biases and heads of the model (`config.bias`,
            `config.modules_to_save`) are also in `params`, under their own names.
        frozen: The projections `vera_A` of shape (r, max in) and `vera_B` of shape (max out, r), shared by all layers
            and adapters.
        config: The configuration, with module names in place of default targets and "all-linear".
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
    """Create a pure function and a new adapter for a model. The model is not modified.

    The adapter is initialized as in PEFT: `lambda_b` is 0, so that the adapted model initially computes the output of
    the base model. For DVoRA, `magnitude[i]` is the norm of row i of the weight. The pure function runs a copy of the
    model; the copy shares the memory of the model's parameters and has its own buffers. Before calling `adapt`, move
    the model to its device, and call `model.eval()` or `model.train()`: the mode of the model at that time controls the
    model's own dropout.

    Args:
        model: Any module that contains `nn.Linear`, bitsandbytes' linear layers or transformers' `Conv1D`. The adapted
            layers must be on one device. Wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel` are
            removed; compile `apply` instead. Dense layers may be offloaded by accelerate, but offloaded quantized
            layers raise an error.
        config: The layers to adapt, the rank and the initial values.
        dtype: Dtype of the adapter's vectors and arithmetic. The base model may have another dtype.
        int8_activations: Whether 8-bit layers also quantize their inputs, as in LLM.int8(); see `quantized_linear`.
        generator: Source of the random initial vectors, required if `config.init_weights` is False, and ignored
            otherwise.
        product_dtype: Dtype of the matrix products with the projections. None means `dtype`, as in PEFT without
            autocast. With a 16-bit `product_dtype`, products are computed as in PEFT under autocast; for the rounding
            errors, see `vera_forward`. For many rows, 16-bit products are faster on GPUs, and on CPUs with instructions
            for `product_dtype`. If no gradients are recorded, products of a single row on a CPU are always computed in
            `dtype`, because 16-bit products of a single row are slower and less accurate. Each call casts the
            projections to `product_dtype` once, unless `frozen` already has this dtype.

    Returns:
        `(apply, params, frozen, config)`. The returned configuration has the names of the targets and of the base
        model.

    Raises:
        ValueError: If no module matches the configuration, or if a matching module cannot be adapted.
        ValueError: If the model is wrapped by PEFT, is quantized by a library other than bitsandbytes, or has adapted
            layers on several devices.
        ValueError: If `dtype` is not a floating-point dtype, or if `product_dtype` is not a 16-bit dtype.

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
        raise ValueError(
            f"generator must be a torch.Generator if init_weights is False, got {type(generator).__name__}: random "
            "vectors are drawn from the generator. Pass adapt(..., generator=torch.Generator())."
        )
    frozen = draw_projections(model, config, targets, dtype=dtype)
    trained = trained_with(model, config, targets)
    apply = make_apply(model, config, targets, trained, int8_activations=int8_activations, product_dtype=product_dtype)
    device = frozen["vera_A"].device
    params = {}
    for name in targets:
        layer: Any = apply.trees.root.get_submodule(join_key("model", name))
        via = peft_dtype(model.get_submodule(name)) or torch.float32
        for key, vector in _initial_vectors(layer.out_features, config, generator).items():
            params[join_key(name, key)] = vector.to(device, via).to(dtype)
        if config.use_dora:
            params[join_key(name, MAGNITUDE)] = row_norms(layer.base_weight(dtype)).detach().to(device)
    for name in trained:
        params[name] = model.get_parameter(name).detach().clone()
    return Adapted(apply, params, frozen, with_origin(config, model))


def _initial_vectors(out_features: int, config: VeraConfig, generator: torch.Generator | None) -> dict[str, Tensor]:
    options: Any = {"dtype": torch.float32, "device": "cpu" if generator is None else generator.device}
    if config.init_weights:
        lambda_b = torch.zeros(out_features, **options)
        lambda_d = torch.full((config.r,), config.d_initial, **options)
    else:
        lambda_b = torch.ones(out_features, **options)
        lambda_d = torch.randn(config.r, generator=generator, **options)
    return {"lambda_b": lambda_b, "lambda_d": lambda_d}


class ParameterCount(NamedTuple):
    """The number of trainable parameters and the number of all parameters.

    Attributes:
        trainable: Number of values in `params`.
        total: Number of the model's parameters plus the number of values in the adapter vectors. A quantized weight
            counts as `out * in` parameters.
        percent: `100 * trainable / total`.
    """

    trainable: int
    total: int
    percent: float


def num_parameters(adapted: Adapted) -> ParameterCount:
    """Count the trainable parameters of an adapter and all parameters of the adapted model.

    The frozen projections are not counted, as in PEFT's `print_trainable_parameters`.

    Args:
        adapted: The result of `adapt` or `load_adapter`, with the params of a single adapter.

    Raises:
        ValueError: If `adapted` is not an `Adapted`, for example if only the params are passed.

    Example:
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> num_parameters(adapted)
        ParameterCount(trainable=10, total=64, percent=15.625)
    """
    require_adapted(adapted)
    model, params = adapted.apply.model, adapted.params
    trainable = sum(value.numel() for value in params.values())
    vectors = sum(value.numel() for key, value in params.items() if is_vector(key))
    packed = {
        id(module.weight): math.prod(from_bnb(module)[0].shape) for module in model.modules() if is_bnb_linear(module)
    }
    total = vectors + sum(packed.get(id(leaf), leaf.numel()) for leaf in model.parameters())
    return ParameterCount(trainable, total, 100 * trainable / total)


def require_adapted(adapted: Any) -> None:
    """Raise an error if a value is not an `Adapted`.

    Raises:
        ValueError: If `adapted` is not an `Adapted`, for example if only the params are passed.

    Example:
        >>> require_adapted(adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"])))
    """
    if not isinstance(adapted, Adapted):
        raise ValueError(f"adapted must be an Adapted, made by adapt or load_adapter, got {type(adapted).__name__}.")


def draw_projections(
    model: nn.Module, config: VeraConfig, targets: Sequence[str], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Draw the projections that PEFT would draw for these targets, on the device of the first target.

    The largest `in` and the largest `out` of the targets are the sizes of the projections. Only `r` and
    `projection_prng_key` of the configuration are used. If PEFT would round the projections (see `peft_dtype`), they
    are rounded before the cast to `dtype`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 20))
        >>> {k: tuple(v.shape) for k, v in draw_projections(model, VeraConfig(r=4), ["0", "1"]).items()}
        {'vera_A': (4, 8), 'vera_B': (20, 4)}
    """
    layers = [model.get_submodule(name) for name in targets]
    frozen = init_projections(config.r, *widest_sizes(model, targets), config.projection_prng_key)
    for via in dict.fromkeys(peft_dtype(layer) for layer in layers):
        if via is not None:
            frozen = {name: value.to(via) for name, value in frozen.items()}
    device = layer_device(layers[0])
    return {name: value.to(device, dtype) for name, value in frozen.items()}


def with_origin(config: VeraConfig, model: nn.Module) -> VeraConfig:
    """Return the configuration with missing values of `base_model_name_or_path` and `auto_mapping` filled in."""
    named = (getattr(owner, "name_or_path", None) for owner in (model, getattr(model, "config", None)))
    # A transformers model that was created from a configuration has the name "".
    name = config.base_model_name_or_path or next((n for n in named if isinstance(n, str) and n), None)
    mapping = config.auto_mapping
    if name is not None and mapping is None and config.task_type is None:
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return dataclasses.replace(config, base_model_name_or_path=name, auto_mapping=mapping)
