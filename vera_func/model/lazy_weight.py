"""The weight of an adapted or quantized layer, for models that read the weight instead of calling the layer.

    time_step = self.dt_proj.weight @ x  # Mamba; WavLM passes the weights of q_proj, k_proj and v_proj to a function

Such a model must get the adapted weight, because it would otherwise ignore the adapter. Computing the adapted weight
requires a matrix product of the two projections, but most models that read the weight use only its dtype or device.
Therefore the values are computed only when an operation uses the values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..private import tree_map


_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "layout", "is_cpu", "is_cuda", "is_meta")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "get_device")
# Reading these attributes does not use the values.
_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES] + [getattr(Tensor, name) for name in _METHODS]
)


class LazyWeight(Tensor):
    """A tensor with the shape, dtype and device of `like`, whose values `compute` returns at each use.

    The operation gets the result of `compute` instead of the `LazyWeight`, so all transforms work as usual.
    """

    compute: Callable[[], Tensor]
    like: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return func(_like(args[0]), *args[1:], **(kwargs or {}))
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy_weight(compute: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Return a tensor whose values are computed when an operation uses them.

    Under the compiler, which removes unused values itself, the values are computed immediately. If `like` is a fake
    tensor, which has no values, `like` itself is returned.

    Args:
        compute: Returns the values.
        like: A tensor with the shape, dtype and device of the values.

    Example:
        >>> weight = lazy_weight(lambda: torch.ones(2, 3), torch.zeros(2, 3))
        >>> weight.shape, weight.dtype, weight @ torch.ones(3)
        (torch.Size([2, 3]), torch.float32, tensor([3., 3.]))
    """
    if torch.compiler.is_compiling():
        return compute()
    like = _like(like)
    if type(like) not in (Tensor, nn.Parameter):
        return like
    weight = like.as_subclass(LazyWeight)
    weight.compute, weight.like = compute, like
    return weight


def _computed(value: Any) -> Any:
    return value.compute() if type(value) is LazyWeight else value


def _like(value: Any) -> Any:
    return value.like if type(value) is LazyWeight else value
