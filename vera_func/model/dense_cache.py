"""Choose which quantized layers of a module tree store a dense copy of their weight, within a memory budget."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..quant.bnb import is_bnb_linear
from ..quant.dense_copy import dense_copy
from ..quant.value import Quantized4bit
from .base_layers import QuantizedLinear


def keep_dense(root: nn.Module, max_bytes: int, dtype: torch.dtype, calls: Mapping[str, int] | None = None) -> None:
    """Store dense copies of the weights of some layers in a tree, and remove the copies of all other layers.

    A dense copy saves the dequantization of the weight in each call. The time of one dequantization is proportional to
    the size of the dense copy. Therefore a byte of memory saves the most time in the layer with the most calls.

    Args:
        root: Root of the tree, modified in place.
        max_bytes: Memory for the copies. A layer is skipped if its copy exceeds the remaining memory.
        dtype: Dtype of the dense copy if a layer has no `compute_dtype`.
        calls: Number of calls of each layer, keyed by module path, as `counted_calls` returns it. If None, layers get
            copies in the order of the model.

    Example:
        >>> from vera_func import quantize_8bit
        >>> layers = nn.Sequential(*(QuantizedLinear(quantize_8bit(torch.ones(2, 3)), None) for _ in range(3)))
        >>> keep_dense(layers, 50, torch.float32, {"1": 2, "2": 5})
        >>> [layer.dense is not None for layer in layers], dense_bytes(layers)
        ([False, True, True], 48)
    """
    layers: list[tuple[str, Any]] = [(path, m) for path, m in root.named_modules() if isinstance(m, QuantizedLinear)]
    if calls is not None:
        layers = sorted(layers, key=lambda item: -calls.get(item[0], 0))  # stable: ties keep the order of the model
    left = max_bytes
    for path, layer in layers:
        q = layer.quantized
        layer.dense = None
        in_dtype = (q.compute_dtype if isinstance(q, Quantized4bit) else None) or dtype
        size = q.shape[0] * q.shape[1] * in_dtype.itemsize
        used = not layer.int8_activations and not (q.device.type == "cuda" and isinstance(q, Quantized4bit))
        if size <= left and used and q.device.type != "meta" and (calls is None or calls.get(path, 0)):
            layer.dense = dense_copy(q, in_dtype)
            left -= size


def counted_calls(root: nn.Module) -> Counter[str]:
    """Return a counter of the calls of each quantized layer, by the layer's path.

    Calls of layers in `root`, and in copies of `root` made later, are counted from now on.

    Example:
        >>> from vera_func import quantize_8bit
        >>> layers = nn.Sequential(QuantizedLinear(quantize_8bit(torch.ones(3, 3)), None))
        >>> calls = counted_calls(layers)
        >>> _ = layers(layers(torch.ones(3)))
        >>> calls
        Counter({'0': 2})
    """
    calls: Counter[str] = Counter()
    for path, module in root.named_modules():
        if isinstance(module, QuantizedLinear):
            # Copies of the tree share a function, whereas a callable object would be copied with its counter.
            module.register_forward_pre_hook(lambda module, args, path=path: calls.update([path]))
    return calls


def dense_bytes(root: nn.Module) -> int:
    """Return the memory of the dense copies in a tree, in bytes."""
    layers: list[Any] = [module for module in root.modules() if isinstance(module, QuantizedLinear)]
    return sum(layer.dense.weight.nbytes for layer in layers if layer.dense is not None)


def dense_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating-point parameter that is not a packed weight, or else float32.

    Example:
        >>> dense_dtype(nn.Linear(3, 2).bfloat16())
        torch.bfloat16
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (name == "weight" and is_bnb_linear(module)):
                return parameter.dtype
    return torch.float32
