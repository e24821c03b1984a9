"""The exact soft top-k, and the choice of the best tokens of a row."""

import math
from pathlib import Path

import pytest
import torch
from catalog import close
from safetensors import safe_open
from torch import Tensor

from x_transformers.routing.best_tokens import BestTokens
from x_transformers.routing.soft_topk import soft_topk

GOLDEN = Path(__file__).with_name("golden") / "experts" / "colt5-router.safetensors"
COOLING, WARM = 0.7, 4.0


def descend(scores: Tensor, k: float, temperature: float, rounds: int, mask: Tensor | None = None) -> Tensor:
    """Return the same by coordinate descent, as the authors of the paper compute it."""
    t = max(WARM, temperature)
    hidden = torch.zeros_like(scores, dtype=torch.bool) if mask is None else ~mask
    scores = scores.masked_fill(hidden, -torch.inf)
    below = -scores.masked_fill(hidden, 0.0)
    a = torch.zeros_like(scores[..., :1])
    for _ in range(rounds):
        moved = (scores + below) / t
        a = t * (math.log(k) - moved.masked_fill(hidden, -torch.inf).logsumexp(dim=-1, keepdim=True))
        below = -torch.relu(scores.masked_fill(hidden, 0.0) + a)
        t = max(t * COOLING, temperature)
    return ((scores + a + below) / t).exp()


@pytest.mark.parametrize("temperature", [0.03, 0.3, 2.0])
@pytest.mark.parametrize("k", [0.5, 1, 3, 3.375, 8.5, 11, 11.9])
def test_it_is_the_solution(k: float, temperature: float) -> None:
    """The shares are `min(1, exp((s + a) / t))` and sum to k, which only one solution does; descent finds it slowly."""
    scores = torch.randn(4, 12, dtype=torch.float64)
    shares = soft_topk(scores, k, temperature)
    close(shares.sum(dim=-1), torch.full((4,), float(k), dtype=torch.float64), 1e-9)
    close(soft_topk(scores.float(), k, temperature).sum(dim=-1), torch.full((4,), float(k)), 1e-5)
    a = torch.where(shares < 1, temperature * shares.log() - scores, -torch.inf).amax(dim=-1, keepdim=True)
    close(((scores + a) / temperature).exp().clamp(max=1), shares, 1e-9)
    if k < 4:
        close(shares, descend(scores, k, temperature, rounds=500), 1e-7)


def test_the_public_router_is_on_its_way_there() -> None:
    """Its 20 rounds are those of `descend`; with more of them it is the exact solution."""
    with safe_open(GOLDEN, "pt") as file:
        case = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    logits, mask = case["input.logits"], case["input.mask"]
    for name, k, of in (("k2", 2, None), ("k3", 3, None), ("masked_k2", 2, mask)):
        close(descend(logits, k, 0.03, rounds=20, mask=of), case[f"output.scores_{name}"])
        exact = soft_topk(logits, k, 0.03, of)
        close(exact, descend(logits.double(), k, 0.03, rounds=1000, mask=of).float())
        close(exact.sum(dim=-1), torch.full((3,), float(k)), 1e-5)
        if of is not None:
            assert not exact[~mask].any()


def test_gradients() -> None:
    """Those of numerical differences, which saturated shares lack; rows have numbers and masks of their own."""
    scores = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 9) > 0.2
    k = torch.tensor([1, 2.25, 3.0, 4.5, 0.5], dtype=torch.float64)
    for t in (0.1, 1.0):
        assert torch.autograd.gradcheck(lambda s, t=t: soft_topk(s, k, t, mask), scores)
        assert torch.autograd.gradcheck(lambda s, t=t: soft_topk(s, 2.25, t), scores)
    shares = soft_topk(scores, 2.25, 0.1)
    (gradient,) = torch.autograd.grad((shares * torch.randn(5, 9)).sum(), scores)
    assert (shares == 1).any()
    assert not gradient[shares == 1].any()


