"""Speculative decoding: tokens are guessed cheaply, and the model reads several guesses in one pass (2211.17192).

A guess x that was drawn from q is accepted with probability `min(1, p(x) / q(x))`, where p is what the model itself
would draw from; the first one that is rejected is replaced by a draw from `max(p - q, 0)`, normalized. The results are
distributed as if each token had been drawn from p, whatever the guesses are; without randomness they are the same
tokens.

The rows of a batch advance together, by the number of tokens of the row with the fewest accepted guesses; the others
guess the rest again. This leaves the distribution of a row as it is, since the number of tokens that are kept depends
only on other rows and on tokens of its own that are kept.
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
from x_transformers.decoding.watch import Watch
from x_transformers.errors import InputError


@dataclass(frozen=True, eq=False)
class Draft:
    """Guessed tokens.

    Attributes:
        tokens: `(b, k)`.
        probs: `(b, k, v)` what they were drawn from; None if nothing was drawn.
    """

    tokens: Tensor
    probs: Tensor | None = None


class Policy:
    """The rule by which tokens are drawn from logits, of the model and of the drafter alike.

    Args:
        adjust: logits `(b, v)` to those that are drawn from; None takes the most likely token.
    """

    def __init__(self, adjust: Adjust | None) -> None:
        self.adjust = adjust

    def probs(self, logits: Tensor) -> Tensor | None:
        """Return `(b, k, v)` probabilities of logits of the same shape, or None where nothing is drawn."""
        if self.adjust is None:
            return None
        # filters may be a caller's, made for (b, v)
        return self.adjust(logits.flatten(0, 1)).softmax(dim=-1).unflatten(0, logits.shape[:2])


class Drafter(ABC):
    """Interface of what guesses tokens."""

    @abstractmethod
    def draft(self, sequences: Sequences, count: int, ended: Tensor | None) -> Draft | None:
        """Return at most `count` guesses for what follows the sequences, which are left as they are, or None.

        Args:
            sequences: the tokens so far.
            count: at least 1.
            ended: `(b,)` rows that need no more tokens; None if there is no such row.
        """

    @abstractmethod
    def keep(self, length: int, sequences: Sequences) -> None:
        """Go back to the first `length` tokens of the sequences: later ones differ from what was guessed."""


class ModelDrafter(Drafter):
    """Guesses of a smaller model, drawn by the same rule as the model's own tokens.

    Args:
        reader: of the smaller model.
        policy: how tokens are drawn.
        vocabulary: number of ids that can be read again.
    """

    def __init__(self, reader: Branching, policy: Policy, vocabulary: int) -> None:
        self.reader, self.policy, self.vocabulary, self.watch = reader, policy, vocabulary, Watch()

    def draft(self, sequences: Sequences, count: int, ended: Tensor | None) -> Draft:
        self.reader.mark(sequences.length + count)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for _ in range(count):
            logits = self.reader.read(sequences)
            check_readable(logits, self.vocabulary)
            self.watch.note(logits, "`draft_model`")
            each = self.policy.probs(logits)
            if each is not None:
                probs.append(each)
            tokens.append(most_likely(logits[:, -1]) if each is None else draw_from(each[:, -1]))
            sequences.append(tokens[-1])
        # the caller appends the guesses itself; the reader learns from `keep` how many of them were right
        sequences.drop(count)
        return Draft(torch.cat(tokens, dim=1), torch.cat(probs, dim=1) if probs else None)

    def keep(self, length: int, sequences: Sequences) -> None:
        self.watch.look()  # the device has been waited for already, to count the right guesses
        self.reader.keep(length, sequences)


class Lookup(Drafter):
    """Guesses what followed the last tokens where they occurred before: prompt lookup (2304.04487).

    The latest occurrence of the last n tokens counts; where there is none, that of the last n - 1, and so on. What
    follows it is repeated if there are too few tokens up to the end.

    Args:
        longest: n, at least 1.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def draft(self, sequences: Sequences, count: int, ended: Tensor | None) -> Draft | None:
        follows = self._follows(sequences)
        found = follows > 0
        if ended is not None:
            found = found | ended
        if not bool(found.all()):  # rows advance together, so one without a guess stops all of them
            return None
        tokens = sequences.tokens()
        period = (sequences.length - follows).unsqueeze(-1)
        places = follows.unsqueeze(-1) + torch.arange(count, device=tokens.device).remainder(period)
        return Draft(tokens.gather(1, places))

    def keep(self, length: int, sequences: Sequences) -> None:
        """Nothing is remembered."""

    def _follows(self, sequences: Sequences) -> Tensor:
        """Return `(b,)` the place after the best occurrence of each row's last tokens; 0 where there is none."""
        tokens, length = sequences.tokens(), sequences.length
        best = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        # Longer matches come later and replace shorter ones. Windows end before the last token, so that the last n
        # tokens are not found at their own place.
        for size in range(1, min(self.longest, length - 1) + 1):
            ends = torch.arange(size, length, device=tokens.device)
            same = (tokens[:, :-1].unfold(1, size, 1) == tokens[:, None, length - size :]).all(dim=-1)
            if sequences.start is not None:
                same = same & (ends - size >= sequences.start.unsqueeze(-1))
            latest = (same * ends).amax(dim=-1)
            best = torch.where(latest > 0, latest, best)
        return best


