"""Convert a `VeraConfig` to the content of PEFT's `adapter_config.json`, and back.

The `peft_type` of a DVoRA adapter is "DVERA", a type that PEFT does not know and therefore refuses.
"""

import dataclasses
import warnings
from typing import Any

from ..model.config import VeraConfig


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
METADATA = "vera_func.json"  # written by the command line
_DORA = ("use_dora", "differentiate_norm")
_PEFT_ONLY = ("inference_mode", "peft_type", "peft_version", "runtime_config")


def config_to_json(config: VeraConfig) -> dict[str, Any]:
    """Return the content of `adapter_config.json`, including PEFT's fields `peft_type` and `inference_mode`."""
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    if not config.use_dora:
        fields = {name: value for name, value in fields.items() if name not in _DORA}
    # With the type "VERA", PEFT would ignore the magnitudes. It refuses types that it does not know.
    return {**fields, "inference_mode": True, "peft_type": "DVERA" if config.use_dora else "VERA"}


def config_from_json(fields: Any, source: str = CONFIG, *, ignore_unknown: bool = False) -> VeraConfig:
    """Return the `VeraConfig` for the content of an `adapter_config.json`.

    Unknown fields, such as those of newer versions of PEFT, are ignored if their values are falsy (null, false, empty).
    An unknown field with a truthy value may change the meaning of the tensors, and is rejected by default.

    Args:
        fields: The parsed JSON.
        source: Name of the file, for error messages.
        ignore_unknown: Whether to ignore every unknown field, with a warning, as PEFT does.

    Raises:
        ValueError: If `fields` is not a VeRA configuration, if a field is invalid, or if an unknown field has a truthy
            value.

    Example:
        >>> config_from_json({"peft_type": "VERA", "r": 8, "target_modules": ["q_proj"]}).r
        8
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{source} must contain a JSON object, got {type(fields).__name__}.")
    kind = fields.get("peft_type")
    if kind not in ("VERA", "DVERA"):
        raise ValueError(f"{source} has peft_type {kind!r}; only 'VERA' and 'DVERA' (DVoRA) are supported.")
    if kind == "DVERA" and fields.get("use_dora", True) is not True:
        raise ValueError(
            f"{source} has peft_type 'DVERA' (DVoRA), which requires use_dora=true, got {fields['use_dora']!r}."
        )
    known = {field.name for field in dataclasses.fields(VeraConfig)} - {*(_DORA if kind == "VERA" else ())}
    unknown = sorted(k for k, v in fields.items() if k not in known and k not in _PEFT_ONLY and v)
    if unknown and not ignore_unknown:
        raise ValueError(
            f"{source} has the unknown field {unknown[0]}={fields[unknown[0]]!r}, which may change the meaning of the "
            "tensors. To ignore unknown fields, as PEFT does, pass load_adapter(..., ignore_unknown=True)."
        )
    if unknown:
        names = ", ".join(unknown)
        warnings.warn(f"{source} has unknown fields, which are ignored: {names}.", stacklevel=4)
    values = {name: value for name, value in fields.items() if name in known} | {"use_dora": kind == "DVERA"}
    targets = values.get("target_modules")
    if isinstance(targets, str) and targets.lower() != "all-linear":
        # If target_modules is a regular expression, PEFT ignores these two fields but still writes them.
        values |= {"layers_to_transform": None, "layers_pattern": None}
    try:
        return VeraConfig(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error
