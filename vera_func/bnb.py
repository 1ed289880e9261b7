"""Deprecated: import from `vera_func.quant.bnb`. The module `vera_func.bnb` will be removed in the next version."""

import warnings

from .quant.bnb import from_bnb as from_bnb, is_bnb_linear as is_bnb_linear, to_bnb as to_bnb


warnings.warn(
    "vera_func.bnb will be removed in the next version: use vera_func.quant.bnb.", DeprecationWarning, stacklevel=2
)
