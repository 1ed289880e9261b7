"""Thin modules over the pure functions: one adapted linear layer, over a dense, 4-bit or 8-bit base.

The arithmetic is `vera_forward` and `quantized_linear`; a shell only holds what they are called with. Its
parameters are `lambda_b` and `lambda_d`; the projections are references to the shared pair, and no part of a
state dict. `shell_class` chooses the class from that of the base layer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm, linear

from ..core.adapter import delta_weight, dropout_mask, forward, init_params
from ..core.autograd import project
from ..core.shapes import align_rows, contiguous_rows
from ..private import graph_task, tree_leaves, tree_map
from ..quant.bnb import from_bnb, is_bnb_linear
from ..quant.cpu_layout import FusedWeight, fused_weight
from ..quant.linear import quantized_linear
from ..quant.value import Quantized, Quantized4bit
from .targets import is_conv1d, linear_sizes


WITHOUT_CHECKPOINTING = (
    "Call model.gradient_checkpointing_disable() before adapt or load_adapter, or train to_module(adapted), which may "
    "checkpoint."
)


class Turn(Protocol):
    """How a layer is called whose rows are not in front; see `rows`."""

    def around(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...


class Projections(nn.Module):
    """The shared pair as a module, so that many shells can hold one instance of it; not in any state dict.

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
        self.vera_A, self.vera_B = (_moved(tensor, fn) for tensor in (self.vera_A, self.vera_B))
        return self


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
        _is_no_place(self)

    @property
    def weight(self) -> Tensor:
        """The packed weight: what models look at when they ask a layer for its device or dtype."""
        return tree_leaves(self.quantized)[0]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _turned(self, partial(self._multiply, bias=bias), x)

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
        self.quantized = tree_map(lambda leaf: _moved(leaf, fn, cast=False), self.quantized)
        self.fused = None if self.fused is None else fused_weight(self.quantized)
        return self


def _own_or_base(name: str) -> property:
    """The layer's own parameter where it holds one, in place of its base layer's."""

    def get(self: Any) -> Tensor | None:
        own = self._parameters.get(name)
        return getattr(self.base_layer, name) if own is None else own

    return property(get)


def _hold_own(layer: Any) -> None:
    # Past `register_parameter`, which the properties of these names are in the way of.
    names = ["bias"] if isinstance(layer.base_layer, QuantizedLinear) else ["weight", "bias"]
    layer._parameters.update(dict.fromkeys(names))


def _base_fn(layer: Any) -> Callable[[Tensor], Tensor]:
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


def set_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a layer a parameter of its own; its base layer then no longer holds one of that name."""
    if name in ("weight", "bias") and isinstance(layer, RowwiseAffine | Linear | Linear4bit | Linear8bitLt):
        layer.base_layer._parameters[name] = None
    setattr(layer, name, parameter)


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
        _hold_own(self)
        _is_no_place(self)

    weight, bias = _own_or_base("weight"), _own_or_base("bias")

    def forward(self, x: Tensor) -> Tensor:
        return _turned(self, _base_fn(self), contiguous_rows(x))


def _turned(layer: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`forward(x)`, which takes the rows in front, for an `x` that may have them elsewhere."""
    turn = None if layer.projections is None else layer.projections.rows.get(layer.path)
    return forward(x) if turn is None else turn.around(forward, x)


def _is_no_place(layer: Any) -> None:
    # Set by `adapt` where the layer may have parameters for each row: its name in the model, and what the tree shares.
    layer.path = ""
    layer.projections = None


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor], *, cast: bool = True) -> Tensor:
    """What `fn` makes of a frozen tensor: another device or dtype, but no other values.

    It stays where it is if `fn` moves to the meta device: the stateless skeleton that `torch.func.stack_module_state`
    goes with is made like this, and gets its state, but no constants, from the caller.
    """
    like = fn(tensor[:0] if tensor.dim() else tensor)
    return tensor if like.is_meta else tensor.to(like.device, like.dtype if cast else tensor.dtype)


def frozen_layer(module: nn.Module) -> nn.Module:
    """The layer that a shell calls: a bitsandbytes module's value as `QuantizedLinear`, any other as it is.

    Example:
        >>> frozen_layer(nn.Linear(3, 2))
        Linear(in_features=3, out_features=2, bias=True)
    """
    return QuantizedLinear(*from_bnb(module)) if is_bnb_linear(module) else module


