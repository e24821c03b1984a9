"""Draw the pictures of the README from the library's own outputs: `python -m images.draw [NAME ...]`.

Some models are trained for it, which takes a few minutes; `--quick` draws with next to no training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from images.draw import attention, biases, filters, learning, masks, residuals, rotary, weightings
from images.draw.style import STYLE

FOLDER = Path(__file__).resolve().parents[1]
PICTURES = {
    "attention": attention.draw,
    "biases": biases.draw,
    "filters": filters.draw,
    "learning": learning.draw,
    "masks": masks.draw,
    "residuals": residuals.draw,
    "rotary": rotary.draw,
    "weightings": weightings.draw,
}


def draw(name: str, folder: Path, quick: bool = False) -> Path:
    """The picture of this name, into a folder."""
    path = folder / f"{name}.png"
    with plt.rc_context(STYLE):
        PICTURES[name](path, quick)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they go")
    parser.add_argument("--quick", action="store_true", help="with next to no training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, whatever the machine has
    for name in arguments.names or PICTURES:
        if name not in PICTURES:
            parser.error(f"there is no picture {name!r}; there are {', '.join(PICTURES)}.")
        print(draw(name, arguments.folder, arguments.quick))


if __name__ == "__main__":
    main()
