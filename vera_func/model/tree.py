"""Copies of a module tree in which some modules are replaced and everything else is shared."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..private import tree_map
from ..quant.bnb import is_bnb_linear, to_bnb
from ..quant.value import Quantized
from .layers import QuantizedLinear
from .targets import is_conv1d


def copy_tree(
    model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None], memo: dict[int, Any]
) -> nn.Module:
    """A copy of a module tree in which some modules are replaced.

    Args:
        model: Stays as it is.
        replace: The name and the module to what takes its place, or to None for a copy.
        memo: As for `copy.deepcopy`, from the id of an object to what stands for it in the copy; what maps to itself
            is shared.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> copy_tree(model, lambda name, module: nn.GELU() if name == "1" else None, {})[1]
        GELU(approximate='none')
    """
    replaced = {id(module): new for name, module in model.named_modules() if (new := replace(name, module)) is not None}
    return copy.deepcopy(model, memo | replaced)


def copy_with_weights(
    model: nn.Module, weight_of: Callable[[str, nn.Module], Quantized | Tensor | None], memo: dict[int, Any]
) -> nn.Module:
    """`copy_tree` with other weights where there are some; `memo` has an entry for each parameter."""

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        weight = weight_of(name, module)
        if weight is None:
            return None
        bias = getattr(module, "bias", None)
        bias = None if bias is None else memo[id(bias)].detach()
        return _module_with(module, weight, bias, memo)

    return copy_tree(model, replace, memo)


def _module_with(module: Any, weight: Quantized | Tensor, bias: Tensor | None, memo: dict[int, Any]) -> nn.Module:
    if not isinstance(weight, Tensor):
        return to_bnb(weight, bias).train(module.training)
    if is_bnb_linear(module):
        new: Any = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta")
        bias = None if bias is None else bias.to(weight.dtype).clone()
    else:
        new = copy.deepcopy(module, dict(memo))
        weight = weight.T.contiguous() if is_conv1d(module) else weight
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.train(module.training)


def shared_memo(root: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy` under which the copy shares parameters and quantized weights, which nothing writes to."""
    shared: list[Any] = list(root.parameters())
    for module in root.modules():
        if isinstance(module, QuantizedLinear):
            shared += [module.quantized, module.fused]
    return {id(value): value for value in shared if value is not None}


def frozen_alias(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory without `requires_grad`, so that no backward reaches the user's parameter."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def join_tensors(root: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a tree that holds the model's own parameters where it shares their memory.

    To be pickled with the model: pickle knows objects, and would store the memory of two tensors twice.
    """
    home = {_memory(parameter): parameter for parameter in model.parameters() if not parameter.is_meta}
    return _with_tensors(root, lambda p: home.get(_memory(p), p), lambda leaf: home.get(_memory(leaf), leaf))


def part_tensors(root: nn.Module) -> nn.Module:
    """Undo `join_tensors`: a copy that has aliases of the model's parameters."""
    return _with_tensors(root, frozen_alias, lambda leaf: leaf.data)


def _with_tensors(root: nn.Module, parameter: Callable[[Any], Tensor], leaf: Callable[[Any], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {id(p): parameter(p) for p in root.parameters()}
    for module in root.modules():
        if isinstance(module, QuantizedLinear):
            memo[id(module.quantized)] = tree_map(leaf, module.quantized)
    return copy.deepcopy(root, memo)


def _memory(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
