"""Find the files of an adapter, in a local directory or in a repository of the Hugging Face hub.

A repository has the same files as a local adapter directory. The package `huggingface_hub` downloads and caches
repositories.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from .config import CONFIG, WEIGHTS


_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: object) -> bool:
    """Return whether a name has the form `user/repo` and is not a local file or directory.

    Example:
        >>> is_repository("user/repo"), is_repository("./user/repo"), is_repository("a/b/c"), is_repository(Path("a/b"))
        (True, False, False, False)
    """
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def find_adapter(
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    optional: Sequence[str] = (),
) -> Path:
    """Return the local folder with an adapter's files. A repository is downloaded into huggingface_hub's cache.

    Args:
        path: A directory, or a repository such as `"user/repo"`. An existing local path takes precedence over a
            repository of the same name.
        adapter_name: See `load_adapter`.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder of the adapter in the directory or repository.
        optional: Names of optional files, which are downloaded if the repository has them.

    Raises:
        FileNotFoundError: If the hub has no such repository, revision or file.
        ConnectionError: If the hub can't be reached, and the cache does not contain the files.
        ValueError: If an argument is invalid, or `revision` is given for a local directory.
        OSError: If the hub refuses the request.
    """
    if subfolder is not None and (not isinstance(subfolder, str) or _leaves_its_folder(subfolder)):
        raise ValueError(f"subfolder must be a relative path such as 'adapters/first', got {subfolder!r}.")
    if not isinstance(revision, str | None) or revision == "":
        raise ValueError(f"revision must be a branch, tag or commit, or None, got {revision!r}.")
    if is_repository(path):
        adapter_folder(path, adapter_name)  # checks the name
        inside = PurePosixPath(subfolder or "") / ("" if adapter_name == "default" else adapter_name)
        return _download(str(path), revision, None if str(inside) == "." else str(inside), optional)
    if revision is not None:
        raise ValueError(
            f"revision={revision!r} applies only to a repository of the hub, but {path} is a local path: leave out "
            "revision."
        )
    return adapter_folder(Path(path) / (subfolder or ""), adapter_name)


def adapter_folder(path: str | os.PathLike[str], adapter_name: str) -> Path:
    """Return PEFT's folder for an adapter name: `path` for "default", `path / adapter_name` for any other name."""
    reserved = (".", "..", CONFIG, WEIGHTS)
    if (
        not isinstance(adapter_name, str)
        or not adapter_name
        or {*adapter_name} & {*"/\\\0"}
        or adapter_name in reserved
    ):
        raise ValueError(f"adapter_name must be a valid folder name without slashes, got {adapter_name!r}.")
    return Path(path) if adapter_name == "default" else Path(path) / adapter_name


@contextmanager
def hub_errors(repository: str, revision: str | None = None, tried: str = "") -> Iterator[Any]:
    """Yield the package `huggingface_hub`, and convert its errors to built-in exceptions with short messages.

    Args:
        repository: Name of the repository, for error messages.
        revision: Revision of the repository, for error messages.
        tried: Prefix of the error messages, such as "there is no local directory NAME, and ".

    Raises:
        ModuleNotFoundError: If the package is not installed.
        FileNotFoundError: If the hub has no such repository, revision or file.
        ConnectionError: If the hub can't be reached.
        ValueError: If the name of the repository is invalid.
        OSError: If the hub refuses the request.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{tried}the repository {repository} of the hub requires a package: pip install huggingface_hub.",
            name=error.name,
        ) from error
    unreachable = f"{tried}the hub can't be reached for the repository {repository}"
    try:
        yield hub
    except errors.RepositoryNotFoundError as error:  # also raised for a gated repository
        raise FileNotFoundError(
            f"{tried}the hub has no repository {repository} that you may access. If the repository is private or "
            "gated, log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the repository {repository} of the hub has no revision {revision!r}.") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"{unreachable}. The local cache does not contain the files.") from error
    except errors.OfflineModeIsEnabled as error:
        raise ConnectionError(f"{unreachable}: offline mode is on ($HF_HUB_OFFLINE).") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repository!r} is not a valid repository name: {error}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = " Log in with `hf auth login`." if status in (401, 403) else ""
        raise OSError(f"the hub refused the request for {repository} (HTTP status {status}).{hint}") from error
    except Exception as error:
        # huggingface_hub passes on errors of an HTTP library. Which library that is depends on the version of
        # huggingface_hub.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests"):
            raise
        raise ConnectionError(f"{unreachable}: {error}") from error


def _download(repository: str, revision: str | None, subfolder: str | None, optional: Sequence[str]) -> Path:
    folders = []
    with hub_errors(repository, revision, f"there is no local directory {repository}, and ") as hub:
        for name in (CONFIG, WEIGHTS, *optional):
            try:
                file = hub.hf_hub_download(repo_id=repository, filename=name, revision=revision, subfolder=subfolder)
            except hub.errors.EntryNotFoundError as error:
                if name in optional:
                    continue
                if isinstance(
                    error, hub.errors.LocalEntryNotFoundError
                ):  # the file is not in the cache, and the machine is offline
                    raise
                place = f"the folder {subfolder} of the repository" if subfolder else "the repository"
                raise FileNotFoundError(
                    f"{place} {repository} of the hub has no {name}. An adapter needs {CONFIG} and {WEIGHTS}; "
                    "the pickle adapter_model.bin is not supported."
                ) from error
            folders.append(Path(file).parent)
    if len({*folders}) > 1:  # folders of the cache have the names of commits
        raise OSError(f"the repository {repository} changed while it was downloaded: try again.")
    return folders[0]


def _leaves_its_folder(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return not parts or ".." in parts or parts[0] == "/" or "\\" in path
