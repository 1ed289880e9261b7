"""Train adapters on texts, completions, chats or preferences: one adapter for each data set and each beta.

A run checks all rows before it loads the model. Up to `--together` adapters train at once, each on batches of its own
data set. An interrupted run resumes from the checkpoint `OUT.training-<hash>`, which is deleted on success.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.batches import Part, collate_items, training_batches
from ...data.dataset import DataSet, open_dataset
from ...data.metadata import Metadata
from ...data.models import Base, load_base
from ...data.objective import Scores, checkpointed_rows, loss_of_rows, reference_logprobs, score_rows
from ...data.packing import is_packable
from ...data.sources import base_of, open_source
from ...data.tokens import Side, TokenRows, tokenize
from ...io.checkpoint import load_adapter
from ...model.adapt import Adapted
from ...model.batch import Params, stack_adapters
from ...train.distributed import map_sharded
from ..evaluation import BETA, MAX_LENGTH, length_of
from ..report import bar
from .jobs import Job, make_jobs
from .loop import Trained, for_training, train_chunks, train_together
from .outputs import BANK, checkpoint_path, delete_checkpoints, new_adapter, output_folder, save_adapters
from .settings import Recipe, Run


def train_language(
    sources: Sequence[str],
    run: Run,
    *,
    betas: Sequence[float] | None = None,
    reference: str | None = None,
    truncate_side: Side = "end",
    packing: bool = True,
) -> dict[str, Any]:
    """Train adapters on data sets without labels, and measure the held-out loss before and after training.

    Args:
        sources: Paths or hub ids of the data sets (see `open_dataset`); all data sets must be of one kind.
        run: Options of the run. If `run.max_length` is None, the maximum length is 512 tokens or the model's maximum
            number of positions, whichever is smaller.
        betas: For preferences, the values of DPO's beta; None means 0.1. One adapter is trained for each pair of a data
            set and a beta.
        reference: For preferences, PEFT directory of the adapter that is the reference and from which training starts.
            By default, the base model is the reference, and training starts from a new adapter.
        truncate_side: The side on which sequences above the maximum length are truncated: "end" or "start".
        packing: Whether several texts share a training row, without attention between different texts.

    Returns:
        A dict of measurements. If there are several adapters, the entry `adapters` contains one dict per adapter.

    Raises:
        ValueError: If an option or a row is invalid.
        OSError: If a file or the model is not found, or if the machine is offline (ConnectionError).
    """
    recipe, out = run.recipe, output_folder(run.out)
    initial = None if reference is None else open_source(reference, model=run.model)
    sets = [open_dataset(source) for source in sources]
    kind = _same_kind(sets)
    _require_applicable(kind, run, betas, reference)
    load = partial(load_base, run.model) if initial is None else partial(base_of, initial)
    base = load(run.quant, run.dtype, max_tokens=run.max_length or MAX_LENGTH, device=run.device)
    max_length = length_of(base, run.max_length)
    adapted = _initial_adapter(base, reference, run)
    packing = packing and kind == "text" and _is_packable(base, adapted, max_length)
    rows = [tokenize(data, base.tokenizer, max_length=max_length, side=truncate_side) for data in sets]
    references = _references(base, adapted, rows)
    pack_to = max_length if packing and kind == "text" else None
    jobs = make_jobs(sets, rows, references, run, betas=betas or (BETA,), pack_to=pack_to)
    if recipe.checkpointing and (len(jobs) > 1 or recipe.dropout):
        raise ValueError(
            "--checkpointing supports one adapter without dropout: to save memory, increase --accumulate instead."
        )
    jobs_of_run = [(job.name, job.steps, job.learning_rate, job.train.beta) for job in jobs]
    options = (recipe._replace(log=None), jobs_of_run, run.together)
    state = (base.name, base.quant, base.dtype, adapted.config, reference, max_length, truncate_side, packing)
    tensors = [(one.ids, one.labels, one.offsets, one.groups) for one in rows]
    checkpoint = checkpoint_path(out, *state, *options, [_hash(*one) for one in (*tensors, adapted.params.values())])
    before = _score(base, adapted, adapted.params, jobs, "before", stacked=False)
    start = time.perf_counter()

    def train(part: slice, file: Path, shared: bool) -> Trained:
        return _train_group(base, adapted, jobs[part], recipe, file, shared=shared)

    trained = train_chunks(len(jobs), run.together, checkpoint, train, base.model.device)
    seconds = time.perf_counter() - start
    after = _score(base, adapted, trained.params, jobs, "after", stacked=len(jobs) > 1)
    metadata = _metadata(base, sets, jobs)._replace(
        max_length=max_length, truncate_side=truncate_side, reference=_absolute(reference)
    )
    map_sharded(
        partial(save_adapters, out, adapted, trained.params, [job.name for job in jobs]), [metadata]
    )  # on rank 0
    delete_checkpoints(checkpoint)
    table = [_row(job, sets, trained, before, after, i) for i, job in enumerate(jobs)]
    omitted = sum(one.omitted for one in rows) or None
    size = sum(leaf.numel() for leaf in adapted.params.values())
    common = {"kind": kind, "omitted": omitted, "trained": size, "seconds": seconds, "out": str(out)}
    return common | ({"bank": str(out / BANK), "adapters": table} if len(jobs) > 1 else table[0])


def _require_applicable(kind: str, run: Run, betas: Sequence[float] | None, reference: str | None) -> None:
    """Raise if `--beta` or `--reference` does not apply to the data or to the other options."""
    if kind != "preference" and (betas or reference):
        raise ValueError(
            f"got data of the kind {kind!r}, but --beta and --reference require preferences (columns prompt, chosen "
            "and rejected): leave out --beta and --reference."
        )
    if reference and (run.recipe.dropout or run.recipe.dora or run.targets):
        raise ValueError(
            "--reference determines the target layers, dropout and DVoRA: leave out --targets, --dropout and --dora."
        )


def _is_packable(base: Base, adapted: Adapted, max_length: int) -> bool:
    """Whether the model can mask attention between packed documents; warn if the model can't."""

    def logits(**inputs: Tensor) -> Tensor:
        return adapted.apply(adapted.params, adapted.frozen, **inputs).logits

    config: Any = base.model.config
    text = config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    window = min((window for window in windows if window), default=None)
    if is_packable(logits, max_length, window=window, dtype=base.dtype, device=base.model.device):
        return True
    why = "has recurrent layers, or accepts no mask between documents"
    if window is not None and window < max_length:
        why = f"attends to {window} tokens only, fewer than --max-length"
    warnings.warn(f"the model {why}: documents are not packed into rows.", stacklevel=2)
    return False


