"""Classify handwritten digits with a vision transformer.

scikit-learn ships 1,797 digits of 8 x 8 pixels. A fifth of them is held out; the model trains on the others, each time
shifted by up to one pixel. The picture shows the held-out digits with the least confident predictions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pictures import labeled_images
from sklearn.datasets import load_digits
from torch import Tensor
from training import arguments, train

from x_transformers import Encoder, ViTransformerWrapper

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


def main() -> None:
    options = arguments(__doc__, "vit_digits", steps=600)
    (images, labels), (new_images, new_labels) = read_digits()
    model = build_model()

    def loss() -> Tensor:
        drawn = torch.randint(len(images), (BATCH,))
        return F.cross_entropy(model(shifted(images[drawn])), labels[drawn])

    train(model, loss, options.steps, lr=1e-2, muon_lr=2e-2)

    with torch.no_grad():
        sure, predicted = model(new_images).softmax(dim=-1).max(dim=-1)
    right = predicted == new_labels
    print(f"held-out accuracy: {right.float().mean():.1%} ({int((~right).sum())} of {len(right)} digits wrong)")

    doubtful = sure.argsort()[:DRAWN]
    titles = [
        f"{guess}" if guess == label else f"{guess}, is {label}"
        for guess, label in zip(predicted[doubtful].tolist(), new_labels[doubtful].tolist(), strict=True)
    ]
    labeled_images(new_images[doubtful, 0], titles, right[doubtful].tolist(), options.out / "digits.png")
    print(f"{options.out / 'digits.png'} shows the {DRAWN} least confident predictions.")


if __name__ == "__main__":
    main()
