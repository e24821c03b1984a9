"""Tokens of a text in files that are mapped into memory: written once, and used by every run over the same text."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers.checkpoints.durable import sync, writing
from x_transformers.errors import ConfigError, InputError
from x_transformers.training.packages import needed
from x_transformers.training.texts import Texts
from x_transformers.training.tokenizer import FILE, Bpe, Bytes, Tokenizer

ABOUT = "about.json"
PARTS = ("train", "held_out")
LAYOUT = 1
TRAINED_ON = 100_000_000
"""Bytes of text that a tokenizer is trained on at most."""


@dataclass(frozen=True)
class About:
    """Description of the tokens.

    Attributes:
        layout: version of the files.
        dtype: of an id, by the name of numpy.
        tokens: number of tokens for training and held out.
        held_out_bytes: number of bytes of the held-out text.
        checksum: of all tokens, by which a resumed run recognizes its data.
    """

    layout: int
    dtype: str
    tokens: tuple[int, int]
    held_out_bytes: int
    checksum: str


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text, mapped into memory.

    Attributes:
        tokenizer: that made them.
        train, held_out: arrays of ids, `(n,)`.
        bytes_per_token: of the held-out text.
        checksum: of all tokens.
        title: name of the text.
    """

    tokenizer: Tokenizer
    train: Any
    held_out: Any
    bytes_per_token: float
    checksum: str
    title: str

    def check_length(self, context: int) -> None:
        """Raise an `InputError` unless training and held-out text are longer than a window of `context` tokens."""
        for ids, what in ((self.train, "training"), (self.held_out, "held-out")):
            if len(ids) <= context + 1:
                unit = "bytes" if isinstance(self.tokenizer, Bytes) else "tokens"
                raise InputError(
                    f"{self.title} has {len(ids)} {unit} of {what} text, but more than {context + 1} are needed; pass "
                    "a longer file, or a folder with more files."
                )


class TokenFiles:
    """Folder with the tokens of texts, in one folder for each text and tokenizer.

    Args:
        folder: of all of them.
        texts: to read.
        tokenizer: "bytes", "bpe" (trained on the text), or the path of a `tokenizer.json`.
        vocabulary: number of tokens of "bpe".
    """

    def __init__(self, folder: Path, texts: Texts, tokenizer: str, vocabulary: int) -> None:
        self.texts, self.tokenizer, self.vocabulary = texts, tokenizer, vocabulary
        kind: Any = [LAYOUT, tokenizer, vocabulary if tokenizer == "bpe" else 0]
        if tokenizer not in ("bytes", "bpe"):
            if not Path(tokenizer).is_file():
                raise ConfigError(f'`tokenizer` is {tokenizer}; it must be "bytes", "bpe" or the path of a {FILE}.')
            kind = [LAYOUT, hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()]
        key = hashlib.sha256(json.dumps([texts.fingerprint, kind]).encode()).hexdigest()[:16]
        self.folder = folder / key

    def open(self, report: Callable[[str], None] = lambda _: None) -> Tokens:
        """Return the tokens; they are written first unless they are there.

        Args:
            report: function that shows a line about what takes time.

        Raises:
            InputError: if there is no text.
            CheckpointError: if files cannot be written.
        """
        if not (self.folder / ABOUT).is_file():
            self._write(report)
        about = About(**json.loads((self.folder / ABOUT).read_text(encoding="utf-8")))
        numpy = needed("numpy", "train", "Training")
        train, held_out = (
            numpy.memmap(self.folder / f"{part}.bin", mode="r", dtype=about.dtype, shape=(count,))
            if count
            else numpy.zeros(0, about.dtype)
            for part, count in zip(PARTS, about.tokens, strict=True)
        )
        tokenizer = Bytes() if self.tokenizer == "bytes" else Bpe.loaded(self.folder / FILE)
        ratio = about.held_out_bytes / max(about.tokens[1], 1)
        return Tokens(tokenizer, train, held_out, ratio, about.checksum, self.texts.title)

    def _write(self, report: Callable[[str], None]) -> None:
        """Write all files into a draft, which gets its name when they are complete."""
        draft = self.folder.with_name(f".draft-{self.folder.name}-{secrets.token_hex(4)}")
        try:
            with writing(self.folder):
                draft.mkdir(parents=True)
                tokenizer = self._make_tokenizer(report)
                tokenizer.save(draft)
                about = _write_tokens(draft, self.texts, tokenizer, report)
                (draft / ABOUT).write_text(json.dumps(asdict(about)), encoding="utf-8")
                sync(draft)
                if not self.folder.exists():  # another run may have been faster
                    draft.rename(self.folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _make_tokenizer(self, report: Callable[[str], None]) -> Tokenizer:
        if self.tokenizer == "bytes":
            return Bytes()
        if self.tokenizer != "bpe":
            return Bpe.loaded(Path(self.tokenizer))
        texts = _first_bytes((text for text, held in self.texts if not held), TRAINED_ON)
        first = next(texts, b"")  # text that cannot be read is refused before anything is announced
        report(f"Training a tokenizer of {self.vocabulary:,} tokens ...")
        found = Bpe.trained(chain((first,), texts), self.vocabulary)
        if found.size < self.vocabulary:
            report(f"The text has only {found.size:,} tokens of at least two occurrences.")
        return found


def _first_bytes(texts: Iterable[bytes], most: int) -> Iterator[bytes]:
    """Yield texts until they have `most` bytes together."""
    count = 0
    for text in texts:
        yield text
        count += len(text)
        if count >= most:
            return


def _write_tokens(
    folder: Path, texts: Texts, tokenizer: Tokenizer, report: Callable[[str], None], chunk: int = 1000
) -> About:
    """Write the ids of all texts, each followed by the id that ends a document."""
    numpy = needed("numpy", "train", "Training")
    dtype = "uint8" if tokenizer.size <= 2**8 else "uint16" if tokenizer.size <= 2**16 else "uint32"
    counts, held_out_bytes, read = [0, 0], 0, 0
    sums = [hashlib.sha256(), hashlib.sha256()]
    documents = iter(texts)
    with (folder / "train.bin").open("wb") as train, (folder / "held_out.bin").open("wb") as held_out:
        while batch := list(islice(documents, chunk)):
            for (text, held), ids in zip(batch, tokenizer.encode([text for text, _ in batch]), strict=True):
                found = numpy.frombuffer(ids, dtype) if isinstance(ids, bytes) else numpy.asarray(ids, dtype)
                if tokenizer.end is not None:
                    found = numpy.append(found, numpy.asarray(tokenizer.end, dtype))
                (held_out if held else train).write(found.tobytes())
                sums[held].update(found.tobytes())
                counts[held] += len(found)
                held_out_bytes += len(text) * held
            read += len(batch)
            if read % (10 * chunk) == 0:
                report(f"{read:,} documents, {sum(counts):,} tokens ...")
    checksum = hashlib.sha256(b"".join(each.digest() for each in sums)).hexdigest()
    return About(LAYOUT, dtype, (counts[0], counts[1]), held_out_bytes, checksum)


def as_tensor(ids: Any) -> Tensor:
    """Return ids `(...)` as a tensor of 64-bit integers."""
    return torch.from_numpy(ids.astype("int64"))
