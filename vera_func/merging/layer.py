"""Merge an adapter into the weight of one layer, and measure how much of the update the merge retains.

    W' = round(W + ΔW)        kept = <W' - W, ΔW> / ‖ΔW‖²        ΔW = diag(lambda_b) B diag(lambda_d) A

For DVoRA, ΔW here means the whole change of the weight, `m (W + ΔW) / ‖W + ΔW‖ - W` (see `core.dora`). A dequantized
weight lies on the quantization grid. Requantizing `W + ΔW` silently discards updates below half a quantization step.
`merge_report` measures this loss. A 16-bit merge (`merge_dense`) loses much less, and a LoRA (`export_lora`) is exact.
A merged weight can't be turned back into the base weight, so keep `q` if you may need it again.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import private
from ..core.adapter import delta_weight
from ..core.keys import SCALES, VECTORS
from ..core.shapes import require_float
from ..quant.quantize import dequantize, levels, pack, quantize_4bit, quantize_8bit, unpack
from ..quant.value import NO_DATA, Quantized, Quantized4bit, Quantized8bit, flatten
from .calibrate import calibrate_rows, gram as gram_of, stochastic_codes


class MergeReport(NamedTuple):
    """Quality of the merge of one layer.

    Attributes:
        kept: Retained fraction of the update, <W' - W, ΔW> / ‖ΔW‖²: 1 if all of it is retained, 0 if none.
        error: Relative error ‖W' - W - ΔW‖ / ‖ΔW‖. If it is above 1, the rounding noise is larger than the update.
        size: Relative size of the update, ‖ΔW‖ / ‖W‖.
        output_kept: `kept` for the layer's outputs on the given inputs, or None without inputs.
        output_error: `error` for the layer's outputs on the given inputs, or None without inputs.
    """

    kept: float
    error: float
    size: float
    output_kept: float | None = None
    output_error: float | None = None


def merge_quantized(q: Quantized, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> Quantized:
    """Return `W + ΔW`, requantized in the format of `q`. The result is bitwise equal to that of PEFT's merge.

    `q` is not modified; keep it if you may need to undo the merge. If `ΔW` is 0, the result is `q` itself.

    Args:
        q: The base weight (out, in).
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.

    Returns:
        A weight of the same type, block size, nesting and storage dtype.

    Raises:
        ValueError: If the adapter holds NaN or inf, is stacked, or does not fit the weight.

    Example:
        >>> import torch
        >>> from vera_func import init_params, init_projections, quantize_4bit
        >>> q = quantize_4bit(torch.ones(32, 64))
        >>> merged = merge_quantized(q, init_params(4, 32), init_projections(4, 64, 32))
        >>> torch.equal(merged.packed, q.packed)
        True
    """
    if isinstance(q, Tensor):
        raise ValueError(f"the weight {tuple(q.shape)} {q.dtype} is dense: merge it with merge_dense.")
    delta = checked_delta(q, params, frozen)
    if not delta.any():
        return q
    return quantize_like(q, _dequantize_as_peft(q) + delta)


def merge_calibrated(
    q: Quantized4bit,
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    inputs: Float[Tensor, "*tokens in"] | None = None,
    *,
    gram: Float[Tensor, "in in"] | None = None,
    damping: float | None = None,
    max_kappa: float = 4.0,
) -> Quantized4bit:
    """Merge with calibration (GPTQ-style): return a 4-bit weight whose outputs on `inputs` match the adapted layer's.

    `merge_quantized` rounds each weight separately, and discards updates below half a quantization step. Here, codes
    and block scales are chosen jointly, to preserve the layer's outputs; see `calibrate.calibrate_rows` for the
    algorithm. A layer takes seconds. Measure the result on other inputs, with `merge_report(..., inputs, merged=...)`.

    Args:
        q: The base weight; `in` must be a multiple of its block size.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        inputs: Representative inputs of the layer, without padding; several thousand tokens are enough.
        gram: Second moments of the inputs, from `second_moments`, to pass instead of the inputs.
        damping: See `calibrate_rows`. None means 0.01, or 0.1 for fewer than 1,000 tokens.
        max_kappa: Upper bound of the factor by which the update is overshot (see `calibrate_rows`). With 1, the output
            error is minimal, but the update shrinks.

    Returns:
        A 4-bit weight of the same type and block size, whose scales are not double-quantized.

    Raises:
        ValueError: If the weight is not a 4-bit weight, if blocks straddle its rows, or if the inputs do not fit. Also
            as for `merge_quantized`.

    Example:
        >>> import torch
        >>> from vera_func import init_projections, quantize_4bit
        >>> generator = torch.Generator().manual_seed(0)
        >>> q = quantize_4bit(0.02 * torch.randn(32, 64, generator=generator))
        >>> frozen = init_projections(8, 64, 32)
        >>> params = {"lambda_b": torch.full((32,), 1e-3), "lambda_d": torch.ones(8)}
        >>> x = torch.randn(2000, 9, generator=generator) @ torch.randn(9, 64, generator=generator)
        >>> merged = merge_calibrated(q, params, frozen, x)
        >>> rounded, calibrated = merge_report(q, params, frozen, x), merge_report(q, params, frozen, x, merged=merged)
        >>> calibrated.output_error < rounded.output_error
        True
    """
    if not isinstance(q, Quantized4bit):
        raise ValueError(
            "merge_calibrated is for 4-bit weights; an 8-bit grid retains small updates: use merge_quantized."
        )
    out_features, in_features = q.shape
    if (inputs is None) == (gram is None):
        raise ValueError("pass either inputs or their second moments (gram), and not both.")
    if inputs is not None and inputs.shape[-1:] != (in_features,):
        raise ValueError(f"inputs must have shape (*tokens, {in_features}), got {tuple(inputs.shape)}.")
    delta = checked_delta(q, params, frozen).float()
    if not delta.any():
        return q
    _require_whole_blocks(q)
    if damping is None:
        damping = 0.01 if inputs is None or inputs[..., 0].numel() >= 1000 else 0.1
    codes, absmax = unpack(q)
    if gram is None:
        assert inputs is not None
        gram = gram_of(inputs)
    merged = calibrate_rows(
        codes,
        absmax.reshape(out_features, -1),
        delta,
        code=levels(q),
        gram=gram,
        damping=damping,
        max_kappa=max_kappa,
    )
    return pack(q, merged.codes, merged.absmax)


def merge_stochastic(
    q: Quantized4bit, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor], *, generator: torch.Generator
) -> Quantized4bit:
    """Merge with stochastic rounding: each weight of `W + ΔW` becomes one of the two nearest levels, without bias.

    Use this function if there are no inputs to calibrate with. The merge retains most of the update, but adds noise
    that is several times as large as the update.

    Args:
        q: The base weight; `in` must be a multiple of its block size.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        generator: Source of randomness; there is no default.

    Raises:
        ValueError: As for `merge_calibrated`.

    Example:
        >>> import torch
        >>> from vera_func import init_projections, quantize_4bit
        >>> params = {"lambda_b": torch.ones(32), "lambda_d": torch.ones(8)}
        >>> q, frozen = quantize_4bit(torch.ones(32, 64)), init_projections(8, 64, 32)
        >>> merge_stochastic(q, params, frozen, generator=torch.Generator().manual_seed(0)).shape
        (32, 64)
    """
    if not isinstance(q, Quantized4bit):
        raise ValueError(
            "merge_stochastic is for 4-bit weights; an 8-bit grid retains small updates: use merge_quantized."
        )
    delta = checked_delta(q, params, frozen).float()
    if not delta.any():
        return q
    _require_whole_blocks(q)
    absmax = unpack(q)[1].reshape(q.shape[0], -1)
    target = dequantize(q, torch.float32) + delta
    return pack(q, stochastic_codes(target, levels(q), absmax, generator), absmax)


def merge_dense(
    q: Quantized | Tensor,
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "out in"]:
    """Return `W + ΔW` as a dense weight, computed in float32 (float64 if W is float64) and rounded once.

    W is the dequantized weight, because the adapter was trained on it. Do not add the update to the original 16-bit
    weight, which differs from W by the quantization error (about a tenth of its norm): the adapter was not trained for
    that weight.

    Args:
        q: The base weight: either quantized, or a dense tensor of shape (out, in).
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        dtype: Dtype of the result.

    Raises:
        ValueError: As for `merge_quantized`, or if the result overflows `dtype`.

    Example:
        >>> import torch
        >>> from vera_func import init_params, init_projections, quantize_8bit
        >>> merge_dense(quantize_8bit(torch.ones(3, 2)), init_params(4, 3), init_projections(4, 2, 3)).dtype
        torch.bfloat16
    """
    require_float("dtype", dtype)
    delta = checked_delta(q, params, frozen)
    exact = torch.promote_types(q.dtype, torch.float32) if isinstance(q, Tensor) else torch.float32
    base = q.to(exact) if isinstance(q, Tensor) else dequantize(q, exact)
    merged = (base + delta.to(exact)).to(dtype)
    if merged.device.type != "meta" and not merged.isfinite().all():
        raise ValueError(f"the merged weight {tuple(merged.shape)} overflows {dtype}, or the base holds NaN or inf.")
    return merged


def merge_report(
    q: Quantized | Tensor,
    params: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    inputs: Float[Tensor, "tokens in"] | None = None,
    *,
    merged: Quantized | Tensor | None = None,
) -> MergeReport:
    """Measure the retained fraction and the relative error of the update in a merged weight.

    This costs one merge, or none if `merged` is given. If `inputs` are given, it also costs two matrix products.

    Args:
        q: The base weight.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        inputs: Representative inputs of the layer, of shape (tokens, in), to measure the error in the layer's outputs.
        merged: The merged weight to measure, quantized or dense. None means the result of `merge_quantized`.

    Raises:
        ValueError: As for `merge_quantized`. Also if `ΔW` is zero, or if its product with the inputs is, because the
            retained fraction is then undefined.

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
        raise ValueError("the update is zero (lambda_b or lambda_d is 0), so its retained fraction is undefined.")
    base = q.float() if isinstance(q, Tensor) else dequantize(q, torch.float32)
    if merged is None:
        if isinstance(q, Tensor):
            raise ValueError("the weight is dense: pass the merged weight to measure, merged=merge_dense(...).")
        merged = merge_quantized(q, params, frozen)
    if tuple(merged.shape) != tuple(q.shape):
        raise ValueError(f"merged has shape {tuple(merged.shape)}, but the weight has shape {tuple(q.shape)}.")
    change = (merged.float() if isinstance(merged, Tensor) else dequantize(merged, torch.float32)) - base
    report = MergeReport(_kept(change, delta), _error(change, delta), (delta.norm() / base.norm()).item())
    if inputs is None:
        return report
    if inputs.dim() != 2 or inputs.shape[1] != delta.shape[1]:
        raise ValueError(f"inputs must have shape (tokens, {delta.shape[1]}), got {tuple(inputs.shape)}.")
    x = inputs.float()
    actual, exact = x @ change.T, x @ delta.T
    if not 0 < exact.norm() < float("inf"):
        raise ValueError(
            f"the update has no finite, nonzero effect on these inputs {tuple(inputs.shape)}: pass finite inputs, of "
            "which at least one row is not zero."
        )
    return report._replace(output_kept=_kept(actual, exact), output_error=_error(actual, exact))


