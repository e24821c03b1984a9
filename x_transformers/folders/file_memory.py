"""Tensors over pieces of files: pages of the files where that is possible, read into memory where it is not.

A mapping takes no time, and the numbers are read when they are used for the first time. It is private: what is written
into a tensor stays in this process, and the file never changes. A file whose name is given to another one (as
`os.replace` does, and `save_pretrained`) leaves the tensors as they are; one that is overwritten or cut in its place
does not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from io import FileIO
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
SMALLEST = 2**16
"""Bytes below which reading is faster than mapping."""
MAP_FIXED = 0x10
"""Puts a mapping at an address; the same number on Linux and macOS, and not in Python's `mmap`."""


class Piece(NamedTuple):
    """Bytes of an open file, from `start` to `end`."""

    file: FileIO
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


def file_tensor(pieces: Sequence[Piece], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of the bytes of pieces of files, one piece after the other.

    The tensor has a storage of its own, and may be written to.

    Args:
        pieces: as many bytes as the tensor has.
        dtype, shape: of the tensor.

    Raises:
        EOFError: if a file ends before a piece does.
    """
    found = _mapped(pieces, dtype)
    if found is None:
        found = torch.empty(sum(piece.size for piece in pieces), dtype=torch.uint8)
        start = 0
        for piece in pieces:
            _read(piece, 0, memory_of(found)[start : start + piece.size])
            start += piece.size
    return found.view(dtype).view(shape)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _mapped(pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor | None:
    """Return the bytes of pieces, of which those are mapped that can be; None if there is nothing to gain by it.

    The first piece begins as far into a page as it does in its file. A later one is mapped if the same is true of it,
    which depends on the sizes of those before; otherwise it is read.
    """
    size, into_page = sum(piece.size for piece in pieces), pieces[0].start % PAGE
    if MAP is None or size < SMALLEST or into_page % dtype.itemsize:
        return None
    region = mmap.mmap(-1, -(-(into_page + size) // PAGE) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=into_page)
    address, memory = found.data_ptr(), memory_of(found)
    ends = list(accumulate(piece.size for piece in pieces))
    mapped = [(into_page + end - piece.end) % PAGE == 0 for piece, end in zip(pieces, ends, strict=True)]
    for piece, end, maps in zip(pieces, ends, mapped, strict=True):
        if maps and not _map(piece, address + end - piece.size):
            return None
    for piece, end, maps in zip(pieces, ends, mapped, strict=True):
        # the last page of a piece is also the first one of the next, whose mapping replaced it
        over = 0 if end == size else min((into_page + end) % PAGE, piece.size)
        count = over if maps else piece.size
        _read(piece, piece.size - count, memory[end - count : end])
    return found


def _read(piece: Piece, start: int, memory: memoryview) -> None:
    """Read bytes from a start in a piece; raises EOFError if the file has fewer."""
    piece.file.seek(piece.start + start)
    while memory:  # one call reads 2 GiB at most
        count = piece.file.readinto(memory)
        if not count:
            raise EOFError
        memory = memory[count:]


def _map(piece: Piece, address: int) -> bool:
    """Map the pages that contain a piece, such that its start is at an address; return False if that fails.

    Raises:
        EOFError: if the file has fewer bytes; reading a mapping after the end of a file would end the process.
    """
    number, into_page = piece.file.fileno(), piece.start % PAGE
    if os.fstat(number).st_size < piece.end:
        raise EOFError
    access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED
    start = address - into_page
    return MAP(start, piece.size + into_page, access, flags, number, piece.start - into_page) == start


def _find_map() -> Any:
    """Return the C library's `mmap`; None on systems without it, and where mapped files cannot be replaced."""
    if sys.platform not in ("linux", "darwin") or sys.maxsize < 2**32:
        return None
    found = ctypes.CDLL(None).mmap
    found.restype = ctypes.c_void_p
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    return found


MAP = _find_map()
