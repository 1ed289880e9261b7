"""Convert tensor names in PEFT's files to keys of `params`, and back."""

from ..core.keys import MAGNITUDE, VECTORS, join_key, split_key


_PREFIX = "base_model.model."


def key_to_peft(key: str, layers: set[str]) -> str:
    """Return the tensor name in PEFT's files for a key of `params`. `layers` are the names of the adapted layers.

    Example:
        >>> key_to_peft("q.lambda_b", {"q"}), key_to_peft("q.bias", {"q"})
        ('base_model.model.q.vera_lambda_b', 'base_model.model.q.base_layer.bias')
    """
    layer, leaf = split_key(key)
    if leaf in (*VECTORS, MAGNITUDE):
        leaf = f"vera_{leaf}"
    elif layer in layers:
        leaf = f"base_layer.{leaf}"
    return _PREFIX + join_key(layer, leaf)


def key_from_peft(name: str) -> str | None:
    """Return the key of `params` for a tensor name in PEFT's files, or None for a projection or an unknown name.

    Example:
        >>> key_from_peft("base_model.model.q.vera_lambda_b"), key_from_peft("base_model.model.q.base_layer.bias")
        ('q.lambda_b', 'q.bias')
    """
    if not name.startswith(_PREFIX):
        return None
    layer, leaf = split_key(name.removeprefix(_PREFIX))
    if leaf in ("vera_lambda_b", "vera_lambda_d", "vera_magnitude"):
        leaf = leaf.removeprefix("vera_")
    elif layer == "base_layer" or layer.endswith(".base_layer"):
        layer = layer.removesuffix("base_layer").removesuffix(".")
    return join_key(layer, leaf)


def is_copy(name: str) -> bool:
    """Return whether a tensor is a copy that PEFT ignores. With bias="all", PEFT writes a head's bias three times."""
    return ".modules_to_save." in name or ".original_module." in name
