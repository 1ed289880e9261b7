"""The work of the commands, as functions of plain values that return plain values: rows and dicts of numbers and texts.

What an adapter was trained over is read from its files where the command line does not say it: the model from
PEFT's configuration, its format from the note that `vera-func` puts beside it.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .answers import Answers, calibrate_answers, compare_answers
from .assets import quiet_transformers
from .bank import export_adapters, import_adapters, open_bank
from .checkpoint import CONFIG, WEIGHTS, load_adapter, read_files
from .config import VeraConfig, linear_sizes, resolve
from .distributed import rank, spread, world_size
from .examples import Example, split
from .export import describe_reports, export_lora, merge, merge_advice, merge_reports
from .many import select_adapters, stack_adapters
from .model import Adapted, adapt
from .pretrained import Base, Note, describe_base, load_base, read_note, write_note
from .report import bar
from .sentiment import PROMPT, Encoded, Score, collate
from .task import Task, encode_examples, make_task, score_of


CALIBRATION = 192  # texts, some 6,000 tokens of the demo's: more is hardly better


class Source(NamedTuple):
    """Where adapters come from, as files: a PEFT directory, some of a bank, or nothing (the base alone).

    Attributes:
        path: The directory or the file; None is the base alone.
        names: Of the adapters.
        config: Their configuration; None for the base alone.
        note: What they were trained on.
    """

    path: Path | None
    names: list[str]
    config: VeraConfig | None
    note: Note


def open_source(
    adapter: str | None = None, bank: str | None = None, names: Sequence[str] | None = None, *, one: bool = False
) -> Source:
    """Check an adapter directory or a bank, before a model is loaded.

    Args:
        adapter: A PEFT directory.
        bank: A file.
        names: Of adapters in the bank; None is all.
        one: Whether it has to be a single adapter.

    Raises:
        ValueError: If both are given, names without a bank, an unknown name, not one adapter where it has to be, or the
            files are not what they should be.
        FileNotFoundError: If there is no such thing.
    """
    if adapter is not None and bank is not None:
        raise ValueError("give either --adapter or --bank, not both.")
    if names and bank is None:
        raise ValueError("--name is the name of an adapter in a bank: pass --bank, too.")
    if bank is not None:
        if Path(bank).is_dir():
            raise ValueError(f"{bank} is a folder; a bank is a file, and a PEFT directory goes with --adapter.")
        opened = open_bank(bank)
        names = list(names or opened.names)
        for name in names:
            opened.row(name)  # an unknown name raises
        if one and len(names) != 1:
            some = ", ".join([*names[:3], *["..."] * (len(names) > 3)])
            raise ValueError(f"{bank} holds {len(names)} adapters: choose one with --name ({some}).")
        return Source(Path(bank), names, opened.config, read_note(bank))
    if adapter is None and one:
        raise ValueError("which adapter? Pass --adapter DIR, or --bank FILE with --name.")
    if adapter is None:
        return Source(None, ["base"], None, Note())
    config, _ = read_files(_adapter_directory(Path(adapter)))
    return Source(Path(adapter), [Path(adapter).resolve().name], config, read_note(adapter))


def base_of(
    source: Source, model: str | None = None, quant: str | None = None, dtype: torch.dtype | None = None
) -> Base:
    """The model that adapters were trained over, unless something else is asked for.

    Raises:
        ValueError: If the files do not name a model, and `model` is None; or as for `load_base`.
        OSError: If the model is not there.
    """
    if model is None and source.config is not None:
        model = source.config.base_model_name_or_path
        if not model:
            raise ValueError(f"{source.path} does not say which model it adapts: pass --model.")
    note = read_note(model) if source.path is None and model is not None else source.note
    return load_base(model, quant or note.quant, dtype)


def load_adapters(source: Source, model: nn.Module) -> tuple[Adapted, Callable[[Sequence[str]], dict[str, Tensor]]]:
    """An `Adapted` with the params of the first adapter, and `names -> stacked params`, read when asked for.

    Raises:
        ValueError: If the adapters do not fit the model.
    """
    if source.path is None:
        # An adapter that adds nothing is the base.
        adapted = adapt(model, VeraConfig(r=1, target_modules="all-linear"))
        return adapted, lambda names: stack_adapters([adapted.params] * len(names))
    if source.path.is_dir():
        adapted = load_adapter(source.path, model)
        return adapted, lambda names: stack_adapters([adapted.params] * len(names))
    bank = open_bank(source.path)
    adapted = bank.adapted(model, source.names[:1])
    adapted = adapted._replace(params={key: leaf[0] for key, leaf in adapted.params.items()})
    device = next(model.parameters()).device
    return adapted, lambda names: {key: leaf.to(device) for key, leaf in bank.read(names).items()}


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
    """Accuracy and mean loss of every adapter on the same texts, a row for each.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        examples: Texts and labels.
        prompt: With `{text}` in it; None is what the adapters were trained with.
        chunk: Adapters in a forward: it has `chunk` times `batch_size` rows.
        batch_size: Texts in a forward.
        progress: Shows progress bars.

    Under `torchrun` each process evaluates every world-th chunk, and reads these adapters only; or every world-th
    batch, where there are fewer chunks than processes. All of them get all rows, the same whatever their number is.

    Raises:
        ValueError: If the adapters do not fit the model, or a label was not trained.
    """
    task = _task_of(source, base, examples, prompt)
    rows = encode_examples(base, task, examples)
    starts = range(0, len(source.names), chunk)
    by_chunk = len(starts) >= world_size()
    own = starts[rank()] if by_chunk else 0
    adapted, read = load_adapters(source._replace(names=source.names[own : own + chunk]), base.model)

    def evaluate_chunk(start: int) -> Score:
        names = source.names[start : start + chunk]
        params = read(names) if len(names) > 1 else {k: v[0] for k, v in read(names).items()}
        title = f"adapters {start + 1}-{start + len(names)} of {len(source.names)}"
        options: dict[str, Any] = {"batch_size": batch_size, "progress": bar(title, progress)}
        return score_of(adapted, task, params, rows, map=map if by_chunk else spread, **options)

    scores = spread(evaluate_chunk, starts) if by_chunk else [evaluate_chunk(start) for start in starts]
    accuracy, loss = (torch.cat([value.reshape(-1) for value in column]) for column in zip(*scores, strict=True))
    return [
        {"name": name, "accuracy": right.item(), "loss": mean.item(), "texts": len(rows)}
        for name, right, mean in zip(source.names, accuracy, loss, strict=True)
    ]


def generate(
    source: Source,
    base: Base,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """What the model says after each prompt, with one adapter for all or one for each, a row for each prompt.

    Args:
        source: From `open_source`, with one name or as many as there are prompts.
        base: From `base_of`.
        prompts: Texts to continue.
        max_new_tokens: Most tokens to generate.
        temperature: 0 takes the likeliest token; else tokens are drawn.
        seed: Of the draws.
        batch_size: Prompts at once.
        progress: Shows a progress bar.

    Raises:
        ValueError: If there is no prompt, an empty one, or the names do not match the prompts.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("there is nothing to continue: give at least one prompt, and no empty one.")
    names = source.names * len(prompts) if len(source.names) == 1 else source.names
    if len(names) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts need one adapter, or one for each, got {len(names)}: repeat --name, in the order "
            f"of the prompts; the first of them is {names[0]!r}."
        )
    adapted, read = load_adapters(source, base.model)
    pad_id, eos_id = base.tokenizer.pad_token_id, base.tokenizer.eos_token_id
    pad_id = next((token for token in (pad_id, eos_id) if token is not None), 0)
    encoded = [Encoded(ids, 0) for ids in base.tokenizer(list(prompts)).input_ids]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_id, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    texts: list[str] = []
    with quiet_transformers(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in bar("generate", progress)(range(0, len(prompts), batch_size)):
            part = slice(start, start + batch_size)
            unique = list(dict.fromkeys(names[part]))
            params = select_adapters(read(unique), [unique.index(name) for name in names[part]])
            batch = collate(encoded[part], pad_id)
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
    """Write a plain model with one adapter in its weights, with its tokenizer, and say what was lost.

    Args:
        source: From `open_source`, of one adapter.
        base: From `base_of`, in the format that the adapter was trained over.
        to: "nf4", "fp4", "int8", or the name of a dtype.
        out: The folder.
        calibrate: Labelled texts to choose 4-bit weights by, so that the answers stay; a quarter of them is kept to
            judge by. None rounds.
        prompt: With `{text}` in it, for these; None is what the adapter was trained with.
        progress: Shows a progress bar.

    Raises:
        ValueError: If the adapter does not fit, `out` holds the base or an adapter, or one can't calibrate so.
    """
    adapted, _ = load_adapters(source, base.model)
    out = Path(out)
    if out.is_file() or (out / CONFIG).is_file() or (out.is_dir() and out.resolve() == Path(base.name).resolve()):
        raise ValueError(f"--out {out} is in use: give a folder for the merged model alone.")
    form = getattr(torch, to) if to in ("float32", "bfloat16", "float16") else to
    done: dict[str, Any] = {"out": str(out), "to": to, "model": base.name, "quant": base.quant}
    if calibrate is None:
        merged: Any = merge(base.model, adapted.params, adapted.frozen, form)
        reports = merge_reports(base.model, adapted.params, adapted.frozen, form)
        done |= {"advice": merge_advice(reports), "modules": describe_reports(reports)}
    else:
        if to != base.quant or to not in ("nf4", "fp4"):
            raise ValueError(f"calibration keeps the base's 4-bit format, and this base is {base.quant}: not for {to}.")
        task = _task_of(source, base, calibrate, prompt)
        examples, others = split(calibrate, -(-len(calibrate) // 4), seed=0)
        rows = encode_examples(base, task, examples[:CALIBRATION])
        show = bar("calibrate", progress, "step")
        weights = calibrate_answers(base.model, adapted, task, rows, progress=show)
        merged = merge(base.model, adapted.params, adapted.frozen, weights=weights)
        rows_kept = encode_examples(base, task, others[:CALIBRATION])
        kept = compare_answers(adapted, merged, task, rows_kept, progress=bar("compare", progress))
        done |= {"calibrated_on": len(rows), "advice": _calibrated_advice(kept), "answers": kept._asdict()}
    with quiet_transformers():
        merged.save_pretrained(out)
        base.tokenizer.save_pretrained(out)
    if source.note != Note():
        # A merged model is asked as its adapter was, and 16 bits are not quantized again.
        write_note(out, source.note._replace(quant=None if isinstance(form, str) else "none"))
    return done


def lora_of(source: Source, base: Base, out: str | os.PathLike[str], rank: int | None = None) -> dict[str, Any]:
    """Write one adapter as a PEFT LoRA directory; exact, unless the rank is less than r.

    Args:
        source: From `open_source`, of one adapter.
        base: Of the same architecture, in any format.
        out: The directory.
        rank: None is the adapter's r.

    Raises:
        ValueError: If the adapter does not fit, or `out` is the adapter's own directory.
    """
    adapted, _ = load_adapters(source, base.model)
    if source.path is not None and Path(out).resolve() == source.path.resolve():
        raise ValueError(f"--out {out} is the adapter itself: give another folder.")
    path, error = export_lora(out, *adapted[1:], base.model, rank=rank)
    mean = sum(error.values()) / len(error)
    return {
        "out": str(path),
        "rank": rank or adapted.config.r,
        "modules": len(error),
        "largest_error": max(error.values()),
        "mean_error": mean,
        "advice": None if mean < 0.1 else f"It leaves out {mean:.0%} of the update: use a higher rank, or r itself.",
        "bytes": _size(path / WEIGHTS),
    }


def convert(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    model: str | None = None,
    quant: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """PEFT directories to a bank, or a bank to PEFT directories, by what the sources are.

    Args:
        sources: Directories, whose own names become those in the bank; or one bank.
        out: A file that is not there yet, ending in .safetensors; or a folder, for a sub-folder for each adapter.
        names: Which adapters of a bank; None is all.
        model: The base of the directories; None is what the first one names.
        quant: Its format; None is what the first one was trained over.
        dtype: Of its arithmetic.

    Raises:
        ValueError: If the sources are mixed or do not fit together, two have one name, or `out` is the wrong kind.
        FileExistsError: If the bank is there already.
        FileNotFoundError: If a source is not there.
    """
    out = Path(out)
    for source_path in sources:
        if not Path(source_path).exists():
            raise FileNotFoundError(f"there is nothing at {source_path}.")
    files = [source for source in sources if Path(source).is_file()]
    if files:
        if len(sources) > 1:
            raise ValueError(f"{files[0]} is a bank: convert one at a time, or else directories only.")
        if out.is_file():
            raise ValueError(f"--out {out} is a file: a bank is converted to a folder of PEFT directories.")
        source = open_source(bank=files[0], names=names)
        written = export_adapters(open_bank(files[0]), out, source.names)
        for folder in written:
            write_note(folder, source.note)
        return {"out": str(out), "kind": "directories", "names": source.names, "paths": [str(path) for path in written]}
    if names:
        raise ValueError("--name chooses from a bank; name the directories themselves.")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors: PEFT directories are converted to a bank.")
    if out.exists():
        raise FileExistsError(f"there is a bank {out} already: remove it, or give another name.")
    opened = {source: open_source(source) for source in sources}
    folders = {single.names[0]: source for source, single in opened.items()}
    if len(folders) < len(sources):
        raise ValueError(f"adapters in a bank have different names, but the directories are called {sorted(folders)}.")
    first = next(iter(opened.values()))
    bank = import_adapters(out, folders, base_of(first, model, quant, dtype).model)
    if all(source.note == first.note for source in opened.values()):
        write_note(out, first.note)
    return {"out": str(out), "kind": "bank", "names": list(bank.names), "bytes": _size(out)}


def inspect_path(
    path: str,
    *,
    model: str | None = None,
    quant: str | None = None,
    dtype: torch.dtype | None = None,
    to: str | None = None,
    names: Sequence[str] | None = None,
    r: int = 256,
    targets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What is in an adapter directory, a bank or a model folder.

    Args:
        path: One of these.
        model: The base of an adapter, for the size of its updates and what a merge would keep.
        quant: Format of that model; None is what the adapter was trained over.
        dtype: Of its arithmetic.
        to: Format to merge to; None is the model's.
        names: Which adapters of a bank; None is all, and the first for a merge.
        r: Of an adapter that a model folder would get.
        targets: Of the same; None is the default of the model's type.

    Raises:
        ValueError: If it is none of them, or damaged.
        FileNotFoundError: If it is not there.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"there is nothing at {path}.")
    if folder.is_dir() and not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        return _inspect_model(folder, r, targets)
    if model is None and (to or quant or dtype):
        raise ValueError("--to, --quant and --dtype are about merging into a model: pass --model, too.")
    if names and not folder.is_file():
        raise ValueError(f"--name chooses from a bank, and {path} is a folder.")
    source = open_source(bank=path, names=names) if folder.is_file() else open_source(path)
    assert source.config is not None
    config = source.config
    if folder.is_file():
        bank = open_bank(folder)
        stacked = bank.read(source.names)
        projections: Mapping[str, Tensor] = bank.frozen()
        size = _size(folder)
    else:
        _, tensors = read_files(folder)
        projections = {key: value for key, value in tensors.items() if ".vera_A" in key or ".vera_B" in key}
        stacked = {
            key.removeprefix("base_model.model.").replace(".vera_lambda", ".lambda"): value[None]
            for key, value in tensors.items()
            if key not in projections
        }
        size = _size(folder / WEIGHTS)
    found: dict[str, Any] = {
        "path": path,
        "kind": "bank" if folder.is_file() else "adapter",
        "adapters": len(source.names),
        "names": source.names,
        "model": config.base_model_name_or_path,
        "quant": source.note.quant,
        "labels": source.note.labels,
        "prompt": source.note.prompt,
        "r": config.r,
        "projection_key": config.projection_prng_key,
        "projections_stored": bool(projections),
        "trained": sum(value[0].numel() for value in stacked.values()),
        "bytes": size,
        "modules": _norms(stacked),
    }
    if model is not None:
        base = base_of(source, model, quant, dtype)
        adapted, _ = load_adapters(source, base.model)  # the first one's params
        form = getattr(torch, to) if to in ("float32", "bfloat16", "float16") else to
        reports = merge_reports(base.model, adapted.params, adapted.frozen, form)
        found["merge"] = {
            "name": source.names[0],
            "base": describe_base(base),
            "to": to or base.quant,
            "advice": merge_advice(reports),
            "modules": summarize_reports(describe_reports(reports)),
        }
    return found


def summarize_reports(modules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge reports of many modules as a row for each kind of them, by the end of the name.

    Example:
        >>> summarize_reports([{"module": "0.q", "kept": 0.5, "error": 1.0, "size": 0.25},
        ...                    {"module": "1.q", "kept": 1.0, "error": 0.5, "size": 0.25}])
        [{'modules': 'q', 'count': 2, 'kept': 0.75, 'kept_least': 0.5, 'error': 0.75, 'size': 0.25}]
    """
    rows = []
    for kind, group in _by_kind(modules, lambda row: row["module"]).items():
        mean = {name: sum(row[name] for row in group) / len(group) for name in ("kept", "error", "size")}
        least = min(row["kept"] for row in group)
        rows.append({"modules": kind, "count": len(group), "kept": mean["kept"], "kept_least": least, **mean})
    return rows


def _task_of(source: Source, base: Base, examples: Sequence[Example], prompt: str | None) -> Task:
    note = read_note(base.name) if source.path is None else source.note
    labels = note.labels or sorted({example.label for example in examples})
    return make_task(base, labels, prompt or note.prompt or PROMPT)


def _calibrated_advice(kept: Answers) -> str:
    share, error = (f"{value:.{digits}%}".replace("%", " %") for value, digits in ((kept.same, 0), (kept.error, 1)))
    return (
        f"On {kept.texts} texts that it was not calibrated on, {share} of the answers stay as they were, and their "
        f"logits change by {error} of what the adapter changes."
    )


def _inspect_model(folder: Path, r: int, targets: Sequence[str] | None) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        stored: Any = getattr(config, "quantization_config", None) or {}
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):  # sizes without weights
            model = AutoModelForCausalLM.from_config(config)
    names, _ = resolve(model, VeraConfig(r=r, target_modules=list(targets) if targets else None))
    modules = dict(model.named_modules())
    sizes = {name: linear_sizes(module) for name, module in modules.items()}
    widest_in, widest_out = (max(width) for width in zip(*(sizes[name] or (0, 0) for name in names), strict=True))
    linear = [(name, *size) for name, size in sizes.items() if size is not None]
    rows = []
    for kind, group in _by_kind(linear, lambda row: row[0]).items():
        adapted = [row for row in group if row[0] in names]
        rows.append(
            {
                "modules": kind,
                "count": len(group),
                "in": ", ".join(str(size) for size in dict.fromkeys(row[1] for row in group)),
                "out": ", ".join(str(size) for size in dict.fromkeys(row[2] for row in group)),
                "weights": sum(row[1] * row[2] for row in group),
                "would_adapt": len(adapted),
                "would_train": sum(row[2] + r for row in adapted),
            }
        )
    return {
        "path": str(folder),
        "kind": "model",
        "type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(getattr(config, "dtype", None) or "").removeprefix("torch.") or None,
        "quantization": stored.get("bnb_4bit_quant_type" if stored.get("load_in_4bit") else "quant_method"),
        "bytes": sum(_size(file) for file in folder.glob("*.safetensors")),
        "r": r,
        "would_train": sum(row["would_train"] for row in rows),
        "projections": r * (widest_in + widest_out),
        "modules": rows,
    }


def _norms(stacked: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each kind of adapted module: how many, and the mean norms of their vectors."""
    # A safetensors file gives them in no particular order.
    layers = sorted(key.removesuffix("lambda_b").rstrip(".") for key in stacked if key.endswith("lambda_b"))
    rows = []
    for kind, group in _by_kind(layers, lambda name: name).items():
        row: dict[str, Any] = {"modules": kind, "count": len(group)}
        for leaf in ("lambda_b", "lambda_d"):
            norms = torch.stack([stacked[f"{name}.{leaf}".lstrip(".")].float().norm(dim=1) for name in group])
            row |= {f"{leaf}_norm": norms.mean().item(), f"{leaf}_norm_most": norms.max().item()}
        rows.append(row)
    own = [key for key in stacked if key.rpartition(".")[2] not in ("lambda_b", "lambda_d")]
    return rows + [{"modules": key, "count": 1} for key in own]


def _by_kind(items: Iterable[Any], name_of: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(name_of(item).rpartition(".")[2], []).append(item)
    return groups


def _adapter_directory(folder: Path) -> Path:
    """The folder, if it can be an adapter's; `read_files` says what else is wrong."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; an adapter is a PEFT directory, and a bank goes with --bank.")
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds a model, not an adapter; a model goes with --model.")
    return folder


def _size(file: Path) -> int:
    return file.stat().st_size
