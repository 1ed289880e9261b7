"""The keys that `params` may have: where each key is bound in the module tree, and which values are valid."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.keys import MIXTURE, PROJECTIONS, STATISTICS, VECTORS, join_key, split_key
from .tree import no_data_error


class Slot(NamedTuple):
    """The names in the module tree to which a key of `params` is bound, and the valid shapes of its value.

    Attributes:
        names: Full names of the tensors in the module tree. A tied parameter has several names.
        shape: Shape of the value for a single adapter.
        rows: Whether the value may have additional leading axes, with one value for each row of the batch.
        required: Whether `params` must contain the key.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: bool
    required: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Schema:
    """The keys that params may have.

    Attributes:
        slots: The slot of each key.
        tied: Maps each further name of a tied parameter to the parameter's first name. If params contain both names,
            the tensors are untied.
        offloaded: Names of parameters that accelerate's hooks load.
        magnitudes: Maps the key of each magnitude to the key of the same layer's output scale; params contain exactly
            one of the two keys.
    """

    slots: Mapping[str, Slot]
    tied: Mapping[str, str]
    offloaded: frozenset[str]
    magnitudes: Mapping[str, str]

    def missing(self, params: Mapping[str, Tensor]) -> list[str]:
        """Return the required keys that params lack. Each DVoRA layer requires a magnitude or an output scale.

        Raises:
            ValueError: If params contain both the magnitude and the output scale of a layer.
        """
        for magnitude, scale in self.magnitudes.items():
            if magnitude in params and scale in params:
                raise ValueError(f"params has {magnitude!r} and its folded form {scale!r}: pass only one of the two.")
        keys = [key for key, slot in self.slots.items() if slot.required and key not in params]
        return keys + [key for key, scale in self.magnitudes.items() if key not in params and scale not in params]

    def bind(
        self,
        params: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        root: nn.Module,
        product_dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """Return {full name in the module tree: tensor to bind} and {key of `params`: leading batch axes}.

        Args:
            params: The params of one adapter, or of one adapter for each row.
            frozen: The projections, and perhaps norm statistics.
            root: The root of the module tree, from which the base model's values are read.
            product_dtype: Dtype to which the projections are converted, once for all layers; None keeps their dtype.

        Raises:
            ValueError: If a key is missing or unknown, or if a value is not a tensor or has a wrong shape.
        """
        self._require_keys(params, frozen)
        tensors: dict[str, Tensor] = {}
        lead: dict[str, tuple[int, ...]] = {}
        shares = []
        for key, value in params.items():
            names, shape, _, _ = slot = self.slots[key]
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} must be a tensor, got {type(value).__name__}.")
            if value.shape != shape and (rows := _leading_axes(key, value, slot, params)):
                lead[key] = rows
            tensors.update(dict.fromkeys(names, value))
            if not names:
                shares.append(key)
        for key in shares:
            self._add_base(key, params, root, tensors, lead)
        for key in self.tied:
            if key in params:
                tensors[self.slots[key].names[0]] = params[key]
        for key, value in frozen.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} must be a tensor, got {type(value).__name__}.")
            if key in PROJECTIONS:
                tensors[f"projections.{key}"] = value if product_dtype is None else value.to(product_dtype)
            else:
                tensors[join_key("model", key)] = value
        return tensors, lead

    def _require_keys(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> None:
        missing = self.missing(params)
        unknown = [key for key in params if key not in self.slots]
        unknown += [key for key, first in self.tied.items() if key in params and first not in params]
        if missing or unknown:
            if unknown and unknown[0] in self.offloaded:
                raise ValueError(no_data_error(unknown[0], "override a parameter of"))
            raise ValueError(_key_error(missing, unknown, self.slots))
        if frozen.keys() == {*PROJECTIONS}:
            return
        statistics = {join_key(split_key(key)[0], name) for key in self.magnitudes for name in STATISTICS}
        if frozen.keys() - statistics != {*PROJECTIONS}:
            raise ValueError(f"frozen must have the keys 'vera_A' and 'vera_B', got {sorted(frozen)}.")

    def _add_base(
        self,
        key: str,
        params: Mapping[str, Tensor],
        root: nn.Module,
        tensors: dict[str, Tensor],
        lead: dict[str, tuple[int, ...]],
    ) -> None:
        """Add the base model's value times the base share (see `select_adapters`) to a parameter in `tensors`."""
        name = split_key(key)[0]
        places, shape, _, _ = self.slots[name]
        share = params[key][(..., *[None] * len(shape))]
        base = root.get_parameter(places[0])
        value = params[name] + share.to(params[name].dtype) * base.to(params[name].dtype)
        tensors.update(dict.fromkeys(places, value))
        if key in lead:
            lead.setdefault(name, lead[key])


def _leading_axes(key: str, value: Tensor, slot: Slot, params: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the leading batch axes of a value; raise an error if the value does not have the shape of its slot."""
    shape = slot.shape
    axes = value.dim() - len(shape)
    if not (slot.rows and value.shape[axes:] == shape):
        expected = f"(*rows, {', '.join(map(str, shape))})" if slot.rows else str(shape)
        raise ValueError(f"{key!r} must have shape {expected}, got {tuple(value.shape)}.")
    module, leaf = split_key(key)
    # In a weighted sum of adapters, the last leading axis indexes the summed adapters.
    terms = leaf in (*VECTORS, MIXTURE) and join_key(module, MIXTURE) in params
    return tuple(value.shape[: axes - terms])


def _key_error(missing: list[str], unknown: list[str], slots: Mapping[str, Slot]) -> str:
    required = [key for key, slot in slots.items() if slot.required]
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} of its {len(required)} keys, first {missing[0]!r}")
    if unknown:
        problems.append(f"has {len(unknown)} unknown keys, first {unknown[0]!r}")
    return (
        f"params {', and '.join(problems)}. It must have the keys of the params that adapt returned "
        f"({required[0]!r}, ...), and may also have names of parameters of the model, to replace their values."
    )
