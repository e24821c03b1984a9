"""Attention in groups and to all tokens by its definition, and MossFormer over rows with many groups."""

from typing import Any

import pytest
import torch
from catalog import close, perturbed
from torch import Tensor

from x_transformers import Decoder
from x_transformers.errors import ConfigError
from x_transformers.recurrences import naive
from x_transformers.recurrences.groups import Grouped, both_ways, left_to_right


def features(n: int) -> list[Tensor]:
    return [torch.randn(2, n, width, dtype=torch.float64, requires_grad=True) for width in (4, 4, 4, 4, 6)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 29])
def test_groups_equal_the_definition(n: int, causal: bool) -> None:
    given = features(n)
    if causal:
        mine = left_to_right(Grouped(*given), 8, None, None)[0]
    else:
        mine = both_ways(Grouped(*given), 8, torch.full((2, 1), n))
    theirs = naive.grouped(*given, 8, causal)  # type: ignore[call-arg]
    torch.testing.assert_close(mine, theirs)
    up = torch.randn_like(mine)
    # the only token of a row has nothing before it
    for one, other in zip(*(torch.autograd.grad(y, given, up, allow_unused=True) for y in (mine, theirs)), strict=True):
        torch.testing.assert_close(
            torch.zeros(1) if one is None else one, torch.zeros_like(one) if other is None else other
        )


@torch.no_grad()
def test_sums_of_whole_groups_go_on() -> None:
    """From a row that was cut at the end of a group."""
    given = [t.detach() for t in features(29)]
    whole, _ = left_to_right(Grouped(*given), 8, None, None)
    _, sums = left_to_right(Grouped(*(t[:, :16] for t in given)), 8, None, None)
    assert sums.earlier.shape[1] == 3
    rest, _ = left_to_right(Grouped(*(t[:, 16:] for t in given)), 8, sums.earlier[:, 2], sums.own[:, 2])
    torch.testing.assert_close(rest, whole[:, 16:])


@torch.no_grad()
def test_pieces_that_end_anywhere_in_a_group() -> None:
    """Rows at different places of their groups: the second one begins five tokens later."""
    stack = Decoder(dim=16, depth=1, only_attn=True, mixer="mossformer", mixer_group=8, mixer_dim_key=6, mixer_conv=3)
    mixer: Any = perturbed(stack.double()).layers[0].mixer
    x, live = torch.randn(2, 50, 16, dtype=torch.float64), torch.ones(2, 50, dtype=torch.bool)
    live[1, :5] = False
    whole, end = mixer(x, live)
    for cuts in ((16, 16, 18), (9, 1, 20, 3, 17), (1,) * 50):
        state: Any = None
        parts = []
        for piece, own in zip(x.split(cuts, dim=1), live.split(cuts, dim=1), strict=True):
            out, state = mixer(piece, own, state)
            parts.append(out)
        close(torch.cat(parts, dim=1), whole)
        for name in end:
            close(state[name], end[name])


def test_features_that_rotate_are_pairs_of_those_that_there_are() -> None:
    for rotary in (3, 10, -2):
        with pytest.raises(ConfigError, match="it must be an even number up to `mixer_dim_key`, which is 8, or 0"):
            Decoder(dim=16, depth=1, mixer="mossformer", mixer_dim_key=8, mixer_rotary_dim=rotary)
