"""Calibrated (GPTQ-style) merging onto a 4-bit grid: codes and scales that preserve the layer's outputs.

    minimise  ‖(W + κ ΔW) X - Q X‖²  =  Σ_rows (t - q) H (t - q)ᵀ,  H = X Xᵀ,    over  q = absmax_block · code[codes]

Here t is a row of the target `W + κ ΔW`, and q is a row of the merged weight `Q`. `W` lies on the grid, so rounding `W
+ ΔW` weight by weight returns `W` wherever `ΔW` is below half a quantization step. For the inputs `X` of the layer,
other points of the grid give outputs much closer to those of `W + ΔW`. Calibration optimizes the codes and the scale of
each block. A least-squares fit shrinks the update, so the update is first multiplied by the overshoot `κ`, a factor of
at least 1. The effect `ΔW X` is then retained in full, and the remaining error is noise.

The functions of this module do not depend on the packing of 4-bit codes, on `nn.Module` or on VeRA. `code` is the table
of levels, in any order, with shape (levels,). `codes` are indices into `code`, uint8, with shape (out, in). `absmax`
are the scales of blocks, float32, with shape (out, in / blocksize).
"""

from numbers import Real
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..core.shapes import described, require_finite, without_autocast


Codes = UInt8[Tensor, "out in"]
Absmax = Float[Tensor, "out blocks"]
Weight = Float[Tensor, "out in"]
Gram = Float[Tensor, "in in"]
Table = Float[Tensor, " levels"]

_STEPS = 64  # most changes of codes in each row


class Calibrated(NamedTuple):
    """A merged weight on the grid, with the retained fraction and the error on the calibration inputs.

    Attributes:
        codes: Indices of the levels, of shape (out, in), uint8.
        absmax: Scales of the blocks, of shape (out, blocks).
        kappa: The overshoot κ: codes and scales were fitted to `W + kappa ΔW`.
        kept: Result of `output_kept` for the merged weight.
        error: Result of `output_error` for the merged weight.
    """

    codes: Codes
    absmax: Absmax
    kappa: float
    kept: float
    error: float


def gram(inputs: Float[Tensor, "*tokens in"], weights: Float[Tensor, "*tokens"] | None = None) -> Gram:
    """Compute second moments `H = Σ w x xᵀ / Σ w` of a layer's inputs, in float32 and without damping.

    This costs `in²` multiply-adds per token. To combine several batches, average their second moments, each weighted by
    the batch's `Σ w`. To weight errors by their effect on a scalar readout of the model, set the weight of each token
    to the squared norm of the readout's gradient with respect to the layer's output.

    Args:
        inputs: Inputs of the layer, of shape (*tokens, in). Padding must be left out or have weight 0.
        weights: One nonnegative weight per token. None gives all tokens equal weight.

    Raises:
        ValueError: If the shapes differ, if all weights are 0, if a weight is negative, or if a value is not finite.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([3.0, 1.0]))
        tensor([[3.0000, 1.5000],
                [1.5000, 3.0000]])
    """
    if not isinstance(inputs, Tensor) or not inputs.dim() or not isinstance(weights, Tensor | None):
        given = f"{described(inputs)} and {described(weights)}"
        raise ValueError(f"inputs and weights must be tensors (*tokens, in) and (*tokens), got {given}.")
    w = torch.ones_like(inputs[..., 0], dtype=torch.float32) if weights is None else weights.float()
    shapes = f"inputs {tuple(inputs.shape)} and weights {tuple(w.shape)}"
    if w.shape != inputs.shape[:-1] or (w < 0).any() or not w.any():
        raise ValueError(f"{shapes}: pass one weight per token, nonnegative and not all zero.")
    for name, tensor in (("inputs", inputs), ("weights", w)):
        require_finite(f"{name} {tuple(tensor.shape)}", tensor, "pass finite values for every token")
    x, w = inputs.reshape(-1, inputs.shape[-1]).float(), w.reshape(-1, 1) / w.sum()
    with without_autocast(x.device):
        return x.T @ (w * x)


