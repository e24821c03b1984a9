"""Baseline of the Llama family: a minimal fast Llama in bare PyTorch, without any code of the library.

It has RMSNorm, rotary embeddings of half-split features, one fused projection for queries, keys and values, another for
gate and up, SDPA, SwiGLU, no biases and an untied head. It decodes as `benchmarks.bare` does, with a static cache.

Shapes: `b` batch, `n` sequence, `h` heads, `d` head dim, `D` model dim, `S` context, `v` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bare import Cache, Shape

EPS = 1e-12  # ours adds next to nothing
BASE = 10000.0


def inner_width(dim: int) -> int:
    """Return the width of a feedforward: 8/3 of the model's, rounded up to a multiple of 256 for the matrix units."""
    return -(-8 * dim // (3 * 256)) * 256


class LlamaBlock(nn.Module):
    """Transformer block: `x + attention(norm(x))`, then `x + feedforward(norm(x))`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D, inner = shape.dim, inner_width(shape.dim)
        self.heads = shape.heads
        self.attn_norm = nn.RMSNorm(D, eps=EPS)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.ff_norm = nn.RMSNorm(D, eps=EPS)
        self.gate_up = nn.Linear(D, 2 * inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: `(b, n, D)` residual stream.
            cos: `(n, 1, 1, d)` table for the positions of `x`.
            sin: `(n, 1, 1, d)` table, negative for the first half of the features.
            cache: keys and values of this layer; those of `x` are written at the slots `position` first.
            position: `(n,)` slots in the cache.
            mask: `(n, S)` added to the scores: queries then attend to the whole cache (one decoding step), and
                otherwise causally to the tokens of `x`.

        Returns:
            `(b, n, D)`.
        """
        b, n, D = x.shape
        qk, v = self.qkv(self.attn_norm(x)).view(b, n, 3, self.heads, -1).split((2, 1), dim=2)
        q, k = rotate(qk, cos, sin).transpose(1, 3).unbind(2)
        v = v.squeeze(2).transpose(1, 2)
        if cache is not None:
            cache[0].index_copy_(2, position, k)
            cache[1].index_copy_(2, position, v)
        if mask is None:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).reshape(b, n, D))
        gate, up = self.gate_up(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of features `(k, k + d / 2)` of `x (b, n, 2, h, d)`, queries and keys at once."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


class BareLlama(nn.Module):
    """Llama from tokens `(b, n)` to logits `(b, n, v)`, or to the mean cross-entropy if targets `(b, n)` are given."""

    slots: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_emb = nn.Embedding(shape.vocab, shape.dim)
        self.blocks = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=EPS)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)
        d, slots = shape.dim // shape.heads, torch.arange(shape.context)
        angle = slots[:, None, None, None] * BASE ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), dim=-1), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Process whole sequences, as in training."""
        x, n = self.token_emb(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:n], self.sin[:n])
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def empty_cache(self, batch: int) -> Cache:
        """Allocate buffers for a whole context, with the dtype and device of the weights."""
        size = (batch, self.shape.heads, self.shape.context, self.shape.dim // self.shape.heads)
        new = self.token_emb.weight.new_zeros
        return [(new(size), new(size)) for _ in self.blocks]

    def prefill(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Read a prompt `(b, n)` into an empty cache, and return the logits `(b, v)` of the next token."""
        return self._read(tokens, torch.arange(tokens.shape[1], device=tokens.device), cache)

    def decode_one(self, token: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Read one token `(b,)`, and return the logits `(b, v)` of the next.

        `position (1,)` is a tensor, so that no step recompiles.
        """
        # hides slots that are not written yet; additive, since a boolean mask would be converted in every layer
        mask = self.cos.new_zeros(1, self.shape.context).masked_fill(self.slots > position[:, None], float("-inf"))
        return self._read(token[:, None], position, cache, mask)

    def _read(self, tokens: Tensor, position: Tensor, cache: Cache, mask: Tensor | None = None) -> Tensor:
        x, cos, sin = self.token_emb(tokens), self.cos[position], self.sin[position]
        for block, entry in zip(self.blocks, cache, strict=True):
            x = block(x, cos, sin, entry, position, mask)
        return self.head(self.norm(x[:, -1]))
