"""The adapted model as an ordinary `nn.Module` with trainable parameters."""

from typing import Any

from torch import nn

from ..core.keys import split_key
from .adapt import Adapted


def to_module(adapted: Adapted) -> nn.Module:
    """The adapted model as an ordinary module of the model's own class, its vectors as trainable parameters.

    For what needs a module: `Trainer`, activation checkpointing (which `torch.func` refuses), a
    `torch.optim` optimizer. It shares the base's memory; the vectors are copies, which
    `{k: p for k, p in module.named_parameters() if p.requires_grad}` reads back under the keys of `params`.

    Args:
        adapted: From `adapt` or `load_adapter`, with the params of a single adapter.

    Raises:
        ValueError: If the params do not fit, or are stacked.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> [name for name, p in to_module(adapted).named_parameters() if p.requires_grad]
        ['0.lambda_b', '0.lambda_d']
    """
    apply, params, frozen, _ = adapted
    tensors = apply._bind(params, frozen)
    for key, value in params.items():
        if value.shape != apply.slots[key].shape:
            raise ValueError(f"{key!r} {tuple(value.shape)} is stacked; a module holds one adapter (unstack_adapters).")
    root: Any = apply.trees.copy()
    root.projections.vera_A, root.projections.vera_B = frozen["vera_A"], frozen["vera_B"]
    trained: dict[str, nn.Parameter] = {}
    for key in params:
        for name in apply.slots[key].names:
            owner, leaf = split_key(name)
            parameter = trained.setdefault(key, nn.Parameter(tensors[name].detach().clone()))
            setattr(root.get_submodule(owner), leaf, parameter)
    return root.model
