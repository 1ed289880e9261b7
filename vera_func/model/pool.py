"""Combine adapters of different ranks, targets and projections into one stack."""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.keys import BASE_SHARE, MAGNITUDE, OUTPUT_SCALE, SCALES, VECTORS, join_key, own_parameters, split_key
from .adapt import Adapted
from .batch import Params, stack_adapters
from .build import make_apply
from .config import VeraConfig
from .targets import exact_targets
from .tree import held_parameters


def pool_adapters(adapters: Sequence[Adapted]) -> Adapted:
    """Combine adapters of different ranks, targets, seeds and projections into one VeRA with stacked params (n, ...).

    Pooling is exact: each adapter computes the same function in the pool as alone. Each `vera_A` is zero-padded to the
    largest `in`, and each `vera_B` to the largest `out`. The padded projections are concatenated along r:
    `A = [A1; A2; ...]`, `B = [B1, B2, ...]`. Each adapter's `lambda_d` is zero outside of its own block. Equal
    projections are stored once. Each row of a batch costs as much as with a single adapter of the pool's rank.
    `with_dropout` applies dropout only if all adapters have the same dropout probability.

    VeRA and DVoRA adapters can be pooled with each other. For an adapter without a magnitude in a layer, the pooled
    params contain magnitude 0 and `"{module}.magnitude.base_share"` 1. Magnitude 0 and base share 1 give the base
    model's output scale of 1. Params with a `base_share` can't be saved.

    Args:
        adapters: Results of `adapt` or `load_adapter` for the same model object, each with a single adapter.

    Returns:
        An `Adapted` over all targets. The returned config is valid for each adapter of the stack, and can be saved with
        that adapter.

    Raises:
        ValueError: If `adapters` is empty, if the adapters belong to different models, if params are stacked, or if
            `fold_magnitude` was applied to only some of the DVoRA adapters.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> a = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> b = adapt(model, VeraConfig(r=8, target_modules=["1"], projection_prng_key=1))
        >>> pool = pool_adapters([a, b])
        >>> pool.config.r, pool.params["1.lambda_d"].shape
        (12, torch.Size([2, 12]))
    """
    _require_poolable(adapters)
    model = adapters[0].apply.model
    frozen, offsets = _stack_projections([adapted.frozen for adapted in adapters])
    order = [name for name, _ in model.named_modules()]
    targets = sorted({name for a in adapters for name in a.apply.targets}, key=order.index)
    own = {name for a in adapters for name in own_parameters(a.params)}
    trained = [name for name, _ in held_parameters(model) if name in own]
    scale, differentiate = _common_scale(adapters)
    rates = {a.config.vera_dropout for a in adapters}
    config = VeraConfig(
        r=frozen["vera_A"].shape[0],
        target_modules=exact_targets(model, targets, VeraConfig()),
        vera_dropout=rates.pop() if len(rates) == 1 else 0.0,
        use_dora=scale is not None,
        differentiate_norm=differentiate,
        **_common_origin(adapters),
    )
    apply = make_apply(
        model,
        config,
        targets,
        trained,
        int8_activations=adapters[0].apply.int8_activations,
        product_dtype=adapters[0].apply.product_dtype,
    )
    # The projections may have fewer bits than the vectors (`product_dtype`).
    dtypes = {value.dtype for a in adapters for key, value in a.params.items() if split_key(key)[1] in VECTORS}
    zeros = partial(frozen["vera_A"].new_zeros, dtype=reduce(torch.promote_types, dtypes))
    rows = []
    for adapted, offset in zip(adapters, offsets, strict=True):
        row = {
            key: _padded(adapted.params.get(key), zeros(apply.slots[key].shape), before)
            for name in targets
            for key, before in ((join_key(name, "lambda_b"), 0), (join_key(name, "lambda_d"), offset))
        }
        row |= _scales(adapted.params, row, targets, scale)
        for name in trained:
            row[name] = adapted.params.get(name, model.get_parameter(name).detach())
        rows.append(row)
    stacked = stack_adapters(rows)
    idle = {key for key, leaf in stacked.items() if split_key(key)[1] == BASE_SHARE and not leaf.any()}
    return Adapted(apply, {key: leaf for key, leaf in stacked.items() if key not in idle}, frozen, config)


