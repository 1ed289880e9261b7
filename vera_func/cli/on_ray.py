"""Evaluate large banks on a Ray cluster (`pip install "vera-func[ray]"`).

There is one actor per GPU, or one actor per node in a cluster without GPUs. Each actor starts when its GPU or its CPUs
are free, and loads the base model once. Groups of adapters are sharded across the actors. Each group consists of whole
chunks, so the results do not depend on the number of actors. If an actor or its node dies, Ray restarts the actor, and
only the group in progress is evaluated again.

This package must be installed on every node. The adapters, the data and the base model must have the same paths on
every node; the data and the base model may also be hub ids. Relative paths are resolved in the working directory of the
calling process.

In Python:

    source = open_source(bank="all.safetensors")
    rows = evaluate_on_ray(source, partial(base_of, source), "reviews.csv", address="auto")
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from ..data.models import Base
from ..data.sources import Source
from ..train.distributed import world_size
from .evaluation import evaluate
from .report import bar


RETRIES = 3  # how many times a group is computed again after its actor has died
GROUPS = 4  # groups per actor on average; a faster actor computes more groups


def evaluate_on_ray(
    source: Source,
    load: Callable[[], Base],
    data: str | None,
    *,
    address: str,
    prompt: str | None = None,
    limit: int | None = None,
    chunk: int = 8,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate adapters on a Ray cluster; return the same rows as `vera-func evaluate`.

    Args:
        source: From `open_source`.
        load: Function that returns the base model; each actor calls this function once.
        data: Data of any kind that `vera-func train` accepts; None means the demo's held-out reviews.
        address: Address for `ray.init`: "auto", "host:port", "ray://host:port", or "local" for a new cluster on this
            machine. If Ray is already initialized, `address` is ignored.
        prompt, limit, chunk, batch_size: Options of `vera-func evaluate`.
        progress: Whether to show a progress bar.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
        ConnectionError: If no cluster answers at the address.
        RuntimeError: If the cluster has neither a GPU nor a CPU, or if actors die 4 times while they evaluate the same
            group of adapters.
        ValueError: If the process runs under torchrun. An exception that an actor raises is raised unchanged.
    """
    if world_size() > 1:
        raise ValueError(
            "got --ray under torchrun, but Ray shards the adapters itself: run the command without torchrun."
        )
    with _connected(address) as ray:
        count, resources = _actors(ray.nodes())
        size = chunk * max(1, -(-len(source.names) // chunk) // (GROUPS * count))
        groups = [source.names[start : start + size] for start in range(0, len(source.names), size)]
        actor = ray.remote(Evaluator).options(
            max_restarts=-1, max_task_retries=RETRIES, scheduling_strategy="SPREAD", **resources
        )
        options = {"prompt": prompt, "limit": limit, "chunk": chunk, "batch_size": batch_size}
        work = (os.getcwd(), source, load, data, options)
        pool = ray.util.ActorPool([actor.remote(*work) for _ in range(min(count, len(groups)))])
        for group in groups:
            pool.submit(lambda actor, names: actor.rows.remote(names), group)
        found: dict[str, dict[str, Any]] = {}
        try:
            for _ in bar(f"{len(source.names)} adapters on Ray", progress, "group")(groups):
                found |= {row["name"]: row for row in pool.get_next_unordered()}
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            said = str(error).strip().partition("\n")[0]
            raise RuntimeError(f"the evaluation on Ray failed: {said}") from error
    return [found[name] for name in source.names]


class Evaluator:
    """A Ray actor that loads the base model and evaluates groups of adapters, with `folder` as working directory."""

    def __init__(
        self, folder: str, source: Source, load: Callable[[], Base], data: str | None, options: dict[str, Any]
    ) -> None:
        # The base model is loaded in the first call of `rows`, because Ray hides exceptions from a constructor.
        self.folder, self.source, self.load, self.data, self.options = folder, source, cache(load), data, options

    def rows(self, names: list[str]) -> list[dict[str, Any]]:
        """Evaluate the adapters with these names."""
        os.chdir(self.folder)
        source = self.source._replace(names=names)
        return evaluate(source, self.load, self.data, progress=False, **self.options)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Yield the package `ray`, connected to a cluster."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        # ray.init would retry for several minutes.
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}. Check the address.") from error
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def _actors(nodes: list[dict[str, Any]]) -> tuple[int, dict[str, float]]:
    """The number of actors for a cluster of `nodes`, and the resources of each actor.

    Example:
        >>> _actors([{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 8.0}}])
        (2, {'num_cpus': 4.0})
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(each.get("GPU", 0) for each in resources))
    if gpus:
        return gpus, {"num_gpus": 1}
    cpus = [each["CPU"] for each in resources if each.get("CPU")]
    if not cpus:
        raise RuntimeError("the Ray cluster has no node with a CPU or a GPU: add a node, or pass another address.")
    return len(cpus), {"num_cpus": min(cpus)}
