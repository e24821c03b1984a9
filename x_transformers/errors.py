"""Exceptions of the library. Messages say what was given, what is allowed and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from x_transformers.options.suggestions import suggestion


class ConfigError(ValueError, AssertionError):
    """Options with which nothing can be built; raised by constructors.

    Also an `AssertionError`, so that code that expects assertions to fail keeps working.
    """


class UnknownKeywordError(ConfigError, TypeError):
    """Options among which at least one keyword is unknown.

    Also a `TypeError`, which Python raises for an unknown keyword, so that code that probes for keywords keeps working.
    """


class InputError(ValueError, AssertionError):
    """Arguments of a call that do not fit the model: values, dtypes or combinations."""


class UnknownArgumentError(InputError, TypeError):
    """Arguments of a call among which at least one name is unknown.

    Also a `TypeError`, which Python raises for an unknown argument.
    """


class ShapeError(InputError):
    """A tensor of the wrong rank, width or length."""


class TokenRangeError(InputError, IndexError):
    """A token id outside of the vocabulary."""


class NotFiniteError(InputError, FloatingPointError):
    """Numbers of a model that are NaN or infinite where they decide about the result."""


class StateDictError(RuntimeError, ValueError):
    """A state dict that does not fit the model; the model keeps its weights."""


class CheckpointError(RuntimeError, ValueError):
    """A checkpoint file or folder that cannot be read, or that is of another kind."""


class Faults:
    """Collected faults of one constructor call, so that a user sees all of them in a single `ConfigError`.

    Attributes:
        messages: the messages so far, without duplicates.
        unknown: one of them is about an unknown keyword.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.unknown = False

    def add(self, message: str) -> None:
        """Collect a message, unless it is there already."""
        if message not in self.messages:
            self.messages.append(message)

    def add_unknown(self, keyword: str, known: Iterable[str], near: str | None = None) -> None:
        """Collect an unknown keyword, with a suggestion.

        Args:
            keyword: the keyword in full.
            known: names to suggest from.
            near: what is compared with these names; default the keyword.
        """
        self.unknown = True
        self.add(f"unknown keyword `{keyword}`.{suggestion(keyword if near is None else near, known)}")

    @contextmanager
    def catching(self, rewrite: Callable[[str], str] = str) -> Iterator[None]:
        """Collect the messages of a `ConfigError` that the block raises, instead of raising it.

        Args:
            rewrite: function applied to each message.
        """
        try:
            yield
        except ConfigError as error:
            self.unknown |= isinstance(error, UnknownKeywordError)
            for message in getattr(error, "faults", [str(error)]):
                self.add(rewrite(message))

    def raise_if_any(self, subject: str) -> None:
        """Raise a `ConfigError` with all collected messages, if there are any.

        Args:
            subject: name of the class that is being built, put in front of the messages.

        Raises:
            ConfigError: if there are messages; its attribute `faults` is the list of them. If a keyword is unknown, an
                `UnknownKeywordError`.
        """
        if not self.messages:
            return
        kind = UnknownKeywordError if self.unknown else ConfigError
        if len(self.messages) == 1:
            error = kind(f"{subject}: {self.messages[0]}")
        else:
            listed = "\n".join(f"  - {message}" for message in self.messages)
            error = kind(f"{subject}: {len(self.messages)} faults\n{listed}")
        error.faults = list(self.messages)  # type: ignore[attr-defined]
        raise error