def shell_class(module: nn.Module) -> type["Linear"] | type["Linear4bit"] | type["Linear8bitLt"]:
    """The shell for a base layer: `Linear`, `Linear4bit` or `Linear8bitLt`.

    Raises:
        ValueError: If the layer cannot be adapted.

    Example:
        >>> shell_class(nn.Linear(3, 2)).__name__
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


def _init(
    self: Any,
    base_layer: nn.Module,
    adapter_name: str,
    vera_A: Tensor | Mapping[str, Tensor],
    vera_B: Tensor | Mapping[str, Tensor],
    r: int,
    vera_dropout: float = 0.0,
    d_initial: float = 0.1,
) -> None:
    nn.Module.__init__(self)
    right: Any = shell_class(base_layer)
    if type(self) is not right:
        raise ValueError(f"a {type(base_layer).__name__} needs the shell {right.__name__}.")
    if not 0 <= vera_dropout < 1:
        raise ValueError(f"vera_dropout must be at least 0 and below 1, got {vera_dropout}.")
    A = vera_A if isinstance(vera_A, Tensor) else vera_A[adapter_name]
    B = vera_B if isinstance(vera_B, Tensor) else vera_B[adapter_name]
    in_features, out_features = layer_sizes(base_layer)
    if (
        A.dim() != 2
        or B.dim() != 2
        or A.shape[0] != r
        or B.shape[1] != r
        or A.shape[1] < in_features
        or B.shape[0] < out_features
    ):
        raise ValueError(
            f"vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} do not fit a layer {in_features} -> {out_features} "
            f"at rank {r}: they must be ({r}, >= {in_features}) and (>= {out_features}, {r})."
        )
    self.base_layer = frozen_layer(base_layer)
    _hold_own(self)
    self.adapter_name = adapter_name
    self.in_features, self.out_features, self.r = in_features, out_features, r
    self.vera_dropout = vera_dropout
    self.generator = None
    self.path = ""
    self.projections = Projections(A, B)
    params = init_params(r, out_features, d_initial, device=A.device)
    self.lambda_b = nn.Parameter(params["lambda_b"])
    self.lambda_d = nn.Parameter(params["lambda_d"])
    self.register_buffer("mixture", None, persistent=False)


def _forward(self: Any, x: Tensor) -> Tensor:
    return _turned(self, partial(_adapted, self), x)


def _adapted(self: Any, x: Tensor) -> Tensor:
    projections = self.projections
    projections.require_call()
    params = {"lambda_b": self.lambda_b, "lambda_d": self.lambda_d}
    if self.mixture is not None:
        params["mixture"] = self.mixture
    # No copy where the projections are on the layer's device, which is the rule.
    frozen = {"vera_A": projections.vera_A.to(x.device), "vera_B": projections.vera_B.to(x.device)}
    mask = None
    generator = self.generator or projections.generator
    if generator is not None and self.vera_dropout > 0:
        mask = dropout_mask(self.vera_dropout, tuple(x.shape), generator=generator, dtype=params["lambda_d"].dtype)
    return forward(params, frozen, x, _base_fn(self), mask, projections.product)


def _get_delta_weight(self: Any, adapter: str) -> Tensor:
    """The dense update that `adapter` makes to the base layer's weight, in that weight's layout."""
    if adapter != self.adapter_name:
        raise ValueError(f"this layer has the adapter {self.adapter_name!r}, not {adapter!r}.")
    params = {"lambda_b": self.lambda_b, "lambda_d": self.lambda_d}
    frozen = {"vera_A": self.projections.vera_A, "vera_B": self.projections.vera_B}
    delta = delta_weight(params, frozen, self.in_features)
    return delta.mT if is_conv1d(self.base_layer) else delta


class Linear(nn.Module):
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
    """

    __init__ = _init
    forward = _forward
    get_delta_weight = _get_delta_weight
    weight, bias = _own_or_base("weight"), _own_or_base("bias")


class Linear4bit(nn.Module):
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

    __init__ = _init
    forward = _forward
    get_delta_weight = _get_delta_weight
    weight, bias = _own_or_base("weight"), _own_or_base("bias")


class Linear8bitLt(nn.Module):
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

    __init__ = _init
    forward = _forward
    get_delta_weight = _get_delta_weight
    weight, bias = _own_or_base("weight"), _own_or_base("bias")


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a layer that a shell can hold."""
    if isinstance(module, QuantizedLinear):
        out_features, in_features = module.quantized.shape
        return in_features, out_features
    sizes = linear_sizes(module)
    assert sizes is not None, type(module)
    return sizes
