"""Losses and scores of adapters on tokenized rows, for language modelling and preferences.

In language modelling, the loss of an adapter is the mean of -log p(target | previous tokens) over the adapter's
targets. For preferences, the loss of an adapter is the mean DPO loss of the adapter's pairs, with the adapter's beta.
Stacked adapters (n, ...) share a forward pass, in which each row uses one adapter.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.adapt import Adapted
from ..model.batch import Params, select_adapters
from ..model.dora import fold_if_dora
from ..model.head import hidden_and_head
from ..train.checkpointing import checkpointed_loss
from ..train.losses import next_token_loss
from ..train.preferences import dpo_loss
from .batches import Batch, Item, Part, collate_items, evaluation_batches


EVALUATION_TOKENS = 4096  # per forward pass without gradients, including padding


class Scores(NamedTuple):
    """Scores on held-out rows, one value per adapter; `accuracy` and `margin` are for preferences only.

    Attributes:
        loss: Mean loss per target (per pair for preferences).
        accuracy: Fraction of pairs whose chosen answer has the larger DPO reward.
        margin: Mean difference between the DPO rewards of the chosen and the rejected answer.
    """

    loss: Float[Tensor, " n"]
    accuracy: Float[Tensor, " n"] | None = None
    margin: Float[Tensor, " n"] | None = None

    def row(self, i: int) -> dict[str, Any]:
        """The scores of adapter `i` by name; for language modelling, also the perplexity."""
        loss = self.loss[i].item()
        if self.accuracy is None or self.margin is None:
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return {"loss": loss, "accuracy": self.accuracy[i].item(), "margin": self.margin[i].item()}


def sequence_losses(
    adapted: Adapted, params: Params, batch: Batch, *, stacked: bool, width: int = 1
) -> Float[Tensor, " sequences"]:
    """The sum of -log p over the targets of each sequence.

    Args:
        adapted: The adapted model; `adapted.params` are ignored.
        params: Params of one adapter, or stacked params.
        batch: From `collate_items`.
        stacked: Whether params are stacked.
        width: Sequences per row.
    """
    if stacked:
        params = fold_if_dora(adapted.apply, params, adapted.frozen)  # one norm for each adapter, not for each row
        params = select_adapters(params, batch["adapter"].repeat_interleave(width))
    hidden, head = hidden_and_head(adapted.apply, params, adapted.frozen, **_inputs(batch))
    return next_token_loss(hidden, head, batch["labels"]).total


def loss_of_rows(
    adapted: Adapted, num_adapters: int | None = None, *, dropout_seed: int | None = None
) -> Callable[[Params, Batch], Float[Tensor, "*n"]]:
    """Return the loss function `(params, micro-batch) -> loss` for `fit`; the loss of stacked adapters has shape (n,).

    Args:
        adapted: The model.
        num_adapters: `n`, if params are stacked.
        dropout_seed: Seed of the adapters' dropout masks, which change at each step; None means no dropout.
    """

    def loss(params: Params, batch: Batch) -> Tensor:
        model = adapted if dropout_seed is None else with_dropout(adapted, dropout_seed, batch)
        width = len(batch["input_ids"]) // len(batch["adapter"])
        losses = sequence_losses(model, params, batch, stacked=num_adapters is not None, width=width)
        if width == 2:
            losses = _preference(losses, batch)[0]
        losses = losses * batch["weight"]
        if num_adapters is None:
            return losses.sum()
        return losses.new_zeros(num_adapters).index_add(0, batch["adapter"], losses)

    return loss


def checkpointed_rows(adapted: Adapted) -> Callable[[Params, Batch], Float[Tensor, ""]]:
    """`loss_of_rows` for one adapter, with activation checkpointing; computes all logits of a micro-batch at once."""

    def value(module: Any, batch: Batch) -> Tensor:
        logits = module(**_inputs(batch), use_cache=False).logits
        losses = next_token_loss(logits, None, batch["labels"]).total
        if len(losses) == 2 * len(batch["adapter"]):
            losses = _preference(losses, batch)[0]
        return (losses * batch["weight"]).sum()

    return checkpointed_loss(adapted, value)


def with_dropout(adapted: Adapted, seed: int, batch: Batch) -> Adapted:
    """The model with the adapter's dropout; the masks depend only on `seed`, the step and the micro-batch index."""
    device = next(iter(adapted.params.values())).device
    seed = hash((seed, batch["step"], batch["micro_batch"])) % 2**63
    return adapted._replace(apply=adapted.apply.with_dropout(torch.Generator(device).manual_seed(seed)))


