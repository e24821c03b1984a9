"""Functions that read and write files: arguments of other types are refused in words, and write nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import build

from x_transformers import load_pretrained
from x_transformers.checkpoints.files import load_model, read_model_file, save_model
from x_transformers.checkpoints.training import latest_checkpoint, load_checkpoint, save_checkpoint
from x_transformers.errors import CheckpointError, ConfigError, InputError

WRONG = (5, None, 1.5, b"x", ["x"], {"a": 1}, object(), torch.zeros(2), len)


def run(folder: Path) -> dict[str, Any]:
    model, optimizers = build()
    return {"folder": folder, "step": 1, "model": model, "optimizers": optimizers, "progress": {}}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[Path], dict[str, Any]], tuple[str, ...]]] = {
    # the function, valid arguments, those that WRONG has no valid value for
    "save_model": (save_model, lambda folder: {"model": build()[0], "path": folder / "m"}, ("model", "path")),
    "load_model": (load_model, lambda folder: {"path": folder / "m"}, ("path",)),
    "read_model_file": (read_model_file, lambda folder: {"path": folder / "m"}, ("path",)),
    "latest_checkpoint": (latest_checkpoint, lambda folder: {"folder": folder}, ("folder",)),
    "save_checkpoint": (save_checkpoint, run, ("folder", "model", "optimizers", "progress")),
    "load_checkpoint": (
        load_checkpoint,
        lambda folder: {"checkpoint": folder, **dict(zip(("model", "optimizers"), build(), strict=True))},
        ("checkpoint", "model", "optimizers"),
    ),
    "load_pretrained": (load_pretrained, lambda folder: {"folder": folder}, ("folder", "dtype")),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_other_types(name: str, tmp_path: Path) -> None:
    function, valid, names = CALLS[name]
    given = valid(tmp_path)
    for argument in names:
        for value in WRONG:
            if (argument, value) == ("dtype", None) or (argument == "progress" and isinstance(value, dict)):
                continue
            with pytest.raises((InputError, CheckpointError, ConfigError), match=f"`{argument}`"):
                function(**{**given, argument: value})
    assert list(tmp_path.iterdir()) == []
