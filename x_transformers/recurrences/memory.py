"""Memories that learn while they read: gradient descent with momentum and decay, one step for each token.

`Z_t = theta_t Z_{t-1} + push_t grad_t` and `M_t = kappa_t M_{t-1} + write_t Z_t`, where the gradient of a token is
taken at the memory before the first token of its chunk. Chunks are those of the row: they do not depend on where the
row is cut into passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.recurrences.base import Kernel, Operation, Situation, needs_several_tokens, tokens_of
from x_transformers.recurrences.chunks import Decays
from x_transformers.recurrences.memory_rule import (
    Gradients,
    Memory,
    Rule,
    gradients,
    normalized,
    orthogonalized,
)
from x_transformers.recurrences.walk import STEPS, walk

SCALARS = 6
"""Numbers of a token besides query, key and value: those of `Rates`, and whether it is live."""


class Rates(NamedTuple):
    """Numbers of each token and head, `(b, h, n)`.

    Attributes:
        push: factor of the gradient in the momentum.
        write: factor of the momentum in the memory.
        log_momentum: logarithm of theta.
        log_keep: logarithm of kappa.
        window: factor of the token's gradient in the sum over a window.
    """

    push: Tensor
    write: Tensor
    log_momentum: Tensor
    log_keep: Tensor
    window: Tensor


class Held(NamedTuple):
    """State of a memory after the tokens so far.

    Attributes:
        memory: `(b, h, size)` parameters.
        reference: `(b, h, size)` parameters before the first token of the chunk of the next token.
        momentum: `(b, h, size)`.
        recent: `(b, h, window - 1, gradient_size)` gradients of the last tokens.
        before: `(b, 1)` number of tokens so far.
    """

    memory: Tensor
    reference: Tensor
    momentum: Tensor
    recent: Tensor
    before: Tensor


def memorize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Rates,
    held: Held,
    live: Tensor | None,
    rule: Rule,
    fresh: bool = False,
) -> tuple[Tensor, Held]:
    """Read a memory, and let it learn, token by token.

    A token that is not live changes nothing if its `push` and `write` are 0 and its logarithms too.

    Args:
        q, k: queries and keys `(b, h, n, dk)`.
        v: values `(b, h, n, dv)`.
        rates: of each token.
        held: the memory before the first token.
        live: `(b, n)` bool, a prefix of ones in each row; None: all are live.
        rule: shape of the memory, and how it learns.
        fresh: there was no token before these, which saves a little.

    Returns:
        `(b, h, n, dv)` and the memory after the last token, at least in float32.
    """
    situation = Situation(q.device.type, q.dtype, tokens_of(q))
    alive = torch.ones_like(rates.push) if live is None else live.unsqueeze(1).expand_as(rates.push).to(q.dtype)
    found: Any = MEMORY.run(situation, q, k, v, *rates, alive, *held, rule=rule, fresh=fresh)
    return found


# one token after the other


def _steps(q: Tensor, k: Tensor, v: Tensor, *given: Tensor, rule: Rule, fresh: bool) -> Any:
    """Compute the definition, with gradients that are written out."""
    rates, alive, held = Rates(*given[:5]), given[5], Held(*given[6:])
    flat, reference, fast, recent, before = held
    out = []
    for t in range(q.shape[2]):
        push, write, theta, kappa = (
            each[:, :, t, None] for each in (rates.push, rates.write, rates.log_momentum.exp(), rates.log_keep.exp())
        )
        own, new = alive[:, :, t, None], slice(t, t + 1)
        found = gradients(rule, Memory.of(reference, rule), k[:, :, new], v[:, :, new])
        window = torch.cat((recent, found.times(rates.window[:, :, new, None]).flat()), dim=2)
        fast = theta * fast + push * _written_out(Gradients.of(window, rule), rule)
        if not rule.reads_before:
            flat = kappa * flat + write * _update(fast, rule)
        out.append(_ask(Memory.of(flat, rule), q[:, :, new], rule))
        if rule.reads_before:
            flat = kappa * flat + write * _update(fast, rule)
        recent = torch.where(own.unsqueeze(-1) > 0, window[:, :, 1:], recent)
        before = before + own[:, 0]
        ends = (before.remainder(rule.chunk) == 0).unsqueeze(1)
        reference = torch.where(ends & (own > 0), flat, reference)
    return torch.cat(out, dim=2) if out else torch.empty_like(v), Held(flat, reference, fast, recent, before)


def _written_out(tokens: Gradients, rule: Rule) -> Tensor:
    """Return the sum of the gradients of some tokens as parameters of a memory, `(..., size)`."""
    matrices = [left.mT @ right for left, right in zip(tokens.left, tokens.right, strict=True)]
    gain = None if tokens.gain is None else tokens.gain.sum(dim=-2, keepdim=True)
    return Memory(matrices, gain).flat()


def _update(momentum: Tensor, rule: Rule) -> Tensor:
    """Return what a momentum `(..., size)` adds to a memory."""
    if not rule.muon_steps:
        return momentum
    parts = Memory.of(momentum, rule)
    return Memory([orthogonalized(matrix, rule.muon_steps) for matrix in parts.matrices], parts.gain).flat()


def _ask(memory: Memory, q: Tensor, rule: Rule) -> Tensor:
    """Return the answers of a memory to `(..., n, dk)`."""
    out = q @ memory.matrices[0]
    if rule.hidden:
        out = F.gelu(out) @ memory.matrices[1]
    return normalized(rule, out, q, memory.gain)


# a chunk at once


class Shares(NamedTuple):
    """How much of what there was before a chunk, and of the gradient of each token, is in the memory of each token.

    Attributes:
        memory: `(..., C, 1)` of the first memory.
        momentum: `(..., C, 1)` of the first momentum.
        gradient: `(..., C, S)` of the gradients of the tokens of the window and the chunk.
    """

    memory: Tensor
    momentum: Tensor
    gradient: Tensor

    def before(self) -> Shares:
        """Return those of the memory before each token."""
        first = F.pad(self.memory[..., :-1, :], (0, 0, 1, 0), value=1.0)
        momentum, gradient = (F.pad(each[..., :-1, :], (0, 0, 1, 0)) for each in self[1:])
        return Shares(first, momentum, gradient)

    def last(self) -> Shares:
        """Return those of the last token."""
        return Shares(self.memory[..., -1:, :], self.momentum[..., -1:, :], self.gradient[..., -1:, :])

    def of_matrix(self, x: Tensor, first: Tensor, momentum: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of each token's `(..., C, in)` with its own matrix, which is not written out."""
        held = self.memory * (x @ first) + self.momentum * (x @ momentum)
        return held + ((x @ left.mT) * self.gradient) @ right

    def of_vector(self, first: Tensor, momentum: Tensor, each: Tensor) -> Tensor:
        """Return the vector of each token."""
        return self.memory * first + self.momentum * momentum + self.gradient @ each

    def summed(self, first: Tensor, momentum: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return the matrix of the one token that these are the shares of."""
        return self.memory * first + self.momentum * momentum + (left * self.gradient.mT).mT @ right


def _learn_chunk(tokens: Tensor, state: Tensor, numbers: list[float]) -> tuple[Tensor, Tensor]:
    """Compute a chunk: all gradients at once, and what each token reads, without a memory for each token.

    Args:
        tokens: `(b, h, C, 2 dk + dv + SCALARS)` query, key, value and numbers of each token.
        state: `(b, h, s)` the fields of `Held` before the chunk.
        numbers: the fields of the `Rule`.

    Returns:
        `(b, h, C, dv)`, and the state after the chunk.
    """
    rule = Rule.of(numbers)
    d, e = rule.dim_key, rule.dim_value
    q, k, v, scalars = tokens.split((d, d, e, SCALARS), dim=-1)
    push, write, log_momentum, log_keep, weight, alive = scalars.unbind(dim=-1)
    flat, reference, fast, recent, before = state.split(_widths(rule), dim=-1)
    offset = before[:, 0].remainder(rule.chunk)
    memory, momentum = Memory.of(flat, rule), Memory.of(fast, rule)
    found = gradients(rule, Memory.of(reference, rule), k, v).times(weight.unsqueeze(-1))
    kept, faded = Decays.of(log_keep), Decays.of(log_momentum)
    into_momentum = faded.pairs * push.unsqueeze(-2)
    if rule.window > 1:
        known = torch.cat((recent.unflatten(-1, (rule.window - 1, -1)), found.flat()), dim=2)
        into_momentum = into_momentum @ _windows(offset, rule, push)
        recent = _last_gradients(known, alive, offset, rule).flatten(-2)
        found = Gradients.of(known, rule)
    written = kept.pairs * write.unsqueeze(-2)
    shares = Shares(kept.since_start, written @ faded.since_start, written @ into_momentum)
    momentums = Shares(torch.zeros_like(faded.since_start), faded.since_start, into_momentum)
    read = shares.before() if rule.reads_before else shares
    x, matrices, fasts = q, [], []
    for number, pair in enumerate(zip(memory.matrices, momentum.matrices, found.left, found.right, strict=True)):
        x = F.gelu(x) if number else x
        if rule.muon_steps:
            x, new, newly = _orthogonal(x, *pair, momentums, kept, written, rule)
        else:
            x, new, newly = read.of_matrix(x, *pair), shares.last().summed(*pair), momentums.last().summed(*pair)
        matrices.append(new)
        fasts.append(newly)
    gain = gains = fast_gain = None
    if memory.gain is not None and momentum.gain is not None and found.gain is not None:
        triple = memory.gain, momentum.gain, found.gain
        gains, gain = read.of_vector(*triple), shares.last().of_vector(*triple)
        fast_gain = momentums.last().of_vector(*triple)
    flat, before = Memory(matrices, gain).flat(), before + alive.sum(dim=-1, keepdim=True)
    # the next gradients are those of the memory before their chunk, and this one may be over
    over = (alive[..., -1:] > 0) & (before.remainder(rule.chunk) == 0)
    reference = torch.where(over, flat, reference)
    return normalized(rule, x, q, gains), torch.cat(
        (flat, reference, Memory(fasts, fast_gain).flat(), recent, before), dim=-1
    )


def _widths(rule: Rule) -> tuple[int, ...]:
    """Return the widths of the fields of `Held`, flat."""
    return rule.size, rule.size, rule.size, (rule.window - 1) * rule.gradient_size, 1


def _orthogonal(
    x: Tensor,
    first: Tensor,
    momentum: Tensor,
    left: Tensor,
    right: Tensor,
    momentums: Shares,
    kept: Decays,
    written: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the product of each token with its matrix, the last matrix and the last momentum, with all written out.

    Updates are no sums of the gradients, since each is made orthogonal by itself.
    """
    outer = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
    every = momentums.momentum * momentum.flatten(-2).unsqueeze(-2) + momentums.gradient @ outer
    updates = orthogonalized(every.unflatten(-1, first.shape[-2:]), rule.muon_steps).flatten(-2)
    begin = first.flatten(-2).unsqueeze(-2)
    matrices = kept.since_start * begin + written @ updates
    read = torch.cat((begin, matrices[..., :-1, :]), dim=-2) if rule.reads_before else matrices
    out = (x.unsqueeze(-2) @ read.unflatten(-1, first.shape[-2:])).squeeze(-2)
    return out, matrices[..., -1, :].unflatten(-1, first.shape[-2:]), every[..., -1, :].unflatten(-1, first.shape[-2:])


def _windows(offset: Tensor, rule: Rule, push: Tensor) -> Tensor:
    """Return which gradients each token adds up, `(b, 1, C, window - 1 + C)`: ones, else zeros."""
    place = torch.arange(push.shape[-1], device=push.device, dtype=offset.dtype)
    past = torch.arange(1 - rule.window, 0, device=push.device, dtype=offset.dtype)
    of_known = torch.cat((offset + past, place.expand(offset.shape[0], -1)), dim=1)
    distance = place[:, None] - of_known[:, None, :]
    return ((distance >= 0) & (distance < rule.window)).to(push.dtype).unsqueeze(1)


def _last_gradients(known: Tensor, alive: Tensor, offset: Tensor, rule: Rule) -> Tensor:
    """Return the gradients of the last `window - 1` live tokens."""
    past = rule.window - 1
    place = alive[:, 0].sum(dim=-1, keepdim=True) + torch.arange(past, device=known.device, dtype=alive.dtype)
    # the live tokens of a chunk begin after its offset
    place = torch.where(place < past, place, place + offset)
    return known.gather(2, place.long()[:, None, :, None].expand(-1, known.shape[1], -1, known.shape[-1]))


def _chunked(q: Tensor, k: Tensor, v: Tensor, *given: Tensor, rule: Rule, fresh: bool) -> Any:
    """Compute one chunk after the other."""
    scalars, held = given[:6], Held(*given[6:])
    tokens = torch.cat((q, k, v, torch.stack(scalars, dim=-1)), dim=-1)
    before = held.before.unsqueeze(1).expand(-1, q.shape[1], -1)
    state = torch.cat((held.memory, held.reference, held.momentum, held.recent.flatten(-2), before), dim=-1)
    out, state = walk(
        "memory",
        tokens,
        state,
        held.before,
        fresh=fresh,
        chunk=rule.chunk,
        width=rule.dim_value,
        numbers=[float(each) for each in rule],
        recompute=rule.muon_steps > 0,  # memories of all tokens are written out
    )
    memory, reference, momentum, recent, before = state.split(_widths(rule), dim=-1)
    return out, Held(memory, reference, momentum, recent.reshape(held.recent.shape), before[:, 0])


STEPS["memory"] = _learn_chunk
MEMORY: Operation = Operation("memory", _steps, Kernel("chunked", _chunked, needs_several_tokens))
