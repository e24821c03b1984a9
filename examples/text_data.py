"""Data of the text examples: bytes, windows of them, and the output folder."""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "__pycache__"}


def read_text(source: Path | None, context: int) -> tuple[Tensor, Tensor]:
    """Read training and held-out text as bytes.

    About one file in twenty is held out, selected by a checksum of its path.

    Args:
        source: a folder, or a file (whose last twentieth is held out); None for Python's standard library.
        context: number of bytes in a window.

    Returns:
        Training and held-out bytes, each `(n,)` uint8.

    Raises:
        SystemExit: if there is no text, or too little; the message says what to change.
    """
    root = source or Path(sysconfig.get_path("stdlib"))
    try:
        parts = _parts(root, pattern="*" if source else "*.py", left_out=set() if source else LEFT_OUT)
    except OSError as error:
        raise SystemExit(f"The data at {root} cannot be read ({error.strerror}); pass another --data.") from error
    train, held_out = (torch.frombuffer(bytearray(part or b"\0"), dtype=torch.uint8) for part in parts)
    for text, what in ((train, "training"), (held_out, "held-out")):
        if len(text) <= context + 1:
            raise SystemExit(
                f"The data at {root} has {len(text)} bytes of {what} text, but more than {context + 1} are needed; "
                "pass a longer file, or a folder with more files."
            )
    return train, held_out


def _parts(root: Path, pattern: str, left_out: set[str]) -> tuple[bytes, bytes]:
    if not root.exists():
        raise SystemExit(f"There is no data at {root}; pass --data FILE_OR_FOLDER.")
    if root.is_file():
        whole = root.read_bytes()
        return whole[: len(whole) * 19 // 20], whole[len(whole) * 19 // 20 :]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root)
        if path.is_file() and not left_out & set(name.parts[:-1]):
            parts[zlib.crc32(name.as_posix().encode("utf-8")) % 20 == 0].append(path.read_bytes())
    return b"".join(parts[0]), b"".join(parts[1])


def random_windows(text: Tensor, rows: int, length: int, seed: int, step: int) -> Tensor:
    """Return random windows `(rows, length)`, which depend only on seed and step: a resumed run sees the same data."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    start = torch.randint(len(text) - length + 1, (rows, 1), generator=generator)
    return text[start + torch.arange(length)].long()


def checksum(*texts: Tensor) -> str:
    """Return a checksum of texts, by which a resumed run recognizes its data."""
    found = hashlib.sha256()
    for text in texts:
        found.update(len(text).to_bytes(8, "big") + bytes(text.numpy()))
    return found.hexdigest()


def spaced_windows(text: Tensor, context: int, most: int) -> Tensor:
    """Return evenly spaced windows `(windows, context + 1)` whose predicted parts do not overlap."""
    count = (len(text) - 1) // context
    chosen = torch.arange(0, count, max(-(-count // most), 1))
    return text[chosen[:, None] * context + torch.arange(context + 1)].long()


def open_folder(folder: Path) -> None:
    """Create a folder; raise `SystemExit` if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise SystemExit(f"The folder {folder} cannot be written to ({error.strerror}); pass another --out.") from error
