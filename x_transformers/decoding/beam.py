"""Beam search: several continuations of each prompt, those with the highest probability.

A row of a beam is a sequence whose score is the sum of its tokens' log-probabilities, however the candidates were
chosen: plain beams compare logits, stochastic ones filtered and scaled logits with Gumbel noise, which draws candidates
without replacement (1903.06059).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from x_transformers.decoding.sampling import Adjust, check_readable, gumbel_noise
from x_transformers.decoding.step import Branching, Sequences
from x_transformers.decoding.watch import Watch
from x_transformers.ops import at_least_float32

Select = Callable[[Tensor], Tensor]
"""`(b, v)` logits to values by which candidates are chosen: larger is better, -inf is never chosen."""


def noisy(adjust: Adjust) -> Select:
    """Return a function that filters and scales logits, and adds Gumbel noise."""

    def select(logits: Tensor) -> Tensor:
        logits = adjust(logits)
        return logits + gumbel_noise(logits)

    return select


class Beams:
    """The beams of a batch of prompts.

    Args:
        sequences: the prompts, `(b, n)`.
        reader: of the model.
        width: number of beams of each prompt.
        select: by what candidates are chosen.
        vocabulary: number of ids that can be read again.
        eos_token: ends a beam, which then stays as it is; None for beams that never end.
    """

    def __init__(
        self,
        sequences: Sequences,
        reader: Branching,
        width: int,
        select: Select,
        vocabulary: int,
        eos_token: int | None = None,
    ) -> None:
        self.sequences, self.reader, self.width, self.select = sequences, reader, width, select
        self.vocabulary, self.eos_token, self.watch = vocabulary, eos_token, Watch()
        self.prompts, self.prompt_length = sequences.parts[0].shape
        device = sequences.parts[0].device
        # a single row for each prompt until the first step: equal beams would all propose the same tokens
        self.scores = torch.zeros(self.prompts, 1, device=device)
        self.ended = torch.zeros(self.prompts, dtype=torch.bool, device=device)
        self.steps = torch.zeros((), dtype=torch.long, device=device)

    def run(self, seq_len: int, pad_value: int, every: int = 1) -> tuple[Tensor, Tensor]:
        """Continue by `seq_len` tokens, or until all beams have ended.

        Args:
            seq_len: number of tokens to generate.
            pad_value: follows an end token.
            every: number of steps between checks whether all beams have ended, each of which waits for the device.
                The result does not depend on it.

        Returns:
            `(b, width, m)` tokens, `pad_value`s after an end token, and `(b, width)` scores, the highest first.
        """
        for count in range(1, seq_len + 1):
            self.step()
            if self.eos_token is not None and count % every == 0 and bool(self.ended.all()):
                break
        self.watch.look()
        tokens = self.sequences.tokens()[:, self.prompt_length :].reshape(self.prompts, self.scores.shape[1], -1)
        if self.eos_token is not None and every > 1:
            tokens = tokens[:, :, : int(self.steps)]
        tokens = tokens.expand(-1, self.width, -1)  # before the first step there is one row for all beams
        scores, order = self.scores.expand(-1, self.width).sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
        if self.eos_token is not None:
            ends = tokens == self.eos_token
            tokens = tokens.masked_fill(ends.cumsum(dim=-1) - ends.long() > 0, pad_value)
        return tokens, scores

    def step(self) -> None:
        """Replace each prompt's rows by the best of their continuations by one token."""
        # counted on the device, so that the search need not wait; `run` cuts off what came after the end
        self.steps = self.steps + ~self.ended.all()
        gains, tokens = self._candidates(self.reader.read(self.sequences)[:, -1])
        rows = self.scores.shape[1]
        scores = (self.scores.reshape(-1, 1) + gains).reshape(self.prompts, -1)
        tokens = tokens.reshape(self.prompts, -1)
        if rows == 1:
            # the candidates of the prompt itself are the beams
            parents = torch.zeros_like(tokens)
            self.reader.widen(self.width)
        else:
            scores, order = scores.topk(self.width, dim=-1)
            # each beam proposes `width` tokens, so that candidate c of a prompt continues its beam c // width
            tokens, parents = tokens.gather(-1, order), order.div(self.width, rounding_mode="floor")
            if self.eos_token is not None:
                # a search that is over, and continues until the next check, leaves its beams in their order
                over = self.ended.all()
                scores = torch.where(over, self.scores, scores)
                parents = torch.where(over, torch.arange(rows, device=parents.device), parents)
        self.scores = scores
        # parents are numbered within their prompt, `_follow` takes rows of the whole batch
        first = torch.arange(self.prompts, device=parents.device) * rows
        self._follow((parents + first.unsqueeze(-1)).flatten(), tokens.reshape(-1, 1))

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each row's best next tokens add to its score, and these tokens; both `(rows, width)`."""
        check_readable(logits, self.vocabulary)
        self.watch.note(logits)
        log_probs = at_least_float32(logits).log_softmax(dim=-1)
        values = self.select(logits)
        if self.eos_token is not None:
            # an ended row has one continuation, of probability 1; which token it is does not matter
            ended = self.ended.unsqueeze(-1)
            only = torch.full_like(values[:1], -math.inf)
            only[:, 0] = 0.0
            values = torch.where(ended, only, values)
            log_probs = log_probs.masked_fill(ended, 0.0)
        # `values` (filtered, maybe with noise) decide which tokens are taken; scores add what the model itself expects
        best = values.topk(self.width, dim=-1)
        return log_probs.gather(-1, best.indices).masked_fill(best.values == -math.inf, -math.inf), best.indices

    def _follow(self, rows: Tensor, tokens: Tensor) -> None:
        """Let row r continue from old row `rows[r]`, with the token `tokens[r]`."""
        self.sequences.reorder(rows)
        self.reader.reorder(rows)
        self.sequences.append(tokens)
        self.ended = self.ended[rows]
        if self.eos_token is not None:
            self.ended = self.ended | (tokens.squeeze(-1) == self.eos_token)
