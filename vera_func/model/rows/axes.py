"""Types and functions for calls and batch axes, shared by the files of this folder."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from ..checkout import Method


Axes: TypeAlias = int | Sequence[int | None] | Mapping[str, int | None] | None
ALONE = "Run one adapter at a time, or map over adapters and rows with torch.func.vmap."


class Callee(NamedTuple):
    """The module and method that a call runs.

    Attributes:
        path: Path of a module in the model.
        method: Name of a method of the module, or a function that takes the module as its first argument.
        shift: Index of the leading axis of params to track. `shift` is added to the batch axis of each argument.
    """

    path: str
    method: Method
    shift: int = 0


class Layout(NamedTuple):
    """The batch axis of a tensor.

    Attributes:
        axis: The batch axis.
        dim: Number of axes of the tensor; 0 if this number differs between calls of the layer.
        blocks: Whether each row has a block of several consecutive entries along the batch axis, rather than one entry.
    """

    axis: int
    dim: int
    blocks: bool


class Refusal(NamedTuple):
    """The reason why a layer can't have one adapter per row. `called` is False if no rehearsal called the layer."""

    reason: str
    called: bool = True


class Seen(NamedTuple):
    """The layouts that a rehearsal found: of each layer's input, keyed by layer path, and of the call's outputs."""

    layers: dict[str, Layout | Refusal]
    outputs: list[Layout | Refusal]


def has_rows(shape: Sequence[int], count: int, axis: int | None) -> bool:
    """Whether a tensor of this shape has size `count` along `axis`."""
    return axis is not None and -len(shape) <= axis < len(shape) and are_equal(shape[axis], count)


def are_equal(a: int, b: int) -> bool:
    """Compute `a == b` as a constant, even if sizes are symbolic under the compiler."""
    if a == b:  # noqa: SIM103  (the branch specializes the symbol)
        return True
    return False


def axis_of(axes: Axes, name: int | str, shift: int = 0) -> int | None:
    """Return the batch axis of an argument, given the argument's position or name."""
    if isinstance(axes, Mapping):
        axis = axes.get(name, 0) if isinstance(name, str) else 0
    elif isinstance(axes, Sequence):
        axis = axes[name] if isinstance(name, int) and name < len(axes) else 0
    else:
        axis = axes
    return None if axis is None else axis + shift


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
