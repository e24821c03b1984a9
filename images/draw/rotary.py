"""Rotary angles, and their effect on the score of two equal vectors at a distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from images.draw.style import COLORS, matrix, panels, save
from x_transformers import Decoder
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.attention.qk.rotation import RotationTable, rotate

FEATURES, POSITIONS = 32, 129


def embedding(**options: Any) -> RotaryEmbedding:
    """Return the rotary embedding of a decoder with these options."""
    part = Decoder(dim=64, depth=1, heads=1, rotary_emb_dim=FEATURES, **options).rotary_pos_emb
    assert isinstance(part, RotaryEmbedding)
    return part


def rotated(part: RotaryEmbedding, pos: Tensor, sign: float) -> Tensor:
    """Return a unit vector of equal features as a query (sign 1) or key (sign -1) at each position, `(n, r)`."""
    angles, factor = part(pos)
    angles = angles[:, None, :, ::2]
    ones = torch.full((1, 1, len(pos), FEATURES), FEATURES**-0.5)
    vector = rotate(ones, RotationTable(angles.cos(), angles.sin()))[0, 0]
    return vector * factor[0] ** sign if isinstance(factor, Tensor) else vector


def scores(part: RotaryEmbedding) -> Tensor:
    """Return the dot product `(n,)` of the query at the last position and the key at each distance."""
    pos = torch.arange(POSITIONS)
    return (rotated(part, pos, -1.0) @ rotated(part, pos[-1:], 1.0)[0]).flip(0)


def draw(path: Path, quick: bool = False) -> None:
    """Draw cosines of the angles, and scores over distance."""
    plain = {"rotary_pos_emb": True}
    curves = {
        "rotary_pos_emb": plain,
        "rotary_interpolation_factor = 4": {**plain, "rotary_interpolation_factor": 4.0},
        "rotary_base_rescale_factor = 4": {**plain, "rotary_base_rescale_factor": 4.0},
        "rotary_xpos": {"rotary_xpos": True, "rotary_xpos_scale_base": 128},
    }
    figure, (left, right) = panels(2, (4.2, 3.0))
    angles, _ = embedding(**plain)(torch.arange(POSITIONS))
    image = matrix(left, angles[0, :, ::2].cos().T, "cosines of the rotary angles", cmap="RdBu_r", aspect="auto")
    left.set(xlabel="position", ylabel="pair of features", xticks=range(0, POSITIONS, 32))
    figure.colorbar(image, ax=left, ticks=[-1, 0, 1])
    for color, (name, options) in zip(COLORS, curves.items(), strict=True):
        right.plot(scores(embedding(**options)), color=color, label=name, linewidth=1.4)
    right.set(title="score of two vectors that are alike", xlabel="distance", xticks=range(0, POSITIONS, 32))
    right.axhline(0, color="#9aa0a6", linewidth=0.6)
    right.legend(fontsize=7.5)
    save(figure, path)
