"""Gradients of pure functions, at the cost of plain autograd.

    value_and_grad(f)(x, ...) = f(x, ...), df/dx

`torch.func.grad` pays for what most calls do not need: it makes a class for every call of a custom
`autograd.Function`, and keeps the graph of its own backward. Here plain autograd computes the gradient where nothing
else is asked for. Inside of a transform, and while `torch.compile` traces, it is `torch.func.grad` itself.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ..private import in_transform, tree_flatten, tree_leaves, tree_map, tree_unflatten


Function = Callable[..., Any]


def grad(function: Function, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Function:
    """A function that returns the gradient of a scalar function: `torch.func.grad`, as fast as plain autograd.

    Outside of transforms the result is that of `torch.autograd.grad`, bit for bit. The graph of the backward is kept
    only where an argument or a closed-over tensor requires grad, so that the result can be differentiated again by
    plain autograd, too; under `torch.no_grad()` it is never kept. Activation checkpointing works. Inside of `vmap`,
    `jvp`, `grad` and the other transforms, under `torch.compile` and in inference mode, `torch.func.grad` computes it.

    Args:
        function: `(*args, **kwargs)` to one number, a tensor of shape (), or to a pair of it and `aux`.
        argnums: The position of the argument to differentiate, or a tuple of positions. An argument is a pytree (dicts,
            lists, tuples) of floating-point tensors.
        has_aux: Whether `function` returns a pair. `aux` is a pytree of tensors, and is not differentiated.

    Returns:
        A function of the same arguments: to the gradient, in the shape of the argument; of a tuple of arguments to a
        tuple; with `has_aux` to `(gradient, aux)`. Where the function does not depend on a tensor, zeros.

    Raises:
        ValueError: When the result is called and its arguments or the value of `function` do not fit.

    Example:
        >>> loss = lambda params, x: (params["w"] * x).square().sum()
        >>> grad(loss)({"w": torch.ones(2)}, torch.tensor([1.0, 3.0]))
        {'w': tensor([ 2., 18.])}
    """
    return partial(_grad, function, argnums, has_aux)


def value_and_grad(function: Function, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Function:
    """A function that returns `(value, gradient)`, in the order of JAX; `torch.func.grad_and_value` has the other.

    Args:
        function: As `grad` takes it.
        argnums: As `grad` takes it.
        has_aux: As `grad` takes it.

    Returns:
        A function of the same arguments to `(value, gradient)`; with `has_aux` to `((value, aux), gradient)`.

    Raises:
        ValueError: As from `grad`.

    Example:
        >>> value_and_grad(torch.prod)(torch.tensor([2.0, 3.0]))
        (tensor(6.), tensor([3., 2.]))
    """
    return partial(_value_and_grad, function, argnums, has_aux)


def gradients(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, Any, list[Tensor | None]]:
    """`(value, aux, gradients)` of `function(*inputs) -> (value, aux)` by plain autograd, outside of transforms.

    Args:
        function: To one number, a tensor of shape (), and a pytree of tensors.
        inputs: Tensors of floating-point numbers.

    Returns:
        The value, the aux, and for each input its gradient, or None where the value does not depend on it.

    Example:
        >>> gradients(lambda x, y: (x.square(), ()), [torch.tensor(3.0), torch.ones(2)])
        (tensor(9.), (), [tensor(6.), None])
    """
    differentiable = torch.is_grad_enabled()  # in what is outside
    # An input stays connected with a tensor that requires grad; else it is a leaf.
    leaves = [x.view_as(x) if differentiable and x.requires_grad else x.detach().requires_grad_() for x in inputs]
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
    """`(value, aux, gradient)`; without `has_aux`, aux is ()."""
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


class _Outer:
    """The tensors outside of a function that require grad; `own` are the ids of leaves that do not count."""

    def __init__(self, own: set[int]) -> None:
        self.own = own
        self.inside: set[Node] = set()  # from where only our leaves are reached

    def reached_from(self, result: Tensor) -> bool:
        """Whether a result depends on one of them."""
        seen, left = set(), [get_gradient_edge(result).node]
        while left:
            node = left.pop()
            if node in seen or node in self.inside:
                continue
            seen.add(node)
            # The node of a leaf leads nowhere, and knows the leaf.
            if not node.next_functions and id(getattr(node, "variable", None)) not in self.own:
                return True
            left.extend(following for following, _ in node.next_functions if following is not None)
        self.inside |= seen
        return False


def _leads_outside(outer: _Outer | None, result: Tensor) -> bool:
    """Whether a result can be differentiated in something outside, and has to keep its graph for it."""
    return outer is not None and result.requires_grad and outer.reached_from(result)


def _release(outer: _Outer | None, result: Tensor) -> Tensor:
    return result if _leads_outside(outer, result) else result.detach()


def _needs_torch_func(leaves: Sequence[Tensor]) -> bool:
    # Autograd knows nothing of transforms, and records nothing in inference mode.
    return in_transform() or torch.is_inference_mode_enabled() or any(leaf.is_inference() for leaf in leaves)


def _call(function: Function, has_aux: bool, /, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    result = function(*args, **kwargs)
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(f"with has_aux, function must return a pair (value, aux), got {type(result).__name__}.")
    value, aux = result if has_aux else (result, ())
    if not isinstance(value, Tensor) or value.dim() != 0:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        hint = "" if has_aux else ", or has_aux=True for a pair (value, aux)"
        raise ValueError(f"function must return one number, a tensor of shape (), got {found}: take the sum{hint}.")
    for leaf in tree_leaves(aux):
        if not isinstance(leaf, Tensor):
            raise ValueError(f"aux must be a pytree of tensors, got one with a {type(leaf).__name__} in it.")
    return value, aux


def _places(argnums: Any, count: int) -> tuple[int, ...]:
    places = argnums if isinstance(argnums, tuple) else (argnums,)
    if not places or not all(isinstance(i, int) and -count <= i < count for i in places):
        raise ValueError(f"argnums must be positions among the {count} positional arguments, got {argnums!r}.")
    places = tuple(i % count for i in places)
    if len({*places}) < len(places):
        raise ValueError(f"argnums must be different positions, got {argnums!r}.")
    return places


def _check_leaves(leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"what is differentiated must be a pytree of floating-point tensors, got one with a {found} in it: "
                "pass that in another argument, or close over it."
            )
