"""Errors that say what was given, what the bound or the conflict is, and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError, AssertionError):
    """Options that cannot be built. Raised at construction, never later.

    It is also an `AssertionError`, so that handlers written for libraries that assert keep working.
    """


class InputError(ValueError, AssertionError):
    """A call whose arguments do not fit the model: values, dtypes or combinations."""


class ShapeError(InputError):
    """A tensor of the wrong rank, width or length."""


class TokenRangeError(InputError, IndexError):
    """A token id outside of the vocabulary."""


class StateDictError(RuntimeError, ValueError):
    """A state dict that does not fit the model. The model keeps the weights it had."""


class CheckpointError(RuntimeError, ValueError):
    """A file or folder that cannot be read, or that belongs to something else."""


class Faults:
    """Collects every fault of one call, so that a user meets all of them in one `ConfigError`."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)

    @contextmanager
    def catching(self, say: Callable[[str], str] = str) -> Iterator[None]:
        """Turn a `ConfigError` raised inside the block into collected messages, each rewritten by `say`."""
        try:
            yield
        except ConfigError as error:
            for message in getattr(error, "faults", [str(error)]):
                self.add(say(message))

    def raise_if_any(self, subject: str) -> None:
        """Raise one `ConfigError` that lists the collected messages, if there are any."""
        if not self.messages:
            return
        if len(self.messages) == 1:
            error = ConfigError(f"{subject}: {self.messages[0]}")
        else:
            listed = "\n".join(f"  - {message}" for message in self.messages)
            error = ConfigError(f"{subject}: {len(self.messages)} faults\n{listed}")
        error.faults = list(self.messages)  # type: ignore[attr-defined]
        raise error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause naming the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""
