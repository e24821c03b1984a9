"""Convolutions between a spectrogram and the encoder of a speech model (2212.04356)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.options.schema import at_least


class ConvolutionalFront(LoadsWhole):
    """Two convolutions of width 3, each followed by GELU; the second one halves the number of frames.

    Args:
        channels: of the input, frequencies of a spectrogram.
        dim: width of the output.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        at_least(1, channels=channels, dim=dim)
        self.first = nn.Conv1d(channels, dim, 3, padding=1)
        self.second = nn.Conv1d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `(b, channels, n)` frames to `(b, ceil(n / 2), dim)`.

        Args:
            x: frames.
            mask: `(b, n)` bool, valid frames, which come first in each row. The others change nothing: a row has the
                output that it has by itself.
        """
        # a convolution pads with zeros after the last frame, and so has each row here after its own
        hidden = F.gelu(self.first(_valid(x, mask)))
        return F.gelu(self.second(_valid(hidden, mask))).mT


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask.unsqueeze(1), x, 0.0)
