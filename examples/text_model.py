"""What examples on text build alike: a small stack of layers, and how a model over bytes starts."""

from __future__ import annotations

from typing import TypeVar

import torch

from x_transformers import Decoder, Encoder, TransformerWrapper

Stack = TypeVar("Stack", Encoder, Decoder)


def small_stack(kind: type[Stack]) -> Stack:
    """Three layers with rotary positions and normalised queries and keys, each of which starts as the identity."""
    return kind(
        dim=96,
        depth=3,
        heads=3,
        attn_dim_head=32,
        rotary_pos_emb=True,
        rotary_emb_dim=32,
        attn_qk_rmsnorm=True,
        attn_zero_init_output=True,
        ff_zero_init_output=True,
    )


def start_evenly(net: TransformerWrapper) -> None:
    """Embeddings of unit variance, as the optimisers want them, and a head near zero: all bytes begin alike."""
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    torch.nn.init.normal_(net.to_logits.weight, std=1e-4)
