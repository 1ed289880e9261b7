"""Adapted linear layers as modules, over a dense, 4-bit or 8-bit base layer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import delta_weight, dropout_mask, forward, init_params
from ..core.autograd import is_recorded, project
from ..core.dora import fold_layer, norm_statistics
from ..core.keys import BASE_SHARE, MAGNITUDE, OUTPUT_SCALE, STATISTICS, join_key
from ..core.shapes import require_product_dtype
from ..private import graph_task, in_transform
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.value import Quantized4bit, format_of
from .base_layers import (
    QuantizedLinear,
    RowLayout,
    RowwiseAffine,
    base_fn,
    call_by_rows,
    dense_weight,
    moved,
    own_or_base,
    read_own_or_base,
    register_own,
)
from .lazy_weight import lazy_weight
from .linears import is_conv1d, linear_sizes


WITHOUT_CHECKPOINTING = (
    "Call model.gradient_checkpointing_disable() before adapt or load_adapter, or train to_module(adapted), which "
    "supports checkpointing."
)


# Tensors of a DVoRA layer that a call may bind.
_DORA = (MAGNITUDE, OUTPUT_SCALE, "scale_share", *STATISTICS)


class Projections(nn.Module):
    """A module that contains the projections. Many layers share one instance, whose state dict is empty.

    Example:
        >>> import torch
        >>> Projections(torch.ones(2, 3), torch.ones(4, 2)).state_dict()
        OrderedDict()
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, vera_A: Tensor, vera_B: Tensor, product_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        require_product_dtype(product_dtype)
        self.vera_A, self.vera_B = vera_A, vera_B
        self.product_dtype = product_dtype
        self.exact: Mapping[str, Tensor] | None = None  # the projections of a call, not rounded to `product_dtype`
        self.product: Callable[[Tensor, Tensor], Tensor] = project
        self.generator: torch.Generator | None = None
        self.rows: Mapping[str, RowLayout | int] = {}
        self.call: int | None = None
        self.traced = False  # whether the compiler is tracing a call

    def require_call(self) -> None:
        """Raise an error if a layer runs outside of the call of `apply` that uses the layer's tree (see `checkout`).

        The attribute `call` is the value of `graph_task()` when `apply` was called: the id of the backward pass that
        was running, or -1 if no backward pass was running. For layers that are not part of an `Apply`, `call` is None,
        and nothing is checked.

        Raises:
            ValueError: If the call of `apply` has returned.
        """
        if self.call is not None and not torch.compiler.is_compiling() and self.call != graph_task():
            raise ValueError(
                "a layer runs again in backward, because the model uses activation checkpointing. By then, apply has "
                f"returned, and params are no longer bound to the layer. {WITHOUT_CHECKPOINTING}"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "Projections":
        super()._apply(fn, recurse)
        self.vera_A, self.vera_B = (moved(tensor, fn) for tensor in (self.vera_A, self.vera_B))
        return self


def _is_single_row(x: Tensor, params: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> bool:
    """Whether `x` is one row on a CPU, and no gradients are recorded.

    On a CPU, the product of a single row and a matrix is faster and more accurate in float32 than in a 16-bit dtype.
    """
    if x.numel() != x.shape[-1] or not x.is_cpu or torch.compiler.is_compiling() or in_transform():
        return False
    return exact["vera_A"].dtype == params["lambda_d"].dtype and not is_recorded(x, *params.values())


def set_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter of a layer, and remove the base layer's parameter of that name."""
    if name in ("weight", "bias") and isinstance(layer, RowwiseAffine | AdaptedLinear):
        layer.base_layer._parameters[name] = None
    setattr(layer, name, parameter)


def frozen_layer(module: nn.Module) -> nn.Module:
    """Convert a bitsandbytes module to a `QuantizedLinear`; return any other module unchanged.

    Example:
        >>> frozen_layer(nn.Linear(3, 2))
        Linear(in_features=3, out_features=2, bias=True)
    """
    return QuantizedLinear(*from_bnb(module)) if is_bnb_linear(module) else module


class AdaptedLinear(nn.Module):
    """The base class of `Linear`, `Linear4bit` and `Linear8bitLt`: a base layer, two vectors and the projections."""

    lambda_b: nn.Parameter
    lambda_d: nn.Parameter
    mixture: Tensor | None
    output_scale: Tensor | None
    scale_share: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        vera_A: Tensor | Mapping[str, Tensor],
        vera_B: Tensor | Mapping[str, Tensor],
        r: int,
        vera_dropout: float = 0.0,
        d_initial: float = 0.1,
        product_dtype: torch.dtype | None = None,
        *,
        use_dora: bool = False,
        differentiate_norm: bool = False,
    ) -> None:
        super().__init__()
        right: Any = layer_class(base_layer)
        if type(self) is not right:
            raise ValueError(
                f"a vf.{type(self).__name__} can't adapt a {type(base_layer).__name__}; use vf.{right.__name__}."
            )
        if not 0 <= vera_dropout < 1:
            raise ValueError(f"vera_dropout must be at least 0 and below 1, got {vera_dropout}.")
        A = vera_A if isinstance(vera_A, Tensor) else vera_A[adapter_name]
        B = vera_B if isinstance(vera_B, Tensor) else vera_B[adapter_name]
        in_features, out_features = layer_sizes(base_layer)
        fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == r
        if not fits or A.shape[1] < in_features or B.shape[0] < out_features:
            raise ValueError(
                f"at rank {r}, a layer {in_features} -> {out_features} needs vera_A of shape ({r}, >= {in_features}), "
                f"got {tuple(A.shape)}, and vera_B of shape (>= {out_features}, {r}), got {tuple(B.shape)}."
            )
        self.base_layer = frozen_layer(base_layer)
        register_own(self)
        self.adapter_name = adapter_name
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.vera_dropout = vera_dropout
        self.generator: torch.Generator | None = None
        self.path = ""
        self.projections = Projections(A, B, product_dtype)
        self.use_dora, self.differentiate_norm = use_dora, differentiate_norm
        for name in ("mixture", *(_DORA if use_dora else ())):
            self.register_buffer(name, None, persistent=False)
        # With placeholders for the projections, calls bind the magnitude or output scale, and no weight is needed here.
        weight = dense_weight(self.base_layer, torch.float32) if use_dora and not A.is_meta else None
        for name, vector in init_params(r, out_features, d_initial, device=A.device, weight=weight).items():
            setattr(self, name, nn.Parameter(vector))

    bias = own_or_base("bias")

    @property
    def weight(self) -> Tensor:
        """The adapted weight, for models that read the weight instead of calling the layer; see `lazy_weight`."""
        base = read_own_or_base(self, "weight")
        if self.lambda_b.is_meta:  # no vectors
            return base
        return lazy_weight(self._adapted_weight, base)

    def forward(self, x: Tensor) -> Tensor:
        return call_by_rows(self, self._adapted, x)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the adapter's update of the weight as a dense tensor, in the layout of the base layer's weight."""
        if adapter != self.adapter_name:
            raise ValueError(
                f"this layer has the adapter {self.adapter_name!r}, not {adapter!r}: pass {self.adapter_name!r}."
            )
        frozen = {"vera_A": self.projections.vera_A, "vera_B": self.projections.vera_B}
        weight = self.base_weight(self.lambda_d.dtype) if self.use_dora else None
        delta = delta_weight(self._params(), frozen, self.in_features, weight)
        return delta.mT if is_conv1d(self.base_layer) else delta

    def base_weight(self, dtype: torch.dtype, own: Tensor | None = None) -> Tensor:
        """Return the weight (or `own`, if given) as a dense (out, in) tensor of `dtype`, but at least of float32."""
        own = self._parameters.get("weight") if own is None else own
        return dense_weight(self.base_layer, torch.promote_types(dtype, torch.float32), own)

    def extra_repr(self) -> str:
        base: Any = self.base_layer
        form = format_of(base.quantized) if isinstance(base, QuantizedLinear) else str(base.weight.dtype)[6:]
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, format={form}"

    def _adapted_weight(self) -> Tensor:
        base = read_own_or_base(self, "weight")
        if self.lambda_b.dim() > 1 or base.dim() > 2 or self.mixture is not None:
            raise ValueError(
                f"the model uses the weight of {self.path!r} without calling this layer, so rows can't have different "
                "adapters. Run one adapter at a time, map over adapters with torch.func.vmap, or adapt other layers."
            )
        self.projections.require_call()
        params, weight = self._params(), self.base_weight(self.lambda_d.dtype)
        frozen = {"vera_A": self.projections.vera_A, "vera_B": self.projections.vera_B}
        if MAGNITUDE in params:
            statistics = norm_statistics(weight, frozen)
            params = fold_layer(params, frozen | statistics, differentiate_norm=self.differentiate_norm)
        weight = weight + delta_weight(params, frozen, self.in_features, weight if self.use_dora else None)
        weight = weight.mT if is_conv1d(self.base_layer) else weight
        return weight.to(base.dtype) if base.is_floating_point() else weight

    def _adapted(self, x: Tensor) -> Tensor:
        projections = self.projections
        projections.require_call()
        params = self._params()
        frozen: Mapping[str, Tensor] = {"vera_A": projections.vera_A, "vera_B": projections.vera_B}
        product_dtype = projections.product_dtype
        if projections.exact is not None and _is_single_row(x, params, projections.exact):
            frozen, product_dtype = projections.exact, None
        if frozen["vera_A"].device != x.device:
            frozen = {name: tensor.to(x.device) for name, tensor in frozen.items()}
        mask = None
        generator = self.generator or projections.generator
        if generator is not None and self.vera_dropout > 0:
            mask = dropout_mask(self.vera_dropout, tuple(x.shape), generator=generator, dtype=params["lambda_d"].dtype)
        branch = mask, projections.product, product_dtype
        if not self.use_dora:
            return forward(params, frozen, x, base_fn(self), *branch)
        if MAGNITUDE in params:
            given = {name: getattr(self, name) for name in STATISTICS}
            if given["C"] is None or self._parameters.get("weight") is not None:
                given = norm_statistics(self.base_weight(self.lambda_d.dtype), frozen)
            frozen = {**frozen, **given}
        norm = self.differentiate_norm
        return forward(params, frozen, x, base_fn(self), *branch, bias=self.bias, differentiate_norm=norm)

    def _params(self) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {"lambda_b": self.lambda_b, "lambda_d": self.lambda_d}
        if self.mixture is not None:
            params["mixture"] = self.mixture
        if self.use_dora:
            name = MAGNITUDE if self.output_scale is None else OUTPUT_SCALE
            params[name] = getattr(self, name)
            if self.scale_share is not None:
                params[join_key(name, BASE_SHARE)] = self.scale_share
        return params


class Linear(AdaptedLinear):
    """An adapted dense layer: `vera_forward` over `nn.Linear` or transformers' `Conv1D`.

    Args:
        base_layer: The frozen layer, which is called but never modified.
        adapter_name: A name for the adapter.
        vera_A: A tensor of shape (r, >= in), or a mapping from adapter names to such tensors.
        vera_B: A tensor of shape (>= out, r), or a mapping from adapter names to such tensors.
        r: Rank.
        vera_dropout: Dropout probability for the inputs of `A`. Dropout is applied only if the attribute `generator` is
            set to a `torch.Generator`.
        d_initial: Initial value of `lambda_d`.
        product_dtype: Dtype of the matrix products with the projections; see `vera_forward`.
        use_dora: Whether the layer is a DVoRA layer, with a `magnitude`; see `core.dora`.
        differentiate_norm: Whether to differentiate through the row norms of DVoRA.

    Raises:
        ValueError: If `base_layer` requires another class (see `layer_class`), if the projections do not have rank `r`
            or are smaller than the layer, or if `product_dtype` is not a 16-bit dtype.

    Example:
        >>> import torch
        >>> from vera_func import init_projections
        >>> frozen = init_projections(4, 8, 6)
        >>> layer = Linear(nn.Linear(8, 6), "default", frozen["vera_A"], frozen["vera_B"], r=4)
        >>> layer(torch.ones(3, 8)).shape, layer.get_delta_weight("default").shape
        (torch.Size([3, 6]), torch.Size([6, 8]))
        >>> layer.extra_repr()
        'in_features=8, out_features=6, r=4, format=float32'
    """


class Linear4bit(AdaptedLinear):
    """An adapted 4-bit layer: `vera_forward` over the quantized weight of a bitsandbytes `Linear4bit`.

    Arguments and errors are those of `Linear`. The weight is converted at construction; `base_layer` is never called or
    modified.

    Example:
        >>> import torch, bitsandbytes as bnb
        >>> from vera_func import init_projections
        >>> frozen = init_projections(4, 64, 32)
        >>> base = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
        >>> layer = Linear4bit(base, "default", frozen["vera_A"], frozen["vera_B"], r=4)
        >>> torch.func.grad(lambda x: layer(x).sum())(torch.ones(64)).shape
        torch.Size([64])
    """


class Linear8bitLt(AdaptedLinear):
    """An adapted 8-bit layer: `vera_forward` over the quantized weight of a bitsandbytes `Linear8bitLt`.

    Arguments and errors are those of `Linear`. The weight is converted at construction; `base_layer` is never called or
    modified.

    Example:
        >>> import torch, bitsandbytes as bnb
        >>> from vera_func import init_projections
        >>> frozen = init_projections(4, 64, 32)
        >>> base = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
        >>> layer = Linear8bitLt(base, "default", frozen["vera_A"], frozen["vera_B"], r=4)
        >>> layer(torch.ones(3, 64)).shape
        torch.Size([3, 32])
    """


def layer_class(module: nn.Module) -> type["Linear"] | type["Linear4bit"] | type["Linear8bitLt"]:
    """Return the adapted class for a base layer: `Linear`, `Linear4bit` or `Linear8bitLt`.

    Raises:
        ValueError: If the layer cannot be adapted.

    Example:
        >>> layer_class(nn.Linear(3, 2)).__name__
        'Linear'
    """
    if isinstance(module, QuantizedLinear):
        return Linear4bit if isinstance(module.quantized, Quantized4bit) else Linear8bitLt
    if is_bnb_linear(module):
        return Linear4bit if hasattr(module.weight, "quant_state") else Linear8bitLt
    if linear_sizes(module) is None:
        raise ValueError(
            f"a {type(module).__name__} cannot be adapted: pass an nn.Linear, a linear layer of bitsandbytes, or "
            "transformers' Conv1D."
        )
    return Linear


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """Return `(in_features, out_features)` of a dense or quantized layer."""
    if isinstance(module, QuantizedLinear):
        out_features, in_features = module.quantized.shape
        return in_features, out_features
    sizes = linear_sizes(module)
    assert sizes is not None, type(module)
    return sizes
