"""Quantize dense weights, and dequantize quantized weights.

dequantize(q)[i] = levels[codes[i]] * absmax[i // blocksize]          (4 bits, i runs over the flattened weight)
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.autograd import forward_ad

from .. import private
from ..core.shapes import require_float
from .native import dequantize_4bit
from .value import (
    BLOCKSIZES,
    FLOATS,
    NESTED_BLOCKSIZE,
    NestedStatistics,
    Quantized,
    Quantized4bit,
    Quantized8bit,
    Spec,
    Spec8bit,
    check_4bit_options,
    check_sizes,
    flatten,
    shape2,
    validate,
)


_STORAGES = (torch.uint8, torch.int8, *FLOATS, torch.float64)  # those of transformers' BitsAndBytesConfig


def quantize_4bit(
    weight: Float[Tensor, "out in"],
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    *,
    quant_storage: torch.dtype = torch.uint8,
    compute_dtype: torch.dtype | None = None,
) -> Quantized4bit:
    """Quantize a weight to 4 bits per value: one of 16 levels, scaled by the largest absolute value in each block.

    The bytes are those of bitsandbytes. Each value takes 4 bits. The scales add 32 / `blocksize` bits per value, or
    about 8 / `blocksize` with `double_quant`.

    Args:
        weight: Finite weight of shape (out, in), in float16, bfloat16 or float32.
        quant_type: "nf4" for levels at the quantiles of a normal distribution, or "fp4" for a 4-bit float.
        blocksize: Number of values that share a scale, one of `BLOCKSIZES`.
        double_quant: Whether to quantize the scales to 8 bits as well (QLoRA's double quantization).
        quant_storage: Dtype of the packed tensor. The packed bytes do not depend on this dtype.
        compute_dtype: Dtype of products with an input `x`. None means the dtype of `x`.

    Raises:
        ValueError: If the weight is not 2-D, is not finite, or has an unsupported dtype; or if another argument is
            invalid.

    Example:
        >>> import torch
        >>> q = quantize_4bit(torch.linspace(-1, 1, 128).reshape(2, 64))
        >>> q.shape, q.packed.shape, q.absmax
        ((2, 64), torch.Size([64, 1]), tensor([1., 1.]))

    Reference:
        Section 3 of https://arxiv.org/abs/2305.14314 (QLoRA).
    """
    _check_weight(weight)
    check_4bit_options(quant_type, blocksize, compute_dtype)
    if quant_storage not in _STORAGES:
        raise ValueError(f"quant_storage must be one of {_STORAGES}, got {quant_storage!r}.")
    if quant_storage != torch.uint8 and weight.numel() % (2 * quant_storage.itemsize):
        raise ValueError(
            f"the packed bytes of a weight {tuple(weight.shape)} do not fill whole elements of "
            f"quant_storage={quant_storage}: use torch.uint8."
        )
    packed, state = private.bitsandbytes().functional.quantize_4bit(
        weight.detach().contiguous(),
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
    )
    nested = NestedStatistics(state.state2.absmax, state.state2.code, state.offset.float()) if double_quant else None
    return Quantized4bit(
        packed, state.absmax, nested, shape2(weight.shape), weight.dtype, quant_type, blocksize, compute_dtype
    )


def quantize_8bit(weight: Float[Tensor, "out in"], *, threshold: float = 0.0) -> Quantized8bit:
    """Quantize each row of a weight to 8-bit integers: `codes = round(127 * row / max|row|)`.

    The codes and scales are bitwise equal to those of bitsandbytes, which rounds the weight to float16 first.

    Args:
        weight: Weight of shape (out, in), in float16, bfloat16 or float32. Absolute values must be at most 65,504, the
            largest float16.
        threshold: Threshold for `quantized_linear(int8_activations=True)` and `to_bnb`. The codes do not depend on
            `threshold`.

    Raises:
        ValueError: If the weight is not 2-D, has an unsupported dtype, or has values that are not finite in float16; or
            if the threshold is negative.

    Example:
        >>> import torch
        >>> q = quantize_8bit(torch.tensor([[1.0, -0.5], [0.0, 2.0]]))
        >>> q.codes, q.scale
        (tensor([[127, -64],
                [  0, 127]], dtype=torch.int8), tensor([1., 2.]))

    Reference:
        Section 3 of https://arxiv.org/abs/2208.07339 (LLM.int8()).
    """
    _check_weight(weight)
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold must be finite and at least 0 (0 means no threshold), got {threshold}.")
    half = weight.detach().to(torch.float16).contiguous()
    if half.device.type != "meta" and not half.isfinite().all():
        raise ValueError("the weight overflows float16, in which bitsandbytes computes 8-bit codes: use 4 bits.")
    codes, scale, _ = private.bnb_ops().int8_vectorwise_quant(half, 0.0)
    return Quantized8bit(codes, scale, shape2(codes.shape), float(threshold))


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """Return a quantized weight as a dense tensor of shape (out, in).

    Dequantizing costs a pass over the packed weight and the memory of the dense weight. For autograd, the result is a
    constant.

    Args:
        q: A quantized weight.
        dtype: Dtype of the result. None means the dtype before quantization for a 4-bit weight, and float32 for an
            8-bit weight.

    Raises:
        ValueError: If `dtype` is not a floating-point dtype, or if a 4-bit `q` is differentiated.

    Example:
        >>> import torch
        >>> dequantize(quantize_8bit(torch.tensor([[1.0, -0.5]])))
        tensor([[ 1.0000, -0.5039]])
    """
    leaves, spec = flatten(q)
    dtype = q.dtype if dtype is None else dtype
    require_float("dtype", dtype)
    if isinstance(q, Quantized4bit):
        refuse_weight_derivative(any(map(is_differentiated, leaves)))
    return dequantize_leaves(spec, leaves, dtype)


def levels(q: Quantized4bit) -> Float[Tensor, "16"]:
    """Return the 16 levels of a 4-bit weight's format, in bitsandbytes' order: code i stands for level i.

    Example:
        >>> levels(quantize_4bit(torch.ones(1, 64)))[[0, 7, 15]]
        tensor([-1.,  0.,  1.])
    """
    # bitsandbytes' own table is rounded to the default dtype.
    device = q.packed.device
    pairs = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], dtype=torch.uint8, device=device)
    one = torch.ones(1, dtype=torch.float32, device=device)
    return dequantize_4bit(pairs, one, BLOCKSIZES[0], q.quant_type, (1, 16), torch.float32)[0]


def unpack(q: Quantized4bit) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, " blocks"]]:
    """Return the codes of a 4-bit weight, one uint8 for each value, and the block scales in float32.

    Example:
        >>> codes, absmax = unpack(quantize_4bit(torch.ones(1, 64)))
        >>> codes.unique(), absmax
        (tensor([15], dtype=torch.uint8), tensor([1.]))
    """
    pairs = q.packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1)[: q.shape[0] * q.shape[1]]
    return codes.reshape(q.shape), _block_scales(q.absmax, *(q.nested or ()))


def pack(q: Quantized4bit, codes: UInt8[Tensor, "out in"], absmax: Float[Tensor, " blocks"]) -> Quantized4bit:
    """Return a weight in the format of `q` with other codes and scales: the inverse of `unpack`.

    The scales are stored in float32, because double quantization would discard small changes of scales.

    Raises:
        ValueError: If the shape of `codes` or `absmax` does not fit `q`.

    Example:
        >>> q = quantize_4bit(torch.linspace(-1, 1, 64)[None])
        >>> torch.equal(pack(q, *unpack(q)).packed, q.packed)
        True
    """
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    packed = ((flat[0::2] << 4) | flat[1::2]).view(q.packed.dtype)[:, None]
    new = dataclasses.replace(q, packed=packed, absmax=absmax.reshape(-1).contiguous(), nested=None)
    validate(new)
    return new


def dequantize_leaves(spec: Spec, leaves: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Compute `dequantize` from the results of `flatten`."""
    check_sizes(spec, leaves)
    if isinstance(spec, Spec8bit):
        codes, scale = leaves
        # The order of operations is that of bitsandbytes in training, because the last bit depends on the order.
        return (codes.to(dtype) * (scale * (1.0 / 127.0))[:, None]).to(dtype)
    packed, absmax, *nested = leaves
    kernel_dtype = dtype if dtype in FLOATS else torch.float32
    shape = _kernel_shape(spec.shape, spec.blocksize)
    absmax = _block_scales(absmax, *nested) if nested else absmax
    weight = dequantize_4bit(packed, absmax, spec.blocksize, spec.quant_type, shape, kernel_dtype)
    if shape != spec.shape:
        weight = weight.reshape(spec.shape)
    return weight if kernel_dtype == dtype else weight.to(dtype)


def _kernel_shape(shape: tuple[int, int], blocksize: int) -> tuple[int, int]:
    """Return the shape for bitsandbytes' kernel, which uses the shape only to split the values into rows.

    On CPUs with AVX512, bitsandbytes 0.50 looks up the scales row by row, and uses wrong scales if a block continues in
    the next row. In a shape with one block per row, or with a single row, no block continues in the next row.
    """
    out_features, in_features = shape
    if in_features % blocksize == 0:
        return shape
    values = out_features * in_features
    return (values // blocksize, blocksize) if values % blocksize == 0 else (1, values)


def _block_scales(absmax: Tensor, *nested: Tensor) -> Tensor:
    if not nested:
        return absmax
    scale, code, offset = nested
    return private.bnb_ops().dequantize_blockwise(absmax, scale, code, NESTED_BLOCKSIZE, torch.float32) + offset


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight must be a tensor of shape (out, in), got {type(weight).__name__}.")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (out, in), both positive, got {tuple(weight.shape)}.")
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight must be float16, bfloat16 or float32, got {weight.dtype}.")
    if weight.device.type != "meta" and not weight.isfinite().all():
        raise ValueError(f"weight {tuple(weight.shape)} must be finite, but contains NaN or inf.")


def is_differentiated(leaf: Tensor) -> bool:
    # bitsandbytes' kernel has no derivative, and torch would treat it as zero.
    if torch.compiler.is_compiling():
        leaf = leaf.view_as(leaf)  # Dynamo (2.13) does not see that an argument of grad itself is differentiated
    return leaf.requires_grad or forward_ad.unpack_dual(leaf).tangent is not None


def refuse_weight_derivative(wanted: bool) -> None:
    if wanted:
        raise ValueError("a quantized weight is a constant: differentiate with respect to x, the bias or an adapter.")


# The name of each format, and the function that quantizes to it.
QUANTIZERS: dict[str, Callable[[Tensor], Quantized]] = {
    "nf4": partial(quantize_4bit, quant_type="nf4"),
    "fp4": partial(quantize_4bit, quant_type="fp4"),
    "int8": quantize_8bit,
}
