"""Sections of the documentation that show keywords."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

TABLES = ("every-option.md", "keywords.md", "api.md", "pretrained-families.md")
"""Pages that list keywords without an explanation."""


def sections_of_keywords(docs: Path) -> dict[str, str]:
    """Return the page and anchor of the section about each keyword, as `"norms.md#rmsnorm"`.

    It is the section that shows the fewest other keywords; one with an example and in a chapter of papers, if there is
    any.

    Args:
        docs: the folder of the documentation.
    """
    found: dict[str, tuple[bool, bool, int, str]] = {}
    for path in sorted(docs.glob("*.md")):
        if path.name in TABLES:
            continue
        text = path.read_text(encoding="utf-8")
        for section in re.split(r"^## ", text, flags=re.M)[1:]:
            title, _, body = section.partition("\n")
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for name, without_example, others in _shown(body):
                rank = (without_example, "\nPaper" not in text, others, f"{path.name}#{anchor}")
                if name not in found or rank[:3] < found[name][:3]:
                    found[name] = rank
    return {name: place for name, (*_, place) in found.items()}


def _shown(body: str) -> Iterator[tuple[str, bool, int]]:
    """Yield the keywords of a section: each with True if no block contains it, and the number of keywords shown."""
    blocks = re.findall(r"^```python\n(.*?)^```$", body, re.M | re.S)
    examples = {name for block in blocks for name in re.findall(r"\b(\w+) = ", block)}
    mentioned = {name for name in re.findall(r"`(\w+)(?: = [^`]*)?`", body) if "_" in name}
    for name in examples:
        yield name, False, len(examples | mentioned)
    for name in mentioned - examples:
        yield name, True, len(examples | mentioned)
