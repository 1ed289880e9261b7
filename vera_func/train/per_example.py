"""The gradient of each example of a batch, from one backward pass.

    grads[key][i] = d loss_i / d params[key]

`apply` takes one adapter per row of a batch. Here every row gets a copy of the same adapter, so the loss of row `i`
depends on copy `i` only. Therefore the gradient of the summed losses with respect to copy `i` is the gradient of loss
`i`. The model runs once, on the whole batch, so per-example gradients cost about as much as the gradient of the mean.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.grad import grad
from ..model.batch import num_adapters
from ..private import has_values, in_transform, tree_leaves
from .optim import require_trainable


LossRows = Callable[[dict[str, Tensor], Any], Tensor]


def per_example_grads(
    loss_rows: LossRows, params: Mapping[str, Tensor], batch: Any, *, num_rows: int | None = None
) -> dict[str, Tensor]:
    """The gradient of each row's loss with respect to `params`; leaves are (n, ...), one entry per row of the batch.

    Equals `torch.func.vmap(torch.func.grad(loss), (None, 0))(params, batch)`, where `loss` is the loss of one example.
    It costs one forward and one backward pass of a mixed batch, in which all rows use views of the same adapter. The
    products with the base weights and the projections are those of a plain training step. The result takes `n` times
    the memory of `params`, trained heads included. Works under `torch.func` transforms.

    Args:
        loss_rows: Function `(rows, batch)` that returns one loss per row, (n,). `rows` are params for `apply` as
            `select_adapters` returns them: row `i` of the batch uses entry `i` of each leaf. Loss `i` must depend on
            row `i` only. Padded tokens must not contribute. A mean over tokens must be taken within each row.
        params: Params of one adapter, including trained biases and heads.
        batch: Second argument of `loss_rows`, with the examples along axis 0 of every tensor. An empty batch, which
            Poisson sampling may draw, gives leaves (0, ...) without a call of `loss_rows`.
        num_rows: `n`. Needed only if the batch has no tensors, or if all rows share some of them.

    Raises:
        ValueError: If the tensors of the batch have different numbers of rows, if `loss_rows` does not return (n,)
            losses, if it does not use `rows`, or if `params` can't be trained.

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
        https://arxiv.org/abs/1912.06015, strategy "multi": one copy of the parameters per example. There, each copy is
        a whole model; here, each copy is two vectors per layer.
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
    """The norm of each example's gradient over all leaves, in float64.

    Args:
        grads: From `per_example_grads`, leaves (n, ...).

    Raises:
        ValueError: If `grads` is empty, or is not a dict of floating-point tensors with a common leading axis.

    Example:
        >>> per_example_norms({"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[4.0], [1.0]])})
        tensor([5., 1.], dtype=torch.float64)
    """
    require_grads("grads", grads)
    norms = [torch.linalg.vector_norm(as_matrix(leaf), dim=1, dtype=torch.float64) for leaf in grads.values()]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def require_grads(name: str, grads: Mapping[str, Tensor]) -> None:
    """Raise an error if `grads` is not a dict of floating-point tensors with a common leading axis (n,).

    Raises:
        ValueError: If `grads` is empty, or is not such a dict.

    Example:
        >>> require_grads("grads", {"p": torch.ones(3, 2)})
    """
    if not isinstance(grads, Mapping) or not grads:
        what = type(grads).__name__ if not isinstance(grads, Mapping) else "an empty one"
        raise ValueError(f"{name} must be a dict as from per_example_grads, got {what}.")
    for key, leaf in grads.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"{name}[{key!r}] must be a floating-point tensor of shape (n, ...), got {found}.")
    num_adapters(grads)  # checks the leading axes


def require_finite_rows(name: str, norms: Float[Tensor, " n"]) -> None:
    """Raise an error if the norm of an example's gradient is not finite; under vmap and `torch.compile`, do nothing.

    Raises:
        ValueError: If a norm is infinite or NaN.

    Example:
        >>> require_finite_rows("train", torch.ones(3))
    """
    if has_values(norms) and len(wrong := (~norms.isfinite()).nonzero().flatten().tolist()):
        which = f"{len(wrong)} of {len(norms)} {name}".rstrip()
        raise ValueError(f"the gradients of {which} examples are not finite, first {wrong[0]}.")


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
        found = f"{tuple(losses.shape)} {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss_rows must return one floating-point loss per row, ({n},), got {found}. It must not average "
            "over the rows: use, for example, cross_entropy(..., reduction='none')."
        )
    # Under a transform, `requires_grad` does not show whether the losses depend on the rows.
    if not torch.compiler.is_compiling() and not in_transform() and not losses.requires_grad:
        raise ValueError("the losses of loss_rows do not depend on its first argument: pass these rows to apply.")
    return losses.sum()


def _rows_of(batch: Any) -> int:
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        found = f"its tensors are {sorted(set(shapes))}" if shapes else "it has no tensors"
        raise ValueError(f"the number of rows can't be read from batch, {found}: pass num_rows.")
    return shapes[0][0]
