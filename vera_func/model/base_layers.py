"""The layers under the adapted ones: quantized ones as values, and dense ones that may be given other parameters.

What `params` says of a layer's own weight and bias, the layer holds itself, under the name that the key has; its
`base_layer` keeps the model's. So keys of `params` are names in every module tree.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm, linear

from ..core.shapes import align_rows, contiguous_rows
from ..private import tree_leaves, tree_map
from ..quant.cpu_layout import FusedWeight, fused_weight
from ..quant.linear import quantized_linear
from ..quant.value import Quantized, format_of
from .targets import is_conv1d


class Turn(Protocol):
    """How a layer is called whose rows are not in front; see `rows`."""

    def around(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...


def own_or_base(name: str) -> property:
    """The layer's own parameter where it holds one, in place of its base layer's."""

    def get(self: Any) -> Tensor | None:
        own = self._parameters.get(name)
        return getattr(self.base_layer, name) if own is None else own

    return property(get)


class QuantizedLinear(nn.Module):
    """A frozen quantized layer: `quantized_linear(quantized, x, bias)`, in place of a bitsandbytes module.

    Args:
        quantized: The weight.
        bias: (out,) or None; becomes a frozen parameter, and may be given one for each row of the batch.
        int8_activations: See `quantized_linear`.

    Example:
        >>> import torch
        >>> from vera_func import quantize_8bit
        >>> QuantizedLinear(quantize_8bit(torch.ones(2, 3)), None)(torch.ones(3))
        tensor([3., 3.])
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None, *, int8_activations: bool = False) -> None:
        super().__init__()
        self.quantized = quantized
        self.fused: FusedWeight | None = None  # see `fused_weight`
        self.int8_activations = int8_activations
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        is_no_place(self)

    @property
    def weight(self) -> Tensor:
        """The packed weight: what models look at when they ask a layer for its device or dtype."""
        return tree_leaves(self.quantized)[0]

    def extra_repr(self) -> str:
        out_features, in_features = self.quantized.shape
        return f"in_features={in_features}, out_features={out_features}, format={format_of(self.quantized)}"

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return turned(self, partial(self._multiply, bias=bias), x)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = self.bias if bias is None else bias
        options: Any = {"int8_activations": self.int8_activations, "fused": self.fused}
        if bias is None or bias.dim() == 1:
            return quantized_linear(self.quantized, x, bias, **options)
        y = quantized_linear(self.quantized, x, **options)
        return y + align_rows("bias", bias, x).to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)
        # Move the weight's tensors, but never cast them: `fn` may be `.half()`, and absmax stays float32.
        self.quantized = tree_map(lambda leaf: moved(leaf, fn, cast=False), self.quantized)
        self.fused = None if self.fused is None else fused_weight(self.quantized)
        return self


class DenseLinear(nn.Linear):
    """A frozen `nn.Linear` that is not adapted: the same product, without copies of the weight (`contiguous_rows`).

    Example:
        >>> import torch
        >>> DenseLinear(3, 2)(torch.ones(5, 7, 3)[:, -1:]).shape
        torch.Size([5, 1, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(contiguous_rows(x), self.weight, self.bias)


class RowwiseAffine(nn.Module):
    """An affine layer whose weight and bias may have leading axes, one value for each row of the batch.

    It stands in for `nn.Linear`, `Conv1D` or `nn.LayerNorm` where these are trained with an adapter, so that
    a mixed batch can give every row its own classifier or bias.

    Args:
        base_layer: The layer, called as it is unless it is given another weight or bias.

    Example:
        >>> import torch
        >>> layer = RowwiseAffine(nn.Linear(3, 2))
        >>> own = {"weight": torch.ones(5, 2, 3), "bias": torch.zeros(5, 2)}
        >>> torch.func.functional_call(layer, own, torch.ones(5, 7, 3)).shape
        torch.Size([5, 7, 2])
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        hold_own(self)
        is_no_place(self)

    weight, bias = own_or_base("weight"), own_or_base("bias")

    def forward(self, x: Tensor) -> Tensor:
        return turned(self, base_fn(self), contiguous_rows(x))


def hold_own(layer: Any) -> None:
    # Past `register_parameter`, which the properties of these names are in the way of.
    names = ["bias"] if isinstance(layer.base_layer, QuantizedLinear) else ["weight", "bias"]
    layer._parameters.update(dict.fromkeys(names))


def base_fn(layer: Any) -> Callable[[Tensor], Tensor]:
    """The base layer with the values that `layer` holds in place of the base layer's own."""
    own = layer._parameters
    if own.get("weight") is None and own["bias"] is None:
        return layer.base_layer
    return partial(_call_with, layer.base_layer, layer.weight, layer.bias)


def _call_with(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`layer(x)` with other parameters, which may have leading axes: one value for each row of the batch."""
    if isinstance(layer, QuantizedLinear):
        return layer(x, bias)
    if not has_rows(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(layer, given, (x,), tie_weights=False)
    if isinstance(layer, nn.LayerNorm):
        shape = layer.normalized_shape
        if weight.dim() == len(shape) and (bias is None or bias.dim() == len(shape)):
            return layer_norm(x, shape, weight, bias, layer.eps)
        y = layer_norm(x, shape, eps=layer.eps) * align_rows("weight", weight, x)
        return y if bias is None else y + align_rows("bias", bias, x)
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        if type(layer) is nn.Linear:
            return linear(x, weight, bias)
        y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)  # type: ignore[arg-type]  # Conv1D has a bias
        return y.reshape(*x.shape[:-1], weight.shape[1])
    weight = weight.mT if is_conv1d(layer) else weight
    if weight.dim() == 2:
        y = linear(x, weight)
    else:
        align_rows("weight", weight, x, inner=2)
        rows, (out_features, in_features) = weight.shape[:-2], weight.shape[-2:]
        y = x.reshape(*rows, -1, in_features) @ weight.mT
        y = y.reshape(*x.shape[:-1], out_features)
    return y if bias is None else y + align_rows("bias", bias, x)


def has_rows(module: nn.Module) -> bool:
    """Whether the parameters of a layer of this class may have a value for each row of the batch.

    Example:
        >>> has_rows(nn.Linear(3, 2)), has_rows(nn.Embedding(3, 2))
        (True, False)
    """
    return type(module) in (nn.Linear, nn.LayerNorm) or is_conv1d(module)


def turned(layer: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`forward(x)`, which takes the rows in front, for an `x` that may have them elsewhere."""
    turn = None if layer.projections is None else layer.projections.rows.get(layer.path)
    return forward(x) if turn is None else turn.around(forward, x)


def is_no_place(layer: Any) -> None:
    # Set by `adapt` where the layer may have parameters for each row: its name in the model, and what the tree shares.
    layer.path = ""
    layer.projections = None


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor], *, cast: bool = True) -> Tensor:
    """What `fn` makes of a frozen tensor: another device or dtype, but no other values.

    It stays where it is if `fn` moves to the meta device: the stateless skeleton that `torch.func.stack_module_state`
    goes with is made like this, and gets its state, but no constants, from the caller.
    """
    like = fn(tensor[:0] if tensor.dim() else tensor)
    return tensor if like.is_meta else tensor.to(like.device, like.dtype if cast else tensor.dtype)
