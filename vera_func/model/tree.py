"""Module trees: remove wrappers, check that weights are in memory, and copy a tree while replacing some modules."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from .. import private
from ..core.keys import join_key, split_key
from ..quant.bnb import is_bnb_linear, to_bnb
from ..quant.foreign import foreign_error, foreign_layer
from ..quant.value import Quantized
from .base_layers import QuantizedLinear
from .closures import copy_module
from .linears import is_conv1d


Model = TypeVar("Model", bound=nn.Module)


def unwrap(model: Model) -> Model:
    """Return the model without the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    A wrapper adds a prefix to the names of all modules inside it, and an adapter saved under such names could not be
    loaded into the unwrapped model. The model is not modified; see `without_wrappers`.

    Raises:
        ValueError: If `model` is not a module, if it contains PEFT's modules, or if it contains layers that a library
            other than bitsandbytes has quantized.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> unwrap(nn.DataParallel(model)) is unwrap(model) is model
        True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
    plain: nn.Module = model
    while (below := private.wrapped_module(plain)) is not None:
        plain = below
    if (part := private.peft_part(plain)) is not None:
        raise ValueError(_peft_error(*part))
    if (foreign := foreign_layer(plain)) is not None:
        raise ValueError(foreign_error(*foreign))
    return cast(Model, without_wrappers(plain, private.wrapped_module)[0])


def without_wrappers(
    model: nn.Module, inside: Callable[[nn.Module], nn.Module | None]
) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Return the model with each wrapper replaced by the module inside it.

    The modules that contain a wrapper are copied. Modules that contain no wrapper, and all parameters, are shared with
    the model.

    Args:
        model: Any module; it is not modified.
        inside: A function that takes a module and returns the wrapped module, or None if the module is not a wrapper.

    Returns:
        The model without wrappers, and a dict from the id of each wrapper to its replacement.

    Example:
        >>> model = nn.Sequential(nn.DataParallel(nn.Linear(2, 3)))
        >>> without_wrappers(model, private.wrapped_module)[0]
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
        )
    """
    wrappers = {id(module) for module in model.modules() if inside(module) is not None}
    if not wrappers:
        return model, {}
    memo = shared_memo(model)
    for module in reversed([*model.modules()]):  # from the leaves up
        if (below := inside(module)) is not None:
            memo[id(module)] = copy_module(below, memo)
        elif wrappers.isdisjoint(map(id, module.modules())):
            memo[id(module)] = module
    return copy_module(model, memo), {wrapper: memo[wrapper] for wrapper in wrappers}


def require_weights(model: nn.Module, verb: str) -> None:
    """Raise an error if some of the model's weights are offloaded.

    Args:
        model: Any module. A model that is entirely on the meta device is accepted, because it only describes shapes.
        verb: The operation that needs the weights, for the error message.

    Raises:
        ValueError: If a weight has no data.

    Example:
        >>> require_weights(nn.Linear(2, 3), "merge")
    """
    shapes_alone = all(parameter.is_meta for parameter in model.parameters())
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and (not shapes_alone or private.offload_hook(module) is not None):
                raise ValueError(no_data_error(join_key(module_name, leaf), verb))


def no_data_error(name: str, verb: str) -> str:
    """Return the error message for a parameter without data."""
    return (
        f"{name!r} is on the meta device and has no data: it is offloaded or was never loaded. To {verb} the model, "
        "load it into memory, for instance with device_map={'': 'cpu'}."
    )


def copy_tree(
    model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None], memo: dict[int, Any]
) -> nn.Module:
    """Copy a module tree while replacing some modules.

    A replacement gets the training mode of the module that it replaces.

    Args:
        model: Any module; it is not modified.
        replace: A function that takes a module's name and the module, and returns a replacement, or None to copy the
            module.
        memo: The memo of `copy.deepcopy`: a dict from the id of an object to the object used in the copy. An object is
            shared instead of copied if `memo` maps its id to the object itself. `copy_tree` adds entries to `memo`, so
            that `replace` can copy modules with the same memo.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> copy_tree(model, lambda name, module: nn.GELU() if name == "1" else None, {})[1]
        GELU(approximate='none')
    """
    memo.update(_memo_of_hooks(model))
    replaced = {
        id(module): new.train(module.training)
        for name, module in model.named_modules()
        if (new := replace(name, module)) is not None
    }
    return copy_module(model, memo | replaced)


def copy_with_weights(
    model: nn.Module, weight_of: Callable[[str, nn.Module], Quantized | Tensor | None], memo: dict[int, Any]
) -> nn.Module:
    """Copy a tree and replace weights: `weight_of` returns the new weight of a module, or None to keep its weight.

    `memo` is as in `copy_tree`, and must have an entry for each parameter.
    """

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
        new = copy_module(module, dict(memo))
        weight = weight.T.contiguous() if is_conv1d(module) else weight
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.train(module.training)


def shared_memo(root: nn.Module) -> dict[int, Any]:
    """Return a memo for `deepcopy` that makes copies share the frozen parameters and quantized weights."""
    shared: list[Any] = list(root.parameters())
    for module in root.modules():
        if isinstance(module, QuantizedLinear):
            shared += [module.quantized, module.fused]
    return {id(value): value for value in shared if value is not None} | _memo_of_hooks(root)


def frozen_alias(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter with the same memory and `requires_grad=False`, so that no gradient reaches the original."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)


def join_tensors(root: nn.Module, model: nn.Module) -> nn.Module:
    """Copy a tree, replacing aliases of the model's parameters by the parameters themselves.

    The copy is for pickling together with the model. Pickle does not preserve shared memory, and would store the values
    of each alias a second time.
    """
    home = {_memory(parameter): parameter for parameter in model.parameters() if not parameter.is_meta}
    return _with_tensors(root, lambda p: home.get(_memory(p), p), lambda leaf: home.get(_memory(leaf), leaf))


def part_tensors(root: nn.Module) -> nn.Module:
    """Undo `join_tensors`: copy a tree, replacing the model's parameters by aliases."""
    return _with_tensors(root, frozen_alias, lambda leaf: leaf.data)


