"""The adapters that a command names, and the base that they were trained over.

What the command line does not say is read from the adapter's files: the name of the model from PEFT's configuration,
its format, the labels and the prompt from the metadata beside it.
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
    """The adapters of a command: a PEFT directory, some adapters of a bank, or none (the base alone).

    Attributes:
        path: The directory or the bank; None is the base alone.
        names: Names of the adapters.
        config: Their configuration; None for the base alone.
        note: Their metadata.
    """

    path: Path | None
    names: list[str]
    config: VeraConfig | None
    note: Note


def open_source(
    adapter: str | None = None, bank: str | None = None, names: Sequence[str] | None = None, *, one: bool = False
) -> Source:
    """Read the configuration and the metadata of adapters, and check the files, before a model is loaded.

    Args:
        adapter: A PEFT directory.
        bank: An adapter bank.
        names: Names of adapters in the bank; None is all.
        one: Whether exactly one adapter is required.

    Raises:
        ValueError: If both are given, names are given without a bank or are unknown, there is not exactly one adapter
            where one is required, or the files are damaged or of another kind.
        FileNotFoundError: If the directory or the file does not exist.
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
    """Load the base that the adapters were trained over.

    Args:
        source: From `open_source`.
        model: A folder or a hub id in place of the model that the files name.
        quant: A format in place of the one in the metadata.
        dtype: As for `load_base`.

    Raises:
        ValueError: If the files do not name a model, and `model` is None; or as for `load_base`.
        OSError: If the model is not found.
    """
    if model is None and source.config is not None:
        model = source.config.base_model_name_or_path
        if not model:
            raise ValueError(f"{source.path} does not say which model it adapts: pass --model.")
    note = read_note(model) if source.path is None and model is not None else source.note
    return load_base(model, quant or note.quant, dtype)


def load_adapters(source: Source, model: nn.Module) -> tuple[Adapted, Callable[[Sequence[str]], dict[str, Tensor]]]:
    """The first adapter as an `Adapted`, and a function that reads others: `names -> stacked params`.

    Raises:
        ValueError: If the adapters do not fit the model.
    """
    if source.path is None:
        # A fresh adapter, whose update is 0, gives the base.
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
    """The task of the adapters.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        labels: Used if the metadata have none.
        prompt: In place of the one in the metadata; None is that one, or `PROMPT`.

    Raises:
        ValueError: If fewer than two labels are known; or as for `make_task`.
    """
    note = read_note(base.name) if source.path is None else source.note
    known = note.labels or sorted(set(labels))
    if len(known) < 2:
        raise ValueError(f"{source.path or base.name} does not say what it answers with: pass --labels a,b.")
    return make_task(base, known, prompt or note.prompt or PROMPT)


def _adapter_directory(folder: Path) -> Path:
    """The folder itself, unless it is a file or a model. `read_files` checks the rest."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; an adapter is a PEFT directory, and a bank goes with --bank.")
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds a model, not an adapter; a model goes with --model.")
    return folder
