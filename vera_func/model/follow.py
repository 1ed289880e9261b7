"""Follow the rows of a batch through the operations of a running model.

A tensor that depends on the rows has a place: `Place(axis, inner)` means that index `i` of `axis` belongs to row
`(i // inner) % rows`. So `Place(0, 1)` is (rows, ...), `Place(1, 1)` is (seq, rows, ...), and (rows * seq, ...) is
`Place(0, seq)`. Views and permutations are followed exactly. Most other operations keep the order along the axes that
they keep, and there the axis is known again by its size, which is why models are followed with a prime number of
rows that is none of their sizes. What picks rows by an index or sorts them loses the order, and what puts picked rows
back restores it. The rules err on the side of losing it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..private import viewed_tensor


class Place(NamedTuple):
    """Index `i` of `axis` belongs to row `(i // inner) % rows`; `inner` is None where the order is not known yet."""

    axis: int
    inner: int | None


NOWHERE = Place(-1, 0)  # depends on rows and has no axis of them, as a mean over the batch
LOST = Place(-1, -1)  # has rows in an order that is not known
RAGGED = Place(-1, -2)  # has rows in order, but not equally many entries of each, as what a mask selects

_VIEWS = {"view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "unsqueeze_", "squeeze_"}
_FRESH = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "zero_", "fill_"}
_FRESH |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "bernoulli_", "normal_", "uniform_"}
_PICK = {"index", "index_select", "gather"}
_PUT = {"index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_", "index_copy", "index_copy_"}
_PUT |= {"index_fill", "index_fill_", "masked_scatter", "masked_scatter_", "scatter_reduce", "scatter_reduce_"}
_PUT |= {"scatter", "scatter_", "scatter_add", "scatter_add_"}
_SORT = {"sort", "argsort", "topk", "kthvalue", "flip", "roll"}
_DATA = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "randperm", "multinomial", "take"}
_BROADCAST = {"expand", "repeat", "cat", "stack", "broadcast_to"}


class Follower:
    """Tracks the rows through the operations of one run; see `private.watch_operations`.

    Args:
        rows: Number of rows, a prime that does not divide any other size.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, name: str, operation: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operation and mark its results with their places."""
        out = operation(*args, **kwargs)
        given = [*_tensors(args), *(_tensors(kwargs.values()) if kwargs else ())]
        depends = any(place_of(tensor) for tensor in given)
        for tensor in _tensors((out,)):
            if depends:
                mark(tensor, self._place(name, args, kwargs, tensor, given))
            elif (name in _DATA or name in _SORT) and type(tensor) is not Tensor:  # a constant without values
                place = self._place(name, args, kwargs, tensor, given)
                mark(tensor, place if place is LOST else None)
            elif place_of(tensor):
                mark(tensor, None)
        return out

    def _place(self, name: str, args: tuple, kwargs: dict[str, Any], out: Tensor, given: list[Tensor]) -> Place:
        """The place of the rows in `out`, one of the results."""
        if name in _DATA:
            return LOST
        if name in _FRESH:
            return self._by_size(out, given)
        if name == "copy_":
            given = [args[1]]
        first = place_of(args[0]) if args and isinstance(args[0], Tensor) else None
        if first is None and name in _SORT and self._axis(args[0].shape) is not None:
            first = Place(self._axis(args[0].shape) or 0, 1)
        if name in _PICK:
            return self._picked(name, args, out, first)
        if name in _PUT:
            place = self._put(name, args, out, first)
        elif any(place_of(tensor) in (LOST, RAGGED) and tensor.numel() != 1 for tensor in given):
            if first is RAGGED and name in _VIEWS and out.shape[:1] == (self.rows,):
                return Place(0, 1)  # the model says that it has equally many of each row
            ragged = all(place_of(tensor) is not LOST for tensor in given)
            place = RAGGED if ragged else LOST
        elif first is None or first.axis < 0:
            place = self._by_size(out, given, name in _BROADCAST)
        else:
            place = self._moved(name, args, kwargs, out, first) or self._by_size(out, given)
        if place is LOST and name.endswith("_") and (whole := viewed_tensor(args[0])) is not None:
            mark(whole, LOST)
        return place

    def _moved(self, name: str, args: tuple, kwargs: dict[str, Any], out: Tensor, place: Place) -> Place | None:
        """The place after an operation that is followed exactly, or None."""
        x, axis = args[0], place.axis
        dims = [_dim(arg, x) for arg in args[1:] if isinstance(arg, int)]
        if name in _VIEWS:
            return self._viewed(x, place, out.shape)
        if name == "permute":
            return Place([_dim(d, x) for d in args[1]].index(axis), place.inner)
        if name == "transpose":
            return Place({dims[0]: dims[1], dims[1]: dims[0]}.get(axis, axis), place.inner)
        if name in ("expand", "repeat"):
            return Place(axis + out.dim() - x.dim(), place.inner)
        if name in ("select", "unbind") and (dims or [0])[0] != axis:
            return Place(axis - ((dims or [0])[0] < axis), place.inner)
        if name in _SORT:
            default = 0 if name in ("flip", "roll") else -1
            chosen = {"topk": args[2:3], "kthvalue": args[2:3], "roll": args[2:3]}.get(name, args[1:2])
            over = chosen[0] if chosen else kwargs.get("dim", kwargs.get("dims", default))
            over = list(over) if isinstance(over, Sequence) else [over]
            return LOST if not over or axis in [_dim(d, x) for d in over] else None
        if name == "as_strided":
            same = out.dim() > axis and out.shape[axis] == x.shape[axis] and out.stride(axis) == x.stride(axis)
            return place if same else LOST
        if name in ("slice", "split", "split_with_sizes", "cat"):
            return self._cut(name, args, kwargs, out, place)
        return None

    def _cut(self, name: str, args: tuple, kwargs: dict[str, Any], out: Tensor, place: Place) -> Place | None:
        """The place in a part of the rows' axis, which is followed where the part holds whole turns of all rows."""
        x = args[0]
        at = args[1:2] if name == "slice" else args[2:3]
        if _dim(at[0] if at else kwargs.get("dim", 0), x) != place.axis or out.shape == x.shape:
            return None
        size = out.shape[place.axis]
        if size == 1:
            return NOWHERE
        if place.inner is None or size % (self.rows * place.inner):
            return LOST
        start = args[2] if name == "slice" and len(args) > 2 and args[2] is not None else 0
        step = args[4] if name == "slice" and len(args) > 4 else 1
        return place if step == 1 and start % (self.rows * place.inner) == 0 else LOST

    def _viewed(self, x: Tensor, place: Place, shape: torch.Size) -> Place:
        """The place after a view that keeps the order of all entries: entry `f` is of row `(f // stride) % rows`."""
        if place.inner is None or 0 in shape:
            axis = self._axis(shape)
            if axis is None:
                return LOST
            return Place(axis, 1 if shape[axis] == self.rows else None)
        stride = place.inner * math.prod(x.shape[place.axis + 1 :])
        below = 1
        for axis in reversed(range(len(shape))):
            if stride % below == 0 and shape[axis] and shape[axis] % (stride // below * self.rows) == 0:
                return Place(axis, stride // below)
            below *= shape[axis]
        return LOST

    def _by_size(self, out: Tensor, given: Iterable[Tensor], broadcast: bool = True) -> Place:
        """The place after an operation that keeps the order along the axes which it keeps."""
        placed = []
        for tensor in given:
            place, axis = place_of(tensor), self._axis(tensor.shape)
            if place is not None and place.axis >= 0:
                placed.append((tensor, place))
            elif place is None and axis is not None and tensor.shape[axis] == self.rows:
                placed.append((tensor, Place(axis, 1)))  # a constant
        same = [(t, p) for t, p in placed if t.dim() == out.dim() and t.shape[p.axis] == out.shape[p.axis]]
        axes = {place.axis for _, place in same}
        if not axes:
            sizes = {tensor.shape[place.axis] for tensor, place in placed}
            axes = {axis for axis, size in enumerate(out.shape) if size in sizes}
        if len(axes) != 1:
            axes = {axis for axis, size in enumerate(out.shape) if size and size % self.rows == 0}
            if not axes:
                return NOWHERE
            if len(axes) > 1 or not (placed or broadcast):
                return LOST
        (axis,) = axes
        if out.shape[axis] == self.rows:
            return Place(axis, 1)
        inner = {p.inner for t, p in placed if t.shape[p.axis] == out.shape[axis]} - {None}
        return Place(axis, inner.pop() if inner else None) if len(inner) < 2 else LOST

    def _picked(self, name: str, args: tuple, out: Tensor, place: Place | None) -> Place:
        """The place in entries of `args[0]` that were picked by an index."""
        x, indices = args[0], _indices(name, args)
        if place is LOST or place is RAGGED:
            restored = [index for axis, index in indices if axis == 0 and place_of(index)]
            return self._by_size(out, []) if restored and place is LOST else LOST
        if place is None or place.axis < 0:
            return self._by_size(out, [index for _, index in indices])
        along = [(axis, i) for axis, i in indices if axis <= place.axis < axis + (i.dim() if _is_mask(i) else 1)]
        if not along:
            return self._by_size(out, [x])
        axis, index = along[0]
        if _is_mask(index):
            return RAGGED if len(indices) == 1 and axis == place.axis and place.inner == 1 else LOST
        if place_of(index) or place.inner is None:
            return LOST
        return self._by_constant(index, place, x.shape[axis], out)

    def _by_constant(self, index: Tensor, place: Place, size: int, out: Tensor) -> Place:
        """The place after picking along the rows by an index that no input has part in, such as `arange(rows)`."""
        if index.numel() % self.rows:
            return NOWHERE if index.numel() == 1 else LOST
        inner = index.numel() // self.rows if size == self.rows else place.inner
        if index.numel() != max(index.shape, default=0) or inner is None:
            return LOST
        if type(index) is Tensor:  # it has values
            given = torch.arange(index.numel(), device=index.device) // inner % self.rows
            if not torch.equal(index.flatten() % size // (place.inner or 1) % self.rows, given):
                return LOST
        elif index.numel() != size:
            return LOST
        axis = self._axis(out.shape)
        return LOST if axis is None else Place(axis, inner if out.shape[axis] != self.rows else 1)

    def _put(self, name: str, args: tuple, out: Tensor, place: Place | None) -> Place:
        """The place in `args[0]` after something was put where an index says."""
        source = args[2] if name.startswith(("index_put", "_index_put", "masked")) else args[-1]
        source = source if isinstance(source, Tensor) else None
        if place is None or place.axis < 0:
            place = self._by_size(out, []) if place is not LOST else LOST
        if place.axis < 0 or source is None or place_of(source) in (None, NOWHERE, LOST, RAGGED):
            return place
        along = [i for axis, i in _indices(name, args) if axis == place.axis and not _is_mask(i)]
        return LOST if any(place_of(index) for index in along) else place

    def _axis(self, shape: Sequence[int]) -> int | None:
        """The axis whose size is a multiple of the number of rows, or None unless there is exactly one."""
        axes = [axis for axis, size in enumerate(shape) if size and size % self.rows == 0]
        return axes[0] if len(axes) == 1 else None


def place_of(tensor: Tensor) -> Place | None:
    """Where a tensor has its rows; None for one that no input has part in."""
    return getattr(tensor, "_place_of_rows", None)


def mark(tensor: Tensor, place: Place | None) -> None:
    """Say where a tensor has its rows."""
    tensor._place_of_rows = place  # type: ignore[attr-defined]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _dim(dim: int, x: Tensor) -> int:
    return dim % max(x.dim(), 1)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _indices(name: str, args: tuple) -> list[tuple[int, Tensor]]:
    """The indices of an operation, each with the first axis of `args[0]` that it applies to."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        found, axis = [], 0
        for index in args[1]:
            if index is not None:
                found.append((axis, index))
            axis += 1 if index is None or not _is_mask(index) else index.dim()
        return found
    if name.startswith("masked"):
        return [(0, args[1])]
    return [(_dim(args[1], args[0]), args[2])]
