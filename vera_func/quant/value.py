"""4-bit and 8-bit weights as immutable values.

    dequantize(q)[i] = code[index[i]] * absmax[i // blocksize]

bitsandbytes keeps a quantized weight in a module that rewrites itself as it runs. Here the weight is a value, a pytree:
tensors are leaves, everything else is static. Shapes are those of `core.adapter`: a weight is (out, in).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.autograd import forward_ad

from .. import private
from ..core.shapes import require_float


BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STORAGES = (torch.uint8, torch.int8, *FLOATS, torch.float64)  # those of transformers' BitsAndBytesConfig
NESTED_BLOCKSIZE = 256  # of nested statistics, the only one that bitsandbytes has


class NestedStatistics(NamedTuple):
    """Double-quantized block statistics: `absmax = code[index] * scale[i // 256] + offset`."""

    scale: Tensor
    code: Tensor
    offset: Tensor


def _device(self: "Quantized") -> torch.device:
    """The device of the tensors."""
    return private.tree_leaves(self)[0].device


def _nbytes(self: "Quantized") -> int:
    """Memory of the tensors, in bytes."""
    return sum(leaf.nbytes for leaf in private.tree_leaves(self))


def _to(self: "Quantized", device: torch.device | str) -> Any:
    """This weight on another device. Dtypes stay: they belong to the format."""
    target = torch.device(device)
    return private.tree_map(lambda leaf: leaf.to(target), self)


def _repr(self: "Quantized") -> str:
    return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {format_of(self)}, {self.nbytes:,} bytes)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantized4bit:
    """A weight (out, in) in blocks of 4-bit indices into a table of 16 levels, as bitsandbytes stores it.

    Invariants, checked by `validate`: `packed` holds `ceil(out * in / 2)` bytes, the first of two values in
    the high half of a byte, in the row-major order of the weight; there is one `absmax` for each
    `blocksize` consecutive values, also where a block continues in the next row.

    Attributes:
        packed: Two values per byte, (bytes / itemsize, 1), in the storage dtype.
        absmax: Scale of each block, (blocks,) float32; uint8 indices where `nested` is given.
        nested: Statistics of the double quantization of `absmax`, or None.
        shape: (out, in).
        dtype: Dtype of the weight before quantization, and of `dequantize` by default.
        quant_type: "nf4" or "fp4".
        blocksize: Values per block, one of `BLOCKSIZES`.
        compute_dtype: Dtype in which `quantized_linear` multiplies; None means the dtype of `x`.
        device: The device of the tensors; `to(device)` moves them and keeps their dtypes.
        nbytes: Memory of the tensors, in bytes.

    Example:
        >>> quantize_4bit(torch.ones(32, 64))
        Quantized4bit(32 x 64, nf4, 1,152 bytes)
    """

    packed: Tensor
    absmax: Tensor
    nested: NestedStatistics | None
    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    compute_dtype: torch.dtype | None = None

    device = property(_device)
    nbytes = property(_nbytes)
    to = _to
    __repr__ = _repr


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantized8bit:
    """A weight (out, in) as 8-bit integers with one scale per row: `codes * scale / 127`.

    Attributes:
        codes: (out, in) int8.
        scale: Largest absolute value of each row, (out,) float32.
        shape: (out, in).
        threshold: Activations above it are outliers for `int8_activations`; 0 means that none are.
        device: The device of the tensors; `to(device)` moves them and keeps their dtypes.
        nbytes: Memory of the tensors, in bytes.

    Example:
        >>> quantize_8bit(torch.ones(32, 64)).nbytes
        2176
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    threshold: float = 0.0

    device = property(_device)
    nbytes = property(_nbytes)
    to = _to
    __repr__ = _repr


class Spec4bit(NamedTuple):
    """The static fields of a `Quantized4bit`: everything but its tensors."""

    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    compute_dtype: torch.dtype | None


