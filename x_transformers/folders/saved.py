"""Saving of models as folders, and sharing of them on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from x_transformers.errors import ConfigError
from x_transformers.folders.hub import hub, local_folder, upload
from x_transformers.folders.own import check_target, load_own, read_own_config, write_own
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.checked import checked_function
from x_transformers.options.configured import Configured

Write = Callable[[Any, Path, Mapping[str, Tensor] | None, int | str, str | None], None]

OTHER_FORMATS: dict[str, Write] = {}
"""Formats of other libraries, by name. Their modules, which know the models, enter them."""

CARD = """---
library_name: x-transformers
tags: [x-transformers]
---

A `{name}` of [x-transformers]({url}):

```python
from x_transformers import {name}

model = {name}.from_pretrained("{repo}")
```
"""
URL = "https://pypi.org/project/x-transformers"


class SavesFolders(Configured, ReadsReference):
    """Base class of models that are saved as folders: `config.json`, and their weights as safetensors."""

    pretrained_config: Mapping[str, Any] | None = None
    """Configuration of the folder of another library that the model was loaded from."""

    @checked_function
    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        format: Literal["x-transformers", "hf"] = "x-transformers",
        family: str | None = None,
        max_shard_size: int | str = "5GB",
        weights: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the configuration and the weights into a folder; `from_pretrained` builds the model again.

        No pickle is written. New files appear after all of them are on the disk.

        Args:
            folder: is made if it is not there; files of an earlier model in it are replaced.
            format: "x-transformers", or "hf" for a folder of Hugging Face's transformers, which libraries for serving
                read as well.
            family: with "hf", the `model_type`; default that of the folder from which the model was loaded, or the
                first that has all options of the model.
            max_shard_size: size at which another file begins, in bytes or as a string such as "5GB".
            weights: gathered weights, for a model that is sharded over processes; default the model's own.

        Returns:
            The folder.

        Raises:
            CheckpointError: if a file cannot be written.
            ConfigError: with "hf", if no family (or not this one) has the options of the model; the sentence names
                those that it lacks.
            InputError: if `max_shard_size` is no size.
        """
        path = Path(folder)
        if format != "x-transformers":
            OTHER_FORMATS[format](self, path, weights, max_shard_size, family)
        elif family is not None:
            raise ConfigError('`family` chooses among the families of `format = "hf"`; drop it, or pass this format.')
        else:
            write_own(self, path, weights, max_shard_size)
        return path

    @classmethod
    @checked_function
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        **objects: Any,
    ) -> Self:
        """Build the model of a folder that `save_pretrained` has written, in evaluation mode.

        The model is built without memory, and its weights are pages of the files: there is no second copy of them.
        The files may be replaced afterwards, but not overwritten. Random states do not change.

        Args:
            folder: its path, or the id of a repository of the Hugging Face hub, "owner/name".
            device: of the model.
            dtype: of its weights; default those of the files.
            revision: branch, tag or commit of the repository.
            token: for the hub.
            cache_dir: where files of the hub are kept.
            local_files_only: do not use the network.
            objects: the options that are not plain data, by name; see `from_config`.

        Raises:
            CheckpointError: if a file is missing or damaged, or written by a later release.
            ConfigError: if it is a model of another class, or of another library.
            StateDictError: if the weights do not fit the configuration.
        """
        target = check_target(device, dtype)
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        path = local_folder(folder, revision, **options)
        about = read_own_config(path)
        return load_own(path, about, objects, target, dtype, cls)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload model",
        **options: Any,
    ) -> str:
        """Save the model and upload it to a repository of the Hugging Face hub, which is created if it is not there.

        Args:
            repo_id: "owner/name".
            private: visibility of a new repository; default that of the owner.
            token: for the hub.
            commit_message: of the commit.
            options: of `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: if `huggingface_hub` is not installed, or as `save_pretrained` raises it.
        """
        hub("push_to_hub")
        with tempfile.TemporaryDirectory() as folder:
            path = self.save_pretrained(folder, **options)
            if options.get("format", "x-transformers") == "x-transformers":
                card = CARD.format(name=type(self).__name__, repo=repo_id, url=URL)
                (path / "README.md").write_text(card, encoding="utf-8")
            return upload(path, repo_id, private=private, token=token, message=commit_message)
