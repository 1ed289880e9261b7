"""4-bit and 8-bit weights as immutable values, and the linear layer over them.

    y = x dequantize(q)ᵀ + bias                         dequantize(q)[i] = code[index[i]] * absmax[i // blocksize]

bitsandbytes keeps a quantized weight in a module that rewrites itself as it runs, and multiplies by it with
operations that `torch.func` refuses or differentiates to zero. Here the weight is a value (a pytree: tensors
are leaves, everything else is static), and the product is linear in `x` under every transform: `grad`,
`jvp`, `vmap` to any depth, forward and reverse. What is kept for backward is the packed weight.

Shapes are those of `adapter`: a weight is (out, in), its input (*batch, in).
"""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

# torch offers no public registration that keeps static fields: `register_dataclass` drops them.
from torch.utils._pytree import register_pytree_node

from .adapter import require_float, require_rows_of_floats


# Up to so many rows bitsandbytes' fused CPU kernel is used: `python -m tests.benchmarks roofline` times it against
# dequantizing, where there is one.
FUSED_ROWS = 32
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STORAGES = (torch.uint8, torch.int8, *_FLOATS, torch.float64)  # those of transformers' BitsAndBytesConfig
NESTED_BLOCKSIZE = 256  # of nested statistics, the only one that bitsandbytes has


class FusedWeight(NamedTuple):
    """A 4-bit weight once more, in the layout of bitsandbytes' kernel for CPUs with AVX512-BF16; see `fused_weight`."""

    packed: Tensor  # (out, in / 2)
    absmax: Tensor  # (in / blocksize, out) bfloat16