def output_error(change: Weight, delta: Weight, gram: Gram) -> float:
    """Compute the relative output error `‖(Q - W - ΔW) X‖ / ‖ΔW X‖`: 0 for an exact merge, 1 if the update is lost.

    The result is 0 if `ΔW X` is zero.

    Args:
        change: `Q - W`, the change of the weight by the merge.
        delta: `ΔW`, the intended change.
        gram: Second moments `H` of the inputs, preferably of inputs that were not used for calibration.

    Example:
        >>> output_error(torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3))
        1.0
    """
    added, left = _inner(delta, delta, gram), _inner(change - delta, change - delta, gram)
    return (max(left, 0.0) / added) ** 0.5 if added > 0 else 0.0  # rounding may leave a little less than zero


def output_kept(change: Weight, delta: Weight, gram: Gram) -> float:
    """Compute the retained fraction of the update's effect, `⟨(Q - W) X, ΔW X⟩ / ‖ΔW X‖²`, or 1 if `ΔW X` is zero.

    The arguments are those of `output_error`. With the identity as `gram`, the result is the retained fraction of `ΔW`
    itself.

    Example:
        >>> output_kept(torch.full((2, 3), 0.5), torch.ones(2, 3), torch.eye(3))
        0.5
    """
    added = _inner(delta, delta, gram)
    return _inner(change, delta, gram) / added if added > 0 else 1.0


def stochastic_codes(target: Weight, code: Table, absmax: Absmax, generator: torch.Generator) -> Codes:
    """Round each weight to one of its two neighbouring levels at random, without calibration inputs.

    The expected value is `target`, except that targets beyond the outermost levels are clipped. For weights between two
    levels, rounding adds noise with a standard deviation of up to half a quantization step. The error is therefore
    several times the error of `calibrate_rows`.

    Args:
        target: The weight to round, `W + ΔW`.
        code: The levels.
        absmax: The scales of the blocks, which stay the same.
        generator: Random number generator (required).

    Raises:
        ValueError: If blocks straddle rows.

    Example:
        >>> target, absmax, code = torch.full((1, 1000), 0.3), torch.ones(1, 1), torch.tensor([0.0, 1.0])
        >>> codes = stochastic_codes(target, code, absmax, torch.Generator().manual_seed(0))
        >>> round(codes.float().mean().item(), 1)
        0.3
    """
    levels, numbers = _levels(code.to(target))
    value = target / absmax.to(target).repeat_interleave(_blocksize(target, absmax), dim=1)
    value = value.nan_to_num(0.0).clamp(levels[0], levels[-1])  # a block of zeros has no scale
    upper = torch.searchsorted(levels, value).clamp(min=1)
    up = (value - levels[upper - 1]) / (levels[upper] - levels[upper - 1])
    draw = torch.rand(value.shape, generator=generator, dtype=torch.float32, device=generator.device).to(value)
    return numbers[torch.where(draw < up, upper, upper - 1)].to(torch.uint8)