@torch.no_grad()
def reference_logprobs(
    adapted: Adapted,
    params: Params,
    part: Part,
    *,
    pad_id: int = 0,
    device: Any = None,
    map: Callable[..., Iterable[Any]] = map,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Float[Tensor, "rows 2"]:
    """Compute the log-probabilities of the chosen and rejected answers of all rows under a DPO reference.

    Args:
        adapted: The model.
        params: Params of the reference. A new adapter, whose update is 0, is equivalent to the base.
        part: The rows; `part.use` is ignored.
        pad_id: Token to pad with.
        device: Device of the model.
        map: Replacement for the built-in `map`; `map_sharded` shards the batches across ranks.
        progress: Progress bar for the batches, such as `tqdm.tqdm`.
    """
    count = len(part.rows.groups)
    groups = evaluation_batches([Item(0, row) for row in range(count)], [part], EVALUATION_TOKENS)

    def logprobs(items: list[Item]) -> Tensor:
        batch = collate_items([part], items, pad_id=pad_id, device=device)
        return -sequence_losses(adapted, params, batch, stacked=False, width=2).reshape(-1, 2)

    found = torch.cat([value.cpu() for value in map(logprobs, progress(groups))])
    order = torch.tensor([item.row for items in groups for item in items])
    return torch.empty_like(found).index_copy(0, order, found)


@torch.no_grad()
def score_rows(
    adapted: Adapted,
    params: Params,
    parts: Sequence[Part],
    *,
    stacked: bool,
    pad_id: int = 0,
    device: Any = None,
    map: Callable[..., Iterable[Any]] = map,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Scores:
    """Evaluate each adapter on its own rows.

    Args:
        adapted: The model.
        params: Params of one adapter, or stacked params.
        parts: The rows of each adapter; only the rows in `Part.use` are evaluated.
        stacked: Whether params are stacked.
        pad_id: Token to pad with.
        device: Device of the model.
        map: Replacement for the built-in `map`; `map_sharded` shards the batches across ranks.
        progress: Progress bar for the batches, such as `tqdm.tqdm`.
    """
    items = [Item(i, row) for i, part in enumerate(parts) for row in part.use.tolist()]
    width = parts[0].rows.width
    params = fold_if_dora(adapted.apply, params, adapted.frozen)  # once for all batches

    def sums(items: list[Item]) -> Tensor:
        batch = collate_items(parts, items, pad_id=pad_id, device=device)
        losses = sequence_losses(adapted, params, batch, stacked=stacked, width=width)
        columns = [losses]
        if width == 2:
            losses, margins = _preference(losses, batch)
            columns = [losses, (margins > 0).to(losses), margins]
        values = torch.stack(columns, 1).double()
        return values.new_zeros(len(parts), len(columns)).index_add(0, batch["adapter"], values)

    batches = evaluation_batches(items, parts, EVALUATION_TOKENS)
    total = sum(value.cpu() for value in map(sums, progress(batches)))
    counts = [sum(part.rows.num_targets(row) for row in part.use.tolist()) for part in parts]
    return Scores(*(total / torch.tensor(counts)[:, None]).unbind(1))


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """The keyword arguments of the model."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def _preference(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """DPO losses and margins of pairs, from the losses of the sequences."""
    (chosen, rejected), (reference_chosen, reference_rejected) = (-losses).reshape(-1, 2).T, batch["reference"].T
    return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, batch["beta"])
