"""Thin modules over the pure functions: one adapted linear layer, over a dense, 4-bit or 8-bit base.

The arithmetic is that of `vera_forward` and `quantized_linear`. Parameters are `lambda_b` and `lambda_d`; the
projections are references to the shared pair, and not in any state dict. `layer_class` chooses the class from that of
the base layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import delta_weight, dropout_mask, forward, init_params
from ..core.autograd import project
from ..private import graph_task
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.value import Quantized4bit, format_of
from .base_layers import QuantizedLinear, RowwiseAffine, Turn, base_fn, hold_own, moved, own_or_base, turned
from .targets import is_conv1d, linear_sizes


WITHOUT_CHECKPOINTING = (
    "Call model.gradient_checkpointing_disable() before adapt or load_adapter, or train to_module(adapted), which may "
    "checkpoint."
)


class Projections(nn.Module):
    """The shared pair as a module, so that many layers can hold one instance of it; not in any state dict.

    Example:
        >>> import torch
        >>> Projections(torch.ones(2, 3), torch.ones(4, 2)).state_dict()
        OrderedDict()
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, vera_A: Tensor, vera_B: Tensor) -> None:
        super().__init__()
        self.vera_A, self.vera_B = vera_A, vera_B
        self.product: Callable[[Tensor, Tensor], Tensor] = project
        self.generator: torch.Generator | None = None
        self.rows: Mapping[str, Turn] = {}
        self.call: int | None = None
        self.traced = False  # by the compiler, just now

    def require_call(self) -> None:
        """Refuse to run in a module tree outside of the call that it was checked out for; see `checkout`.

        `call` is the number of the backward pass in which the call was made, or -1 for none. Other modules have None.

        Raises:
            ValueError: If the call has ended, or another one has got the tree since.
        """
        if self.call is not None and not torch.compiler.is_compiling() and self.call != graph_task():
            raise ValueError(
                "a layer runs again in backward, when the call of apply has ended and its params are gone: the model "
                f"checkpoints activations. {WITHOUT_CHECKPOINTING}"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "Projections":
        super()._apply(fn, recurse)
        self.vera_A, self.vera_B = (moved(tensor, fn) for tensor in (self.vera_A, self.vera_B))
        return self


def set_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a layer a parameter of its own; its base layer then no longer holds one of that name."""
    if name in ("weight", "bias") and isinstance(layer, RowwiseAffine | AdaptedLinear):
        layer.base_layer._parameters[name] = None
    setattr(layer, name, parameter)


def frozen_layer(module: nn.Module) -> nn.Module:
    """The layer that an adapted layer calls: a bitsandbytes module's value as `QuantizedLinear`, any other as it is.

    Example:
        >>> frozen_layer(nn.Linear(3, 2))
        Linear(in_features=3, out_features=2, bias=True)
    """
    return QuantizedLinear(*from_bnb(module)) if is_bnb_linear(module) else module


class AdaptedLinear(nn.Module):
    """What `Linear`, `Linear4bit` and `Linear8bitLt` are: a base layer, two vectors, and the shared projections."""

    mixture: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        vera_A: Tensor | Mapping[str, Tensor],
        vera_B: Tensor | Mapping[str, Tensor],
        r: int,
        vera_dropout: float = 0.0,
        d_initial: float = 0.1,
    ) -> None:
        super().__init__()
        right: Any = layer_class(base_layer)
        if type(self) is not right:
            raise ValueError(f"a {type(base_layer).__name__} needs the layer {right.__name__}.")
        if not 0 <= vera_dropout < 1:
            raise ValueError(f"vera_dropout must be at least 0 and below 1, got {vera_dropout}.")
        A = vera_A if isinstance(vera_A, Tensor) else vera_A[adapter_name]
        B = vera_B if isinstance(vera_B, Tensor) else vera_B[adapter_name]
        in_features, out_features = layer_sizes(base_layer)
        fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == r
        if not fits or A.shape[1] < in_features or B.shape[0] < out_features:
            raise ValueError(
                f"vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} do not fit a layer {in_features} -> "
                f"{out_features} at rank {r}: they must be ({r}, >= {in_features}) and (>= {out_features}, {r})."
            )
        self.base_layer = frozen_layer(base_layer)
        hold_own(self)
        self.adapter_name = adapter_name
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.vera_dropout = vera_dropout
        self.generator: torch.Generator | None = None
        self.path = ""
        self.projections = Projections(A, B)
        params = init_params(r, out_features, d_initial, device=A.device)
        self.lambda_b = nn.Parameter(params["lambda_b"])
        self.lambda_d = nn.Parameter(params["lambda_d"])
        self.register_buffer("mixture", None, persistent=False)

    weight, bias = own_or_base("weight"), own_or_base("bias")

    def forward(self, x: Tensor) -> Tensor:
        return turned(self, self._adapted, x)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update that `adapter` makes to the base layer's weight, in that weight's layout."""
        if adapter != self.adapter_name:
            raise ValueError(f"this layer has the adapter {self.adapter_name!r}, not {adapter!r}.")
        params = {"lambda_b": self.lambda_b, "lambda_d": self.lambda_d}
        frozen = {"vera_A": self.projections.vera_A, "vera_B": self.projections.vera_B}
        delta = delta_weight(params, frozen, self.in_features)
        return delta.mT if is_conv1d(self.base_layer) else delta

    def extra_repr(self) -> str:
        base: Any = self.base_layer
        form = format_of(base.quantized) if isinstance(base, QuantizedLinear) else str(base.weight.dtype)[6:]
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, format={form}"

    def _adapted(self, x: Tensor) -> Tensor:
        projections = self.projections
        projections.require_call()
        params: dict[str, Tensor] = {"lambda_b": self.lambda_b, "lambda_d": self.lambda_d}
        if self.mixture is not None:
            params["mixture"] = self.mixture
        # No copy where the projections are on the layer's device, which is the rule.
        frozen = {"vera_A": projections.vera_A.to(x.device), "vera_B": projections.vera_B.to(x.device)}
        mask = None
        generator = self.generator or projections.generator
        if generator is not None and self.vera_dropout > 0:
            mask = dropout_mask(self.vera_dropout, tuple(x.shape), generator=generator, dtype=params["lambda_d"].dtype)
        return forward(params, frozen, x, base_fn(self), mask, projections.product)


class Linear(AdaptedLinear):
    """An adapted dense layer: `vera_forward` over `nn.Linear` or transformers' `Conv1D`.

    Args:
        base_layer: The frozen layer; it is called, never changed.
        adapter_name: A name for the adapter.
        vera_A: (r, >= in), or a mapping from adapter names to it.
        vera_B: (>= out, r), or a mapping from adapter names to it.
        r: Rank.
        vera_dropout: Probability of dropping an input of `A`, where `generator` is set to a `torch.Generator`.
        d_initial: Initial value of `lambda_d`.

    Raises:
        ValueError: If the base layer is of another class, or the projections have another rank or are too narrow.

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
    """An adapted 4-bit layer: `vera_forward` over the value of a bitsandbytes `Linear4bit`.

    Args and errors are those of `Linear`; `base_layer` is read once and never called or changed.

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
    """An adapted 8-bit layer: `vera_forward` over the value of a bitsandbytes `Linear8bitLt`.

    Args and errors are those of `Linear`; `base_layer` is read once and never called or changed.

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
    """The class of the adapted layer over a base layer: `Linear`, `Linear4bit` or `Linear8bitLt`.

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
            f"a {type(module).__name__} cannot be adapted; nn.Linear, bitsandbytes' linears and transformers' "
            "Conv1D can."
        )
    return Linear


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a layer that can be adapted, dense or quantized."""
    if isinstance(module, QuantizedLinear):
        out_features, in_features = module.quantized.shape
        return in_features, out_features
    sizes = linear_sizes(module)
    assert sizes is not None, type(module)
    return sizes
