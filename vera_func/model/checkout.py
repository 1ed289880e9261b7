"""A copy of the module tree for each call, which is given back as it was built.

A module is not a function. To run it on given tensors they are put into it, and it may write to itself: to buffers
(batch statistics), to attributes (the longest text that a rotary embedding has seen), to caches and hooks. So a call
checks a copy of the tree out of a free list, and undoes all that before it gives the copy back:

    tree = trees.take()
    try:
        tree.bind(values)
        return tree.run(method, args, kwargs)
    finally:
        trees.give(tree)

Calls at the same time, on other threads or one inside another, have different copies. The copies share parameters and
quantized weights, which nothing writes to, and nothing else.

Undoing is cheap, because it compares: a Llama of 30 layers has 7,000 dicts and lists, nearly all empty, which Python
compares with their copies in 0.15 ms (identical values at once, without looking into them).
"""

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..core.keys import join_key, split_key
from ..private import drop_input_grads
from .targets import held_parameters
from .tree import shared_memo


# Not every write to a tensor is counted in its `_version`: not those of batch statistics, nor through `.data` or numpy.
# So calls get clones of small tensors, and of all but huge ones where the module is in training mode.
SMALL, SMALL_IN_TRAINING = 2**16, 2**24  # bytes
_ENDED = -2  # no number of a backward pass, and not -1 for none
Method: TypeAlias = str | Callable[..., Any]
_CONTAINERS = (dict, list, set, deque, bytearray)


def bound_method(model: nn.Module, method: Method) -> Callable[..., Any]:
    """A method of a model, or a function that takes the model as its first argument, as a function of the others.

    Example:
        >>> bound_method(nn.ReLU(), "__call__")(Tensor([-1.0])), bound_method(nn.ReLU(), repr)()
        (tensor([0.]), 'ReLU()')
    """
    return functools.partial(method, model) if callable(method) else getattr(model, method)


class Trees:
    """A free list of copies of one module tree.

    Attributes:
        root: What is copied. It is never run, except that the compiler traces it.
        checkpoints: Whether its modules checkpoint activations.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.free: list[Tree] = []
        # As transformers marks it.
        self.checkpoints = any(m.training and getattr(m, "gradient_checkpointing", False) for m in root.modules())
        self._values: dict[str, Tensor | None] = dict(held_parameters(root))
        self._buffers: dict[str, Tensor] = {}
        for name, module in root.named_modules():
            for leaf, buffer in module._buffers.items():
                if buffer is None:
                    self._values[join_key(name, leaf)] = None
                elif _is_cloned(buffer, module.training):
                    self._buffers[join_key(name, leaf)] = buffer

    def take(self) -> "Tree":
        """A tree that nobody else has until it is given back."""
        while self.free:
            try:
                tree = self.free.pop()  # one operation, which needs no lock
            except IndexError:
                break
            if tree.is_unwritten():
                return tree
        # A thread has no transform, autocast or inference mode of the caller, in which the copy would be a child of it.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(Tree, self.root).result()

    def give(self, tree: "Tree") -> None:
        """Put a tree back as it was built."""
        if tree.reset():
            self.free.append(tree)

    def copy(self) -> nn.Module:
        """A copy of the root for somebody else, with its own buffers."""
        return copy.deepcopy(self.root, shared_memo(self.root))

    def values(self, *, inside: bool) -> dict[str, Tensor | None]:
        """What the compiler binds beside the values of a call, as it cannot check trees out.

        Clones of the buffers that a call may write to, and inside of another call, of which it would see the values,
        all parameters.
        """
        values = dict(self._values) if inside else {}
        return values | {name: buffer.clone() for name, buffer in self._buffers.items()}


class Tree:
    """One copy of a module tree, and what it takes to put it back.

    Attributes:
        root: The copy.
        lent: Whether the result of a call still uses it, so that it must not be given to another call.
    """

    def __init__(self, original: nn.Module) -> None:
        shared = shared_memo(original)
        memo = dict(shared)
        root: Any = copy.deepcopy(original, memo)
        root.projections.call = _ENDED
        drop_input_grads(root)
        self.root, self._model = root, root.model
        self.lent = False
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
        """Put values in the place of parameters, buffers or attributes, by their full names; clone small buffers."""
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
        """What a method of the model returns, or a function of it."""
        result = bound_method(self._model, method)(*args, **kwargs)
        # A generator has yet to run, and a module is a part of the tree: both keep it.
        self.lent = isinstance(result, nn.Module | Iterator)
        return result

    def reset(self) -> bool:
        """Undo what a call did; False if the tree can't be used again."""
        if self.lent:
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
        """Whether the tensors that were not cloned are as they were."""
        return all(tensor._version == version for tensor, version in self._watched)

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        prefix, leaf = split_key(name)
        module = self.root.get_submodule(prefix)
        owner = next((d for d in (module._parameters, module._buffers) if leaf in d), vars(module))
        return self._places.setdefault(name, (owner, leaf))


def _mutable(root: nn.Module, own: set[int]) -> tuple[list[Any], list[tuple[Any, Any, Tensor, bool]]]:
    """The containers that a tree reaches, the dicts of its objects among them, and its tensors but for parameters.

    Args:
        root: Of the tree.
        own: Ids of what was made for this tree. Other objects, such as functions, are everybody's.

    Returns:
        The containers, and of each tensor a container, its key there, and whether the module is in training mode.
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
    except Exception:  # tensors and arrays have no truth value: some are in place of others
        return False


def _restore(live: Any, kept: Any) -> None:
    live.clear()
    (live.update if isinstance(live, dict | set) else live.extend)(kept)
