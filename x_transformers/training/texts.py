"""Documents to train on: of a file, a folder, JSONL, or a dataset of the Hugging Face hub; some are held out."""

from __future__ import annotations

import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from x_transformers.errors import InputError
from x_transformers.training.packages import needed

HUB = "hf:"
LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "__pycache__"}
HELD_OUT = 20
"""Number of documents of which one is held out."""
MOST_WAITING = 200
"""Number of documents at most without one that is held out."""


@dataclass(frozen=True)
class Texts:
    """Text to train on. One document in twenty is held out, selected by a checksum of its name.

    If that selects none of a few documents, the last one is held out; of a single document, its last twentieth.

    Attributes:
        source: a file; a folder, of which all files are read; `hf:NAME` or `hf:NAME/CONFIGURATION`, a dataset of the
            Hugging Face hub with two words in its name; None for the source code of Python's standard library.
        field: of a line of JSONL or a row of a dataset that contains the text.
        split: of the dataset.
        most: number of documents that are read at most; 0 for all.
    """

    source: str | None = None
    field: str = "text"
    split: str = "train"
    most: int = 0

    def __iter__(self) -> Iterator[tuple[bytes, bool]]:
        """Yield each document as UTF-8, and True if it is held out.

        Raises:
            InputError: if there is no data, or if it cannot be read; the message says what to change.
        """
        waiting: list[bytes] | None = []  # until one is held out, or this number is reached
        for name, text in islice(self._documents(), self.most or None):
            held_out = zlib.crc32(name.encode("utf-8", "surrogateescape")) % HELD_OUT == 0
            if waiting is not None and not held_out and len(waiting) < MOST_WAITING:
                waiting.append(text)
                continue
            yield from ((earlier, False) for earlier in waiting or ())
            yield text, held_out or waiting is not None
            waiting = None
        if not waiting:
            return
        *others, last = waiting
        yield from ((text, False) for text in others)
        cut = 0 if others else len(last) * (HELD_OUT - 1) // HELD_OUT
        if cut:
            yield last[:cut], False
        yield last[cut:], True

    @property
    def title(self) -> str:
        """Name of the text, for people."""
        return self.source or "Python's standard library"

    @property
    def fingerprint(self) -> str:
        """Checksum of what the text is read from, which changes when files do, without reading them."""
        parts: list[Any] = [self.source, self.field, self.split, self.most]
        if not self._on_hub:
            for path in self._files():
                state = path.stat()
                parts.append([path.relative_to(self.root).as_posix(), state.st_size, state.st_mtime_ns])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def root(self) -> Path:
        """The file or folder."""
        return Path(self.source or sysconfig.get_path("stdlib"))

    @property
    def _on_hub(self) -> bool:
        return self.source is not None and self.source.startswith(HUB)

    def _files(self) -> list[Path]:
        """Return the files, in the order of their names."""
        root = self.root
        if not root.exists():
            raise InputError(
                f"There is no data at {root}; pass --data FILE_OR_FOLDER, or --data hf:NAME for a dataset of the "
                "Hugging Face hub."
            )
        if root.is_file():
            return [root]
        found = sorted(root.rglob("*" if self.source else "*.py"))
        left_out = set() if self.source else LEFT_OUT
        return [path for path in found if path.is_file() and not left_out & set(path.relative_to(root).parts[:-1])]

    def _documents(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the text of each document."""
        if self._on_hub:
            yield from self._from_hub()
            return
        root = self.root
        try:
            for path in self._files():
                name = path.relative_to(root).as_posix()
                if path.suffix in (".jsonl", ".ndjson"):
                    yield from self._from_lines(path, name)
                else:
                    yield name, path.read_bytes()
        except OSError as error:
            raise InputError(f"The data at {root} cannot be read ({error.strerror}); pass another --data.") from error

    def _from_lines(self, path: Path, name: str) -> Iterator[tuple[str, bytes]]:
        """Yield a document for each line of JSON."""
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"Line {number} of {path} is no JSON ({error}); mend or remove it.") from error
                yield f"{name}:{number}", self._text_of(row, f"Line {number} of {path}")

    def _from_hub(self) -> Iterator[tuple[str, bytes]]:
        """Yield a document for each row of a dataset, which is streamed."""
        assert self.source is not None
        datasets = needed("datasets", "hub", "A dataset of the Hugging Face hub")
        words = self.source.removeprefix(HUB).split("/")
        name, configuration = "/".join(words[:2]), "/".join(words[2:]) or None
        try:
            rows = datasets.load_dataset(name, configuration, split=self.split, streaming=True)
            for number, row in enumerate(rows):
                yield str(number), self._text_of(row, f"Row {number} of {self.source}")
        except InputError:
            raise
        except Exception as error:  # errors of the network, of the hub, and of every format
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise InputError(f"The dataset {name} cannot be read ({reason}); pass another --data.") from error

    def _text_of(self, row: Any, where: str) -> bytes:
        text = row.get(self.field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            known = ", ".join(row) if isinstance(row, dict) else "nothing"
            raise InputError(f"{where} has no text in `{self.field}`; pass --field with one of its fields: {known}.")
        return text.encode("utf-8", "replace")
