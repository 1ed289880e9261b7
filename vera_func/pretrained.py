"""Where version 0.1 had `quantize_model`; use `vera_func.quantize_model`. This module goes with the next version."""

import warnings

from .model.convert import quantize_model as quantize_model


warnings.warn(
    "vera_func.pretrained goes with the next version: use vera_func.quantize_model.", DeprecationWarning, stacklevel=2
)
