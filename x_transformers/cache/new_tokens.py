"""Which tokens of a pass are new to the cache."""

from __future__ import annotations

from x_transformers.errors import InputError


def tokens_to_run(given: int, held: int, age: int | None, *, only_new: bool, fewest: int = 1) -> tuple[int, int]:
    """Return how many of the last tokens of a pass run, and how many of them are new at most.

    A sequence that is longer than the cache begins with the cached tokens, so that the others are new. One that is not
    longer cannot contain them: its last token is new, or as many as `age` says.

    Args:
        given: number of tokens that the caller gave.
        held: number of cached tokens.
        age: the caller's `cache_age`, the number of the last tokens that run; None for all that are new.
        only_new: the caller said that all given tokens are new.
        fewest: least number of tokens that can run.

    Raises:
        InputError: if fewer tokens are new.
    """
    longer = given > held
    new = given - held if longer and not only_new else given
    count = age if age is not None else new if longer or only_new else min(given, 1)
    if not fewest <= count <= new:
        raise InputError(
            f"{count} tokens are to run (`cache_age`), but x has {given} tokens, of which {new} are new to a cache of "
            f"{held}. Run between {fewest} and {new}, or pass the new tokens with `input_not_include_cache = True`."
        )
    return count, new
