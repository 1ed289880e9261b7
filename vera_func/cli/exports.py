"""The commands `merge`, `export-lora` and `convert`, as functions that return a report as a dict."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from .groups import format_of
from .inspection import describe_reports
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
) -> dict[str, Any]:
    """Merge one adapter into the base model, and save the merged model and its tokenizer.

    Args:
        source: The adapter.
        base: The base model, in the format in which the adapter was trained.
        to: Format of the merged weights: "nf4", "fp4", "int8", or the name of a dtype.
        out: Folder for the merged model.
        calibrate: Labelled examples for a calibrated merge; None means a merge by rounding. A quarter of `calibrate`
            is held out, to measure how many predictions the merge leaves unchanged.
        prompt: Prompt template for the examples of `calibrate`, which must contain `{text}`. None means the template
            used in training.

    Raises:
        ValueError: If the adapter does not fit the model, if `out` is a file or the folder of an adapter or of the base
            model, or if `calibrate` is given but `to` is not the base model's 4-bit format.
    """
    adapted, _ = load_adapters(source, base.model)
    out = Path(out)
    if out.is_file() or (out / CONFIG).is_file() or (out.is_dir() and out.resolve() == Path(base.name).resolve()):
        raise ValueError(f"--out {out} would overwrite a file, an adapter or the base model: choose another folder.")
    form = format_of(to)
    done: dict[str, Any] = {"out": str(out), "to": to, "model": base.name, "quant": base.quant}
    if calibrate is None:
        merged: Any = merge(base.model, adapted.params, adapted.frozen, form)
        reports = model_merge_report(adapted, form)
        done |= {"advice": merge_advice(reports), "modules": describe_reports(reports)}
    else:
        if to != base.quant or to not in ("nf4", "fp4"):
            repair = f"pass --to {base.quant}" if base.quant in ("nf4", "fp4") else "leave out --calibrate"
            raise ValueError(
                "--calibrate requires a base model in nf4 or fp4, and the same format for --to, got a base model in "
                f"{base.quant} and --to {to}: {repair}."
            )
        task = task_of(source, base, {example.label for example in calibrate}, prompt)
        examples, others = split(calibrate, -(-len(calibrate) // 4), seed=0)
        rows = encode_examples(base, task, examples[:CALIBRATION])
        weights = calibrate_answers(adapted, task, rows, progress=bar("calibrate", True, "step"))
        merged = merge(base.model, adapted.params, adapted.frozen, weights=weights)
        held_out = encode_examples(base, task, others[:CALIBRATION])
        kept = compare_answers(adapted, merged, task, held_out, progress=bar("compare", True))
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
    """Export one adapter as a LoRA, which is exact unless `rank` is lower than the adapter's r.

    Args:
        source: The adapter.
        base: The base model of the adapter, in any quantization format.
        out: The directory or GGUF file to write.
        rank: Rank of the LoRA; None means the adapter's r.
        format: File format: "peft", or "gguf" for llama.cpp.

    Raises:
        ValueError: If the adapter does not fit the model, if `out` is the adapter's directory, or if `export_lora`
            raises a ValueError.
    """
    adapted, _ = load_adapters(source, base.model)
    if source.path is not None and Path(out).resolve() == source.path.resolve():
        raise ValueError(f"--out {out} is the directory of the adapter itself: choose another folder.")
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
        else f"The LoRA omits {percent(mean)} of the update: use a higher rank. Rank {adapted.config.r} is exact.",
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
    """Convert PEFT directories to an adapter bank, or an adapter bank to PEFT directories.

    Args:
        sources: PEFT directories, or one bank. The name of a directory becomes the name of its adapter in the bank.
        out: A new `.safetensors` file for the bank, or the parent folder of the PEFT directories.
        load: Function that takes the `Source` of the first directory and returns the base model.
        names: Names of the adapters in the bank to convert; None means all adapters.
        model: Folder or hub id of the base model; None means the model in the configuration of the first directory.

    Raises:
        ValueError: If `sources` contains a bank and another source, or a bank while `out` is a file. For directories,
            if `out` does not end in `.safetensors`, if `names` is given, or if the adapters can't share a bank (see
            `import_adapters`).
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
            raise ValueError(
                f"got {len(sources)} sources, of which {files[0]} is a bank: pass a bank as the only source."
            )
        if out.is_file():
            raise ValueError(f"--out {out} is a file, but a bank is converted to PEFT directories: pass a folder.")
        source = open_source(bank=files[0], names=names)
        written = export_adapters(open_bank(files[0]), out, source.names)
        places = {name: i for i, name in enumerate(open_bank(files[0]).names)}
        for folder, name in zip(written, source.names, strict=True):
            write_metadata(folder, split_metadata(source.metadata, places[name]))
        return {"out": str(out), "kind": "directories", "names": source.names, "paths": [str(path) for path in written]}
    if names:
        raise ValueError("--name selects adapters of a bank, but the sources are directories: leave out --name.")
    if out.suffix != ".safetensors":
        raise ValueError(
            f"PEFT directories are converted to a bank, but --out {out} does not end in .safetensors: add the suffix."
        )
    if out.exists():
        raise FileExistsError(f"--out {out} already exists: remove {out}, or choose another name.")
    opened = {source: open_source(source, model=model) for source in sources}
    folders = {single.names[0]: source for source, single in opened.items()}
    if len(folders) < len(sources):
        all_names = [opened[source].names[0] for source in sources]
        raise ValueError(f"the directories are named {all_names}, but a bank needs distinct names: rename a directory.")
    first = next(iter(opened.values()))
    bank = import_adapters(out, folders, load(first).model)
    if (metadata := join_metadata([source.metadata for source in opened.values()])) is not None:
        write_metadata(out, metadata)
    return {"out": str(out), "kind": "bank", "names": list(bank.names), "bytes": _size(out)}


def _calibrated_advice(kept: Answers) -> str:
    return (
        f"On {kept.texts} held-out examples, {percent(kept.same)} of the predictions are unchanged. The error of the "
        f"labels' logits is {percent(kept.error, 1)} of the change that the adapter makes."
    )


def _size(file: Path) -> int:
    return file.stat().st_size
