"""A stack over the patches of an image (2010.11929), in the simple form of 2205.01580."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError, ShapeError, StateDictError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.layers.batch_norms import AdvancesNorms
from x_transformers.layers.experts import TrainsExperts
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.embeddings import build_embedding_norm
from x_transformers.models.heads import FirstTokenPool
from x_transformers.models.map_pool import MapPool
from x_transformers.models.options.base import ModelOptions, check_size
from x_transformers.models.options.catalog import VISION
from x_transformers.models.options.reading import read_options, show_options
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32


class ViTransformerWrapper(SavesFolders, TrainsExperts, AdvancesNorms):
    """Images `(b, c, h, w)` to logits of classes, or to the mean of patch features.

    Args:
        image_size, patch_size: sides of the square image and of its square patches; the first is a multiple of the
            second. Patches pass a LayerNorm, so a patch must have more than one number.
        attn_layers: the stack, bidirectional.
        channels: of the images.
        num_classes: width of the head; None: a pass returns the features that it would read: those of the class token
            (`(b, c, D)` of several), what `map_pool` returns, or the mean of the patches' features.
        keywords: see below.

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
        **keywords: Any,
    ) -> None:
        super().__init__()
        _check_stack(attn_layers)
        options = read_options(type(self), VISION, attn_layers, keywords)
        _check_sizes(image_size, patch_size, channels, num_classes, options.patch_norm)
        dim, width = attn_layers.dim, channels * patch_size**2
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.interpolate_positions: bool = options.interpolate_positions
        self.emb_dropout, self.num_register_tokens = options.emb_dropout, options.num_register_tokens
        classes = self.num_cls_tokens = options.num_cls_tokens if options.use_cls_token else 0
        self.cls_token = nn.Parameter(torch.randn(classes, dim) * 0.02) if classes else None
        self.pos_embedding = nn.Parameter(torch.randn(1, classes + (image_size // patch_size) ** 2, dim))
        registers = options.num_register_tokens
        self.register_tokens = nn.Parameter(torch.randn(registers, dim)) if registers else None
        norms = (LayerNorm(width), LayerNorm(dim)) if options.patch_norm else (nn.Identity(), nn.Identity())
        self.patch_to_embedding = nn.Sequential(norms[0], nn.Linear(width, dim), norms[1])
        self.first_token_pool = FirstTokenPool(dim) if options.first_token_pool else None
        self.map_pool = _build_map_pool(options, attn_layers)
        self.post_emb_norm = build_embedding_norm(options, dim)
        self.attn_layers = attn_layers
        self.mlp_head = nn.Identity() if num_classes is None else nn.Linear(dim, num_classes)

    @checked
    def forward(
        self,
        img: Tensor,
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        *,
        condition: Tensor | None = None,
        return_aux_loss: bool = False,
    ) -> Any:
        """Run the model.

        Args:
            img: `(b, c, h, w)`. An image smaller than `image_size` has fewer patches, whose positions are the first
                ones of the table, row by row. With `interpolate_positions` images have any size, and the grid of
                positions is resized to them.
            return_embeddings: return features of the patches, `(b, patches, D)`, without class tokens.
            return_logits_and_embeddings: return logits and these features.
            condition: `(b, c)`, for adaptive norms and scales of the stack.
            return_aux_loss: also return the intermediates, with `aux_loss`, the losses of experts.

        Returns:
            `(b, num_classes)` logits, or the features that a head would read, `(b, D)`. With several class tokens, one
            of these for each: `(b, c, ...)`. With `return_aux_loss` a pair of it and the intermediates.

        Raises:
            InputError: if both are requested, or the image does not fit.
        """
        if return_embeddings and return_logits_and_embeddings:
            raise InputError("`return_embeddings` and `return_logits_and_embeddings` request two outputs; pass one.")
        x = self.patch_to_embedding(self._patches(img))
        patches = x.shape[1]
        classes = self.num_cls_tokens
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self._positions(img.shape[-2] // self.patch_size, img.shape[-1] // self.patch_size)
        if self.post_emb_norm is not None:
            x = self.post_emb_norm(x)
        x = F.dropout(x, self.emb_dropout, self.training)
        if self.register_tokens is not None:
            x = torch.cat((x, self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1)), dim=1)
        out = self.attn_layers(x, condition=condition, return_aux_loss=return_aux_loss)
        out, record = out if return_aux_loss else (out, None)
        features = out[:, classes : classes + patches]
        result: Any = features if return_embeddings else self.mlp_head(self._summary(out, features))
        if return_logits_and_embeddings:
            result = (result, features)
        return result if record is None else (result, record)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return the embeddings `(1, c + rows * columns, D)` of class tokens and of a grid of patches."""
        classes, side, table = self.num_cls_tokens, self.image_size // self.patch_size, self.pos_embedding
        if not self.interpolate_positions or rows == columns == side:
            return table[:, : classes + rows * columns]
        grid = rearrange(table[:, classes:], "1 (h w) d -> 1 d h w", h=side)
        # interpolating in lower precision would move the embeddings
        grid = F.interpolate(at_least_float32(grid), (rows, columns), mode="bicubic").to(table.dtype)
        return torch.cat((table[:, :classes], rearrange(grid, "1 d h w -> 1 (h w) d")), dim=1)

    def _summary(self, out: Tensor, features: Tensor) -> Tensor:
        """Return what the head reads, of the output of the stack and the features of the patches."""
        if self.first_token_pool is not None:
            return self.first_token_pool(out)
        if self.map_pool is not None:
            return self.map_pool(features)
        if self.num_cls_tokens == 0:
            return features.mean(dim=1)
        return out[:, 0] if self.num_cls_tokens == 1 else out[:, : self.num_cls_tokens]

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        without_norm = not isinstance(self.patch_to_embedding[0], LayerNorm)
        if self.cls_token is not None or self.map_pool is not None or without_norm:
            raise StateDictError(
                "the reference has neither `use_cls_token` of images nor `map_pool` nor `patch_norm = False`; a model "
                "with one cannot be exported."
            )
        super().export_reference(state, prefix)

    def _patches(self, img: Tensor) -> Tensor:
        """Cut images `(b, c, h, w)` into patches `(b, patches, p * p * c)`, in rows; channels are the last axis."""
        size, side = self.patch_size, self.image_size
        if img.ndim != 4 or img.shape[1] != self.channels or not img.is_floating_point():
            raise ShapeError(
                f"the image has shape {tuple(img.shape)} and dtype {img.dtype}; it must be floating, (batch, "
                f"{self.channels}, height, width)."
            )
        h, w = img.shape[-2:]
        most = None if self.interpolate_positions else (side // size) ** 2
        if h % size or w % size or not h or not w or (most is not None and (h // size) * (w // size) > most):
            raise ShapeError(
                f"the image is {h} x {w}; its sides must be multiples of `patch_size` = {size}, with no more patches "
                f"than the {side} x {side} of `image_size` has. Resize it, build the model for its size, or set "
                "`interpolate_positions`."
            )
        return rearrange(img, "b c (rows p) (columns q) -> b (rows columns) (p q c)", p=size, q=size)


def _check_stack(layers: Any) -> None:
    layers = unwrapped(layers)
    if not isinstance(layers, AttentionLayers) or layers.causal or layers.looks_back or layers.cross_attend:
        raise ConfigError(
            f"`attn_layers` is a {type(layers).__name__}; patches need a bidirectional stack without "
            "cross-attention: an Encoder."
        )
    if layers.packed:
        raise ConfigError("an image is one document, and its mean would be of many; drop `attn_flash_pack_seq`.")


def _build_map_pool(options: ModelOptions, layers: AttentionLayers) -> MapPool | None:
    """Build what pools the patches by attention, or return None if the options request none."""
    if not options.map_pool:
        return None
    return MapPool(
        layers.dim,
        layers.attn_heads,
        layers.attn_dim_head,
        options.map_pool_mult,
        options.map_pool_activation,
        options.map_pool_eps,
    )


def _check_sizes(image: int, patch: int, channels: int, classes: int | None, norm: bool) -> None:
    for name, value in (("image_size", image), ("patch_size", patch), ("channels", channels)):
        check_size(name, value)
    if classes is not None:
        check_size("num_classes", classes)
    if image % patch:
        raise ConfigError(f"`image_size` is {image} and `patch_size` {patch}; the first must be a multiple.")
    if channels * patch**2 == 1 and norm:
        raise ConfigError(
            "`patch_size` and `channels` are 1: the norm of a patch with one number is constant, so the model would "
            "not depend on its image; make patches larger."
        )


show_options(ViTransformerWrapper, VISION)