def _require_poolable(adapters: Sequence[Adapted]) -> None:
    if not adapters:
        raise ValueError("adapters is empty, so there is nothing to pool: pass at least one Adapted.")
    if not all(isinstance(adapted, Adapted) for adapted in adapters):
        given = sorted({type(adapted).__name__ for adapted in adapters})
        raise ValueError(f"adapters must be a sequence of Adapted (from adapt or load_adapter), but has {given}.")
    first = adapters[0].apply
    weights = [*map(id, first.model.parameters())]
    for i, (apply, params, frozen, _) in enumerate(adapters):
        if [*map(id, apply.model.parameters())] != weights:
            raise ValueError(
                f"adapters {i} and 0 belong to different model objects: pass the same model object to adapt or "
                "load_adapter for all adapters."
            )
        for option in ("int8_activations", "product_dtype"):
            if getattr(apply, option) != getattr(first, option):
                raise ValueError(
                    f"adapter {i} and adapter 0 differ in {option}: pass the same {option} to adapt or load_adapter."
                )
        apply.bind(params, frozen)  # checks both
        for key, value in params.items():
            if value.shape != apply.slots[key].shape:
                raise ValueError(
                    f"{key!r} of adapter {i} is stacked; pool single adapters, with params from unstack_adapters."
                )


def _padded(vector: Tensor | None, zeros: Tensor, before: int) -> Tensor:
    """Return `zeros` with the vector, if given, written at index `before`."""
    return zeros if vector is None else pad(vector.to(zeros), (before, len(zeros) - before - len(vector)))


def _common_origin(adapters: Sequence[Adapted]) -> dict[str, Any]:
    """Return the configuration fields that identify the base model. A field is None if the adapters disagree."""
    origin = {}
    for field in ("base_model_name_or_path", "revision", "auto_mapping"):
        values = [getattr(adapted.config, field) for adapted in adapters]
        origin[field] = values[0] if all(value == values[0] for value in values) else None
    return origin


def _common_scale(adapters: Sequence[Adapted]) -> tuple[str | None, bool]:
    """Return the name of the adapters' scales ("magnitude", "output_scale" or None), and their `differentiate_norm`."""
    leaves = {leaf for adapted in adapters for key in adapted.params if (leaf := split_key(key)[1]) in SCALES}
    if len(leaves) > 1:
        raise ValueError(
            "some adapters have magnitudes, and others output scales from fold_magnitude: fold all adapters, or none."
        )
    differentiate = {adapted.config.differentiate_norm for adapted in adapters if adapted.config.use_dora}
    if len(differentiate) > 1:
        raise ValueError("the adapters differ in config.differentiate_norm.")
    return next(iter(leaves), None), differentiate == {True}


def _scales(params: Params, row: Params, targets: Sequence[str], scale: str | None) -> dict[str, Tensor]:
    """Return the magnitudes or output scales of one adapter of a pool. The scale of a VeRA layer is 1."""
    scales: dict[str, Tensor] = {}
    for name in targets if scale else ():
        key = join_key(name, scale or "")
        given = params.get(key)
        vector = row[join_key(name, "lambda_b")]
        like = torch.zeros_like(vector, dtype=torch.promote_types(vector.dtype, torch.float32))
        if scale == OUTPUT_SCALE:
            scales[key] = like + 1 if given is None else given.to(like.device)
        else:
            scales[key] = like if given is None else given.to(like.device)
            scales[join_key(name, MAGNITUDE, BASE_SHARE)] = like.new_tensor(given is None)
    return scales


def _stack_projections(pairs: Sequence[Params]) -> tuple[dict[str, Tensor], list[int]]:
    """Concatenate the distinct pairs of projections along r. Also return the offset along r of each given pair."""
    unique: list[Params] = []
    places = []
    for pair in pairs:
        found = next((i for i, other in enumerate(unique) if _same(pair, other)), None)
        if found is None:
            unique.append(pair)
        places.append(len(unique) - 1 if found is None else found)
    in_features = max(pair["vera_A"].shape[1] for pair in unique)
    out_features = max(pair["vera_B"].shape[0] for pair in unique)
    frozen = {
        "vera_A": torch.cat([pad(p["vera_A"], (0, in_features - p["vera_A"].shape[1])) for p in unique]),
        "vera_B": torch.cat([pad(p["vera_B"], (0, 0, 0, out_features - p["vera_B"].shape[0])) for p in unique], 1),
    }
    ranks = [0, *(pair["vera_A"].shape[0] for pair in unique)]
    starts = [sum(ranks[: i + 1]) for i in range(len(unique))]
    return frozen, [starts[place] for place in places]


def _same(a: Params, b: Params) -> bool:
    return all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)
