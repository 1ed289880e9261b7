"""Activation checkpointing: a loss that recomputes the activations of each layer instead of storing them.

    loss = checkpointed_loss(adapted, lambda module, batch: module(**batch).logits.square().mean())
    loss(params, batch)  # equals apply(params, frozen, **batch).logits.square().mean()

Compared with `apply`, a training step needs less memory and about 4/3 of the time. `apply` binds params to the model
only during a call. The backward pass runs after the call, so it can't recompute a layer with these params. A
checkpointed loss copies the params to a module, and computes the gradients already in the forward pass. A checkpointed
loss supports only plain autograd and first derivatives.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.adapt import Adapted
from ..model.module import adapted_module


Value = Callable[[Any, Any], Tensor]


def checkpointed_loss(adapted: Adapted, value: Value) -> Callable[[Mapping[str, Tensor], Any], Tensor]:
    """Return a loss function `(params, batch) -> loss` for `fit` that stores only the input of each layer.

    The layers are the modules in the outermost `nn.ModuleList`s of the model, as in transformers' models.

    Args:
        adapted: Result of `adapt`, with the params of a single adapter.
        value: Function `(module, batch)` that returns the loss. `module` is the adapted model as an `nn.Module`.

    Raises:
        ValueError: If the model contains no `nn.ModuleList`, or if `adapted.params` are stacked.

    Example:
        >>> from vera_func import VeraConfig, adapt, grad
        >>> layers = nn.ModuleList([nn.Linear(8, 8)])
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = layers
        ...     def forward(self, x):
        ...         return self.layers[0](x)
        >>> adapted = adapt(Model(), VeraConfig(r=4, target_modules=["0"]))
        >>> loss = checkpointed_loss(adapted, lambda module, x: module(x).sum())
        >>> grad(loss)(adapted.params, torch.ones(2, 8))["layers.0.lambda_b"].shape
        torch.Size([8])
    """
    module = adapted_module(adapted)
    if not _layers(module):
        raise ValueError(
            f"the model, a {type(adapted.apply.model).__name__}, contains no nn.ModuleList with layers to checkpoint: "
            "train with apply instead."
        )
    parameters = {key: module.get_parameter(key) for key in adapted.params}

    def loss(params: Mapping[str, Tensor], batch: Any) -> Tensor:
        return _Loss.apply(partial(_loss_and_gradients, module, parameters, value, batch), *params.values())

    return loss


class _Loss(torch.autograd.Function):
    """Autograd function that computes the gradients in its forward pass."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., tuple[Tensor, tuple[Tensor, ...]]], *leaves: Tensor) -> Tensor:
        result, grads = compute(leaves)
        ctx.save_for_backward(*grads)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, *(g.to(grad.dtype) * grad for grad in ctx.saved_tensors)


def _loss_and_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], value: Value, batch: Any, leaves: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        for parameter, leaf in zip(parameters.values(), leaves, strict=True):
            parameter.copy_(leaf)
    with torch.enable_grad(), _checkpointing(_layers(module)):
        result = value(module, batch)
        grads = torch.autograd.grad(result, list(parameters.values()), materialize_grads=True)
    return result.detach(), grads


@contextmanager
def _checkpointing(layers: list[nn.Module]) -> Iterator[None]:
    """Checkpoint layers during a `with` block, and restore the layers afterwards: the base model may share layers."""
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _layers(module: nn.Module) -> list[nn.Module]:
    lists = {name: child for name, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    outer = [one for name, one in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [layer for one in outer for layer in one]
