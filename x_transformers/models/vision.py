"""A stack over the patches of an image (2010.11929), in the simple form of 2205.01580."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.layers.layers import AttentionLayers
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.configured import Configured


class ViTransformerWrapper(Configured, ReadsReference):
    """Images `(b, c, h, w)` to logits of classes, or to features of patches.

    Args:
        image_size, patch_size: sides of the square image and of its square patches; the first is a multiple of the
            second. Patches pass a LayerNorm, so one of a single number (1 x 1, one channel) would say nothing.
        attn_layers: the stack, bidirectional.
        channels: of the images.
        num_classes: width of the head; None: a pass returns the mean of the patches' features.
        post_emb_norm: LayerNorm behind the positions.
        num_register_tokens: learned tokens behind the patches, which the output leaves out (2309.16588).
        emb_dropout: dropout of the embedded patches.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        attn_layers: AttentionLayers,
        channels: int = 3,
        num_classes: int | None = None,
        post_emb_norm: bool = False,
        num_register_tokens: int = 0,
        emb_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(image_size, patch_size, channels, num_classes, num_register_tokens, emb_dropout, attn_layers)
        dim, width = attn_layers.dim, channels * patch_size**2
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.emb_dropout, self.num_register_tokens = emb_dropout, num_register_tokens
        self.pos_embedding = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2, dim))
        self.register_tokens = nn.Parameter(torch.randn(num_register_tokens, dim)) if num_register_tokens else None
        self.patch_to_embedding = nn.Sequential(LayerNorm(width), nn.Linear(width, dim), LayerNorm(dim))
        self.post_emb_norm = LayerNorm(dim) if post_emb_norm else None
        self.attn_layers = attn_layers
        self.mlp_head = nn.Identity() if num_classes is None else nn.Linear(dim, num_classes)

    def forward(
        self,
        img: Tensor,
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        *,
        condition: Tensor | None = None,
    ) -> Any:
        """Run the model.

        Args:
            img: `(b, c, h, w)`. A smaller image than `image_size` has fewer patches, whose positions are the first
                ones of the table, row by row.
            return_embeddings: features of the patches, `(b, patches, D)`.
            return_logits_and_embeddings: logits and these features.
            condition: `(b, c)`, for adaptive norms and scales of the stack.

        Returns:
            `(b, num_classes)` logits, or the mean of the patches' features, `(b, D)`, without classes.

        Raises:
            InputError: if both are asked for, or the image does not fit.
        """
        if return_embeddings and return_logits_and_embeddings:
            raise InputError("`return_embeddings` and `return_logits_and_embeddings` ask for two outputs; pass one.")
        x = self.patch_to_embedding(self._patches(img))
        patches = x.shape[1]
        x = x + self.pos_embedding[:, :patches]
        if self.post_emb_norm is not None:
            x = self.post_emb_norm(x)
        x = F.dropout(x, self.emb_dropout, self.training)
        if self.register_tokens is not None:
            x = torch.cat((x, self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1)), dim=1)
        features = self.attn_layers(x, condition=condition)[:, :patches]
        if return_embeddings:
            return features
        logits = self.mlp_head(features.mean(dim=1))
        return (logits, features) if return_logits_and_embeddings else logits

    def _patches(self, img: Tensor) -> Tensor:
        """`(b, patches, p * p * c)`, patches row by row; inside of a patch row, then column, then channel."""
        size, side = self.patch_size, self.image_size
        if img.ndim != 4 or img.shape[1] != self.channels or not img.is_floating_point():
            raise ShapeError(
                f"the image has shape {tuple(img.shape)} and dtype {img.dtype}; it must be floating, (batch, "
                f"{self.channels}, height, width)."
            )
        b, c, h, w = img.shape
        if h % size or w % size or not h or not w or (h // size) * (w // size) > (side // size) ** 2:
            raise ShapeError(
                f"the image is {h} x {w}; its sides must be multiples of `patch_size` = {size}, with no more patches "
                f"than the {side} x {side} of `image_size` has. Resize it, or build the model for its size."
            )
        cut = img.reshape(b, c, h // size, size, w // size, size)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, size * size * c)


def _check(
    image: int, patch: int, channels: int, classes: int | None, registers: int, dropout: float, layers: Any
) -> None:
    if not isinstance(layers, AttentionLayers) or layers.causal or layers.looks_back or layers.cross_attend:
        raise ConfigError(
            f"`attn_layers` is a {type(layers).__name__}; patches need a bidirectional stack without "
            "cross-attention: an Encoder."
        )
    if layers.packed:
        raise ConfigError("an image is one document, and its mean would be of many; drop `attn_flash_pack_seq`.")
    for name, value, least in (
        ("image_size", image, 1),
        ("patch_size", patch, 1),
        ("channels", channels, 1),
        ("num_register_tokens", registers, 0),
        ("num_classes", classes, 1),
    ):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ConfigError(f"`{name}` is {value!r}; it must be a whole number, at least {least}.")
    if image % patch:
        raise ConfigError(f"`image_size` is {image} and `patch_size` {patch}; the first must be a multiple.")
    if channels * patch**2 == 1:
        raise ConfigError(
            "`patch_size` and `channels` are 1: the norm on patches makes a constant of a patch of one number, so the "
            "model would not see its image; make patches larger."
        )
    if not 0 <= dropout < 1:
        raise ConfigError(f"`emb_dropout` is {dropout}; it must lie in [0, 1).")
