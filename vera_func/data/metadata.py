"""Read and write the metadata of adapters: a JSON file in an adapter directory, or next to a bank.

An adapter fits only the base on which it was trained, in the same quantization format. PEFT's files name the base
model, but not its quantization format. The metadata file therefore stores the quantization format, the labels and the
prompt. PEFT ignores the metadata file.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..io.config import METADATA
from ..io.files import parse_json, replacing
from .kinds import COLUMNS


_PER_ADAPTER = ("data", "beta")  # entries with a value for each adapter of a bank
_ALWAYS = ("quant", "labels", "prompt")  # entries that are written even if they are unknown


class Metadata(NamedTuple):
    """The metadata of an adapter or of a bank; None means unknown.

    Attributes:
        quant: Quantization format of the base during training.
        labels: All labels.
        prompt: Prompt template with `{text}`.
        kind: Kind of the training data (see `kinds`); None for labelled texts.
        data: For each adapter, the source of its training data.
        max_length: Maximum number of tokens of a sequence.
        truncate_side: Where longer sequences were truncated: at the "end" or at the "start".
        reference: For preferences, folder or hub id of DPO's reference adapter; None means the base model.
        beta: For preferences, the beta of DPO for each adapter.
        label_sets: Labels of each adapter of a bank, if the adapters have different labels; `labels` is then None.
    """

    quant: str | None = None
    labels: list[str] | None = None
    prompt: str | None = None
    kind: str | None = None
    data: list[str] | None = None
    max_length: int | None = None
    truncate_side: str | None = None
    reference: str | None = None
    beta: list[float] | None = None
    label_sets: list[list[str]] | None = None


def _are(kind: type | tuple[type, ...], values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


# What each field must be, unless it is None.
_REQUIRED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("quant", "prompt", "reference"), (lambda value: isinstance(value, str), "a string")),
    **dict.fromkeys(("labels", "data"), (partial(_are, str), "a list of strings")),
    "kind": (tuple(COLUMNS).__contains__, f"one of {', '.join(COLUMNS)}"),
    "max_length": (lambda value: _are(int, [value]), "an integer"),
    "truncate_side": (("start", "end").__contains__, '"start" or "end"'),
    "beta": (partial(_are, (int, float)), "a list of numbers"),
    "label_sets": (
        lambda value: _are(list, value) and all(_are(str, labels) for labels in value),
        "a list of lists of strings",
    ),
}


def metadata_file(path: str | os.PathLike[str]) -> Path:
    """The path of the metadata file in an adapter directory, or next to a bank.

    Example:
        >>> metadata_file("banks/all.safetensors").as_posix()
        'banks/all.json'
    """
    path = Path(path)
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path / METADATA


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Read the metadata of an adapter directory or a bank; without a metadata file, all fields are None.

    Raises:
        ValueError: If the file is damaged.
    """
    file = metadata_file(path)
    if not file.is_file():
        return Metadata()
    fields = parse_json(file, file.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must contain a JSON object, got {type(fields).__name__}: correct or delete the file.")
    metadata = Metadata(**{name: fields.get(name) for name in Metadata._fields})
    for name, value in metadata._asdict().items():
        fits, requirement = _REQUIRED[name]
        if value is not None and not fits(value):
            raise ValueError(f"{file}: {name} must be {requirement}, got {value!r}: correct or delete the file.")
    return metadata


def write_metadata(path: str | os.PathLike[str], metadata: Metadata) -> None:
    """Write the metadata file of an existing adapter directory or bank."""
    with replacing(metadata_file(path)) as file:
        known = {name: value for name, value in metadata._asdict().items() if value is not None or name in _ALWAYS}
        file.write_text(json.dumps(known, indent=2), encoding="utf-8")


def split_metadata(metadata: Metadata, i: int) -> Metadata:
    """The metadata of adapter `i` of a bank.

    Example:
        >>> split_metadata(Metadata("nf4", data=["a.csv", "b.csv"]), 1).data
        ['b.csv']
    """
    own: dict[str, Any] = {name: _own(getattr(metadata, name), i) for name in _PER_ADAPTER}
    return with_labels_of(metadata, i)._replace(**own)


def with_labels_of(metadata: Metadata, i: int) -> Metadata:
    """The metadata of a bank, with the labels of adapter `i` as `labels`.

    Raises:
        ValueError: If `label_sets` has no entry for adapter `i`.

    Example:
        >>> with_labels_of(Metadata(label_sets=[["a", "b"], ["c", "d"]]), 1).labels
        ['c', 'd']
    """
    sets = metadata.label_sets
    if sets is None:
        return metadata
    if i >= len(sets):
        raise ValueError(
            f"the metadata of the bank has the labels of {len(sets)} adapters, but not of adapter {i}: add "
            f"the labels of adapter {i} to 'label_sets'."
        )
    return metadata._replace(labels=sets[i], label_sets=None)


def with_labels(metadata: Metadata, label_sets: Sequence[list[str]]) -> Metadata:
    """Store the labels of each adapter: in `labels` if all adapters have equal labels, else in `label_sets`.

    Example:
        >>> with_labels(Metadata(), [["a", "b"], ["a", "b"]]).labels
        ['a', 'b']
    """
    same = all(labels == label_sets[0] for labels in label_sets)
    return metadata._replace(labels=label_sets[0] if same else None, label_sets=None if same else list(label_sets))


def join_metadata(adapters: Sequence[Metadata]) -> Metadata | None:
    """Join the metadata of several adapters into the metadata of a bank, or return None.

    The result is None if the adapters differ in a field that the bank stores once for all adapters, or if only some of
    the adapters have labels.

    Example:
        >>> join_metadata([Metadata("nf4", data=["a.csv"]), Metadata("nf4", data=["b.csv"])]).data
        ['a.csv', 'b.csv']
    """
    own = dict.fromkeys((*_PER_ADAPTER, "labels", "label_sets"))
    shared = {metadata._replace(**own) for metadata in adapters}
    labels = [metadata.labels for metadata in adapters]
    if len(shared) > 1 or (None in labels and any(labels)):
        return None
    joined: dict[str, Any] = {}
    for name in _PER_ADAPTER:
        values = [getattr(metadata, name) for metadata in adapters]
        known = all(value is not None and len(value) == 1 for value in values)
        joined[name] = [value[0] for value in values] if known else None
    found = adapters[0]._replace(**joined)
    return found if None in labels else with_labels(found, labels)  # type: ignore[arg-type]


def _own(values: list[Any] | None, i: int) -> list[Any] | None:
    return values if values is None or len(values) <= i else [values[i]]
