"""Parts of a README that a program writes: what stands between two marks."""

from __future__ import annotations


def replaced(text: str, start: str, end: str, block: str) -> str:
    """The text with `block`, its marks included, in place of what stands between the marks `start` and `end`."""
    before, rest = text.split(start)
    return before + block + rest.split(end)[1]
