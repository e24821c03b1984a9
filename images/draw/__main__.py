"""Draw the pictures of the documentation from outputs of the library: `python -m images.draw [NAME ...]`.

Some pictures need trained models, which takes a few minutes; `--quick` draws after a few training steps only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from images.draw import attention, biases, filters, learning, masks, mixers, residuals, rotary, weightings
from images.draw.style import STYLE

FOLDER = Path(__file__).resolve().parents[1]
PICTURES = {
    "attention": attention.draw,
    "biases": biases.draw,
    "filters": filters.draw,
    "learning": learning.draw,
    "masks": masks.draw,
    "mixers": mixers.draw,
    "residuals": residuals.draw,
    "rotary": rotary.draw,
    "weightings": weightings.draw,
}


def draw(name: str, folder: Path, quick: bool = False) -> Path:
    """Draw the picture of this name into a folder, and return its path."""
    path = folder / f"{name}.png"
    with plt.rc_context(STYLE):
        PICTURES[name](path, quick)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"pictures to draw, out of {', '.join(PICTURES)}; default all"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="output folder")
    parser.add_argument("--quick", action="store_true", help="draw after a few training steps only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums must not depend on the machine
    for name in arguments.names or PICTURES:
        if name not in PICTURES:
            parser.error(f"there is no picture {name!r}; there are {', '.join(PICTURES)}.")
        print(draw(name, arguments.folder, arguments.quick))


if __name__ == "__main__":
    main()
