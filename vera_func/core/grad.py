"""Gradients of pure functions, as fast as plain autograd.

    value_and_grad(f)(x, ...) = f(x, ...), df/dx

`torch.func.grad` has overhead that most calls do not need: it creates a class for every call of a custom
`autograd.Function`, and keeps the graph of the backward pass. This module uses `torch.func` inside transforms, under
`torch.compile` and for inference tensors, and plain autograd otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ..private import in_transform, tree_flatten, tree_leaves, tree_map, tree_unflatten
from .shapes import described


Function = Callable[..., Any]


def grad(function: Function, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Function:
    """Return a function that computes the gradient of a scalar function, as `torch.func.grad` does, but faster.

    Outside of transforms, `torch.autograd.grad` computes the gradient. If gradients are enabled and an argument or a
    closed-over tensor requires grad, the gradient can be differentiated again. Otherwise, the graph of the backward
    pass is freed. Activation checkpointing is supported. Inside `vmap`, `jvp`, `grad` and other transforms, under
    `torch.compile` and for inference tensors, `torch.func.grad` computes the gradient.

    Args:
        function: Function that returns a tensor of shape (), or with `has_aux` a pair `(tensor, aux)`.
        argnums: Position of the argument to differentiate, or a tuple of positions. A differentiated argument is a
            pytree (dicts, lists, tuples) of floating-point tensors.
        has_aux: Whether `function` returns a pair. `aux` is a pytree of tensors, and is not differentiated.

    Returns:
        A function of the same arguments that returns the gradient, or with `has_aux` the pair `(gradient, aux)`. The
        gradient is a pytree like the argument, or a tuple of such pytrees if `argnums` is a tuple. Tensors that do not
        affect the value have a gradient of zeros.

    Raises:
        ValueError: If a differentiated argument is not a pytree of floating-point tensors, if `argnums` are not
            positions of arguments, or if `function` does not return a scalar. The error is raised when the returned
            function is called.

    Example:
        >>> loss = lambda params, x: (params["w"] * x).square().sum()
        >>> grad(loss)({"w": torch.ones(2)}, torch.tensor([1.0, 3.0]))
        {'w': tensor([ 2., 18.])}
    """
    return partial(_grad, function, argnums, has_aux)


def value_and_grad(function: Function, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Function:
    """Return a function that computes `(value, gradient)`; `torch.func.grad_and_value` returns the opposite order.

    Args:
        function: See `grad`.
        argnums: See `grad`.
        has_aux: See `grad`.

    Returns:
        A function of the same arguments that returns `(value, gradient)`; with `has_aux`,
        `((value, aux), gradient)`.

    Raises:
        ValueError: See `grad`.

    Example:
        >>> value_and_grad(torch.prod)(torch.tensor([2.0, 3.0]))
        (tensor(6.), tensor([3., 2.]))
    """
    return partial(_value_and_grad, function, argnums, has_aux)


def gradients(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, Any, list[Tensor | None]]:
    """Compute `(value, aux, gradients)` of `function(*inputs) -> (value, aux)` by plain autograd.

    Do not call this function inside a transform.

    Args:
        function: Function that returns a tensor of shape (), and `aux`, a pytree of tensors.
        inputs: Floating-point tensors.

    Returns:
        The value, `aux`, and a list with the gradient of each input. The gradient is None if the input does not affect
        the value.

    Example:
        >>> gradients(lambda x, y: (x.square(), ()), [torch.tensor(3.0), torch.ones(2)])
        (tensor(9.), (), [tensor(6.), None])
    """
    differentiable = torch.is_grad_enabled()  # whether the caller may differentiate the result
    # An input that requires grad stays connected to the caller's graph; any other input becomes a leaf.
    leaves = [x.view_as(x) if differentiable and x.requires_grad else _leaf(x) for x in inputs]
    own = {id(x) for x in leaves if x.is_leaf}
    with torch.enable_grad():
        value, aux = function(*leaves)
    outer = _Outer(own) if differentiable else None
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if leaves and value.requires_grad:
        connected = outer is not None and len(own) < len(leaves)
        keep = connected or any(_leads_outside(outer, result) for result in (value, *tree_leaves(aux)))
        grads = torch.autograd.grad(value, leaves, create_graph=keep, allow_unused=True)
    release = partial(_release, outer)
    return release(value), tree_map(release, aux), [None if x is None else release(x) for x in grads]


def _grad(function: Function, argnums: Any, has_aux: bool, /, *args: Any, **kwargs: Any) -> Any:
    _, aux, grads = _differentiate(function, argnums, has_aux, args, kwargs)
    return (grads, aux) if has_aux else grads


def _value_and_grad(function: Function, argnums: Any, has_aux: bool, /, *args: Any, **kwargs: Any) -> Any:
    value, aux, grads = _differentiate(function, argnums, has_aux, args, kwargs)
    return ((value, aux) if has_aux else value), grads


def _differentiate(
    function: Function, argnums: Any, has_aux: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Any, Any]:
    """Return `(value, aux, gradient)`; without `has_aux`, aux is ()."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # in torch 2.11, the gradient would otherwise be zeros
            return _differentiate(function, argnums, has_aux, args, kwargs)
    places = _places(argnums, len(args))
    leaves, structure = tree_flatten(tuple(args[i] for i in places))
    _check_leaves(leaves)
    called = partial(_call, function, has_aux)
    if torch.compiler.is_compiling() or _needs_torch_func(leaves):
        grads, (value, aux) = torch.func.grad_and_value(called, places, has_aux=True)(*args, **kwargs)
        return value, aux, grads if isinstance(argnums, tuple) else grads[0]

    def with_inputs(*inputs: Tensor) -> tuple[Tensor, Any]:
        given = dict(zip(places, tree_unflatten(list(inputs), structure), strict=True))
        return called(*(given.get(i, arg) for i, arg in enumerate(args)), **kwargs)

    value, aux, found = gradients(with_inputs, leaves)
    filled = [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, found, strict=True)]
    grads = tree_unflatten(filled, structure)
    return value, aux, grads if isinstance(argnums, tuple) else grads[0]


