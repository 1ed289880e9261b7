"""Atomic file writes, and checked reads of safetensors and JSON files."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `file`, and rename it to `file` if the block succeeds.

    The write is atomic: after a crash, `file` has either its old or its new content. A killed process may leave the
    temporary file `.{name of the file}.{random}` behind.

    Raises:
        OSError: If the folder does not exist or is not writable, or if the disk is full. An existing `file` is then
            unchanged.
        IsADirectoryError: If `file` is a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "file") as temporary:
        ...         _ = temporary.write_text("new")
        ...     (Path(folder) / "file").read_text()
        'new'
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: pass the path of a file.")
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        with suppress(OSError):  # an error of the cleanup must not hide the first error
            temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"{file} could not be written: {error}.") from error
        raise


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` if the block succeeds.

    If `folder` already exists, the files of the temporary folder are moved into `folder` one by one, each atomically.
    Other files in `folder` are kept.

    Raises:
        OSError: If the folder is not writable, or if the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with filling(Path(parent) / "model") as temporary:
        ...         _ = (temporary / "config.json").write_text("{}")
        ...     sorted(path.name for path in (Path(parent) / "model").iterdir())
        ['config.json']
    """
    folder = folder.resolve()
    old = folder.is_dir()
    temporary = (folder if old else folder.parent) / f".{folder.name}.{secrets.token_hex(8)}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if old:
            for file in sorted(temporary.iterdir()):
                os.replace(file, folder / file.name)
        else:
            os.rename(temporary, folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{folder} could not be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU. Tensors that share storage are cloned, because safetensors rejects shared storage.

    Example:
        >>> x = torch.ones(3)
        >>> [tensor.data_ptr() == x.data_ptr() for tensor in unshared({"a": x, "b": x}).values()]
        [True, False]
    """
    seen = set()
    own = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    return own


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, so that equal contents give equal bytes.

    The package safetensors writes metadata in an order that differs from call to call.
    """
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size
        stream.seek(8)
        stream.write(text.ljust(size))


def read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and tensors of a safetensors file.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file is not a complete safetensors file.
    """
    data = file.read_bytes()
    try:
        with torch.device("cpu"):  # not the default device
            tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}.") from error
    return header.get("__metadata__") or {}, tensors


def map_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the memory-mapped tensors of a safetensors file. Data is read on first use.

    Writing to a tensor changes neither the file nor other tensors.

    Raises:
        OSError: If the file can't be read.
        ValueError: If the file is not a complete safetensors file.
    """
    with file.open("rb"):  # raise the usual OSError, because safetensors raises another error
        pass
    try:
        with torch.device("cpu"), safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}.") from error


def parse_json(file: Path, text: str) -> Any:
    """Parse the text of a JSON file. Errors name `file`.

    Raises:
        ValueError: If the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error


@cache
def written_by() -> str:
    """Return the name and version of this package, for the metadata of saved files.

    Example:
        >>> written_by().split()[0]
        'vera_func'
    """
    try:
        return f"vera_func {version('vera-func')}"
    except PackageNotFoundError:  # the package runs from a folder and is not installed
        return "vera_func"
