"""Differentially private SGD (DP-SGD) as pure functions of per-example gradients.

    g = (sum_i g_i min(1, C / |g_i|) + sigma C z) / L        z ~ N(0, I),  C = max_norm,  L = batch_size

`private_step` takes the gradients of `per_example_grads` and returns a gradient for any optimizer. A privacy
accountant, for example from opacus, computes the privacy guarantee. The guarantee assumes Poisson sampling: each batch
contains each example independently, with probability `L / num_examples`. `poisson_indices` draws batches by Poisson
sampling:

    from opacus.accountants import RDPAccountant                    # pip install "vera-func[privacy]"
    from opacus.accountants.utils import get_noise_multiplier

    rate = batch_size / num_examples
    sigma = get_noise_multiplier(target_epsilon=8.0, target_delta=1e-5, sample_rate=rate, steps=steps)

    generator, state = torch.Generator().manual_seed(0), adamw_init(params)
    for step in range(steps):
        indices = poisson_indices(step, num_examples=num_examples, batch_size=batch_size, key=0)
        grads = per_example_grads(loss_rows, params, batch_of(indices))
        grad = private_step(grads, 1.0, noise_multiplier=sigma, generator=generator, batch_size=batch_size)
        params, state = adamw_update(grad, state, params, learning_rate=1e-2)

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    epsilon = accountant.get_epsilon(delta=1e-5)

The guarantee covers the params after every step. The guarantee covers neither losses and metrics of training examples
nor hyper-parameters that were chosen from those metrics. Noise and batches come from torch's generators, which are not
cryptographically secure. Keep the seeds of noise and batches secret.
"""

import hashlib
import numbers
from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.shapes import require_positive
from .per_example import per_example_norms, require_finite_rows


def clip_per_example(grads: Mapping[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient of each example by its norm over all leaves: `g_i * min(1, max_norm / |g_i|)`.

    Gradients with a norm of at most `max_norm` do not change, because no epsilon is added to the norm (`clip_by_norm`
    adds 1e-6). 16-bit gradients are returned in float32, because rounding the clipped gradient to 16 bits could
    increase the norm above `max_norm`. If the norm of a gradient is not finite, the clipped gradient contains NaN.

    Args:
        grads: Gradients from `per_example_grads`, as tensors (n, ...).
        max_norm: `C`, the maximum norm, positive.

    Raises:
        ValueError: If `grads` is empty, if its leaves have no common leading axis, or if `max_norm` is not positive.

    Example:
        >>> clip_per_example({"p": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, 1.0)
        {'p': tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])}

    Reference:
        Algorithm 1 of https://arxiv.org/abs/1607.00133.
    """
    require_positive("max_norm", max_norm)
    # Clamped before the division, so that a norm of zero gives a factor of 1 and a finite derivative.
    scale = max_norm / per_example_norms(grads).clamp(min=max_norm)
    clipped = {}
    for key, g in grads.items():
        wide = g.to(torch.promote_types(g.dtype, torch.float32))
        clipped[key] = wide * scale.to(wide.dtype).reshape(-1, *[1] * (g.dim() - 1))
    return clipped


def private_step(
    grads: Mapping[str, Tensor],
    max_norm: float,
    *,
    noise_multiplier: float,
    generator: torch.Generator,
    batch_size: float | None = None,
) -> dict[str, Tensor]:
    """Return the private gradient of a step: the mean of clipped per-example gradients plus noise.

        (sum_i clip(g_i, max_norm) + noise_multiplier * max_norm * z) / batch_size,   z ~ N(0, I)

    Args:
        grads: Gradients from `per_example_grads`, as tensors (n, ...); n may be 0.
        max_norm: `C`, the maximum norm of an example's gradient.
        noise_multiplier: `sigma`, the standard deviation of the noise relative to `max_norm`; an accountant computes
            `sigma` from ε and δ. With 0 there is no noise, and no privacy.
        generator: Generator of the noise. Noise is drawn on the device of the generator, leaf by leaf in the order of
            `grads`.
        batch_size: `L`, the expected number of examples in a batch. Required with Poisson sampling. The default `n`
            (the size of this batch) is private only if all batches have the same size.

    Returns:
        A gradient with the keys and shapes of params, in float32 or wider.

    Raises:
        ValueError: If the gradient of an example is not finite, if `generator` is not a `torch.Generator`, or if
            another argument is out of range.

    Example:
        >>> grads = {"p": torch.tensor([[3.0, 4.0], [0.0, 0.2]])}
        >>> private_step(grads, 1.0, noise_multiplier=0.0, generator=torch.Generator().manual_seed(0))
        {'p': tensor([0.3000, 0.5000])}

    Reference:
        Algorithm 1 of https://arxiv.org/abs/1607.00133.
    """
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator with a secret seed, got {type(generator).__name__}.")
    if not isinstance(noise_multiplier, numbers.Real) or not 0 <= noise_multiplier < float("inf"):
        raise ValueError(f"noise_multiplier must be a finite number, at least 0, got {noise_multiplier!r}.")
    clipped = clip_per_example(grads, max_norm)
    norms = per_example_norms(grads)
    if batch_size is None and len(norms) == 0:
        raise ValueError(
            "batch_size is None and the batch is empty: pass the expected number of examples as batch_size."
        )
    size = float(len(norms)) if batch_size is None else batch_size
    require_positive("batch_size", size)
    require_finite_rows("", norms)
    step = {}
    for key, g in clipped.items():
        noise = torch.randn(g.shape[1:], generator=generator, device=generator.device, dtype=g.dtype).to(g.device)
        step[key] = (g.sum(0) + noise_multiplier * max_norm * noise) / size
    return step


def poisson_indices(step: int, *, num_examples: int, batch_size: float, key: int) -> Int[Tensor, " batch"]:
    """Sample the indices of a batch, each example independently with probability `batch_size / num_examples`.

    The number of indices varies, and may be 0. The indices depend on the arguments only; different keys give different
    batches.

    Args:
        step: Step of training, counted from 0.
        num_examples: Number of examples.
        batch_size: Expected number of indices.
        key: Secret seed of the run: the guarantee assumes that nobody knows which examples are in a batch.

    Raises:
        ValueError: If `batch_size` is not positive or exceeds `num_examples`, or if `step`, `num_examples` or `key` is
            not an integer.

    Example:
        >>> [len(poisson_indices(step, num_examples=100, batch_size=10, key=0)) for step in range(4)]
        [5, 10, 12, 10]

    Reference:
        Section 3.1 of https://arxiv.org/abs/1607.00133, which calls such batches "lots".
    """
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (step, num_examples, key)) or step < 0:
        raise ValueError(
            f"step, num_examples and key must be integers, and step at least 0, got {step=}, {num_examples=}, {key=}."
        )
    require_positive("batch_size", batch_size)
    if batch_size > num_examples:
        raise ValueError(f"batch_size must be at most num_examples, got {batch_size=}, {num_examples=}.")
    seed = int.from_bytes(hashlib.sha256(f"Poisson {key} {step}".encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = torch.rand(num_examples, generator=generator, dtype=torch.float64, device="cpu")
    return (draws < batch_size / num_examples).nonzero().flatten()
