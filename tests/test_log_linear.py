"""Log-linear recurrence: levels of a binary counter, chunks, pieces and dead tokens."""

import pytest
import torch
from torch import Tensor

from x_transformers import Decoder
from x_transformers.errors import ConfigError
from x_transformers.recurrences.log_linear import log_linear

B, H, DK, DV, N, LEVELS, CHUNK = 3, 2, 4, 3, 21, 6, 4
LIVE = torch.arange(N) < torch.tensor([[N], [0], [9]])


def inputs(levels: int = LEVELS) -> list[Tensor]:
    """Return queries, keys, values, decays and weights; dead tokens write nothing and do not decay."""
    draw = [torch.randn(B, H, N, width, dtype=torch.float64) for width in (DK, DK, DV, levels)]
    alive = LIVE.unsqueeze(1)
    g = -torch.rand(B, H, N, dtype=torch.float64) * alive
    return [draw[0], draw[1] * alive.unsqueeze(-1), draw[2], g, draw[3].exp()]


def by_pairs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, levels: Tensor) -> Tensor:
    """Return the sum over all pairs of tokens, each with the weight of its level."""
    out, total = torch.zeros_like(v), g.cumsum(dim=-1)
    for t in range(q.shape[2]):
        for s in range(t + 1):
            level = min((t ^ s).bit_length(), levels.shape[-1] - 1)
            weight = levels[:, :, t, level] * (total[:, :, t] - total[:, :, s]).exp()
            out[:, :, t] += (weight * (q[:, :, t] * k[:, :, s]).sum(dim=-1)).unsqueeze(-1) * v[:, :, s]
    return out


@pytest.mark.parametrize("levels", [LEVELS, 3])
def test_every_pair_has_the_level_of_its_highest_different_digit(levels: int) -> None:
    """Also where the last level has all tokens that are further away."""
    given = inputs(levels)
    for chunk in (1, CHUNK, 64):
        out, _ = log_linear(*given, chunk=chunk)
        torch.testing.assert_close(out[0], by_pairs(*given)[0])


@pytest.mark.parametrize("levels", [LEVELS, 3])
def test_pieces_of_any_length(levels: int) -> None:
    """Outputs, states and gradients are those of single tokens, for rows of different numbers of live tokens."""
    given = inputs(levels)
    results: list[list[Tensor]] = []
    for cuts in ((1,) * N, (N,), (2, 7, 1, 11), (5, 16)):
        own = [t.clone().requires_grad_() for t in given]
        state, before, parts = None, None, []
        for *piece, live in zip(*(t.split(cuts, dim=2) for t in own), LIVE.split(cuts, dim=1), strict=True):
            out, state = log_linear(*piece, state, before, live=live, chunk=CHUNK)
            count = live.sum(dim=1, keepdim=True).double()
            before = count if before is None else before + count
            parts.append(out * live[:, None, :, None])
        assert state is not None
        whole = torch.cat(parts, dim=2)
        (whole.square().sum() + state.square().sum()).backward()
        alive = LIVE.unsqueeze(1)
        found = [t.grad * (alive if t.ndim == 3 else alive.unsqueeze(-1)) for t in own if t.grad is not None]
        assert len(found) == 5
        results.append([whole, state, *found])
    for other in results[1:]:
        for mine, single in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, single, rtol=1e-9, atol=1e-9)


def test_number_of_levels() -> None:
    """One for the token itself, and one for each binary digit of a place."""
    for length, levels in ((1, 1), (2, 2), (8, 4), (9, 5)):
        stack = Decoder(dim=16, depth=1, mixer="log_linear", mixer_head=8, mixer_state=4, mixer_len=length)
        assert stack.layers[0].mixer.state_shapes["levels"] == (4, levels, 4, 8)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="`mixer_chunk` is 12; levels are those of binary digits, so take a power of"):
        Decoder(dim=16, depth=1, mixer="log_linear", mixer_head=8, mixer_chunk=12)
    with pytest.raises(ConfigError, match="`mixer_len` is 0"):
        Decoder(dim=16, depth=1, mixer="log_linear", mixer_head=8, mixer_len=0)
