"""What modules may work out beforehand while their weights stand still, as they do while a text is generated.

A token that is read alone costs little arithmetic and many small operations; those that depend on weights alone need
not be repeated for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Prepares(nn.Module):
    """A module that may keep something derived from its weights.

    Attributes:
        ready: what `prepare` worked out, or None; never a part of the state dict, and never there in training.
    """

    ready: Tensor | None = None

    def prepare(self) -> Tensor | None:
        """What to keep, or None if nothing is worth it."""
        raise NotImplementedError

    @property
    def at_hand(self) -> Tensor | None:
        """What was prepared, if this pass may read it: one with gradients must reach the weights themselves."""
        return None if self.ready is None or torch.is_grad_enabled() else self.ready


@contextmanager
def prepared(*modules: nn.Module) -> Iterator[None]:
    """Let all modules inside of these work out beforehand what they can. Weights must not change meanwhile."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, Prepares)]
    try:
        for part in parts:
            part.ready = part.prepare()
        yield
    finally:
        for part in parts:
            part.ready = None
