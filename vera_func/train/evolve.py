"""Training without gradients: evolution strategies over a stack of adapters.

    F[2 j] = fitness(params + sigma e_j),   F[2 j + 1] = fitness(params - sigma e_j),   e_j ~ N(0, I)
    g      = 1 / (n sigma) sum_j (u[2 j] - u[2 j + 1]) e_j,   u = centered ranks of F in [-1/2, 1/2]
    params = params + learning_rate g

A population is a stack of n adapters, whose fitness can be computed in one forward pass (`vmap_adapters`). The fitness
need not be differentiable: it may be an accuracy, or a reward of generated text.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.shapes import require_positive
from ..private import in_transform, tree_flatten
from .distributed import map_sharded
from .gradient import require_shape
from .optim import Optimizer, apply_updates, as_optimizer, require_trainable, wide


class Evolution(NamedTuple):
    """The state of a run of `evolve`.

    Attributes:
        params: Params after the last step.
        state: State of the optimizer, a pytree of tensors; `()` without an optimizer.
        fitness: Fitness of each member of the population at each step, in float64. Member `2 j` is `params` plus
            perturbation `j`, and member `2 j + 1` is `params` minus perturbation `j`.
    """

    params: dict[str, Tensor]
    state: Any
    fitness: Float[Tensor, "steps population"]


def evolve(
    fitness: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    batches: Callable[[int], Any] | None = None,
    *,
    steps: int,
    sigma: float,
    learning_rate: float | None = None,
    seed: int,
    population: int = 256,
    chunk_size: int | None = None,
    optimizer: Optimizer | None = None,
    on_step: Callable[[Evolution], object] | None = None,
    resume: Evolution | None = None,
) -> Evolution:
    """Maximize the fitness of an adapter by evolution strategies, with forward passes only.

    Each step evaluates the fitness of the params plus and minus each perturbation, then adds a weighted sum of the
    perturbations to the params. The weights of the sum depend only on the ranks of the fitness values
    (`centered_ranks`). Perturbations are not stored: each is drawn from its seed twice, for the evaluation and for the
    update. All computations run under `torch.no_grad`, so memory is that of inference with `chunk_size` adapters.
    Quantized layers use their inference kernels (see also `apply.with_fused_weights`).

    Inside `process_group()` under torchrun, `map_sharded` shards chunks across ranks. Only fitness values are
    communicated: every rank draws the same perturbations and computes the same update.

    Args:
        fitness: Function `(stacked)`, or `(stacked, batch)` if `batches` is given. Returns the fitness of each stacked
            adapter, with shape (n,); higher is better. The tensors of `stacked` have shape (n, ...), as for
            `vmap_adapters`.
        params: Initial params, a flat dict of floating-point tensors.
        batches: Function that maps the step, counted from 0, to a batch for all members. The batch must depend on the
            step only.
        steps: Total number of steps, including those of a resumed run.
        sigma: Standard deviation of the perturbations, the same for all leaves.
        learning_rate: Factor that multiplies the estimated gradient; required without an `optimizer`. With an
            `optimizer`, factor that multiplies the optimizer's updates (default 1).
        seed: Seed of the perturbations. Perturbation `j` of a step depends on `seed`, the step and `j` only.
            Perturbations are drawn on the CPU, so they are the same on every device.
        population: Number of members, which must be even.
        chunk_size: Number of members to evaluate at once; None means all.
        optimizer: An `Optimizer` or another pair of pure functions, see `fit`. The optimizer gets the negative of the
            estimated gradient, since optimizers minimize. None means gradient ascent.
        on_step: Function that is called with the `Evolution` after each step, for example to save it.
        resume: State of the run to continue. A resumed run needs the same arguments as the original run; only `steps`
            may be larger.

    Raises:
        ValueError: If a fitness is not finite or does not have shape (n,), if `population` is odd, if `params` are not
            floating-point tensors, if another argument is out of range, or if `evolve` is called inside a transform.

    Example:
        >>> target = torch.tensor([1.0, -1.0, 0.5])
        >>> def fitness(stacked):
        ...     return -(stacked["p"] - target).square().sum(1)
        >>> options = {"steps": 100, "population": 16, "sigma": 0.05, "learning_rate": 0.01}
        >>> run = evolve(fitness, {"p": torch.zeros(3)}, seed=0, **options)
        >>> (run.params["p"] - target).abs().max() < 0.1, run.fitness.shape
        (tensor(True), torch.Size([100, 16]))

    Reference:
        Algorithm 1 of https://arxiv.org/abs/1703.03864, with the paper's antithetic sampling and fitness ranks.
        Deviations from the paper: tied values get their average rank, and there is no weight decay.
    """
    _check_options(fitness, batches, steps, sigma, learning_rate, seed, population, chunk_size, optimizer, on_step)
    require_trainable(params)
    pair = None if optimizer is None else as_optimizer(optimizer)
    run = _initial_run(params, population, pair, resume, steps)
    rate = 1.0 if learning_rate is None else learning_rate
    size = population if chunk_size is None else min(chunk_size, population)
    chunks = [range(start, min(start + size, population)) for start in range(0, population, size)]
    with torch.no_grad():
        for step in range(len(run.fitness), steps):
            draw = partial(_draw, run.params, seed, step)
            batch = () if batches is None else (batches(step),)
            found = torch.cat(map_sharded(partial(_evaluate, fitness, run.params, sigma, draw, batch), chunks))
            _require_finite(found, step)  # after the gather, so that all ranks raise
            direction = _direction(run.params, found, draw, population * sigma)
            new, state = _update(run, direction, rate, pair)
            run = Evolution(new, state, torch.cat([run.fitness, found[None]]))
            if on_step is not None:
                on_step(run)
    return run


def centered_ranks(fitness: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the ranks of the values, scaled to [-1/2, 1/2], in float64.

    The lowest value gets -1/2 and the highest 1/2. Tied values get their average rank.

    Raises:
        ValueError: If `fitness` does not have shape (n,), or n is less than 2.

    Example:
        >>> centered_ranks(torch.tensor([3.0, -1.0, 3.0, 100.0, 0.0]))
        tensor([ 0.1250, -0.5000,  0.1250,  0.5000, -0.2500], dtype=torch.float64)
    """
    if fitness.dim() != 1 or len(fitness) < 2:
        raise ValueError(f"fitness must have shape (n,), with n at least 2, got shape {tuple(fitness.shape)}.")
    _, place, count = fitness.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    ranks = (last - 1 - (count - 1).double() / 2)[place]  # the mean of the first and the last rank of equal values
    return ranks / (len(fitness) - 1) - 0.5


