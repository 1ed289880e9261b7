"""Scale and add adapters.

    scale:  c ΔW = diag(c lambda_b) B diag(lambda_d) A
    add:    Σ c_i diag(b_i) B diag(d_i) A,   a VeRA with the same projections if all d_i, or all b_i, are parallel

In general, a sum of adapters is not a VeRA of rank r. With ids of shape (rows, k), `select_adapters` instead adds the
updates of k adapters in each row, at run time. `pool_adapters` combines adapters into a VeRA of larger rank.

The update of DVoRA is not linear in its vectors, so DVoRA adapters must be folded first (`fold_magnitude`). After
folding, the change of a layer's output is linear in `lambda_b` and in `output_scale - 1`.
"""

import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.keys import (
    BASE_SHARE,
    MAGNITUDE,
    OUTPUT_SCALE,
    SCALES,
    VECTORS,
    adapted_modules,
    is_vector,
    join_key,
    split_key,
)


def scale_adapter(params: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return an adapter whose update is `factor` times the update of `params`. Only `lambda_b` is multiplied.

    Args:
        params: Vectors of one adapter, or stacked vectors. DVoRA adapters must be folded (`fold_magnitude`).
        factor: Any finite number. 0 gives the base model, and -1 the negated update.

    Raises:
        ValueError: If the factor is not finite.
        ValueError: If `params` contain magnitudes, because the update is not linear in a magnitude.
        ValueError: If `params` contain a bias or head of the model. The update of a bias or head is its difference from
            the base model's value, which is unknown here.

    Example:
        >>> scale_adapter({"q.lambda_b": torch.ones(3), "q.lambda_d": torch.ones(2)}, 0.5)["q.lambda_b"]
        tensor([0.5000, 0.5000, 0.5000])
    """
    is_number = isinstance(factor, numbers.Real) or (isinstance(factor, Tensor) and factor.dim() == 0)
    if not is_number or not abs(factor) < float("inf"):
        raise ValueError(f"factor must be a finite number, got {factor!r}.")
    _check_vectors(params)
    scaled = {
        "lambda_b": lambda value: factor * value,
        OUTPUT_SCALE: lambda value: 1 + factor * (value - 1),
        "lambda_d": lambda value: value,
    }
    return {key: scaled[split_key(key)[1]](value) for key, value in params.items()}


def without_update(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return params whose update is zero. Trained parameters of the model itself, such as heads, keep their values.

    Args:
        params: Params of one adapter.

    Example:
        >>> without_update({"q.lambda_b": torch.ones(2), "head.bias": torch.ones(3)})
        {'q.lambda_b': tensor([0., 0.]), 'head.bias': tensor([1., 1., 1.])}
    """
    zero = dict(params)
    for key, value in params.items():
        leaf = split_key(key)[1]
        if leaf in ("lambda_b", *SCALES):
            zero[key] = torch.zeros_like(value)
        if leaf in SCALES:
            zero[join_key(key, BASE_SHARE)] = value.new_ones(())  # added to the output scale
    return zero


def add_adapters(adapters: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return an adapter with the same projections and rank whose update is `Σ weights[i] ΔW_i`.

    A sum of adapters is a VeRA of the same rank if and only if, in every layer, the `lambda_d` of all adapters are
    parallel, or the `lambda_b` of all adapters are parallel. Untrained `lambda_d` are parallel, because all their
    entries are `d_initial`. All adapters must use the same `frozen`; this is not checked.

    Args:
        adapters: Params with the same keys, each of a single adapter.
        weights: One weight per adapter. By default, all weights are 1, as in PEFT with several active adapters.

    Raises:
        ValueError: If the sum in a layer is not a VeRA of the same rank, if keys or shapes differ, or if `weights` does
            not contain exactly one finite number per adapter.
        ValueError: If params contain magnitudes or parameters of the model itself; see `scale_adapter`.

    Example:
        >>> a = {"q.lambda_b": torch.tensor([1.0, 0.0]), "q.lambda_d": torch.full((3,), 0.1)}
        >>> b = {"q.lambda_b": torch.tensor([1.0, 2.0]), "q.lambda_d": torch.full((3,), 0.2)}
        >>> add_adapters([a, b])["q.lambda_b"]
        tensor([3., 4.])
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(weights) != len(adapters):
        raise ValueError(
            f"pass at least one adapter and one weight per adapter, got {len(adapters)} adapters and {len(weights)} "
            "weights."
        )
    if not all(abs(weight) < float("inf") for weight in weights):
        raise ValueError(f"weights must be finite, got {weights}.")
    first = adapters[0]
    for i, params in enumerate(adapters):
        _check_vectors(params)
        shapes = {key: tuple(leaf.shape) for key, leaf in params.items()}
        wanted = {key: tuple(leaf.shape[-1:]) for key, leaf in first.items()}
        if shapes != wanted:
            odd = sorted(shapes.items() ^ wanted.items())[0][0]
            raise ValueError(
                f"{odd!r} has shape {shapes.get(odd)} in adapter {i} and {wanted.get(odd)} in adapter 0: pass "
                "single adapters (not stacked) with the same layers and rank. For other adapters, use pool_adapters."
            )
    total: dict[str, Tensor] = {}
    for module in adapted_modules(first):
        bs, ds = ([params[join_key(module, leaf)] for params in adapters] for leaf in VECTORS)
        # An adapter whose update is zero in this layer is ignored.
        some = [i for i in range(len(adapters)) if weights[i] and bs[i].any() and ds[i].any()] or [0]
        for own, other, names in ((bs, ds, ("lambda_b", "lambda_d")), (ds, bs, ("lambda_d", "lambda_b"))):
            factors = [_multiple(other[i], other[some[0]]) for i in some]
            if None not in factors:
                terms = [weights[i] * f * own[i] for i, f in zip(some, factors, strict=True) if f is not None]
                total |= {
                    join_key(module, names[0]): torch.stack(terms).sum(0),
                    join_key(module, names[1]): other[some[0]],
                }
                break
        else:
            raise ValueError(
                f"the sum is not a VeRA of this rank: in {module!r} neither the lambda_d nor the lambda_b are "
                "parallel. Add the outputs instead (select_adapters with ids of shape (rows, k)), or create a VeRA of "
                "larger rank (pool_adapters)."
            )
    for key in (key for key in first if split_key(key)[1] == OUTPUT_SCALE):
        terms = [weight * (params[key] - 1) for weight, params in zip(weights, adapters, strict=True)]
        total[key] = 1 + torch.stack(terms).sum(0)
    return {key: total[key] for key in first}


def _check_vectors(params: Mapping[str, Tensor]) -> None:
    own = [key for key in params if not is_vector(key)]
    if own:
        raise ValueError(
            f"params has {own[0]!r}, which is not an adapter vector: only adapter vectors can be scaled or added, "
            "because the base model's values of other parameters are unknown. Pass only the adapter vectors."
        )
    if magnitudes := [key for key in params if split_key(key)[1] == MAGNITUDE]:
        raise ValueError(
            f"params has the magnitude {magnitudes[0]!r}, and the update is not linear in a magnitude: pass "
            "fold_magnitude(apply, params, frozen) instead of params."
        )


def _multiple(vector: Tensor, of: Tensor) -> float | None:
    """Return `c` such that `vector = c * of` up to rounding, or None if the vectors are not parallel."""
    if torch.equal(vector, of):
        return 1.0
    i = of.abs().argmax()
    factor = (vector[i].double() / of[i].double()).item()
    fits = (vector.double() - factor * of.double()).abs() <= 4 * torch.finfo(of.dtype).eps * vector.double().abs()
    return factor if fits.all() else None
