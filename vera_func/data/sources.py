"""Where a command's adapters come from, and the model that they adapt.

What an adapter was trained over is read from its files where the command line does not say it: the model from
PEFT's configuration, its format, labels and prompt from the note that `vera-func` puts beside it.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..io.bank import open_bank
from ..io.checkpoint import load_adapter, read_files
from ..io.config import CONFIG
from ..model.adapt import Adapted, adapt
from ..model.batch import stack_adapters
from ..model.config import VeraConfig
from .models import Base, Note, load_base, read_note
from .prompts import PROMPT
from .task import Task, make_task


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


def task_of(source: Source, base: Base, labels: Iterable[str], prompt: str | None) -> Task:
    """What the adapters answer, by their note; `labels` where there is none, and `prompt` if it is given.

    Raises:
        ValueError: If there are not two labels anywhere; or as for `make_task`.
    """
    note = read_note(base.name) if source.path is None else source.note
    known = note.labels or sorted(set(labels))
    if len(known) < 2:
        raise ValueError(f"{source.path or base.name} does not say what it answers with: pass --labels a,b.")
    return make_task(base, known, prompt or note.prompt or PROMPT)


def _adapter_directory(folder: Path) -> Path:
    """The folder, if it can be an adapter's; `read_files` says what else is wrong."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; an adapter is a PEFT directory, and a bank goes with --bank.")
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds a model, not an adapter; a model goes with --model.")
    return folder
