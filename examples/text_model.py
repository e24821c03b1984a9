"""Initialization of a model over bytes."""

from __future__ import annotations

import torch

from x_transformers import TransformerWrapper


def start_evenly(net: TransformerWrapper) -> None:
    """Initialize embeddings with unit variance and the head near zero: all bytes are equally likely at first."""
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    torch.nn.init.normal_(net.to_logits.weight, std=1e-4)
