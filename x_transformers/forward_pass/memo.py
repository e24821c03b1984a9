"""Results that the layers of one pass share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Memo:
    """Results of one pass, each with the objects that it was computed from.

    Entries are only added, so that the first `n` of them are the memo as it was when it held `n`.

    Args:
        forgets: keep nothing. A block that is compiled by itself must not read what another pass left, and the
            compiler removes what is computed twice.

    Attributes:
        held: `{key: (result, objects)}` in the order of insertion.
    """

    def __init__(self, *, forgets: bool = False) -> None:
        self.held: dict[Any, Any] = {}
        self.forgets = forgets

    def once(self, make: Callable[[], T], what: str, *of: Any) -> T:
        """Return `make()`, computed at the first request only.

        Args:
            make: computes the result from `what` and `of`, and from nothing else.
            what: kind of the result.
            of: the arguments; numbers and strings are compared by value, other objects by identity.
        """
        if self.forgets:
            return make()
        key: tuple[Any, ...] = (what,)
        for each in of:
            key += (each if each is None or isinstance(each, (int, str)) else id(each),)
        if key not in self.held:
            # the objects are kept, so that no other object gets the id of one of them
            self.held[key] = make(), of
        return self.held[key][0]

    def fork(self, first: int | None = None) -> Memo:
        """Return an independent copy, of the first entries only if their number is given."""
        copied = Memo(forgets=self.forgets)
        copied.held.update(itertools.islice(self.held.items(), first))
        return copied
