"""Speculative decoding: tokens are guessed cheaply, and the model reads several guesses in one pass (2211.17192).

A guess x that was drawn from q stays with probability `min(1, p(x) / q(x))`, where p is what the model itself would
draw from; the first one that does not is replaced by a draw from `max(p - q, 0)`, normalised. What comes out is
distributed as if each token had been drawn from p, whatever the guesses; without randomness it is the same tokens.

The rows of a batch go on together, by as many tokens as the row with the fewest right guesses; the others guess the
rest anew. How far a row goes then depends on other rows and on its own past alone, which leaves its distribution as it
is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.decoding.loop import Decoding, until_ended
from x_transformers.decoding.sampling import Adjust, check_readable, draw_from, most_likely
from x_transformers.decoding.step import Branching, Sequences
from x_transformers.errors import InputError


@dataclass(frozen=True, eq=False)
class Draft:
    """Guesses.

    Attributes:
        tokens: `(b, k)`.
        probs: `(b, k, v)` what they were drawn from; None if nothing was drawn.
    """

    tokens: Tensor
    probs: Tensor | None = None


class Policy:
    """How tokens are drawn from logits, the model's and those of guesses alike.

    Args:
        adjust: logits `(b, v)` to those that are drawn from; None takes the most likely token.
    """

    def __init__(self, adjust: Adjust | None) -> None:
        self.adjust = adjust

    def probs(self, logits: Tensor) -> Tensor | None:
        """`(b, k, v)`, or None where nothing is drawn."""
        if self.adjust is None:
            return None
        # filters may be a caller's, made for (b, v)
        return self.adjust(logits.flatten(0, 1)).softmax(dim=-1).unflatten(0, logits.shape[:2])


class Drafter(ABC):
    """Guesses what comes."""

    @abstractmethod
    def draft(self, sequences: Sequences, count: int, ended: Tensor | None) -> Draft | None:
        """At most `count` guesses for what follows the sequences, which stay as they are; None for no guess at all.

        Args:
            sequences: the tokens so far.
            count: at least 1.
            ended: `(b,)` rows of which nothing more is wanted; None if there is no such row.
        """

    @abstractmethod
    def keep(self, length: int, sequences: Sequences) -> None:
        """Only the first `length` tokens of the sequences are as they were when guesses were made."""


class ModelDrafter(Drafter):
    """Guesses by a smaller model, drawn as the model's own tokens are.

    Args:
        reader: of the smaller model.
        policy: how tokens are drawn.
        vocabulary: ids that can be read again.
    """

    def __init__(self, reader: Branching, policy: Policy, vocabulary: int) -> None:
        self.reader, self.policy, self.vocabulary = reader, policy, vocabulary

    def draft(self, sequences: Sequences, count: int, ended: Tensor | None) -> Draft:
        self.reader.mark(sequences.length + count)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for _ in range(count):
            logits = self.reader.read(sequences)
            check_readable(logits, self.vocabulary)
            each = self.policy.probs(logits)
            if each is not None:
                probs.append(each)
            tokens.append(most_likely(logits[:, -1]) if each is None else draw_from(each[:, -1]))
            sequences.append(tokens[-1])
        sequences.drop(count)
        return Draft(torch.cat(tokens, dim=1), torch.cat(probs, dim=1) if probs else None)

    def keep(self, length: int, sequences: Sequences) -> None:
        self.reader.keep(length, sequences)


class Lookup(Drafter):
    """Guesses what followed the last tokens where they occurred before: prompt lookup (2304.04487).

    Of the occurrences of the last n tokens the latest counts; where there is none, that of the last n - 1, and so on.
    What follows is repeated if it ends before there are enough guesses.

    Args:
        longest: n, at least 1.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def draft(self, sequences: Sequences, count: int, ended: Tensor | None) -> Draft | None:
        behind = self._behind(sequences)
        found = behind > 0
        if ended is not None:
            found = found | ended
        if not bool(found.all()):  # rows go on together, so that one without a guess holds up all
            return None
        tokens = sequences.tokens()
        period = (sequences.length - behind).unsqueeze(-1)
        places = behind.unsqueeze(-1) + torch.arange(count, device=tokens.device).remainder(period)
        return Draft(tokens.gather(1, places))

    def keep(self, length: int, sequences: Sequences) -> None:
        """Nothing is remembered."""

    def _behind(self, sequences: Sequences) -> Tensor:
        """`(b,)` the place behind the best occurrence of each row's last tokens; 0 where there is none."""
        tokens, length = sequences.tokens(), sequences.length
        best = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        for size in range(1, min(self.longest, length - 1) + 1):
            ends = torch.arange(size, length, device=tokens.device)
            same = (tokens[:, :-1].unfold(1, size, 1) == tokens[:, None, length - size :]).all(dim=-1)
            if sequences.start is not None:
                same = same & (ends - size >= sequences.start.unsqueeze(-1))
            latest = (same * ends).amax(dim=-1)
            best = torch.where(latest > 0, latest, best)
        return best


