"""Tokenizers: bytes as they are, or byte-level BPE of the package `tokenizers`, trained on the data or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from x_transformers.errors import ConfigError, InputError
from x_transformers.training.packages import needed

FILE = "tokenizer.json"
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Names of the token that ends a document, in tokenizers that are loaded."""


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        size: number of tokens.
        end: id that ends a document, or None.
    """

    @property
    def size(self) -> int: ...

    @property
    def end(self) -> int | None: ...

    def encode(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        """Return the ids of each text."""
        ...

    def prompt(self, text: bytes) -> list[int]:
        """Return the ids of a text to continue, with the special tokens that texts begin with."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...

    def save(self, folder: Path) -> None:
        """Write what is needed to load the tokenizer from a folder."""
        ...


class Bytes:
    """The 256 bytes. Documents follow each other without a token between them."""

    size = 256
    end = None

    def encode(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        """Return the bytes of each text."""
        return list(texts)

    def prompt(self, text: bytes) -> list[int]:
        """Return the bytes of a text to continue."""
        return list(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of bytes; those that are no UTF-8 are shown as a replacement character."""
        return bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write nothing."""


class Bpe:
    """Byte-level BPE.

    Args:
        inner: a `tokenizers.Tokenizer`.
        end: id that ends a document; default that of a token with one of the usual names.
    """

    def __init__(self, inner: Any, end: int | None = None) -> None:
        self.inner = inner
        self.size = int(inner.get_vocab_size())
        named = (found for name in ENDS if (found := inner.token_to_id(name)) is not None)
        self.end = next(named, None) if end is None else end

    @classmethod
    def trained(cls, texts: Iterable[bytes], size: int) -> Bpe:
        """Train a tokenizer.

        Args:
            texts: to train on.
            size: number of tokens.
        """
        package = _package()
        names = ("decoders", "models", "pre_tokenizers", "trainers")
        decoders, models, pre_tokenizers, trainers = (_package(f".{name}") for name in names)
        inner = package.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer)
        return cls(inner)

    @classmethod
    def loaded(cls, path: Path, end: int | None = None) -> Bpe:
        """Load a tokenizer.

        Args:
            path: of a `tokenizer.json`.
            end: id that ends a document.

        Raises:
            InputError: if it cannot be read.
        """
        package = _package()
        try:
            return cls(package.Tokenizer.from_file(str(path)), end)
        except Exception as error:  # the package raises plain exceptions
            raise InputError(f"The tokenizer {path} cannot be read ({error}); pass another one.") from error

    def encode(self, texts: Sequence[bytes]) -> list[Sequence[int]]:
        """Return the ids of each text, without special tokens."""
        found = self.inner.encode_batch_fast(
            [text.decode("utf-8", "replace") for text in texts], add_special_tokens=False
        )
        return [each.ids for each in found]

    def prompt(self, text: bytes) -> list[int]:
        """Return the ids of a text to continue, with the special tokens that texts begin with."""
        shown = text.decode("utf-8", "replace")
        plain, whole = (self.inner.encode(shown, add_special_tokens=special).ids for special in (False, True))
        if not plain:
            return [each for each in whole if each != self.end]
        # some tokenizers also add tokens after the text, which would end it
        ends = (end for end in range(len(plain), len(whole) + 1) if whole[end - len(plain) : end] == plain)
        return whole[: next(ends, None)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self.inner.decode(list(ids))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self.inner.save(str(folder / FILE))


def tokenizer_at(place: Path, vocabulary: int, end: int | None = None) -> Tokenizer:
    """Return the tokenizer of a model: the `tokenizer.json` in its folder or one above it, otherwise bytes.

    Args:
        place: a file or folder.
        vocabulary: number of tokens of the model.
        end: id that ends a document; default that of a token with one of the usual names.

    Raises:
        ConfigError: if there is none, and the model is not one over bytes; or if it has more tokens than the model.
    """
    place = place.absolute()
    for folder in [place, *place.parents][:4]:
        path = folder if folder.name == FILE else folder / FILE
        if path.is_file():
            found = Bpe.loaded(path, end)
            if found.size > vocabulary:
                raise ConfigError(
                    f"The tokenizer {path} has {found.size} tokens, and the model {vocabulary}; pass the model's own "
                    "with --tokenizer."
                )
            return found
    if vocabulary == Bytes.size:
        return Bytes()
    raise ConfigError(
        f"There is no {FILE} next to the model, which has {vocabulary} tokens and is no model over bytes; pass one "
        "with --tokenizer."
    )


def _package(part: str = "") -> Any:
    return needed(f"tokenizers{part}", "train", "A tokenizer")