def _leaf(x: Tensor) -> Tensor:
    """Return a leaf of a new graph. A tensor from inference mode can't be a leaf, so it is copied."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


class _Outer:
    """The autograd graph outside of a differentiated function.

    `own` contains the `id` of each input of the function that is a leaf of the graph.
    """

    def __init__(self, own: set[int]) -> None:
        self.own = own
        self.inside: set[Node] = set()  # nodes from which only own leaves are reached

    def reached_from(self, result: Tensor) -> bool:
        """Whether a result depends on a tensor that requires grad and comes from outside of the function."""
        seen, left = set(), [get_gradient_edge(result).node]
        while left:
            node = left.pop()
            if node in seen or node in self.inside:
                continue
            seen.add(node)
            # The node of a leaf has no next functions, and holds the leaf as `variable`.
            if not node.next_functions and id(getattr(node, "variable", None)) not in self.own:
                return True
            left.extend(following for following, _ in node.next_functions if following is not None)
        self.inside |= seen
        return False


def _leads_outside(outer: _Outer | None, result: Tensor) -> bool:
    """Whether the caller can differentiate a result, so that the graph must be kept."""
    return outer is not None and result.requires_grad and outer.reached_from(result)


def _release(outer: _Outer | None, result: Tensor) -> Tensor:
    return result if _leads_outside(outer, result) else result.detach()


def _needs_torch_func(leaves: Sequence[Tensor]) -> bool:
    # Plain autograd ignores transforms, and records no graph in inference mode.
    return in_transform() or torch.is_inference_mode_enabled() or any(leaf.is_inference() for leaf in leaves)


def _call(function: Function, has_aux: bool, /, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    result = function(*args, **kwargs)
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(f"with has_aux, function must return a pair (value, aux), got {type(result).__name__}.")
    value, aux = result if has_aux else (result, ())
    if not isinstance(value, Tensor) or value.dim() != 0:
        hint = "" if has_aux else ", or pass has_aux=True for a pair (value, aux)"
        raise ValueError(f"function must return a tensor of shape (), got {described(value)}: return the sum{hint}.")
    for leaf in tree_leaves(aux):
        if not isinstance(leaf, Tensor):
            raise ValueError(f"aux must be a pytree of tensors, got a leaf of type {type(leaf).__name__}.")
    return value, aux


def _places(argnums: Any, count: int) -> tuple[int, ...]:
    places = argnums if isinstance(argnums, tuple) else (argnums,)
    if not places or not all(isinstance(i, int) and -count <= i < count for i in places):
        raise ValueError(f"argnums must be positions among the {count} positional arguments, got {argnums!r}.")
    places = tuple(i % count for i in places)
    if len({*places}) < len(places):
        raise ValueError(f"argnums must be different positions, got {argnums!r}, which has a position twice.")
    return places


def _check_leaves(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            raise ValueError(
                "a differentiated argument must be a pytree of floating-point tensors, got a leaf "
                f"{described(leaf)}: pass that leaf in another argument, or close over the leaf."
            )
