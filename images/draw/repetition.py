"""A task that needs attention: sequences that repeat themselves, and small decoders that learn to go on.

Each row is a pattern of different tokens, said over and over; patterns have different lengths, so that a token's
follower is found by looking at what followed it before, and not by counting back.
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
    """`(rows, LENGTH)` ids, and the `(rows,)` lengths of their patterns."""
    patterns = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=-1)
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (rows,), generator=generator)
    return patterns.gather(1, torch.arange(LENGTH) % periods[:, None]), periods


def decoder(stack: Mapping[str, Any]) -> TransformerWrapper:
    layers = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, verbose=False, **stack)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers)


def train(stack: Mapping[str, Any], steps: int) -> tuple[TransformerWrapper, list[float]]:
    """The model, and for each step its loss over the tokens that are repetitions, in nats."""
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
