"""4-bit and 8-bit weights as immutable values.

The forward pass of a bitsandbytes module may change how the module stores the weight. In this module, a quantized
weight is an immutable value, registered as a pytree node with torch and optree. The leaves of the pytree are tensors;
all other fields are static. `torch.save` writes quantized weights, and `torch.load(weights_only=True)` reads quantized
weights after this module was imported. `import vera_func` imports this module if torch has already been imported. As in
`core.adapter`, a weight has shape (out, in).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import private


BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NESTED_BLOCKSIZE = 256  # block size of nested statistics; bitsandbytes has no other


class NestedStatistics(NamedTuple):
    """Statistics of double-quantized block scales, `absmax[i] = code[index[i]] * scale[i // 256] + offset`."""

    scale: Tensor
    code: Tensor
    offset: Tensor


def _device(self: "Quantized") -> torch.device:
    """Return the device of the tensors."""
    return private.tree_leaves(self)[0].device


def _nbytes(self: "Quantized") -> int:
    """Return the memory of the tensors, in bytes."""
    return sum(leaf.nbytes for leaf in private.tree_leaves(self))


def _to(self: "Quantized", device: torch.device | str) -> Any:
    """Return this weight on another device. Dtypes belong to the format and do not change."""
    target = torch.device(device)
    return private.tree_map(lambda leaf: leaf.to(target), self)


def _repr(self: "Quantized") -> str:
    return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {format_of(self)}, {self.nbytes:,} bytes)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantized4bit:
    """A weight (out, in) as 4-bit indices into a table of 16 levels, with a scale for each block, as in bitsandbytes.

    Invariants, checked by `validate`: `packed` has `ceil(out * in / 2)` bytes. Each byte contains two consecutive
    values of the row-major weight, the first in the high half. `absmax` has one scale for each `blocksize` consecutive
    values; a block may continue in the next row.

    Attributes:
        packed: The 4-bit values, two per byte, as a tensor of the storage dtype. Its shape is (n, 1), where n is the
            number of bytes divided by the item size of this dtype.
        absmax: Scale of each block, (blocks,) float32. With double quantization, `absmax` contains uint8 indices into
            `nested.code`.
        nested: Statistics of double-quantized scales, or None without double quantization.
        shape: The shape of the weight, (out, in).
        dtype: Dtype of the weight before quantization, and default dtype of `dequantize`.
        quant_type: "nf4" or "fp4".
        blocksize: Values per block, one of `BLOCKSIZES`.
        compute_dtype: Dtype in which `quantized_linear` multiplies; None means the dtype of `x`.
        device: The device of the tensors; `to(device)` moves the tensors and keeps all dtypes.
        nbytes: Memory of the tensors, in bytes.

    Example:
        >>> from vera_func import quantize_4bit
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
    """A weight (out, in) as 8-bit integers with one scale per row, equal to `codes * scale / 127`.

    Attributes:
        codes: Integers of shape (out, in), int8.
        scale: Largest absolute value of each row, (out,) float32.
        shape: The shape of the weight, (out, in).
        dtype: float32, the default dtype of `dequantize`.
        threshold: Value above which activations are outliers for `int8_activations`. 0 means that there are no
            outliers.
        device: The device of the tensors; `to(device)` moves the tensors and keeps all dtypes.
        nbytes: Memory of the tensors, in bytes.

    Example:
        >>> from vera_func import quantize_8bit
        >>> quantize_8bit(torch.ones(32, 64)).nbytes
        2176
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    threshold: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    device = property(_device)
    nbytes = property(_nbytes)
    to = _to
    __repr__ = _repr


class Spec4bit(NamedTuple):
    """The static fields of a `Quantized4bit`, which are all fields except tensors."""

    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    compute_dtype: torch.dtype | None


class Spec8bit(NamedTuple):
    """The static fields of a `Quantized8bit`, which are all fields except tensors."""

    shape: tuple[int, int]
    threshold: float


Quantized: TypeAlias = Quantized4bit | Quantized8bit
Spec: TypeAlias = Spec4bit | Spec8bit


def validate(q: Quantized) -> None:
    """Check the invariants of a quantized weight that was not made by this library.

    Raises:
        ValueError: If a tensor has the wrong shape or dtype for `q.shape`, or if an option is unknown.

    Example:
        >>> import torch
        >>> from vera_func import quantize_8bit
        >>> validate(quantize_8bit(torch.ones(2, 3)))
    """
    flatten(q)  # raises for anything else
    out_features, in_features = q.shape
    if out_features <= 0 or in_features <= 0:
        raise ValueError(f"shape must be a pair (out, in), both positive, got {q.shape}.")
    if isinstance(q, Quantized8bit):
        _check_leaf("codes", q.codes, q.shape, torch.int8)
        _check_leaf("scale", q.scale, (out_features,), torch.float32)
        return
    check_4bit_options(q.quant_type, q.blocksize, q.compute_dtype)
    if q.dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {FLOATS}, got {q.dtype}.")
    values = out_features * in_features
    size = q.packed.numel() * q.packed.element_size()
    if size != (values + 1) // 2:
        raise ValueError(
            f"packed {tuple(q.packed.shape)} {q.packed.dtype} has {size} bytes, but a weight {q.shape} packs into "
            f"{(values + 1) // 2} bytes."
        )
    blocks = -(-values // q.blocksize)
    _check_leaf("absmax", q.absmax, (blocks,), torch.float32 if q.nested is None else torch.uint8)
    if q.nested is not None:
        groups = -(-blocks // NESTED_BLOCKSIZE)
        _check_leaf("nested.scale", q.nested.scale, (groups,), torch.float32)
        _check_leaf("nested.code", q.nested.code, (256,), torch.float32)
        _check_leaf("nested.offset", q.nested.offset, (), torch.float32)


# torch 2.13 accepts a product with a weight on the meta device, and returns uninitialised memory.
NO_DATA = (
    "the weight is on the meta device and has no data: it is offloaded or was never loaded. Load the model into "
    "memory, for instance with device_map={'': 'cpu'}."
)


def check_sizes(spec: Spec, leaves: Sequence[Tensor]) -> None:
    """Raise an error if the sizes of tensors do not match `spec`. The kernels of bitsandbytes do not check sizes."""
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


def flatten(q: Quantized) -> tuple[list[Tensor], Spec]:
    """Return the tensors and the hashable static fields of a quantized weight.

    Raises:
        ValueError: If `q` is not a quantized weight.
    """
    if isinstance(q, Quantized8bit):
        return [q.codes, q.scale], Spec8bit(q.shape, q.threshold)
    if not isinstance(q, Quantized4bit):
        raise ValueError(
            f"q must be a Quantized4bit or Quantized8bit, from quantize_4bit or quantize_8bit, got {type(q).__name__}."
        )
    return [q.packed, q.absmax, *(q.nested or ())], Spec4bit(
        q.shape, q.dtype, q.quant_type, q.blocksize, q.compute_dtype
    )


def unflatten(leaves: Iterable[Any], spec: Spec) -> Quantized:
    """Make a quantized weight from the results of `flatten`."""
    if isinstance(spec, Spec8bit):
        codes, scale = leaves
        return Quantized8bit(codes, scale, *spec)
    packed, absmax, *nested = leaves
    return Quantized4bit(packed, absmax, NestedStatistics(*nested) if nested else None, *spec)


def format_of(q: Quantized) -> str:
    """Return the name of a weight's format, a key of `QUANTIZERS`.

    Example:
        >>> from vera_func import quantize_8bit
        >>> format_of(quantize_8bit(torch.ones(2, 3)))
        'int8'
    """
    return q.quant_type if isinstance(q, Quantized4bit) else "int8"


def check_4bit_options(quant_type: str, blocksize: int, compute_dtype: torch.dtype | None) -> None:
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}.")
    if blocksize not in BLOCKSIZES or not isinstance(blocksize, int):
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}.")
    if compute_dtype not in (None, *FLOATS, torch.float64):
        raise ValueError(f"compute_dtype must be None or one of {(*FLOATS, torch.float64)}, got {compute_dtype!r}.")


def _check_leaf(name: str, leaf: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(leaf.shape) != shape or leaf.dtype != dtype:
        raise ValueError(f"{name} must have shape {shape} and dtype {dtype}, got {tuple(leaf.shape)} {leaf.dtype}.")


def shape2(shape: Any) -> tuple[int, int]:
    """Return a shape `(out, in)` as plain integers."""
    out_features, in_features = (int(size) for size in shape)
    return out_features, in_features


for _class in (Quantized4bit, Quantized8bit):
    private.register_pytree(_class, flatten, unflatten)
    private.register_optree(_class, flatten, unflatten)
# Unpickling one of these classes only sets fields.
torch.serialization.add_safe_globals([Quantized4bit, Quantized8bit, NestedStatistics])
