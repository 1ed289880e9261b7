"""An adapter written into the weight of its layer, and what is lost by it.

    W' = round(W + ΔW)        kept = <W' - W, ΔW> / ‖ΔW‖²        ΔW = diag(lambda_b) B diag(lambda_d) A

A dequantized weight lies on the grid of its format, so an update of less than half a step of the grid is
rounded away, and nothing says so: `merge_report` does. What loses less is a 16-bit weight (`merge_dense`), and
what is exact is a LoRA (`export_lora`). No merge here has a counterpart that undoes it; keep `q`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import private
from ..core.adapter import delta_weight
from ..core.keys import VECTORS
from ..core.shapes import require_float
from ..quant.quantize import dequantize, levels, pack, quantize_4bit, quantize_8bit, unpack
from ..quant.value import NO_DATA, Quantized, Quantized4bit, Quantized8bit, flatten
from .calibrate import calibrate_rows, gram as gram_of, stochastic_codes


class MergeReport(NamedTuple):
    """What a merge did to one layer.

    Attributes:
        kept: <W' - W, ΔW> / ‖ΔW‖², the part of the update that is in the merged weight: 1 is all, 0 none.
        error: ‖W' - W - ΔW‖ / ‖ΔW‖; above 1 the merge added more noise than the update was worth.
        size: ‖ΔW‖ / ‖W‖.
        output_kept: `kept` for the layer's outputs on the given inputs, or None without inputs.
        output_error: `error` for the layer's outputs on the given inputs, or None without inputs.
    """

    kept: float
    error: float
    size: float
    output_kept: float | None = None
    output_error: float | None = None


def merge_quantized(q: Quantized, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> Quantized:
    """`W + ΔW`, quantized again in the format of `q`: the bytes that PEFT's merge gives.

    Unmerging is keeping `q`, which is untouched. An adapter that adds nothing gives the same bytes back.

    Args:
        q: The base weight (out, in).
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`.
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.

    Returns:
        A weight of the same type, block size, nesting and storage.

    Raises:
        ValueError: If the adapter holds NaN or inf (the tensor is named), is stacked, or does not fit the weight.

    Example:
        >>> import torch
        >>> from vera_func import init_params, init_projections, quantize_4bit
        >>> q = quantize_4bit(torch.ones(32, 64))
        >>> merged = merge_quantized(q, init_params(4, 32), init_projections(4, 64, 32))
        >>> torch.equal(merged.packed, q.packed)
        True
    """
    if isinstance(q, Tensor):
        raise ValueError(f"the weight {tuple(q.shape)} {q.dtype} is dense: merge_dense is for it.")
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
    """Merge onto the same 4-bit grid so that the layer's output on `inputs` is that of the adapted layer.

    Where `merge_quantized` rounds weight by weight, and an update below half a step vanishes, codes and block scales
    are chosen together for the inputs that the layer really sees. See `calibrate.calibrate_rows` for how, and
    `merge_report(..., inputs, merged=...)`, on other inputs, for how well. Costs seconds a layer.

    Args:
        q: The base weight; `in` must be a multiple of its block size.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`.
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        inputs: Of the layer, from real use and without padding; several thousand tokens are enough.
        gram: The mean of `x xᵀ` instead of the inputs, as `second_moments` makes it.
        damping: See `calibrate_rows`; None is 0.01, or 0.1 below 1,000 tokens.
        max_kappa: Bound of the overshoot; 1 minimises the output's error instead, which shrinks the update.

    Returns:
        An ordinary weight of the same type and block size; its statistics are not nested.

    Raises:
        ValueError: If the weight is not a 4-bit one, blocks straddle its rows, or inputs do not fit; else as for
            `merge_quantized`.

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
        raise ValueError("merge_calibrated is for 4-bit weights; an 8-bit grid keeps small updates (merge_quantized).")
    out_features, in_features = q.shape
    if (inputs is None) == (gram is None):
        raise ValueError("give either inputs or their gram.")
    if inputs is not None and inputs.shape[-1:] != (in_features,):
        raise ValueError(f"inputs must be (*tokens, {in_features}), got {tuple(inputs.shape)}.")
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
    """`W + ΔW` rounded at random to one of the two levels next to it, so that it is right on average.

    For want of inputs to calibrate with: it keeps most of the update, and adds noise of several times its size.

    Args:
        q: The base weight; `in` must be a multiple of its block size.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`.
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        generator: Where the randomness comes from; there is no default.

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
        raise ValueError("merge_stochastic is for 4-bit weights; an 8-bit grid keeps small updates (merge_quantized).")
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
    """`W + ΔW` as a dense weight, computed in float32 and rounded once.

    W is the dequantized weight, which the adapter was trained against; the 16-bit weight from before
    quantization differs from it by a tenth of its norm, which the adapter knows nothing of.

    Args:
        q: The base weight, quantized or dense (out, in).
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`.
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        dtype: Of the result.

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
    base = q.float() if isinstance(q, Tensor) else dequantize(q, torch.float32)
    merged = (base + delta.float()).to(dtype)
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
    """What is left of the update in a merged weight.

    Costs a merge and, with inputs, two products.

    Args:
        q: The base weight.
        params: `{"lambda_b": (out,), "lambda_d": (r,)}`.
        frozen: `{"vera_A": (r, >= in), "vera_B": (>= out, r)}`.
        inputs: Inputs of the layer from real use, (tokens, in), for what matters of the error.
        merged: The weight to judge, quantized or dense; None is `merge_quantized`'s.

    Raises:
        ValueError: As for `merge_quantized`, or if the update, or what it does to the inputs, is zero, so that nothing
            could be kept of it.

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
        raise ValueError("the adapter adds nothing (lambda_b or lambda_d is 0), so there is nothing to keep or lose.")
    base = q.float() if isinstance(q, Tensor) else dequantize(q, torch.float32)
    if merged is None:
        if isinstance(q, Tensor):
            raise ValueError("the weight is dense: give merged=merge_dense(...) to report on.")
        merged = merge_quantized(q, params, frozen)
    if tuple(merged.shape) != tuple(q.shape):
        raise ValueError(f"merged is {tuple(merged.shape)}, but the weight is {tuple(q.shape)}.")
    moved = (merged.float() if isinstance(merged, Tensor) else dequantize(merged, torch.float32)) - base
    report = MergeReport(_kept(moved, delta), _error(moved, delta), (delta.norm() / base.norm()).item())
    if inputs is None:
        return report
    if inputs.dim() != 2 or inputs.shape[1] != delta.shape[1]:
        raise ValueError(f"inputs must be (tokens, {delta.shape[1]}), got {tuple(inputs.shape)}.")
    x = inputs.float()
    actual, wanted = x @ moved.T, x @ delta.T
    if not 0 < wanted.norm() < float("inf"):
        raise ValueError(
            f"the update does nothing to these inputs {tuple(inputs.shape)}, which must be some, finite and not 0."
        )
    return report._replace(output_kept=_kept(actual, wanted), output_error=_error(actual, wanted))


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
    """`delta_weight`, for an adapter that can be merged.

    Raises:
        ValueError: If the adapter holds NaN or inf (the tensor is named), is stacked or does not fit the weight, or the
            weight is offloaded.
    """
    if params.keys() != {*VECTORS}:
        raise ValueError(
            f"one adapter of a weight has the keys 'lambda_b' and 'lambda_d', got {sorted(params)}; merge the parts of "
            "a sum one by one."
        )
    for name, tensor in (*params.items(), *frozen.items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} {tuple(tensor.shape)} holds NaN or inf: the adapter is broken, and nothing was merged."
            )
    out_features, in_features = q.shape
    lambda_b, lambda_d = params["lambda_b"], params["lambda_d"]
    if lambda_b.shape != (out_features,) or lambda_d.dim() != 1:
        raise ValueError(
            f"one adapter of a weight {tuple(q.shape)} has lambda_b ({out_features},) and lambda_d (r,), got "
            f"{tuple(lambda_b.shape)} and {tuple(lambda_d.shape)}; merge stacked ones one by one (unstack_adapters)."
        )
    if any(leaf.is_meta for leaf in ((q,) if isinstance(q, Tensor) else flatten(q)[0])):
        raise ValueError(NO_DATA)
    return delta_weight(params, frozen, in_features)


def _require_whole_blocks(q: Quantized4bit) -> None:
    if q.shape[1] % q.blocksize:
        raise ValueError(
            f"blocks of {q.blocksize} straddle the rows of a weight {q.shape}; merge_dense or export_lora lose nothing."
        )


def _dequantize_as_peft(q: Quantized) -> Tensor:
    if isinstance(q, Quantized4bit):
        return dequantize(q)
    # bitsandbytes has two orders of operations for 8 bits; the bytes after rounding depend on this one.
    return private.bnb_ops().int8_vectorwise_dequant(q.codes, q.scale)


def _kept(moved: Tensor, wanted: Tensor) -> float:
    return ((moved * wanted).sum() / wanted.square().sum()).item()


def _error(moved: Tensor, wanted: Tensor) -> float:
    return ((moved - wanted).norm() / wanted.norm()).item()
