"""Results that the layers of one pass share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Memo:
    """What was made in a pass, and of what.

    Args:
        forgets: keep nothing. A block that is compiled by itself must not read what another pass left, and what it
            makes twice is made once by the compiler.
    """

    def __init__(self, *, forgets: bool = False) -> None:
        self.held: dict[Any, Any] = {}
        self.forgets = forgets

    def once(self, make: Callable[[], T], what: str, *of: Any) -> T:
        """What `make` gives, made when it is first asked for.

        Args:
            make: the result follows from `what` and `of` alone.
            what: kind of the result.
            of: what it is made of; numbers and words count by their values, other objects by who they are.
        """
        if self.forgets:
            return make()
        rule = (what, *[each if each is None or isinstance(each, (int, str)) else id(each) for each in of])
        if rule not in self.held:
            # the objects stay here, so that their ids stay theirs
            self.held[rule] = make(), of
        return self.held[rule][0]

    def fork(self) -> Memo:
        """The same so far, which goes its own way from here."""
        twin = Memo(forgets=self.forgets)
        twin.held.update(self.held)
        return twin
