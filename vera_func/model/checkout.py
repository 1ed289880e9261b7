"""Isolate calls from each other: each call runs on its own copy of the module tree, which is restored afterwards.

A call binds tensors to the modules, and the modules may modify their state when they run: buffers (batch statistics),
attributes (the longest sequence that a rotary embedding has seen), caches and hooks. Therefore each call takes a copy
of the module tree from a free list, restores the copy, and returns the copy to the list:

    tree = trees.acquire()
    try:
        tree.bind(values)
        return tree.run(method, args, kwargs)
    finally:
        trees.release(tree)

Concurrent and nested calls use different copies. The copies share parameters and quantized weights, which are never
modified.

`release` compares the dicts, lists and other containers of a tree with saved copies, and restores the containers that
differ. The comparison is cheap: nearly all containers are empty, or contain the same objects as the saved copy.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..core.keys import join_key, split_key
from ..private import drop_input_grads
from .closures import copy_module
from .tree import held_parameters, shared_memo


# A tensor's `_version` misses some writes: updates of batch statistics, and writes through `.data` or numpy. Therefore
# small tensors are cloned for each call. In training mode, the limit is higher, so that nearly all tensors are cloned.
SMALL, SMALL_IN_TRAINING = 2**16, 2**24  # bytes
_ENDED = -2  # never equal to `graph_task()`
Method: TypeAlias = str | Callable[..., Any]
_CONTAINERS = (dict, list, set, deque, bytearray)


def bound_method(model: nn.Module, method: Method) -> Callable[..., Any]:
    """Return the model's method with a given name, or a given function with the model as first argument.

    Example:
        >>> bound_method(nn.ReLU(), "__call__")(Tensor([-1.0])), bound_method(nn.ReLU(), repr)()
        (tensor([0.]), 'ReLU()')
    """
    return functools.partial(method, model) if callable(method) else getattr(model, method)


class Trees:
    """A free list of copies of one module tree.

    Attributes:
        root: The original tree, on which compiled calls run. Calls that are not compiled run on copies.
        checkpoints: Whether any module in training mode uses activation checkpointing.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.free: list[Tree] = []
        # transformers sets this attribute.
        self.checkpoints = any(m.training and getattr(m, "gradient_checkpointing", False) for m in root.modules())
        self._values: dict[str, Tensor | None] = dict(held_parameters(root))
        self._buffers: dict[str, Tensor] = {}
        for name, module in root.named_modules():
            for leaf, buffer in module._buffers.items():
                if buffer is None:
                    self._values[join_key(name, leaf)] = None
                elif _is_cloned(buffer, module.training):
                    self._buffers[join_key(name, leaf)] = buffer

    def acquire(self) -> "Tree":
        """Return a copy of the tree, which no other call uses until `release`."""
        while self.free:
            try:
                tree = self.free.pop()  # atomic, so no lock is needed
            except IndexError:
                break
            if tree.is_unwritten():
                return tree
        # The copy is made in a new thread, which does not inherit the caller's transforms, autocast and inference mode.
        # Those contexts would change the copied tensors.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(Tree, self.root).result()

    def release(self, tree: "Tree") -> None:
        """Restore a tree and return it to the free list."""
        if tree.reset():
            self.free.append(tree)

    def copy(self) -> nn.Module:
        """Return a new copy of the root with its own buffers. The copy does not enter the free list."""
        return copy_module(self.root, shared_memo(self.root))

    def values(self, *, inside: bool) -> dict[str, Tensor | None]:
        """Return the values that a compiled call binds in addition to the given tensors.

        A compiled call runs on the root, not on a copy, so clones of buffers are bound to keep the root's buffers
        unchanged. If `inside` is true, the call is inside another compiled call. Then the base model's parameters are
        bound as well: otherwise the inner call would use the parameters that the outer call has bound.
        """
        values = dict(self._values) if inside else {}
        return values | {name: buffer.clone() for name, buffer in self._buffers.items()}


