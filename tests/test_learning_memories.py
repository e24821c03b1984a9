"""Memories that learn while they read: closed gradients, chunks and their borders, states, and refusals."""

import inspect
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import perturbed
from torch import Tensor

from x_transformers import Decoder
from x_transformers.errors import ConfigError
from x_transformers.mixers.learning_memory import mean_square
from x_transformers.mixers.titans import Titans
from x_transformers.recurrences.memory import Held, Rates, memorize
from x_transformers.recurrences.memory_rule import Memory, Rule, gradients, normalized, orthogonalized

B, H, N, CHUNK = 3, 2, 14, 4
LIVE = torch.arange(N) < torch.tensor([[N], [5], [9]])
COUNT = torch.tensor([[0.0], [6.0], [3.0]], dtype=torch.float64)

RULES = {
    "matrix": Rule(3, 4, chunk=CHUNK),
    "matrix, window": Rule(3, 4, chunk=CHUNK, window=7),
    "matrix, before, window": Rule(3, 4, chunk=CHUNK, window=3, reads_before=True),
    "matrix, residual": Rule(3, 3, residual=True, chunk=1),
    "matrix, orthogonal": Rule(3, 4, chunk=CHUNK, muon_steps=2),
    "layers": Rule(3, 4, hidden=5, chunk=CHUNK),
    "layers, residual, before, window": Rule(3, 3, hidden=5, residual=True, reads_before=True, chunk=CHUNK, window=3),
    "layers, residual, orthogonal, window": Rule(3, 3, hidden=5, residual=True, chunk=CHUNK, window=3, muon_steps=2),
    "layers, before, orthogonal": Rule(3, 4, hidden=2, reads_before=True, chunk=CHUNK, muon_steps=2),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs(rule: Rule, outside: bool) -> tuple[list[Tensor], Held]:
    """Return queries, keys, values and the five numbers of each token, and a memory in the middle of a chunk."""
    alive = LIVE.unsqueeze(1).expand(B, H, N)
    rate, theta, kappa, window = (torch.rand(B, H, N, dtype=torch.float64) for _ in range(4))
    push, write = (torch.ones_like(rate), -0.03 * rate) if outside else (-0.03 * rate, torch.ones_like(rate))
    logs = (0.05 + 0.9 * theta).log(), (0.4 + 0.5 * kappa).log()
    rates = [each * alive for each in (push, write, *logs)]
    held = [0.5 * draw(B, H, rule.size) for _ in range(3)]
    recent = draw(B, H, rule.window - 1, rule.gradient_size)
    q, k, v = draw(B, H, N, rule.dim_key), draw(B, H, N, rule.dim_key), draw(B, H, N, rule.dim_value)
    return [q, k, v, *rates, window], Held(held[0], held[1], held[2], recent, COUNT)


def run(tokens: list[Tensor], held: Held, live: Tensor, rule: Rule, cuts: tuple[int, ...]) -> list[Tensor]:
    """Return outputs of live tokens, the memory after them, and the gradients of everything."""
    own = [t.clone().requires_grad_() for t in tokens]
    alive = live.unsqueeze(1).expand(B, H, N)
    start = [t.clone().requires_grad_(t.numel() > 0) for t in held[:4]]
    state = Held._make([*start, held.before])
    read = [t * alive if t.ndim == 3 else t for t in own]
    parts = []
    for *piece, mask in zip(*(t.split(cuts, dim=2) for t in read), live.split(cuts, dim=1), strict=True):
        q, k, v, *rates = piece
        out, state = memorize(q, k, v, Rates._make(rates), state, mask, rule)
        parts.append(out)
    whole = torch.cat(parts, dim=2) * alive.unsqueeze(-1)
    weight = torch.linspace(-1, 1, whole.numel(), dtype=whole.dtype).view(whole.shape)
    loss = (whole * weight).sum() + sum(t.square().sum() for t in state[:4])
    found = torch.autograd.grad(loss, [*own, *(t for t in start if t.numel())], allow_unused=True)
    return [whole, *state, *(g for g in found if g is not None)]


@pytest.mark.parametrize(("name", "outside"), list(product(RULES, (False, True))))
def test_chunks_equal_single_steps(name: str, outside: bool) -> None:
    """Outputs, states and gradients, of rows that begin in the middle of a chunk or not, in pieces of any length."""
    rule = RULES[name]
    tokens, held = inputs(rule, outside)
    steps = run(tokens, held, LIVE, rule, (1,) * N)
    for cuts in ((N,), (2, 6, 1, 5)):
        for mine, definition in zip(run(tokens, held, LIVE, rule, cuts), steps, strict=True):
            assert torch.isfinite(mine).all()
            torch.testing.assert_close(mine, definition, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["matrix, window", "layers, residual, orthogonal, window"])
def test_rows_without_a_past_begin_a_chunk(name: str) -> None:
    rule = RULES[name]
    tokens, held = inputs(rule, True)
    q, k, v, *rates = tokens
    first = Held(held.memory, held.memory, 0 * held.momentum, 0 * held.recent, 0 * held.before)
    for n in (2, CHUNK, CHUNK + 1, N):
        cut = [t[:, :, :n] for t in (q, k, v, *rates)]
        quick, general = (
            memorize(cut[0], cut[1], cut[2], Rates._make(cut[3:]), first, LIVE[:, :n], rule, fresh=fresh)
            for fresh in (True, False)
        )
        torch.testing.assert_close(quick, general, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["matrix", "matrix, residual", "layers", "layers, residual, before, window"])
@torch.no_grad()
def test_gradients_in_closed_form(name: str) -> None:
    """Those of autograd, of each token by itself."""
    rule = RULES[name]
    flat, k, v = draw(rule.size), draw(5, rule.dim_key), draw(5, rule.dim_value)
    found = gradients(rule, Memory.of(flat, rule), k, v)
    for token in range(5):
        with torch.enable_grad():
            own = flat.clone().requires_grad_()
            memory = Memory.of(own, rule)
            out = k[token : token + 1] @ memory.matrices[0]
            out = F.gelu(out) @ memory.matrices[1] if rule.hidden else out
            answer = normalized(rule, out, k[token : token + 1], memory.gain)
            loss = rule.loss_scale * (answer - v[token]).square().sum()
        wanted = Memory.of(torch.autograd.grad(loss, own)[0], rule)
        for left, right, matrix in zip(found.left, found.right, wanted.matrices, strict=True):
            torch.testing.assert_close(torch.outer(left[token], right[token]), matrix)
        if wanted.gain is not None and found.gain is not None:
            torch.testing.assert_close(found.gain[token], wanted.gain[0])


def test_updates_are_orthogonal() -> None:
    """Singular vectors stay, and singular values become about 1, also of a tall matrix; zeros stay zeros."""
    for shape in ((4, 6), (6, 4)):
        t = draw(*shape)
        near = orthogonalized(t, 5)
        values = torch.linalg.svdvals(near)
        assert ((values > 0.6) & (values < 1.3)).all()
        left, _, right = torch.linalg.svd(t, full_matrices=False)
        inner = left.mT @ near @ right.mT
        torch.testing.assert_close(inner, inner.diagonal().diag())
    assert not orthogonalized(torch.zeros(3, 3), 5).any()


def test_second_derivatives_of_what_is_recomputed() -> None:
    """Memories that are written out are computed again for the backward pass, and can be differentiated twice."""
    rule = Rule(2, 2, chunk=2, muon_steps=1)
    tokens, held = inputs(rule._replace(dim_value=2), True)
    q, k, v, *rates = (t[:1, :1, :5] for t in tokens)
    start = Held._make([*(t[:1, :1] for t in held[:4]), held.before[:1]])

    def of(*given: Tensor) -> Tensor:
        return memorize(given[0], given[1], given[2], Rates._make(rates), start, None, rule)[0]

    assert torch.autograd.gradgradcheck(of, [t.clone().requires_grad_() for t in (q, k, v)], fast_mode=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer_memory_depth": 3}, "`mixer_memory_depth` is 3; a memory has 1 or 2 layers."),
        (
            {"mixer_memory_residual": True, "mixer_dim_value": 3},
            "`mixer_memory_residual` adds keys of width 4 to values of width 3; give `mixer_dim_key` and",
        ),
        ({"mixer_rate": "beside"}, "`mixer_rate`"),
        ({"mixer": "atlas", "mixer_omega_window": 0}, "`mixer_omega_window` is 0"),
        ({"mixer_heads": 3}, "the width of the model is 16, which 3 does not divide"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Decoder(**{"dim": 16, "depth": 1, "heads": 4, "mixer": "titans", **options})
    assert words in str(error.value)


def test_keywords_of_a_memory_by_itself() -> None:
    with pytest.raises(ConfigError, match="unknown keyword `memory_dept`"):
        Titans(16, memory_dept=2)
    with pytest.raises(ConfigError, match="`memory_depth` is 'two'"):
        Titans(16, memory_depth="two")
    mixer = Titans(16, heads=2, memory_depth=2)
    assert Titans.from_config(mixer.config).rule == mixer.rule
    assert "memory_residual" in inspect.signature(Titans).parameters


@torch.no_grad()
def test_the_size_of_a_chunk_is_a_part_of_the_definition() -> None:
    """A memory of chunks of one token reads what no chunk holds back."""
    state = {}
    outputs = []
    for chunk in (1, 8):
        stack = perturbed(Decoder(dim=16, depth=1, heads=2, only_attn=True, mixer="titans", mixer_chunk=chunk))
        state = state or stack.state_dict()
        stack.load_state_dict(state)
        outputs.append(stack(torch.linspace(-1, 1, 2 * 12 * 16).view(2, 12, 16)))
    torch.testing.assert_close(outputs[0][:, 0], outputs[1][:, 0])
    assert (outputs[0] - outputs[1])[:, 2:].abs().max() > 1e-4


def test_typical_length_of_polynomials() -> None:
    """The default scale of the loss depends on it: of one, two and three powers."""
    z = torch.randn(1_000_000, dtype=torch.float64)
    for degree in (1, 2, 3):
        power = torch.stack([z**n for n in range(1, degree + 1)]).sum(dim=0)
        assert mean_square(degree) == pytest.approx(power.square().mean().item(), rel=0.05)
    assert [mean_square(degree) for degree in (1, 2, 3)] == [1, 4, 25]
