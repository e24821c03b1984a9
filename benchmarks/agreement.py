"""Check that contestants compute the same, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.contestants import Contestant

CLOSE = 1e-4
TOKENS, NEW = 64, 8


@torch.no_grad()
def check(contestants: Mapping[str, Contestant], tokens: Tensor) -> None:
    """Compare logits, losses and greedy continuations of all contestants of one family with those of the first.

    A continuation agrees if each of its tokens is the most likely one for the first model, up to rounding.

    Args:
        contestants: contestants with the same weights, in float32.
        tokens: `(b, n)` ids; at most 64 of each row are read.

    Raises:
        AssertionError: if a contestant disagrees; the message names it and the difference.
    """
    name, first = next(iter(contestants.items()))
    tokens = tokens[:, :TOKENS]
    given, new = tokens[:, : tokens.shape[1] // 2], min(NEW, tokens.shape[1] // 2)
    wanted, loss = first.logits(tokens), first.loss(tokens)
    for each, contestant in contestants.items():
        agree(f"logits of {each} and {name}", contestant.logits(tokens), wanted)
        agree(f"losses of {each} and {name}", contestant.loss(tokens), loss)
        whole = torch.cat((given, contestant.generate(given, new, None)), dim=1)
        likeliest = first.logits(whole)[:, given.shape[1] - 1 : -1]
        chosen = likeliest.gather(-1, whole[:, given.shape[1] :, None])[..., 0]
        agree(f"greedy tokens of {each} and {name}", chosen, likeliest.amax(-1))


def agree(what: str, found: Tensor, wanted: Tensor) -> None:
    """Raise an `AssertionError` if two tensors differ by more than 1e-4."""
    off = (found - wanted).abs().max().item()
    if not off <= CLOSE:  # also raises for NaN
        raise AssertionError(f"{what} differ by {off:.1e}; models that disagree are not measured.")
