"""A task that needs attention: repeating sequences, and small decoders that learn to continue them.

Each row repeats a pattern of distinct tokens. Patterns have different lengths, so that the next token is found by
attending to what followed the current token earlier, not by counting back.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

VOCABULARY, LENGTH, PERIODS, ROWS = 32, 40, (10, 20), 32


def repeated(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return repeating ids `(rows, LENGTH)`, and the lengths `(rows,)` of their patterns."""
    patterns = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=-1)
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (rows,), generator=generator)
    return patterns.gather(1, torch.arange(LENGTH) % periods[:, None]), periods


def decoder(stack: Mapping[str, Any]) -> TransformerWrapper:
    layers = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, verbose=False, **stack)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers)


def train(stack: Mapping[str, Any], steps: int) -> tuple[TransformerWrapper, list[float]]:
    """Train a decoder; return it, and for each step its loss on the repeated tokens, in nats."""
    return _trained(tuple(stack.items()), steps)


@functools.cache
def _trained(stack: tuple[tuple[str, Any], ...], steps: int) -> tuple[TransformerWrapper, list[float]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = decoder(dict(stack))
    wrapper = AutoregressiveWrapper(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    losses = []
    for _ in range(steps):
        tokens, periods = repeated(ROWS, generator)
        loss, (logits, _) = wrapper(tokens, return_outputs=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        again = torch.arange(1, LENGTH) >= periods[:, None]
        losses.append(F.cross_entropy(logits.detach()[again], tokens[:, 1:][again]).item())
    return model.eval(), losses
