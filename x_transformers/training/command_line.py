"""Command lines: options that come from the fields of a dataclass, and errors in one sentence with exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

Options = TypeVar("Options")


class Parser(argparse.ArgumentParser):
    """Parser that reports a wrong option in one sentence and ends with exit code 2; its help shows defaults."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Report a wrong option, and exit.

        Args:
            message: what is wrong.
        """
        self.exit(2, f"{message[0].upper()}{message[1:]}; see --help.\n")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help that keeps the lines of the description, and shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default == [] or isinstance(action.default, bool)
        return action.help if unset else super()._get_help_string(action)


def flag(default: Any, text: str, read: Callable[[str], Any] = str, **more: Any) -> Any:
    """Make a field of options, which is a flag of the command line.

    Args:
        default: its value; a boolean makes a switch, a tuple a flag that may be given several times.
        text: its help.
        read: function that reads a value.
        more: arguments of `argparse`: `choices`, `metavar`.
    """
    return dataclasses.field(default=default, metadata={"help": text, "read": read, **more})


def add_flags(parser: argparse.ArgumentParser, options: type, **defaults: Any) -> None:
    """Add the flags of a dataclass of options.

    Args:
        parser: that gets them.
        options: the dataclass; fields that `flag` did not make are left out.
        defaults: defaults of a command that differ from those of the dataclass.
    """
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:
            continue
        more = dict(field.metadata)
        read, default = more.pop("read"), defaults.get(field.name, field.default)
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif isinstance(default, tuple):
            more |= {"type": read, "action": "append"}
            default = list(default)
        else:
            more["type"] = read
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=default, **more)


def read_options(options: type[Options], given: argparse.Namespace) -> Options:
    """Build the dataclass of options from parsed arguments."""
    names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    values = {name: value for name, value in vars(given).items() if name in names}
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """Return a function that reads a number from `least` to `most`.

    Args:
        kind: int or float.
        least, most: bounds. A number without an upper bound is finite.
    """

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and (value < math.inf or kind is int)):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' if kind is int else ''}number of at least {least:g}"
                + (f" and at most {most:g}" if most < math.inf else "")
            )
        return value

    return read


def device(text: str) -> str:
    """Check the name of a device of this machine."""
    try:
        kind = torch.device(text)
        if kind.type == "meta":
            raise RuntimeError("it has no values")
        torch.empty(0, device=kind)
    except Exception as error:  # each kind of device has its own errors
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine ({reason[:200]})") from error
    return text


def default_device() -> str:
    """Return "cuda" if PyTorch has a GPU, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def typed(*words: object, script: str | None = None) -> str:
    """Return a command to type: this Python, and a script or the commands of this package.

    Args:
        words: after the script.
        script: path of the script; default the package.
    """
    python = Path(sys.executable)
    here = Path.cwd()
    if python.is_relative_to(here):
        shown = str(python.relative_to(here))
    else:
        found = shutil.which(python.name)
        shown = python.name if found is not None and Path(found) == python else str(python)
    start = [shown, "-m", "x_transformers"] if script is None else [shown, script]
    return shlex.join([*start, *map(str, words)])