def quantize_like(q: Quantized, weight: Tensor) -> Quantized:
    """Quantize a weight in the format of `q`.

    Example:
        >>> import torch
        >>> quantize_like(quantize_8bit(torch.ones(2, 3)), torch.zeros(2, 3)).codes.sum()
        tensor(0)
    """
    if isinstance(q, Quantized8bit):
        return quantize_8bit(weight, threshold=q.threshold)
    return quantize_4bit(
        weight.to(q.dtype),
        q.quant_type,
        q.blocksize,
        q.nested is not None,
        quant_storage=q.packed.dtype,
        compute_dtype=q.compute_dtype,
    )


def checked_delta(
    q: Quantized | Tensor, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
) -> Float[Tensor, "out in"]:
    """Return the `delta_weight` of an adapter, after checking that the adapter can be merged into `q`.

    For DVoRA, the result is the whole change of the weight, including the rescaling.

    Raises:
        ValueError: If the adapter holds NaN or inf, is stacked or does not fit the weight, or if the weight is
            offloaded.
    """
    scales = params.keys() & {*SCALES}
    if params.keys() - scales != {*VECTORS} or len(scales) > 1:
        raise ValueError(
            f"params must have the keys 'lambda_b' and 'lambda_d', got {sorted(params)} (for DVoRA also 'magnitude' or "
            "'output_scale'). A weighted sum of adapters can't be merged: merge its adapters one by one."
        )
    for name, tensor in (*params.items(), *frozen.items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} {tuple(tensor.shape)} holds NaN or inf: the adapter is invalid, and nothing was merged."
            )
    out_features, in_features = q.shape
    lambda_b, lambda_d = params["lambda_b"], params["lambda_d"]
    if lambda_b.shape != (out_features,) or lambda_d.dim() != 1:
        raise ValueError(
            f"for a weight {tuple(q.shape)}, lambda_b and lambda_d must have shapes ({out_features},) and (r,), got "
            f"{tuple(lambda_b.shape)} and {tuple(lambda_d.shape)}; split stacked adapters with unstack_adapters, and "
            "merge each."
        )
    if any(params[name].shape != lambda_b.shape for name in scales):
        shapes = {name: tuple(params[name].shape) for name in scales}
        raise ValueError(f"for a weight {tuple(q.shape)}, a scale must have shape ({out_features},), got {shapes}.")
    if any(leaf.is_meta for leaf in ((q,) if isinstance(q, Tensor) else flatten(q)[0])):
        raise ValueError(NO_DATA)
    if not scales:
        return delta_weight(params, frozen, in_features)
    dtype = torch.promote_types(lambda_d.dtype, torch.float32)
    return delta_weight(params, frozen, in_features, q.to(dtype) if isinstance(q, Tensor) else dequantize(q, dtype))


def _require_whole_blocks(q: Quantized4bit) -> None:
    if q.shape[1] % q.blocksize:
        raise ValueError(
            f"blocks of {q.blocksize} straddle the rows of a weight {q.shape}; use merge_dense or export_lora."
        )


def _dequantize_as_peft(q: Quantized) -> Tensor:
    if isinstance(q, Quantized4bit):
        return dequantize(q)
    # bitsandbytes dequantizes int8 weights with two different orders of operations; PEFT's merge uses this order.
    return private.bnb_ops().int8_vectorwise_dequant(q.codes, q.scale)


def _kept(change: Tensor, delta: Tensor) -> float:
    return ((change * delta).sum() / delta.square().sum()).item()


def _error(change: Tensor, delta: Tensor) -> float:
    return ((change - delta).norm() / delta.norm()).item()
