"""Command-line options of `train_text.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """Parser that reports a wrong option in one sentence, and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message[0].upper()}{message[1:]}; see --help.\n")


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


def parsed(description: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file or folder of text; default Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("runs/train_text"), help="output folder of the run")
    parser.add_argument(
        "--minutes", type=number(float, 0.001), default=1.5, help="duration of training, without evaluation"
    )
    parser.add_argument("--steps", type=number(int, 1), help="number of training steps, instead of --minutes")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the model first")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--save-every",
        type=number(float, 0),
        default=30,
        metavar="SECONDS",
        help="seconds between checkpoints, each with a picture",
    )
    parser.add_argument(
        "--look-every",
        type=number(float, 0),
        default=20,
        metavar="SECONDS",
        help="seconds between evaluations, each with a sample",
    )
    return parser.parse_args()
