"""Classify handwritten digits with a vision transformer.

scikit-learn ships 1,797 digits of 8 x 8 pixels. A fifth of them is held out; the model trains on the others, each time
shifted by up to one pixel. The picture shows the held-out digits with the least confident predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

from x_transformers import Encoder, ViTransformerWrapper, plots
from x_transformers.training.small_runs import arguments, fit

SIDE, PATCH, CLASSES, BATCH, DRAWN = 8, 4, 10, 64, 30


def read_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images `(b, 1, 8, 8)` in [0, 1] and labels `(b,)`: four fifths for training, and the held-out fifth."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train_part, held_out = order.split([len(order) - len(order) // 5, len(order) // 5])
    return (images[train_part], labels[train_part]), (images[held_out], labels[held_out])


def shifted(images: Tensor) -> Tensor:
    """Shift each image by -1, 0 or 1 pixels along both axes, and fill with empty pixels."""
    b = len(images)
    pixel = torch.arange(SIDE)
    row, column = (pixel + torch.randint(3, (b, 1)) for _ in range(2))
    padded = F.pad(images, (1, 1, 1, 1))[:, 0]
    return padded[torch.arange(b)[:, None, None], row[:, :, None], column[:, None, :]].unsqueeze(1)


def build_model() -> ViTransformerWrapper:
    """Build three layers over the four patches of an image (0.15 million parameters)."""
    encoder = Encoder(dim=64, depth=3, heads=4, attn_dim_head=16)
    return ViTransformerWrapper(image_size=SIDE, patch_size=PATCH, channels=1, num_classes=CLASSES, attn_layers=encoder)


def draw(images: Tensor, titles: Sequence[str], right: Sequence[bool], path: Path) -> None:
    """Draw gray images `(count, h, w)` in [0, 1], ten in a row; titles of wrong answers are red."""
    rows = -(-len(images) // 10)
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(8, 0.95 * rows), layout="constrained")
        for axes in (grid := figure.subplots(rows, 10, squeeze=False)).flat:
            axes.axis("off")
        for axes, image, title, good in zip(grid.flat, images, titles, right, strict=False):
            axes.imshow(image.numpy(), cmap="Greys", vmin=0, vmax=1)
            axes.set_title(title, color="black" if good else "red", pad=2)
        figure.savefig(path, dpi=plots.DPI)


def main() -> None:
    options = arguments(__doc__, "vit_digits", steps=600)
    (images, labels), (new_images, new_labels) = read_digits()
    model = build_model().to(options.device)

    def loss() -> Tensor:
        drawn = torch.randint(len(images), (BATCH,))
        batch, right = shifted(images[drawn]).to(options.device), labels[drawn].to(options.device)
        return F.cross_entropy(model(batch), right)

    fit(model, loss, options.steps, lr=1e-2, muon_lr=2e-2)

    with torch.no_grad():
        sure, predicted = model(new_images.to(options.device)).softmax(dim=-1).cpu().max(dim=-1)
    right = predicted == new_labels
    print(f"held-out accuracy: {right.float().mean():.1%} ({int((~right).sum())} of {len(right)} digits wrong)")

    doubtful = sure.argsort()[:DRAWN]
    titles = [
        f"{guess}" if guess == label else f"{guess}, is {label}"
        for guess, label in zip(predicted[doubtful].tolist(), new_labels[doubtful].tolist(), strict=True)
    ]
    draw(new_images[doubtful, 0], titles, right[doubtful].tolist(), options.out / "digits.png")
    print(f"{options.out / 'digits.png'} shows the {DRAWN} least confident predictions.")


if __name__ == "__main__":
    main()