def _evaluate(
    fitness: Callable[..., Tensor],
    params: Mapping[str, Tensor],
    sigma: float,
    draw: Callable[[int], dict[str, Tensor]],
    batch: tuple[Any, ...],
    members: range,
) -> Tensor:
    """The fitness of some members of the population, (n,) float64 on the CPU."""
    stacked = {key: p.expand(len(members), *p.shape).clone() for key, p in params.items()}
    noise: dict[int, dict[str, Tensor]] = {}
    for i, member in enumerate(members):
        pair, sign = member // 2, 1 - 2 * (member % 2)
        if pair not in noise:
            noise = {pair: draw(pair)}
        for key, e in noise[pair].items():
            stacked[key][i] = params[key].to(e.dtype) + sign * sigma * e
    found = fitness(stacked, *batch)
    require_shape("fitness", found, (len(members),))
    if found.is_complex():
        raise ValueError(
            f"fitness must return real numbers, got {found.dtype}: return the real part or absolute value."
        )
    return found.detach().double().cpu()


def _draw(params: Mapping[str, Tensor], seed: int, step: int, pair: int) -> dict[str, Tensor]:
    """Draw the perturbation of a pair of members, leaf by leaf in the order of `params`, in float32 or float64."""
    digest = hashlib.sha256(f"{seed} {step} {pair}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    options: Any = {"generator": generator, "device": "cpu"}
    return {key: torch.randn(p.shape, dtype=wide(p), **options).to(p.device) for key, p in params.items()}


def _direction(
    params: Mapping[str, Tensor], fitness: Tensor, draw: Callable[[int], dict[str, Tensor]], scale: float
) -> dict[str, Tensor]:
    """Estimate the gradient of the fitness, summed in float64."""
    ranks = centered_ranks(fitness)
    weights = ((ranks[::2] - ranks[1::2]) / scale).tolist()
    total = {key: torch.zeros_like(p, dtype=torch.float64) for key, p in params.items()}
    for pair, weight in enumerate(weights):
        if weight:  # the weight is 0 if both members have the same fitness
            for key, e in draw(pair).items():
                total[key] += weight * e.double()
    return {key: value.to(wide(params[key])) for key, value in total.items()}


def _update(
    run: Evolution, direction: dict[str, Tensor], rate: float, optimizer: Optimizer | None
) -> tuple[dict[str, Tensor], Any]:
    if optimizer is None:
        return apply_updates(run.params, direction, rate), ()
    updates, state = optimizer.update({key: -g for key, g in direction.items()}, run.state, run.params)
    return apply_updates(run.params, updates, rate), state


def _initial_run(
    params: Mapping[str, Tensor], population: int, optimizer: Optimizer | None, resume: Evolution | None, steps: int
) -> Evolution:
    start = {key: p.detach() for key, p in params.items()}
    state = () if optimizer is None else optimizer.init(start)
    run = Evolution(start, state, torch.zeros(0, population, dtype=torch.float64, device="cpu"))
    if resume is None:
        return run
    if not isinstance(resume, Evolution):
        raise ValueError(f"resume must be an Evolution returned by evolve, got {type(resume).__name__}.")
    found, expected = ([_signature(part) for part in each[:2]] for each in (resume, run))
    if found != expected or resume.fitness.shape[1:] != (population,):
        raise ValueError(
            "resume is a run with other params, another optimizer or another population: pass the arguments of that "
            "run."
        )
    if len(resume.fitness) > steps:
        done = len(resume.fitness)
        raise ValueError(f"steps must be at least {done} (the run has completed {done} steps), got {steps}.")
    return resume


def _signature(tree: Any) -> tuple[Any, list[Any]]:
    leaves, structure = tree_flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _require_finite(found: Tensor, step: int) -> None:
    if len(wrong := (~found.isfinite()).nonzero().flatten().tolist()):
        raise ValueError(
            f"the fitness of {len(wrong)} of {len(found)} members is not finite at step {step} (first: member "
            f"{wrong[0]}): use a smaller sigma or learning_rate, or return a low finite fitness for such members."
        )


def _check_options(
    fitness: Any,
    batches: Any,
    steps: Any,
    sigma: Any,
    learning_rate: Any,
    seed: Any,
    population: Any,
    chunk_size: Any,
    optimizer: Any,
    on_step: Any,
) -> None:
    if in_transform():
        raise ValueError(
            "evolve was called inside a torch.func transform, but runs under no_grad: call it outside of transforms."
        )
    if not callable(fitness):
        raise ValueError(f"fitness must be a function of stacked params, got {type(fitness).__name__}.")
    if batches is not None and not callable(batches):
        raise ValueError(f"batches must be a function of the step, got {type(batches).__name__}.")
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step must be a function of the state, got {type(on_step).__name__}.")
    if not isinstance(population, int) or population < 2 or population % 2:
        raise ValueError(
            f"population must be an even number, at least 2, got {population!r}: members are pairs of opposite "
            "perturbations."
        )
    numbers = {"steps": (steps, 0), "chunk_size": (population if chunk_size is None else chunk_size, 1)}
    for name, (value, least) in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed must be an integer, got {seed!r}.")
    if learning_rate is None and optimizer is None:
        raise ValueError("evolve needs a learning_rate or an optimizer, got neither: pass learning_rate, such as 1e-2.")
    for name, value in (("sigma", sigma), ("learning_rate", 1.0 if learning_rate is None else learning_rate)):
        require_positive(name, value)
