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

from x_transformers.modules.hand_written import by_formula, needs_formula, needs_operations
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


def _learn_chunk(tokens: Tensor, start: Tensor, reference: Tensor, offset: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Compute a chunk: all gradients at once, and what each token reads, without a memory for each token.

    Args:
        tokens: `(b, h, C, 2 dk + dv + SCALARS)` query, key, value and numbers of each token.
        start: `(b, h, 2 size + (window - 1) gradient_size)` memory, momentum and recent gradients.
        reference: `(b, h, size)` memory at which gradients are taken.
        offset: `(b, 1)` tokens of the chunk that earlier passes read; live ones begin after these.
        rule: shape of the memory, and how it learns.

    Returns:
        `(b, h, C, dv)`, and the same as `start` after the chunk.
    """
    d, e, size = rule.dim_key, rule.dim_value, rule.size
    q, k, v, scalars = tokens.split((d, d, e, SCALARS), dim=-1)
    push, write, log_momentum, log_keep, weight, alive = scalars.unbind(dim=-1)
    flat, fast, recent = start.split((size, size, (rule.window - 1) * rule.gradient_size), dim=-1)
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
    after = torch.cat((Memory(matrices, gain).flat(), Memory(fasts, fast_gain).flat(), recent), dim=-1)
    return normalized(rule, x, q, gains), after


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


def _walk(tokens: Tensor, start: Tensor, reference: Tensor, phase: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Compute one chunk after the other.

    Args:
        tokens: `(b, h, n, ...)`, the last chunk may be shorter; see `_learn_chunk`, also for the others.
        start: memory, momentum and recent gradients before the first token.
        reference: memory at which gradients of the first chunk are taken.
        phase: `(b, 1)` tokens of the first chunk that earlier passes read.
        rule: shape of the memory, and how it learns.

    Returns:
        `(b, h, n, dv)`, and the same as `start` before each chunk and after the last one, `(b, h, Z + 1, ...)`.
    """
    out, borders = [], [start]
    for chunk in tokens.split(rule.chunk, dim=2):
        read, start = _learn_chunk(chunk, start, reference, phase, rule)
        out.append(read)
        borders.append(start)
        reference, phase = start[..., : rule.size], torch.zeros_like(phase)
    return torch.cat(out, dim=2), torch.stack(borders, dim=2)


@torch.library.custom_op("x_transformers::memorize_chunks", mutates_args=())
def memorize_chunks(
    tokens: Tensor, start: Tensor, reference: Tensor, phase: Tensor, rule: list[int], loss_scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `_walk` as one operation, for graphs that serve any number of chunks."""
    return _walk(tokens, start, reference, phase, _rule_of(rule, loss_scale))


@memorize_chunks.register_fake
def _(
    tokens: Tensor, start: Tensor, reference: Tensor, phase: Tensor, rule: list[int], loss_scale: float
) -> tuple[Tensor, Tensor]:
    own = _rule_of(rule, loss_scale)
    b, h, n, _ = tokens.shape
    return tokens.new_empty(b, h, n, own.dim_value), tokens.new_empty(
        b, h, (n + own.chunk - 1) // own.chunk + 1, start.shape[-1]
    )


def _rule_of(numbers: list[int], loss_scale: float) -> Rule:
    """Return the rule that an operation was given as numbers."""
    dim_key, dim_value, hidden, residual, reads_before, chunk, window, muon_steps = numbers
    return Rule(dim_key, dim_value, hidden, bool(residual), bool(reads_before), chunk, window, muon_steps, loss_scale)


@torch.library.custom_op("x_transformers::memorize_gradient", mutates_args=())
def memorize_gradient(
    tokens: Tensor,
    borders: Tensor,
    reference: Tensor,
    phase: Tensor,
    of_out: Tensor,
    of_borders: Tensor,
    rule: list[int],
    loss_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of tokens, start and reference, and recompute each chunk for it."""
    own = _rule_of(rule, loss_scale)
    nothing, of_tokens, of_state = torch.zeros_like(phase), [], of_borders[:, :, -1]

    def of_later(chunk: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return _learn_chunk(chunk, state, state[..., : own.size], nothing, own)

    def of_first(chunk: Tensor, state: Tensor, taken_at: Tensor) -> tuple[Tensor, Tensor]:
        return _learn_chunk(chunk, state, taken_at, phase, own)

    chunks = list(zip(tokens.split(own.chunk, dim=2), of_out.split(own.chunk, dim=2), strict=True))
    for z in range(len(chunks) - 1, 0, -1):
        chunk, up = chunks[z]
        pull: Any = torch.func.vjp(of_later, chunk, borders[:, :, z])[1]  # autograd does not record within an operation
        of_chunk, of_state = pull((up, of_state))
        of_tokens.append(of_chunk)
        of_state = of_state + of_borders[:, :, z]
    chunk, up = chunks[0]
    pull = torch.func.vjp(of_first, chunk, borders[:, :, 0], reference)[1]
    of_chunk, of_state, of_reference = pull((up, of_state))
    whole = torch.cat([of_chunk, *of_tokens[::-1]], dim=2)
    return whole, of_state + of_borders[:, :, 0], of_reference.contiguous()


@memorize_gradient.register_fake
def _(
    tokens: Tensor,
    borders: Tensor,
    reference: Tensor,
    phase: Tensor,
    of_out: Tensor,
    of_borders: Tensor,
    rule: list[int],
    loss_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, _, width = borders.shape
    return torch.empty_like(tokens), tokens.new_empty(b, h, width), torch.empty_like(reference)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, start, reference, phase, ctx.rule, ctx.loss_scale = inputs
    ctx.save_for_backward(tokens, start, output[1], reference, phase)


def _backward(ctx: Any, of_out: Tensor, of_borders: Tensor) -> tuple[Tensor | None, ...]:
    tokens, start, borders, reference, phase = ctx.saved_tensors
    if needs_formula(of_out, of_borders):
        own = _rule_of(ctx.rule, ctx.loss_scale)

        def formula(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            return _walk(inputs[0], inputs[1], inputs[2], phase, own)

        found = by_formula(formula, (tokens, start, reference), (of_out, of_borders))
    else:
        found = memorize_gradient(tokens, borders, reference, phase, of_out, of_borders, ctx.rule, ctx.loss_scale)
    return (*found, None, None, None)


memorize_chunks.register_autograd(_backward, setup_context=_save)


def _chunked(q: Tensor, k: Tensor, v: Tensor, *given: Tensor, rule: Rule, fresh: bool) -> Any:
    """Compute one chunk after the other."""
    scalars, held = given[:6], Held(*given[6:])
    if q.shape[2] == 0 and not torch.compiler.is_compiling():
        return _steps(q, k, v, *given, rule=rule, fresh=fresh)
    tokens = torch.cat((q, k, v, torch.stack(scalars, dim=-1)), dim=-1)
    phase = held.before.remainder(rule.chunk)
    if not fresh:
        tokens = _moved(tokens, phase, rule.chunk)
    start = torch.cat((held.memory, held.momentum, held.recent.flatten(-2)), dim=-1)
    written_out = rule.muon_steps > 0  # the backward pass would keep the memories of all tokens
    if torch.compiler.is_compiling() or (written_out and not needs_operations()):
        numbers = [int(each) for each in rule[:-1]]
        out, borders = memorize_chunks(tokens, start, held.reference, phase, numbers, rule.loss_scale)
    else:
        out, borders = _walk(tokens, start, held.reference, phase, rule)
    if not fresh:
        back = (torch.arange(q.shape[2], device=q.device) + phase.long())[:, None, :, None]
        out = out.gather(2, back.expand(-1, q.shape[1], -1, out.shape[-1]))
    live = scalars[-1][:, 0].sum(dim=-1, keepdim=True)
    # gradients of the next token are taken at the memory before its chunk, if that is not the first chunk again
    chunk = (phase + live).div(rule.chunk, rounding_mode="floor").long()[:, None, :, None]
    at = borders[..., : rule.size].gather(2, chunk.expand(-1, q.shape[1], 1, rule.size)).squeeze(2)
    reference = torch.where(chunk.squeeze(-1) == 0, held.reference, at)
    memory, momentum, recent = borders[:, :, -1].split((rule.size, rule.size, start.shape[-1] - 2 * rule.size), dim=-1)
    return out, Held(memory, reference, momentum, recent.view(held.recent.shape), held.before + live)


def _moved(tokens: Tensor, phase: Tensor, chunk: int) -> Tensor:
    """Move the tokens of each row to the right, by as many as its first chunk already has.

    Args:
        tokens: `(b, h, n, d)`.
        phase: `(b, 1)`, less than `chunk`.
        chunk: tokens of a chunk.

    Returns:
        `(b, h, n + chunk - 1, d)`. What is no token has zeros everywhere: it adds nothing, and keeps everything.
    """
    n = tokens.shape[2]
    place = torch.arange(n + chunk - 1, device=tokens.device) - phase.long()
    inside = (place >= 0) & (place < n)
    index = place.clamp(min=0).clamp(max=n - 1)[:, None, :, None]
    moved = tokens.gather(2, index.expand(-1, tokens.shape[1], -1, tokens.shape[-1]))
    return moved.masked_fill(~inside[:, None, :, None], 0.0)


MEMORY: Operation = Operation("memory", _steps, Kernel("chunked", _chunked, needs_several_tokens))
