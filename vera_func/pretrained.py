"""Deprecated: use `vera_func.quantize_model`. This module of version 0.1 will be removed in the next version."""

import warnings

from .model.convert import quantize_model as quantize_model


warnings.warn(
    "vera_func.pretrained will be removed in the next version: use vera_func.quantize_model.",
    DeprecationWarning,
    stacklevel=2,
)
