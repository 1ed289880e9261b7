"""Merge an adapter into the weight of one layer.

    W' = round(W + ΔW)        ΔW = diag(lambda_b) B diag(lambda_d) A

For DVoRA with the magnitude `m`, this module uses `m (W + ΔW) / ‖W + ΔW‖ - W` in place of ΔW (see `core.dora`). A
dequantized weight lies on the quantization grid. Requantizing `W + ΔW` silently discards updates below half a
quantization step. `merge_report` measures this loss. A 16-bit merge (`merge_dense`) loses much less, and a LoRA
(`export_lora`) is exact. A merged weight can't be converted back to the base weight, so keep `q` for unmerging.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from .. import private
from ..core.adapter import delta_weight
from ..core.keys import SCALES, VECTORS
from ..core.shapes import described, require_dict, require_finite, require_float, require_single, without_autocast
from ..quant.quantize import dequantize, levels, pack, quantize_4bit, quantize_8bit, unpack
from ..quant.value import NO_DATA, Quantized, Quantized4bit, Quantized8bit, flatten
from .calibrate import calibrate_rows, gram as gram_of, stochastic_codes


def merge_quantized(q: Quantized, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> Quantized:
    """Return `W + ΔW`, requantized in the format of `q`. The result is bitwise equal to that of PEFT's merge.

    `q` is not modified; keep `q` for unmerging. If `ΔW` is 0, the result is `q` itself.

    Args:
        q: The base weight (out, in).
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.

    Returns:
        A weight with the type, block size, double quantization and storage dtype of `q`.

    Raises:
        ValueError: If the adapter holds NaN or inf, is stacked, or does not fit `q`, or if `q` is dense.

    Example:
        >>> import torch
        >>> from vera_func import init_params, init_projections, quantize_4bit
        >>> q = quantize_4bit(torch.ones(32, 64))
        >>> merged = merge_quantized(q, init_params(4, 32), init_projections(4, 64, 32))
        >>> torch.equal(merged.packed, q.packed)
        True
    """
    if isinstance(q, Tensor):
        raise ValueError(f"the weight {tuple(q.shape)} {q.dtype} is dense: use merge_dense.")
    delta = checked_delta(q, params, frozen)
    if not delta.any():
        return q
    if not params.keys() & {*SCALES}:  # PEFT rounds the update to the dtype of the adapter
        delta = delta.to(torch.promote_types(params["lambda_b"].dtype, frozen["vera_B"].dtype))
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
    """Return a 4-bit weight, merged with calibration (GPTQ-style) to match the adapted layer's outputs on `inputs`.

    `merge_quantized` rounds each weight separately, and discards updates below half a quantization step.
    `merge_calibrated` chooses codes and block scales jointly, to preserve the layer's outputs; see
    `calibrate.calibrate_rows` for the algorithm. A layer takes seconds. Measure the result on other inputs, with
    `merge_report(..., inputs, merged=...)`.

    Args:
        q: The base weight (out, in); `in` must be a multiple of the block size.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        inputs: Representative inputs of the layer, without padding. Several thousand tokens are enough.
        gram: Second moments from `second_moments`, in place of `inputs`.
        damping: See `calibrate_rows`. None means a damping of 0.01, or of 0.1 for fewer than 1,000 tokens.
        max_kappa: Upper bound of the overshoot (see `calibrate_rows`). With `max_kappa=1`, the output error is minimal,
            but the update shrinks.

    Returns:
        A 4-bit weight of the type and block size of `q`. The scales are not double-quantized.

    Raises:
        ValueError: If `q` is not a 4-bit weight, if blocks straddle its rows, if `inputs` or `gram` is invalid, or if
            the adapter holds NaN or inf, is stacked, or does not fit `q`.

    Example:
        >>> import torch
        >>> from vera_func import init_projections, merge_report, quantize_4bit
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
            f"merge_calibrated needs a 4-bit weight, got {type(q).__name__}: use merge_quantized or merge_dense."
        )
    out_features, in_features = q.shape
    if (inputs is None) == (gram is None):
        given = "neither" if inputs is None else "both"
        raise ValueError(f"pass either inputs or gram (the second moments of the inputs), got {given}.")
    if inputs is not None and (not isinstance(inputs, Tensor) or inputs.shape[-1:] != (in_features,)):
        raise ValueError(f"inputs must have shape (*tokens, {in_features}), got {described(inputs)}.")
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
    with without_autocast(delta.device):
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

    Use this function if no calibration inputs are available. The merge retains most of the update, but adds noise that
    is several times as large as the update.

    Args:
        q: The base weight (out, in); `in` must be a multiple of the block size.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        generator: Random number generator (required).

    Raises:
        ValueError: If `q` is not a 4-bit weight, if blocks straddle its rows, or if the adapter holds NaN or inf, is
            stacked, or does not fit `q`.

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
            f"merge_stochastic needs a 4-bit weight, got {type(q).__name__}: use merge_quantized or merge_dense."
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

    W is the dequantized weight, on which the adapter was trained. Do not add ΔW to the original 16-bit weight: the
    original weight differs from W by the quantization error (for 4 bits, about a tenth of the norm of W).

    Args:
        q: The base weight: either quantized, or a dense tensor of shape (out, in).
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`; for DVoRA also `"magnitude"` of shape (out,).
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        dtype: Dtype of the result.

    Raises:
        ValueError: If the adapter holds NaN or inf, is stacked, or does not fit `q`, or if the result overflows
            `dtype`.

    Example:
        >>> import torch
        >>> from vera_func import init_params, init_projections, quantize_8bit
        >>> merge_dense(quantize_8bit(torch.ones(3, 2)), init_params(4, 3), init_projections(4, 2, 3)).dtype
        torch.bfloat16
    """
    require_float("dtype", dtype)
    delta = checked_delta(q, params, frozen)
    base = dense(q, torch.promote_types(q.dtype, torch.float32))
    merged = (base + delta.to(base.dtype)).to(dtype)
    if merged.device.type != "meta" and not merged.isfinite().all():
        raise ValueError(
            f"the merged weight {tuple(merged.shape)} overflows {dtype}, or the base holds NaN or inf: pass a wider "
            "dtype, or a finite base."
        )
    return merged


def quantize_like(q: Quantized, weight: Tensor) -> Quantized:
    """Quantize a weight in the format of `q`.

    Example:
        >>> import torch
        >>> quantize_like(quantize_8bit(torch.ones(2, 3)), torch.zeros(2, 3)).codes.sum()
        tensor(0)
    """
    if isinstance(q, Quantized8bit):
        return quantize_8bit(weight.to(q.dtype), threshold=q.threshold)
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

    For DVoRA, the result includes the rescaling of the base weight.

    Raises:
        ValueError: If the adapter holds NaN or inf, is stacked or does not fit the weight, or if `q` is not a weight
            or is offloaded.
    """
    if not isinstance(q, Quantized4bit | Quantized8bit) and not (
        isinstance(q, Tensor) and q.dim() == 2 and q.is_floating_point()
    ):
        raise ValueError(
            f"q must be a quantized weight or a floating-point tensor (out, in), got {described(q)}. To read the "
            "weight of a bitsandbytes layer, use from_bnb."
        )
    require_dict("params", params)
    require_dict("frozen", frozen)
    scales = params.keys() & {*SCALES}
    if params.keys() - scales != {*VECTORS} or len(scales) > 1:
        raise ValueError(
            f"params must have the keys 'lambda_b' and 'lambda_d' (for DVoRA also 'magnitude' or 'output_scale'), got "
            f"{sorted(params)}. A weighted sum from select_adapters can't be merged: merge a single adapter."
        )
    for name, tensor in (*params.items(), *frozen.items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        require_finite(f"{name} {tuple(tensor.shape)}", tensor, "the adapter is invalid, and nothing was merged")
    out_features, in_features = q.shape
    lambda_d = params["lambda_d"]
    for name, vector in params.items():
        shape = lambda_d.shape[-1:] if name == "lambda_d" else (out_features,)
        require_single(f"for a weight {tuple(q.shape)}, {name}", vector, shape)
    if any(leaf.is_meta for leaf in ((q,) if isinstance(q, Tensor) else flatten(q)[0])):
        raise ValueError(NO_DATA)
    # As in PEFT, the products of 16-bit factors are computed in float32.
    params, frozen = ({k: _at_least_float32(t) for k, t in d.items()} for d in (params, frozen))
    return delta_weight(
        params,
        frozen,
        in_features,
        dense(q, torch.promote_types(params["lambda_d"].dtype, torch.float32)) if scales else None,
    )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def dense(weight: Quantized | Tensor, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Return a weight, quantized or not, as a dense tensor.

    Example:
        >>> dense(quantize_8bit(torch.ones(2, 3)), torch.bfloat16).dtype
        torch.bfloat16
    """
    return weight.to(dtype) if isinstance(weight, Tensor) else dequantize(weight, dtype)


def _require_whole_blocks(q: Quantized4bit) -> None:
    if q.shape[1] % q.blocksize:
        raise ValueError(
            f"blocks of {q.blocksize} values straddle the rows of a weight {q.shape}: use merge_dense or export_lora."
        )


def _dequantize_as_peft(q: Quantized) -> Tensor:
    if isinstance(q, Quantized4bit):
        return dequantize(q)
    # bitsandbytes dequantizes int8 weights with two different orders of operations; PEFT's merge uses this order.
    return private.bnb_ops().int8_vectorwise_dequant(q.codes, q.scale)
