"""Command-line options of `train_text.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def parsed(description: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file or folder of text; default Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("runs/train_text"), help="output folder of the run")
    parser.add_argument("--minutes", type=float, default=1.5, help="duration of training, without evaluation")
    parser.add_argument("--steps", type=int, help="number of training steps, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the model first")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--save-every",
        type=float,
        default=30,
        metavar="SECONDS",
        help="seconds between checkpoints, each with a picture",
    )
    parser.add_argument(
        "--look-every",
        type=float,
        default=20,
        metavar="SECONDS",
        help="seconds between evaluations, each with a sample",
    )
    return parser.parse_args()