def calibrate_rows(
    codes: Codes, absmax: Absmax, delta: Weight, *, code: Table, gram: Gram, damping: float = 0.01, max_kappa: float = 4
) -> Calibrated:
    """Find codes and scales of a weight Q with `Q X ≈ (W + ΔW) X`, for a base weight `W = absmax_block · code[codes]`.

    A fit is the optimization for one overshoot `κ`. In a fit, each row is optimized from two starting points,
    and the better result is taken. The first starting point is Babai's nearest plane (GPTQ in the order of decreasing
    `diag H`). The second starting point is the result of the previous fit, or the base weight in the first fit. An
    optimization has at most 64 steps. A step changes one code of the row by one level, and refits all scales of the row
    by least squares. The step selects the change with the smallest estimated error after the refit. `κ` starts at 1 and
    is interpolated until the retained fraction is within 0.02 of 1, in at most five fits.

    A fit costs about `8 out in²` multiply-adds, and a step of all rows costs `6 out in² / blocksize`. Temporary tensors
    take a few times 128 MB. The result is deterministic. With `max_kappa=1`, the error ‖(W + ΔW) X - Q X‖ of each row,
    computed from the damped `gram`, is at most the error of the unchanged weight, `Q = W`.

    Args:
        codes: The codes of the base weight.
        absmax: The scales of the base weight.
        delta: The update to merge, `ΔW`.
        code: The table of levels, in any order. Levels need not be distinct.
        gram: Second moments `H` of the calibration inputs.
        damping: Fraction of the mean diagonal entry of `gram` that is added to every diagonal entry. Use 0.1 for fewer
            than about 1,000 calibration tokens.
        max_kappa: Upper bound of the overshoot. With `max_kappa=1`, the output error is minimal, but the update
            shrinks.

    Returns:
        Codes, scales, the overshoot, and `kept` and `error` on the calibration inputs. On other inputs, `kept` and
        `error` are worse: by 0.01 to 0.02 with seven calibration tokens per input feature, and by more with fewer
        tokens. Rows in which `delta` is zero are returned unchanged.

    Raises:
        ValueError: If the shapes do not match, if a block straddles rows, or if a value is NaN, infinite or out of
            range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(999, 5, generator=generator) @ torch.randn(5, 32, generator=generator)
        >>> codes = torch.randint(16, (7, 32), generator=generator).byte()
        >>> delta = 0.02 * torch.randn(7, 32, generator=generator)
        >>> merged = calibrate_rows(codes, torch.ones(7, 2), delta, code=torch.linspace(-1, 1, 16), gram=gram(x))
        >>> abs(merged.kept - 1) < 0.05 and merged.error < 0.3
        True

    Reference:
        GPTQ: https://arxiv.org/abs/2210.17323. GPTQ as Babai's nearest plane: https://arxiv.org/abs/2507.18553.
        Greedy descent on codes (CDQuant): https://arxiv.org/abs/2406.17542. `κ` and the refit of the scales in each
        step are not from the papers above.
    """
    blocksize = _blocksize(codes, absmax)
    _check(codes, damping, max_kappa, absmax=absmax, delta=delta, code=code, gram=gram)
    rows = delta.ne(0).any(1).nonzero()[:, 0]
    if len(rows) == 0:
        return Calibrated(codes.clone(), absmax.clone(), kappa=1.0, kept=1.0, error=0.0)
    levels, numbers = _levels(code.float())
    gram = gram.float()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    order = gram.diagonal().argsort(descending=True, stable=True)
    root, failed = torch.linalg.cholesky_ex(damped[order][:, order].double())
    if failed:
        raise ValueError("gram must have no negative eigenvalue: pass the mean of x xᵀ over the inputs x.")
    inverse = torch.cholesky_inverse(root)
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    problem = _Problem(damped, order, factor, levels, (levels[1:] + levels[:-1]) / 2, blocksize)
    point = _Point(torch.searchsorted(levels, code.float())[codes[rows].long()], absmax[rows].float())
    weight, update, kappa = problem.weight(point), delta[rows].float(), 1.0
    tried: list[_Trial] = []
    while len(tried) < 5:
        # Each fit starts from the result of the last fit, and therefore needs few steps.
        point = _fit(problem, weight + kappa * update, point)
        change = problem.weight(point) - weight
        kept = output_kept(change, update, gram)
        tried.append(_Trial(kappa, kept, output_error(change, update, gram), point))
        previous, kappa = kappa, _next_kappa(tried, max_kappa)
        if abs(kept - 1) <= 0.02 or abs(kappa - previous) < 1e-3:
            break
    kappa, kept, error, point = min(tried, key=lambda trial: abs(trial.kept - 1))
    codes = codes.index_copy(0, rows, numbers[point.indices].to(codes.dtype))
    return Calibrated(codes, absmax.index_copy(0, rows, point.absmax.to(absmax.dtype)), kappa, kept, error)


class _Point(NamedTuple):
    indices: Tensor  # (rows, in), int64; indices of the levels in ascending order
    absmax: Tensor  # (rows, blocks)


class _Trial(NamedTuple):  # the fit of one overshoot
    kappa: float
    kept: float
    error: float
    point: _Point


class _Problem(NamedTuple):  # what all rows share
    gram: Tensor  # (in, in), damped
    order: Tensor  # order in which the nearest plane visits the columns
    factor: Tensor  # the upper Cholesky factor of gram⁻¹, with columns in this order
    levels: Tensor  # ascending, distinct
    edges: Tensor  # midpoints of neighbouring levels, where rounding changes
    blocksize: int

    def weight(self, point: _Point) -> Tensor:
        return self.levels[point.indices] * point.absmax.repeat_interleave(self.blocksize, dim=1)

    def error(self, target: Tensor, point: _Point) -> Tensor:
        residual = target - self.weight(point)
        return (residual @ self.gram * residual).sum(1)

    def sums(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.blocksize)).sum(2)  # (rows, blocks)


