"""Keywords of a class that builds several stacks: some for all of them, some for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from x_transformers.errors import ConfigError


def refuse_in_groups(reserved: Mapping[str, str], groups: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse keywords of stacks that the class has keywords of its own for.

    Args:
        reserved: name to what to set instead, or why it cannot be set.
        groups: name of a group to its keywords; the group "kwargs" has no name for the user.

    Raises:
        ConfigError: with the name, the group and what to set.
    """
    for group, options in groups.items():
        for name in options or ():
            if name in reserved:
                place = "" if group == "kwargs" else f" in `{group}`"
                raise ConfigError(f"`{name}`{place}: {reserved[name]}.")