def test_rows_by_themselves() -> None:
    scores = torch.randn(3, 10)
    mask = torch.arange(10) < torch.tensor([[10], [6], [1]])
    k = torch.tensor([3.5, 2.0, 0.25])
    together = soft_topk(scores, k, 0.1, mask)
    for row, length in enumerate((10, 6, 1)):
        close(together[row, :length], soft_topk(scores[row, :length], k[row].item(), 0.1), 1e-6)
        assert not together[row, length:].any()


def test_as_many_places_as_scores() -> None:
    """All shares are 1, without a gradient that is no number."""
    scores = torch.randn(4, 5, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [3], [2], [0]])
    for k in (5, 7.5, torch.tensor([5.0, 3.0, 4.0, 1.0])):
        shares = soft_topk(scores, k, 0.03, mask)
        close(shares, mask.float(), 0)
        (gradient,) = torch.autograd.grad(shares.sum(), scores)
        assert not gradient.any()
    assert soft_topk(torch.randn(2, 0), 3).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_with_equal_and_distant_scores(dtype: torch.dtype) -> None:
    scores = torch.cat((torch.randn(4000), torch.zeros(40), torch.tensor([1e4, -1e4, 1e30]))).to(dtype)
    for k in (1, 100, 3000.5):
        shares = soft_topk(scores, k, 0.03)
        assert shares.dtype is torch.float32
        assert shares.isfinite().all()
        close(shares.sum() / k, torch.tensor(1.0), 1e-5)
        assert shares[-1] == 1
    assert soft_topk(torch.zeros(7), 3).allclose(torch.tensor(3 / 7))


def test_how_many_tokens_are_chosen() -> None:
    """The number of a row does not depend on padding, and shares are exact: 7 hundredths of 100 tokens are 7."""
    x = torch.randn(3, 100, 8)
    mask = torch.arange(100) < torch.tensor([[100], [50], [2]])
    for number, counts in ((4, [4, 4, 2]), (0.07, [7, 4, 1]), (1 / 3, [34, 17, 1]), (1.0, [100, 50, 2])):
        router = BestTokens(8, number)
        choice = router(x, mask)
        assert choice.valid.sum(dim=-1).tolist() == counts
        logits = x @ router.weight
        for row, (count, length) in enumerate(zip(counts, (100, 50, 2), strict=True)):
            alone = router(x[row : row + 1, :length])
            best = logits[row, :length].topk(count).indices
            assert torch.equal(choice.places[row, :count], best)
            assert torch.equal(alone.places[0], best)
            close(choice.scores[row, :count], alone.scores[0], 1e-6)


def test_scores_that_are_one_teach_as_those_that_are_not() -> None:
    x = torch.randn(2, 9, 8)
    soft, straight = BestTokens(8, 3, temperature=0.5), BestTokens(8, 3, temperature=0.5, straight=True)
    straight.load_state_dict(soft.state_dict())
    probe = torch.randn(2, 3)
    gradients = []
    for router in (soft, straight):
        scores = router(x).scores
        gradients += torch.autograd.grad((scores * probe).sum(), router.weight)
    assert (scores == 1).all()
    close(gradients[1], gradients[0], 1e-6)
    assert gradients[0].abs().max() > 1e-3


def test_of_equal_tokens_the_first_are_chosen() -> None:
    """Wherever padding is: encodings of positions tell them apart."""
    router, x = BestTokens(8, 3), torch.zeros(1, 40, 8)
    for padding in (0, 1, 13):
        padded = torch.cat((torch.randn(1, padding, 8), x, torch.randn(1, padding, 8)), dim=1)
        mask = torch.arange(40 + 2 * padding)[None]
        choice = router(padded, (mask >= padding) & (mask < padding + 40))
        assert choice.places.tolist() == [[padding, padding + 1, padding + 2]]
