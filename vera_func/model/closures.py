"""Copy modules together with the functions that refer to them.

    original = layer.forward
    layer.forward = lambda x: original(x) + 1

`copy.deepcopy` does not copy functions, so the copy of this layer would run the original layer, without the copy's
adapter or merged weight. Therefore, `copy_module` also copies functions that are attributes or hooks of modules, if
their closures refer to modules.
"""

import copy
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar
from weakref import ref

from torch import nn


Module = TypeVar("Module", bound=nn.Module)


def copy_module(root: Module, memo: dict[int, Any]) -> Module:
    """Return `copy.deepcopy(root, memo)`, in which functions refer to the copied modules.

    In the copy, attributes that are weak references refer to the copied modules, not to the originals. A module that
    `memo` maps to itself is shared, not copied. Other objects to which a function refers, such as a list to which a
    hook appends, are shared with the original.

    Example:
        >>> def doubled():
        ...     layer = nn.Identity()
        ...     layer.twice = lambda x: 2 * layer(x)
        ...     return layer
        >>> layer = copy_module(doubled(), {})
        >>> layer.twice.__closure__[0].cell_contents is layer
        True
    """
    modules = {id(module) for module in root.modules()}
    found: dict[int, FunctionType] = {}
    functions, count = [*_functions(root)], -1
    while len(found) > count:  # functions that refer to each other are found one after the other
        count = len(found)
        for function in functions:
            _refers(function, modules, found, set())
    memo.update({key: _with_empty_cells(function) for key, function in found.items()})
    copied = copy.deepcopy(root, memo)
    for key, function in found.items():
        for old, new in zip(function.__closure__ or (), memo[key].__closure__, strict=True):
            if _is_filled(old):
                content = old.cell_contents
                is_copied = _refers(content, modules, found, set())
                new.cell_contents = _copied(content, memo) if is_copied else content
    for module in root.modules():
        new = memo.get(id(module), module)  # children of a module that `memo` replaces are not copied
        if new is not module:
            for name, value in vars(module).items():
                if isinstance(value, ref) and id(value()) in modules & memo.keys():
                    vars(new)[name] = ref(memo[id(value())])
    return copied


def _functions(root: nn.Module) -> Iterator[FunctionType]:
    """Yield the functions that are attributes or hooks of the modules."""
    for module in root.modules():
        for value in vars(module).values():
            for each in value.values() if isinstance(value, dict) else (value,):
                if isinstance(each, FunctionType):
                    yield each


def _refers(value: Any, modules: set[int], found: dict[int, FunctionType], seen: set[int]) -> bool:
    """Whether a value refers to one of the modules. Functions that refer to a module are added to `found`."""
    if isinstance(value, nn.Module):
        return id(value) in modules
    if isinstance(value, MethodType):
        return _refers(value.__self__, modules, found, seen)
    if isinstance(value, list | tuple):
        return any(isinstance(item, nn.Module) and id(item) in modules for item in value)
    if not isinstance(value, FunctionType) or id(value) in seen:
        return id(value) in found
    seen.add(id(value))
    contents = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    refers = [_refers(content, modules, found, seen) for content in contents]  # a list: all contents are visited
    if any(refers):
        found[id(value)] = value
    return id(value) in found


def _with_empty_cells(function: FunctionType) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    return new


def _copied(content: Any, memo: dict[int, Any]) -> Any:
    if isinstance(content, MethodType):
        owner = copy.deepcopy(content.__self__, memo)
        if type(owner) is not type(content.__self__):  # a layer that another class has replaced
            return getattr(owner, content.__name__)
        return MethodType(content.__func__, owner)
    return copy.deepcopy(content, memo)


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