def parameter_aliases(model: nn.Module, trained: Sequence[str]) -> dict[str, list[str]]:
    """Return all names of each parameter, by the parameter's key. A tied parameter has several names.

    As in PEFT, training a tied head unties the head: the embedding keeps its values. A trained bias stays tied.

    Args:
        model: Any module.
        trained: Names of the parameters that are trained. The key of a trained parameter is its name in `trained`. The
            key of any other parameter is its first name.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
        >>> model[1].weight = model[0].weight
        >>> parameter_aliases(model, []), parameter_aliases(model, ["1.weight"])
        ({'0.weight': ['0.weight', '1.weight']}, {'0.weight': ['0.weight'], '1.weight': ['1.weight']})
    """

    def place(name: str) -> tuple[int, str]:
        owner, leaf = split_key(name)
        return id(model.get_submodule(owner)), leaf

    first = {name for name, _ in model.named_parameters()}
    untied = {place(name) for name in trained if name not in first or not name.endswith("bias")}
    aliases: dict[Any, list[str]] = {}
    for name, parameter in held_parameters(model):
        aliases.setdefault(place(name) if place(name) in untied else id(parameter), []).append(name)
    return {next((name for name in names if name in trained), names[0]): names for names in aliases.values()}


def _with_tensors(root: nn.Module, parameter: Callable[[Any], Tensor], leaf: Callable[[Any], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {id(p): parameter(p) for p in root.parameters()} | _memo_of_hooks(root)
    for module in root.modules():
        if isinstance(module, QuantizedLinear):
            memo[id(module.quantized)] = private.tree_map(leaf, module.quantized)
    return copy.deepcopy(root, memo)


def _memory(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _memo_of_hooks(model: nn.Module) -> dict[int, Any]:
    """Return a memo that shares offloaded weights, and detaches non-leaf tensors, which `deepcopy` can't copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if (hook := private.offload_hook(module)) is not None:
            memo[id(hook.weights_map)] = hook.weights_map
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # such as those of the deprecated weight_norm
                memo[id(value)] = value.detach()
    return memo


def _peft_error(name: str, part: nn.Module) -> str:
    what = f"{name!r} is a {type(part).__name__} of PEFT" if name else f"the model is a {type(part).__name__} of PEFT"
    if hasattr(part, "unload"):
        return (
            f"{what}: an adapter for this model would have keys that can't be loaded. Pass the base model: "
            "model.unload() removes PEFT's adapter, and model.merge_and_unload() merges it. To use a VeRA adapter, "
            "call from_peft(model), or load_adapter if PEFT has saved it."
        )
    return f"{what}: an adapter for this model would have keys that can't be loaded. Load the base model without PEFT."


def held_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the names and parameters of all modules. A tied parameter is yielded once for each of its modules.

    Each module is visited once, under its first name. In contrast, `named_parameters(remove_duplicate=False)` visits a
    module once for each of its names, and does not terminate if a module contains itself.

    Example:
        >>> model = nn.ModuleDict({"first": nn.Linear(3, 5, bias=False), "tied": nn.Linear(3, 5, bias=False)})
        >>> model["tied"].weight, model["again"] = model["first"].weight, model["first"]
        >>> [name for name, _ in held_parameters(model)]
        ['first.weight', 'tied.weight']
    """
    for prefix, module in model.named_modules():
        yield from module.named_parameters(prefix, recurse=False, remove_duplicate=False)
