"""A configuration as the content of PEFT's `adapter_config.json`, and back."""

import dataclasses
import warnings
from typing import Any

from ..model.config import VeraConfig


CONFIG = "adapter_config.json"
_PEFT_ONLY = ("inference_mode", "peft_type", "peft_version", "runtime_config")


def config_to_json(config: VeraConfig) -> dict[str, Any]:
    """The content of `adapter_config.json`, with the fields that PEFT adds of itself."""
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    return {**fields, "inference_mode": True, "peft_type": "VERA"}


def config_from_json(fields: Any, source: str = CONFIG, *, ignore_unknown: bool = False) -> VeraConfig:
    """A configuration from the content of `adapter_config.json`.

    Fields of newer versions of PEFT are passed over while they are off (null, false, empty); an unknown
    one that is on may change what the tensors mean, and is refused, unless it is to be ignored.

    Args:
        fields: The parsed JSON.
        source: Named in errors.
        ignore_unknown: Whether unknown fields that are on are passed over as well, with a warning, as PEFT does.

    Raises:
        ValueError: If it is not a VeRA configuration, or a field is unknown and on, or invalid.

    Example:
        >>> config_from_json({"peft_type": "VERA", "r": 8, "target_modules": ["q_proj"]}).r
        8
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{source} must hold a JSON object, got {type(fields).__name__}.")
    if fields.get("peft_type") != "VERA":
        raise ValueError(f"{source} is of peft_type {fields.get('peft_type')!r}; only 'VERA' adapters are read.")
    known = {field.name for field in dataclasses.fields(VeraConfig)}
    unknown = sorted(k for k, v in fields.items() if k not in known and k not in _PEFT_ONLY and v)
    if unknown and not ignore_unknown:
        raise ValueError(
            f"{source} has {unknown[0]}={fields[unknown[0]]!r}, which is unknown for VeRA, and may change what the "
            "tensors mean. To read it without, as PEFT does, pass load_adapter(..., ignore_unknown=True)."
        )
    if unknown:
        names = ", ".join(unknown)
        warnings.warn(f"{source} has fields that are unknown for VeRA, and ignored: {names}.", stacklevel=4)
    values = {name: value for name, value in fields.items() if name in known}
    targets = values.get("target_modules")
    if isinstance(targets, str) and targets.lower() != "all-linear":
        # PEFT ignores the layers for a regular expression, and writes both.
        values |= {"layers_to_transform": None, "layers_pattern": None}
    try:
        return VeraConfig(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error
