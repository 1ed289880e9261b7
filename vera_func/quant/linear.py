"""The linear layer over a quantized weight.

    y = x dequantize(q)ᵀ + bias

In bitsandbytes' modules, the product with a quantized weight raises an error under `torch.func`, or has zero
derivatives. The product in this module is differentiable in `x` under `grad`, `jvp` and `vmap`, nested to any depth.
Only the packed weight is saved for backward.

As in `core.adapter`, a weight has shape (out, in), and an input `x` has shape (*batch, in).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from .. import private
from ..core.shapes import contiguous_rows, require_rows_of_floats
from .cpu_layout import FusedWeight
from .crossover import ROWS, measured_rows
from .native import gemv_4bit
from .quantize import dequantize_leaves, is_differentiated, refuse_weight_derivative
from .value import FLOATS, NO_DATA, Quantized, Quantized4bit, Quantized8bit, Spec, Spec4bit, check_sizes, flatten


def quantized_linear(
    q: Quantized,
    x: Float[Tensor, "*batch in"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    int8_activations: bool = False,
    fused: FusedWeight | None = None,
    dense: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """Compute `x dequantize(q)ᵀ + bias`, differentiable in `x` and `bias` to any order.

    The dense weight is a temporary tensor, and the backward pass dequantizes again. The arithmetic is that of
    bitsandbytes' modules in training. As a `base_fn`, pass `functools.partial(quantized_linear, q)`. For few rows on a
    GPU, a kernel of bitsandbytes multiplies by the packed weight without forming the dense weight. Under
    `torch.compile`, the compiler decides what is saved for backward, and may save dense weights.

    Args:
        q: A quantized weight.
        x: Input. The product is computed in `q.compute_dtype` if that is set, else in the dtype of `x`.
        bias: Bias of shape (out,), or None. The bias is cast to the dtype of the product before it is added.
        int8_activations: Whether to quantize the rows of `x` to 8 bits and multiply integers (LLM.int8()). Requires an
            8-bit `q`. If `q.threshold` is not 0, features with a value above `q.threshold` are not quantized. The
            integer product is faster on GPUs, with an error of one or two percent. The derivative is that of the exact
            product.
        fused: `fused_weight(q)`, used for a bfloat16 `x` with few rows if gradients are disabled.
        dense: A stored result of `dequantize`, used if its dtype is that of the product. On a GPU, bitsandbytes'
            kernels for packed 4-bit weights take precedence over `dense`.

    Raises:
        ValueError: If `x`, `bias`, `fused` or `dense` does not fit the weight; if `int8_activations` is set for a 4-bit
            weight; or if the weight is offloaded (on the meta device), differentiated, or mapped over by vmap.

    Example:
        >>> import torch
        >>> from vera_func import quantize_4bit
        >>> q = quantize_4bit(torch.eye(64))
        >>> x = torch.arange(64.0)
        >>> torch.equal(torch.func.grad(lambda x: quantized_linear(q, x).sum())(x), torch.ones(64))
        True
    """
    leaves, spec = flatten(q)
    require_rows_of_floats(x)
    out_features, in_features = q.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x must have shape (*batch, {in_features}) for a weight {q.shape}, got {tuple(x.shape)}.")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}.")
    if fused is not None and (isinstance(q, Quantized8bit) or fused.packed.shape != (out_features, in_features // 2)):
        raise ValueError(
            f"fused, of shape {tuple(fused.packed.shape)}, was not made from this weight, of shape {q.shape}: pass "
            "fused_weight(q)."
        )
    if dense is not None and dense.shape != q.shape:
        raise ValueError(
            f"dense must have the shape of the weight, {q.shape}, got {tuple(dense.shape)}: pass dequantize(q)."
        )
    if leaves[0].is_meta and not x.is_meta:
        raise ValueError(NO_DATA)
    dtype = x.dtype
    if isinstance(q, Quantized4bit) and q.compute_dtype is not None:
        x = x.to(q.compute_dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    if int8_activations:
        if not isinstance(q, Quantized8bit):
            raise ValueError("int8_activations needs an 8-bit weight, got 4 bits: pass int8_activations=False.")
        check_sizes(spec, leaves)
        y = _Int8Product.apply(x, bias, spec, *leaves)
    elif _is_plain(x, bias, leaves):
        # A custom Function costs 0.1 ms, even if it records nothing.
        y = _multiply(x, bias, spec, None if torch.is_grad_enabled() else fused, leaves, dense)
    elif dense is not None and _may_replace(dense, x, spec, leaves):
        y = linear(contiguous_rows(x), dense, bias)
    elif (
        torch.compiler.is_compiling()
        or not (torch.is_grad_enabled() or x.is_cuda or fused)
        or private.requires_plain_form()
    ):
        # Dynamo (torch 2.13) refuses a Function with a jvp; in the plain form, the compiler decides what is saved for
        # backward. Where nothing is saved, the plain form has less overhead.
        refuse_weight_derivative(any(map(is_differentiated, leaves)))
        y = linear(contiguous_rows(x), dequantize_leaves(spec, leaves, x.dtype), bias)
    else:
        y = _product(x, bias, spec, None if torch.is_grad_enabled() else fused, False, *leaves)
    # Under autocast, bitsandbytes' 4-bit layer returns the dtype of x; its 8-bit layer returns that of the product.
    return y.to(dtype) if isinstance(q, Quantized4bit) else y


def _product(
    x: Tensor, bias: Tensor | None, spec: Spec, fused: FusedWeight | None, transposed: bool, *leaves: Tensor
) -> Tensor:
    """Call `_Product`, or only `_Product.forward` if nothing is recorded, as in most backward passes."""
    if _is_plain(x, bias, leaves):
        return _Product.forward(x, bias, spec, fused, transposed, *leaves)
    return private.apply_function(_Product, x, bias, spec, fused, transposed, *leaves)


@private.keep_signature
class _Product(torch.autograd.Function):
    """Compute `x Wᵀ + bias`, or `x W` if transposed, with W dequantized temporarily.

    The packed tensors are arguments, and not fields of `spec`, because a transform may have wrapped them. Each
    derivative rule calls `_Product` again, so derivatives of all orders exist, in forward and in reverse mode.
    """

    @staticmethod
    def forward(x, bias, spec, fused, transposed, *leaves):
        if transposed:
            return torch.matmul(contiguous_rows(x), dequantize_leaves(spec, leaves, x.dtype))
        return _multiply(x, bias, spec, fused, leaves)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, spec, _, transposed, *leaves = inputs
        ctx.spec, ctx.transposed = spec, transposed
        # An absent tangent stays None, so that a tangent of the weight is distinguished from zeros, and refused.
        ctx.set_materialize_grads(False)
        ctx.output_shape = output.shape
        ctx.save_for_backward(*leaves)
        ctx.save_for_forward(*leaves)

    @staticmethod
    def backward(ctx, grad):
        refuse_weight_derivative(any(ctx.needs_input_grad[5:]))
        leaves = ctx.saved_tensors  # accessed only once, because activation checkpointing can unpack a tensor only once
        grad_x = grad_bias = None
        if grad is not None and ctx.needs_input_grad[0]:
            grad_x = _product(grad, None, ctx.spec, None, not ctx.transposed, *leaves)
        if grad is not None and ctx.needs_input_grad[1]:
            grad_bias = grad.sum_to_size(grad.shape[-1:])
        return grad_x, grad_bias, None, None, None, *[None] * len(leaves)

    @staticmethod
    def jvp(ctx, x_t, bias_t, _spec, _fused, _transposed, *leaves_t):
        refuse_weight_derivative(any(tangent is not None for tangent in leaves_t))
        return _tangent(ctx, x_t, bias_t, ctx.transposed)

    @staticmethod
    def vmap(info, in_dims, x, bias, spec, fused, transposed, *leaves):
        x_dim, bias_dim, _, _, _, *leaf_dims = in_dims
        _refuse_weight_map(leaf_dims)
        # One product over all rows. A mapped bias has one value for each index of the mapped axis.
        if x_dim is not None:
            x = x.movedim(x_dim, 0)
        if bias_dim is None:
            return _Product.apply(x, bias, spec, fused, transposed, *leaves), None if x_dim is None else 0
        y = _Product.apply(x, None, spec, fused, transposed, *leaves)
        bias = bias.movedim(bias_dim, 0)
        inner = y.dim() - 1 if x_dim is None else y.dim() - 2
        return y + bias.reshape(bias.shape[0], *[1] * inner, bias.shape[-1]), 0


@private.keep_signature
class _Int8Product(torch.autograd.Function):
    """The LLM.int8() product: forward rounds both factors to 8 bits, and derivatives are those of the exact product."""

    @staticmethod
    def forward(x, bias, spec, codes, scale):
        ops, threshold = private.bnb_ops(), spec.threshold
        rows = x.reshape(-1, x.shape[-1])
        x_codes, x_scale, outliers = ops.int8_vectorwise_quant(rows.to(torch.float16), threshold)
        if threshold > 0:
            y, _ = ops.int8_mixed_scaled_mm(rows, x_codes, codes, x_scale, scale, outliers, bias)
        else:
            y = ops.int8_scaled_mm(x_codes, codes, x_scale, scale, bias=bias, dtype=x.dtype)
        return y.reshape(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, spec, *leaves = inputs
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.output_shape = output.shape
        ctx.save_for_backward(*leaves)
        ctx.save_for_forward(*leaves)

    @staticmethod
    def backward(ctx, grad):
        refuse_weight_derivative(any(ctx.needs_input_grad[3:]))
        grad_x = grad_bias = None
        if grad is not None and ctx.needs_input_grad[0]:
            grad_x = _product(grad, None, ctx.spec, None, True, *ctx.saved_tensors)
        if grad is not None and ctx.needs_input_grad[1]:
            grad_bias = grad.sum_to_size(grad.shape[-1:])
        return grad_x, grad_bias, None, None, None

    @staticmethod
    def jvp(ctx, x_t, bias_t, _spec, *leaves_t):
        refuse_weight_derivative(any(tangent is not None for tangent in leaves_t))
        return _tangent(ctx, x_t, bias_t, False)

    @staticmethod
    def vmap(info, in_dims, x, bias, spec, *leaves):
        x_dim, bias_dim, _, *leaf_dims = in_dims
        _refuse_weight_map(leaf_dims)
        # Which features are outliers depends on all rows of a call, so the mapped calls are made one by one.
        ys = [
            _Int8Product.apply(
                x if x_dim is None else x.select(x_dim, i),
                bias if bias_dim is None else bias.select(bias_dim, i),
                spec,
                *leaves,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(ys), 0


def _tangent(ctx: Any, x_t: Tensor | None, bias_t: Tensor | None, transposed: bool) -> Tensor | None:
    if x_t is None:
        with private.forward_mode():
            return None if bias_t is None else bias_t.expand(ctx.output_shape)
    y_t = _Product.apply(x_t, None, ctx.spec, None, transposed, *ctx.saved_tensors)
    if bias_t is None:
        return y_t
    with private.forward_mode():
        return y_t + bias_t


def _is_plain(x: Tensor, bias: Tensor | None, leaves: Sequence[Tensor]) -> bool:
    """Whether no derivative, transform or compiler applies to the product."""
    if torch.compiler.is_compiling() or private.in_transform():
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or (bias is not None and bias.requires_grad) or any(t.requires_grad for t in leaves))


def _may_replace(dense: Tensor, x: Tensor, spec: Spec, leaves: Sequence[Tensor]) -> bool:
    """Whether the product may use the dense copy: dtypes match, and no transform has wrapped the quantized weight."""
    if dense.dtype != x.dtype or (x.is_cuda and isinstance(spec, Spec4bit)):
        return False
    if torch.compiler.is_compiling():
        return not any(map(is_differentiated, leaves))
    return not any(leaf.requires_grad or private.unwrap(leaf) is not leaf for leaf in leaves)


def _multiply(
    x: Tensor,
    bias: Tensor | None,
    spec: Spec,
    fused: FusedWeight | None,
    leaves: Sequence[Tensor],
    dense: Tensor | None = None,
) -> Tensor:
    """Compute the product with the kernel that suits the number of rows.

    Pass only tensors that no transform has wrapped: bitsandbytes' kernels silently drop derivatives.
    """
    rows = x.numel() // x.shape[-1]
    dense = dense if dense is not None and dense.dtype == x.dtype else None
    if fused is not None and _suits_fused(x, rows, spec, fused, leaves, dense):
        assert isinstance(spec, Spec4bit)
        y = fused_product(x.contiguous(), fused, spec)
        return y if bias is None else y + bias
    if isinstance(spec, Spec4bit) and x.is_cuda and rows and x.dtype in FLOATS and not spec.shape[1] % spec.blocksize:
        together = all(tensor is None or tensor.device == x.device for tensor in (bias, *leaves))
        if together:
            return _gpu_product(x, bias, spec, leaves)
    return linear(contiguous_rows(x), dequantize_leaves(spec, leaves, x.dtype) if dense is None else dense, bias)


def _suits_fused(
    x: Tensor, rows: int, spec: Spec, fused: FusedWeight, leaves: Sequence[Tensor], dense: Tensor | None
) -> bool:
    # The kernel reads addresses, and does not check devices. torch checks them, and raises an error if they differ.
    if x.dtype != torch.bfloat16 or x.device != fused.packed.device or not rows:
        return False
    if fused.max_rows is not None:
        return rows <= fused.max_rows

    def products() -> Any:
        assert isinstance(spec, Spec4bit)
        weight = lambda: dequantize_leaves(spec, leaves, torch.bfloat16) if dense is None else dense
        return lambda x: fused_product(x, fused, spec), lambda x: linear(x, weight())

    kind = spec, len(leaves), dense is None
    return rows <= ROWS[-1] and rows <= measured_rows(kind, x.shape[-1], products)


def fused_product(x: Tensor, fused: FusedWeight, spec: Spec4bit) -> Tensor:
    """Compute `x Wᵀ` with bitsandbytes' kernel for CPUs with AVX512-BF16; `x` is contiguous and bfloat16."""
    return gemv_4bit(x, fused.packed, fused.absmax, fused.code, spec.shape, spec.blocksize, spec.quant_type)


def _gpu_product(x: Tensor, bias: Tensor | None, spec: Spec4bit, leaves: Sequence[Tensor]) -> Tensor:
    """Compute the product with bitsandbytes' `gemm_4bit`, which selects a kernel by GPU, shape and number of rows."""
    check_sizes(spec, leaves)
    packed, absmax, *nested = leaves
    arguments: dict[str, Any] = {"bias": bias}
    if nested:
        scale, code, offset = nested
        arguments |= {"absmax_8bit": absmax, "absmax_code": code, "absmax_offset": offset}
        absmax = scale
    return private.bnb_ops().gemm_4bit(x, packed, spec.shape, absmax, spec.blocksize, spec.quant_type, **arguments)


def _refuse_weight_map(dims: list) -> None:
    if any(dim is not None for dim in dims):
        raise ValueError("a quantized weight can't be mapped over: pass None for it in in_dims, or close over it.")
