"""Push an adapter directory to the Hugging Face hub."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from .card import CARD, card_text
from .checkpoint import read_files
from .config import CONFIG, METADATA, WEIGHTS
from .hub import hub_errors
from .peft_keys import key_from_peft


def push_adapter(
    path: str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    message: str = "Upload a VeRA adapter",
) -> str:
    """Push an adapter directory to a repository of the Hugging Face hub, in one commit.

    `load_adapter(repository, model)` loads the pushed adapter. The repository is created if it does not exist. Only
    `adapter_config.json`, `adapter_model.safetensors`, the model card `README.md`, and the command line's
    `vera_func.json` are pushed. If the directory has no model card, a card is generated.

    Args:
        path: A directory as written by `save_adapter` or PEFT. The directory is not modified.
        repository: `"user/repo"`. The access token is that of `hf auth login` or `HF_TOKEN`.
        revision: Branch to push to, created if it does not exist. None means the main branch.
        subfolder: Folder in the repository. None means its root.
        private: Whether a new repository is private. None means the account's default.
        message: Commit message.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError: If the directory contains no adapter, or you may not access the repository.
        ConnectionError: If the hub can't be reached.
        ValueError: If the adapter is damaged, or the repository's name is invalid.
        OSError: If the hub refuses the request.
    """
    if not isinstance(repository, str):
        raise ValueError(f"repository must be a name such as 'user/repo', got {type(repository).__name__}.")
    folder = Path(path)
    config, tensors = read_files(folder)
    params = {key: value for name, value in tensors.items() if (key := key_from_peft(name)) is not None}
    with TemporaryDirectory() as staged:
        for name in (CONFIG, WEIGHTS, CARD, METADATA):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(staged) / name)
        if not (folder / CARD).is_file():
            (Path(staged) / CARD).write_text(card_text(params, config), encoding="utf-8")
        with hub_errors(repository, revision) as hub:
            api = hub.HfApi()
            api.create_repo(repo_id=repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id=repository, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=staged,
                path_in_repo=subfolder,
                revision=revision,
                commit_message=message,
            )
    return str(commit)
