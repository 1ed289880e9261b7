"""Adapter- and data-parallel work under torchrun, with failure detection.

    process_group             joins the processes of torchrun
    map_sharded               shards items across ranks: rank k of w computes items k, k + w, ...; all get all results
    mean_over_micro_batches   sum of w_i grad_i / sum of w_i over micro-batches, by one all-reduce of one float64 buffer

Items and micro-batches do not depend on the number of processes, so neither does any result: an item is computed from
beginning to end by one process, and the float64 sum of a few products of a float32 and a count is nearly always exact,
in any order. Collectives get plain tensors and stay outside of `torch.func`'s transforms, where they raise or are
wrong. The quantized base is replicated. Without torchrun every function does its work alone.

The commands `train` and `evaluate` run under torchrun, on one machine or on several:

    torchrun --nproc-per-node 4 -m vera_func evaluate --bank all.safetensors --data reviews.csv --out table.csv
    torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint host-1:29500 \\
        -m vera_func train --data reviews.csv --out my-adapter --parts 16

Evaluation shards adapters across ranks in chunks (`--chunk`); the only communication is one final all-gather. Training
shards the `--parts` micro-batches of each batch and all-reduces 8 bytes per trained parameter at each step. Only rank 0
writes files and shows progress. When a process dies or can't be reached, the others exit within about half a minute and
name it; `--max-restarts`, or the same command given again, resumes from the last checkpoint.

In Python:

    with process_group():
        tables = map_sharded(evaluate_group, groups)  # in order, on every rank
        mean = partial(mean_over_micro_batches, weight=num_tokens)
        run = vf.fit(loss, params, lambda step: batch(step).split(2), accumulate=mean, steps=100, learning_rate=1e-2)

On a Ray cluster (`pip install "vera-func[ray]"`) an actor holds the base, and adapters are the data:

    import numpy as np
    import ray

    from vera_func import open_bank
    from vera_func.cli.commands import evaluate
    from vera_func.data.examples import read_examples
    from vera_func.data.sources import base_of, open_source

    class Evaluate:
        def __init__(self, bank, data):
            self.source, self.examples = open_source(bank=bank), read_examples(data)
            self.base = base_of(self.source)

        def __call__(self, batch):
            source = self.source._replace(names=[str(name) for name in batch["name"]])
            rows = evaluate(source, self.base, self.examples, progress=False)
            return {key: np.array([row[key] for row in rows]) for key in rows[0]}

    def evaluate_bank(bank, data, actors=1):
        names = ray.data.from_items([{"name": name} for name in open_bank(bank).names])
        pool = ray.data.ActorPoolStrategy(size=actors)
        return names.map_batches(Evaluate, fn_constructor_args=(bank, data), batch_size=8, compute=pool).take_all()
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..private import tree_map
from .optim import Gradient


Item = TypeVar("Item")
Result = TypeVar("Result")

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one that are a death
ARRIVAL = 300.0  # seconds for all processes to start
_watched = threading.Event()


def rank() -> int:
    """Which process this is, from 0; 0 alone."""
    return dist.get_rank() if under_torchrun() else 0


def world_size() -> int:
    """How many processes there are; 1 alone."""
    return dist.get_world_size() if under_torchrun() else 1


def under_torchrun() -> bool:
    """Whether there is a process group, be it of one process."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes of `torchrun` for a while: gloo on CPUs, NCCL on GPUs. Does nothing without `torchrun`.

    When a process dies, stops, or can't be reached any more, each of the others ends with status 1 and one sentence
    that says which, some 30 seconds later at most. An error in one of them ends the others, too. `torchrun
    --max-restarts` then starts all of them again.

    Raises:
        RuntimeError: If not all processes arrive within 5 minutes.

    Example:
        >>> with process_group():
        ...     map_sharded(abs, [-1, -2, -3])
        [1, 2, 3]
    """
    if under_torchrun() or not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    url, wait = "env://", timedelta(seconds=ARRIVAL)
    store, me, world = next(dist.rendezvous(url, timeout=wait))
    store = _meet(store, me, world)
    stop, signs = threading.Event(), dist.PrefixStore("signs", store.clone())
    signs.set(f"alive/{me}", f"{_title(me)} 0")
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # No collective has a time limit: one process may be done with its adapters hours before another. The watch has.
    with _alarm(ARRIVAL, f"not all {world} processes have arrived after {ARRIVAL:.0f} s."):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=me,
            world_size=world,
            timeout=timedelta(days=30),
        )
    watch = threading.Thread(target=_watch, args=(signs, me, world, stop), daemon=True)
    if world > 1:
        watch.start()
        _watched.set()
    try:
        yield
        with _together():
            dist.barrier()
    except BaseException as error:
        stop.set()
        if world > 1:
            watch.join(BEAT)
            signs.set("dead", f"{_title(me)} failed: {type(error).__name__}: {error}")
            time.sleep(2 * BEAT)  # for the others to read it, before torchrun closes the store
        raise
    finally:
        stop.set()
        _watched.clear()
    if world > 1:
        watch.join()
    dist.destroy_process_group()


def map_sharded(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`list(map(function, items))`, each item computed by one process; every process gets all results.

    Process k of w takes items k, k + w, ...; nothing is sent before the end. The items must be the same everywhere and
    may be lazy: what is read for an item is read in `function`. Make them independent of the number of processes, such
    as groups of 8 adapters: many at once are faster, and on some machines the size of a batch shows in the last bits.

    Args:
        function: An item to a result: values, tensors, dicts and tuples of them. Tensors come back on the CPU.
        items: What to deal.

    Raises:
        ValueError: If the function can't be called, or the items not be gone through.

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
            # Cloned: a view would be sent with all of the memory that it is a part of.
            own.append(tree_map(lambda leaf: leaf.detach().cpu().clone() if _is_tensor(leaf) else leaf, function(item)))
    gathered: list[Any] = [own]
    if world > 1:
        gathered = [None] * world
        with _together():
            dist.all_gather_object(gathered, own)
    return [gathered[i % world][i // world] for i in range(total)]


def mean_over_micro_batches(
    gradient: Callable[[Any], Gradient], parts: Sequence[Any], *, weight: Callable[[Any], float]
) -> Gradient:
    """The gradient and the loss of a batch from those of its parts, for `fit(..., accumulate=...)`.

    Each process computes every world-th part; then one buffer of 8 bytes for each trained number and each loss is
    summed over all. Alone it is gradient accumulation. More processes than parts have nothing to do.

    Args:
        gradient: A part to `(grads, losses)`, means over the part. `fit` gives it.
        parts: What `batches(step)` returned, the same in every process.
        weight: A part to the number of what its loss is a mean of, such as tokens that are no padding. Parts of
            weight 0 are left out.

    Returns:
        `(grads, losses)`, the same in every process.

    Raises:
        ValueError: If there is no part with a weight.

    Example:
        >>> from functools import partial
        >>> from vera_func import fit
        >>> loss_fn = lambda params, x: (params["p"] - x).square().mean()
        >>> run = fit(loss_fn, {"p": torch.zeros(())}, lambda step: torch.arange(5.0).split(2), steps=1,
        ...           learning_rate=0.1, accumulate=partial(mean_over_micro_batches, weight=len), progress=False)
        >>> run.losses
        tensor([6.], dtype=torch.float64)
    """
    real = [part for part in parts if weight(part) > 0]
    if not real:
        raise ValueError(f"none of the {len(parts)} parts of the batch has a weight: there is nothing to average.")
    own = real[rank() :: world_size()]
    total: Any = 0.0
    for part in own or real[:1]:  # whoever has no part adds zeros of the right shapes
        grads, losses = gradient(part)
        leaves = [leaf.detach().double() for leaf in (*grads.values(), losses)]
        flat = torch.cat([leaf.flatten() for leaf in (*leaves, torch.ones_like(leaves[0].flatten()[:1]))])
        total = total + flat * (float(weight(part)) if own else 0.0)
    if world_size() > 1:
        with _together():
            dist.all_reduce(total)
    sizes = [leaf.numel() for leaf in (*grads.values(), losses)]
    *means, _ = (total / total[-1]).split([*sizes, 1])
    *leaves, mean = (value.view_as(leaf).to(leaf) for value, leaf in zip(means, (*grads.values(), losses), strict=True))
    return dict(zip(grads, leaves, strict=True)), mean


def furthest(value: Any, progress: int) -> Any:
    """The value of the process that is furthest, for all: a checkpoint that only one machine has.

    Args:
        value: As `map_sharded` sends it.
        progress: How far it is; of equal ones the first is taken.

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