class Speculation:
    """A batch that is continued by guesses and passes that judge them.

    Args:
        decoding: the model, and what its expectations are contrasted with.
        readers: of these models.
        drafter: what guesses.
        policy: how tokens are drawn.
        count: guesses of a round, at least 1.
    """

    def __init__(
        self, decoding: Decoding, readers: list[Branching], drafter: Drafter, policy: Policy, count: int
    ) -> None:
        self.decoding, self.readers, self.drafter, self.policy, self.count = decoding, readers, drafter, policy, count
        self.expert, self.sequences = decoding.expert, decoding.sequences
        self.ended: Tensor | None = None
        self.began = False

    def run(self, seq_len: int, eos_token: int | None, pad_value: int, every: int = 1) -> Iterator[Tensor]:
        """At most `seq_len` tokens, `(b, 1)` each; see `until_ended`. Rounds look for ends by themselves."""
        return until_ended(self._columns(seq_len, eos_token), eos_token, pad_value, every=0)

    def _columns(self, seq_len: int, eos_token: int | None) -> Iterator[Tensor]:
        while seq_len > 0:
            new, over = self.round(seq_len, eos_token)
            seq_len = 0 if over else seq_len - new.shape[1]
            yield from new.split(1, dim=1)

    def round(self, most: int, eos_token: int | None) -> tuple[Tensor, bool]:
        """Guess, judge and append: the new tokens `(b, c)`, c at most `most`, and whether all rows have ended."""
        begin = self.sequences.length
        draft = self._draft(min(self.count, most - 1))
        count = 0 if draft is None else draft.tokens.shape[1]
        for reader in self.readers if count else ():
            reader.mark(begin + count)
        if draft is not None:
            self.sequences.append(draft.tokens)
        logits = self.decoding.expect(self.readers, count + 1)
        self.began = True
        new = self._judged(logits, draft)
        over = False
        if eos_token is not None:
            new, over = self._until_all_end(new, eos_token)
        self.sequences.drop(count)
        self.sequences.append(new)
        for part in (*self.readers, self.drafter):
            part.keep(begin + new.shape[1] - 1, self.sequences)
        return new, over

    def _draft(self, count: int) -> Draft | None:
        """Guesses, where the models see them and all before them at once: a sliding window goes token by token."""
        for reader in self.readers:
            if reader.window is not None:
                count = min(count, reader.window - self.sequences.length)
        if count < 1 or not self.began:
            return None
        return self.drafter.draft(self.sequences, count, self.ended)

    def _judged(self, logits: Tensor, draft: Draft | None) -> Tensor:
        """The guesses that stay and the token behind them, `(b, m + 1)`."""
        probs = self.policy.probs(logits)
        if draft is None:
            return most_likely(logits[:, -1]) if probs is None else draw_from(probs[:, -1])
        if probs is None:
            wanted = logits.argmax(dim=-1)
            return wanted[:, : self._fewest(wanted[:, :-1] == draft.tokens) + 1]
        guessed = draft.tokens
        chance = probs[:, :-1].gather(-1, guessed.unsqueeze(-1)).squeeze(-1)
        drawn = torch.rand_like(chance)
        if draft.probs is not None:
            if draft.probs.shape[-1] != probs.shape[-1]:
                raise InputError(
                    f"the draft model gives logits for {draft.probs.shape[-1]} tokens, the model for "
                    f"{probs.shape[-1]}; both need one vocabulary."
                )
            drawn = drawn * draft.probs.gather(-1, guessed.unsqueeze(-1)).squeeze(-1)
        right = drawn < chance
        kept = self._fewest(right)
        if kept == guessed.shape[1]:
            return torch.cat((guessed, draw_from(probs[:, -1])), dim=1)
        instead = draw_from(_left_over(probs[:, kept], draft, kept))
        behind = torch.where(right[:, kept, None], guessed[:, kept, None], instead)
        return torch.cat((guessed[:, :kept], behind), dim=1)

    def _fewest(self, right: Tensor) -> int:
        """How many guesses `(b, k)` are right in every row before the first wrong one; ended rows do not matter."""
        if self.ended is not None:
            right = right | self.ended.unsqueeze(-1)
        return int(right.long().cumprod(dim=-1).sum(dim=-1).amin())

    def _until_all_end(self, new: Tensor, eos_token: int) -> tuple[Tensor, bool]:
        """The new tokens up to the column in which the last row ends, and whether it does."""
        ended = (new == eos_token).cumsum(dim=-1) > 0
        if self.ended is not None:
            ended = ended | self.ended.unsqueeze(-1)
        self.ended = ended[:, -1]
        going = int((~ended.all(dim=0)).sum())
        return new[:, : going + 1], going < new.shape[1]


def _left_over(probs: Tensor, draft: Draft, place: int) -> Tensor:
    """`max(p - q, 0)` at one place, `(b, v)`; a guess that was not drawn has q = 1."""
    if draft.probs is None:
        guess = F.one_hot(draft.tokens[:, place], probs.shape[-1]).bool()
        left = probs.masked_fill(guess, 0.0)
    else:
        left = (probs - draft.probs[:, place]).clamp(min=0.0)
    # equal distributions leave nothing over but rounding
    return torch.where(left.sum(dim=-1, keepdim=True) > 0, left, probs)
