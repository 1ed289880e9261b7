"""The gradient of each example of a batch, from one backward pass.

    grads[key][i] = d loss_i / d params[key]

`apply` can take a different adapter for each row of a batch. If every row gets a copy of the same adapter, loss `i`
depends on copy `i` only. The gradient of the summed losses with respect to copy `i` is therefore the gradient of loss
`i`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.grad import grad
from ..core.shapes import described
from ..model.batch import num_adapters
from ..private import has_values, in_transform, tree_leaves
from .optim import require_trainable


LossRows = Callable[[dict[str, Tensor], Any], Tensor]


def per_example_grads(
    loss_rows: LossRows, params: Mapping[str, Tensor], batch: Any, *, num_rows: int | None = None
) -> dict[str, Tensor]:
    """Return the gradient of the loss of each row, as one tensor of shape (n, ...) for each key of `params`.

    The result is `torch.func.vmap(torch.func.grad(loss), (None, 0))(params, batch)`, where `loss` is the loss of one
    example. The function runs one forward and one backward pass, with as many matrix products as a plain training step.
    The gradients, including those of trained heads, take `n` times the memory of `params`. `per_example_grads` supports
    `torch.func` transforms.

    Args:
        loss_rows: Function `(rows, batch)` that returns one loss per row, (n,). `rows` are params with one adapter per
            row, as returned by `select_adapters`; pass `rows` to `apply`. Loss `i` must depend on row `i` only. Padded
            tokens must not contribute.
        params: Params of one adapter, including trained biases and heads.
        batch: Second argument of `loss_rows`, with the examples along axis 0 of every tensor. If the batch is empty, as
            can happen with Poisson sampling, the gradients have shape (0, ...), and `loss_rows` is not called.
        num_rows: Number n of rows. Required if `batch` contains no tensors, or contains tensors that all rows share.

    Raises:
        ValueError: If the tensors of the batch have different numbers of rows, if `loss_rows` does not return (n,)
            losses, if `loss_rows` does not use `rows`, or if `params` are not floating-point tensors.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> apply, params, frozen, _ = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> def loss_rows(rows, batch):
        ...     return (apply(rows, frozen, batch["x"]) - batch["y"]).square().mean(1)
        >>> batch = {"x": torch.ones(5, 8), "y": torch.zeros(5, 6)}
        >>> {key: tuple(leaf.shape) for key, leaf in per_example_grads(loss_rows, params, batch).items()}
        {'0.lambda_b': (5, 6), '0.lambda_d': (5, 4)}

    Reference:
        https://arxiv.org/abs/1912.06015, strategy "multi": one copy of the parameters (here, of the adapter) per
        example.
    """
    if not callable(loss_rows):
        raise ValueError(f"loss_rows must be a function of (rows, batch), got {type(loss_rows).__name__}.")
    require_trainable(params)
    n = _rows_of(batch) if num_rows is None else num_rows
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f"num_rows must be an integer, at least 0, got {n!r}.")
    if n == 0:
        return {key: p.new_zeros(0, *p.shape) for key, p in params.items()}
    rows = {key: p.expand(n, *p.shape) for key, p in params.items()}
    return grad(partial(_total, loss_rows, n))(rows, batch)


def per_example_norms(grads: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
    """Return the norm of each example's gradient over all leaves, in float64.

    Args:
        grads: Gradients from `per_example_grads`, as tensors (n, ...).

    Raises:
        ValueError: If `grads` is empty or is not a dict of floating-point tensors with a common leading axis.

    Example:
        >>> per_example_norms({"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[4.0], [1.0]])})
        tensor([5., 1.], dtype=torch.float64)
    """
    require_grads("grads", grads)
    norms = [torch.linalg.vector_norm(as_matrix(leaf), dim=1, dtype=torch.float64) for leaf in grads.values()]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def require_grads(name: str, grads: Mapping[str, Tensor]) -> None:
    """Check that `grads` has the structure of gradients from `per_example_grads`.

    Raises:
        ValueError: If `grads` is empty or is not a dict of floating-point tensors with a common leading axis.

    Example:
        >>> require_grads("grads", {"p": torch.ones(3, 2)})
    """
    if not isinstance(grads, Mapping) or not grads:
        what = type(grads).__name__ if not isinstance(grads, Mapping) else "an empty dict"
        raise ValueError(f"{name} must be a dict of gradients from per_example_grads, got {what}.")
    for key, leaf in grads.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise ValueError(
                f"{name}[{key!r}] must be a floating-point tensor of shape (n, ...), got {described(leaf)}."
            )
    num_adapters(grads)  # checks the leading axes


def require_finite_rows(name: str, norms: Float[Tensor, " n"]) -> None:
    """Check that the norms of per-example gradients are finite, except under `vmap` and `torch.compile`.

    Raises:
        ValueError: If a norm is infinite or NaN.

    Example:
        >>> require_finite_rows("train", torch.ones(3))
    """
    if has_values(norms) and len(wrong := (~norms.isfinite()).nonzero().flatten().tolist()):
        which = f"{len(wrong)} of {len(norms)} {name}".rstrip()
        raise ValueError(
            f"the gradients of {which} examples are not finite (first: example {wrong[0]}): leave these examples out."
        )


def as_matrix(leaf: Tensor) -> Float[Tensor, "n size"]:
    """Reshape a leaf (n, ...) to (n, size), also if n is 0.

    Example:
        >>> as_matrix(torch.ones(3, 2, 5)).shape
        torch.Size([3, 10])
    """
    return leaf.reshape(leaf.shape[0], leaf.shape[1:].numel())


def _total(loss_rows: LossRows, n: int, rows: dict[str, Tensor], batch: Any) -> Tensor:
    losses = loss_rows(rows, batch)
    if not isinstance(losses, Tensor) or losses.shape != (n,) or not losses.is_floating_point():
        raise ValueError(
            f"loss_rows must return one floating-point loss per row, ({n},), got {described(losses)}. Do not "
            "average over the rows: use, for example, cross_entropy(..., reduction='none')."
        )
    # Under a transform, `requires_grad` does not show whether the losses depend on the rows.
    if not torch.compiler.is_compiling() and not in_transform() and not losses.requires_grad:
        raise ValueError("the losses of loss_rows(rows, batch) do not depend on rows: pass rows to apply.")
    return losses.sum()


def _rows_of(batch: Any) -> int:
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        found = f"tensors of shapes {sorted(set(shapes))}" if shapes else "no tensors"
        raise ValueError(f"can't determine the number of rows of batch, which contains {found}: pass num_rows.")
    return shapes[0][0]