def _meet(store: Any, me: int, world: int) -> Any:
    """A store for these processes alone. torchrun gives every attempt the same one, full of what the dead left in it.

    Each process asks under a name that is new, and the first one answers with the name of the new store.
    """
    name = secrets.token_hex(8)
    if me > 0:
        store.set(f"hello/{me}", name)
        new = store.get(f"welcome/{name}").decode()
        store.set(f"{new}/here/{me}", "")
        return dist.PrefixStore(new, store)
    missing = set(range(1, world))
    with _alarm(ARRIVAL, f"not all {world} processes have arrived after {ARRIVAL:.0f} s."):
        while missing:
            for other in sorted(missing):
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
            missing = {other for other in missing if not store.check([f"{name}/here/{other}"])}
            time.sleep(0.02)
    new_store = dist.PrefixStore(name, store)
    dist.PrefixStore("signs", new_store).set("dead", "")
    return new_store


def _watch(store: Any, me: int, world: int, stop: threading.Event) -> None:
    """Says that this process lives, and looks at the next one only: three requests a beat, however many there are."""
    following, seen, since = (me + 1) % world, b"", time.monotonic()
    host = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    lost = f"{_title(me)} has lost the store at {host}: the machine of rank 0, its torchrun, or the network is gone."
    for beat in count():
        try:
            with _alarm(SILENCE, lost, _end_with_torchrun):
                store.set(f"alive/{me}", f"{_title(me)} {beat}")
                told, sign = store.get("dead"), store.get(f"alive/{following}")
        except RuntimeError:
            if not stop.is_set():
                _end_with_torchrun(lost)
        if stop.is_set():
            return
        if sign != seen:
            seen, since = sign, time.monotonic()
        elif time.monotonic() - since > SILENCE and not told:
            title = sign.decode().rpartition(" ")[0]
            told = f"{title} has given no sign of life for {SILENCE:.0f} s.".encode()
            store.set("dead", told)
        if told:
            _end(told.decode())
        if stop.wait(BEAT):
            return


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around a collective. When it fails, another process is gone; the watch soon knows which and ends this one."""
    try:
        yield
    except RuntimeError:
        if _watched.is_set():
            time.sleep(SILENCE + 5 * BEAT)
        raise


@contextlib.contextmanager
def _alarm(seconds: float, message: str, end: Callable[[str], None] | None = None) -> Iterator[None]:
    """Ends the process if what is inside takes longer: a wait for a network can't be interrupted otherwise."""
    timer = threading.Timer(seconds, end or _end, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _title(me: int) -> str:
    return f"rank {me} (process {os.getpid()} on {socket.gethostname()})"


def _end_with_torchrun(message: str) -> None:
    # torchrun, too, waits for a store that is gone, for minutes and without looking at its processes. One that has
    # ended and was not looked at is a zombie, which `kill -0` still finds.
    command = f"sleep {SILENCE / 3:.0f}; kill -0 $0 && kill $1 && sleep 5 && kill -0 $0 && kill -9 $1"
    words = ["sh", "-c", command, str(os.getpid()), str(os.getppid())]
    subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    _end(message)


def _end(message: str) -> None:
    print(f"vera-func: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
