"""The command `convert`: a folder of this library or of transformers from any model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.checkpoints.folder import find_model
from x_transformers.errors import InputError
from x_transformers.folders.saved import SavesFolders
from x_transformers.folders.writing import CONFIG
from x_transformers.training.command_line import Parser, add_flags, flag, read_options
from x_transformers.training.refusals import one_sentence
from x_transformers.training.settings import read_flag_setting
from x_transformers.training.tokenizer import FILE
from x_transformers.training.trained import PLACES, local_place, trained_model

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("x-transformers", "hf")
TOKENIZERS = (
    FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files with a tokenizer, and how texts of it begin and end."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Flags of the command."""

    format: Literal["x-transformers", "hf"] = flag(
        "x-transformers", "that of this library, or hf for a folder of transformers", choices=FORMATS
    )
    family: str | None = flag(None, "model_type of a folder of transformers; default the first that fits")
    dtype: str | None = flag(None, "of the weights; default that of the model", choices=DTYPES)
    set: tuple[tuple[str, Any], ...] = flag(
        (),
        "keyword that replaces one of the folder, or one of a state dict of x-transformers, several times",
        read_flag_setting,
        metavar="KEY=VALUE",
    )


def convert(arguments: Sequence[str] | None = None) -> None:
    """Write the folder of a model.

    Args:
        arguments: of the command line; default those of this process.
    """
    parser = Parser(prog="x-transformers convert", description=__doc__)
    parser.add_argument("model", help=f"{PLACES}, or state dict of x-transformers with its keywords as --set")
    parser.add_argument("out", type=Path, help="folder to write")
    add_flags(parser, Conversion)
    given = parser.parse_args(arguments)
    options = read_options(Conversion, given)
    with one_sentence():
        place = local_place(given.model)
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        model = trained_model(place, dtype=dtype, **dict(options.set))
        if options.format == "hf" and isinstance(model, AutoregressiveWrapper):
            model = model.net
        if not isinstance(model, SavesFolders):
            raise InputError(f"{given.model} contains a {type(model).__name__}, which has no folder; pass a model.")
        model.save_pretrained(given.out, format=options.format, family=options.family)
        copied = copy_tokenizer(place, given.out)
    print(f"{given.out} contains a {type(model).__name__}{' and its tokenizer' if copied else ''}.")


def copy_tokenizer(place: Path, out: Path) -> bool:
    """Copy the files of a tokenizer into the folder of a model, and return True if there are any.

    Args:
        place: run, file or folder that has the tokenizer.
        out: folder of the model.
    """
    if place.is_file() or (place / CONFIG).is_file():
        folders = [place if place.is_dir() else place.parent]
    else:
        folders = [*find_model(place).parents][:3]
    found = {name: folder / name for folder in folders for name in TOKENIZERS if (folder / name).is_file()}
    for name, path in found.items():
        if path.resolve() != (out / name).resolve():
            shutil.copyfile(path, out / name)
    return any(name != "generation_config.json" for name in found)
