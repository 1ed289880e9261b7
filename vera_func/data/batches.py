"""Batches of tokenized rows for several adapters at once, where each adapter has its own rows.

A batch is a list of micro-batches. A micro-batch is a dict of tensors:

    `input_ids` and `labels` (sequences, seq) are padded on the right, so causal models need no attention mask.
    `attention_mask` and `position_ids` are present only if rows are packed.
    `adapter` (rows,) is the index of each row's adapter.
    `weight` (rows,) multiplies each row's sum of losses.
    `beta` (rows,) is the beta of each pair's DPO loss; present only for preferences.
    `reference` (rows, 2) contains the log-probabilities of chosen and rejected answers under the DPO reference.

The weights are scaled so that an adapter's loss, averaged over the micro-batches, is the adapter's mean loss per
target (for preferences, per pair). The mean loss depends neither on the number of micro-batches nor on the other
adapters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..train.losses import IGNORED
from ..train.order import epoch_order
from .packing import packed_batch
from .tokens import TokenRows


Batch = dict[str, Any]


class Part(NamedTuple):
    """Rows for one adapter.

    Attributes:
        rows: Tokenized rows.
        use: Indices of the rows to use.
        beta: For preferences, the beta of DPO.
        reference: For preferences, log-probabilities of the chosen and rejected answers of all `rows` under the DPO
            reference.
    """

    rows: TokenRows
    use: Int[Tensor, " used"]
    beta: float | None = None
    reference: Float[Tensor, "rows 2"] | None = None


class Item(NamedTuple):
    """A row of a batch: the adapter's index, the row's index in `Part.rows`, and the row's weight."""

    adapter: int
    row: int
    weight: float = 1.0


def batch_order(lengths: Sequence[int], batch_size: int, *, seed: int, window: int = 16) -> Callable[[int], list[int]]:
    """Return a function `step -> row indices` that shuffles each epoch and batches rows of similar length.

    `epoch_order` shuffles the rows of an epoch. The shuffled rows are split into windows of `window` batches, and
    sorted by length within each window. After sorting, the batches of the epoch are shuffled. Without sorting, about a
    third of the tokens would be padding. In each epoch, the rows that remain after the last full batch are dropped.

    Args:
        lengths: Length of each row.
        batch_size: Rows per batch.
        seed: Seed of the order.
        window: Batches per window; with `window=1`, rows are not grouped by length.

    Raises:
        ValueError: If there are fewer rows than `batch_size`.

    Example:
        >>> order = batch_order([3, 1, 2, 9], 2, seed=0)
        >>> sorted(order(0) + order(1))
        [0, 1, 2, 3]
    """
    per_epoch = len(lengths) // batch_size
    if per_epoch == 0:
        raise ValueError(
            f"{len(lengths)} training examples do not fill a batch of {batch_size}: reduce the batch size, or add "
            "examples."
        )
    epochs: dict[int, list[list[int]]] = {}

    def batches_of(epoch: int) -> list[list[int]]:
        order = epoch_order(len(lengths), key=seed, epoch=epoch)[: per_epoch * batch_size].tolist()
        windows = (order[start : start + window * batch_size] for start in range(0, len(order), window * batch_size))
        order = [i for indices in windows for i in sorted(indices, key=lambda i: lengths[i])]
        shuffled = epoch_order(per_epoch, key=f"{seed}, batches", epoch=epoch).tolist()
        return [order[i * batch_size : (i + 1) * batch_size] for i in shuffled]

    def batch(step: int) -> list[int]:
        epoch, position = divmod(step, per_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = batches_of(epoch)
        return epochs[epoch][position]

    return batch


def training_batches(
    parts: Sequence[Part], steps: Sequence[int], batch_size: int, *, seed: int, micro_batches: int, collate: Callable
) -> Callable[[int], list[Batch]]:
    """Return a function `step -> micro-batches`, with `batch_size` rows for each adapter that is still training.

    Args:
        parts: The rows of each adapter. An adapter with fewer rows than `batch_size` uses all its rows in each step.
        steps: Number of steps of each adapter.
        batch_size: Rows per adapter and step.
        seed: Seed of every adapter's row order.
        micro_batches: Number of micro-batches per step.
        collate: Function `(items, scale) -> micro-batch`, such as `partial(collate_items, parts)`.
    """
    orders = []
    for part in parts:
        lengths = part.rows.lengths()[part.use].tolist()
        orders.append(batch_order(lengths, min(batch_size, len(lengths)), seed=seed))

    def batches(step: int) -> list[Batch]:
        items: list[Item] = []
        for adapter, (part, order) in enumerate(zip(parts, orders, strict=True)):
            if step < steps[adapter]:
                rows = part.use[order(step)].tolist()
                weight = 1 / sum(part.rows.num_targets(row) for row in rows)
                items += [Item(adapter, row, weight) for row in rows]
        size = -(-len(items) // micro_batches)
        micro = [items[start : start + size] for start in range(0, len(items), size)]
        return [{**collate(some, len(micro)), "step": step, "micro_batch": i} for i, some in enumerate(micro)]

    return batches


def evaluation_batches(items: Sequence[Item], parts: Sequence[Part], tokens: int) -> list[list[Item]]:
    """Group items of similar length into batches of at most `tokens` tokens, including padding.

    An item of more than `tokens` tokens is a batch by itself.
    """
    length = {id(part.rows): part.rows.lengths() * part.rows.width for part in parts}

    def size(item: Item) -> int:
        return int(length[id(parts[item.adapter].rows)][item.row])

    groups: list[list[Item]] = []
    for item in sorted(items, key=size):
        if groups and size(item) * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def collate_items(
    parts: Sequence[Part],
    items: Sequence[Item],
    scale: float = 1.0,
    *,
    pad_id: int = 0,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """A micro-batch of items.

    Args:
        parts: The rows of each adapter.
        items: The items of the micro-batch, in order.
        scale: Factor that multiplies the weights of the items.
        pad_id: Token to pad with.
        device: Device of all tensors except `labels`, which stay on the CPU.
        dtype: Dtype of the attention mask of packed rows; must be the dtype of the model's activations.
    """
    rows = [parts[item.adapter].rows.row(item.row) for item in items]
    packed = parts[items[0].adapter].rows.packed is not None
    if packed and any(len(row) > 1 for row in rows):
        found = packed_batch(rows, pad_id=pad_id, dtype=dtype)
        batch: Batch = {name: leaf if name == "labels" else leaf.to(device) for name, leaf in found.items()}
    else:
        sequences = [tokens for row in rows for tokens in row]
        longest = max(len(tokens.ids) for tokens in sequences)
        ids = [[*one.ids, *[pad_id] * (longest - len(one.ids))] for one in sequences]
        labels = [[*one.labels, *[IGNORED] * (longest - len(one.ids))] for one in sequences]
        batch = {"input_ids": torch.tensor(ids, device=device), "labels": torch.tensor(labels)}
    batch["adapter"] = torch.tensor([item.adapter for item in items], device=device)
    batch["weight"] = torch.tensor([item.weight * scale for item in items], device=device)
    if parts[items[0].adapter].rows.width == 2:
        references = [(parts[item.adapter].reference, item.row) for item in items]
        if all(reference is not None for reference, _ in references):
            batch["reference"] = torch.stack([ref[row] for ref, row in references if ref is not None]).to(device)
            batch["beta"] = torch.tensor([parts[item.adapter].beta or 0.0 for item in items], device=device)
    return batch
