"""The frozen random projections that all layers and all adapters share.

VeRA (Kopiczko et al., 2024, https://arxiv.org/abs/2310.11454) draws `A` (r, in) and `B` (out, r) once,
for the widest adapted layer. A narrower layer uses the first `in` columns of `A` and the first `out` rows
of `B`. The projections are not trained, so an adapter can be stored as its vectors and a seed.
"""

import math

import torch
from torch import Tensor


def init_projections(r: int, in_features: int, out_features: int, key: int = 0) -> dict[str, Tensor]:
    """Draw the shared projections `{"vera_A": (r, in), "vera_B": (out, r)}`, Kaiming-uniform in float32 on the CPU.

    For the same key and sizes, the projections are bitwise equal to PEFT's. A CPU generator seeded with `key` draws `A`
    and then `B`. Values are uniform in ±sqrt(6 / fan_in), where fan_in is `in` for `A` and `r` for `B`. The draw does
    not depend on the default dtype, the global generator or the number of threads. For the same key, the values depend
    on `r` and `in_features`: projections for a wider input do not contain the projections for a narrower input.

    Args:
        r: Rank, the number of rows of `A`.
        in_features: Input size of the widest adapted layer.
        out_features: Output size of the widest adapted layer.
        key: Seed of the draw, called `projection_prng_key` in PEFT.

    Raises:
        ValueError: If a size is not a positive integer, or if the key is not an integer that fits in 64 bits.

    Example:
        >>> frozen = init_projections(4, 8, 6, key=0)
        >>> {name: tuple(tensor.shape) for name, tensor in frozen.items()}
        {'vera_A': (4, 8), 'vera_B': (6, 4)}

    Reference:
        Section 3.2 of https://arxiv.org/abs/2310.11454; He et al., 2015, https://arxiv.org/abs/1502.01852.
    """
    for name, size in (("r", r), ("in_features", in_features), ("out_features", out_features)):
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ValueError(f"{name} must be a positive integer, got {size!r}.")
    if not isinstance(key, int) or isinstance(key, bool):
        raise ValueError(f"key must be an integer seed, got {key!r}.")
    try:
        generator = torch.Generator("cpu").manual_seed(key)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"key must fit in 64 bits, got {key}.") from error
    return {
        "vera_A": _kaiming_uniform((r, in_features), generator),
        "vera_B": _kaiming_uniform((out_features, r), generator),
    }


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    # The last bit of the bound depends on the order of these operations.
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
