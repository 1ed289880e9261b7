"""Influence of training examples on test examples, from per-example gradients.

    TracIn                 sum over checkpoints c of lr_c <g_i, t_j>
    inverse Fisher         t_j^T (F + damping I)^-1 g_i,    F = mean_i g_i g_i^T

`g_i` and `t_j` are the gradients of the losses of training example `i` and test example `j`, from `per_example_grads`.
A positive influence means that training on example `i` lowers the loss of test example `j`. An example's influence on
itself is largest for outliers, such as mislabelled examples.

Inner products of gradients are computed in float64. An adapter has few parameters, so the gradients of thousands of
examples fit in memory.
"""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.shapes import require_positive
from .per_example import as_matrix, per_example_norms, require_finite_rows, require_grads


def tracin(
    train_grads: Iterable[Mapping[str, Tensor]],
    test_grads: Iterable[Mapping[str, Tensor]],
    learning_rates: Sequence[float],
) -> Float[Tensor, "train test"]:
    """Compute the influence of each training example on each test example by TracIn: `sum_c lr_c <g_i, t_j>`.

    TracIn estimates by how much the steps on a training example lowered the loss of a test example. For SGD, the
    estimate is exact to first order at the given checkpoints.

    Args:
        train_grads: For each checkpoint, the gradients of the training examples, as tensors (train, ...). May be a
            generator.
        test_grads: For each checkpoint, the gradients of the test examples, as tensors (test, ...).
        learning_rates: For each checkpoint, the learning rate times the number of training steps that the checkpoint
            represents.

    Raises:
        ValueError: If the three arguments are empty or differ in length, if the gradients differ in keys or shapes, or
            if a gradient or learning rate is not finite.

    Example:
        >>> train = {"p": torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])}
        >>> tracin([train, train], [{"p": torch.ones(1, 2)}] * 2, [0.1, 0.2])
        tensor([[0.3000],
                [0.6000],
                [0.6000]], dtype=torch.float64)

    Reference:
        TracInCP, section 3 of https://arxiv.org/abs/2002.08484.
    """
    sources = {"train_grads": train_grads, "test_grads": test_grads, "learning_rates": learning_rates}
    for name, given in sources.items():
        if not isinstance(given, Iterable):
            raise ValueError(f"{name} must be a list with one entry per checkpoint, got {type(given).__name__}.")
    influence = None
    try:
        for train, test, rate in zip(train_grads, test_grads, learning_rates, strict=True):
            term = _rate(rate) * _products(train, test)
            if influence is not None and term.shape != influence.shape:
                raise ValueError(
                    "all checkpoints must have the same examples, but the numbers of (train, test) examples are "
                    f"{tuple(influence.shape)} at one checkpoint and {tuple(term.shape)} at another."
                )
            influence = term if influence is None else influence + term
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ValueError(
            "train_grads, test_grads and learning_rates must have one entry per checkpoint, but their lengths differ."
        ) from error
    if influence is None:
        raise ValueError("train_grads, test_grads and learning_rates are empty: pass at least one checkpoint.")
    return influence


def fisher_influence(
    train_grads: Mapping[str, Tensor], test_grads: Mapping[str, Tensor], *, damping: float
) -> Float[Tensor, "train test"]:
    """Compute influences with the inverse of the empirical Fisher matrix: `t_j^T (F + damping I)^-1 g_i`.

    Divided by the number of training examples, the influence estimates by how much test loss `j` increases if the
    adapter is retrained without training example `i`. The estimate is of first order, with the Fisher matrix in place
    of the Hessian. The inverse is exact: by the Woodbury identity, solving a (train, train) system replaces solving a
    (parameters, parameters) system.

    Args:
        train_grads: Gradients of the training examples; each tensor has shape (train, ...).
        test_grads: Gradients of the test examples; each tensor has shape (test, ...).
        damping: Positive number, added to the diagonal of the Fisher matrix. Choose at least the mean eigenvalue of the
            Fisher matrix, which is the mean of `|g_i|^2` divided by the number of parameters. Smaller values give too
            much weight to directions in which few examples have a gradient.

    Raises:
        ValueError: If the gradients differ in keys or shapes, if a gradient is not finite, if `damping` is not
            positive, or if `damping` is so small that the system is singular.

    Example:
        >>> train = {"p": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
        >>> fisher_influence(train, train, damping=0.5)
        tensor([[1.0000, 0.0000],
                [0.0000, 1.6000]], dtype=torch.float64)

    Reference:
        Equation 2 of https://arxiv.org/abs/1703.04730, with the opposite sign.
    """
    require_positive("damping", damping)
    kernel = _products(train_grads, train_grads)
    if not len(kernel):
        raise ValueError("train_grads has no examples, so the Fisher matrix is undefined: pass at least one example.")
    # (G^T G / n + d I)^-1 G^T = G^T (G G^T / n + d I)^-1
    system = kernel / len(kernel) + damping * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    products = _products(train_grads, test_grads)
    try:
        return torch.linalg.solve(system, products)
    except torch.linalg.LinAlgError:
        mean = kernel.diagonal().mean().item()
        raise ValueError(
            f"the Fisher matrix is singular with damping={damping}: pass a larger damping. The mean squared norm of "
            f"train gradients is {mean:.3g}."
        ) from None


def _rate(value: Any) -> Any:
    number = not value.dim() if isinstance(value, Tensor) else isinstance(value, numbers.Real)
    if not number or not abs(value) < float("inf"):
        raise ValueError(f"learning_rates must be finite numbers, got {value!r}.")
    return value


def _products(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Float[Tensor, "n m"]:
    """All inner products of the gradients of two sets of examples, in float64."""
    for name, grads in (("train", one), ("test", other)):
        require_grads(f"{name}_grads", grads)
        require_finite_rows(name, per_example_norms(grads))
    if odd := sorted(one.keys() ^ other.keys()):
        raise ValueError(f"train_grads and test_grads must have the same keys, but only one of them has {odd[0]!r}.")
    for key, leaf in one.items():
        if leaf.shape[1:] != other[key].shape[1:]:
            raise ValueError(
                f"train_grads[{key!r}] has shape {tuple(leaf.shape)}, but test_grads[{key!r}] has shape "
                f"{tuple(other[key].shape)}: only the sizes of axis 0 may differ."
            )
    pairs = ((as_matrix(leaf).double(), as_matrix(other[key]).double()) for key, leaf in one.items())
    return sum((a @ b.T for a, b in pairs), torch.zeros((), dtype=torch.float64, device="cpu"))
