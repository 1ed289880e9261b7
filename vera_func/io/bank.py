"""Adapter banks: safetensors files of up to thousands of adapters with shared projections.

A bank contains the projections and the stacked params, whose leaves have shape (n, ...). One adapter can be read
without reading the others. The metadata of the file contains the adapter names and the shared configuration.
`safetensors.torch.load_file` also reads a bank.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.keys import MARKS, PROJECTIONS, adapted_modules, is_vector, own_parameters, split_key
from ..core.shapes import require_float
from ..model.adapt import Adapted
from ..model.apply import Apply
from ..model.batch import num_adapters, stack_adapters
from ..model.build import make_apply
from ..model.config import VeraConfig
from ..model.linears import layer_device
from ..model.tree import unwrap
from .bank_header import FORMAT, read_header
from .check import check_adapter, require_projections
from .checkpoint import load_adapter, require_no_overflow, save_adapter, vector_dtype
from .config import config_to_json
from .files import replacing, sort_metadata, unshared


@dataclasses.dataclass(frozen=True)
class Bank:
    """An open adapter bank. The adapter names and the configuration are in memory; tensors are read on request.

    Attributes:
        path: The file.
        names: Names of the adapters, in the order of their rows in the stacked params.
        config: Configuration shared by all adapters.
        rows: Mapping from an adapter's name to its row index in the stacked params.
    """

    path: Path
    names: tuple[str, ...]
    config: VeraConfig
    rows: Mapping[str, int] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, names: Sequence[str | int] | None = None) -> dict[str, Tensor]:
        """Return the stacked params of the given adapters, in the given order. No other adapters are read.

        Consecutive rows are memory-mapped, so do not overwrite the file in place while the params are in use. Renaming
        a new file to the path, as `save_bank` does, is safe.

        Args:
            names: Names or row indices of the adapters. None means all adapters.

        Raises:
            ValueError: If a name is unknown, if a row index is out of range, or if the file is damaged.
        """
        _require_sequence(() if names is None else names)
        runs = [(0, len(self))] if names is None else list(_runs([self.row(name) for name in names])) or [(0, 0)]
        with torch.device("cpu"), _open(self.path) as file:
            keys = [key for key in file.keys() if key not in PROJECTIONS]  # noqa: SIM118  (no mapping)
            if len(runs) == 1:
                start, stop = runs[0]
                return {key: file.get_slice(key)[start:stop] for key in keys}
            slices = {key: file.get_slice(key) for key in keys}
            return {key: torch.cat([leaf[start:stop] for start, stop in runs]) for key, leaf in slices.items()}

    def frozen(self) -> dict[str, Tensor]:
        """Return the projections, which are shared by all adapters."""
        with torch.device("cpu"), _open(self.path) as file:
            return {name: file.get_tensor(name) for name in PROJECTIONS}

    def adapted(
        self,
        model: nn.Module,
        names: Sequence[str | int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        int8_activations: bool = False,
        product_dtype: torch.dtype | None = None,
    ) -> Adapted:
        """Load the given adapters onto a model: return `(apply, stacked params, frozen, config)`.

        Args:
            model: The base model, which is not modified.
            names: Names or row indices of the adapters. None means all adapters.
            dtype: Dtype of vectors and projections. None keeps the tensors of the file, which are memory-mapped.
            int8_activations: See `adapt`.
            product_dtype: See `adapt`.

        Raises:
            ValueError: If the bank does not fit the model, or if a value overflows `dtype`.
        """
        if dtype is not None:
            require_float("dtype", dtype)
        params, frozen = self.read(names), self.frozen()
        targets = adapted_modules(params)
        model = unwrap(model)
        modules = dict(model.named_modules())
        missing = [name for name in targets if name not in modules]
        if missing:
            raise ValueError(
                f"{self.path} has params for the layer {missing[0]!r}, but the model has no such module: pass the base "
                "model of the bank."
            )
        targets.sort(key=list(modules).index)
        trained = own_parameters(params)
        apply = make_apply(
            model, self.config, targets, trained, int8_activations=int8_activations, product_dtype=product_dtype
        )
        _require_fit(self.path, params, apply)
        device = layer_device(modules[targets[0]])
        order = {key: i for i, key in enumerate(apply.slots)}
        params = {key: params[key].to(device) for key in sorted(params, key=order.__getitem__)}
        frozen = {name: value.to(device) for name, value in frozen.items()}
        if dtype is not None:
            params |= {key: value.to(vector_dtype(key, dtype)) for key, value in params.items() if is_vector(key)}
            frozen = {name: value.to(dtype) for name, value in frozen.items()}
            require_no_overflow(self.path, params | frozen)
        return Adapted(apply, params, frozen, self.config)

    def row(self, name: str | int) -> int:
        """Return the row index of the adapter `name`. A row index is returned unchanged.

        Raises:
            ValueError: If the name is unknown or the row index is out of range.
        """
        if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(self):
            return name
        if not isinstance(name, str) or name not in self.rows:
            some = ", ".join([*self.names[:3], *["..."] * (len(self) > 3)])
            raise ValueError(f"{self.path} has no adapter {name!r}. Its {len(self)} adapters are: {some}.")
        return self.rows[name]


def save_bank(
    path: str | os.PathLike[str],
    stacked: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    config: VeraConfig,
    names: Sequence[str],
) -> Path:
    """Write stacked adapters to an adapter bank, atomically.

    Args:
        path: The file to write, usually with the suffix `.safetensors`.
        stacked: Stacked params, whose leaves have shape (n, ...).
        frozen: The projections, which a bank stores even if `config.save_projection` is False.
        config: The configuration that `adapt` returned.
        names: Distinct names, one for each adapter.

    Raises:
        ValueError: If names, params, projections and configuration are inconsistent, or if a value is NaN or inf. All
            arguments are checked before the file is written.

    Example:
        >>> import tempfile
        >>> from vera_func import adapt, stack_adapters
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stacked = stack_adapters([adapted.params] * 3)
        ...     path = save_bank(f"{folder}/bank.safetensors", stacked, *adapted[2:], names=["a", "b", "c"])
        ...     open_bank(path).read(["c", "a"])["0.lambda_d"].shape
        torch.Size([2, 4])
    """
    path, n = Path(path), num_adapters(stacked)
    _require_names(names, n)
    frozen = require_projections(frozen)
    for key, leaf in stacked.items():
        if split_key(key)[1] == "lambda_d" and leaf.shape[1:] != (config.r,):
            raise ValueError(f"{key!r} must have shape ({n}, {config.r}), got {tuple(leaf.shape)}.")
        if split_key(key)[1] in MARKS or key in PROJECTIONS:
            raise ValueError(
                f"{key!r} can't be stored in a bank: pass the stacked params that stack_adapters returned."
            )
    if not n:
        raise ValueError("stacked has 0 adapters, but a bank needs at least one.")
    check_adapter({key: leaf[0] for key, leaf in stacked.items()}, frozen, config)
    for key, leaf in stacked.items():
        if not leaf.isfinite().all():
            broken = names[int((~leaf.isfinite()).flatten(1).any(1).nonzero()[0])]
            raise ValueError(f"{key!r} of the adapter {broken!r} holds NaN or inf; nothing was written.")
    tensors = unshared({key: leaf.detach() for key, leaf in (*stacked.items(), *frozen.items())})
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config_to_json(config)),
        "names": json.dumps(list(names)),
    }
    with replacing(path) as file:
        save_file(tensors, file, metadata)
        sort_metadata(file)
    return path


def open_bank(path: str | os.PathLike[str]) -> Bank:
    """Open an adapter bank without reading its tensors.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not an adapter bank or is damaged, or if its metadata do not match its tensors.

    Example:
        >>> import tempfile
        >>> from vera_func import adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_bank(f"{folder}/bank", stack_adapters([adapted.params]), *adapted[2:], names=["a"])
        ...     len(open_bank(path))
        1
    """
    path = Path(path)
    with _open(path) as file:
        names, config = read_header(path, file)
    return Bank(path, names, config, {name: i for i, name in enumerate(names)})


def append_to_bank(
    path: str | os.PathLike[str], stacked: Mapping[str, Tensor], names: Sequence[str], *, replace: bool = False
) -> Bank:
    """Add adapters to a bank, or replace adapters of the same name. The whole file is rewritten, atomically.

    Args:
        path: The bank.
        stacked: Stacked params with the keys of the bank. The leaves have shape (n, ...).
        names: Distinct names, one for each adapter.
        replace: Whether to replace adapters whose names are already in the bank.

    Raises:
        ValueError: If the params do not fit the bank, or if a name is already in the bank and `replace` is False. The
            bank is then unchanged.

    Example:
        >>> import tempfile
        >>> from vera_func import adapt, stack_adapters
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     one = stack_adapters([adapted.params])
        ...     path = save_bank(f"{folder}/bank.safetensors", one, *adapted[2:], names=["a"])
        ...     append_to_bank(path, one, ["b"]).names
        ('a', 'b')
    """
    bank = open_bank(path)
    _require_names(names, num_adapters(stacked))
    known = [name for name in names if name in bank.rows]
    if known and not replace:
        raise ValueError(f"{path} already has an adapter {known[0]!r}; pass replace=True to replace it.")
    old = bank.read()
    odd = sorted(old.keys() ^ stacked.keys())
    if odd:
        raise ValueError(f"stacked must have the same keys as {path}, but {len(odd)} keys differ, such as {odd[0]!r}.")
    everything = [*bank.names, *(name for name in names if name not in bank.rows)]
    row = {name: i for i, name in enumerate(everything)}
    rows = torch.tensor([row[name] for name in names], device="cpu")
    tensors = {}
    for key, leaf in old.items():
        if stacked[key].shape[1:] != leaf.shape[1:]:
            expected = (len(names), *leaf.shape[1:])
            raise ValueError(f"{key!r} must have shape {expected} as in {path}, got {tuple(stacked[key].shape)}.")
        grown = leaf.new_empty(len(everything), *leaf.shape[1:])
        grown[: len(leaf)] = leaf
        grown[rows] = stacked[key].detach().to(grown)
        tensors[key] = grown
    save_bank(path, tensors, bank.frozen(), bank.config, everything)
    return open_bank(path)


def import_adapters(
    path: str | os.PathLike[str], folders: Mapping[str, str | os.PathLike[str]], model: nn.Module
) -> Bank:
    """Convert PEFT directories to an adapter bank. The adapters must have the same projections and target modules.

    Args:
        path: The bank to write.
        folders: Mapping from adapter name to PEFT directory.
        model: The base model of the adapters.

    Raises:
        ValueError: If the adapters differ in projections, targets or shapes. `pool_adapters` combines such adapters.

    Example:
        >>> import tempfile
        >>> from vera_func import adapt
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     one = save_adapter(f"{folder}/one", *adapted[1:])
        ...     import_adapters(f"{folder}/bank", {"one": one}, model).names
        ('one',)
    """
    loaded = {name: load_adapter(folder, model) for name, folder in folders.items()}
    if not loaded:
        raise ValueError("folders is empty; pass at least one PEFT directory.")
    first_name, first = next(iter(loaded.items()))
    for name, adapted in loaded.items():
        if any(not torch.equal(adapted.frozen[k], first.frozen[k]) for k in PROJECTIONS):
            raise ValueError(
                f"{folders[first_name]} and {folders[name]} have different projections, but a bank stores only one "
                "pair. To combine adapters of different projections in memory, use pool_adapters."
            )
    stacked = stack_adapters([adapted.params for adapted in loaded.values()])
    save_bank(path, stacked, first.frozen, first.config, list(loaded))
    return open_bank(path)


def export_adapters(bank: Bank, folder: str | os.PathLike[str], names: Sequence[str | int] | None = None) -> list[Path]:
    """Write adapters of a bank as PEFT directories, one for each adapter.

    Args:
        bank: The open bank.
        folder: Parent directory, created if it does not exist. Each adapter is written to a sub-folder with the
            adapter's name. As in PEFT, an adapter named "default" is written to `folder` itself.
        names: Names or row indices of the adapters. None means all adapters.

    Raises:
        ValueError: If a name is unknown or is not a valid folder name.

    Example:
        >>> import tempfile
        >>> from vera_func import adapt
        >>> adapted = adapt(nn.Sequential(nn.Linear(8, 6)), VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_bank(f"{folder}/bank", stack_adapters([adapted.params]), *adapted[2:], names=["a"])
        ...     [p.name for p in export_adapters(open_bank(path), folder)]
        ['a']
    """
    frozen, written = bank.frozen(), []
    for name in bank.names if names is None else names:
        row = bank.row(name)
        params = {key: leaf[0] for key, leaf in bank.read([row]).items()}
        written.append(save_adapter(folder, params, frozen, bank.config, adapter_name=bank.names[row]))
    return written


def _require_sequence(names: Any) -> None:
    if not isinstance(names, Iterable):
        raise ValueError(f"names must be a sequence of names, got {type(names).__name__}.")
    if isinstance(names, str):
        raise ValueError(f"names must be a sequence of names, got the string {names!r}: pass [{names!r}].")


def _require_names(names: Any, n: int) -> None:
    """Raise a ValueError unless there are n distinct, non-empty names."""
    _require_sequence(names)
    valid = {name for name in names if isinstance(name, str) and name}
    if len(names) != n or len(valid) != n:
        raise ValueError(
            f"names must be {n} distinct names, one for each adapter, got {len(names)}, of which {len(valid)} are "
            "distinct, non-empty strings."
        )


def _require_fit(path: Path, params: Mapping[str, Tensor], apply: Apply) -> None:
    for key, value in params.items():
        if key not in apply.slots:
            raise ValueError(f"{path} has {key!r}, but the adapted model has no such parameter.")
        if value.shape[1:] != (shape := apply.slots[key].shape):
            raise ValueError(
                f"{path} has {key!r} of shape {tuple(value.shape[1:])} per adapter, but the model needs {tuple(shape)}."
            )
    if missing := apply.schema.missing(params):
        raise ValueError(f"{path} lacks {missing[0]!r}, which the model needs.")


def _open(path: Path) -> Any:
    if path.is_dir():
        raise FileNotFoundError(
            f"there is no bank {path}: the path is a folder, but a bank is a file. To convert PEFT directories to a "
            "bank, use vera_func.io.bank.import_adapters."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no bank {path}.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}.") from error


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield `(start, stop)` for each run of consecutive row indices."""
    start = stop = None
    for row in rows:
        if row != stop:
            if start is not None:
                yield start, stop  # type: ignore[misc]
            start = row
        stop = row + 1
    if start is not None:
        yield start, stop  # type: ignore[misc]
