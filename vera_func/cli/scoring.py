"""Evaluate adapters on texts, completions, chats and preferences."""

from typing import Any

import torch

from ..data.batches import Part
from ..data.dataset import DataSet
from ..data.models import Base
from ..data.objective import reference_logprobs, score_rows
from ..data.sources import Source, load_adapters, unadapted
from ..data.tokens import tokenize
from ..io.bank import open_bank
from ..io.checkpoint import load_adapter
from ..train.distributed import map_sharded
from .report import adapters_title, bar


MAX_LENGTH = 512  # the default
BETA = 0.1  # the default for preferences, as in TRL


def evaluate_language(
    source: Source,
    base: Base,
    data: DataSet,
    *,
    limit: int | None = None,
    chunk: int = 8,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure the loss and perplexity of each adapter; for preferences, the loss, reward accuracy and reward margin.

    Sequences are truncated as in training, and rewards are relative to the reference used in training.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        data: From `open_dataset`.
        limit: Number of rows to use; None means all rows.
        chunk: Number of adapters per forward pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the adapters or the reference do not fit the model.
        FileNotFoundError: If the reference is not found.
    """
    side: Any = source.metadata.truncate_side or "end"
    rows = tokenize(data, base.tokenizer, max_length=length_of(base, source.metadata.max_length), side=side)
    use = torch.arange(len(rows.groups))[:limit]
    adapted, read = load_adapters(source, base.model, base.product_dtype)
    device, reference = base.model.device, None
    if rows.width == 2:
        if source.metadata.reference:
            initial = load_adapter(source.metadata.reference, base.model, product_dtype=base.product_dtype)
        else:
            initial = unadapted(base.model)
        reference = reference_logprobs(
            initial, initial.params, Part(rows, use), pad_id=base.pad_id, device=device, map=map_sharded,
            progress=bar("reference", progress),
        )  # fmt: skip
    found = []
    for start in range(0, len(source.names), chunk):
        names = source.names[start : start + chunk]
        parts = [Part(rows, use, _beta(source, name), reference) for name in names]
        scores = score_rows(
            adapted, read(names), parts, stacked=True, pad_id=base.pad_id, device=device, map=map_sharded,
            progress=bar(adapters_title(start, names, source.names), progress),
        )  # fmt: skip
        found += [{"name": name, **scores.row(i), "rows": len(use)} for i, name in enumerate(names)]
    return found


def length_of(base: Base, given: int | None) -> int:
    """The maximum number of tokens: `given`; if None, the smaller of `MAX_LENGTH` and the model's maximum.

    Raises:
        ValueError: If `given` exceeds the number of positions of the model.
    """
    most = getattr(base.model.config, "max_position_embeddings", None) or given or MAX_LENGTH
    if given is not None and given > most:
        raise ValueError(
            f"got --max-length {given}, but {base.name} has {most} positions: pass --max-length {most} or less."
        )
    return min(given or MAX_LENGTH, most)


def _beta(source: Source, name: str) -> float:
    """DPO's beta of an adapter, from the metadata; 0.1 if the metadata has no beta."""
    if source.path is None:
        return BETA
    betas = source.metadata.beta or [BETA]
    if len(betas) == 1 or source.path.is_dir():
        return betas[0]
    return dict(zip(open_bank(source.path).names, betas, strict=False)).get(name, BETA)
