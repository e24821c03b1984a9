"""Kernels of recurrences: the chunked forms equal their definitions, outputs, states and gradients of all orders."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from x_transformers.recurrences import naive
from x_transformers.recurrences.base import Kernel, Operation, Situation
from x_transformers.recurrences.carry import carry, carry_matrix, carry_matrix_uncompiled, carry_uncompiled
from x_transformers.recurrences.delta import DELTA, delta
from x_transformers.recurrences.linear import LINEAR, linear, linear_with_bonus
from x_transformers.recurrences.rank_one import RANK_ONE, rank_one
from x_transformers.recurrences.scan import SCAN, scan
from x_transformers.recurrences.stabilized import stabilized, weighted_mean

B, H, DK, DV, CHUNK = 2, 2, 4, 3, 16
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
DECAYS = (None, 0.01, 1.0, 30.0)
"""Decays `e^-x` of a token; None for none."""


def inputs(n: int, decay: float | None, from_state: bool) -> dict[str, Tensor | None]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    k = draw(B, H, n, DK)
    return {
        "q": draw(B, H, n, DK),
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": draw(B, H, n, DV),
        "beta": 2 * draw(B, H, n).sigmoid(),
        "g": None if decay is None else -decay * 2 * torch.rand(B, H, n, dtype=torch.float64),
        "state": draw(B, H, DK, DV) if from_state else None,
    }


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...]]] = {
    "linear": (linear, naive.linear, ("q", "k", "v", "g", "state")),
    "delta": (delta, naive.delta, ("q", "k", "v", "beta", "g", "state")),
}
CASES = list(product(OPERATIONS, LENGTHS, DECAYS, (False, True)))


def results(function: Callable[..., Any], given: list[Tensor | None], **options: Any) -> Iterator[Tensor]:
    own = [None if t is None else t.clone().requires_grad_() for t in given]
    out, state = function(*own, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    ((out * weight).sum() + state.square().sum()).backward()
    yield from (out.detach(), state.detach())
    yield from (t.grad for t in own if t is not None and t.grad is not None)


@pytest.mark.parametrize(("name", "n", "decay", "from_state"), CASES)
def test_chunks_equal_single_steps(name: str, n: int, decay: float | None, from_state: bool) -> None:
    function, definition, names = OPERATIONS[name]
    given = inputs(n, decay, from_state)
    mine = list(results(function, [given[each] for each in names], chunk=CHUNK))
    theirs = list(results(definition, [given[each] for each in names]))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "decay", "from_state"), list(product(LENGTHS, (0.01, 1.0, 30.0), (False, True))))
def test_decays_of_single_features(n: int, decay: float, from_state: bool) -> None:
    given = inputs(n, decay, from_state)
    g = -2 * decay * torch.rand(B, H, n, DK, dtype=torch.float64)
    given["g"] = g
    for function, definition, names in OPERATIONS.values():
        arguments = [given[each] for each in names]
        # chunks of 16, the largest power of two that is no larger
        for one, other in zip(results(function, arguments, chunk=24), results(definition, arguments), strict=True):
            assert torch.isfinite(one).all()
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "decay", "from_state"), list(product(LENGTHS, (0.01, 1.0, 30.0), (False, True))))
def test_bonus_equals_single_steps(n: int, decay: float, from_state: bool) -> None:
    given = inputs(n, decay, from_state)
    g, bonus = -2 * decay * torch.rand(B, H, n, DK, dtype=torch.float64), torch.randn(H, DK, dtype=torch.float64)
    arguments = [given["q"], given["k"], given["v"], g, bonus, given["state"]]
    mine = results(linear_with_bonus, arguments, chunk=24)
    for one, other in zip(mine, results(naive.linear_with_bonus, arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "decay", "from_state"), list(product(LENGTHS, (0.01, 1.0, 30.0), (False, True))))
def test_rank_one_equals_single_steps(n: int, decay: float, from_state: bool) -> None:
    given = inputs(n, decay, from_state)
    k = given["k"]
    assert k is not None
    g, rate = -2 * decay * torch.rand(B, H, n, DK, dtype=torch.float64), torch.rand(B, H, n, DK, dtype=torch.float64)
    arguments = [given["q"], torch.randn_like(k), given["v"], -k, k * rate, g, given["state"]]
    mine, theirs = list(results(rank_one, arguments, chunk=24)), list(results(naive.rank_one, arguments))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_rank_one_contains_the_delta_rule() -> None:
    q, k, v, beta, g, state = inputs(37, 1.0, True).values()
    assert q is not None
    assert k is not None
    assert v is not None
    assert beta is not None
    assert g is not None
    b, decay = beta.unsqueeze(-1) * k, g.unsqueeze(-1).expand_as(k)
    mine = rank_one(q, b, v, k * decay.exp(), -b, decay, state)
    for one, other in zip(mine, delta(q, k, v, beta, g, state), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_row_may_be_cut_anywhere(name: str) -> None:
    function, _, names = OPERATIONS[name]
    given = inputs(37, 0.5, True)
    whole, last = function(*(given[each] for each in names), chunk=CHUNK)
    for cut in (1, 15, 16, 36):
        state, parts = given["state"], []
        for piece in (slice(0, cut), slice(cut, None)):
            own = [state if each == "state" else given[each][:, :, piece] for each in names]  # type: ignore[index]
            out, state = function(*own, chunk=CHUNK)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "decay", "from_state"), list(product(LENGTHS, (0.01, 1.0, 30.0), (False, True))))
def test_doubling_equals_single_steps(n: int, decay: float, from_state: bool) -> None:
    x, log_a = torch.randn(B, n, 5, dtype=torch.float64), -2 * decay * torch.rand(B, n, 5, dtype=torch.float64)
    given = [x, log_a, torch.randn(B, 5, dtype=torch.float64) if from_state else None]
    for one, other in zip(results(scan, given), results(naive.scan, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def gated(n: int, strength: float, from_state: bool) -> list[Tensor | None]:
    """Arguments of exponential gates of which some are large; the first tokens of the first row are not there."""
    given = inputs(n, 1.0, from_state)
    log_input, forget = strength * torch.randn(B, H, n, dtype=torch.float64), given["g"]
    assert forget is not None
    log_input[0, :, : n // 2] = -torch.inf
    forget[0, :, : n // 2] = 0.0
    held = torch.randn(B, H, DK, DV + 1, dtype=torch.float64) if from_state else None
    top = torch.randn(B, H, dtype=torch.float64) if from_state else None
    return [given["q"], given["k"], given["v"], log_input, strength * forget, held, top]


def of_gates(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the quotient of an mLSTM and the state of sums, as the other operations."""

    def whole(*given: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        *own, held, top = given
        sums, (held, _) = function(*own, None if held is None else (held, top), **options)
        bound = torch.maximum(sums[1].abs(), (-sums[2]).exp())
        return sums[0] / bound, held

    return whole


@pytest.mark.parametrize(("n", "strength", "from_state"), list(product(LENGTHS, (0.01, 1.0, 30.0), (False, True))))
def test_exponential_gates_equal_single_steps(n: int, strength: float, from_state: bool) -> None:
    given = gated(n, strength, from_state)
    mine = list(results(of_gates(stabilized), given, chunk=CHUNK))
    theirs = list(results(of_gates(naive.stabilized), given))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("from_state", [False, True])
def test_exponential_gates_have_the_derivative_of_their_quotient(from_state: bool) -> None:
    """The unit has no gradient of its own, since it cancels."""
    given = gated(5, 1.0, from_state)
    own = [None if t is None else t.requires_grad_(number != 6) for number, t in enumerate(given)]
    for t in own[3:5]:
        assert t is not None
        t.detach()[t.detach() == -torch.inf] = -40.0
    assert torch.autograd.gradcheck(lambda *t: of_gates(stabilized)(*t)[0], own)


def test_exponential_gates_may_be_cut_anywhere() -> None:
    *given, held, top = gated(37, 10.0, True)
    function = of_gates(stabilized)
    whole, last = function(*given, held, top, chunk=CHUNK)
    for cut in (1, 15, 16, 18, 36):
        state: Any = (held, top)
        parts = []
        for piece in (slice(0, cut), slice(cut, None)):
            own = [None if t is None else t[:, :, piece] for t in given]
            parts.append(function(*own, *state, chunk=CHUNK)[0])
            _, state = stabilized(*own, state, chunk=CHUNK)  # type: ignore[arg-type]
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-10, atol=1e-10)
    assert last.isfinite().all()


