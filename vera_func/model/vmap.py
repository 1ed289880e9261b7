"""Map over stacked adapters by folding their axis into the batch axis.

vmap_adapters(apply)(stacked, frozen, x)  ==  torch.func.vmap(apply, (0, None, 0))(stacked, frozen, x)
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..private import tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten
from .apply import Apply
from .batch import Params, num_adapters
from .dora import fold_magnitude
from .rows.plans import axes_of_outputs


InDims: TypeAlias = int | Sequence[int | None] | Mapping[str, int | None] | None


def vmap_adapters(
    apply: Callable[..., Any], in_dims: InDims = 0, *, chunk_size: int | None = None
) -> Callable[..., Any]:
    """Map `apply` over stacked adapters: return a function equal to `torch.func.vmap(apply, (0, None, 0, ...))`.

    The returned function of `(stacked, frozen, *batch)` folds the axis of the adapters into the batch axis, and runs
    one forward pass with an adapter for each row. One forward pass is faster than `torch.func.vmap`, and also supports
    2-D masks under sdpa, caches, and fused attention on GPUs. The returned function is differentiable: at index i, the
    gradient of the sum of all losses is the gradient of adapter i's loss. Use `torch.func.vmap` if the model mixes the
    entries of a batch, or if it returns a mean over the batch.

    Args:
        apply: An `Apply` from `adapt`, or any function of `(params, frozen, *batch)` that takes one adapter per row and
            returns tensors with the rows in axis 0.
        in_dims: Axis of the adapters in the batch arguments, or None for an argument that all adapters share. A single
            value applies to all arguments, nested ones included. A sequence gives the axes of the positional arguments,
            and a mapping gives the axes of the keyword arguments. An argument without an entry has axis 0. A tuple over
            `(params, frozen, *batch)` is interpreted as in `torch.func.vmap`. After the axis of the adapters is
            removed, the first axis of an input is its batch axis. If no input has more than one axis, the inputs are
            single examples.
        chunk_size: Number of adapters per forward pass, by default all.

    Raises:
        ValueError: If sizes do not match, or if an output (such as a mean loss) has no batch axis.

    Example:
        >>> from vera_func import VeraConfig, adapt, stack_adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> stacked = stack_adapters([params] * 5)
        >>> vmap_adapters(apply)(stacked, frozen, torch.ones(5, 3, 8)).shape
        torch.Size([5, 3, 6])
    """
    if not callable(apply):
        raise ValueError(f"apply must be a function of (params, frozen, *batch), got {type(apply).__name__}.")
    if not (in_dims is None or isinstance(in_dims, int | Sequence | Mapping)) or isinstance(in_dims, str):
        raise ValueError(f"in_dims must be an int or None, or a sequence or mapping of such values, got {in_dims!r}.")
    if isinstance(apply, Apply) and apply.row_axes != 0:
        raise ValueError(
            "vmap_adapters folds the adapters into axis 0 of the inputs, but apply has other batch axes "
            f"(row_axes={apply.row_axes!r}): use torch.func.vmap, or an apply with row_axes=0."
        )
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f"chunk_size must be positive or None, got {chunk_size}.")
    return functools.partial(_mapped, apply, in_dims, chunk_size)


def _mapped(
    apply: Callable[..., Any],
    in_dims: InDims,
    chunk_size: int | None,
    stacked: Params,
    frozen: Params,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if isinstance(in_dims, tuple) and len(in_dims) == len(args) + 2:
        stacked, in_dims = _as_vmap(in_dims, stacked)
    n = num_adapters(stacked)
    leaves, spec = tree_flatten((args, kwargs))
    dims = tree_flatten(_dims(in_dims, args, kwargs))[0]
    mapped = []
    for i, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is _SHARED or not isinstance(leaf, Tensor):
            continue
        if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != n:
            raise ValueError(
                f"an input of shape {tuple(leaf.shape)} must have size {n} (the number of adapters) along axis {dim}; "
                "set in_dims to None for inputs that all adapters share."
            )
        leaves[i] = leaf.movedim(dim, 0)
        mapped.append(i)
    step = chunk_size or max(n, 1)
    chunks = []
    for start in range(0, max(n, 1), step):
        part = {key: leaf[start : start + step] for key, leaf in stacked.items()} if step < n else stacked
        inputs = [leaf[start : start + step] if i in mapped else leaf for i, leaf in enumerate(leaves)]
        chunks.append(_fold(apply, part, frozen, inputs, mapped, spec))
    return chunks[0] if len(chunks) == 1 else tree_map(_concatenate, *chunks)


def _fold(
    apply: Callable[..., Any], stacked: Params, frozen: Params, leaves: list[Any], mapped: list[int], spec: Any
) -> Any:
    n = num_adapters(stacked)
    shapes = {
        i: tuple(leaf.shape[1:] if i in mapped else leaf.shape)
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
    }
    sizes = {shape[0] for shape in shapes.values() if len(shape) > 1}
    # A shared input of one row is broadcast over several rows, as with a single adapter.
    size = max(sizes) if sizes else None
    folded = list(leaves)
    for i, shape in shapes.items():
        if i in mapped and not shape:
            raise ValueError("an input that is one number for each adapter has no batch axis: use torch.func.vmap.")
        if i not in mapped and (not shape or (shape[0] == 1 and size not in (None, 1))):
            continue
        if size is not None and shape[0] != size:
            raise ValueError(
                "the inputs of one adapter must have equally many rows along their first axis, the batch axis, got "
                f"{shape[0]} and {size} rows (shapes {sorted(shapes.values())})."
            )
        leaf = leaves[i] if i in mapped else leaves[i].expand(n, *shape)
        folded[i] = leaf if size is None else leaf.flatten(0, 1)
    rows = dict(stacked)
    if size not in (None, 1):
        if isinstance(apply, Apply) and any(key in stacked for key in apply.schema.magnitudes):
            stacked = fold_magnitude(apply, stacked, frozen)  # one norm for each adapter, not for each row
        rows = {key: leaf.repeat_interleave(size, 0) for key, leaf in stacked.items()}
    args, kwargs = tree_unflatten(folded, spec)
    # An `Apply` may return tensors whose rows are not in axis 0. Any other function must return them in axis 0.
    total = n if size is None else n * size
    known = axes_of_outputs(apply, args, kwargs, total) if isinstance(apply, Apply) and total > 1 else []
    out = apply(rows, frozen, *args, **kwargs)
    flat, out_spec = tree_flatten(out)
    axes = itertools.chain(known, itertools.repeat(0))
    unfolded = [_unfold(out, x, n, size, next(axes)) if isinstance(x, Tensor) else x for x in flat]
    return tree_unflatten(unfolded, out_spec)


def _unfold(out: Any, x: Tensor, n: int, size: int | None, axis: int | None) -> Tensor:
    rows = n if size is None else n * size
    if axis is None or x.dim() <= axis or x.shape[axis] != rows:
        raise ValueError(
            f"output{_place(out, x)} of shape {tuple(x.shape)} has no axis of {rows} rows, so it mixes adapters. "
            "Return one entry per row (logits rather than a mean loss), or use torch.func.vmap."
        )
    return (x if size is None else x.unflatten(axis, (n, size))).movedim(axis, 0)


def _place(tree: Any, leaf: Any) -> str:
    """Return the path of a leaf in an output, such as `['logits']`."""
    try:
        return next(place for place, value in tree_flatten_with_path(tree) if value is leaf)
    except ValueError:  # a class was registered without its field names, as in transformers 5.0
        fields = tree.items() if isinstance(tree, Mapping) else ()
        return next((f"[{key!r}]" for key, value in fields if value is leaf), "")


class _Shared:
    """A placeholder for None in in_dims, because a pytree does not accept None as a leaf."""


_SHARED = _Shared()


def _as_vmap(in_dims: tuple, stacked: Params) -> tuple[Params, tuple]:
    """Interpret the `in_dims` of `torch.func.vmap`: return params with adapters in axis 0, and in_dims of the batch."""
    of_params, of_frozen, *of_batch = in_dims
    if of_frozen is not None:
        raise ValueError(f"in_dims[1] must be None, since all adapters share frozen, got {of_frozen!r}.")
    axes = dict(of_params) if isinstance(of_params, Mapping) else dict.fromkeys(stacked, of_params)
    if axes.keys() != stacked.keys() or not all(isinstance(axis, int) for axis in axes.values()):
        raise ValueError(
            f"in_dims[0] must be the axis of the adapters in params, or a dict of axes, got {of_params!r}."
        )
    return {key: leaf.movedim(axes[key], 0) for key, leaf in stacked.items()}, tuple(of_batch)


def _dims(in_dims: InDims, args: tuple, kwargs: dict[str, Any]) -> Any:
    by_position: Sequence[int | None] = [0] * len(args)
    by_name: dict[str, int | None] = dict.fromkeys(kwargs, 0)
    if in_dims is None or isinstance(in_dims, int):
        by_position, by_name = [in_dims] * len(args), dict.fromkeys(kwargs, in_dims)
    elif isinstance(in_dims, Mapping):
        unknown = sorted(in_dims.keys() - kwargs.keys())
        if unknown:
            raise ValueError(f"in_dims names {unknown}, but the keyword arguments are {sorted(kwargs)}.")
        by_name.update(in_dims)
    else:
        by_position = list(in_dims)
        if len(by_position) != len(args):
            raise ValueError(
                f"in_dims has {len(by_position)} entries for {len(args)} positional batch arguments: pass one entry "
                "per argument, or a tuple over (params, frozen, *batch)."
            )

    def spread(tree: Any, dim: Any) -> Any:
        if isinstance(dim, Mapping):
            return {key: spread(tree[key], dim[key]) for key in tree}
        if isinstance(dim, tuple | list):
            return type(tree)(spread(leaf, axis) for leaf, axis in zip(tree, dim, strict=True))
        return tree_map(lambda _: _SHARED if dim is None else dim, tree)

    positional = tuple(spread(arg, dim) for arg, dim in zip(args, by_position, strict=True))
    return positional, {name: spread(arg, by_name[name]) for name, arg in kwargs.items()}


def _concatenate(*parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if any(part is not parts[0] and part != parts[0] for part in parts):
        raise ValueError(
            f"outputs of type {type(parts[0]).__name__} can't be concatenated over chunks of adapters: pass "
            "chunk_size=None."
        )
    return parts[0]