def _fit(problem: _Problem, target: Tensor, start: _Point) -> _Point:
    """Return for each row the best of `start`, the descent from `start`, and the descent from the nearest plane."""
    best, lowest = start, problem.error(target, start)
    plane = _nearest_plane(problem, target, start.absmax)
    chunk = max(1, 2**25 // (target.shape[1] * start.absmax.shape[1]))  # limits each tensor of _steps to 128 MB
    for point in (plane, start):
        parts = zip(target.split(chunk), point.indices.split(chunk), point.absmax.split(chunk), strict=True)
        done = [_steps(problem, rows, _Point(*leaves)) for rows, *leaves in parts]
        candidate = _Point(*map(torch.cat, zip(*done, strict=True)))
        error = problem.error(target, candidate)
        better = (error < lowest)[:, None]
        best = _Point(*(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)))
        lowest = torch.minimum(error, lowest)
    return best


def _nearest_plane(problem: _Problem, target: Tensor, absmax: Tensor) -> _Point:
    """Round column by column; later columns compensate for the rounding errors of earlier columns (GPTQ)."""
    factor, diagonal = problem.factor, problem.factor.diagonal().tolist()
    # Columns come first, so that the loop reads and writes contiguous memory.
    left, scale = target.T[problem.order], absmax.T[problem.order // problem.blocksize]  # (in, rows)
    index = torch.empty_like(left, dtype=torch.long)
    for begin in range(0, len(left), 64):
        end = min(begin + 64, len(left))
        block, errors = left[begin:end].clone(), torch.empty_like(left[begin:end])
        for j, i in enumerate(range(begin, end)):
            index[i] = torch.bucketize(block[j] / scale[i].clamp(min=1e-30), problem.edges)
            errors[j] = (block[j] - problem.levels[index[i]] * scale[i]) / diagonal[i]
            block.addr_(factor[i, begin:end], errors[j], alpha=-1)
        left[end:] -= factor[begin:end, end:].T @ errors
    return _Point(index[problem.order.argsort()].T.contiguous(), absmax)


def _shift(problem: _Problem, level: Tensor, normal: Tensor, gradient: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Newton step of `absmax`, (rows, blocks), and the Cholesky factor of the normal equations."""
    # The ridge penalizes the step, not the solution: it slows directions of small curvature, and adds no bias.
    ridge = 1e-5 * normal.diagonal(dim1=1, dim2=2) + 1e-6 * problem.blocksize * problem.gram.diagonal().mean()
    factor, _ = torch.linalg.cholesky_ex((normal + torch.diag_embed(ridge)).double())
    shift = torch.cholesky_solve(problem.sums(level * gradient).double()[..., None], factor)[..., 0].float()
    # If any absmax of a row would become negative, all of this row's absmax stay unchanged.
    return shift.masked_fill((absmax + shift < 0).any(1, keepdim=True), 0), factor.float()


def _steps(problem: _Problem, target: Tensor, point: _Point) -> _Point:
    """Descend greedily: each step makes the best change of one code in each row, and refits the scales."""
    gram, levels, size = problem.gram, problem.levels, problem.blocksize
    diagonal, last, columns = gram.diagonal(), len(levels) - 1, target.shape[1]
    best = _Point(point.indices.clone(), point.absmax.clone())
    index, absmax, level = point.indices.clone(), point.absmax, levels[point.indices]
    # The decrease of the gradient per unit of each block's absmax, and the normal equations of the absmax.
    pairs = zip(level.split(size, dim=1), gram.split(size), strict=True)
    products = torch.stack([own @ gram_rows for own, gram_rows in pairs], dim=1)  # (rows, blocks, in)
    normal = torch.stack([problem.sums(p * level) for p in products.unbind(1)], dim=1)  # (rows, blocks, blocks)
    gradient = (target - problem.weight(point)) @ gram
    error, rows = problem.error(target, point), torch.arange(len(target), device=target.device)
    for count in range(_STEPS + 1):
        shift, factor = _shift(problem, level, normal, gradient, absmax)
        absmax = absmax + shift
        gradient = gradient - (shift[:, None] @ products)[:, 0]
        new = ((target - level * absmax.repeat_interleave(size, dim=1)) * gradient).sum(1)
        on = new < error * (1 - 1e-5 if count else 1 + 1e-5)  # also False for NaN, from a failed factorization
        best.indices[rows[on]], best.absmax[rows[on]] = index[on], absmax[on]
        if count == _STEPS or not on.any():
            break
        if not on.all():  # rows that did not improve are done
            target, index, level, absmax, products, normal, factor, gradient, new, rows = (
                t[on] for t in (target, index, level, absmax, products, normal, factor, gradient, new, rows)
            )
        error, scale = new, absmax.repeat_interleave(size, dim=1)
        # Refitting absmax partly undoes a step and lowers its curvature: the Schur complement of the normal equations.
        relief = torch.linalg.solve_triangular(factor, products, upper=False).square().sum(1)
        curvature = torch.maximum(diagonal - relief, 0.05 * diagonal)
        moves = [(levels[(index + step).clamp(0, last)] - level) * scale for step in (1, -1)]  # 0 beyond the table
        choice = torch.cat([(2 * gradient - move * curvature) * move for move in moves], dim=1).argmax(1)
        row, j, b = torch.arange(len(choice), device=choice.device), choice % columns, choice % columns // size
        index[row, j] = (index[row, j] + torch.where(choice < columns, 1, -1)).clamp(0, last)
        rise = levels[index[row, j]] - level[row, j]
        level[row, j] += rise
        gradient -= gram[j] * (rise * absmax[row, b])[:, None]
        across = rise[:, None] * products[row, :, j]
        normal[row, b] += across
        normal[row, :, b] += across
        normal[row, b, b] += rise.square() * diagonal[j]
        products[row, b] += rise[:, None] * gram[j]
    return best


def _next_kappa(tried: list[_Trial], largest: float) -> float:
    """Return the next overshoot, interpolated between retained fractions below and above 1, or extrapolated."""
    below, above = ([trial for trial in tried if (trial.kept < 1) is side] for side in (True, False))
    if not below or not above:
        last = tried[-1]
        return min(max(last.kappa / max(last.kept, 0.1) ** 0.8, 1.0), largest)  # a power that fits real layers
    low, high = max(below, key=lambda trial: trial.kept), min(above, key=lambda trial: trial.kept)
    return low.kappa + (high.kappa - low.kappa) * (1 - low.kept) / (high.kept - low.kept)


def _levels(code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct levels in ascending order, and the index of each level in `code` (fp4 has two zeros)."""
    levels, numbers = code.sort(stable=True)
    first = torch.diff(levels, prepend=levels[:1] - 1) > 0
    return levels[first], numbers[first]


def _inner(left: Tensor, right: Tensor, gram: Tensor) -> float:
    with without_autocast(left.device):
        return (left.float() @ gram.float() * right.float()).sum(dtype=torch.float64).item()


def _blocksize(weight: Tensor, absmax: Tensor) -> int:
    shapes = f"weight {tuple(weight.shape)} and absmax {tuple(absmax.shape)}"
    if weight.ndim != 2 or absmax.ndim != 2 or len(weight) != len(absmax):
        raise ValueError(f"{shapes} must have shapes (out, in) and (out, in / blocksize).")
    if absmax.shape[1] == 0 or weight.shape[1] % absmax.shape[1]:
        raise ValueError(
            f"{shapes}: blocks must not straddle rows. Use a blocksize that divides {weight.shape[1]}, or merge_dense."
        )
    return weight.shape[1] // absmax.shape[1]


def _check(codes: Tensor, damping: float, max_kappa: float, **floats: Tensor) -> None:
    for name, shape in {"delta": tuple(codes.shape), "gram": (codes.shape[1], codes.shape[1])}.items():
        if not isinstance(floats[name], Tensor) or floats[name].shape != shape:
            raise ValueError(
                f"for codes {tuple(codes.shape)}, {name} must have shape {shape}, got {described(floats[name])}."
            )
    for name, tensor in floats.items():
        require_finite(name, tensor, "pass finite values")
    if codes.max() >= len(floats["code"]):
        raise ValueError(
            f"codes contain the index {codes.max()}, but the table `code` has only {len(floats['code'])} levels."
        )
    if not all(isinstance(number, Real) for number in (damping, max_kappa)) or not damping > 0 or not max_kappa >= 1:
        raise ValueError(f"damping must be positive and max_kappa at least 1, got {damping!r} and {max_kappa!r}.")
    if not torch.allclose(floats["gram"], floats["gram"].T, rtol=1e-3, atol=1e-3 * floats["gram"].abs().max().item()):
        raise ValueError("gram must be symmetric: pass the mean of x xᵀ over the inputs x.")
    if not floats["gram"].diagonal().sum() > 0:
        raise ValueError("gram must not be zero: pass calibration inputs that are not all zero.")
