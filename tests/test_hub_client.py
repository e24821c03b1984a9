"""Calls of the Hugging Face hub fit the signatures and results of its own client."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from test_model_files import net, same

from x_transformers import TransformerWrapper, load_pretrained

client = pytest.importorskip("huggingface_hub", reason="needs the extra `hf`")


def test_uploads_and_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, commit = tmp_path / "stored", "https://huggingface.co/me/tiny/commit/abc"

    def keep(**given: Any) -> Any:
        shutil.copytree(given["folder_path"], stored)
        return client.CommitInfo(
            commit_url=commit, commit_message=given["commit_message"], commit_description="", oid="abc"
        )

    api = create_autospec(client.HfApi, instance=True)
    api.create_repo.return_value = client.RepoUrl("https://huggingface.co/me/tiny")
    api.upload_folder.side_effect = keep
    monkeypatch.setattr(client, "HfApi", create_autospec(client.HfApi, return_value=api))
    download = create_autospec(client.snapshot_download, return_value=str(stored))
    monkeypatch.setattr(client, "snapshot_download", download)
    model = net()
    assert model.push_to_hub("tiny", private=True, token="secret") == commit
    assert api.upload_folder.call_args.kwargs["repo_id"] == "me/tiny", "the owner is that of the token"
    # the client gets only what it would write into its cache: configurations and weights
    given = {"revision": "main", "token": "secret", "cache_dir": tmp_path, "local_files_only": True}
    assert same(model, TransformerWrapper.from_pretrained("me/tiny", **given))
    assert same(model, load_pretrained("me/tiny", **given))
    patterns = download.call_args.kwargs["allow_patterns"]
    kept = {path.name for path in client.utils.filter_repo_objects(stored.iterdir(), allow_patterns=patterns)}
    assert kept == {"config.json", "model.safetensors"}