class Tree:
    """One copy of a module tree, with the saved state that restores it.

    Attributes:
        root: The copy.
        in_use: Whether the result of a call still refers to this copy. If so, no other call may use the copy.
    """

    def __init__(self, original: nn.Module) -> None:
        shared = shared_memo(original)
        memo = dict(shared)
        root: Any = copy_module(original, memo)
        root.projections.call = _ENDED
        drop_input_grads(root)
        self.root, self._model = root, root.model
        self.in_use = False
        own = {id(made) for key, made in memo.items() if key not in shared}
        containers, tensors = _mutable(root, own)
        self._empty = [container for container in containers if not container]
        self._live = [container for container in containers if container]
        self._kept = [_shallow(container) for container in self._live]
        cloned: dict[int, tuple[Tensor, list[tuple[Any, Any]]]] = {}
        self._watched: list[tuple[Tensor, int]] = []
        for owner, key, tensor, training in tensors:
            if isinstance(owner, dict | list | deque) and _is_cloned(tensor, training):
                cloned.setdefault(id(tensor), (tensor, []))[1].append((owner, key))
            elif not tensor.is_meta and not tensor.is_inference():
                self._watched.append((tensor, tensor._version))
        self._cloned = list(cloned.values())
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._bound: list[tuple[Any, Any, Any]] = []

    def bind(self, values: Mapping[str, Any]) -> None:
        """Set the named parameters, buffers and attributes to the given values, and clone small buffers."""
        bound, places = self._bound, self._places
        for tensor, owners in self._cloned:
            clone = tensor.clone()
            for owner, key in owners:
                bound.append((owner, key, tensor))
                owner[key] = clone
        for name, value in values.items():
            owner, key = places.get(name) or self._place(name)
            bound.append((owner, key, owner[key]))
            owner[key] = value

    def run(self, method: Method, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a method of the model, or a function whose first argument is the model."""
        result = bound_method(self._model, method)(*args, **kwargs)
        # A returned generator uses the tree later, and a returned module is a part of the tree.
        self.in_use = isinstance(result, nn.Module | Iterator)
        return result

    def reset(self) -> bool:
        """Undo the changes of a call. If the result of the call still uses the tree, undo nothing and return False."""
        if self.in_use:
            return False
        while self._bound:
            owner, key, value = self._bound.pop()
            owner[key] = value
        for container in filter(None, self._empty):
            container.clear()
        if not _same(self._live, self._kept):
            for live, kept in zip(self._live, self._kept, strict=True):
                if not _same(live, kept):
                    _restore(live, kept)
        return True

    def is_unwritten(self) -> bool:
        """Return False if a call has modified a tensor in place. Tensors that are cloned for each call are ignored."""
        return all(tensor._version == version for tensor, version in self._watched)

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        prefix, leaf = split_key(name)
        module = self.root.get_submodule(prefix)
        owner = next((d for d in (module._parameters, module._buffers) if leaf in d), vars(module))
        return self._places.setdefault(name, (owner, leaf))


def _mutable(root: nn.Module, own: set[int]) -> tuple[list[Any], list[tuple[Any, Any, Tensor, bool]]]:
    """Return the containers of a tree, and `(container, key, tensor, training)` for each tensor except parameters.

    Objects whose id is not in `own` are shared with other trees, and are skipped. `training` is the training mode of
    the tensor's module.
    """
    containers: list[Any] = []
    tensors = []
    seen: set[int] = set()
    stack: list[tuple[Any, bool]] = [(root, root.training)]
    while stack:
        value, training = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            training = value.training
        if not isinstance(value, (*_CONTAINERS, tuple)):
            if not hasattr(value, "__dict__"):
                continue
            value = vars(value)
        if not isinstance(value, tuple):
            containers.append(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if id(item) not in own:
                continue
            if not isinstance(item, Tensor):
                stack.append((item, training))
            elif not isinstance(item, nn.Parameter):
                tensors.append((value, key, item, training))
    return containers, tensors


def _is_cloned(tensor: Tensor, training: bool) -> bool:
    return type(tensor) is Tensor and not tensor.is_meta and tensor.nbytes <= (SMALL_IN_TRAINING if training else SMALL)


def _shallow(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return next(kind for kind in _CONTAINERS if isinstance(container, kind))(container)


def _same(live: Any, kept: Any) -> bool:
    try:
        return bool(live == kept)
    except Exception:  # comparing different tensors or arrays gives no truth value
        return False


def _restore(live: Any, kept: Any) -> None:
    live.clear()
    (live.update if isinstance(live, dict | set) else live.extend)(kept)
