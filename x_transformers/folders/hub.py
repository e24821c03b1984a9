"""Folders on the Hugging Face hub, if the extra `hf` is installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from x_transformers.errors import CheckpointError, ConfigError

REPO = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.safetensors")


def hub(purpose: str) -> ModuleType:
    """Import `huggingface_hub`.

    Raises:
        ConfigError: if it is not installed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"{purpose} needs the package `huggingface_hub`, which is not installed; install it with "
            "`pip install 'x-transformers[hf]'`."
        )
    return importlib.import_module("huggingface_hub")


def local_folder(folder: str | PathLike[str], revision: str | None = None, **options: Any) -> Path:
    """Return a folder on this machine; that of a repository is downloaded into the cache of the hub.

    Args:
        folder: path of a folder, or the id of a repository, "owner/name".
        revision: branch, tag or commit of the repository.
        options: further arguments of `huggingface_hub.snapshot_download`: `token`, `cache_dir`, `local_files_only`.

    Raises:
        CheckpointError: if there is no such folder, and no repository that can be read.
        ConfigError: if it is the id of a repository, and `huggingface_hub` is not installed.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    if not isinstance(folder, str) or not REPO.fullmatch(folder) or path.exists():
        raise CheckpointError(
            f"{folder} is no folder; pass the path of one, or the id of a repository of the Hugging Face hub, "
            '"owner/name".'
        )
    library = hub(f"{folder} is no folder on this machine; reading it from the Hugging Face hub")
    try:
        found = library.snapshot_download(folder, revision=revision, allow_patterns=list(FILES), **options)
    except Exception as error:  # errors of the network, of permissions, of the cache
        raise CheckpointError(
            f"{folder} is no folder on this machine, and cannot be read from the Hugging Face hub: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Path(found)


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | bool | None, message: str) -> str:
    """Create a repository, if it does not exist, and upload a folder; returns the address of the commit.

    Raises:
        ConfigError: if `huggingface_hub` is not installed.
    """
    api = hub("push_to_hub").HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message).commit_url
