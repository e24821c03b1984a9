"""Baseline of all benchmarks: a minimal fast GPT in bare PyTorch, without any code of the library.

It has learned absolute positions, pre-LayerNorm, one fused projection for queries, keys and values, SDPA, a GELU
feedforward of four times the width, and an untied head. Decoding follows gpt-fast: a static cache of buffers with a
fixed size, written by index, so that every step has the same shapes and compiles to one graph.

Shapes: `b` batch, `n` sequence, `h` heads, `d` head dim, `D` model dim, `S` context, `v` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, each `(b, h, S, d)`."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a model; `bias` adds biases to projections and norms."""

    vocab: int = 256
    context: int = 256
    layers: int = 6
    heads: int = 6
    dim: int = 384
    bias: bool = False


class Block(nn.Module):
    """Transformer block: `x + attention(norm(x))`, then `x + feedforward(norm(x))`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D, bias = shape.dim, shape.bias
        self.heads = shape.heads
        self.attn_norm = nn.LayerNorm(D, bias=bias)
        self.qkv = nn.Linear(D, 3 * D, bias=bias)
        self.out = nn.Linear(D, D, bias=bias)
        self.ff_norm = nn.LayerNorm(D, bias=bias)
        self.up = nn.Linear(D, 4 * D, bias=bias)
        self.down = nn.Linear(4 * D, D, bias=bias)

    def forward(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: `(b, n, D)` residual stream.
            cache: keys and values of this layer; those of `x` are written at the slots `position` first.
            position: `(n,)` slots in the cache.
            mask: `(n, S)` added to the scores: queries then attend to the whole cache (one decoding step), and
                otherwise causally to the tokens of `x`.

        Returns:
            `(b, n, D)`.
        """
        b, n, D = x.shape
        q, k, v = self.qkv(self.attn_norm(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0].index_copy_(2, position, k)
            cache[1].index_copy_(2, position, v)
        if mask is None:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).reshape(b, n, D))
        return x + self.down(F.gelu(self.up(self.ff_norm(x))))


class BareGPT(nn.Module):
    """GPT from tokens `(b, n)` to logits `(b, n, v)`, or to the mean cross-entropy if targets `(b, n)` are given."""

    slots: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_emb = nn.Embedding(shape.vocab, shape.dim)
        self.pos_emb = nn.Embedding(shape.context, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim, bias=shape.bias)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)
        self.register_buffer("slots", torch.arange(shape.context), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))  # into the residual stream, twice per layer
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Process whole sequences, as in training."""
        x = self.token_emb(tokens) + self.pos_emb.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
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
        position = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_emb(tokens) + self.pos_emb(position)
        for block, entry in zip(self.blocks, cache, strict=True):
            x = block(x, entry, position)
        return self.head(self.norm(x[:, -1]))

    def decode_one(self, token: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Read one token `(b,)`, and return the logits `(b, v)` of the next.

        `position (1,)` is a tensor, so that no step recompiles.
        """
        x = self.token_emb(token[:, None]) + self.pos_emb(position)
        # hides slots that are not written yet; additive, since a boolean mask would be converted in every layer
        mask = torch.where(self.slots <= position[:, None], 0.0, float("-inf")).to(x.dtype)
        for block, entry in zip(self.blocks, cache, strict=True):
            x = block(x, entry, position, mask)
        return self.head(self.norm(x[:, -1]))


class Decodes(Protocol):
    """Model that decodes over a static cache."""

    def empty_cache(self, batch: int) -> Cache: ...
    def prefill(self, tokens: Tensor, cache: Cache) -> Tensor: ...
    def decode_one(self, token: Tensor, position: Tensor, cache: Cache) -> Tensor: ...


@torch.inference_mode()
def generate(
    model: Decodes, prompt: Tensor, length: int, decode_one: Callable[[Tensor, Tensor, Cache], Tensor] | None = None
) -> Tensor:
    """Greedily continue `prompt (b, n)` by `length` tokens `(b, length)`; `decode_one` may be compiled."""
    step = decode_one or model.decode_one
    cache = model.empty_cache(prompt.shape[0])
    tokens = [model.prefill(prompt, cache).argmax(-1)]
    position = torch.tensor([prompt.shape[1]], device=prompt.device)
    while len(tokens) < length:
        tokens.append(step(tokens[-1], position, cache).argmax(-1))
        position = position + 1
    return torch.stack(tokens, 1)