class Spec8bit(NamedTuple):
    """The static fields of a `Quantized8bit`: everything but its tensors."""

    shape: tuple[int, int]
    threshold: float


Quantized: TypeAlias = Quantized4bit | Quantized8bit
Spec: TypeAlias = Spec4bit | Spec8bit


def quantize_4bit(
    weight: Float[Tensor, "out in"],
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    *,
    quant_storage: torch.dtype = torch.uint8,
    compute_dtype: torch.dtype | None = None,
) -> Quantized4bit:
    """Quantize a weight to 4 bits: each block is rounded to 16 levels times its largest absolute value.

    The bytes are those of bitsandbytes. Takes 4 bits per value, and 32 / `blocksize` bits for the statistics, or about
    8 / `blocksize` with `double_quant`.

    Args:
        weight: (out, in), float16, bfloat16 or float32, finite.
        quant_type: "nf4", levels at the quantiles of a normal distribution, or "fp4", a 4-bit float.
        blocksize: Values that share a scale, one of `BLOCKSIZES`.
        double_quant: Also quantize the scales to 8 bits (QLoRA's double quantization).
        quant_storage: Dtype that the bytes are viewed as; it changes nothing else.
        compute_dtype: Dtype of the product with `x`; None means the dtype of `x`.

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
    packed, state = private.bitsandbytes().functional.quantize_4bit(
        weight.detach().contiguous(),
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
    )
    nested = NestedStatistics(state.state2.absmax, state.state2.code, state.offset.float()) if double_quant else None
    return Quantized4bit(
        packed, state.absmax, nested, shape2(weight.shape), weight.dtype, quant_type, blocksize, compute_dtype
    )


def quantize_8bit(weight: Float[Tensor, "out in"], *, threshold: float = 0.0) -> Quantized8bit:
    """Quantize a weight to 8 bits: `codes = round(127 * weight / max|row|)` for each row.

    The bytes are those of bitsandbytes, which rounds the weight to float16 first.

    Args:
        weight: (out, in), float16, bfloat16 or float32, finite also in float16 (below 65,504).
        threshold: Stored for `quantized_linear(int8_activations=True)` and `to_bnb`; the codes do not depend on it.

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
    codes, scale, _ = private.bnb_ops().int8_vectorwise_quant(half, 0.0)
    return Quantized8bit(codes, scale, shape2(codes.shape), float(threshold))


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """Return the dense weight of a quantized one.

    Costs a pass over the packed weight and an (out, in) tensor. Not differentiable with respect to `q`.

    Args:
        q: A quantized weight.
        dtype: Dtype of the result; None means the weight's dtype before it was quantized to 4 bits, and
            float32 for 8 bits.

    Raises:
        ValueError: If `dtype` is not a floating-point one, or a 4-bit weight itself is to be differentiated.

    Example:
        >>> import torch
        >>> dequantize(quantize_8bit(torch.tensor([[1.0, -0.5]])))
        tensor([[ 1.0000, -0.5039]])
    """
    leaves, spec = flatten(q)
    if dtype is None:
        dtype = q.dtype if isinstance(q, Quantized4bit) else torch.float32
    require_float("dtype", dtype)
    if isinstance(q, Quantized4bit):
        refuse_weight_derivative(any(map(is_differentiated, leaves)))
    return dequantize_leaves(spec, leaves, dtype)


def validate(q: Quantized) -> None:
    """Check the invariants of a quantized weight that was not made by this library.

    Raises:
        ValueError: If a tensor has the wrong shape or dtype for `q.shape`, or an option is unknown.

    Example:
        >>> import torch
        >>> validate(quantize_8bit(torch.ones(2, 3)))
    """
    flatten(q)  # raises for anything else
    out_features, in_features = q.shape
    if out_features <= 0 or in_features <= 0:
        raise ValueError(f"shape must be (out, in), both positive, got {q.shape}.")
    if isinstance(q, Quantized8bit):
        _check_leaf("codes", q.codes, q.shape, torch.int8)
        _check_leaf("scale", q.scale, (out_features,), torch.float32)
        return
    _check_4bit_options(q.quant_type, q.blocksize, q.compute_dtype)
    if q.dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {FLOATS}, got {q.dtype}.")
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
    """The 16 levels that the codes of a 4-bit weight index, in bitsandbytes' order.

    Example:
        >>> levels(quantize_4bit(torch.ones(1, 64)))[[0, 7, 15]]
        tensor([-1.,  0.,  1.])
    """
    return private.bnb_levels(q.quant_type, q.packed.device)


