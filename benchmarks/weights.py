"""Copying of weights from one contestant to others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.bare import BareGPT
from benchmarks.bare_llama import BareLlama
from x_transformers import TransformerWrapper


@torch.no_grad()
def share_gpt(bare: BareGPT, ours: TransformerWrapper, other: nn.Module | None = None) -> None:
    """Copy the weights of a bare GPT without biases to ours and to Hugging Face's GPT-2, whose biases become 0."""
    ours.token_emb.emb.weight.copy_(bare.token_emb.weight)
    ours.pos_emb.emb.weight.copy_(bare.pos_emb.weight * bare.shape.dim**0.5)  # ours scales its embedding by D ** -0.5
    ours.attn_layers.final_norm.gamma.copy_(bare.norm.weight - 1)  # ours stores gains minus 1
    ours.to_logits.weight.copy_(bare.head.weight)
    sublayers = iter(ours.attn_layers.layers)
    for block in bare.blocks:
        first, second = next(sublayers), next(sublayers)
        first.norm.gamma.copy_(block.attn_norm.weight - 1)
        _into_attention(first.attention, *block.qkv.weight.chunk(3), block.out.weight)
        second.norm.gamma.copy_(block.ff_norm.weight - 1)
        second.feedforward.up.weight.copy_(block.up.weight)
        second.feedforward.down.weight.copy_(block.down.weight)
    if other is not None:
        _share_gpt2(bare, other)


def _share_gpt2(bare: BareGPT, other: nn.Module) -> None:
    core = other.transformer
    for name, parameter in other.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    core.wte.weight.copy_(bare.token_emb.weight)
    core.wpe.weight.copy_(bare.pos_emb.weight)
    core.ln_f.weight.copy_(bare.norm.weight)
    other.lm_head.weight.copy_(bare.head.weight)
    for theirs, block in zip(core.h, bare.blocks, strict=True):
        theirs.ln_1.weight.copy_(block.attn_norm.weight)
        theirs.attn.c_attn.weight.copy_(block.qkv.weight.T)  # GPT-2 stores matrices transposed
        theirs.attn.c_proj.weight.copy_(block.out.weight.T)
        theirs.ln_2.weight.copy_(block.ff_norm.weight)
        theirs.mlp.c_fc.weight.copy_(block.up.weight.T)
        theirs.mlp.c_proj.weight.copy_(block.down.weight.T)


@torch.no_grad()
def share_llama(bare: BareLlama, ours: TransformerWrapper, other: nn.Module | None = None) -> None:
    """Copy the weights of a bare Llama to ours and to Hugging Face's."""
    head = bare.shape.dim // bare.shape.heads
    ours.token_emb.emb.weight.copy_(bare.token_emb.weight)
    ours.attn_layers.final_norm.gamma.copy_(bare.norm.weight - 1)
    ours.to_logits.weight.copy_(bare.head.weight)
    sublayers = iter(ours.attn_layers.layers)
    for block in bare.blocks:
        first, second = next(sublayers), next(sublayers)
        first.norm.gamma.copy_(block.attn_norm.weight - 1)
        q, k, v = block.qkv.weight.chunk(3)
        _into_attention(first.attention, interleaved(q, head), interleaved(k, head), v, block.out.weight)
        second.norm.gamma.copy_(block.ff_norm.weight - 1)
        gate, up = block.gate_up.weight.chunk(2)
        second.feedforward.up.weight.copy_(torch.cat((up, gate)))
        second.feedforward.down.weight.copy_(block.down.weight)
    if other is not None:
        _share_hugging_face(bare, other)


def _share_hugging_face(bare: BareLlama, other: nn.Module) -> None:
    core = other.model
    core.embed_tokens.weight.copy_(bare.token_emb.weight)
    core.norm.weight.copy_(bare.norm.weight)
    other.lm_head.weight.copy_(bare.head.weight)
    for theirs, block in zip(core.layers, bare.blocks, strict=True):
        theirs.input_layernorm.weight.copy_(block.attn_norm.weight)
        attention, feedforward = theirs.self_attn, theirs.mlp
        for projection, weight in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), block.qkv.weight.chunk(3), strict=True
        ):
            projection.weight.copy_(weight)
        attention.o_proj.weight.copy_(block.out.weight)
        theirs.post_attention_layernorm.weight.copy_(block.ff_norm.weight)
        gate, up = block.gate_up.weight.chunk(2)
        feedforward.gate_proj.weight.copy_(gate)
        feedforward.up_proj.weight.copy_(up)
        feedforward.down_proj.weight.copy_(block.down.weight)


def interleaved(weight: Tensor, head: int) -> Tensor:
    """Reorder the rows of `(h d, D)` so that rotated pairs of features (k, k + d / 2) become neighbors, as in ours."""
    return weight.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).reshape(weight.shape)


def _into_attention(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    attention.projections.q.weight.copy_(q)
    attention.projections.k.weight.copy_(k)
    attention.projections.v.weight.copy_(v)
    attention.out.weight.copy_(out)
