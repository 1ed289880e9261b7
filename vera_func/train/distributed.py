"""Adapter- and data-parallel work under torchrun.

    process_group             joins the process group of torchrun
    map_sharded               shards items across ranks, and all-gathers the results
    mean_over_micro_batches   sum of w_i grad_i / sum of w_i over micro-batches i, by one all-reduce of a float64 buffer

Results do not depend on the number of processes. The items and micro-batches are the same for any number of processes,
and each item or micro-batch is computed by one process alone. Gradients are summed in float64. For float32 gradients
and integer weights, the float64 sum is almost always exact, so it does not depend on the order of summation. Every rank
has a copy of the quantized base. Without torchrun, all functions run in the calling process.

The commands `train` and `evaluate` run under torchrun, on one machine or on several:

    torchrun --nproc-per-node 4 -m vera_func evaluate --bank all.safetensors --data reviews.csv --out table.csv
    torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint host-1:29500 \\
        -m vera_func train --data reviews.csv --out my-adapter --parts 16

`evaluate` shards chunks of `--chunk` adapters across ranks. `train` shards the `--parts` micro-batches of each batch
across ranks, and all-reduces 8 bytes per trained parameter at each step. If `train` has more than `--together` adapters
to train, chunks of `--together` adapters are sharded instead of micro-batches. Only rank 0 writes the results and shows
progress.

To detect failures, all ranks enter torch's `monitored_barrier` after each chunk and before each all-reduce. The barrier
detects a dead rank at once. A rank that hangs or is unreachable is detected after `$VERA_FUNC_TIMEOUT` seconds, by
default 600. No chunk and no step may take longer than `$VERA_FUNC_TIMEOUT`. When the barrier fails, rank 0 names the
missing ranks, and every rank that still runs exits with an error. torchrun terminates the ranks that hang.

If torchrun restarts the processes (`--max-restarts`), or if the same command is run again, training resumes exactly
from the last checkpoint. After replacing a host, run the command again on all hosts. If the host of `--rdzv-endpoint`
becomes unreachable, torchrun on the other hosts exits when Linux drops the connection: after about 16 minutes, or after
2 minutes with `sysctl net.ipv4.tcp_retries2=8`.

In Python:

    with process_group():
        tables = map_sharded(evaluate_group, groups)  # in order, on every rank
        mean = partial(mean_over_micro_batches, weight=num_tokens)
        run = vf.fit(loss, params, lambda step: batch(step).split(2), accumulate=mean, steps=100, learning_rate=1e-2)

To evaluate adapters on a Ray cluster, run `vera-func evaluate --ray ADDRESS`; see `vera_func.cli.on_ray`.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from importlib import import_module
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..private import tree_map
from .optim import Gradient


Item = TypeVar("Item")
Result = TypeVar("Result")

TIMEOUT = 600.0  # seconds that a rank waits for other ranks
_groups = count()  # numbers the groups of this process; the number is a prefix of the group's keys in torchrun's store
_wait = timedelta(seconds=TIMEOUT)  # timeout of the current group


def rank() -> int:
    """The rank of this process; 0 without torchrun."""
    return dist.get_rank() if under_torchrun() else 0


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if under_torchrun() else 1


def under_torchrun() -> bool:
    """Whether a process group (possibly of one process) is initialized."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(timeout: float | None = None) -> Iterator[None]:
    """Create a gloo process group of torchrun's processes for a `with` block; without torchrun, do nothing.

    The backend is gloo even with GPUs, since all buffers are small. Each rank uses the GPU whose index is its local
    rank.

    Args:
        timeout: Seconds that a rank waits for other ranks. None means `$VERA_FUNC_TIMEOUT` if this variable is set,
            else 600.

    Raises:
        ValueError: If the timeout is not a positive, finite number.
        RuntimeError: If another rank dies, does not join, or can't be reached.

    Example:
        >>> with process_group():
        ...     map_sharded(abs, [-1, -2, -3])
        [1, 2, 3]
    """
    seconds = _timeout(timeout)
    if under_torchrun() or not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Imported before the group exists: transformers imports this module, and its default arguments would keep the group
    # and its threads alive after the block. A thread that still has a tensor aborts the process at exit.
    import_module("torch.distributed.nn.functional")

    wait = timedelta(seconds=seconds)
    global _wait
    _wait = wait
    with _explain_errors(f"not all processes have joined after {seconds:g} s"):
        store, me, world = next(dist.rendezvous("env://", timeout=wait))
        # After a restart, torchrun (torch 2.13) reuses its store, which still has the addresses of the previous
        # processes.
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store = dist.PrefixStore(f"vera_func {attempt}/{next(_groups)}", store)
        dist.init_process_group("gloo", store=store, rank=me, world_size=world, timeout=wait)
    try:
        yield
        _barrier()
    finally:
        dist.destroy_process_group()


