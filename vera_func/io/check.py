"""Check that an adapter is consistent before it is saved."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.keys import (
    MAGNITUDE,
    MARKS,
    OUTPUT_SCALE,
    PROJECTIONS,
    STATISTICS,
    adapted_modules,
    join_key,
    split_key,
)
from ..core.shapes import require_dict, require_finite, require_single
from ..model.config import VeraConfig
from .peft_keys import is_copy, key_from_peft, key_to_peft


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_adapter(params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], config: VeraConfig) -> None:
    """Check that params, projections and configuration form one valid adapter.

    Raises:
        ValueError: If `config.target_modules` is None or "all-linear"; if a vector or projection is missing, is
            stacked, is not a floating-point tensor, or does not have the rank `config.r`; or if a value is NaN or inf.
    """
    if not isinstance(config, VeraConfig):
        raise ValueError(f"config must be vera_func's VeraConfig, got {type(config).__name__}.")
    if config.target_modules is None or str(config.target_modules).lower() == "all-linear":
        raise ValueError(
            f"config.target_modules must be explicit names, got {config.target_modules!r}: pass the config that adapt "
            "returned."
        )
    require_dict("params", params)
    if not adapted_modules(params):
        raise ValueError(f"params must have the 'lambda_b' of at least one layer, got the keys {sorted(params)[:3]}.")
    frozen = require_projections(frozen)
    for name, tensor in (*params.items(), *frozen.items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} must be a tensor, got {type(tensor).__name__}.")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"the dtype of {name!r} must be one of {DTYPES}, got {tensor.dtype}.")
        require_finite(repr(name), tensor, "nothing was written")
    layers = {*adapted_modules(params)}
    for key in params:
        _check_key(key, layers, params, frozen, config)
    _check_magnitudes(params, config)
    if frozen["vera_A"].shape[0] != config.r or frozen["vera_B"].shape[1] != config.r:
        raise ValueError(
            f"for config.r={config.r}, vera_A must have shape ({config.r}, in), got {tuple(frozen['vera_A'].shape)}, "
            f"and vera_B must have shape (out, {config.r}), got {tuple(frozen['vera_B'].shape)}."
        )


def require_projections(frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `vera_A` and `vera_B` from `frozen`, without the norm statistics of DVoRA.

    Norm statistics are not saved, because they can be computed from the base model.

    Raises:
        ValueError: If a projection is missing, or if a key is neither a projection nor a norm statistic.

    Example:
        >>> list(require_projections({"vera_A": torch.ones(2, 3), "vera_B": torch.ones(4, 2), "0.C": torch.ones(4, 2)}))
        ['vera_A', 'vera_B']
    """
    require_dict("frozen", frozen)
    if {key for key in frozen if split_key(key)[1] not in STATISTICS} != {*PROJECTIONS}:
        raise ValueError(f"frozen must have the keys 'vera_A' and 'vera_B', got {sorted(frozen)}.")
    return {name: frozen[name] for name in PROJECTIONS}


def _check_key(
    key: str, layers: set[str], params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], config: VeraConfig
) -> None:
    """Check that a key of params can be stored, and that the shape of its value fits."""
    module, leaf = split_key(key)
    value = params[key]
    name = key_to_peft(key, layers)
    if key_from_peft(name) != key or is_copy(name):
        raise ValueError(
            f"{key!r} contains the name of a PEFT wrapper, so PEFT would ignore this tensor or load it as another "
            "parameter. Rename the key to the parameter's name in the base model without PEFT."
        )
    if leaf in MARKS:
        raise ValueError(f"{key!r} belongs to a sum of adapters, which PEFT's format can't store: save each adapter.")
    if leaf == OUTPUT_SCALE:
        raise ValueError(
            f"{key!r} was made by fold_magnitude, whose result can't be saved: save the params that were folded."
        )
    if leaf == "lambda_d":
        require_single(repr(key), value, (config.r,))
    if leaf == "lambda_b" and (value.dim() != 1 or value.shape[0] > frozen["vera_B"].shape[0]):
        raise ValueError(
            f"{key!r} must have shape (out,) with out <= {frozen['vera_B'].shape[0]}, got {tuple(value.shape)}. "
            "To split stacked params, use unstack_adapters."
        )
    other = join_key(module, {"lambda_b": "lambda_d", "lambda_d": "lambda_b"}.get(leaf, leaf))
    if other not in params:
        raise ValueError(f"params has {key!r}, but lacks {other!r}.")


def _check_magnitudes(params: Mapping[str, Tensor], config: VeraConfig) -> None:
    """Check that each layer has a magnitude shaped like `lambda_b`. If `use_dora` is False, allow no magnitudes."""
    layers = adapted_modules(params) if config.use_dora else []
    wanted = {join_key(name, MAGNITUDE): params[join_key(name, "lambda_b")].shape for name in layers}
    given = {key: value.shape for key, value in params.items() if split_key(key)[1] == MAGNITUDE}
    if odd := sorted(given.keys() ^ wanted.keys()):
        what = "has" if odd[0] in given else "lacks"
        raise ValueError(f"config.use_dora is {config.use_dora}, but params {what} {odd[0]!r}.")
    for key, shape in wanted.items():
        if given[key] != shape:
            raise ValueError(f"{key!r} must have shape {tuple(shape)}, the shape of lambda_b, got {tuple(given[key])}.")
