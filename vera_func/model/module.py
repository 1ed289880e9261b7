"""Convert an adapted model to a module with trainable parameters."""

from typing import Any

from torch import nn

from ..core.keys import split_key
from .adapt import Adapted, require_adapted
from .layers import set_parameter


def adapted_module(adapted: Adapted) -> nn.Module:
    """Return a copy of the adapted model as a module, with the params as trainable parameters, named by key.

    Args:
        adapted: The result of `adapt` or `load_adapter`, with the params of a single adapter.

    Raises:
        ValueError: If the params do not fit the model, or are stacked.

    Example:
        >>> from vera_func import VeraConfig, adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"], bias="all"))
        >>> [name for name, p in adapted_module(adapted).named_parameters() if p.requires_grad]
        ['0.bias', '0.lambda_b', '0.lambda_d']
    """
    require_adapted(adapted)
    apply, params, frozen, _ = adapted
    tensors, _ = apply.bind(params, frozen)
    for key, value in params.items():
        if value.shape != apply.slots[key].shape:
            raise ValueError(
                f"{key!r} of shape {tuple(value.shape)} is stacked, but a module has one adapter: pass one element of "
                "unstack_adapters(params)."
            )
    root: Any = apply.trees.copy()
    root.projections.vera_A, root.projections.vera_B = frozen["vera_A"], frozen["vera_B"]
    for key in sorted(params, key=apply.schema.tied.__contains__):  # the first name of a tied parameter comes first
        names = apply.slots[key].names
        parameter = nn.Parameter(tensors[names[0]].detach().clone())
        for name in names:
            owner, leaf = split_key(name)
            set_parameter(root.get_submodule(owner), leaf, parameter)
    return root.model
