"""The header of an adapter bank: its metadata, and the shapes of its tensors, which are not read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.keys import MAGNITUDE, PROJECTIONS, adapted_modules, split_key
from ..model.config import VeraConfig
from .config import config_from_json
from .files import parse_json


FORMAT = "vera_func.bank"


def read_header(path: Path, file: Any) -> tuple[tuple[str, ...], VeraConfig]:
    """Check the header of a bank; return the names of its adapters, and their configuration.

    Args:
        path: The path of the file, for error messages.
        file: The file, from `safe_open`. Only the shapes and dtypes of its tensors are read.

    Raises:
        ValueError: If the file is not a bank, or if its metadata and tensors contradict each other.
    """
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not an adapter bank (from save_bank).")
    names = parse_json(path, metadata.get("names", "null"))
    config = config_from_json(parse_json(path, metadata.get("config", "null")), str(path))
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(set(names)) != len(names):
        raise ValueError(f"{path}: the metadata 'names' must be a list of distinct names.")
    keys = list(file.keys())
    if not set(PROJECTIONS) <= set(keys) or not adapted_modules(keys):
        raise ValueError(f"{path} lacks projections or vectors; it holds {keys[:3]}.")
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    for key, shape in shapes.items():
        if key not in PROJECTIONS and shape[:1] != (len(names),):
            raise ValueError(f"{path}: {key!r} has shape {shape}, but the metadata names {len(names)} adapters.")
        if (dtype := file.get_slice(key).get_dtype()) not in ("F16", "BF16", "F32", "F64"):
            raise ValueError(f"{path}: {key!r} must have a floating-point dtype, got {dtype}.")
    _check_ranks(path, shapes, config)
    return tuple(names), config


def _check_ranks(path: Path, shapes: Mapping[str, tuple[int, ...]], config: VeraConfig) -> None:
    """Check the shapes of a bank's tensors against each other and against the configuration."""
    r = config.r
    A, B = (shapes[name] for name in PROJECTIONS)
    if len(A) != 2 or len(B) != 2 or A[0] != r or B[1] != r:
        raise ValueError(f"{path}: vera_A {A} and vera_B {B} must have shapes ({r}, in) and (out, {r}) for r={r}.")
    other = {"lambda_b": "lambda_d", "lambda_d": "lambda_b"}
    for key, shape in shapes.items():
        leaf = split_key(key)[1]
        if leaf == "lambda_d" and shape[1:] != (r,):
            raise ValueError(f"{path}: {key!r} must have shape ({shape[0]}, {r}), because r is {r}, got {shape}.")
        if leaf == "lambda_b" and (len(shape) != 2 or shape[1] > B[0]):
            raise ValueError(
                f"{path}: {key!r} must have shape ({shape[0]}, out) with out <= {B[0]} (vera_B), got {shape}."
            )
        magnitude = key.removesuffix("lambda_b") + MAGNITUDE
        if leaf == "lambda_b" and shapes.get(magnitude) != (shape if config.use_dora else None):
            raise ValueError(
                f"{path}: with use_dora={config.use_dora} and a lambda_b of shape {shape}, the shape of {magnitude!r} "
                f"can't be {shapes.get(magnitude)}."
            )
        if leaf in other and key.removesuffix(leaf) + other[leaf] not in shapes:
            raise ValueError(f"{path} has {key!r}, but lacks the layer's {other[leaf]!r}.")
