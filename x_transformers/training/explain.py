"""The command `explain`: features, backends, parameters and operations of each layer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from x_transformers.errors import InputError
from x_transformers.options.configured import Configured
from x_transformers.training.command_line import Parser, add_flags, flag, number, read_options
from x_transformers.training.presets import PRESETS, build_model
from x_transformers.training.refusals import one_sentence
from x_transformers.training.trained import PLACES, local_place, trained_model

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Flags of the command."""

    device: str = flag("cpu", "type of the device to explain; it need not be there")
    dtype: str = flag("float32", "of queries and keys", choices=DTYPES)
    evaluation: bool = flag(False, "explain a pass without gradients, instead of training")
    seq_len: int | None = flag(None, "number of tokens; default the longest that the model takes", number(int, 1))


def explain(arguments: Sequence[str] | None = None) -> None:
    """Print the table of `explain()` of a model.

    Args:
        arguments: of the command line; default those of this process.
    """
    parser = Parser(prog="x-transformers explain", description=__doc__)
    parser.add_argument("model", help=f"{PLACES}; JSON file of a `config`; or a preset: {', '.join(PRESETS)}")
    add_flags(parser, Explained)
    given: argparse.Namespace = parser.parse_args(arguments)
    options = read_options(Explained, given)
    with one_sentence():
        model = _model(given.model)
        model = getattr(model, "net", model)
        if not callable(getattr(model, "explain", None)):
            raise InputError(f"{given.model} describes a {type(model).__name__}, which has no table of layers.")
        more = {} if options.seq_len is None else {"seq_len": options.seq_len}
        print(model.explain(options.device, getattr(torch, options.dtype), not options.evaluation, **more))


def _model(what: str) -> Any:
    """Build or load what a name describes."""
    if what in PRESETS:
        preset = PRESETS[what]
        with torch.device("meta"):
            return build_model(what, preset.vocabulary, preset.context)
    path = Path(what)
    if path.suffix != ".json":
        return trained_model(local_place(what))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); pass the file of a `config`.") from error
    with torch.device("meta"):
        return Configured.from_config(config)
