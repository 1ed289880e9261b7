"""Load the adapters that a command uses, and their base model.

Defaults of command-line options come from the adapter's files. PEFT's configuration names the base model. The metadata
file stores the quantization format of the base model, the labels and the prompt.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..io.bank import open_bank
from ..io.checkpoint import load_adapter, read_files
from ..io.config import CONFIG
from ..io.hub import find_adapter, is_repository
from ..model.adapt import Adapted, adapt
from ..model.batch import stack_adapters
from ..model.config import VeraConfig
from ..model.dora import fold_if_dora
from .metadata import Metadata, metadata_file, read_metadata, with_labels_of
from .models import Base, load_base
from .prompts import MAX_TOKENS, PROMPT
from .task import Task, make_task


class Source(NamedTuple):
    """The adapters that a command uses: a PEFT directory, adapters of a bank, or no adapter (the base model alone).

    Attributes:
        path: The PEFT directory or the bank; None for the base model alone.
        names: Names of the adapters.
        config: Configuration of the adapters; None for the base model alone.
        model: Folder or hub id of the base model; None if unknown. If there are no adapters, None means the
            default model of `load_base`.
        metadata: Metadata of the adapters. If there are no adapters: the metadata in the merged model's folder.
    """

    path: Path | None
    names: list[str]
    config: VeraConfig | None
    model: str | None
    metadata: Metadata


def open_source(
    adapter: str | None = None,
    bank: str | None = None,
    names: Sequence[str] | None = None,
    model: str | None = None,
    *,
    one: bool = False,
) -> Source:
    """Read and check the configuration and metadata of adapters, without loading a model.

    Args:
        adapter: A PEFT directory, or the id of a hub repository.
        bank: An adapter bank.
        names: Names of adapters in the bank; None means all adapters.
        model: Folder or hub id of the base model; None means the model that the configuration names.
        one: Whether exactly one adapter is required.

    Raises:
        ValueError: If both `adapter` and `bank` are given, or if `names` are given without `bank`. If a name is
            unknown. If `one` is true, and the number of adapters is not 1. If a file is damaged or of the wrong
            type.
        FileNotFoundError: If the PEFT directory or the bank does not exist.
    """
    if adapter is not None and bank is not None:
        raise ValueError("--adapter and --bank were both given: give one of them, not both.")
    if names and bank is None:
        raise ValueError("--name was given without --bank, but selects an adapter of a bank: pass --bank as well.")
    if bank is not None:
        path, found, config = _open_bank(bank, names, one)
    elif adapter is not None:
        path, found, config = _open_adapter(adapter)
    elif one:
        raise ValueError("an adapter is required: pass --adapter DIR, or --bank FILE with --name.")
    else:
        return Source(None, ["base"], None, model, Metadata() if model is None else read_metadata(model))
    source = Source(path, found, config, model or config.base_model_name_or_path, read_metadata(path))
    parts = by_labels(source)
    return parts[0] if len(parts) == 1 else source


def base_of(
    source: Source,
    quant: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    *,
    max_tokens: int | None = None,
) -> Base:
    """Load the base model on which the adapters were trained.

    Args:
        source: From `open_source`.
        quant: Quantization format; None means the format in the metadata.
        dtype: As for `load_base`.
        device: As for `load_base`.
        max_tokens: Length of the longest prompts; None means the length in the metadata, or 256 if the metadata has
            none.

    Raises:
        ValueError: If the name of the base model is unknown, or as for `load_base`.
        OSError: If the model is not found.
    """
    if source.path is not None and not source.model:
        raise ValueError(f"{source.path} does not name its base model: pass --model.")
    max_tokens = max_tokens or source.metadata.max_length or MAX_TOKENS
    return load_base(source.model, quant or source.metadata.quant, dtype, max_tokens=max_tokens, device=device)


def load_adapters(
    source: Source, model: nn.Module, product_dtype: torch.dtype | None = None
) -> tuple[Adapted, Callable[[Sequence[str]], dict[str, Tensor]]]:
    """The first adapter as an `Adapted`, and a function `names -> stacked params` that reads adapters by name.

    The stacked params are for inference only, because DVoRA's magnitudes are folded (see `fold_magnitude`).

    Args:
        source: From `open_source`.
        model: The base model.
        product_dtype: See `adapt`.

    Raises:
        ValueError: If the adapters do not fit the model.
    """
    if source.path is None:
        adapted = unadapted(model)
        return adapted, lambda names: stack_adapters([adapted.params] * len(names))
    if source.path.is_dir():
        adapted = load_adapter(source.path, model, product_dtype=product_dtype)
        one = fold_if_dora(adapted.apply, adapted.params, adapted.frozen)
        return adapted, lambda names: stack_adapters([one] * len(names))
    bank = open_bank(source.path)
    adapted = bank.adapted(model, source.names[:1], product_dtype=product_dtype)
    adapted = adapted._replace(params={key: leaf[0] for key, leaf in adapted.params.items()})
    device = next(model.parameters()).device

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        stacked = {key: leaf.to(device) for key, leaf in bank.read(names).items()}
        return dict(fold_if_dora(adapted.apply, stacked, adapted.frozen))

    return adapted, read


def unadapted(model: nn.Module) -> Adapted:
    """Return the base model with a new adapter. The update of the adapter is 0, so the outputs do not change."""
    return adapt(model, VeraConfig(r=1, target_modules="all-linear"))


def task_of(source: Source, base: Base, labels: Iterable[str], prompt: str | None) -> Task:
    """The task of the adapters.

    Args:
        source: From `open_source`.
        base: From `base_of`.
        labels: Labels to use if the metadata has none.
        prompt: A prompt template; None means the prompt in the metadata, or `PROMPT` if the metadata has none.

    Raises:
        ValueError: If fewer than two labels are known, or as for `make_task`.
    """
    known = source.metadata.labels or sorted(set(labels))
    if len(known) < 2:
        raise ValueError(f"{source.path or base.name} has no labels in its metadata: pass --labels a,b.")
    task = make_task(base, known, prompt or source.metadata.prompt or PROMPT)
    return task._replace(max_tokens=source.metadata.max_length or task.max_tokens)


def by_labels(source: Source) -> list[Source]:
    """Split the adapters of a bank into groups of consecutive adapters with the same labels."""
    if source.metadata.label_sets is None or source.path is None:
        return [source]
    bank = open_bank(source.path)

    def own(name: str) -> Metadata:
        return with_labels_of(source.metadata, bank.row(name))

    return [source._replace(names=list(names), metadata=key) for key, names in groupby(source.names, own)]


def check_labels(source: Source, labels: Iterable[str]) -> None:
    """Check that each adapter with known labels was trained on all of `labels`.

    Raises:
        ValueError: If an adapter was trained without one of `labels`.
    """
    parts = by_labels(source)
    for known, name in ((part.metadata.labels, part.names[0]) for part in parts):
        if known and (odd := sorted(set(labels) - set(known))):
            which, hint = ("", "rename the label") if len(parts) == 1 else (f" {name!r}", "choose adapters with --name")
            raise ValueError(
                f"the data has the label {odd[0]!r}, but the adapter{which} was trained on the labels {known}: {hint}."
            )


def _open_bank(bank: str, names: Sequence[str] | None, one: bool) -> tuple[Path, list[str], VeraConfig]:
    """The path of a bank, the names of the selected adapters, and their configuration."""
    if Path(bank).is_dir():
        raise ValueError(f"--bank must be a file, got the folder {bank}: pass a PEFT directory with --adapter.")
    opened = open_bank(bank)
    names = list(names or opened.names)
    for name in names:
        opened.row(name)  # an unknown name raises
    if one and len(names) != 1:
        some = ", ".join([*names[:3], *["..."] * (len(names) > 3)])
        raise ValueError(
            f"the command takes one adapter, got {len(names)} adapters of {bank}: choose one with --name ({some})."
        )
    return Path(bank), names, opened.config


def _open_adapter(adapter: str) -> tuple[Path, list[str], VeraConfig]:
    """The folder of an adapter (local or on the hub), a list with the adapter's name, and the configuration."""
    path = Path(adapter)
    folder = find_adapter(adapter, optional=[metadata_file("").name]) if is_repository(adapter) else path
    if folder.is_file():
        raise ValueError(f"--adapter must be a PEFT directory, got the file {folder}: pass a bank with --bank.")
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} contains a model, not an adapter: pass a model with --model.")
    config, _ = read_files(folder)
    return folder, [(path if folder is not path else path.resolve()).name], config
