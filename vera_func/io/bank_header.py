"""Check the header of an adapter bank: the metadata, and the shapes and dtypes of the tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.keys import MAGNITUDE, PROJECTIONS, adapted_modules, split_key
from ..model.config import VeraConfig
from .config import config_from_json
from .files import parse_json


FORMAT = "vera_func.bank"


def read_header(path: Path, file: Any) -> tuple[tuple[str, ...], VeraConfig]:
    """Check the header of an adapter bank; return the adapter names and the shared configuration.

    Args:
        path: Path of the bank, for error messages.
        file: The open bank, from `safe_open`. No tensor data is read.

    Raises:
        ValueError: If the file is not an adapter bank, or if its metadata do not match its tensors.
    """
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not an adapter bank: expected a file from save_bank.")
    names = parse_json(path, metadata.get("names", "null"))
    config = config_from_json(parse_json(path, metadata.get("config", "null")), str(path))
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(set(names)) != len(names):
        raise ValueError(f"{path}: the metadata 'names' must be a JSON list of distinct names.")
    keys = list(file.keys())
    if not set(PROJECTIONS) <= set(keys) or not adapted_modules(keys):
        raise ValueError(
            f"{path} must contain vera_A, vera_B and the lambda_b of at least one layer; its first keys are {keys[:3]}."
        )
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    for key, shape in shapes.items():
        if key not in PROJECTIONS and shape[:1] != (len(names),):
            raise ValueError(
                f"{path}: {key!r} has shape {shape}, but its first axis must have the size {len(names)}, the number of "
                "adapter names in the metadata."
            )
        if (dtype := file.get_slice(key).get_dtype()) not in ("F16", "BF16", "F32", "F64"):
            raise ValueError(f"{path}: {key!r} must have a floating-point dtype, got {dtype}.")
    _check_ranks(path, shapes, config)
    return tuple(names), config


def _check_ranks(path: Path, shapes: Mapping[str, tuple[int, ...]], config: VeraConfig) -> None:
    """Check the shapes of a bank's tensors against each other and against the configuration."""
    r = config.r
    A, B = (shapes[name] for name in PROJECTIONS)
    if len(A) != 2 or len(B) != 2 or A[0] != r or B[1] != r:
        raise ValueError(
            f"{path}: for r={r}, vera_A must have shape ({r}, in), got {A}. vera_B must have shape (out, {r}), got {B}."
        )
    other = {"lambda_b": "lambda_d", "lambda_d": "lambda_b"}
    for key, shape in shapes.items():
        leaf = split_key(key)[1]
        if leaf == "lambda_d" and shape[1:] != (r,):
            raise ValueError(f"{path}: {key!r} must have shape ({shape[0]}, {r}) for r={r}, got {shape}.")
        if leaf == "lambda_b" and (len(shape) != 2 or shape[1] > B[0]):
            raise ValueError(
                f"{path}: {key!r} must have shape ({shape[0]}, out) with out <= {B[0]} (the number of rows of vera_B), "
                f"got {shape}."
            )
        magnitude = key.removesuffix("lambda_b") + MAGNITUDE
        if leaf == "lambda_b" and shapes.get(magnitude) != (shape if config.use_dora else None):
            must = f"must have shape {shape}, the shape of {key!r}" if config.use_dora else "must be absent"
            raise ValueError(
                f"{path}: for use_dora={config.use_dora}, {magnitude!r} {must}, got {shapes.get(magnitude)}."
            )
        if leaf in other and (partner := key.removesuffix(leaf) + other[leaf]) not in shapes:
            raise ValueError(f"{path} has {key!r}, but lacks {partner!r}.")
