"""bitsandbytes' layout of 4-bit weights for its kernel on CPUs with AVX512-BF16, and its inverse."""

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
    code: Tensor  # the levels of the format, (16,) float32, from which the kernel infers the format
    max_rows: int | None = None  # the kernel is used for up to this number of rows; None: for a measured number


# Default of `max_rows`; `python -m tests.benchmarks roofline` times the kernels.
FUSED_ROWS = 32


def fused_weight(q: Quantized, max_rows: int | None = FUSED_ROWS) -> FusedWeight | None:
    """Copy a 4-bit weight into the layout of bitsandbytes' fused kernel for CPUs with AVX512-BF16.

    For a few rows of bfloat16, the kernel is faster than dequantizing, because it reads only the packed weight. The
    copy takes half a byte plus `2 / blocksize` bytes per value of the weight. The scales of the copy are rounded to
    bfloat16, which changes them by up to 0.4 %. If the weight was bfloat16 and its scales are not nested, rounding does
    not change them. bitsandbytes' own modules silently replace their weight by such a copy in eval mode. Here `q` is
    unchanged, and gradients are taken through `q`.

    Args:
        q: A quantized weight.
        max_rows: The kernel is used for up to this number of rows. With None, this number is measured: the process
            times the kernel at its first product of this format and shape. The fused and the dense product round
            differently; see `quant.crossover`.

    Returns:
        The copy, or None if the kernel can't be used. The kernel requires a CPU with AVX512-BF16, a 4-bit weight, an
        `out` that is a multiple of 32, and an `in` that is a multiple of the block size.

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
    # Groups of 32 rows, each in order of column pairs; of 64 codes, the first 32 become low halves of bytes.
    codes = codes.reshape(out_features // 32, 32, in_features // 2, 2).transpose(1, 2).reshape(-1, 2, 32)
    packed = ((codes[:, 1] << 4) | codes[:, 0]).reshape(out_features, in_features // 2)
    absmax = absmax.reshape(out_features, -1).T.to(torch.bfloat16).contiguous()
    return FusedWeight(packed, absmax, levels(q), max_rows)


def unpack_cpu_layout(packed: Tensor, state: Any, compute_dtype: torch.dtype | None) -> Quantized4bit:
    """Convert a weight from bitsandbytes' layout for its AVX512-BF16 kernel, without changing `packed` or `state`.

    The layout stores groups of 32 rows, each in order of column pairs. Each 32 bytes hold 64 codes: the first 32 in the
    low halves of the bytes, and the last 32 in the high halves.
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
