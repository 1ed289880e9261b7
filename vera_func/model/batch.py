"""Stack adapters, and select one adapter or a weighted sum for each row of a batch.

All adapters share the projections. A batch of rows with different adapters needs one matrix product with the base
weight and one with each projection. In addition, each row is multiplied by the `lambda_d` and the `lambda_b` of its
adapter. Stacked params of n adapters are a flat dict with the keys of one adapter, in which every tensor has a leading
axis of size n.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.keys import (
    BASE_SHARE,
    MAGNITUDE,
    MARKS,
    MIXTURE,
    SCALES,
    adapted_modules,
    join_key,
    own_parameters,
    split_key,
)
from ..core.shapes import require_dict


Params: TypeAlias = Mapping[str, Tensor]


def stack_adapters(adapters: Sequence[Params]) -> dict[str, Tensor]:
    """Stack the params of n adapters along a new leading axis of size n. Adapter `i` is at index `i`.

    The vectors are copied.

    Args:
        adapters: Params with the same keys and shapes, for the same projections.

    Raises:
        ValueError: If `adapters` is empty, or if keys, shapes, dtypes or devices differ.

    Example:
        >>> stacked = stack_adapters([{"lambda_b": torch.zeros(3)}, {"lambda_b": torch.ones(3)}])
        >>> stacked["lambda_b"].shape
        torch.Size([2, 3])
    """
    if isinstance(adapters, Mapping):
        raise ValueError("adapters must be a sequence of params, got a single mapping: pass [params, ...].")
    if not adapters:
        raise ValueError("adapters is empty, so there is nothing to stack: pass at least one adapter.")
    first = adapters[0]
    for i, params in enumerate(adapters):
        odd = sorted(params.keys() ^ first.keys())
        if odd:
            raise ValueError(
                f"adapters {i} and 0 differ in {len(odd)} keys, first {odd[0]!r}; to combine them, see pool_adapters."
            )
        for key, value in params.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} of adapter {i} must be a tensor, got {type(value).__name__}.")
            if (value.dtype, value.device) != (first[key].dtype, first[key].device):
                raise ValueError(
                    f"{key!r} is {value.dtype} on {value.device} in adapter {i} and {first[key].dtype} on "
                    f"{first[key].device} in adapter 0; convert all adapters to one dtype and device."
                )
            if value.shape != first[key].shape:
                raise ValueError(
                    f"{key!r} has shape {tuple(value.shape)} in adapter {i} and {tuple(first[key].shape)} in adapter "
                    "0; pool_adapters combines adapters of different r or layers."
                )
    return {key: torch.stack([params[key] for params in adapters]) for key in first}


def unstack_adapters(stacked: Params) -> list[dict[str, Tensor]]:
    """Split stacked params into the params of single adapters, as views: the inverse of `stack_adapters`.

    Args:
        stacked: Params whose tensors have shape (n, ...).

    Raises:
        ValueError: If the tensors do not all have the same size along axis 0.

    Example:
        >>> unstack_adapters({"lambda_b": torch.ones(2, 3)})[1]
        {'lambda_b': tensor([1., 1., 1.])}
    """
    return [{key: leaf[i] for key, leaf in stacked.items()} for i in range(num_adapters(stacked))]


def num_adapters(stacked: Params) -> int:
    """Return the number of adapters in stacked params, which is the size of their leading axis.

    Args:
        stacked: Params whose tensors have shape (n, ...).

    Raises:
        ValueError: If the tensors do not all have the same size along axis 0.

    Example:
        >>> num_adapters({"lambda_b": torch.ones(2, 3), "lambda_d": torch.ones(2, 4)})
        2
    """
    require_dict("params", stacked)
    if not stacked:
        raise ValueError("stacked params are empty.")
    for key, leaf in stacked.items():
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{key!r} must be a tensor of shape (n, ...), got {type(leaf).__name__}.")
    sizes = {key: leaf.shape[0] if leaf.dim() else None for key, leaf in stacked.items()}
    key, n = next(iter(sizes.items()))
    for other, size in sizes.items():
        if size is None or size != n:
            raise ValueError(
                f"stacked params need a common leading axis, but {key!r} has shape {tuple(stacked[key].shape)} and "
                f"{other!r} has shape {tuple(stacked[other].shape)}."
            )
    assert n is not None
    return n


def select_adapters(
    stacked: Params, adapter_ids: Tensor | Sequence[Any], weights: Tensor | Sequence[Any] | None = None
) -> dict[str, Tensor]:
    """Return params for `apply` with one adapter, or a weighted sum of adapters, for each row of a batch.

    `apply(select_adapters(stacked, ids), frozen, **inputs)` runs row `i` through adapter `ids[i]`, in one forward pass.
    A row with id -1 gets exactly the output of the base model, with the base model's own heads and biases. The
    selection costs one gather of the vectors.

    Args:
        stacked: Params whose tensors have shape (n, ...).
        adapter_ids: Integers from -1 to n - 1, of shape (rows,). With shape (rows, k), each row gets the sum of `k`
            updates, like several active adapters in PEFT. Trained heads and biases are summed as differences from the
            base: base + Σ weights (head - base). Output scales of DVoRA are summed as differences from the base's
            value, which is 1. DVoRA adapters must be folded before they are summed (`fold_magnitude`).
        weights: Weights of the updates, of shape (rows, k), only for ids of that shape. By default, all weights are 1.

    Returns:
        Params with a leading axis (rows,). For weighted sums, the vectors have leading axes (rows, k), and
        `"{module}.mixture"` contains the weights. If `"{parameter}.base_share"` is present, `apply` uses the
        value `parameter + base_share * base`, where `base` is the base model's parameter.

    Raises:
        ValueError: If an id is out of range or not an integer, if the weights do not have the shape of the ids, or if
            `stacked` already contains weighted sums of adapters.

    Example:
        >>> stacked = {"lambda_b": torch.arange(6.0).reshape(3, 2), "lambda_d": torch.ones(3, 4)}
        >>> select_adapters(stacked, [2, 0, -1])["lambda_b"]
        tensor([[4., 5.],
                [0., 1.],
                [0., 0.]])
    """
    n = num_adapters(stacked)
    device = next(iter(stacked.values())).device
    ids, empty = _checked_ids(adapter_ids, n, device)
    if ids.dim() == 1 and weights is not None:
        raise ValueError(
            f"weights are for sums, but adapter_ids has shape {tuple(ids.shape)}: pass adapter_ids and weights of "
            "shape (rows, k), or no weights."
        )
    # Magnitudes and output scales also have a base value: the base model has an output scale of 1.
    own = own_parameters(stacked) + [key for key in stacked if split_key(key)[1] in SCALES]
    rows = {key: leaf[ids.clamp(min=0)] for key, leaf in stacked.items()}
    if empty:
        # `where` rather than a product with 0: NaN in adapter 0 would otherwise reach the rows of the base model.
        rows = {k: torch.where(_expanded(ids < 0, v), 0, v) for k, v in rows.items()}
    if ids.dim() == 1:
        for key in own if empty else ():
            share = join_key(key, BASE_SHARE)
            rows[share] = torch.where(ids < 0, 1, rows.get(share, rows[key].new_zeros(())))
        return rows
    return _summed(stacked, rows, own, ids, weights)


def _checked_ids(adapter_ids: Tensor | Sequence[Any], n: int, device: torch.device) -> tuple[Tensor, bool]:
    """Return the ids as a tensor, and whether some of them may be -1."""
    ids = torch.as_tensor(adapter_ids, device=device)
    if not isinstance(adapter_ids, Tensor) and not ids.numel():
        ids = ids.long()  # an empty list has the default dtype
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise ValueError(f"adapter_ids must be integers, got {ids.dtype}.")
    if ids.dim() not in (1, 2):
        raise ValueError(f"adapter_ids must have shape (rows,), or (rows, k) for sums, got {tuple(ids.shape)}.")
    ids = ids.long()
    # A compiled function can't check values. There, an id that is out of range fails in the gather.
    if torch.compiler.is_compiling():
        return ids, True
    wrong = ids[(ids < -1) | (ids >= n)]
    if wrong.numel():
        raise ValueError(f"adapter id {int(wrong[0])} is out of range: there are {n} adapters, and -1 is the base.")
    return ids, bool((ids < 0).any())


def _summed(
    stacked: Params, rows: dict[str, Tensor], own: Sequence[str], ids: Tensor, weights: Tensor | Sequence[Any] | None
) -> dict[str, Tensor]:
    """Return params for weighted sums of adapters. `rows` contains the adapters to sum, with leading axes (rows, k)."""
    # Converted to the dtype of each leaf below.
    wide = functools.reduce(torch.promote_types, [leaf.dtype for leaf in stacked.values()])
    given = torch.ones_like(ids) if weights is None else weights
    weights = torch.as_tensor(given, dtype=wide, device=ids.device)
    if weights.shape != ids.shape:
        raise ValueError(f"weights must have the shape {tuple(ids.shape)} of adapter_ids, got {tuple(weights.shape)}.")
    weights = torch.where(ids < 0, 0, weights)
    if any(split_key(key)[1] in MARKS for key in stacked):
        raise ValueError(
            "stacked already contains weighted sums of adapters, or rows of the base model: pass the result of "
            "stack_adapters, not of select_adapters."
        )
    if magnitudes := [key for key in stacked if split_key(key)[1] == MAGNITUDE]:
        raise ValueError(
            f"stacked has the magnitude {magnitudes[0]!r}. To sum DVoRA adapters, fold them first: "
            "select_adapters(fold_magnitude(apply, stacked, frozen), ids)."
        )
    # base + Σ weights (value - base); `apply` adds the terms of the base model.
    for key in own:
        of_value = weights.to(rows[key].dtype)
        rows[key] = (_expanded(of_value, rows[key]) * rows[key]).sum(1)
        rows[join_key(key, BASE_SHARE)] = 1 - of_value.sum(1)
    for module in adapted_modules(rows):
        rows[join_key(module, MIXTURE)] = weights.to(rows[join_key(module, "lambda_b")].dtype)
    return rows


def _expanded(value: Tensor, like: Tensor) -> Tensor:
    return value[(..., *[None] * (like.dim() - value.dim()))]
