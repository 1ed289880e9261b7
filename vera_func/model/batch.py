"""Many adapters at once: stacking, choosing one for each row of a batch, mapping over them, pooling different ones.

Since all adapters share the projections, `n` of them cost one base product, two shared products and two
multiplications by a vector of their own for each row. Stacked params are the same flat dicts with an axis (n,)
in front of every leaf; the projections are never copied.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.keys import MIXTURE, VECTORS, adapted_modules, join_key, own_parameters, split_key
from ..private import tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten
from .adapt import Adapted, make_apply
from .config import VeraConfig


Params: TypeAlias = Mapping[str, Tensor]
InDims: TypeAlias = int | Sequence[int | None] | Mapping[str, int | None] | None


def stack_adapters(adapters: Sequence[Params]) -> dict[str, Tensor]:
    """One dict whose every leaf has a leading axis (n,): adapter `i` is row `i`.

    Costs a copy of the vectors; nothing else is touched.

    Args:
        adapters: Params with the same keys and shapes, of the same projections.

    Raises:
        ValueError: If there are none, or their keys, shapes, dtypes or devices differ.

    Example:
        >>> stacked = stack_adapters([{"lambda_b": torch.zeros(3)}, {"lambda_b": torch.ones(3)}])
        >>> stacked["lambda_b"].shape
        torch.Size([2, 3])
    """
    if isinstance(adapters, Mapping):
        raise ValueError("adapters must be a sequence of params, got a single mapping: pass [params, ...].")
    if not adapters:
        raise ValueError("there is nothing to stack: pass at least one adapter.")
    first = adapters[0]
    for i, params in enumerate(adapters):
        odd = sorted(params.keys() ^ first.keys())
        if odd:
            raise ValueError(f"adapters {i} and 0 differ in {len(odd)} keys, first {odd[0]!r}; see pool_adapters.")
        for key, value in params.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} of adapter {i} must be a tensor, got {type(value).__name__}.")
            if (value.dtype, value.device) != (first[key].dtype, first[key].device):
                raise ValueError(
                    f"{key!r} is {value.dtype} on {value.device} in adapter {i} and {first[key].dtype} on "
                    f"{first[key].device} in adapter 0; a stack has one dtype and device."
                )
            if value.shape != first[key].shape:
                raise ValueError(
                    f"{key!r} is {tuple(value.shape)} in adapter {i} and {tuple(first[key].shape)} in adapter 0; "
                    "adapters of different r or layers can be pooled (pool_adapters)."
                )
    return {key: torch.stack([params[key] for params in adapters]) for key in first}


def unstack_adapters(stacked: Params) -> list[dict[str, Tensor]]:
    """The adapters of a stack, as views; undoes `stack_adapters`.

    Args:
        stacked: Leaves (n, ...).

    Raises:
        ValueError: If the leaves have no common leading axis.

    Example:
        >>> unstack_adapters({"lambda_b": torch.ones(2, 3)})[1]
        {'lambda_b': tensor([1., 1., 1.])}
    """
    return [{key: leaf[i] for key, leaf in stacked.items()} for i in range(num_adapters(stacked))]


def num_adapters(stacked: Params) -> int:
    """Size of the leading axis of stacked params.

    Args:
        stacked: Leaves (n, ...).

    Raises:
        ValueError: If the leaves have no common leading axis.

    Example:
        >>> num_adapters({"lambda_b": torch.ones(2, 3), "lambda_d": torch.ones(2, 4)})
        2
    """
    if not stacked:
        raise ValueError("stacked params are empty.")
    for key, leaf in stacked.items():
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{key!r} must be a tensor (n, ...), got {type(leaf).__name__}.")
    sizes = {key: leaf.shape[0] if leaf.dim() else None for key, leaf in stacked.items()}
    key, n = next(iter(sizes.items()))
    for other, size in sizes.items():
        if size is None or size != n:
            raise ValueError(
                f"stacked params need a common leading axis, but {key!r} is {tuple(stacked[key].shape)} and "
                f"{other!r} is {tuple(stacked[other].shape)}."
            )
    assert n is not None
    return n


def select_adapters(
    stacked: Params, adapter_ids: Tensor | Sequence[Any], weights: Tensor | Sequence[Any] | None = None
) -> dict[str, Tensor]:
    """One adapter, or a weighted sum of several, for each row of a batch: params for `apply` on a mixed batch.

    `apply(select_adapters(stacked, ids), frozen, **inputs)` runs row `i` through adapter `ids[i]`, all in one
    forward. An id of -1 is no adapter: exactly the base. Costs a gather of the vectors.

    Args:
        stacked: Leaves (n, ...).
        adapter_ids: (rows,) integers in -1 ... n - 1, or (rows, k): the sum of `k` updates for each row,
            as when several adapters are active in PEFT. The sum is marked by an own key, `"{module}.mixture"`,
            so its axis cannot be taken for one of the batch.
        weights: (rows, k), factors of the updates of a sum; 1 by default.

    Raises:
        ValueError: If an id is out of range or not an integer, the weights do not fit, or parameters of
            the model itself would have to be summed or left out.

    Example:
        >>> stacked = {"lambda_b": torch.arange(6.0).reshape(3, 2), "lambda_d": torch.ones(3, 4)}
        >>> select_adapters(stacked, [2, 0, -1])["lambda_b"]
        tensor([[4., 5.],
                [0., 1.],
                [0., 0.]])
    """
    n = num_adapters(stacked)
    device = next(iter(stacked.values())).device
    ids = torch.as_tensor(adapter_ids, device=device)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise ValueError(f"adapter_ids must be integers, got {ids.dtype}.")
    if ids.dim() not in (1, 2):
        raise ValueError(f"adapter_ids must be (rows,), or (rows, k) for sums, got {tuple(ids.shape)}.")
    ids = ids.long()
    # A compiled function can't look at values; there, out-of-range ids fail in the gather.
    empty = True
    if not torch.compiler.is_compiling():
        wrong = ids[(ids < -1) | (ids >= n)]
        if wrong.numel():
            raise ValueError(f"adapter id {int(wrong[0])} is out of range: there are {n} adapters, -1 is none.")
        empty = bool((ids < 0).any())
    own = own_parameters(stacked)
    if own and (empty or ids.dim() == 2):
        reason = "left out for an id of -1" if ids.dim() == 1 else "summed"
        raise ValueError(f"{own[0]!r} is a parameter of the model itself and can't be {reason}.")
    if ids.dim() == 1 and weights is not None:
        raise ValueError("weights are for sums: give adapter_ids the shape (rows, k), too.")
    rows = {key: leaf[ids.clamp(min=0)] for key, leaf in stacked.items()}
    if empty:
        # Zeros in both vectors: where adapter 0 holds NaN, zero times it would be NaN, and not the base.
        rows = {k: torch.where((ids < 0)[(..., *[None] * (v.dim() - ids.dim()))], 0, v) for k, v in rows.items()}
    if ids.dim() == 1:
        return rows
    first = next(iter(stacked.values()))
    weights = torch.ones_like(ids, dtype=first.dtype) if weights is None else torch.as_tensor(weights, device=device)
    if weights.shape != ids.shape:
        raise ValueError(f"weights must be {tuple(ids.shape)} like adapter_ids, got {tuple(weights.shape)}.")
    weights = torch.where(ids < 0, 0, weights.to(first.dtype))
    if any(split_key(key)[1] == MIXTURE for key in rows):
        raise ValueError("these params are sums already; select from a plain stack.")
    return {**rows, **{join_key(module, MIXTURE): weights for module in adapted_modules(rows)}}


def vmap_adapters(
    apply: Callable[..., Any], in_dims: InDims = 0, *, chunk_size: int | None = None
) -> Callable[..., Any]:
    """`f(stacked, frozen, *batch)`, which means `torch.func.vmap(apply, (0, None, 0, ...))(stacked, frozen, *batch)`.

    It is computed by folding the adapter axis into the batch axis: one forward of a mixed batch, without the
    limits of vmap (2-D masks under sdpa, caches, fused attention on GPUs) and faster. It is differentiable:
    the gradient of the sum of all adapters' losses holds every adapter's own gradient. Use
    `torch.func.vmap` itself where the model mixes the entries of a batch, or returns a mean over them.

    Args:
        apply: From `adapt`, or any function of `(params, frozen, *batch)` that takes one adapter for each row
            and returns tensors with the rows in front.
        in_dims: Axis of the adapters in the batch arguments, nested ones included, or None for what all
            adapters share: one value for all, a sequence for the positional arguments, or a mapping for keyword
            arguments; what it does not name is 0. The first axis of an adapter's own input is its batch axis;
            if all inputs have one axis only, they are single inputs without one.
        chunk_size: How many adapters to run at once; None is all.

    Raises:
        ValueError: If sizes do not match, or an output has no axis of rows (such as a mean loss).

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> stacked = stack_adapters([params] * 5)
        >>> vmap_adapters(apply)(stacked, frozen, torch.ones(5, 3, 8)).shape
        torch.Size([5, 3, 6])
    """
    if not callable(apply):
        raise ValueError(f"apply must be a function of (params, frozen, *batch), got {type(apply).__name__}.")
    if not (in_dims is None or isinstance(in_dims, int | Sequence | Mapping)) or isinstance(in_dims, str):
        raise ValueError(f"in_dims must be an axis, None, or a sequence or mapping of these, got {in_dims!r}.")
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f"chunk_size must be positive or None, got {chunk_size}.")
    return functools.partial(_mapped, apply, in_dims, chunk_size)


def pool_adapters(adapters: Sequence[Adapted]) -> Adapted:
    """Adapters of different r, targets, keys and stored projections as one VeRA, params stacked (n, ...).

    Exact: the projections are stacked along r, `A = [A1; A2; ...]` and `B = [B1, B2, ...]`, zero-padded to the
    widest, and each adapter's `lambda_d` is zero outside its own part. Adapters with equal projections share
    one. A row costs as much as an adapter of the summed rank. `with_dropout` works where all have the same rate.

    Args:
        adapters: From `adapt` or `load_adapter`, over the same model object, each with a single adapter.

    Returns:
        An `Adapted` over all targets; its config describes any one of the rows and can be saved with it.

    Raises:
        ValueError: If there are none, they belong to different models, or params are stacked.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> a = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> b = adapt(model, VeraConfig(r=8, target_modules=["1"], projection_prng_key=1))
        >>> pool = pool_adapters([a, b])
        >>> pool.config.r, pool.params["1.lambda_d"].shape
        (12, torch.Size([2, 12]))
    """
    if not adapters:
        raise ValueError("there is nothing to pool: pass at least one Adapted.")
    if not all(isinstance(adapted, Adapted) for adapted in adapters):
        raise ValueError("adapters must be a sequence of Adapted, as adapt and load_adapter return them.")
    model = adapters[0].apply.model
    for i, adapted in enumerate(adapters):
        if adapted.apply.model is not model:
            raise ValueError(f"adapter {i} belongs to another model object than adapter 0; adapt or load both on one.")
        if adapted.apply.int8_activations != adapters[0].apply.int8_activations:
            raise ValueError(f"adapter {i} and adapter 0 differ in int8_activations.")
        adapted.apply._bind(adapted.params, adapted.frozen)
        for key, value in adapted.params.items():
            if value.shape != adapted.apply.slots[key].shape:
                raise ValueError(f"{key!r} of adapter {i} is stacked; pool single adapters (unstack_adapters).")
    frozen, offsets = _stack_projections([adapted.frozen for adapted in adapters])
    r = frozen["vera_A"].shape[0]
    order = [name for name, _ in model.named_modules()]
    targets = sorted({name for a in adapters for name in a.apply.targets}, key=order.index)
    own = {name for a in adapters for name in own_parameters(a.params)}
    trained = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in own]
    rates = {a.config.vera_dropout for a in adapters}
    rate = rates.pop() if len(rates) == 1 else 0.0
    apply = make_apply(
        model, r, targets, trained, vera_dropout=rate, int8_activations=adapters[0].apply.int8_activations
    )
    rows = []
    for adapted, offset in zip(adapters, offsets, strict=True):
        row = {}
        for key in (join_key(name, leaf) for name in targets for leaf in VECTORS):
            row[key] = frozen["vera_A"].new_zeros(apply.slots[key].shape)
            if key in adapted.params:
                value = adapted.params[key].to(row[key])
                before = offset if split_key(key)[1] == "lambda_d" else 0
                row[key] = pad(value, (before, row[key].shape[0] - before - value.shape[0]))
        for name in trained:
            row[name] = adapted.params.get(name, model.get_parameter(name).detach())
        rows.append(row)
    config = VeraConfig(r=r, target_modules=targets, vera_dropout=rate, save_projection=True)
    return Adapted(apply, stack_adapters(rows), frozen, config)


def _mapped(
    apply: Callable[..., Any],
    in_dims: InDims,
    chunk_size: int | None,
    stacked: Params,
    frozen: Params,
    *args: Any,
    **kwargs: Any,
) -> Any:
    n = num_adapters(stacked)
    leaves, spec = tree_flatten((args, kwargs))
    dims = tree_flatten(_dims(in_dims, args, kwargs))[0]
    mapped = []
    for i, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is _SHARED or not isinstance(leaf, Tensor):
            continue
        if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != n:
            raise ValueError(
                f"an input {tuple(leaf.shape)} must have {n} adapters along axis {dim}; give in_dims None for "
                "what all adapters share."
            )
        leaves[i] = leaf.movedim(dim, 0)
        mapped.append(i)
    step = chunk_size or n
    chunks = []
    for start in range(0, n, step):
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
    # A shared input of one row is left to broadcast over more rows, as it would for a single adapter.
    size = max(sizes) if sizes else None
    folded = list(leaves)
    for i, shape in shapes.items():
        if i in mapped and not shape:
            raise ValueError("an input with one number for each adapter can't be folded; use torch.func.vmap.")
        if i not in mapped and (not shape or (shape[0] == 1 and size not in (None, 1))):
            continue
        if size is not None and shape[0] != size:
            raise ValueError(
                f"the inputs of one adapter have {shape[0]} and {size} rows (shapes {sorted(shapes.values())}); "
                "their first axis must be the same batch."
            )
        leaf = leaves[i] if i in mapped else leaves[i].expand(n, *shape)
        folded[i] = leaf if size is None else leaf.flatten(0, 1)
    rows = dict(stacked)
    if size not in (None, 1):
        rows = {key: leaf.repeat_interleave(size, 0) for key, leaf in stacked.items()}
    args, kwargs = tree_unflatten(folded, spec)
    out = apply(rows, frozen, *args, **kwargs)
    flat, out_spec = tree_flatten(out)
    return tree_unflatten([_unfold(out, leaf, n, size) for leaf in flat], out_spec)


def _unfold(out: Any, leaf: Any, n: int, size: int | None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    rows = n if size is None else n * size
    if leaf.dim() == 0 or leaf.shape[0] != rows:
        raise ValueError(
            f"output{_place(out, leaf)} {tuple(leaf.shape)} has no axis of {rows} rows, so it mixes adapters. Return "
            "what has one (logits rather than a mean loss), or use torch.func.vmap."
        )
    return leaf if size is None else leaf.unflatten(0, (n, size))


def _place(tree: Any, leaf: Any) -> str:
    """Where a leaf is, as an expression to append to the name of the tree."""
    try:
        return next(place for place, value in tree_flatten_with_path(tree) if value is leaf)
    except ValueError:  # a class that is registered without the names of its fields, as in transformers 5.0
        fields = tree.items() if isinstance(tree, Mapping) else ()
        return next((f"[{key!r}]" for key, value in fields if value is leaf), "")


class _Shared:
    """Stands for in_dims None, which a pytree would take for an absent leaf."""


_SHARED = _Shared()


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
            raise ValueError(f"in_dims has {len(by_position)} entries for {len(args)} positional batch arguments.")

    def spread(tree: Any, dim: int | None) -> Any:
        return tree_map(lambda _: _SHARED if dim is None else dim, tree)

    positional = tuple(spread(arg, dim) for arg, dim in zip(args, by_position, strict=True))
    return positional, {name: spread(arg, by_name[name]) for name, arg in kwargs.items()}


def _concatenate(*parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if any(part is not parts[0] and part != parts[0] for part in parts):
        raise ValueError(f"a {type(parts[0]).__name__} can't be joined over chunks of adapters; use chunk_size=None.")
    return parts[0]


def _stack_projections(pairs: Sequence[Params]) -> tuple[dict[str, Tensor], list[int]]:
    """The pairs one after another along r, equal ones once, and the place of each."""
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
