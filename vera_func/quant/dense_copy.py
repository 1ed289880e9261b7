"""Dense copies of quantized weights, which save the time of dequantizing but take more memory."""

from typing import Any

import torch
from torch import Tensor

from .quantize import dequantize
from .value import Quantized


class DenseCopy:
    """A stored `dequantize(q, dtype)`. Deep copies of a layer share the weight; pickle stores only the dtype.

    Products with the stored weight and with a newly dequantized weight are bitwise equal.

    Attributes:
        weight: The dense weight, (out, in), or None after unpickling.
        dtype: Dtype of the weight.

    Example:
        >>> import copy, pickle
        >>> kept = DenseCopy(torch.ones(2, 3), torch.float32)
        >>> copy.deepcopy(kept) is kept, pickle.loads(pickle.dumps(kept)).weight
        (True, None)
    """

    def __init__(self, weight: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> "DenseCopy":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return DenseCopy, (None, self.dtype)


def dense_copy(q: Quantized, dtype: torch.dtype) -> DenseCopy:
    """Return a dense copy of a quantized weight.

    Example:
        >>> from vera_func import quantize_8bit
        >>> dense_copy(quantize_8bit(torch.ones(2, 3)), torch.bfloat16).weight.dtype
        torch.bfloat16
    """
    return DenseCopy(dequantize(q, dtype).detach(), dtype)
