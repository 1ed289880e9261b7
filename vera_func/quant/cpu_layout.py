"""Convert 4-bit weights to and from the layout of bitsandbytes' kernel for CPUs with AVX512-BF16."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import private
from .quantize import levels, unpack
from .value import Quantized, Quantized4bit, shape2


class FusedWeight(NamedTuple):
    """A copy of a 4-bit weight in the layout of bitsandbytes' kernel for CPUs with AVX512-BF16; see `fused_weight`."""

    packed: Tensor  # (out, in / 2)
    absmax: Tensor  # (in / blocksize, out) bfloat16
    code: Tensor  # the levels, (16,) float32, from which the kernel infers the format
    max_rows: int | None = None  # largest number of rows for the kernel; None: a measured number


# Default of `max_rows`; `python -m tests.benchmarks roofline` times the kernels.
FUSED_ROWS = 32


def fused_weight(q: Quantized, max_rows: int | None = FUSED_ROWS) -> FusedWeight | None:
    """Copy a 4-bit weight into the layout of bitsandbytes' fused kernel for CPUs with AVX512-BF16.

    For bfloat16 inputs with few rows, the kernel is faster than dequantizing, because the kernel reads only the packed
    weight. The copy takes half a byte plus `2 / blocksize` bytes per value of the weight. The scales of the copy are
    rounded to bfloat16, an error of up to 0.4 %. The rounding changes nothing if the weight was bfloat16 before
    quantization and the scales are not double-quantized. In eval mode, bitsandbytes' own modules silently replace their
    weight by such a copy. `fused_weight` does not change `q`, and gradients are computed with `q`.

    Args:
        q: A quantized weight.
        max_rows: Largest number of rows for which the kernel is used. If None, each process measures this number at its
            first product with a weight of this format and shape. The kernel and the dense product round differently;
            see `quant.crossover`.

    Returns:
        The copy, or None if the kernel can't be used. The kernel requires a CPU with AVX512-BF16 and a 4-bit weight
        (out, in), where `out` is a multiple of 32, and `in` is a multiple of the block size.

    Example:
        >>> from vera_func import quantize_8bit
        >>> fused_weight(quantize_8bit(torch.ones(32, 64))) is None
        True
    """
    if not isinstance(q, Quantized4bit) or q.packed.device.type != "cpu" or not private.bnb_has_avx512bf16():
        return None
    out_features, in_features = q.shape
    if out_features % 32 or in_features % q.blocksize:
        return None
    codes, absmax = unpack(q)
    # Groups of 32 rows, with column pairs in order; the first 32 of 64 codes become the low halves of bytes.
    codes = codes.reshape(out_features // 32, 32, in_features // 2, 2).transpose(1, 2).reshape(-1, 2, 32)
    packed = ((codes[:, 1] << 4) | codes[:, 0]).reshape(out_features, in_features // 2)
    absmax = absmax.reshape(out_features, -1).T.to(torch.bfloat16).contiguous()
    return FusedWeight(packed, absmax, levels(q), max_rows)


def unpack_cpu_layout(packed: Tensor, state: Any, compute_dtype: torch.dtype | None) -> Quantized4bit:
    """Copy a weight from the layout of bitsandbytes' AVX512-BF16 kernel to the usual 4-bit layout.

    The layout divides the rows into groups of 32, and the columns of each group into pairs. The 64 codes of a pair are
    stored in 32 bytes: the first 32 codes in the low halves of the bytes, and the last 32 codes in the high halves.
    """
    out_features, in_features = state.shape
    halves = packed.reshape(-1, 32)
    indices = torch.cat([halves & 15, halves >> 4], dim=1)
    indices = indices.reshape(out_features // 32, in_features // 2, 32, 2).transpose(1, 2)
    pairs = indices.reshape(-1, 2)
    storage = getattr(state, "original_storage_type", None) or torch.uint8
    return Quantized4bit(
        ((pairs[:, 0] << 4) | pairs[:, 1]).view(storage)[:, None],
        state.absmax.t().reshape(-1).float(),
        None,
        shape2(state.shape),
        state.original_dtype,
        state.quant_type,
        state.blocksize,
        compute_dtype,
    )
