"""What a stack is made of, in a table: features, backends and why, parameters, FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from x_transformers.attention.attention import Attention
from x_transformers.attention.backends.base import Situation
from x_transformers.attention.base import ScoreMod
from x_transformers.feedforward.feedforward import FeedForward


@dataclass(frozen=True)
class Row:
    """One sublayer.

    Attributes:
        name: its place in the model.
        features: the options that are on.
        backend: what weighs, or "" for a feedforward. why: the reason for it.
        parameters: how many.
        flops: of one token's forward pass, matrix products only, with `seq_len` keys.
    """

    name: str
    features: tuple[str, ...]
    backend: str
    why: str
    parameters: int
    flops: int


@dataclass(frozen=True)
class Explanation:
    """The table. `print` shows it; `rows` holds it as data."""

    title: str
    stack: tuple[str, ...]
    rows: tuple[Row, ...]
    parameters: int

    def __str__(self) -> str:
        lines = [self.title, f"stack: {', '.join(self.stack) or 'plain'}"]
        for row in self.rows:
            lines.append(
                f"  {row.name:<18} {row.parameters:>11,} parameters {row.flops:>13,} FLOPs/token  "
                + (f"{row.backend} ({row.why})  " if row.backend else "")
                + f"[{', '.join(row.features) or 'plain'}]"
            )
        total = sum(row.flops for row in self.rows)
        lines.append(f"in all {self.parameters:,} parameters, {total:,} FLOPs/token in the layers")
        return "\n".join(lines)

    __repr__ = __str__


ALWAYS_ON = {"structure", "stack", "norm", "norm_placement", "heads", "backend", "attention_output", "feedforward"}
"""Features that every model has; a table that names them says nothing."""


def explain_sublayers(
    layers: list[tuple[str, Attention | FeedForward]],
    *,
    causal: bool,
    bias: ScoreMod | None,
    situation: Situation,
    training: bool,
    seq_len: int,
) -> tuple[Row, ...]:
    """A row for each sublayer, given by name and function."""
    rows = []
    for name, fn in layers:
        features = tuple(feature for feature in fn.features if feature not in ALWAYS_ON)
        own = not name.endswith("cross-attention")
        backend, why, flops = fn.explain(
            situation, causal=causal and own, bias=bias if own else None, training=training, seq_len=seq_len
        )
        rows.append(Row(name, features, backend, why, count(fn), flops))
    return tuple(rows)


def count(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def situation_of(module: nn.Module, device: str | None, dtype: torch.dtype | None, training: bool | None) -> Situation:
    """Where the module is, unless told otherwise."""
    like = next(module.parameters())
    return Situation(
        device=torch.device(device).type if device is not None else like.device.type,
        dtype=dtype or like.dtype,
        grad=module.training if training is None else training,
    )
