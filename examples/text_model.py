"""Parts of the text examples' models: a small stack of layers, and the initialization of a model over bytes."""

from __future__ import annotations

from typing import TypeVar

import torch

from x_transformers import Decoder, Encoder, TransformerWrapper

Stack = TypeVar("Stack", Encoder, Decoder)


def small_stack(kind: type[Stack]) -> Stack:
    """Build three layers with rotary positions and QK-RMSNorm; each sublayer starts as the identity."""
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
    """Initialize embeddings with unit variance and the head near zero: all bytes are equally likely at first."""
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    torch.nn.init.normal_(net.to_logits.weight, std=1e-4)
