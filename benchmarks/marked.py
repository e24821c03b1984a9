"""Generated parts of a page, between two marks."""

from __future__ import annotations


def replaced(text: str, start: str, end: str, block: str) -> str:
    """Return the text with the part from mark `start` to mark `end` replaced by `block`, which includes the marks."""
    before, rest = text.split(start)
    return before + block + rest.split(end)[1]