class NestedStatistics(NamedTuple):
    """Block statistics that are quantized themselves: `absmax = code[index] * scale[i // 256] + offset`."""

    scale: Tensor
    code: Tensor
    offset: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized4bit:
    """A weight (out, in) in blocks of 4-bit indices into a table of 16 levels, as bitsandbytes stores it.

    Invariants, checked by `validate`: `packed` holds `ceil(out * in / 2)` bytes, the first of two values in
    the high half of a byte, in the row-major order of the weight; there is one `absmax` for each
    `blocksize` consecutive values, whatever row they are in.

    Attributes:
        packed: Two values a byte, (bytes / itemsize, 1), in the storage dtype.
        absmax: Scale of each block, (blocks,) float32; uint8 indices where `nested` is given.
        nested: What `absmax` is quantized with, or None.
        shape: (out, in).
        dtype: Dtype that the weight had before, and of `dequantize` by default.
        quant_type: "nf4" or "fp4".
        blocksize: Values a block, one of `BLOCKSIZES`.
        compute_dtype: Dtype in which `quantized_linear` multiplies; None is that of `x`.
    """

    packed: Tensor
    absmax: Tensor
    nested: NestedStatistics | None
    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    compute_dtype: torch.dtype | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized8bit:
    """A weight (out, in) in 8-bit integers with one scale a row: `codes * scale / 127`.

    Attributes:
        codes: (out, in) int8.
        scale: Largest absolute value of each row, (out,) float32.
        shape: (out, in).
        threshold: Activations above it are outliers to `int8_activations`; 0 means none are.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    threshold: float = 0.0


Quantized: TypeAlias = Quantized4bit | Quantized8bit


def quantize_4bit(
    weight: Float[Tensor, "out in"],
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    *,
    quant_storage: torch.dtype = torch.uint8,
    compute_dtype: torch.dtype | None = None,
) -> Quantized4bit:
    """Round each block of a weight to 16 levels times the block's largest absolute value.

    The bytes are those of bitsandbytes. Takes 4 bits a value and 32 / `blocksize` for the statistics, or about
    8 / `blocksize` with `double_quant`.

    Args:
        weight: (out, in), float16, bfloat16 or float32, finite.
        quant_type: "nf4", levels at the quantiles of a normal distribution, or "fp4", a 4-bit float.
        blocksize: Values that share a scale, one of `BLOCKSIZES`.
        double_quant: Quantize the scales, too, to 8 bits (QLoRA's double quantization).
        quant_storage: Dtype that the bytes are viewed as; it changes nothing else.
        compute_dtype: Dtype of the product with `x`; None is that of `x`.

    Raises:
        ValueError: If the weight is not 2-D, not finite, or of another dtype, or an option is unknown.

    Example:
        >>> import torch
        >>> q = quantize_4bit(torch.linspace(-1, 1, 128).reshape(2, 64))
        >>> q.shape, q.packed.shape, q.absmax
        ((2, 64), torch.Size([64, 1]), tensor([1., 1.]))

    Reference:
        Section 3 of https://arxiv.org/abs/2305.14314 (QLoRA).
    """
    _check_weight(weight)
    _check_4bit_options(quant_type, blocksize, compute_dtype)
    if quant_storage not in _STORAGES:
        raise ValueError(f"quant_storage must be one of {_STORAGES}, got {quant_storage!r}.")
    if quant_storage != torch.uint8 and weight.numel() % (2 * quant_storage.itemsize):
        raise ValueError(
            f"a weight {tuple(weight.shape)} does not fill whole elements of quant_storage={quant_storage}; "
            "use torch.uint8."
        )
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.detach().contiguous(),
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
    )
    return from_state(packed, state, compute_dtype)


def quantize_8bit(weight: Float[Tensor, "out in"], *, threshold: float = 0.0) -> Quantized8bit:
    """Round each row of a weight to 255 levels, `codes = round(127 * weight / max|row|)`.

    The bytes are those of bitsandbytes, which rounds the weight to float16 first.

    Args:
        weight: (out, in), float16, bfloat16 or float32, finite also in float16 (below 65,504).
        threshold: Kept for `quantized_linear(int8_activations=True)` and `to_bnb`; the codes do not depend on it.

    Raises:
        ValueError: If the weight is not 2-D, not finite in float16 or of another dtype, or the threshold negative.

    Example:
        >>> import torch
        >>> q = quantize_8bit(torch.tensor([[1.0, -0.5], [0.0, 2.0]]))
        >>> q.codes, q.scale
        (tensor([[127, -64],
                [  0, 127]], dtype=torch.int8), tensor([1., 2.]))

    Reference:
        Section 3 of https://arxiv.org/abs/2208.07339 (LLM.int8()).
    """
    _check_weight(weight)
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold must be at least 0 and finite (0 is none), got {threshold}.")
    half = weight.detach().to(torch.float16).contiguous()
    if half.device.type != "meta" and not half.isfinite().all():
        raise ValueError("the weight overflows float16, through which 8-bit weights are rounded.")
    codes, scale, _ = _ops().int8_vectorwise_quant(half, 0.0)
    return Quantized8bit(codes, scale, shape2(codes.shape), float(threshold))


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """The dense weight that `q` stands for.

    Costs a pass over the packed weight and an (out, in) tensor. Not differentiable in `q`.

    Args:
        q: A quantized weight.
        dtype: Of the result; None is the dtype that the weight had before it was quantized to 4 bits,
            and float32 for 8 bits.

    Raises:
        ValueError: If `dtype` is not a floating-point one, or a 4-bit weight itself is to be differentiated.

    Example:
        >>> import torch
        >>> dequantize(quantize_8bit(torch.tensor([[1.0, -0.5]])))
        tensor([[ 1.0000, -0.5039]])
    """
    leaves, spec = _flatten(q)
    if dtype is None:
        dtype = q.dtype if isinstance(q, Quantized4bit) else torch.float32
    require_float("dtype", dtype)
    if isinstance(q, Quantized4bit):
        _refuse_weight_derivative(any(map(_is_differentiated, leaves)))
    return _dequantize(spec, leaves, dtype)


def quantized_linear(
    q: Quantized,
    x: Float[Tensor, "*batch in"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    int8_activations: bool = False,
    fused: FusedWeight | None = None,
) -> Float[Tensor, "*batch out"]:
    """`x dequantize(q)ᵀ + bias`, differentiable in `x` and `bias` to any order.

    The weight is dequantized for the product and dropped; backward dequantizes it again. This is the
    arithmetic of bitsandbytes' modules in training. Use it as a `base_fn`: `functools.partial(quantized_linear, q)`.
    On a GPU, bitsandbytes chooses for few rows a kernel that multiplies by the packed weight itself.
    Inside `torch.compile` the compiler decides what is kept for backward, and it may keep dense weights.

    Args:
        q: A quantized weight.
        x: Input; multiplied in `q.compute_dtype` if that is given, else in its own dtype.
        bias: Added in the product's dtype, or None.
        int8_activations: For an 8-bit `q`: round the rows of `x` to 8 bits, too, and multiply integers
            (LLM.int8()), except for features with a value above `q.threshold`, if it is not 0. Faster on
            GPUs and off by a percent or two; its derivative is taken to be that of the exact product.
        fused: `fused_weight(q)`, to multiply up to `FUSED_ROWS` rows of bfloat16 by where gradients are disabled.

    Raises:
        ValueError: If `x` is not (*batch, in) or not of floating-point numbers, if a bias is not (out,), if
            `int8_activations` is asked of a 4-bit weight, if `fused` is of another weight, or if the weight itself is
            to be differentiated or mapped over.

    Example:
        >>> import torch
        >>> q = quantize_4bit(torch.eye(64))
        >>> x = torch.arange(64.0)
        >>> torch.equal(torch.func.grad(lambda x: quantized_linear(q, x).sum())(x), torch.ones(64))
        True
    """
    leaves, spec = _flatten(q)
    require_rows_of_floats(x)
    out_features, in_features = q.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x {tuple(x.shape)} must end in the weight's in_features {in_features} (weight {q.shape}).")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be ({out_features},), got {tuple(bias.shape)}.")
    if fused is not None and (isinstance(q, Quantized8bit) or fused.packed.shape != (out_features, in_features // 2)):
        raise ValueError(
            f"fused {tuple(fused.packed.shape)} is no copy of the weight {q.shape}; fused_weight makes it."
        )
    dtype = x.dtype
    if isinstance(q, Quantized4bit) and q.compute_dtype is not None:
        x = x.to(q.compute_dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    if int8_activations:
        if not isinstance(q, Quantized8bit):
            raise ValueError("int8_activations needs an 8-bit weight; this one has 4 bits.")
        y = _Int8Product.apply(x, bias, spec, *leaves)
    elif torch.compiler.is_compiling() or not (torch.is_grad_enabled() or x.is_cuda or fused):
        # Dynamo (2.13) refuses a Function with a jvp; what the plain form keeps is the compiler's choice. Where nothing
        # is kept, the plain form has less overhead.
        _refuse_weight_derivative(any(map(_is_differentiated, leaves)))
        y = linear(x, _dequantize(spec, leaves, x.dtype), bias)
    else:
        y = _Product.apply(x, bias, spec, None if torch.is_grad_enabled() else fused, False, *leaves)
    # Under autocast, bitsandbytes' 4-bit layer returns the dtype of x, and its 8-bit layer that of the product.
    return y.to(dtype) if isinstance(q, Quantized4bit) else y


def fused_weight(q: Quantized) -> FusedWeight | None:
    """A second copy of a 4-bit weight, for bitsandbytes' fused kernel on CPUs with AVX512-BF16.

    For up to `FUSED_ROWS` rows of bfloat16 the kernel saves dequantizing, because it reads the packed weight only. The
    price is the memory, half a byte and 2 / blocksize a weight, and scales that are rounded to
    bfloat16: by up to 0.4 %, or not at all if the weight was bfloat16 and its scales are not nested. bitsandbytes' own
    modules replace their weight by such a copy without being asked, in eval mode; here `q` stays, and gradients are
    taken through `q`.

    Returns:
        The copy, or None where nothing could use it: on another CPU, for 8 bits, or if `out` is not a multiple of 32 or
        `in` not one of the block size.

    Example:
        >>> fused_weight(quantize_8bit(torch.ones(32, 64))) is None
        True
    """
    if not isinstance(q, Quantized4bit) or q.packed.device.type != "cpu" or not _has_fused_kernel():
        return None
    out_features, in_features = q.shape
    if out_features % 32 or in_features % q.blocksize:
        return None
    codes, absmax = unpack(q)
    # 32 rows at a time, column pair by column pair; of 64 codes the first 32 are the low halves of 32 bytes.
    codes = codes.reshape(out_features // 32, 32, in_features // 2, 2).transpose(1, 2).reshape(-1, 2, 32)
    packed = ((codes[:, 1] << 4) | codes[:, 0]).reshape(out_features, in_features // 2)
    return FusedWeight(packed, absmax.reshape(out_features, -1).T.to(torch.bfloat16).contiguous())


def validate(q: Quantized) -> None:
    """Check the invariants of a quantized weight that came from elsewhere.

    Raises:
        ValueError: If a tensor has the wrong shape or dtype for `q.shape`, or an option is unknown.

    Example:
        >>> import torch
        >>> validate(quantize_8bit(torch.ones(2, 3)))
    """
    _flatten(q)  # refuses what is no quantized weight
    out_features, in_features = q.shape
    if out_features <= 0 or in_features <= 0:
        raise ValueError(f"shape must be (out, in), both positive, got {q.shape}.")
    if isinstance(q, Quantized8bit):
        _check_leaf("codes", q.codes, q.shape, torch.int8)
        _check_leaf("scale", q.scale, (out_features,), torch.float32)
        return
    _check_4bit_options(q.quant_type, q.blocksize, q.compute_dtype)
    if q.dtype not in _FLOATS:
        raise ValueError(f"dtype must be one of {_FLOATS}, got {q.dtype}.")
    values = out_features * in_features
    size = q.packed.numel() * q.packed.element_size()
    if size != (values + 1) // 2:
        raise ValueError(
            f"packed {tuple(q.packed.shape)} {q.packed.dtype} holds {size} bytes, but a weight {q.shape} packs "
            f"into {(values + 1) // 2}."
        )
    blocks = -(-values // q.blocksize)
    _check_leaf("absmax", q.absmax, (blocks,), torch.float32 if q.nested is None else torch.uint8)
    if q.nested is not None:
        groups = -(-blocks // NESTED_BLOCKSIZE)
        _check_leaf("nested.scale", q.nested.scale, (groups,), torch.float32)
        _check_leaf("nested.code", q.nested.code, (256,), torch.float32)
        _check_leaf("nested.offset", q.nested.offset, (), torch.float32)


def levels(q: Quantized4bit) -> Float[Tensor, "16"]:
    """The table that the codes of a 4-bit weight index, in bitsandbytes' order.

    Example:
        >>> levels(quantize_4bit(torch.ones(1, 64)))[[0, 7, 15]]
        tensor([-1.,  0.,  1.])
    """
    from bitsandbytes import functional

    return functional.get_4bit_type(q.quant_type, device=q.packed.device)


def unpack(q: Quantized4bit) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, " blocks"]]:
    """The codes of a 4-bit weight, one uint8 each, and its block statistics, un-nested in float32.

    Example:
        >>> codes, absmax = unpack(quantize_4bit(torch.ones(1, 64)))
        >>> codes.unique(), absmax
        (tensor([15], dtype=torch.uint8), tensor([1.]))
    """
    pairs = q.packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1)[: q.shape[0] * q.shape[1]]
    return codes.reshape(q.shape), _absmax(q.absmax, *(q.nested or ()))


def pack(q: Quantized4bit, codes: UInt8[Tensor, "out in"], absmax: Float[Tensor, " blocks"]) -> Quantized4bit:
    """A weight of the same kind with these codes and statistics, which are not nested; undoes `unpack`.

    Nesting rounds the statistics to 8 bits, and would undo small changes of them.

    Raises:
        ValueError: If the shapes are not those of `q`.

    Example:
        >>> q = quantize_4bit(torch.linspace(-1, 1, 64)[None])
        >>> torch.equal(pack(q, *unpack(q)).packed, q.packed)
        True
    """
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    packed = ((flat[0::2] << 4) | flat[1::2]).view(q.packed.dtype)[:, None]
    new = dataclasses.replace(q, packed=packed, absmax=absmax.reshape(-1).contiguous(), nested=None)
    validate(new)
    return new


class _Product(torch.autograd.Function):
    """`x Wᵀ + bias`, or `x W` if transposed, with W dequantized for the occasion.

    The packed leaves are arguments (not hidden in `spec`), because inside a transform they may be wrapped, too.
    Every rule is again this function, so that derivatives of all orders and directions exist.
    """

    @staticmethod
    def forward(x, bias, spec, fused, transposed, *leaves):
        if transposed:
            return torch.matmul(x, _dequantize(spec, leaves, x.dtype))
        return _multiply(x, bias, spec, fused, leaves)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, spec, _, transposed, *leaves = inputs
        ctx.spec, ctx.transposed = spec, transposed
        # An absent tangent stays None, so that one of the weight's can be told from zeros and refused.
        ctx.set_materialize_grads(False)
        ctx.output_shape = output.shape
        ctx.save_for_backward(*leaves)
        ctx.save_for_forward(*leaves)

    @staticmethod
    def backward(ctx, grad):
        _refuse_weight_derivative(any(ctx.needs_input_grad[5:]))
        leaves = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor a single time
        grad_x = grad_bias = None
        if grad is not None and ctx.needs_input_grad[0]:
            grad_x = _Product.apply(grad, None, ctx.spec, None, not ctx.transposed, *leaves)
        if grad is not None and ctx.needs_input_grad[1]:
            grad_bias = grad.sum(tuple(range(grad.dim() - 1)))
        return grad_x, grad_bias, None, None, None, *[None] * len(leaves)

    @staticmethod
    def jvp(ctx, x_t, bias_t, _spec, _fused, _transposed, *leaves_t):
        _refuse_weight_derivative(any(tangent is not None for tangent in leaves_t))
        return _tangent(ctx, x_t, bias_t, ctx.transposed)

    @staticmethod
    def vmap(info, in_dims, x, bias, spec, fused, transposed, *leaves):
        x_dim, bias_dim, _, _, _, *leaf_dims = in_dims
        _refuse_weight_map(leaf_dims)
        # One product over all rows; a mapped bias is one a row.
        if x_dim is not None:
            x = x.movedim(x_dim, 0)
        if bias_dim is None:
            return _Product.apply(x, bias, spec, fused, transposed, *leaves), None if x_dim is None else 0
        y = _Product.apply(x, None, spec, fused, transposed, *leaves)
        bias = bias.movedim(bias_dim, 0)
        inner = y.dim() - 1 if x_dim is None else y.dim() - 2
        return y + bias.reshape(bias.shape[0], *[1] * inner, bias.shape[-1]), 0


class _Int8Product(torch.autograd.Function):
    """LLM.int8(): both factors rounded to 8 bits. Derivatives are those of the exact product (straight-through)."""

    @staticmethod
    def forward(x, bias, spec, codes, scale):
        ops, threshold = _ops(), spec[1][1]
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
        _refuse_weight_derivative(any(ctx.needs_input_grad[3:]))
        grad_x = grad_bias = None
        if grad is not None and ctx.needs_input_grad[0]:
            grad_x = _Product.apply(grad, None, ctx.spec, None, True, *ctx.saved_tensors)
        if grad is not None and ctx.needs_input_grad[1]:
            grad_bias = grad.sum(tuple(range(grad.dim() - 1)))
        return grad_x, grad_bias, None, None, None

    @staticmethod
    def jvp(ctx, x_t, bias_t, _spec, *leaves_t):
        _refuse_weight_derivative(any(tangent is not None for tangent in leaves_t))
        return _tangent(ctx, x_t, bias_t, False)

    @staticmethod
    def vmap(info, in_dims, x, bias, spec, *leaves):
        x_dim, bias_dim, _, *leaf_dims = in_dims
        _refuse_weight_map(leaf_dims)
        # Which features are outliers depends on all rows of one call, so every call is made by itself.
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
        return None if bias_t is None else bias_t.expand(ctx.output_shape)
    y_t = _Product.apply(x_t, None, ctx.spec, None, transposed, *ctx.saved_tensors)
    return y_t if bias_t is None else y_t + bias_t


def _multiply(x: Tensor, bias: Tensor | None, spec: tuple, fused: FusedWeight | None, leaves: Any) -> Tensor:
    """The product by the number of rows: by the packed weight for few, where there is a kernel, else by the dense one.

    Only for tensors that no transform has wrapped: bitsandbytes' kernels have no derivatives, and don't say so.
    """
    cls, static = spec
    rows = x.numel() // x.shape[-1]
    # Kernels take addresses: tensors of another device are left to torch, which refuses them.
    if fused is not None and 0 < rows <= FUSED_ROWS and x.dtype == torch.bfloat16 and x.device == fused.packed.device:
        shape, _, quant_type, blocksize, _ = static
        y = _fused_product(x.contiguous(), fused, shape, quant_type, blocksize)
        return y if bias is None else y + bias
    whole = cls is Quantized4bit and x.shape[-1] % static[3] == 0
    together = all(tensor is None or tensor.device == x.device for tensor in (bias, *leaves))
    if x.is_cuda and whole and together and rows and x.dtype in _FLOATS:
        return _choose_product(x, bias, spec, leaves)
    return linear(x, _dequantize(spec, leaves, x.dtype), bias)


def _fused_product(x: Tensor, fused: FusedWeight, shape: tuple[int, int], quant_type: str, blocksize: int) -> Tensor:
    from bitsandbytes import functional

    code = functional.get_4bit_type(quant_type, device=x.device)  # tells the kernel which type it is
    return _ops().gemv_4bit(x, fused.packed, shape, fused.absmax, code, blocksize)


def _choose_product(x: Tensor, bias: Tensor | None, spec: tuple, leaves: Any) -> Tensor:
    """bitsandbytes' own choice for this GPU, shape and number of rows."""
    shape, _, quant_type, blocksize, _ = spec[1]
    _check_sizes(spec, leaves)
    packed, absmax, *nested = leaves
    if not nested:
        return _ops().gemm_4bit(x, packed, shape, absmax, blocksize, quant_type, bias=bias)
    scale, code, offset = nested
    return _ops().gemm_4bit(
        x,
        packed,
        shape,
        scale,
        blocksize,
        quant_type,
        bias=bias,
        absmax_8bit=absmax,
        absmax_code=code,
        absmax_offset=offset,
    )


def _has_fused_kernel() -> bool:
    from bitsandbytes import functional

    return functional.has_avx512bf16()


def _dequantize(spec: tuple, leaves: Any, dtype: torch.dtype) -> Tensor:
    cls, static = spec
    _check_sizes(spec, leaves)
    if cls is Quantized8bit:
        codes, scale = leaves
        # bitsandbytes' order of operations in training: the last bit depends on it.
        return (codes.to(dtype) * (scale * (1.0 / 127.0))[:, None]).to(dtype)
    shape, _, quant_type, blocksize, _ = static
    packed, absmax, *nested = leaves
    kernel_dtype = dtype if dtype in _FLOATS else torch.float32
    scale = _absmax(absmax, *nested)
    return _ops().dequantize_4bit(packed, scale, blocksize, quant_type, shape, kernel_dtype).to(dtype)


def _check_sizes(spec: tuple, leaves: Any) -> None:
    """`validate`, for a value made by hand: bitsandbytes' kernels read as far as the shape says, whatever is there."""
    (out_features, in_features), values = spec[1][0], spec[1][0][0] * spec[1][0][1]
    if spec[0] is Quantized8bit:
        right = leaves[0].shape == (out_features, in_features) and leaves[1].shape == (out_features,)
    else:
        blocks = -(-values // spec[1][3])
        right = leaves[0].nbytes == (values + 1) // 2 and leaves[1].shape == (blocks,)
        right = right and (len(leaves) == 2 or leaves[2].shape == (-(-blocks // NESTED_BLOCKSIZE),))
    if not right:
        validate(_unflatten(leaves, spec))


def _absmax(absmax: Tensor, *nested: Tensor) -> Tensor:
    if not nested:
        return absmax
    scale, code, offset = nested
    return _ops().dequantize_blockwise(absmax, scale, code, NESTED_BLOCKSIZE, torch.float32) + offset


def _flatten(q: Quantized) -> tuple[list[Tensor], tuple]:
    """The tensors, and everything else as a hashable `(class, static)`."""
    if isinstance(q, Quantized8bit):
        return [q.codes, q.scale], (Quantized8bit, (q.shape, q.threshold))
    if not isinstance(q, Quantized4bit):
        raise ValueError(
            f"expected a Quantized4bit or Quantized8bit (from quantize_4bit, ...), got {type(q).__name__}."
        )
    static = (q.shape, q.dtype, q.quant_type, q.blocksize, q.compute_dtype)
    return [q.packed, q.absmax, *(q.nested or ())], (Quantized4bit, static)


def _unflatten(leaves: Any, spec: tuple) -> Quantized:
    cls, static = spec
    if cls is Quantized8bit:
        return Quantized8bit(*leaves, *static)
    packed, absmax, *nested = leaves
    return Quantized4bit(packed, absmax, NestedStatistics(*nested) if nested else None, *static)


for _class in (Quantized4bit, Quantized8bit):
    register_pytree_node(_class, _flatten, _unflatten)


def _ops() -> Any:
    import bitsandbytes  # noqa: F401  (it registers the operations)

    return torch.ops.bitsandbytes


def from_state(packed: Tensor, state: Any, compute_dtype: torch.dtype | None) -> Quantized4bit:
    """A weight from bitsandbytes' bytes and `QuantState`, which keep their memory.

    Raises:
        ValueError: If statistics are nested in blocks of another size.
    """
    nested = None
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(
                f"nested statistics in blocks of {state.state2.blocksize} are not supported by bitsandbytes "
                f"either; {NESTED_BLOCKSIZE} is."
            )
        nested = NestedStatistics(state.state2.absmax, state.state2.code, state.offset.float())
    absmax = state.absmax if state.nested else state.absmax.float()
    if absmax.dim() == 2:
        # A state_dict() of the module unpacked its weight, and forgot to turn these back.
        absmax = absmax.t().reshape(-1)
    shape = shape2(state.shape)
    return Quantized4bit(packed, absmax, nested, shape, state.dtype, state.quant_type, state.blocksize, compute_dtype)


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight must be a tensor (out, in), got {type(weight).__name__}.")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be (out, in), both positive, got {tuple(weight.shape)}.")
    if weight.dtype not in _FLOATS:
        raise ValueError(f"weight must be float16, bfloat16 or float32, got {weight.dtype}.")
    if weight.device.type != "meta" and not weight.isfinite().all():
        raise ValueError(f"weight {tuple(weight.shape)} has NaN or inf; one such value spoils its whole block.")


def _check_4bit_options(quant_type: str, blocksize: int, compute_dtype: torch.dtype | None) -> None:
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}.")
    if blocksize not in BLOCKSIZES or not isinstance(blocksize, int):
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}.")
    if compute_dtype not in (None, *_FLOATS, torch.float64):
        raise ValueError(f"compute_dtype must be None or one of {(*_FLOATS, torch.float64)}, got {compute_dtype!r}.")


def _check_leaf(name: str, leaf: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(leaf.shape) != shape or leaf.dtype != dtype:
        raise ValueError(f"{name} must be {shape} {dtype}, got {tuple(leaf.shape)} {leaf.dtype}.")


def _is_differentiated(leaf: Tensor) -> bool:
    # bitsandbytes' kernel has no derivative, and torch would take it for zero.
    if torch.compiler.is_compiling():
        leaf = leaf.view_as(leaf)  # Dynamo (2.13) does not see that an argument of grad itself is differentiated
    return leaf.requires_grad or forward_ad.unpack_dual(leaf).tangent is not None


def _refuse_weight_derivative(wanted: bool) -> None:
    if wanted:
        raise ValueError("a quantized weight is a constant: differentiate in x, the bias or an adapter.")


def _refuse_weight_map(dims: list) -> None:
    if any(dim is not None for dim in dims):
        raise ValueError("a quantized weight can't be mapped over: give it in_dims None, or close over it.")


def shape2(shape: Any) -> tuple[int, int]:
    """`(out, in)` as plain integers."""
    out_features, in_features = (int(size) for size in shape)
    return out_features, in_features