def unpack(q: Quantized4bit) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, " blocks"]]:
    """The codes of a 4-bit weight, one uint8 each, and its block scales, dequantized to float32.

    Example:
        >>> codes, absmax = unpack(quantize_4bit(torch.ones(1, 64)))
        >>> codes.unique(), absmax
        (tensor([15], dtype=torch.uint8), tensor([1.]))
    """
    pairs = q.packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1)[: q.shape[0] * q.shape[1]]
    return codes.reshape(q.shape), _block_scales(q.absmax, *(q.nested or ()))


def pack(q: Quantized4bit, codes: UInt8[Tensor, "out in"], absmax: Float[Tensor, " blocks"]) -> Quantized4bit:
    """A weight of the same format with these codes and scales; the inverse of `unpack`.

    The scales are stored in float32: double quantization would round away small changes of them.

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


def dequantize_leaves(spec: Spec, leaves: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """`dequantize`, of the tensors and the specification that `flatten` gives."""
    check_sizes(spec, leaves)
    if isinstance(spec, Spec8bit):
        codes, scale = leaves
        # bitsandbytes' order of operations in training: the last bit depends on it.
        return (codes.to(dtype) * (scale * (1.0 / 127.0))[:, None]).to(dtype)
    packed, absmax, *nested = leaves
    kernel_dtype = dtype if dtype in FLOATS else torch.float32
    weight = private.bnb_ops().dequantize_4bit(
        packed,
        _block_scales(absmax, *nested),
        spec.blocksize,
        spec.quant_type,
        _kernel_shape(spec.shape, spec.blocksize),
        kernel_dtype,
    )
    return weight.reshape(spec.shape).to(dtype)


def _kernel_shape(shape: tuple[int, int], blocksize: int) -> tuple[int, int]:
    """The shape to dequantize in, which is only a row length to bitsandbytes' kernels.

    On CPUs with AVX512, bitsandbytes 0.50 finds the scales row by row, and takes wrong ones where a block goes from one
    row over into the next. Rows of one block each, or a single row, have no such blocks.
    """
    out_features, in_features = shape
    if in_features % blocksize == 0:
        return shape
    values = out_features * in_features
    return (values // blocksize, blocksize) if values % blocksize == 0 else (1, values)


# torch 2.13 multiplies by a weight on the meta device, and returns uninitialised memory.
NO_DATA = (
    "the weight is on the meta device and has no data: it is offloaded, or was never loaded. Load the model into "
    "memory, for instance with device_map={'': 'cpu'}."
)


def check_sizes(spec: Spec, leaves: Sequence[Tensor]) -> None:
    """`validate`, for a value made by hand: bitsandbytes' kernels read as far as the shape says, whatever is there."""
    if leaves[0].is_meta is not leaves[1].is_meta:
        raise ValueError(NO_DATA)
    out_features, in_features = spec.shape
    values = out_features * in_features
    if isinstance(spec, Spec8bit):
        right = leaves[0].shape == spec.shape and leaves[1].shape == (out_features,)
    else:
        blocks = -(-values // spec.blocksize)
        right = leaves[0].nbytes == (values + 1) // 2 and leaves[1].shape == (blocks,)
        right = right and (len(leaves) == 2 or leaves[2].shape == (-(-blocks // NESTED_BLOCKSIZE),))
    if not right:
        validate(unflatten(leaves, spec))


def _block_scales(absmax: Tensor, *nested: Tensor) -> Tensor:
    if not nested:
        return absmax
    scale, code, offset = nested
    return private.bnb_ops().dequantize_blockwise(absmax, scale, code, NESTED_BLOCKSIZE, torch.float32) + offset


def flatten(q: Quantized) -> tuple[list[Tensor], Spec]:
    """The tensors of a quantized weight, and everything else as a hashable value.

    Raises:
        ValueError: If it is not a quantized weight.
    """
    if isinstance(q, Quantized8bit):
        return [q.codes, q.scale], Spec8bit(q.shape, q.threshold)
    if not isinstance(q, Quantized4bit):
        raise ValueError(
            f"expected a Quantized4bit or Quantized8bit (from quantize_4bit, ...), got {type(q).__name__}."
        )
    return [q.packed, q.absmax, *(q.nested or ())], Spec4bit(
        q.shape, q.dtype, q.quant_type, q.blocksize, q.compute_dtype
    )


def unflatten(leaves: Iterable[Any], spec: Spec) -> Quantized:
    """Undoes `flatten`."""
    if isinstance(spec, Spec8bit):
        codes, scale = leaves
        return Quantized8bit(codes, scale, *spec)
    packed, absmax, *nested = leaves
    return Quantized4bit(packed, absmax, NestedStatistics(*nested) if nested else None, *spec)


def format_of(q: Quantized) -> str:
    """The name of a weight's format, a key of `QUANTIZERS`.

    Example:
        >>> format_of(quantize_8bit(torch.ones(2, 3)))
        'int8'
    """
    return q.quant_type if isinstance(q, Quantized4bit) else "int8"


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(f"weight must be a tensor (out, in), got {type(weight).__name__}.")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be (out, in), both positive, got {tuple(weight.shape)}.")
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight must be float16, bfloat16 or float32, got {weight.dtype}.")
    if weight.device.type != "meta" and not weight.isfinite().all():
        raise ValueError(f"weight {tuple(weight.shape)} has NaN or inf; one such value spoils its whole block.")


def _check_4bit_options(quant_type: str, blocksize: int, compute_dtype: torch.dtype | None) -> None:
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}.")
    if blocksize not in BLOCKSIZES or not isinstance(blocksize, int):
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}.")
    if compute_dtype not in (None, *FLOATS, torch.float64):
        raise ValueError(f"compute_dtype must be None or one of {(*FLOATS, torch.float64)}, got {compute_dtype!r}.")


def _check_leaf(name: str, leaf: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(leaf.shape) != shape or leaf.dtype != dtype:
        raise ValueError(f"{name} must be {shape} {dtype}, got {tuple(leaf.shape)} {leaf.dtype}.")


def is_differentiated(leaf: Tensor) -> bool:
    # bitsandbytes' kernel has no derivative, and torch would take it for zero.
    if torch.compiler.is_compiling():
        leaf = leaf.view_as(leaf)  # Dynamo (2.13) does not see that an argument of grad itself is differentiated
    return leaf.requires_grad or forward_ad.unpack_dual(leaf).tangent is not None


def refuse_weight_derivative(wanted: bool) -> None:
    if wanted:
        raise ValueError("a quantized weight is a constant: differentiate in x, the bias or an adapter.")


def shape2(shape: Any) -> tuple[int, int]:
    """`(out, in)` as plain integers."""
    out_features, in_features = (int(size) for size in shape)
    return out_features, in_features


for _class in (Quantized4bit, Quantized8bit):
    private.register_pytree(_class, flatten, unflatten)

# The formats that have a name, as the quantizer of each.
QUANTIZERS: dict[str, Callable[[Tensor], Quantized]] = {
    "nf4": partial(quantize_4bit, quant_type="nf4"),
    "fp4": partial(quantize_4bit, quant_type="fp4"),
    "int8": quantize_8bit,
}