def test_exponential_gates_of_any_size() -> None:
    """A constant in all of them cancels, in float32 far beyond what an exponential can hold."""
    v, log_input, forget = torch.randn(B, H, 70, DV), torch.randn(B, H, 70), -torch.rand(B, H, 70)
    ones = torch.ones(B, H, 70, 1)
    quotients = []
    for shift in (-1000.0, 0.0, 1000.0):
        sums, _ = stabilized(ones, ones, v, log_input + shift, forget)
        quotients.append(sums.numerator / sums.denominator)
    for other in quotients[::2]:
        torch.testing.assert_close(other, quotients[1], rtol=1e-3, atol=1e-3)


def fading(n: int, strength: float, from_state: bool) -> list[Tensor | None]:
    """Arguments of weighted means; the first tokens of the first row are not there."""
    v, log_input = torch.randn(B, n, 5, dtype=torch.float64), strength * torch.randn(B, n, 5, dtype=torch.float64)
    forget = -strength * torch.rand(B, n, 5, dtype=torch.float64)
    log_input[0, : n // 2], forget[0, : n // 2] = -torch.inf, 0.0
    sums = torch.randn(B, 3, 5, dtype=torch.float64)
    sums[:, 1] = 1 + sums[:, 1].exp()
    return [v, log_input, forget, torch.randn(5, dtype=torch.float64), sums if from_state else None]


@pytest.mark.parametrize(("n", "strength", "from_state"), list(product(LENGTHS, (0.01, 1.0, 30.0), (False, True))))
def test_weighted_means_equal_single_steps(n: int, strength: float, from_state: bool) -> None:
    def sums_of(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        def whole(*given: Tensor) -> tuple[Tensor, Tensor]:
            out, state = function(*given)
            return out, state[:, :2]  # the unit has no gradient, and is -inf where nothing was read

        return whole

    given = fading(n, strength, from_state)
    mine, theirs = (list(results(sums_of(each), given)) for each in (weighted_mean, naive.weighted_mean))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_weighted_means_are_those_of_their_definition() -> None:
    """Written out without states: a softmax over all tokens so far, also after a cut, and its derivative."""
    v, log_input, forget, bonus, _ = fading(21, 1.0, False)
    assert v is not None
    assert log_input is not None
    assert forget is not None
    assert bonus is not None
    log_input = log_input.clamp(min=-40)
    total = forget.cumsum(dim=1)
    logits = (total.roll(1, 1).unsqueeze(2) - total.unsqueeze(1)) + log_input.unsqueeze(1)
    later = torch.ones(21, 21, dtype=torch.bool).triu().unsqueeze(-1)
    own = torch.diag_embed((log_input + bonus).mT).movedim(1, -1)
    logits = torch.where(torch.eye(21, dtype=torch.bool).unsqueeze(-1), own, logits.masked_fill(later, -torch.inf))
    whole = torch.einsum("bijd,bjd->bid", logits.softmax(dim=2), v)
    for cut in (0, 1, 9, 20):
        first, state = weighted_mean(v[:, :cut], log_input[:, :cut], forget[:, :cut], bonus)
        second, _ = weighted_mean(v[:, cut:], log_input[:, cut:], forget[:, cut:], bonus, state)
        torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-10, atol=1e-10)
    short = [t[:, :5].clone().requires_grad_() for t in (v, log_input, forget)]
    assert torch.autograd.gradcheck(lambda *t: weighted_mean(*t)[0], (*short, bonus.requires_grad_()))


@pytest.mark.parametrize("reverse", [False, True])
def test_states_are_operations_with_derivatives(reverse: bool) -> None:
    """Also second derivatives, and what `torch.compile` and `torch.export` require of an operation."""
    decay = torch.rand(2, 3, 4, 1, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    for function, operation, a in (
        (carry, carry_uncompiled, decay),
        (carry_matrix, carry_matrix_uncompiled, matrix),
    ):
        assert torch.autograd.gradcheck(lambda *t, own=function: own(*t, reverse), (a, x, start))
        assert torch.autograd.gradgradcheck(lambda *t, own=function: own(*t, reverse), (a, x, start))
        torch.library.opcheck(operation, (a, x, start, reverse))


@pytest.mark.parametrize("name", OPERATIONS)
def test_function_transforms(name: str) -> None:
    """Forward mode and `vmap` see plain operations."""
    function, _, names = OPERATIONS[name]
    given = [inputs(20, 0.5, True)[each] for each in names]
    _, tangent = torch.func.jvp(lambda q: function(q, *given[1:], chunk=CHUNK)[0], (given[0],), (given[0],))
    torch.testing.assert_close(tangent, function(*given, chunk=CHUNK)[0])
    many = torch.stack([given[2], 2 * given[2]])  # type: ignore[list-item]
    both = torch.func.vmap(lambda v: function(*given[:2], v, *given[3:-1], None, chunk=CHUNK)[0])(many)
    torch.testing.assert_close(both[1], 2 * both[0])


@pytest.mark.parametrize("name", OPERATIONS)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    function, _, names = OPERATIONS[name]
    given = [None if (t := inputs(70, 0.01, False)[each]) is None else t.float() for each in names]
    half = [None if t is None or each == "state" else t.bfloat16() for t, each in zip(given, names, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = function(*half)
    assert out.dtype is state.dtype is torch.float32
    wide, _ = function(*(None if t is None else t.float() for t in half))
    torch.testing.assert_close(out, wide)


def test_a_kernel_is_chosen_and_named() -> None:
    """One that is registered comes first, where it does not refuse; the reasons of the others are kept."""

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x

    operation = Operation("double", lambda x: (x + x, x))
    own = Kernel("twice", twice, lambda situation: None if situation.device == "cuda" else "it needs a GPU")
    remove = operation.register(own)
    assert operation.choose(Situation("cuda", torch.float32, 8))[0] is own
    chosen, why = operation.choose(Situation("cpu", torch.float32, 8))
    assert (chosen.name, why) == ("naive", "it needs a GPU")
    remove()
    assert operation.choose(Situation("cuda", torch.float32, 8))[0].name == "naive"
    for each in (LINEAR, DELTA, RANK_ONE, SCAN):
        assert each.choose(Situation("cpu", torch.float32, 1))[0].name == "naive"
        assert each.choose(Situation("cpu", torch.float32, 0))[0].name == "chunked"
