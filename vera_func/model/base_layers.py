"""Base layers of a module tree: quantized layers, and dense layers whose weight and bias may differ between rows.

A weight or bias from `params` is set on the layer itself, and the layer's `base_layer` keeps the model's value.
Therefore every key of `params` is also a parameter name in the module tree.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm, linear

from ..core.shapes import align_rows, contiguous_rows
from ..private import tree_map
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.cpu_layout import FusedWeight, fused_weight
from ..quant.dense_copy import DenseCopy, dense_copy
from ..quant.linear import quantized_linear
from ..quant.quantize import dequantize
from ..quant.value import FLOATS, Quantized, Quantized4bit, Quantized8bit, format_of
from .closures import copy_module
from .lazy_weight import lazy_weight
from .linears import is_conv1d


if TYPE_CHECKING:
    from .layers import AdaptedLinear, Projections


# Layers that hold a base layer, and perhaps a weight and bias of their own.
WithBase: TypeAlias = "RowwiseAffine | AdaptedLinear"


class RowLayout(Protocol):
    """An object that calls a layer whose input has a batch axis other than axis 0; see `rows.MovedRows`."""

    def call(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...


def own_or_base(name: str) -> property:
    """Create a property that returns `read_own_or_base(layer, name)`."""
    return property(lambda self: read_own_or_base(self, name))


def read_own_or_base(layer: WithBase, name: str) -> Tensor:
    """Return the parameter that is set on the layer itself, if any, and otherwise the parameter of its base layer."""
    own = layer._parameters.get(name)
    return getattr(layer.base_layer, name) if own is None else own


class QuantizedLinear(nn.Module):
    """A frozen layer that computes `quantized_linear(quantized, x, bias)`. It replaces bitsandbytes' modules.

    Args:
        quantized: The weight.
        bias: Bias of shape (out,), stored as a frozen parameter, or None. A call may pass another bias, which may have
            one value for each row of the batch.
        int8_activations: See `quantized_linear`.

    Example:
        >>> import torch
        >>> from vera_func import quantize_8bit
        >>> QuantizedLinear(quantize_8bit(torch.ones(2, 3)), None)(torch.ones(3))
        tensor([3., 3.])
    """

    path: str
    projections: "Projections | None"

    def __init__(self, quantized: Quantized, bias: Tensor | None, *, int8_activations: bool = False) -> None:
        super().__init__()
        self.quantized = quantized
        self.fused: FusedWeight | None = None  # see `fused_weight`
        self.dense: DenseCopy | None = None  # see `DenseCopy`
        self.int8_activations = int8_activations
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        init_row_layout(self)

    @property
    def weight(self) -> Tensor:
        """The dense weight, for models that read the weight instead of calling the layer; see `lazy_weight`."""
        q = self.quantized
        # transformers' models compare the dtype with int8.
        dtype = q.dtype if isinstance(q, Quantized4bit) else q.codes.dtype
        return lazy_weight(partial(dequantize, q), torch.empty((), dtype=dtype, device=q.device).expand(q.shape))

    def extra_repr(self) -> str:
        out_features, in_features = self.quantized.shape
        return f"in_features={in_features}, out_features={out_features}, format={format_of(self.quantized)}"

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.projections is None:  # no parameters with rows
            return self._multiply(x, bias)
        return call_by_rows(self, partial(self._multiply, bias=bias), x)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = self.bias if bias is None else bias
        dense = None if self.dense is None else self.dense.weight
        by_row = bias if bias is not None and bias.dim() > 1 else None
        shared = bias if by_row is None else None
        y = quantized_linear(
            self.quantized, x, shared, int8_activations=self.int8_activations, fused=self.fused, dense=dense
        )
        return y if by_row is None else y + align_rows("bias", by_row, x).to(y.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)
        # The weight's tensors are moved but never cast: `fn` may be `.half()`, and absmax must stay float32.
        self.quantized = tree_map(lambda leaf: moved(leaf, fn, cast=False), self.quantized)
        self.fused = None if self.fused is None else fused_weight(self.quantized, self.fused.max_rows)
        weight = None if self.dense is None else self.dense.weight
        if self.dense is not None and weight is not None and not (like := fn(weight[:0])).is_meta:
            if like.dtype != weight.dtype:
                self.dense = None  # in another dtype, the copy would not be used, or would take more memory
            elif like.device != weight.device:
                self.dense = dense_copy(self.quantized, weight.dtype)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.dense is not None and self.dense.weight is None:  # unpickled
            self.dense = dense_copy(self.quantized, self.dense.dtype)


class DenseLinear(nn.Linear):
    """A frozen `nn.Linear` without an adapter. Inputs are made contiguous, so that torch does not copy the weight.

    Example:
        >>> import torch
        >>> DenseLinear(3, 2)(torch.ones(5, 7, 3)[:, -1:]).shape
        torch.Size([5, 1, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(contiguous_rows(x), self.weight, self.bias)


class RowwiseAffine(nn.Module):
    """An affine layer whose weight and bias may have leading axes, with one value for each row of the batch.

    A `RowwiseAffine` replaces an `nn.Linear`, `Conv1D` or `nn.LayerNorm` that is trained together with an adapter, so
    that each row of a mixed batch can have its own classifier or bias.

    Args:
        base_layer: The layer to replace. `forward` calls the base layer itself if no weight or bias is set on the
            `RowwiseAffine`.

    Example:
        >>> import torch
        >>> layer = RowwiseAffine(nn.Linear(3, 2))
        >>> own = {"weight": torch.ones(5, 2, 3), "bias": torch.zeros(5, 2)}
        >>> torch.func.functional_call(layer, own, torch.ones(5, 7, 3)).shape
        torch.Size([5, 7, 2])
    """

    path: str
    projections: "Projections | None"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        register_own(self)
        init_row_layout(self)

    weight, bias = own_or_base("weight"), own_or_base("bias")

    def forward(self, x: Tensor) -> Tensor:
        return call_by_rows(self, base_fn(self), contiguous_rows(x))


def register_own(layer: WithBase) -> None:
    """Register the layer's own weight and bias as None."""
    # `register_parameter` does not accept these names, because the class has properties with them.
    names = ["bias"] if isinstance(layer.base_layer, QuantizedLinear) else ["weight", "bias"]
    layer._parameters.update(dict.fromkeys(names))


def base_fn(layer: WithBase) -> Callable[[Tensor], Tensor]:
    """Return the base layer as a function of `x`, with the weight and bias that are set on `layer`, if any."""
    own = layer._parameters
    if own.get("weight") is None and own["bias"] is None:
        return layer.base_layer
    return partial(_call_with, layer.base_layer, read_own_or_base(layer, "weight"), layer.bias)


def _call_with(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Compute `layer(x)` with another weight and bias, each shared by all rows or given separately for each row."""
    if isinstance(layer, QuantizedLinear):
        return layer(x, bias)
    if not may_have_rows(layer) or layer._forward_hooks or layer._forward_pre_hooks:
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


def dense_weight(layer: Any, dtype: torch.dtype, own: Tensor | None = None) -> Tensor:
    """Return the dense weight (out, in) of a base layer, for the row norms of DVoRA.

    If `own` is given, it replaces the weight of a dense layer. `own` must have the layout of `layer.weight`.

    Raises:
        ValueError: If the weight is offloaded, or is a scaled float8 weight.

    Example:
        >>> dense_weight(nn.Linear(3, 2), torch.float64).shape
        torch.Size([2, 3])
    """
    if isinstance(layer, QuantizedLinear):
        return dequantize(layer.quantized, dtype)
    weight = layer.weight if own is None else own
    if weight.dtype not in (*FLOATS, torch.float64):
        raise ValueError(
            f"DVoRA needs the norms of the weight, but a {type(layer).__name__} has a {weight.dtype} weight; "
            "dequantize the model first."
        )
    return (weight.mT if is_conv1d(layer) else weight).to(dtype)


def may_have_rows(module: nn.Module) -> bool:
    """Whether the parameters of a layer of this class may have one value for each row of the batch.

    Example:
        >>> may_have_rows(nn.Linear(3, 2)), may_have_rows(nn.Embedding(3, 2))
        (True, False)
    """
    return type(module) in (nn.Linear, nn.LayerNorm) or is_conv1d(module)


def copy_base_layer(
    module: nn.Module, memo: dict[int, Any], *, rows: bool = False, int8_activations: bool = False
) -> nn.Module | None:
    """Return the layer that replaces a module of the model in a module tree, or None if the module is not replaced.

    Pass `rows=True` if a parameter of the module is trained: the parameter may then have one value per row of a batch.

    Example:
        >>> copy_base_layer(nn.Linear(3, 2), {})
        DenseLinear(in_features=3, out_features=2, bias=True)
    """
    if is_bnb_linear(module):
        q, bias = from_bnb(module)
        return QuantizedLinear(q, bias, int8_activations=int8_activations and isinstance(q, Quantized8bit))
    if rows and may_have_rows(module):
        return RowwiseAffine(copy_module(module, memo))
    if type(module) is not nn.Linear:
        return None
    layer = copy_module(module, memo)
    layer.__class__ = DenseLinear
    return layer


def call_by_rows(layer: "QuantizedLinear | WithBase", forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute `forward(x)`, where `forward` expects batch axis 0, and `x` may have another batch axis."""
    projections = layer.projections
    layout = None if projections is None else projections.rows.get(layer.path)
    if layout is None or layout == x.dim():
        return forward(x)
    if isinstance(layout, int):
        raise ValueError(
            f"layer {layer.path!r} got an input of shape {tuple(x.shape)}. In an earlier call with similar inputs, "
            f"the layer's input had {layout} axes. The number of axes depends on the data, so the batch axis is not "
            "known. Run one adapter at a time."
        )
    return layout.call(forward, x)


def init_row_layout(layer: "QuantizedLinear | RowwiseAffine") -> None:
    """Initialize the attributes that `make_apply` sets on layers whose parameters may have rows."""
    layer.path = ""
    layer.projections = None


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor], *, cast: bool = True) -> Tensor:
    """Move a frozen tensor to the device and dtype to which `fn` moves tensors.

    If `fn` moves tensors to the meta device, the tensor is returned unchanged and keeps its data. The tensor is neither
    a parameter nor a buffer, so `torch.func.functional_call` could not replace a meta tensor by a tensor with data.
    """
    like = fn(tensor[:0] if tensor.dim() else tensor)
    return tensor if like.is_meta else tensor.to(like.device, like.dtype if cast else tensor.dtype)