class Speculation:
    """A batch that is continued by guesses and passes that verify them.

    Args:
        decoding: the model, and the amateurs that its logits are contrasted with.
        readers: of these models.
        drafter: makes the guesses.
        policy: how tokens are drawn.
        count: number of guesses in a round, at least 1.
    """

    def __init__(
        self, decoding: Decoding, readers: list[Branching], drafter: Drafter, policy: Policy, count: int
    ) -> None:
        self.decoding, self.readers, self.drafter, self.policy, self.count = decoding, readers, drafter, policy, count
        self.expert, self.sequences = decoding.expert, decoding.sequences
        self.ended: Tensor | None = None
        self.began = False

    def run(self, seq_len: int, eos_token: int | None, pad_value: int, every: int = 1) -> Iterator[Tensor]:
        """Return an iterator over at most `seq_len` columns `(b, 1)`; see `until_ended`. Rounds check for ends."""
        return until_ended(self._columns(seq_len, eos_token), eos_token, pad_value, every=0)

    def _columns(self, seq_len: int, eos_token: int | None) -> Iterator[Tensor]:
        while seq_len > 0:
            new, over = self.round(seq_len, eos_token)
            seq_len = 0 if over else seq_len - new.shape[1]
            yield from new.split(1, dim=1)

    def round(self, most: int, eos_token: int | None) -> tuple[Tensor, bool]:
        """Guess, verify and append; return new tokens `(b, c)`, c at most `most`, and True if all rows have ended."""
        begin = self.sequences.length
        # a round returns one token more than it accepts guesses
        draft = self._draft(min(self.count, most - 1))
        count = 0 if draft is None else draft.tokens.shape[1]
        for reader in self.readers if count else ():
            reader.mark(begin + count)
        if draft is not None:
            self.sequences.append(draft.tokens)
        # one pass over the guesses and the token before them, with the model's logits after each
        logits = self.decoding.expect(self.readers, count + 1)
        self.began = True
        new = self._accepted(logits, draft)
        over = False
        if eos_token is not None:
            new, over = self._until_all_end(new, eos_token)
        self.sequences.drop(count)
        self.sequences.append(new)
        # the last new token was drawn, not read, so caches end one token before it
        for part in (*self.readers, self.drafter):
            part.keep(begin + new.shape[1] - 1, self.sequences)
        self.decoding.watch.look()
        return new, over

    def _draft(self, count: int) -> Draft | None:
        """Return guesses, unless a sliding window would drop tokens that some of the guesses still see."""
        for reader in self.readers:
            if reader.window is not None:
                count = min(count, reader.window - self.sequences.length)
        if count < 1 or not self.began:
            return None
        return self.drafter.draft(self.sequences, count, self.ended)

    def _accepted(self, logits: Tensor, draft: Draft | None) -> Tensor:
        """Return the accepted guesses and the token after them, `(b, m + 1)`."""
        probs = self.policy.probs(logits)
        if draft is None:
            return most_likely(logits[:, -1]) if probs is None else draw_from(probs[:, -1])
        if probs is None:
            wanted = logits.argmax(dim=-1)
            # the column after the accepted guesses is right in every row, since its logits have read accepted tokens
            # only
            return wanted[:, : self._fewest(wanted[:, :-1] == draft.tokens) + 1]
        guessed = draft.tokens
        chance = probs[:, :-1].gather(-1, guessed.unsqueeze(-1)).squeeze(-1)
        # a guess that was not drawn, as of `prompt_lookup`, has q = 1: it is accepted if u < p
        drawn = torch.rand_like(chance)
        if draft.probs is not None:
            if draft.probs.shape[-1] != probs.shape[-1]:
                raise InputError(
                    f"the draft model gives logits for {draft.probs.shape[-1]} tokens, the model for "
                    f"{probs.shape[-1]}; both need one vocabulary."
                )
            # u < p / q, without the division, whose q may be 0
            drawn = drawn * draft.probs.gather(-1, guessed.unsqueeze(-1)).squeeze(-1)
        right = drawn < chance
        kept = self._fewest(right)
        if kept == guessed.shape[1]:
            # no guess was rejected: one more token comes free, from the logits after the last guess
            return torch.cat((guessed, draw_from(probs[:, -1])), dim=1)
        instead = draw_from(_left_over(probs[:, kept], draft, kept))
        # rows whose guess was accepted at this place keep it; the others take the replacement
        last = torch.where(right[:, kept, None], guessed[:, kept, None], instead)
        return torch.cat((guessed[:, :kept], last), dim=1)

    def _fewest(self, right: Tensor) -> int:
        """Return the number of guesses `(b, k)` before the first wrong one in any row; ended rows do not count."""
        if self.ended is not None:
            right = right | self.ended.unsqueeze(-1)
        return int(right.long().cumprod(dim=-1).sum(dim=-1).amin())

    def _until_all_end(self, new: Tensor, eos_token: int) -> tuple[Tensor, bool]:
        """Cut new tokens after the column in which the last row ends; the second value is True if it does."""
        ended = (new == eos_token).cumsum(dim=-1) > 0
        if self.ended is not None:
            ended = ended | self.ended.unsqueeze(-1)
        self.ended = ended[:, -1]
        going = int((~ended.all(dim=0)).sum())
        return new[:, : going + 1], going < new.shape[1]


def _left_over(probs: Tensor, draft: Draft, place: int) -> Tensor:
    """Return `max(p - q, 0)` at one place, `(b, v)`; a guess that was not drawn has q = 1."""
    if draft.probs is None:
        guess = F.one_hot(draft.tokens[:, place], probs.shape[-1]).bool()
        left = probs.masked_fill(guess, 0.0)
    else:
        left = (probs - draft.probs[:, place]).clamp(min=0.0)
    # of equal distributions only rounding is left over
    return torch.where(left.sum(dim=-1, keepdim=True) > 0, left, probs)
