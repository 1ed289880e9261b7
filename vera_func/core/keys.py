"""Keys of a flat dict of params: `"{module}.{leaf}"`, as in `named_parameters()`.

The leaves `lambda_b` and `lambda_d` are the vectors of the adapter of a module; `mixture` marks a weighted sum of
adapters. Any other leaf is a parameter of the model itself, such as a trained bias or head. There `base_share`, below
the parameter's own key, marks values to which that share of the base's own is to be added:
`"classifier.weight.base_share"`.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor


VECTORS = ("lambda_b", "lambda_d")
MIXTURE = "mixture"
BASE_SHARE = "base_share"
MARKS = (MIXTURE, BASE_SHARE)  # what `select_adapters` adds to params


def join_key(*parts: str) -> str:
    """The name made of these parts, of which empty ones are left out: the root module has no name.

    Example:
        >>> join_key("model", "", "lambda_b")
        'model.lambda_b'
    """
    return ".".join(part for part in parts if part)


def split_key(key: str) -> tuple[str, str]:
    """A key's module and leaf.

    Example:
        >>> split_key("layers.0.q_proj.lambda_b"), split_key("lambda_b")
        (('layers.0.q_proj', 'lambda_b'), ('', 'lambda_b'))
    """
    module, _, leaf = key.rpartition(".")
    return module, leaf


def is_vector(key: str) -> bool:
    """Whether a key is `lambda_b` or `lambda_d` of a module.

    Example:
        >>> is_vector("q_proj.lambda_b"), is_vector("classifier.weight")
        (True, False)
    """
    return split_key(key)[1] in VECTORS


def own_parameters(keys: Iterable[str]) -> list[str]:
    """The keys that are parameters of the model itself, in order.

    Example:
        >>> own_parameters(["q_proj.lambda_b", "q_proj.mixture", "classifier.weight"])
        ['classifier.weight']
    """
    return [key for key in keys if split_key(key)[1] not in (*VECTORS, *MARKS)]


def adapted_modules(keys: Iterable[str]) -> list[str]:
    """The names of the modules that have a `lambda_b`, in order.

    Example:
        >>> adapted_modules(["q_proj.lambda_b", "q_proj.lambda_d", "classifier.weight"])
        ['q_proj']
    """
    return [module for module, leaf in map(split_key, keys) if leaf == "lambda_b"]


def by_module(params: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The vectors of each adapted module, `{module: {"lambda_b": ..., "lambda_d": ...}}`, as far as they are there.

    Example:
        >>> import torch
        >>> by_module({"q_proj.lambda_b": torch.ones(2), "classifier.bias": torch.ones(3)})
        {'q_proj': {'lambda_b': tensor([1., 1.])}}
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in params.items():
        module, leaf = split_key(key)
        if leaf in VECTORS:
            layers.setdefault(module, {})[leaf] = value
    return layers
