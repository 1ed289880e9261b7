"""Any `nn.Module` to a pure `apply(params, frozen, *inputs)`, by adapted layers in a copy of its module tree.

    apply, params, frozen, config = adapt(model, VeraConfig(r=256, target_modules=["q_proj", "v_proj"]))
    apply(params, frozen, input_ids=ids)  ==  model(input_ids=ids)  +  what the adapter adds

The user's model is read, never called and never changed: `apply` runs a copy of its module tree that shares
the tensors, with every bitsandbytes layer replaced by the value it holds (so that transforms are safe also
where nothing is adapted), puts the given tensors into it, and leaves it as it was; see `checkout`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import private
from ..core.autograd import SharedProduct
from ..core.keys import MIXTURE, VECTORS, join_key, split_key
from ..private import graph_task, tree_leaves, unwrap
from ..quant.cpu_layout import fused_weight
from .base_layers import QuantizedLinear
from .checkout import Method, Trees, bound_method
from .layers import WITHOUT_CHECKPOINTING, Projections
from .rehearse import Axes
from .rows import Plans, arrange
from .tree import join_tensors, no_data_error, part_tensors


# What torch's messages name that refuse a model inside of a transform.
_REFUSED_BY_TRANSFORMS = ("Tensor.requires_grad_()", "saved tensor hooks")


class Slot(NamedTuple):
    """Where a key of `params` goes in the module tree, and what may be put there."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: bool
    required: bool


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Apply:
    """A model as a pure function of an adapter: `apply(params, frozen, *args, **kwargs)`.

    Returns what `model(*args, **kwargs)` returns. It composes with the transforms of `torch.func` as far as
    the model's own operations do. Equal arguments give equal bits, whatever was called before, on other threads or
    inside of the call, and no call leaves a trace: what the model writes to itself (batch statistics) is undone.
    Dropout of the adapter happens only through `with_dropout`, and whether the base is in training mode was settled
    when `adapt` was called. The base's own dropout draws from torch's global generator.

    Raises:
        ValueError: If `params` lacks a key, has an unknown one, or a value has the wrong shape; if rows of
            stacked vectors do not match the batch; if `frozen` is of another rank or too narrow; if the model
            checkpoints activations, and a gradient is asked for.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> adapted.apply(adapted.params, adapted.frozen, torch.ones(3, 8)).shape
        torch.Size([3, 6])
    """

    model: nn.Module
    targets: tuple[str, ...]
    slots: Mapping[str, Slot]
    trees: Trees
    int8_activations: bool = False
    generator: torch.Generator | None = None
    row_axes: Axes = 0
    plans: Plans = dataclasses.field(default_factory=Plans)
    # Second names of tied parameters, to the first; given beside it, such a name is a value of its own.
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    offloaded: frozenset[str] = frozenset()  # parameters that accelerate's hooks put in their places
    absent: str | None = None  # a parameter on the meta device that no hook brings back

    def __call__(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return self.method("__call__", params, frozen, *args, **kwargs)

    def generate(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """`model.generate(*args, **kwargs)` with the adapter, or with one adapter for each row of the batch.

        transformers repeats rows for beam search and `num_return_sequences`; the adapters are repeated with them.
        """
        return self.method("generate", params, frozen, *args, **kwargs)

    def method(
        self, name: Method, /, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """Any method of the model with the adapter: `apply.method("generate", params, frozen, ...)`.

        In place of a name, a function may be given: it is called as `function(model, *args, **kwargs)`, and must return
        tensors, not parts of the model.
        """
        if self.absent is not None:
            self._require_shapes_alone(params, frozen, args, kwargs)
        tensors, lead = self._bind(params, frozen)
        if torch.compiler.is_compiling():
            return self._traced(tensors, lead, name, args, kwargs)
        if self.trees.checkpoints:
            _require_no_gradients(tensors, args, kwargs)
        shared: dict[str, Any] = {
            "projections.product": SharedProduct(),
            "projections.generator": self.generator,
            "projections.call": graph_task(),
        }
        tree = self.trees.take()
        try:
            if lead:
                shared["projections.rows"] = arrange(self, tree.root, tensors, lead, name, args, kwargs)
            tree.bind(tensors | shared)
            return tree.run(name, args, kwargs)
        except RuntimeError as error:
            if any(sign in str(error) for sign in _REFUSED_BY_TRANSFORMS):
                raise ValueError(
                    "the model does with gradients what torch.func's transforms refuse, as activation checkpointing "
                    f"does: {error} {WITHOUT_CHECKPOINTING}"
                ) from error
            raise
        finally:
            self.trees.give(tree)

    def with_dropout(self, generator: torch.Generator) -> "Apply":
        """The same function with `config.vera_dropout` applied to the inputs of `A`, drawn from `generator`.

        Under `torch.func.vmap(..., randomness="different")` every adapter draws its own.
        """
        if not isinstance(generator, torch.Generator):
            raise ValueError(
                f"with_dropout needs a torch.Generator, got {type(generator).__name__}; there is no default."
            )
        return dataclasses.replace(self, generator=generator)

    def with_row_axes(self, axes: Axes) -> "Apply":
        """The same function for inputs whose rows are not along axis 0, such as (seq, rows, features).

        Only an adapter for each row needs to know. Inputs that have another size along their axis are shared by all
        rows.

        Args:
            axes: Axis of the rows in every argument, None for one that all rows share: one value for all, a sequence
                for the positional arguments, or a mapping for keyword arguments; what it does not name is 0.

        Raises:
            ValueError: If `axes` is none of these.

        Example:
            >>> from vera_func import VeraConfig, adapt, stack_adapters
            >>> apply, params, frozen, _ = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
            >>> apply.with_row_axes(1)(stack_adapters([params] * 3), frozen, torch.ones(5, 3, 8)).shape
            torch.Size([5, 3, 6])
        """
        if not (axes is None or isinstance(axes, int | Sequence | Mapping)) or isinstance(axes, str):
            raise ValueError(f"axes must be an axis, None, or a sequence or mapping of these, got {axes!r}.")
        return dataclasses.replace(self, row_axes=axes, plans=Plans())

    def with_fused_weights(self) -> "Apply":
        """The same function with a second copy of its 4-bit weights, for decoding in bfloat16 on a CPU.

        bitsandbytes has a kernel for CPUs with AVX512-BF16 that needs another layout. Where gradients are disabled it
        multiplies up to 32 rows without dequantizing; see `quantized.fused_weight` for what that costs. On other
        machines nothing is copied.
        """
        root = self.trees.copy()
        for module in root.modules():
            if isinstance(module, QuantizedLinear):
                module.fused = fused_weight(module.quantized)
        return dataclasses.replace(self, trees=Trees(root))

    def __repr__(self) -> str:
        return f"Apply({type(self.model).__name__}, {len(self.targets)} adapted layers)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trees": join_tensors(self.trees.root, self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, trees=Trees(part_tensors(state["trees"])))

    def _bind(
        self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """The tensors to put into a tree, by their full names, and the rows of each key that has some."""
        slots = self.slots
        missing = [key for key, slot in slots.items() if slot.required and key not in params]
        unknown = [key for key in params if key not in slots]
        unknown += [key for key, first in self.tied.items() if key in params and first not in params]
        if missing or unknown:
            if unknown and unknown[0] in self.offloaded:
                raise ValueError(no_data_error(unknown[0], "override a parameter of"))
            raise ValueError(_key_error(missing, unknown, slots))
        if frozen.keys() != {"vera_A", "vera_B"}:
            raise ValueError(f"frozen must have the keys 'vera_A' and 'vera_B', got {sorted(frozen)}.")
        tensors: dict[str, Tensor] = {}
        lead: dict[str, tuple[int, ...]] = {}
        shares = []
        for key, value in params.items():
            names, shape, rows, _ = slots[key]
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} must be a tensor, got {type(value).__name__}.")
            if value.shape != shape:
                if not (rows and value.shape[value.dim() - len(shape) :] == shape):
                    expected = f"(*rows, {', '.join(map(str, shape))})" if rows else str(shape)
                    raise ValueError(f"{key!r} must be {expected}, got {tuple(value.shape)}.")
                module, leaf = split_key(key)
                terms = leaf in (*VECTORS, MIXTURE) and join_key(module, MIXTURE) in params  # theirs is the last axis
                if batch := tuple(value.shape[: value.dim() - len(shape) - terms]):
                    lead[key] = batch
            tensors.update(dict.fromkeys(names, value))
            if not names:
                shares.append(key)
        for key in shares:
            self._add_base(key, params, tensors, lead)
        for key in self.tied:
            if key in params:
                tensors[slots[key].names[0]] = params[key]
        for key, value in frozen.items():
            tensors[f"projections.{key}"] = value
        return tensors, lead

    def _add_base(
        self, key: str, params: Mapping[str, Tensor], tensors: dict[str, Tensor], lead: dict[str, tuple[int, ...]]
    ) -> None:
        """Add the base's own value of a parameter, times the share of it that `select_adapters` has noted."""
        name = split_key(key)[0]
        places, shape, _, _ = self.slots[name]
        share = params[key][(..., *[None] * len(shape))]
        base = self.trees.root.get_parameter(places[0])
        value = params[name] + share.to(params[name].dtype) * base.to(params[name].dtype)
        tensors.update(dict.fromkeys(places, value))
        if key in lead:
            lead.setdefault(name, lead[key])

    def _require_shapes_alone(self, *inputs: Any) -> None:
        if not all(leaf.is_meta for leaf in private.tree_leaves(inputs) if isinstance(leaf, Tensor)):
            raise ValueError(no_data_error(str(self.absent), "run"))

    def _traced(
        self,
        tensors: dict[str, Tensor],
        lead: dict[str, tuple[int, ...]],
        name: Method,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        # Dynamo can't follow a free list. It binds nothing to the tree that it traces, and sees by itself what products
        # have in common.
        root: Any = self.trees.root
        shared = root.projections
        outer = shared.generator, shared.rows, shared.traced
        values: dict[str, Any] = self.trees.values(inside=shared.traced)
        try:
            shared.generator, shared.traced = self.generator, True
            shared.rows = arrange(self, root, tensors, lead, name, args, kwargs) if lead else {}
            return functional_call(root, values | tensors, (name, args, kwargs), tie_weights=False)
        finally:
            shared.generator, shared.rows, shared.traced = outer


class Root(nn.Module):
    def __init__(self, model: nn.Module, projections: Projections) -> None:
        super().__init__()
        self.model = model
        self.projections = projections

    def forward(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        return bound_method(self.model, method)(*args, **kwargs)


def _require_no_gradients(tensors: Mapping[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> None:
    given = (value for value in [*tensors.values(), *tree_leaves((args, kwargs))] if isinstance(value, Tensor))
    if torch.is_grad_enabled() and any(value.requires_grad or unwrap(value) is not value for value in given):
        raise ValueError(
            "the model checkpoints activations: its layers would run again in backward, when the call of apply has "
            f"ended and its params are gone. {WITHOUT_CHECKPOINTING}"
        )


def _key_error(missing: list[str], unknown: list[str], slots: Mapping[str, Slot]) -> str:
    required = [key for key, slot in slots.items() if slot.required]
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} of its {len(required)} keys, first {missing[0]!r}")
    if unknown:
        problems.append(f"has {len(unknown)} unknown keys, first {unknown[0]!r}")
    return (
        f"params {', and '.join(problems)}. It must have the keys that adapt returned "
        f"({required[0]!r}, ...); names of the model's own parameters may be added."
    )
