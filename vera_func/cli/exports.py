"""Functions that merge or export an adapter, or convert between directories and banks; each returns a dict."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.answers import Answers, calibrate_answers, compare_answers
from ..data.assets import quiet_transformers
from ..data.examples import Example, split
from ..data.metadata import Metadata, join_metadata, split_metadata, write_metadata
from ..data.models import Base
from ..data.sources import Source, load_adapters, open_source, task_of
from ..data.task import encode_examples
from ..io.bank import export_adapters, import_adapters, open_bank
from ..io.config import CONFIG, WEIGHTS
from ..io.files import filling
from ..io.lora import export_lora
from ..io.servers import check_lora, warning_text
from ..merging.model import merge, model_merge_report
from .inspect import describe_reports
from .report import bar, merge_advice, percent


CALIBRATION = 192  # examples, about 6,000 tokens of the demo's reviews; more examples improve the merge little


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
        prompt: Prompt template for the examples of `calibrate`, with the placeholder `{text}`; None means the prompt
            used in training.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the adapter does not fit the model, if `out` contains the base or an adapter, or if calibration
            does not support the format.
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
        load: Function that loads the base model of the directories, given the `Source` of the first directory.
        names: Adapters of the bank to convert; None means all.
        model: Base model of the directories; None means the base model of the first directory.

    Raises:
        ValueError: If the sources are mixed or do not fit together, if two sources have the same name, or if `out` does
            not fit the sources.
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
        raise ValueError("--name selects adapters of a bank, but the sources are directories: list those to convert.")
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


def _calibrated_advice(kept: Answers) -> str:
    return (
        f"On {kept.texts} held-out examples, {percent(kept.same)} of the predictions are unchanged. The merge changes "
        f"the labels' logits by {percent(kept.error, 1)} of the change that the adapter makes."
    )


def _size(file: Path) -> int:
    return file.stat().st_size
