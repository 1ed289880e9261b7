"""Adapter- and data-parallel work under torchrun.

    process_group             joins the process group of torchrun
    map_sharded               shards items across ranks: rank k of w computes items k, k + w, ...; all-gathers results
    mean_over_micro_batches   sum of w_i grad_i / sum of w_i over micro-batches, by one all-reduce of one float64 buffer

Results do not depend on the number of processes. Items and micro-batches are the same for any number of processes, and
each is computed by one process. Gradients are summed in float64. There, a sum of products of float32 values and counts
is nearly always exact, in any order. Collectives fail or give wrong results inside `torch.func` transforms, so they are
called outside, with plain tensors. The quantized base is replicated on every rank. Without torchrun every function runs
in the calling process.

The commands `train` and `evaluate` run under torchrun, on one machine or on several:

    torchrun --nproc-per-node 4 -m vera_func evaluate --bank all.safetensors --data reviews.csv --out table.csv
    torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint host-1:29500 \\
        -m vera_func train --data reviews.csv --out my-adapter --parts 16

Evaluation shards adapters across ranks, in chunks of `--chunk` adapters. Training shards the `--parts` micro-batches of
each batch, and all-reduces 8 bytes per trained parameter at each step. Training on many data sets shards chunks of
`--together` adapters instead, if there is more than one chunk. Only rank 0 writes files and shows progress. Each rank
uses the GPU whose index is its local rank.

Failures are detected by torch. All ranks enter a `monitored_barrier` after each chunk and before each all-reduce. The
barrier detects a dead rank at once. A rank that hangs or can't be reached is detected once the group's timeout has
passed: `$VERA_FUNC_TIMEOUT` seconds, by default 600. The timeout must exceed the duration of a chunk or a step. When
the barrier fails, rank 0 names the missing ranks, every rank exits, and torchrun terminates ranks that do not exit.
With `--max-restarts`, or if the same command is run again, training resumes exactly from the last checkpoint. After a
host is replaced, run the command again on all hosts. If the host of `--rdzv-endpoint` is unreachable, torchrun itself
ends on the other hosts when the kernel gives up the connection: on Linux after about 16 minutes, or 2 minutes with
`sysctl net.ipv4.tcp_retries2=8`.

In Python:

    with process_group():
        tables = map_sharded(evaluate_group, groups)  # in order, on every rank
        mean = partial(mean_over_micro_batches, weight=num_tokens)
        run = vf.fit(loss, params, lambda step: batch(step).split(2), accumulate=mean, steps=100, learning_rate=1e-2)

On a Ray cluster, adapters are evaluated by `vera-func evaluate --ray ADDRESS`; see `vera_func.cli.on_ray`.
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

TIMEOUT = 600.0  # seconds that a rank waits for the others
_groups = count()  # numbers the groups of this process; the number is a prefix of the group's keys in torchrun's store
_wait = timedelta(seconds=TIMEOUT)  # timeout of the current group


def rank() -> int:
    """The rank of this process; 0 without torchrun."""
    return dist.get_rank() if under_torchrun() else 0


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if under_torchrun() else 1


def under_torchrun() -> bool:
    """Whether a process group is initialized, possibly with one process."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(timeout: float | None = None) -> Iterator[None]:
    """Join torchrun's processes in a gloo process group for a `with` block; without torchrun, do nothing.

    Buffers are small, so gloo is also used with GPUs. Each rank uses the GPU whose index is its local rank.

    Args:
        timeout: Seconds that a rank waits for the others; None means `$VERA_FUNC_TIMEOUT`, or 600.

    Raises:
        ValueError: If the timeout is not a positive number.
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
    # transformers imports this module, whose default arguments would keep the group, and its threads, beyond the block;
    # a thread that still has a tensor aborts the process when the interpreter ends.
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
    """`list(map(function, items))` with the items sharded across ranks; every rank returns all results.

    Rank k of w computes items k, k + w, ... Ranks synchronize after each round of items, and the results are
    all-gathered once, at the end. The items must be the same on every rank; load large data in `function`, not in the
    items. Choose items that do not depend on the number of processes, such as chunks of 8 adapters: on some machines
    the size of a batch changes rounding.

    Args:
        function: Function of one item; its result may contain tensors, in dicts and tuples. Tensors are returned on the
            CPU.
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
    """Weighted mean of the gradients and losses of micro-batches, for `fit(..., accumulate=...)`.

    Rank k of w computes micro-batches k, k + w, ... Then one buffer is all-reduced, with 8 bytes per trained parameter
    and per loss. Ranks without a micro-batch are idle. Without torchrun this is gradient accumulation.

    Args:
        gradient: Function of a micro-batch that returns `(grads, losses)`, both of them means over the micro-batch.
            `fit` provides this function.
        parts: The micro-batches that `batches(step)` returned, the same on every rank.
        weight: Function that returns the number of terms in the mean loss of a micro-batch, such as the number of its
            tokens without padding. Micro-batches with weight 0 are skipped.

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
        raise ValueError(f"none of the {len(parts)} micro-batches has a positive weight.")
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
    """Return, on all ranks, the value of the rank with the most progress.

    For example, this sends a checkpoint that only one machine has to all ranks.

    Args:
        value: A value that `map_sharded` can send.
        progress: The progress of this rank. If several ranks have made the most progress, the lowest of these ranks is
            chosen.

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
    """Re-raise errors of torch.distributed with one sentence that names this rank and the operation."""
    try:
        yield
    except RuntimeError as error:
        me = f"rank {os.environ.get('RANK', '0')}"
        said = " ".join(str(error).split())
        raise RuntimeError(f"{me}: {what}: {said[:300]} (a process has died, hangs, or is unreachable).") from error


def _timeout(given: float | None) -> float:
    text = os.environ.get("VERA_FUNC_TIMEOUT", TIMEOUT) if given is None else given
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"the timeout must be a positive number of seconds, got {text!r} ($VERA_FUNC_TIMEOUT).")
    return seconds


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
