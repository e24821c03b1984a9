"""Gains of the heads of several norms, applied to all heads at once, in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from x_transformers.modules.hand_written import by_formula, needs_formula


def head_gains(x: Tensor, gammas: Sequence[Tensor], unit_offset: bool) -> Tensor:
    """Return `x * (gamma + offset)`, with the gains of several norms for successive heads.

    Args:
        x: `(b, n, h, d)` heads.
        gammas: `(h', 1, d)` each, of h heads in all.
        unit_offset: add 1 to the gains.
    """
    out: Tensor = HeadGains.apply(x, unit_offset, *gammas)
    return out


class HeadGains(torch.autograd.Function):
    """The arguments of `apply` are those of `head_gains`, with the gains one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unit_offset: bool, *gammas: Tensor) -> Tensor:
        joined = torch.cat(gammas).squeeze(1)
        ctx.save_for_backward(x, joined, *gammas)
        ctx.unit_offset = unit_offset
        return _times(x, joined, unit_offset)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (up,) = gradients
        x, joined, *gammas = ctx.saved_tensors
        if needs_formula(up):
            found = by_formula(lambda x, *gammas: _formula(x, gammas, ctx.unit_offset), [x, *gammas], [up])
            return found[0], None, *found[1:]
        of_x = _times(up, joined, ctx.unit_offset).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return of_x, None, *(None for _ in gammas)
        of_gammas = (up * x).sum(dim=(0, 1)).unsqueeze(1).split([len(each) for each in gammas])
        return of_x, None, *(each.to(gamma.dtype) for each, gamma in zip(of_gammas, gammas, strict=True))


def _times(x: Tensor, gamma: Tensor, unit_offset: bool) -> Tensor:
    return torch.addcmul(x, x, gamma) if unit_offset else x * gamma


def _formula(x: Tensor, gammas: Sequence[Tensor], unit_offset: bool) -> Tensor:
    return x * (torch.cat(tuple(gammas)).squeeze(1) + int(unit_offset))
