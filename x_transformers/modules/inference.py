"""What modules may work out beforehand while their weights stand still, as they do while a text is generated.

A token that is read alone costs little arithmetic and many small operations; those that depend on weights alone need
not be repeated for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn


class PreparesForInference(nn.Module):
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


Plain = TypeVar("Plain", nn.Linear, nn.Embedding)


class Map(NamedTuple):
    """What `F.linear` needs of a linear map."""

    weight: Tensor
    bias: Tensor | None


def plain_map(module: nn.Module | None) -> Map | None:
    """The weights of a linear map, which may be read without calling it: for a single token the call takes longer than
    many products. None if somebody relies on the call.
    """
    return Map(module.weight, module.bias) if is_plain(module, nn.Linear) else None


def is_plain(module: nn.Module | None, kind: type[Plain]) -> TypeGuard[Plain]:
    """Whether nobody relies on the module being called (by a hook, another class, another `forward`), or has put
    another kind of tensor in the weight's place.
    """
    if module is None or type(module) is not kind or "forward" in module.__dict__:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks) and type(module.weight) is nn.Parameter


COPIED_BYTES = 2**23
"""Of tensors larger than this, reading them takes the time, not the number of calls; they are not copied."""


@contextmanager
def prepared(*modules: nn.Module) -> Iterator[None]:
    """Let all modules inside of these work out beforehand what they can. Weights must not change meanwhile."""
    inner = [part for module in modules for part in module.modules()]
    parts = [part for part in inner if isinstance(part, PreparesForInference)]
    with within_reach(inner):
        try:
            for part in parts:
                part.ready = part.prepare()
            yield
        finally:
            for part in parts:
                part.ready = None


@contextmanager
def within_reach(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Make the children of modules ordinary attributes of theirs. PyTorch finds a child by a Python function, once all
    else has failed, which takes longer than adding two rows of numbers. Children may be exchanged meanwhile.
    """
    held = [(m.__dict__, {name: child for name, child in m._modules.items() if child is not None}) for m in modules]
    try:
        for attributes, children in held:
            attributes.update(children)
        yield
    finally:
        for attributes, children in held:
            for name, child in children.items():
                if attributes.get(name) is child:
                    del attributes[name]
