"""Track the rows of a batch through the operations of a running model.

Each tensor that depends on the rows is marked with a `Place`. `Place(axis, inner)` means that index `i` of `axis`
belongs to row `(i // inner) % rows`. For example, a tensor (rows, ...) has `Place(0, 1)`, a tensor (seq, rows, ...) has
`Place(1, 1)`, and a tensor (rows * seq, ...) has `Place(0, seq)`. The `Place` after views and permutations is exact.
Most other operations do not change the order of entries along an axis. The batch axis of the output of such an
operation is identified by its size. Therefore the number of rows is a prime that does not divide any size of the model.
If rows are sorted, or selected by an index that depends on data, the order of the rows is lost, and the result is
marked as `Lost`. The order is restored if the rows are written back at the same index (as in mixtures of experts), or
if the rows are selected by the inverse permutation. If the rules can't determine the order with certainty, the order
counts as lost.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...private import viewed_tensor


class Place(NamedTuple):
    """Index `i` of `axis` belongs to row `(i // inner) % rows`; `inner` is None if the order is still unknown."""

    axis: int
    inner: int | None


NOWHERE = Place(-1, 0)  # the tensor depends on the rows but has no axis of rows, such as a mean


class Lost(NamedTuple):
    """A mark on a tensor whose rows are in an unknown order.

    Attributes:
        by: The index that selected the rows, or None if unknown.
        by_mask: Whether the index `by` was a mask. A mask keeps the order of the rows, but may select more entries from
            one row than from another.
    """

    by: Tensor | None
    by_mask: bool = False


_NO_PART = (None, 0, 0, NOWHERE)
_VIEWS = {"view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "unsqueeze_", "squeeze_"}
_FRESH = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "zero_", "fill_"}
_FRESH |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "bernoulli_", "normal_", "uniform_"}
_PICK = {"index", "index_select", "gather"}
_PUT = {"index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_", "index_copy", "index_copy_"}
_PUT |= {"index_fill", "index_fill_", "masked_scatter", "masked_scatter_", "scatter_reduce", "scatter_reduce_"}
_PUT |= {"scatter", "scatter_", "scatter_add", "scatter_add_"}
_SORT = {"sort", "argsort", "topk", "kthvalue", "flip", "roll"}
_DATA = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "randperm", "multinomial", "take"}
_COUNTS = {"histc", "bincount"}
_SAME_INDEX = {"_to_copy", "alias", "detach", "clone", "unsqueeze", "view", "expand", "floor_divide", "div"}
_BROADCAST = {"expand", "repeat", "cat", "stack", "broadcast_to"}


class Follower:
    """Tracks the rows of a batch through one run of a model; see `private.watch_operations`.

    Args:
        rows: Number of rows of the batch: a prime that does not divide any other size.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.chose = False  # whether an operation selected a number of entries that depends on data

    def __call__(self, name: str, operation: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operation, and mark each output with its `Place` or as `Lost`."""
        out = operation(*args, **kwargs)
        given = [*_tensors(args), *(_tensors(kwargs.values()) if kwargs else ())]
        depends = any(place_of(tensor) for tensor in given)
        for tensor in _tensors((out,)):
            if depends:
                mark(tensor, self._place(name, args, kwargs, tensor, given))
            elif (name in _DATA or name in _SORT) and not _has_values(tensor):
                place = self._place(name, args, kwargs, tensor, given)
                mark(tensor, place if isinstance(place, Lost) else None)
            elif place_of(tensor):
                mark(tensor, None)
        if depends:
            if name in ("split", "split_with_sizes", "unbind"):
                _mark_parts(name, args, kwargs, out)
            _mark_index(name, args, kwargs, out)
            self.chose |= name in _DATA or (name == "index" and any(_is_mask(i) for _, i in _indices(name, args)))
        return out

    def _place(self, name: str, args: tuple, kwargs: dict[str, Any], out: Tensor, given: list[Tensor]) -> Place | Lost:
        """Return the `Place` of the rows in `out`, one of the outputs of an operation."""
        if name in _DATA:
            return Lost(None)
        if name in _COUNTS:
            return NOWHERE
        if name in _FRESH:
            return self._by_size(out, given, new=True)
        if name == "copy_":
            given = [args[1]]
        if name == "cat" and (joined := _reassembled(args, kwargs)) is not None:
            return joined
        first = place_of(args[0]) if args and isinstance(args[0], Tensor) else None
        if first is None and name in _SORT and self._axis(args[0].shape) is not None:
            first = Place(self._axis(args[0].shape) or 0, 1)
        if name in _PICK:
            return self._picked(name, args, out, first)
        lost = [place for x in given if isinstance(place := place_of(x), Lost) and x.numel() != 1]
        if name in _PUT:
            place = self._put(name, args, out, first)
        elif lost:
            if isinstance(first, Lost) and first.by_mask and name in _VIEWS and out.shape[:1] == (self.rows,):
                return Place(0, 1)  # only possible if each row has equally many entries
            place = lost[0] if all(other.by is lost[0].by for other in lost) else Lost(None)
        elif not isinstance(first, Place) or first.axis < 0:
            place = self._joined(args, kwargs, out, given) if name == "cat" else None
            place = place or self._by_size(out, given, broadcast=name in _BROADCAST)
        else:
            place = self._moved(name, args, kwargs, out, first) or self._by_size(out, given)
        if isinstance(place, Lost) and name.endswith("_") and (whole := viewed_tensor(args[0])) is not None:
            mark(whole, place)
        return place

    def _moved(self, name: str, args: tuple, kwargs: dict[str, Any], out: Tensor, place: Place) -> Place | Lost | None:
        """Return the `Place` after an operation with an exact rule, or None for any other operation."""
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
            return Lost(None) if not over or axis in [_dim(d, x) for d in over] else None
        if name == "as_strided":
            same = out.dim() > axis and out.shape[axis] == x.shape[axis] and out.stride(axis) == x.stride(axis)
            return place if same else Lost(None)
        if name in ("slice", "split", "split_with_sizes"):
            return self._cut(name, args, kwargs, out, place)
        if name == "unfold" and dims[0] == axis:
            return Lost(None)  # each window contains several rows
        return None

    def _joined(self, args: tuple, kwargs: dict[str, Any], out: Tensor, given: list[Tensor]) -> Place | Lost | None:
        """Return the `Place` after concatenation along the batch axis, or `Lost` if a tensor lacks a row."""
        dim = _dim(args[1] if len(args) > 1 else kwargs.get("dim", 0), out)
        places = [place for x in given if isinstance(place := place_of(x), Place) and place.axis == dim]
        if not places:
            return None
        inner = places[0].inner or 0
        whole = all(place_of(x) == places[0] and x.shape[dim] % (self.rows * max(inner, 1)) == 0 for x in given)
        return places[0] if inner and whole else Lost(None)

    def _cut(self, name: str, args: tuple, kwargs: dict[str, Any], out: Tensor, place: Place) -> Place | Lost | None:
        """Return the `Place` after slicing the batch axis, or `Lost` if the slice may reorder or omit rows."""
        x = args[0]
        at = args[1:2] if name == "slice" else args[2:3]
        if _dim(at[0] if at else kwargs.get("dim", 0), x) != place.axis or out.shape == x.shape:
            return None
        size = out.shape[place.axis]
        if size == 1:
            return NOWHERE
        if place.inner is None or size % (self.rows * place.inner):
            return Lost(None)
        start = args[2] if name == "slice" and len(args) > 2 and args[2] is not None else 0
        step = args[4] if name == "slice" and len(args) > 4 else 1
        return place if step == 1 and start % (self.rows * place.inner) == 0 else Lost(None)

    def _viewed(self, x: Tensor, place: Place, shape: torch.Size) -> Place | Lost:
        """Return the `Place` after a view, which keeps flat indices: index `f` is in row `(f // stride) % rows`."""
        if place.inner is None or 0 in shape:
            axis = self._axis(shape)
            if axis is None:
                return Lost(None)
            return Place(axis, 1 if shape[axis] == self.rows else None)
        stride = place.inner * math.prod(x.shape[place.axis + 1 :])
        below = 1
        for axis in reversed(range(len(shape))):
            if stride % below == 0 and shape[axis] and shape[axis] % (stride // below * self.rows) == 0:
                return Place(axis, stride // below)
            below *= shape[axis]
        return Lost(None)

    def _by_size(
        self, out: Tensor, given: Iterable[Tensor], *, broadcast: bool = True, new: bool = False
    ) -> Place | Lost:
        """Return the `Place` in `out` after an operation that does not change the order of entries along an axis.

        `given` are the input tensors. With `broadcast`, the operation may broadcast a tensor without rows to all rows.
        With `new`, the operation creates or reorders rows, so that their order is still unknown.
        """
        placed = []
        for tensor in given:
            place, axis = place_of(tensor), self._axis(tensor.shape)
            if isinstance(place, Place) and place.axis >= 0:
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
                return Lost(None)
        (axis,) = axes
        if out.shape[axis] == self.rows:
            return Place(axis, 1)
        inner = {p.inner for t, p in placed if t.shape[p.axis] == out.shape[axis]}
        if not inner and not new:  # rows were appended to rows
            return Lost(None)
        inner -= {None}
        return Place(axis, inner.pop() if inner else None) if len(inner) < 2 else Lost(None)

    def _picked(self, name: str, args: tuple, out: Tensor, place: Place | Lost | None) -> Place | Lost:
        """Return the `Place` after selecting entries of `args[0]` by an index."""
        x, indices = args[0], _indices(name, args)
        if isinstance(place, Lost):
            back = len(indices) == 1 and place.by is not None and _inverse_of(indices[0][1]) is place.by
            return self._by_size(out, [], new=True) if back else Lost(None)
        if place is None or place.axis < 0:
            lost = [order for _, index in indices if isinstance(order := place_of(index), Lost)]
            return lost[0] if lost else self._by_size(out, [index for _, index in indices])
        along = [(axis, i) for axis, i in indices if axis <= place.axis < axis + (i.dim() if _is_mask(i) else 1)]
        if not along:
            return self._by_size(out, [x])
        axis, index = along[0]
        if _is_mask(index):
            in_order = len(indices) == 1 and axis == place.axis and place.inner == 1
            return Lost(_root(index), by_mask=in_order)
        if place_of(index) or place.inner is None:
            return Lost(_root(index))
        return self._by_constant(index, place, x.shape[axis], out)

    def _by_constant(self, index: Tensor, place: Place, size: int, out: Tensor) -> Place | Lost:
        """Return the `Place` after selecting rows by an index that is independent of inputs, such as `arange(rows)`."""
        if index.numel() % self.rows:
            return NOWHERE if index.numel() == 1 else Lost(None)
        inner = index.numel() // self.rows if size == self.rows else place.inner
        if index.numel() != max(index.shape, default=0) or inner is None:
            return Lost(None)
        if _has_values(index):
            given = torch.arange(index.numel(), device=index.device) // inner % self.rows
            if not torch.equal(index.flatten() % size // (place.inner or 1) % self.rows, given):
                return Lost(None)
        elif index.numel() != size:
            return Lost(None)
        axis = self._axis(out.shape)
        return Lost(None) if axis is None else Place(axis, inner if out.shape[axis] != self.rows else 1)

    def _put(self, name: str, args: tuple, out: Tensor, place: Place | Lost | None) -> Place | Lost:
        """Return the `Place` of the rows in `args[0]` after an operation has written values to it at an index."""
        if isinstance(place, Lost):
            return Lost(None)
        into = self._by_size(out, [], new=True) if place is None or place.axis < 0 else place
        source = args[2] if name.startswith(("index_put", "_index_put", "masked")) else args[-1]
        held = place_of(source) if isinstance(source, Tensor) and source.numel() != 1 else None
        if held is None or held is NOWHERE or isinstance(into, Lost) or into.axis < 0:
            return into
        along = [i for axis, i in _indices(name, args) if axis <= into.axis < axis + (i.dim() if _is_mask(i) else 1)]
        if isinstance(held, Lost):
            back = len(along) == 1 and held.by is not None and _are_same(_root(along[0]), held.by)
            return into if back else Lost(None)
        return Lost(None) if any(place_of(index) and not _is_mask(index) for index in along) else into

    def _axis(self, shape: Sequence[int]) -> int | None:
        """Return the axis whose size is a multiple of the number of rows; None if no axis or several axes qualify."""
        axes = [axis for axis, size in enumerate(shape) if size and size % self.rows == 0]
        return axes[0] if len(axes) == 1 else None


def place_of(tensor: Tensor) -> Place | Lost | None:
    """Return the `Place` of the rows in a tensor, or None if the tensor does not depend on the inputs."""
    return getattr(tensor, "_place_of_rows", None)


def mark(tensor: Tensor, place: Place | Lost | None) -> None:
    """Mark a tensor with the `Place` of its rows, or as `Lost`."""
    tensor._place_of_rows, tensor._part_of = place, _NO_PART  # type: ignore[attr-defined]


def _mark_index(name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    """Record the index that an output is derived from, or the permutation that an output inverts."""
    x = args[0] if args and isinstance(args[0], Tensor) else None
    if x is None:
        return
    if name == "sort":
        values, order = out
        order._is_permutation = True
        if isinstance(place_of(values), Lost):
            mark(values, Lost(order))
        if not kwargs.get("descending", args[2] if len(args) > 2 else False):
            order._inverse = _root(x)
    elif name in _SAME_INDEX and isinstance(out, Tensor):
        out._root = _root(x)  # type: ignore[attr-defined]
    elif name in ("index_put", "index_put_", "scatter", "scatter_") and place_of(args[-1]) is None:
        # inverse[permutation] = arange(...)
        indices = _indices(name, args)
        if len(indices) == 1 and isinstance(args[-1], Tensor) and args[-1].numel() == x.numel():
            out._inverse = _root(indices[0][1])


def _mark_parts(name: str, args: tuple, kwargs: dict[str, Any], parts: Sequence[Tensor]) -> None:
    """Store the `Place` of a split tensor on its parts, so that their concatenation gets the same `Place`."""
    given = args[1:2] if name == "unbind" else args[2:3]
    dim = _dim(given[0] if given else kwargs.get("dim", 0), args[0])
    place = place_of(args[0])
    if isinstance(place, Place) and place.axis == dim and place.inner is not None:
        group = object()
        for i, part in enumerate(parts):
            inner = place.inner * (part.shape[0] if name == "unbind" and part.dim() else 1)
            part._part_of = group, i, len(parts), Place(0 if name == "unbind" else dim, inner)  # type: ignore[attr-defined]


def _reassembled(args: tuple, kwargs: dict[str, Any]) -> Place | Lost | None:
    """Return the `Place` of the rows in a concatenation, or None if it contains no part of a split tensor.

    If all parts of one split tensor are concatenated in their original order, as LLaVA does with image features, the
    result has the `Place` of the split tensor. Otherwise, the order of the rows is lost.
    """
    parts = [getattr(tensor, "_part_of", _NO_PART) for tensor in args[0]]
    group, _, count, place = next((part for part in parts if part[0] is not None), _NO_PART)
    if group is None or place.axis != _dim(args[1] if len(args) > 1 else kwargs.get("dim", 0), args[0][0]):
        return None
    return place if [part[:2] for part in parts] == [(group, i) for i in range(count)] else Lost(None)


def _root(index: Tensor) -> Tensor:
    return getattr(index, "_root", index)


def _are_same(index: Tensor, other: Tensor) -> bool:
    """Whether two indices select the same entries: they are the same tensor, or have equal values."""
    if index is other:
        return True
    sorted_twice = any(getattr(i, "_is_permutation", False) or not _has_values(i) for i in (index, other))
    return not sorted_twice and not _is_mask(index) and torch.equal(index, other)


def _inverse_of(index: Tensor) -> Tensor | None:
    """Return the permutation whose inverse is `index`, or None if no such permutation is known."""
    other = getattr(_root(index), "_inverse", None)
    return other if getattr(other, "_is_permutation", False) else None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not tensor.is_meta


def _dim(dim: int, x: Tensor) -> int:
    return dim % max(x.dim(), 1)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _indices(name: str, args: tuple) -> list[tuple[int, Tensor]]:
    """Return pairs `(axis, index)` of an operation: `axis` is the first axis of `args[0]` that `index` indexes."""
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
