"""Convert bitsandbytes' modules to quantized weights as values, and back, without running a module.

The forward pass of a `Linear4bit` or `Linear8bitLt` may change how the module stores its weight. `from_bnb` reads a
module before or after a forward pass, without changing the module. `to_bnb` makes a new module.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .. import private
from .cpu_layout import unpack_cpu_layout
from .quantize import levels, quantize_4bit, quantize_8bit
from .value import NESTED_BLOCKSIZE, NestedStatistics, Quantized, Quantized4bit, Quantized8bit, shape2, validate


def is_bnb_linear(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' `Linear4bit` or `Linear8bitLt`; bitsandbytes need not be installed.

    Example:
        >>> is_bnb_linear(torch.nn.Linear(2, 3))
        False
    """
    # No module can be an instance of a class whose package was not imported.
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def from_bnb(module: nn.Module) -> tuple[Quantized, Tensor | None]:
    """Read the weight and bias of a bitsandbytes linear module, before or after a forward pass.

    The module is not changed. A weight that is not quantized yet is quantized into a copy, as bitsandbytes does when
    the module is moved to a device. In eval mode on a CPU with AVX512-BF16, the forward pass of a 4-bit module repacks
    the weight in place, and rounds the scales to bfloat16. A repacked weight is unpacked into a copy, with the rounded
    scales. A quantized weight that is not repacked shares memory with the module.

    Args:
        module: `bitsandbytes.nn.Linear4bit` or `Linear8bitLt`.

    Returns:
        The weight, and the bias (out,) or None.

    Raises:
        ValueError: If `module` is not a bitsandbytes linear module, or if the shapes or dtypes of its tensors are
            inconsistent.

    Example:
        >>> import bitsandbytes as bnb
        >>> q, bias = from_bnb(bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu"))
        >>> q.shape, q.quant_type, bias.shape
        ((32, 64), 'nf4', torch.Size([32]))
    """
    if not is_bnb_linear(module):
        raise ValueError(f"module must be bitsandbytes' Linear4bit or Linear8bitLt, got {type(module).__name__}.")
    is_4bit = isinstance(module, sys.modules["bitsandbytes"].nn.Linear4bit)
    q = _read_4bit(module) if is_4bit else _read_8bit(module)
    validate(q)
    bias = getattr(module, "bias", None)
    return q, None if bias is None else bias.detach()


def to_bnb(q: Quantized, bias: Tensor | None = None) -> nn.Module:
    """Make a bitsandbytes module with a copy of a quantized weight: the inverse of `from_bnb`.

    Args:
        q: A quantized weight.
        bias: Bias of shape (out,), or None.

    Returns:
        `bitsandbytes.nn.Linear4bit` or `Linear8bitLt`, on the weight's device.

    Raises:
        ValueError: If the bias does not have shape (out,).

    Example:
        >>> import torch
        >>> to_bnb(quantize_4bit(torch.ones(32, 64)))
        Linear4bit(in_features=64, out_features=32, bias=False)
    """
    validate(q)
    out_features, in_features = q.shape
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}.")
    bnb = private.bitsandbytes()

    has_bias = bias is not None
    module: Any
    if isinstance(q, Quantized8bit):
        module = bnb.nn.Linear8bitLt(
            in_features, out_features, has_bias, has_fp16_weights=False, threshold=q.threshold, device="meta"
        )
        codes = q.codes.clone()
        module.weight = bnb.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=q.scale.clone()
        )
    else:
        module = bnb.nn.Linear4bit(
            in_features,
            out_features,
            has_bias,
            compute_dtype=q.compute_dtype,
            quant_storage=q.packed.dtype,
            device="meta",
        )
        state = _to_state(q)
        module.weight = bnb.nn.Params4bit(
            q.packed.clone(),
            requires_grad=False,
            quant_state=state,
            blocksize=q.blocksize,
            compress_statistics=q.nested is not None,
            quant_type=q.quant_type,
            quant_storage=q.packed.dtype,
            module=module,
            bnb_quantized=True,
        )
        module.quant_state = state
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module


def _read_4bit(module: Any) -> Quantized4bit:
    weight = module.weight
    state = getattr(weight, "quant_state", None) or module.quant_state
    if state is None:
        return quantize_4bit(
            weight.data,
            weight.quant_type,
            weight.blocksize,
            weight.compress_statistics,
            quant_storage=weight.quant_storage,
            compute_dtype=module.compute_dtype,
        )
    if getattr(state, "packing_format_for_cpu", False):
        return unpack_cpu_layout(weight.data, state, module.compute_dtype)
    return _from_state(weight.data, state, module.compute_dtype)


def _read_8bit(module: Any) -> Quantized8bit:
    weight, state = module.weight, module.state
    if weight.dtype != torch.int8 and state.CB is None:
        return quantize_8bit(weight.data, threshold=state.threshold)
    # The weight of an unpickled layer is an ordinary parameter; copying it loses the attributes CB and SCB.
    held, scale = getattr(weight, "CB", None), getattr(weight, "SCB", None)
    codes = next(value for value in (held, state.CB, weight.data) if value is not None)
    scale = state.SCB if scale is None else scale
    if scale is None:
        raise ValueError(
            "the Linear8bitLt has int8 codes, but no row scales (SCB). copy.deepcopy of an unpickled layer loses "
            "the scales: unpickle the layer a second time instead."
        )
    return Quantized8bit(codes, scale, shape2(codes.shape), float(state.threshold))


def _to_state(q: Quantized4bit) -> Any:
    functional = private.bitsandbytes().functional
    code = levels(q)
    offset = state2 = None
    if q.nested is not None:
        scale, nested_code, offset = (leaf.clone() for leaf in q.nested)
        state2 = functional.QuantState(absmax=scale, code=nested_code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    return functional.QuantState(
        absmax=q.absmax.clone(),
        shape=torch.Size(q.shape),
        code=code,
        blocksize=q.blocksize,
        quant_type=q.quant_type,
        dtype=q.dtype,
        offset=offset,
        state2=state2,
    )


def _from_state(packed: Tensor, state: Any, compute_dtype: torch.dtype | None) -> Quantized4bit:
    """Return a quantized weight that shares memory with bitsandbytes' packed weight and `QuantState`.

    Raises:
        ValueError: If the block size of double-quantized scales is not 256.
    """
    nested = None
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(
                f"the block size of double-quantized scales must be {NESTED_BLOCKSIZE}, as in bitsandbytes, got "
                f"{state.state2.blocksize}."
            )
        nested = NestedStatistics(state.state2.absmax, state.state2.code, state.offset.float())
    absmax = state.absmax if state.nested else state.absmax.float()
    if absmax.dim() == 2:
        # bitsandbytes' state_dict() unpacks a repacked weight, but leaves its scales transposed.
        absmax = absmax.t().reshape(-1)
    shape = shape2(state.shape)
    return Quantized4bit(packed, absmax, nested, shape, state.dtype, state.quant_type, state.blocksize, compute_dtype)
