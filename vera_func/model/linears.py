"""Which modules are linear layers, and the sizes, dtypes and devices of linear layers."""

import copy
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import private
from ..core.keys import split_key
from ..quant.bnb import is_bnb_linear


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return `(in_features, out_features)` of a layer that can be adapted, and None for any other module.

    The layers that can be adapted are `nn.Linear`, bitsandbytes' linear layers and transformers' `Conv1D`.

    Example:
        >>> linear_sizes(nn.Linear(3, 5)), linear_sizes(nn.ReLU())
        ((3, 5), None)
    """
    if isinstance(module, nn.Linear):  # includes bitsandbytes' layers
        return module.in_features, module.out_features
    if is_conv1d(module):
        weight: Any = module.weight
        in_features, out_features = weight.shape
        return in_features, out_features
    return None


def widest_sizes(model: nn.Module, names: Iterable[str]) -> tuple[int, int]:
    """Return the largest `in_features` and the largest `out_features` of linear layers, given by their names.

    Example:
        >>> widest_sizes(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 20)), ["0", "1"])
        (8, 20)
    """
    sizes = [size for name in names if (size := linear_sizes(model.get_submodule(name))) is not None]
    widest_in, widest_out = map(max, zip(*sizes, strict=True))
    return widest_in, widest_out


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, a linear layer whose weight has shape (in, out).

    Example:
        >>> is_conv1d(nn.Linear(3, 5))
        False
    """
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def returns_tensor(module: nn.Module) -> bool:
    """Whether a layer returns a tensor. The router of Llama 4, a subclass of `nn.Linear`, returns a tuple.

    Example:
        >>> returns_tensor(nn.Linear(2, 3))
        True
    """
    if type(module).forward is nn.Linear.forward or is_bnb_linear(module) or is_conv1d(module):
        return True
    weight: Any = module.weight
    if private.offload_hook(module) is not None:
        return True
    x = torch.zeros(1, weight.shape[-1], dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            return isinstance(copy.deepcopy(module, {id(p): p for p in module.parameters()}).eval()(x), Tensor)
    except Exception:  # a custom forward may need another input
        return True


def peft_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype to which PEFT rounds a layer's vectors and projections, or None if PEFT does not round.

    PEFT casts vectors and projections to the layer's dtype and then to float32. A cast to a 16-bit dtype rounds the
    values. The dtype of a 4-bit layer is its compute dtype. For 8-bit layers, PEFT does not cast.

    Example:
        >>> peft_dtype(nn.Linear(2, 3, dtype=torch.bfloat16))
        torch.bfloat16
    """
    layer: Any = module
    dtype = getattr(layer, "compute_dtype", None) if is_bnb_linear(layer) else layer.weight.dtype
    return dtype if dtype is not None and dtype.is_floating_point else None


def layer_device(module: nn.Module) -> torch.device:
    """Return the device on which a layer computes: that of its weight, or the execution device of an offloaded layer.

    Example:
        >>> layer_device(nn.Linear(2, 3))
        device(type='cpu')
    """
    device = next(module.parameters()).device
    hook = private.offload_hook(module) if device.type == "meta" else None
    return device if hook is None else torch.device(hook.execution_device)


def require_one_device(model: nn.Module, targets: Sequence[str], trained: Sequence[str]) -> None:
    """Raise an error if adapted or trained layers are on several devices, as with a `device_map` over several GPUs.

    Raises:
        ValueError: If the layers are on more than one device, not counting the meta device.

    Example:
        >>> require_one_device(nn.Sequential(nn.Linear(3, 5)), ["0"], ["0.bias"])
    """
    owners = dict.fromkeys([*targets, *(split_key(name)[0] for name in trained)])
    # A target without parameters is refused later, because of its class.
    layers = [(name, model.get_submodule(name)) for name in owners]
    devices = {layer_device(layer): name for name, layer in layers if next(layer.parameters(), None) is not None}
    places = sorted(f"{device} ({name})" for device, name in devices.items() if device.type != "meta")
    if len(places) > 1:
        raise ValueError(
            f"the layers of an adapter must be on one device, but are on {', '.join(places)}. Load the model onto one "
            "device, with device_map={'': 0} instead of 'auto'. If the model is too large, quantize it."
        )
