"""The commands as functions that return rows and dicts."""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.answers import Answers, calibrate_answers, compare_answers
from ..data.assets import quiet_transformers
from ..data.examples import Example, split
from ..data.metadata import Metadata, join_metadata, split_metadata, write_metadata
from ..data.models import Base
from ..data.prompts import Encoded, Score, batches_by_length, collate
from ..data.sources import Source, by_labels, load_adapters, open_source, task_of
from ..data.task import encode_examples, logits_of, score_of
from ..data.tokens import chat_prompt
from ..io.bank import export_adapters, import_adapters, open_bank
from ..io.config import CONFIG, WEIGHTS
from ..io.files import filling
from ..io.lora import export_lora
from ..io.servers import check_lora, warning_text
from ..merging.model import merge, model_merge_report
from ..model.batch import select_adapters
from ..train.distributed import map_sharded, rank, world_size
from .inspect import describe_reports
from .report import bar, merge_advice, percent


CALIBRATION = 192  # examples, about 6,000 tokens of the demo's reviews; more examples improve the merge little


def evaluate(
    source: Source,
    base: Base,
    examples: Sequence[Example],
    *,
    prompt: str | None = None,
    chunk: int = 8,
    batch_size: int = 32,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Accuracy and mean loss of each adapter on the same examples, one row per adapter.

    Under torchrun, adapters are sharded across ranks in chunks, and each rank reads its own adapters only. If there are
    fewer chunks than ranks, batches are sharded instead. Every rank returns all rows, which do not depend on the number
    of ranks.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        examples: Labelled examples.
        prompt: Prompt template with `{text}`; None means the prompt used in training.
        chunk: Adapters per forward pass, which has `chunk * batch_size` rows.
        batch_size: Examples per forward pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the adapters do not fit the model, or an example has a label that they were not trained on.
    """
    options: dict[str, Any] = {"prompt": prompt, "chunk": chunk, "batch_size": batch_size, "progress": progress}
    return [row for part in by_labels(source) for row in _evaluate(part, base, examples, **options)]


def _evaluate(
    source: Source,
    base: Base,
    examples: Sequence[Example],
    *,
    prompt: str | None,
    chunk: int,
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """`evaluate` for adapters with the same labels."""
    task = task_of(source, base, {example.label for example in examples}, prompt)
    rows = encode_examples(base, task, examples)
    starts = range(0, len(source.names), chunk)
    by_chunk = len(starts) >= world_size()
    own = starts[rank()] if by_chunk else 0
    adapted, read = load_adapters(
        source._replace(names=source.names[own : own + chunk]), base.model, base.product_dtype
    )

    def evaluate_chunk(start: int) -> Score:
        names = source.names[start : start + chunk]
        params = read(names) if len(names) > 1 else {k: v[0] for k, v in read(names).items()}
        title = f"adapters {start + 1}-{start + len(names)} of {len(source.names)}"
        options: dict[str, Any] = {"batch_size": batch_size, "progress": bar(title, progress)}
        return score_of(adapted, task, params, rows, map=map if by_chunk else map_sharded, **options)

    scores = map_sharded(evaluate_chunk, starts) if by_chunk else [evaluate_chunk(start) for start in starts]
    accuracy, loss = (torch.cat([value.reshape(-1) for value in column]) for column in zip(*scores, strict=True))
    return [
        {"name": name, "accuracy": right.item(), "loss": mean.item(), "texts": len(rows)}
        for name, right, mean in zip(source.names, accuracy, loss, strict=True)
    ]


def predict(
    source: Source,
    base: Base,
    texts: Sequence[str],
    *,
    labels: Sequence[str] = (),
    prompt: str | None = None,
    chunk: int = 8,
    batch_size: int = 32,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Predicted label and its probability for each pair of adapter and text, one row per pair.

    The prediction is the argmax over the labels' first tokens.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        texts: Texts to classify.
        labels: Labels to use if the adapters' metadata has none.
        prompt: Prompt template with `{text}`; None means the prompt used in training.
        chunk: Adapters per forward pass.
        batch_size: Texts per forward pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If `texts` is empty or has an empty text, the labels are unknown, or the adapters do not fit the
            model.
    """
    _check_texts("text", texts)
    options: dict[str, Any] = {"labels": labels, "prompt": prompt, "chunk": chunk, "batch_size": batch_size}
    return [row for part in by_labels(source) for row in _predict(part, base, texts, progress=progress, **options)]


def _predict(
    source: Source,
    base: Base,
    texts: Sequence[str],
    *,
    labels: Sequence[str],
    prompt: str | None,
    chunk: int,
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """`predict` for adapters with the same labels."""
    task = task_of(source, base, labels, prompt)
    rows = encode_examples(base, task, [Example(text, task.labels[0], text) for text in texts])
    batches = batches_by_length(rows, batch_size, task.pad_id)
    position = torch.cat([batch["row"] for batch in batches]).argsort()  # restores the order of texts
    adapted, read = load_adapters(source, base.model, base.product_dtype)
    found = []
    for start in range(0, len(source.names), chunk):
        names = source.names[start : start + chunk]
        logits = partial(logits_of(adapted, task, stacked=True), read(names))
        title = f"adapters {start + 1}-{start + len(names)} of {len(source.names)}"
        with torch.no_grad():
            outputs = [logits(batch) for batch in bar(title, progress)(batches)]
        best, label = torch.cat(outputs, dim=1)[:, position].double().softmax(-1).max(-1)  # (adapters, texts)
        found += [
            {"text": text, "adapter": name, "label": task.labels[label[i, j]], "probability": best[i, j].item()}
            for i, name in enumerate(names)
            for j, text in enumerate(texts)
        ]
    return found


def generate(
    source: Source,
    base: Base,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Continue prompts, with one adapter for all prompts or one per prompt; return one row per prompt.

    Args:
        source: From `open_source`, with one name or as many as there are prompts.
        base: From `base_of`.
        prompts: Texts to continue.
        chat: Whether a prompt is a message of the user, which the tokenizer's chat template turns into a prompt.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 means greedy decoding.
        seed: Seed for sampling.
        batch_size: Prompts per forward pass.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `prompts` is empty or has an empty prompt, or the numbers of adapters and prompts differ.
    """
    _check_texts("prompt", prompts)
    names = source.names * len(prompts) if len(source.names) == 1 else source.names
    if len(names) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts need one adapter, or one for each, got {len(names)}: give one --name, or repeat "
            f"--name in the order of the prompts, such as --name {names[0]}."
        )
    adapted, read = load_adapters(source, base.model)
    pad_id, eos_id = base.tokenizer.pad_token_id, base.tokenizer.eos_token_id
    pad_id = next((token for token in (pad_id, eos_id) if token is not None), 0)
    ids = (
        [chat_prompt(base.tokenizer, prompt) for prompt in prompts] if chat else base.tokenizer(list(prompts)).input_ids
    )
    encoded = [Encoded(one, 0) for one in ids]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_id, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    texts: list[str] = []
    with quiet_transformers(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in bar("generate", progress)(range(0, len(prompts), batch_size)):
            rows = slice(start, start + batch_size)
            unique = list(dict.fromkeys(names[rows]))
            params = select_adapters(read(unique), [unique.index(name) for name in names[rows]])
            batch = collate(encoded[rows], pad_id)
            inputs = {name: batch[name].to(base.model.device) for name in ("input_ids", "attention_mask")}
            out = adapted.apply.generate(params, adapted.frozen, **inputs, **options)
            new = out[:, inputs["input_ids"].shape[1] :]
            texts += base.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [
        {"prompt": prompt, "adapter": name, "text": text}
        for prompt, name, text in zip(prompts, names, texts, strict=True)
    ]


def merge_to(
    source: Source,
    base: Base,
    to: str,
    out: str | os.PathLike[str],
    *,
    calibrate: Sequence[Example] | None = None,
    prompt: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Merge one adapter into the base, save the model and tokenizer, and report the retained fraction of the update.

    Args:
        source: From `open_source`, with one adapter.
        base: From `base_of`, in the format on which the adapter was trained.
        to: "nf4", "fp4", "int8", or the name of a dtype.
        out: The folder to write.
        calibrate: Examples for a calibrated merge. A quarter of them is held out to measure how many predictions the
            merge preserves. None means a merge by rounding.
        prompt: Prompt template with `{text}` for these examples; None means the prompt used in training.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the adapter does not fit the model, `out` contains the base or an adapter, or calibration does
            not support the format.
    """
    adapted, _ = load_adapters(source, base.model)
    out = Path(out)
    if out.is_file() or (out / CONFIG).is_file() or (out.is_dir() and out.resolve() == Path(base.name).resolve()):
        raise ValueError(f"--out {out} is a file, the base model or an adapter: choose another folder.")
    form = getattr(torch, to) if to in ("float32", "bfloat16", "float16") else to
    done: dict[str, Any] = {"out": str(out), "to": to, "model": base.name, "quant": base.quant}
    if calibrate is None:
        merged: Any = merge(base.model, adapted.params, adapted.frozen, form)
        reports = model_merge_report(adapted, form)
        done |= {"advice": merge_advice(reports), "modules": describe_reports(reports)}
    else:
        if to != base.quant or to not in ("nf4", "fp4"):
            repair = f"pass --to {base.quant}" if base.quant in ("nf4", "fp4") else "leave out --calibrate"
            raise ValueError(
                f"--calibrate requires the same 4-bit format before and after, got {base.quant} and {to}: {repair}."
            )
        task = task_of(source, base, {example.label for example in calibrate}, prompt)
        examples, others = split(calibrate, -(-len(calibrate) // 4), seed=0)
        rows = encode_examples(base, task, examples[:CALIBRATION])
        show = bar("calibrate", progress, "step")
        weights = calibrate_answers(base.model, adapted, task, rows, progress=show)
        merged = merge(base.model, adapted.params, adapted.frozen, weights=weights)
        held_out = encode_examples(base, task, others[:CALIBRATION])
        kept = compare_answers(adapted, merged, task, held_out, progress=bar("compare", progress))
        done |= {"calibrated_on": len(rows), "advice": _calibrated_advice(kept), "answers": kept._asdict()}
    with quiet_transformers(), filling(out) as folder:
        merged.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        if source.metadata != Metadata():
            # The metadata of a merged model: the adapter's prompt, and "none" so that dense weights stay dense.
            write_metadata(folder, source.metadata._replace(quant=None if isinstance(form, str) else "none"))
    return done


def lora_of(
    source: Source, base: Base, out: str | os.PathLike[str], rank: int | None = None, format: str = "peft"
) -> dict[str, Any]:
    """Export one adapter as a LoRA; the export is exact unless the rank is lower than r.

    Args:
        source: From `open_source`, with one adapter.
        base: A model of the same architecture, in any format.
        out: The directory or GGUF file to write.
        rank: Rank of the LoRA; None means the adapter's r.
        format: "peft" or "gguf".

    Raises:
        ValueError: If the adapter does not fit the model, or `out` is the adapter's directory.
    """
    adapted, _ = load_adapters(source, base.model)
    if source.path is not None and Path(out).resolve() == source.path.resolve():
        raise ValueError(f"--out {out} is the adapter itself: choose another folder.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # reported below
        path, error = export_lora(out, *adapted[1:], base.model, rank=rank, format=format)
    mean = sum(error.values()) / len(error)
    return {
        "out": str(path),
        "rank": rank or adapted.config.r,
        "modules": len(error),
        "largest_error": max(error.values()),
        "mean_error": mean,
        "advice": None
        if mean < 0.1
        else f"The LoRA omits {percent(mean)} of the update: use a higher rank; rank r is exact.",
        "servers": warning_text(check_lora(path)) if format == "peft" else None,
        "bytes": _size(path / WEIGHTS if format == "peft" else path),
    }


def convert(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    load: Callable[[Source], Base],
    *,
    names: Sequence[str] | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Convert PEFT directories to an adapter bank, or a bank to PEFT directories, depending on the sources.

    Args:
        sources: PEFT directories, whose names become the adapter names, or one bank.
        out: A new `.safetensors` file, or a folder in which a sub-folder per adapter is created.
        load: Loads the base model of the directories, given the first one.
        names: Adapters of the bank to convert; None means all.
        model: Base model of the directories; None means that of the first one.

    Raises:
        ValueError: If the sources are mixed or do not fit together, two have the same name, or `out` does not fit the
            sources.
        FileExistsError: If the bank already exists.
        FileNotFoundError: If a source does not exist.
    """
    out = Path(out)
    for source_path in sources:
        if not Path(source_path).exists():
            raise FileNotFoundError(f"{source_path} does not exist.")
    files = [source for source in sources if Path(source).is_file()]
    if files:
        if len(sources) > 1:
            raise ValueError(f"{files[0]} is a bank: convert one bank at a time, or directories only.")
        if out.is_file():
            raise ValueError(f"--out {out} is a file: a bank is converted to a folder of PEFT directories.")
        source = open_source(bank=files[0], names=names)
        written = export_adapters(open_bank(files[0]), out, source.names)
        places = {name: i for i, name in enumerate(open_bank(files[0]).names)}
        for folder, name in zip(written, source.names, strict=True):
            write_metadata(folder, split_metadata(source.metadata, places[name]))
        return {"out": str(out), "kind": "directories", "names": source.names, "paths": [str(path) for path in written]}
    if names:
        raise ValueError(
            "--name selects adapters of a bank, but the sources are directories: list the ones to convert."
        )
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors: PEFT directories are converted to a bank.")
    if out.exists():
        raise FileExistsError(f"--out {out} exists: remove it or choose another name.")
    opened = {source: open_source(source, model=model) for source in sources}
    folders = {single.names[0]: source for source, single in opened.items()}
    if len(folders) < len(sources):
        raise ValueError(f"adapters of a bank need distinct names, but the directories' names are {sorted(folders)}.")
    first = next(iter(opened.values()))
    bank = import_adapters(out, folders, load(first).model)
    if (metadata := join_metadata([source.metadata for source in opened.values()])) is not None:
        write_metadata(out, metadata)
    return {"out": str(out), "kind": "bank", "names": list(bank.names), "bytes": _size(out)}


def _check_texts(kind: str, texts: Sequence[str]) -> None:
    if not texts:
        raise ValueError(f"expected at least one {kind}, got none.")
    for i, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"{kind} {i} of {len(texts)} is empty: remove it.")


def _calibrated_advice(kept: Answers) -> str:
    return (
        f"On {kept.texts} held-out examples, {percent(kept.same)} of the predictions are unchanged. The merge changes "
        f"the labels' logits by {percent(kept.error, 1)} of the change that the adapter makes."
    )


def _size(file: Path) -> int:
    return file.stat().st_size
