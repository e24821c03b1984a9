"""Descriptions of arguments, from the docstrings that explain them."""

from __future__ import annotations

import inspect
import re


def described_arguments(owner: type) -> dict[str, str]:
    """Return a line for each argument that the docstring of a class explains: its name, its default, what it means.

    Args:
        owner: the class.
    """
    parts = re.split(r"^Args:\n", inspect.getdoc(owner) or "", maxsplit=1, flags=re.M)
    block = re.split(r"^\S", parts[-1], maxsplit=1, flags=re.M)[0] if len(parts) > 1 else ""
    defaults = {name: each.default for name, each in inspect.signature(owner).parameters.items()}
    lines = {}
    for names, text in re.findall(r"^ {4}(\*{0,2}\w[\w, *]*): (.*\n(?:^ {5,}.*\n)*)", f"{block.rstrip()}\n", re.M):
        for name in re.findall(r"\w+", names):
            if name not in defaults:  # keywords that the signature lists one by one
                continue
            value = "" if defaults[name] is inspect.Parameter.empty else f" = {defaults[name]!r}"
            lines[name] = f"    {name}{value}: {' '.join(text.split())}"
    return {name: lines[name] for name in defaults if name in lines}
