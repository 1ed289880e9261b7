"""The order of the examples of a run, as a function of the step, so that a resumed run gets the same batches."""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor


def batch_indices(step: int, *, num_examples: int, batch_size: int, key: int) -> Int[Tensor, " batch"]:
    """Return the indices of the examples in the batch of a step. Every epoch is a new permutation of all examples.

    The indices depend on the arguments only. The last batch of an epoch is smaller if `batch_size` does not divide
    `num_examples`; no example is dropped. Different keys give different orders.

    Raises:
        ValueError: If `num_examples` or `batch_size` is not positive, if `step` is negative, or if an argument is not
            an integer.

    Example:
        >>> [len(batch_indices(step, num_examples=5, batch_size=2, key=0)) for step in range(4)]
        [2, 2, 1, 2]
    """
    if not all(isinstance(number, int) for number in (step, num_examples, batch_size, key)):
        raise ValueError(f"all arguments must be integers, got {step=}, {num_examples=}, {batch_size=}, {key=}.")
    if step < 0 or num_examples < 1 or batch_size < 1:
        raise ValueError(
            f"step must be at least 0, and num_examples and batch_size at least 1, got {step=}, {num_examples=}, "
            f"{batch_size=}."
        )
    epoch, batch = divmod(step, -(-num_examples // batch_size))
    return epoch_order(num_examples, key=key, epoch=epoch)[batch * batch_size : (batch + 1) * batch_size]


def epoch_order(num_examples: int, *, key: int | str, epoch: int) -> Int[Tensor, " num_examples"]:
    """Return the order of the examples in one epoch, a permutation that depends on the arguments only.

    Args:
        num_examples: Number of examples.
        key: Seed of the run; different keys give different orders.
        epoch: Index of the epoch.

    Example:
        >>> sorted(epoch_order(4, key=0, epoch=7).tolist())
        [0, 1, 2, 3]
    """
    # Hashed, because key + epoch would give (key 0, epoch 1) and (key 1, epoch 0) the same order.
    seed = int.from_bytes(hashlib.sha256(f"{key} {epoch}".encode()).digest()[:4], "big")
    return torch.randperm(num_examples, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
