"""Files that are whole: replaced at once or not at all, and refused when damaged."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `file` at the end: after a crash, `file` is the old
    one or the new one, whole.

    A process that is killed outright leaves temporary files beside it, whose names begin with a dot.

    Raises:
        OSError: If the folder is missing or can't be written, or the disk is full; the old file is still there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "file") as temporary:
        ...         _ = temporary.write_text("new")
        ...     (Path(folder) / "file").read_text()
        'new'
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        with suppress(OSError):  # what went wrong first is what matters
            temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"{file} could not be written: {error}.") from error
        raise


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, which becomes `folder` at the end, or whose files do where there is one already.

    A new folder is there whole or not at all. In an old one files of the same name are replaced one by one, each whole;
    others stay.

    Raises:
        OSError: If it can't be written, or the disk is full.

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


def read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is not a whole safetensors file.
    """
    data = file.read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}.") from error
    return header.get("__metadata__") or {}, tensors


def map_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; the tensors are views of the file, read when they are used.

    Writing to a tensor changes neither the file nor other tensors.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is not a whole safetensors file.
    """
    with file.open("rb"):  # the error of a file that can't be read
        pass
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}.") from error


def parse_json(file: Path, text: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: If it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
