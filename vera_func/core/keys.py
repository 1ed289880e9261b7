"""Keys of a flat dict of params, which have the form `"{module}.{leaf}"`, as in `named_parameters()`.

The leaf names `lambda_b` and `lambda_d` mark the adapter vectors of a module. DVoRA adds a third vector, `magnitude`,
which `dora.fold_layer` replaces by `output_scale`. The leaf `mixture` contains the weights of a sum of adapters. Any
other leaf is a parameter of the base model, such as a trained bias or head. A trained parameter p can have a factor f,
with a key such as `"classifier.weight.base_share"`. The model then uses `p + f * w` as `classifier.weight`, where w is
the base model's `classifier.weight`. For DVoRA, the base model counts as an adapter with output scale 1.
"""

from collections.abc import Iterable


PROJECTIONS = ("vera_A", "vera_B")
VECTORS = ("lambda_b", "lambda_d")
MAGNITUDE, OUTPUT_SCALE = SCALES = ("magnitude", "output_scale")
STATISTICS = ("square_norm", "C", "G")  # keys of one layer's `frozen`; see `dora.norm_statistics`
MIXTURE = "mixture"
BASE_SHARE = "base_share"
MARKS = (MIXTURE, BASE_SHARE)  # leaves that `select_adapters` adds to params


def join_key(*parts: str) -> str:
    """Join the parts of a name with dots, skipping empty parts such as the root module's name.

    Example:
        >>> join_key("model", "", "lambda_b")
        'model.lambda_b'
    """
    return ".".join(part for part in parts if part)


def split_key(key: str) -> tuple[str, str]:
    """Split a key into the name of the module and the leaf.

    Example:
        >>> split_key("layers.0.q_proj.lambda_b"), split_key("lambda_b")
        (('layers.0.q_proj', 'lambda_b'), ('', 'lambda_b'))
    """
    module, _, leaf = key.rpartition(".")
    return module, leaf


def is_vector(key: str) -> bool:
    """Whether a key belongs to an adapter vector: `lambda_b`, `lambda_d`, `magnitude` or `output_scale`.

    Example:
        >>> is_vector("q_proj.lambda_b"), is_vector("classifier.weight")
        (True, False)
    """
    return split_key(key)[1] in (*VECTORS, *SCALES)


def own_parameters(keys: Iterable[str]) -> list[str]:
    """Select the keys of trained parameters of the base model, such as a bias or a head; omit the keys of adapters.

    Example:
        >>> own_parameters(["q_proj.lambda_b", "q_proj.mixture", "classifier.weight"])
        ['classifier.weight']
    """
    return [key for key in keys if split_key(key)[1] not in (*VECTORS, *SCALES, *MARKS)]


def adapted_modules(keys: Iterable[str]) -> list[str]:
    """Return the names of the modules that have a `lambda_b`, in the order of the keys.

    Example:
        >>> adapted_modules(["q_proj.lambda_b", "q_proj.lambda_d", "classifier.weight"])
        ['q_proj']
    """
    return [module for module, leaf in map(split_key, keys) if leaf == "lambda_b"]