def _initial_adapter(base: Base, reference: str | None, run: Run) -> Adapted:
    """The adapter from which training starts: the reference, or a new adapter."""
    if reference is not None:
        return load_adapter(reference, base.model, product_dtype=base.product_dtype)
    return new_adapter(base, run.r, run.targets, run.recipe)


def _same_kind(sets: Sequence[DataSet]) -> str:
    for data in sets:
        if data.kind != "text" and len(data.rows) < 2:
            raise ValueError(
                f"{data.source} has one row, but needs at least two, because one row is held out: add rows."
            )
        if data.kind != sets[0].kind:
            raise ValueError(
                f"all data sets of a run must be of one kind, got {sets[0].source} of the kind {sets[0].kind!r} and "
                f"{data.source} of the kind {data.kind!r}: use one run for each kind."
            )
    return sets[0].kind


def _metadata(base: Base, sets: Sequence[DataSet], jobs: Sequence[Job]) -> Metadata:
    kind = sets[0].kind
    betas = [job.train.beta or BETA for job in jobs] if kind == "preference" else None
    return Metadata(base.quant, kind=kind, data=[sets[job.data].source for job in jobs], beta=betas)


def _absolute(reference: str | None) -> str | None:
    """Make the path of a folder absolute; a hub id is unchanged."""
    return str(Path(reference).resolve()) if reference is not None and Path(reference).exists() else reference


def _references(base: Base, adapted: Adapted, rows: Sequence[TokenRows]) -> list[Tensor | None]:
    """For each set of preferences, the log-probabilities of all rows under the adapter before training; else None."""
    if rows[0].width == 1:
        return [None] * len(rows)
    return [
        reference_logprobs(
            adapted, adapted.params, Part(one, torch.arange(len(one.groups))), pad_id=base.pad_id,
            device=base.model.device, map=map_sharded, progress=bar("reference", True),
        )
        for one in rows
    ]  # fmt: skip


def _score(base: Base, adapted: Adapted, params: Params, jobs: Sequence[Job], title: str, *, stacked: bool) -> Scores:
    return score_rows(
        adapted, params, [job.held_out for job in jobs], stacked=stacked, pad_id=base.pad_id,
        device=base.model.device, map=map_sharded, progress=bar(title, True),
    )  # fmt: skip


def _train_group(
    base: Base, adapted: Adapted, jobs: Sequence[Job], recipe: Recipe, file: Path, *, shared: bool
) -> Trained:
    n, kept = len(jobs), for_training(adapted)
    pad_id, device = base.pad_id, base.model.device
    parts, held_out = [job.train for job in jobs], [job.held_out for job in jobs]
    batches = training_batches(
        parts, [job.steps for job in jobs], recipe.batch_size, seed=recipe.seed, micro_batches=recipe.micro_batches,
        collate=partial(collate_items, parts, dtype=base.dtype, pad_id=pad_id, device=device),
    )  # fmt: skip
    mapping: Callable[..., Any] = map_sharded if shared else map

    def metric(params: Params) -> Tensor:
        return score_rows(kept, params, held_out, stacked=n > 1, pad_id=pad_id, device=device, map=mapping).loss

    if recipe.checkpointing:
        loss = checkpointed_rows(adapted)
    else:
        loss = loss_of_rows(kept, n if n > 1 else None, dropout_seed=recipe.seed if recipe.dropout else None)
    return train_together(
        loss,
        stack_adapters([adapted.params] * n) if n > 1 else adapted.params,
        batches,
        recipe,
        steps=[job.steps for job in jobs],
        learning_rates=[job.learning_rate for job in jobs],
        evaluate=metric,
        checkpoint=file,
        shared=shared,
    )


def _row(job: Job, sets: Sequence[DataSet], trained: Trained, before: Scores, after: Scores, i: int) -> dict[str, Any]:
    return {
        "name": job.name,
        "data": sets[job.data].source,
        **({} if job.train.beta is None else {"beta": job.train.beta}),
        "learning_rate": job.learning_rate,
        "rows": job.num_rows,
        "held_out": len(job.held_out.use),
        "steps": trained.steps[i],
        "loss_before": before.row(i)["loss"],  # without the accuracy: all margins are 0 except for rounding
        **after.row(i),
        "diverged": trained.diverged[i],
    }


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
