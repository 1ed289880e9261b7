"""Checks of shapes, dtypes and numbers, and broadcasting of one adapter per row to a batch."""

import contextlib
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def align_rows(name: str, vector: Tensor, x: Tensor, *, inner: int = 1) -> Tensor:
    """View a vector (*rows, k) as (*rows, 1, ..., 1, k), so that it broadcasts to (*batch, k) row by row.

    Args:
        name: Name of the vector, for the error message.
        vector: Tensor of shape (*rows, ...), where the last `inner` axes are not rows.
        x: Input of shape (*batch, in), where `*batch` must start with `*rows`. Under vmap, shapes exclude the mapped
            axis.
        inner: Number of last axes of `vector` that are not rows.

    Raises:
        ValueError: If the rows do not match the leading axes of `x`.

    Example:
        >>> align_rows("lambda_b", torch.ones(5, 3), torch.ones(5, 7, 2)).shape
        torch.Size([5, 1, 3])
    """
    rows, own = vector.shape[:-inner], vector.shape[-inner:]
    if not rows:
        return vector
    batch = x.shape[:-1]
    if batch[: len(rows)] != rows:
        raise ValueError(
            f"{name} {tuple(vector.shape)} has leading axes {tuple(rows)}, which do not match the leading "
            f"axes {tuple(batch)} of x {tuple(x.shape)}: row i of x goes through adapter i. Pass one adapter "
            "per row (select_adapters), or map over stacked adapters (vmap_adapters, torch.func.vmap)."
        )
    return vector.reshape(*rows, *[1] * (len(batch) - len(rows)), *own)


def match_rows(vectors: Mapping[str, Tensor]) -> list[Tensor]:
    """Reshape vectors (*rows, k) to equal numbers of axes, so that `*rows` broadcast from the left.

    Args:
        vectors: Vectors by name, for the error message. Shorter `*rows` must be the first axes of the longest `*rows`.

    Raises:
        ValueError: If the rows of the vectors do not match.

    Example:
        >>> [v.shape for v in match_rows({"lambda_b": torch.ones(5, 3), "lambda_d": torch.ones(5, 7, 2)})]
        [torch.Size([5, 1, 3]), torch.Size([5, 7, 2])]
    """
    rows = sorted((tuple(vector.shape[:-1]) for vector in vectors.values()), key=len)
    if any(rows[-1][: len(shape)] != shape for shape in rows):
        shapes = ", ".join(f"{name} {tuple(vector.shape)}" for name, vector in vectors.items())
        raise ValueError(f"the leading axes of {shapes} do not match: pass vectors for the same rows.")
    return [with_dims(vector, len(rows[-1]) + 1) for vector in vectors.values()]


def with_dims(vector: Tensor, dims: int) -> Tensor:
    """View a vector (*rows, k) with `dims` axes in total, by inserting axes of size 1 after the rows.

    Example:
        >>> with_dims(torch.ones(5, 3), 4).shape
        torch.Size([5, 1, 1, 3])
    """
    return vector.reshape(*vector.shape[:-1], *[1] * (dims - vector.dim()), vector.shape[-1])


def contiguous_rows(x: Tensor) -> Tensor:
    """Return `x` (*batch, in), copied if it is not contiguous.

    torch multiplies a contiguous `x` (b, seq, in) by a frozen weight as one matrix (b * seq, in). If `x` is not
    contiguous, torch copies the weight for each of the `b` sequences. If the weight is the output head of a language
    model and `x` is the slice `hidden[:, -1:]`, these copies cost more than the rest of the model.

    Example:
        >>> contiguous_rows(torch.ones(4, 7, 3)[:, -1:]).stride()
        (3, 3, 1)
    """
    return x.contiguous()


def described(value: Any) -> str:
    """Describe a value in an error message: the shape and dtype of a tensor, or the class of anything else.

    Example:
        >>> described(torch.ones(2, 3)), described(None)
        ('(2, 3) torch.float32', 'NoneType')
    """
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def require_dict(name: str, value: Any) -> None:
    """Raise an error if `value` is not a dict, for example if a whole `Adapted` was passed as params.

    Raises:
        ValueError: If `value` is not a mapping.

    Example:
        >>> require_dict("params", {"lambda_b": torch.ones(3)})
    """
    if not isinstance(value, Mapping):
        hint = f": pass its attribute {name}" if hasattr(value, name) else ""
        raise ValueError(f"{name} must be a dict of tensors, got {type(value).__name__}{hint}.")


def require_finite(name: str, tensor: Tensor, remark: str) -> None:
    """Raise an error if a tensor is not finite.

    Args:
        name: Name of the tensor, for the error message.
        tensor: Tensor to check. The check reads the values, so do not call this function inside a transform.
        remark: The end of the error message.

    Raises:
        ValueError: If a value is infinite or NaN.

    Example:
        >>> require_finite("lambda_b", torch.ones(3), "the adapter is invalid")
    """
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or inf: {remark}.")


def require_single(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise an error if a tensor of params does not have `shape`, its shape in a single adapter.

    Raises:
        ValueError: If the shape differs, for example because the params are stacked.

    Example:
        >>> require_single("lambda_d", torch.ones(3), (3,))
    """
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}. To split stacked params, use "
            "unstack_adapters."
        )


def require_float(name: str, dtype: torch.dtype) -> None:
    """Raise an error if a dtype is not floating-point, because an integer dtype would silently round an adapter.

    Raises:
        ValueError: If `dtype` is not a floating-point dtype.

    Example:
        >>> require_float("dtype", torch.bfloat16)
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating-point dtype, got {dtype!r}.")


def require_integer(name: str, value: Any, least: int) -> None:
    """Raise an error if a value is not a Python, numpy or torch integer, or if the value is less than `least`.

    Raises:
        ValueError: If the value is not an integer, for example 2.0, or is too small.

    Example:
        >>> require_integer("steps", 3, 0)
    """
    try:
        valid = operator.index(value) >= least
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}.")


def require_positive(name: str, value: float) -> None:
    """Raise an error if a value is not a positive, finite number.

    Raises:
        ValueError: If the value is not a number (for example a tensor), or is zero, negative, infinite or NaN.

    Example:
        >>> require_positive("damping", 0.5)
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}.")


def require_product_dtype(dtype: torch.dtype | None) -> None:
    """Raise an error if a dtype is not a valid `product_dtype`; see `vera_forward`.

    Raises:
        ValueError: If `dtype` is anything other than None, bfloat16 or float16.

    Example:
        >>> require_product_dtype(torch.bfloat16)
    """
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"product_dtype must be torch.bfloat16, torch.float16, or None for the dtype of the vectors, got {dtype!r}."
        )


def require_rows_of_floats(x: Tensor) -> None:
    """Raise an error if `x` is not a valid input of a linear layer: a floating-point tensor with at least one axis.

    Raises:
        ValueError: If `x` is a scalar, or is not a floating-point tensor.

    Example:
        >>> require_rows_of_floats(torch.ones(3))
    """
    if not isinstance(x, Tensor) or not x.dim() or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor of shape (*batch, in), got {described(x)}.")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context manager that disables autocast, which would round the factors of products.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
        ...     (torch.ones(2, 3) @ torch.ones(3, 2)).dtype
        torch.float32
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