def map_sharded(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Compute `list(map(function, items))`, with the items sharded across ranks; every rank returns all results.

    Of w ranks, rank k computes items k, k + w, ... Ranks synchronize after every w items, and all-gather the results
    once, at the end. The items must be the same on every rank; load large data in `function`, not in the items. If an
    item is a chunk of adapters, choose a chunk size that does not depend on the number of processes: on some machines,
    rounding depends on the chunk size.

    Args:
        function: Function of one item that returns a picklable object. Tensors in dicts, lists and tuples are moved to
            the CPU.
        items: The items to shard.

    Raises:
        ValueError: If `function` is not callable, or `items` is not iterable.
        RuntimeError: If another rank has died or is unreachable.

    Example:
        >>> from vera_func import fit
        >>> loss_fn = lambda params, batch: params["p"].square().sum()
        >>> train = lambda p: fit(loss_fn, {"p": p}, int, steps=5, learning_rate=0.1, progress=False)
        >>> [run.params["p"].shape for run in map_sharded(train, torch.ones(2, 3))]
        [torch.Size([3]), torch.Size([3])]
    """
    if not callable(function):
        raise ValueError(f"function must be callable, got {type(function).__name__}.")
    if not isinstance(items, Iterable):
        raise ValueError(f"items must be iterable, got {type(items).__name__}.")
    me, world, total, own = rank(), world_size(), 0, []
    for i, item in enumerate(items):
        total = i + 1
        if i % world == me:
            # Cloned, since pickling a view includes its whole storage.
            own.append(tree_map(lambda leaf: leaf.detach().cpu().clone() if _is_tensor(leaf) else leaf, function(item)))
        if i % world == world - 1:
            _barrier()
    gathered: list[Any] = [own]
    if world > 1:
        gathered = [None] * world
        _barrier()
        with _explain_errors("results could not be gathered"):
            dist.all_gather_object(gathered, own)
    return [gathered[i % world][i // world] for i in range(total)]


def mean_over_micro_batches(
    gradient: Callable[[Any], Gradient], parts: Sequence[Any], *, weight: Callable[[Any], float]
) -> Gradient:
    """Compute the weighted mean of the gradients and losses of micro-batches, for `fit(..., accumulate=...)`.

    Micro-batches are sharded across ranks as in `map_sharded`. One buffer is all-reduced, with 8 bytes per trained
    parameter and per loss. Without torchrun, one process accumulates the gradients of all micro-batches.

    Args:
        gradient: Function that maps a micro-batch to `(grads, losses)`, averaged over the micro-batch. Passed by `fit`.
        parts: Micro-batches from `batches(step)`, the same on every rank.
        weight: Function that returns the weight of a micro-batch: the number of terms in the mean loss of the
            micro-batch, such as the number of tokens without padding. Micro-batches of weight 0 are skipped.

    Returns:
        `(grads, losses)`, the same on every rank.

    Raises:
        ValueError: If every micro-batch has weight 0.
        RuntimeError: If another rank has died or is unreachable.

    Example:
        >>> from functools import partial
        >>> from vera_func import fit
        >>> loss_fn = lambda params, x: (params["p"] - x).square().mean()
        >>> run = fit(loss_fn, {"p": torch.zeros(())}, lambda step: torch.arange(5.0).split(2), steps=1,
        ...           learning_rate=0.1, accumulate=partial(mean_over_micro_batches, weight=len), progress=False)
        >>> run.losses
        tensor([6.], dtype=torch.float64)
    """
    nonempty = [micro_batch for micro_batch in parts if weight(micro_batch) > 0]
    if not nonempty:
        raise ValueError(
            f"the mean of {len(parts)} micro-batches is undefined, because none has a positive weight: check that "
            "weight returns a positive number, and that every batch contains targets."
        )
    own = nonempty[rank() :: world_size()]
    total: Any = 0.0
    for micro_batch in own or nonempty[:1]:  # an idle rank computes one micro-batch for its shapes, and adds zeros
        grads, losses = gradient(micro_batch)
        leaves = [leaf.detach().double() for leaf in (*grads.values(), losses)]
        flat = torch.cat([leaf.flatten() for leaf in (*leaves, torch.ones_like(leaves[0].flatten()[:1]))])
        total = total + flat * (float(weight(micro_batch)) if own else 0.0)
    if world_size() > 1:
        buffer = total.cpu()  # gloo reduces on the CPU
        _barrier()
        with _explain_errors("gradients could not be summed"):
            dist.all_reduce(buffer)
        total = buffer.to(total.device)
    sizes = [leaf.numel() for leaf in (*grads.values(), losses)]
    *means, _ = (total / total[-1]).split([*sizes, 1])
    *leaves, mean = (value.view_as(leaf).to(leaf) for value, leaf in zip(means, (*grads.values(), losses), strict=True))
    return dict(zip(grads, leaves, strict=True)), mean


def furthest(value: Any, progress: int) -> Any:
    """Return, on every rank, the `value` of the rank with the largest `progress`.

    For example, `furthest` sends all ranks a checkpoint that is stored on one machine.

    Args:
        value: Value of this rank, a picklable object.
        progress: Progress of this rank, such as its number of steps. Among ranks with equal progress, the lowest rank
            is chosen.

    Example:
        >>> furthest("step 3", 3)
        'step 3'
    """
    world = world_size()
    if world == 1:
        return value
    steps = map_sharded(lambda _: progress, range(world))
    best = max(range(world), key=lambda k: steps[k])
    return map_sharded(lambda k: value if k == best else None, range(world))[best]


def _barrier() -> None:
    """Wait for all ranks; rank 0 raises an error that names the missing ranks."""
    if world_size() > 1:
        with _explain_errors("other ranks are missing"):
            dist.monitored_barrier(timeout=_wait, wait_all_ranks=True)  # by default, ignores the group's timeout


@contextlib.contextmanager
def _explain_errors(what: str) -> Iterator[None]:
    """Re-raise errors of torch.distributed with a message that names this rank and says what failed."""
    try:
        yield
    except RuntimeError as error:
        me = f"rank {os.environ.get('RANK', '0')}"
        said = " ".join(str(error).split())
        raise RuntimeError(
            f"{me}: {what}: {said[:300]} (a process has died, hangs, or is unreachable). Start all processes again."
        ) from error


def _timeout(given: float | None) -> float:
    name = "$VERA_FUNC_TIMEOUT" if given is None else "timeout"
    text = os.environ.get("VERA_FUNC_TIMEOUT", TIMEOUT) if given is None else given
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} must be a positive number of seconds, got {text!r}; the default is {TIMEOUT:g}.")
    return seconds


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
