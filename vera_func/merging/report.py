"""Measure how much of an adapter's update a merged weight retains.

    kept = <W' - W, ΔW> / ‖ΔW‖²        error = ‖W' - W - ΔW‖ / ‖ΔW‖

`W` is the base weight, `W'` the merged weight, and `ΔW` the update of `layer`. For `output_kept` and `output_error`,
which compare the layer's outputs on inputs `X`, replace `W' - W` in the formulas by `(W' - W) X`, and `ΔW` by `ΔW X`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.shapes import described, without_autocast
from ..quant.value import Quantized, Quantized4bit, Quantized8bit
from .layer import checked_delta, dense, merge_quantized


class MergeReport(NamedTuple):
    """Quality of the merge of one layer.

    Attributes:
        kept: Retained fraction of the update, <W' - W, ΔW> / ‖ΔW‖²: 1 for the full update, 0 for no update.
        error: Relative error ‖W' - W - ΔW‖ / ‖ΔW‖. Above 1, the error is larger than the update.
        size: Relative size of the update, ‖ΔW‖ / ‖W‖.
        output_kept: Retained fraction of the change of the layer's outputs on the given inputs, or None without inputs.
        output_error: Relative error of the change of the layer's outputs on the given inputs, or None without inputs.
    """

    kept: float
    error: float
    size: float
    output_kept: float | None = None
    output_error: float | None = None


def merge_report(
    q: Quantized | Tensor,
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    inputs: Float[Tensor, "*tokens in"] | None = None,
    *,
    merged: Quantized | Tensor | None = None,
) -> MergeReport:
    """Measure the retained fraction and the relative error of the update in a merged weight.

    This costs one merge unless `merged` is given, and two matrix products if `inputs` are given.

    Args:
        q: The base weight.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        inputs: Representative inputs of the layer, of shape (*tokens, in), to measure the error in the layer's outputs.
        merged: The merged weight to measure, quantized or dense. None means the result of `merge_quantized`.

    Raises:
        ValueError: If the adapter holds NaN or inf, is stacked, or does not fit `q`. If `ΔW` is zero, or has no effect
            on `inputs`: the retained fraction is then undefined.

    Example:
        >>> import torch
        >>> from vera_func import init_projections, quantize_4bit
        >>> q = quantize_4bit(0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        >>> params = {"lambda_b": torch.full((64,), 1e-4), "lambda_d": torch.ones(8)}
        >>> merge_report(q, params, init_projections(8, 64, 64)).kept < 0.2
        True
    """
    delta = checked_delta(q, params, frozen).float()
    if not delta.any():
        raise ValueError("the update is zero (lambda_b or lambda_d is 0), so the retained fraction is undefined.")
    base = dense(q, torch.float32)
    if merged is None:
        if isinstance(q, Tensor):
            raise ValueError("the weight is dense, so merged is required: pass merged=merge_dense(...).")
        merged = merge_quantized(q, params, frozen)
    if not isinstance(merged, Tensor | Quantized4bit | Quantized8bit):
        raise ValueError(f"merged must be a weight of shape {tuple(q.shape)}, got {type(merged).__name__}.")
    if tuple(merged.shape) != tuple(q.shape):
        raise ValueError(f"merged has shape {tuple(merged.shape)}, but the weight has shape {tuple(q.shape)}.")
    change = dense(merged, torch.float32) - base
    report = MergeReport(_kept(change, delta), _error(change, delta), (delta.norm() / base.norm()).item())
    if inputs is None:
        return report
    in_features = delta.shape[1]
    if not isinstance(inputs, Tensor) or inputs.shape[-1:] != (in_features,):
        raise ValueError(f"inputs must have shape (*tokens, {in_features}), got {described(inputs)}.")
    x = inputs.float()
    with without_autocast(x.device):
        actual, exact = x @ change.T, x @ delta.T
    if not 0 < exact.norm() < float("inf"):
        raise ValueError(
            f"the update's effect on the inputs is zero or not finite (inputs of shape {tuple(inputs.shape)}): pass "
            "finite inputs with at least one nonzero row."
        )
    return report._replace(output_kept=_kept(actual, exact), output_error=_error(actual, exact))


def _kept(change: Tensor, delta: Tensor) -> float:
    return ((change * delta).sum() / delta.square().sum()).item()


def _error(change: Tensor, delta: Tensor) -> float:
    return ((change - delta).norm() / delta.norm()).item()
