"""The tokens of one pass: which of a caller's are new, and how many came before."""

from __future__ import annotations

from torch import Tensor

from x_transformers.cache import KVCache
from x_transformers.errors import InputError, ShapeError
from x_transformers.models.memory_layout import Layout


class Tokens:
    """The new tokens of a pass.

    Attributes:
        count: how many.
        given: how many tokens the caller gave, old ones among them.
        first: index of the first one in its row; a device scalar for a static cache.
        leading: items that this pass puts before them: class tokens and prepended embeddings.
        kv: the cache, or None.
        starts: nothing is cached before this pass.
    """

    __slots__ = ("count", "first", "given", "kv", "leading", "starts")

    def __init__(
        self, count: int, given: int, first: int | Tensor, leading: int, kv: KVCache | None, starts: bool
    ) -> None:
        self.count, self.given, self.first, self.leading, self.kv, self.starts = (
            count,
            given,
            first,
            leading,
            kv,
            starts,
        )

    def newest(self, t: Tensor, dim: int) -> Tensor:
        """The part of a per-token tensor that speaks of the new tokens.

        Raises:
            ShapeError: if it covers neither them nor all so far.
        """
        covered = t.shape[dim]
        if covered == self.count:
            return t
        so_far = self.so_far
        if covered < self.count or covered not in (self.given, so_far if so_far is not None else covered):
            raise ShapeError(
                f"a tensor over {covered} tokens was given for {self.count} new tokens; it must cover them, or all "
                "tokens so far."
            )
        return t.narrow(dim, covered - self.count, self.count)

    @property
    def so_far(self) -> int | None:
        """Tokens of a row up to the last new one, or None where a started static cache counts them on the device."""
        return self.count if self.kv is None else self.kv.count_tokens_with(self.count)


def new_tokens(n: int, kv: KVCache | None, leading: int, *, only_new: bool, age: int | None, layout: Layout) -> Tokens:
    """Which of the n tokens that a caller gives are to run.

    Args:
        n: tokens given: the whole sequence, or those that are not cached.
        kv: the cache, or None.
        leading: items before the tokens.
        only_new: the tokens given exclude cached ones.
        age: run only that many, or None for all that are not cached. Without a cache all run.
        layout: of the model.

    Raises:
        InputError: if there are not as many, or none.
    """
    if kv is None:
        return Tokens(n, n, 0, leading, None, True)
    held, started = kv.tokens - kv.prepended, kv.started
    if not only_new:
        kv.refuse_whole_sequence()
    first = kv.count_tokens(layout.every is not None)
    new = n if only_new else n - held
    age = new if age is None else age
    if not 0 <= age <= max(new, 0) or (age == 0 and not leading):
        raise InputError(
            f"{age} tokens are to run (`cache_age`), but x has {n} tokens and the cache holds {held}; run between "
            "1 and the number of tokens that are not cached. Pass the whole sequence, or the new tokens with "
            "`input_not_include_cache = True`."
        )
    return Tokens(age, n, first + (new - age) if new > age else first, leading, kv, not started)
