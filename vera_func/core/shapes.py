"""Checks and views of shapes that several rooms need: rows of adapters against a batch, floating-point inputs."""

import torch
from torch import Tensor


def align_rows(name: str, vector: Tensor, x: Tensor, *, inner: int = 1) -> Tensor:
    """View `(*rows, k)` as `(*rows, 1, ..., 1, k)`, so that it multiplies `(*batch, k)` row by row.

    Args:
        name: Of the vector, for the error.
        vector: The last `inner` axes are the vector's own, those before are rows.
        x: (*batch, in); `rows` must be its first axes. Under vmap these are logical shapes: an axis that is
            mapped over is not seen.
        inner: How many of the vector's axes are its own.

    Raises:
        ValueError: If the rows do not match; both shapes are named.

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


def require_float(name: str, dtype: torch.dtype) -> None:
    """Refuse dtypes in which an adapter would be rounded to integers in silence.

    Raises:
        ValueError: If `dtype` is not a floating-point one.

    Example:
        >>> require_float("dtype", torch.bfloat16)
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating-point dtype, got {dtype!r}.")


def require_rows_of_floats(x: Tensor) -> None:
    """Refuse what is no input of a linear layer: the result would be cast back to the dtype of `x`.

    Raises:
        ValueError: If `x` is a scalar, or not of floating-point numbers.

    Example:
        >>> require_rows_of_floats(torch.ones(3))
    """
    if not isinstance(x, Tensor) or not x.dim() or not x.is_floating_point():
        what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a floating-point tensor (*batch, in), got {what}.")
