"""The same decoder three times: bare PyTorch, this library, Hugging Face's GPT-2."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.bare import BareGPT, Shape
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper


def bare(shape: Shape) -> BareGPT:
    return BareGPT(shape)


def ours(
    shape: Shape, *, loss_chunk_size: int | None = None, checkpoint_every: int | None = None
) -> AutoregressiveWrapper:
    return AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=shape.vocab,
            max_seq_len=shape.context,
            attn_layers=Decoder(
                dim=shape.dim,
                depth=shape.layers,
                heads=shape.heads,
                attn_dim_head=shape.dim // shape.heads,
                ff_no_bias=not shape.bias,
                checkpoint_every=checkpoint_every,
            ),
        ),
        loss_chunk_size=loss_chunk_size,
    )


def hugging_face(shape: Shape) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.context,
        n_embd=shape.dim,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def batch(shape: Shape, rows: int) -> torch.Tensor:
    """`(rows, context)` random ids."""
    return torch.randint(0, shape.vocab, (rows, shape.context))
