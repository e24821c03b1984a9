"""What modules may work out beforehand while their weights stand still, as they do while a text is generated.

A token that is read alone costs little arithmetic and many small operations; those that depend on weights alone need
not be repeated for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Prepares(nn.Module):
    """A module that may keep something derived from its weights.

    Attributes:
        ready: what `prepare` worked out, or None; never a part of the state dict, and never there in training.
    """

    ready: Any = None

    def prepare(self) -> Any:
        """What to keep, or None if nothing is worth it."""
        raise NotImplementedError

    @property
    def at_hand(self) -> Any:
        """What was prepared, if this pass may read it: one with gradients must reach the weights themselves."""
        return None if self.ready is None or torch.is_grad_enabled() else self.ready


class Map(NamedTuple):
    """What `F.linear` needs of a linear map."""

    weight: Tensor
    bias: Tensor | None


def plain_map(module: nn.Module | None) -> Map | None:
    """The weights of a linear map, which may be read without calling it: for a single token the call takes longer than
    many products. None if somebody relies on the call (by a hook, another class, another `forward`), or has put another
    kind of tensor in the weight's place.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return None
    if module._forward_hooks or module._forward_pre_hooks or type(module.weight) is not nn.Parameter:
        return None
    return Map(module.weight, module.bias)


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
