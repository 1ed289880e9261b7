"""Fold the magnitudes of a model's DVoRA adapters for inference, and store norm statistics for training.

See `core.dora` for the equations. Without `fold_magnitude` or `keep_norm_statistics`, each call dequantizes all weights
and computes the norm statistics of each layer. This costs about as much as a forward pass of `2 r` tokens. Without
`fold_magnitude`, each call also computes the row norms of each adapter. This costs about as much as a forward pass of
`r` tokens. If each row of a batch has its own adapter, the row norms are computed for each row of the batch.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.dora import fold_layer, norm_statistics
from ..core.keys import BASE_SHARE, MAGNITUDE, PROJECTIONS, STATISTICS, VECTORS, join_key
from .apply import Apply


def fold_magnitude(apply: Apply, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return DVoRA params for inference, with row norms computed once: `output_scale` is `magnitude / ‖W + ΔW‖`.

    Pass the result to `apply` in place of `params`; a call then costs about as much as with VeRA. In each layer,
    `output_scale` replaces the magnitude, and `lambda_b` is multiplied by `output_scale`. Folded params can be summed
    (`add_adapters`, or `select_adapters` with ids of shape (rows, k)). Training folded params trains `output_scale`,
    not the magnitude. The model's own parameters, and layers without a magnitude, are returned unchanged.

    Args:
        apply: From `adapt`, `load_adapter` or `pool_adapters`.
        params: Params of one adapter, stacked params (n, ...), or the result of `select_adapters`.
        frozen: The projections, or the result of `keep_norm_statistics`.

    Raises:
        ValueError: If params do not fit the model, or contain no magnitude.

    Example:
        >>> import torch
        >>> from vera_func import VeraConfig, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["0"], use_dora=True))
        >>> folded = fold_magnitude(apply, params, frozen)
        >>> folded["0.output_scale"]
        tensor([1., 1., 1., 1., 1., 1.])
        >>> x = torch.ones(3, 8)
        >>> torch.equal(apply(folded, frozen, x), apply(params, frozen, x))
        True

    Reference:
        https://arxiv.org/abs/2402.09353
    """
    _check(apply, params=params, frozen=frozen)
    apply.bind(params, frozen)  # checks params and frozen
    names = [name for name in apply.targets if join_key(name, MAGNITUDE) in params]
    if not names:
        raise ValueError(
            f"params have no magnitude to fold, got keys such as {sorted(params)[:3]}: adapt with "
            "VeraConfig(use_dora=True)."
        )
    folded = dict(params)
    for name in names:
        layer = _layer(apply, name)
        statistics = {key: frozen[join_key(name, key)] for key in STATISTICS if join_key(name, key) in frozen}
        weight = params.get(join_key(name, "weight"))
        if weight is not None or not statistics:
            statistics = norm_statistics(layer.base_weight(params[join_key(name, "lambda_d")].dtype, weight), frozen)
        keys = [*VECTORS, MAGNITUDE, join_key(MAGNITUDE, BASE_SHARE)]
        vectors = {key: folded.pop(join_key(name, key)) for key in keys if join_key(name, key) in folded}
        new = fold_layer(vectors, {**frozen, **statistics}, differentiate_norm=layer.differentiate_norm)
        folded |= {join_key(name, key): value for key, value in new.items()}
    return folded


def fold_if_dora(apply: Apply, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return `fold_magnitude(apply, params, frozen)` if params contain magnitudes, and otherwise params unchanged.

    Folding saves time if several calls, or several rows of a batch, use the same adapter.

    Example:
        >>> import torch
        >>> from vera_func import VeraConfig, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> fold_if_dora(apply, params, frozen) is params
        True
    """
    return fold_magnitude(apply, params, frozen) if any(key in params for key in apply.schema.magnitudes) else params


def keep_norm_statistics(apply: Apply, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `frozen` with the `norm_statistics` of each DVoRA layer, for faster training.

    Pass the result to `apply` and `fold_magnitude` in place of `frozen`. The statistics have `out (r + 1) + r²` values
    per layer (1.3 MB in float32 for out = 1024 and r = 256). Statistics are valid only for the given projections and
    the model's own weights.

    Args:
        apply: An `Apply` from `load_adapter`, `pool_adapters`, or `adapt` with `use_dora=True`.
        frozen: The projections.

    Raises:
        ValueError: If the model has no DVoRA layers, or if a projection is missing or too small for a layer.

    Example:
        >>> import torch
        >>> from vera_func import VeraConfig, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["0"], use_dora=True))
        >>> sorted(keep_norm_statistics(apply, frozen))
        ['0.C', '0.G', '0.square_norm', 'vera_A', 'vera_B']
    """
    _check(apply, frozen=frozen)
    if not apply.schema.magnitudes:
        raise ValueError("the adapted layers have no magnitudes: adapt with VeraConfig(use_dora=True).")
    if missing := sorted({*PROJECTIONS} - frozen.keys()):
        raise ValueError(f"frozen lacks {missing}: pass the frozen that adapt or load_adapter returned.")
    kept = {name: frozen[name] for name in PROJECTIONS}
    for name in apply.targets:
        statistics = norm_statistics(_layer(apply, name).base_weight(frozen["vera_A"].dtype), frozen)
        kept |= {join_key(name, key): value for key, value in statistics.items()}
    return kept


def _check(apply: Apply, **given: Mapping[str, Tensor]) -> None:
    if not isinstance(apply, Apply):
        raise ValueError(f"apply must be an Apply, the first result of adapt, got {type(apply).__name__}.")
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a dict of tensors, got {type(value).__name__}.")


def _layer(apply: Apply, name: str) -> Any:
    return apply.trees.root.get_submodule(join_key("model", name))
