"""bitsandbytes' kernels for 4-bit weights on CPUs, called with little overhead.

bitsandbytes' operators take about 10 microseconds longer than the C functions that the operators call. For an input of
one row and width 576, 10 microseconds are half the time of the product. Decoding a token takes hundreds of such
products. The functions in this module therefore call the C functions without the operators; the results are equal. For
tensor subclasses, and under `torch.compile`, transforms, dispatch modes and tracers, the functions call the operators.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .. import private


_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MOST_VALUES = 2048  # per block; bitsandbytes uses other code for larger blocks


def gemv_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, int], blocksize: int, quant_type: str
) -> Tensor:
    """Compute `x Wᵀ` with the kernel for CPUs with AVX512-BF16. `x` must be contiguous, in bfloat16, and not empty.

    `packed` and `absmax` must be contiguous, in the layout of `cpu_layout.FusedWeight`.
    """
    kernel = None if torch.compiler.is_compiling() else _gemv_kernel(quant_type)
    if kernel is None or not _is_memory(x):
        return private.bnb_ops().gemv_4bit(x, packed, shape, absmax, code, blocksize)
    out_features, in_features = shape
    y = x.new_empty(*x.shape[:-1], out_features)
    addresses = x.data_ptr(), packed.data_ptr(), absmax.data_ptr(), y.data_ptr()
    kernel(x.numel() // in_features, out_features, in_features, *addresses, blocksize, in_features, out_features)
    return y


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return the dense weight, in float32, bfloat16 or float16, for packed codes and float32 scales."""
    if not torch.compiler.is_compiling() and blocksize < _MOST_VALUES and shape[1] % 2 == 0:
        kernel = _dequantizing_kernel(quant_type, dtype)
        if kernel is not None and absmax.dtype == torch.float32 and _is_memory(packed, absmax):
            weight = packed.new_empty(shape, dtype=dtype)
            kernel(packed.data_ptr(), absmax.data_ptr(), weight.data_ptr(), blocksize, *shape)
            return weight
    return private.bnb_ops().dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)


@cache
def _gemv_kernel(quant_type: str) -> Callable[..., None] | None:
    # (rows, out, in, x, packed, absmax, y, blocksize, stride of x, stride of y)
    return private.bnb_function(f"gemv_4bit_inference_cpu_{quant_type}_bf16", "nnnppppnnn")


@cache
def _dequantizing_kernel(quant_type: str, dtype: torch.dtype) -> Callable[..., None] | None:
    # (packed, absmax, weight, blocksize, rows, columns)
    return private.bnb_function(f"cdequantize_blockwise_cpu_{quant_type}_{_SUFFIXES[dtype]}", "pppnnn")


def _is_memory(*tensors: Tensor) -> bool:
    """Whether the tensors are plain, contiguous CPU tensors, and no transform or mode observes operations on them."""
    if private.is_observed():
        return False
    return all(
        type(t) is Tensor and t.is_cpu and t.is_contiguous() and not t.is_neg() and private.unwrap(t) is t
        for t in tensors
    )
