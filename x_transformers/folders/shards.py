"""Tensors of a folder, one by one from one or several safetensors files.

Files of this library contain the CRC-32 of each tensor, so that a damaged one is noticed and named. Their tensors are
read for it; those of other files are read when they are used.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from x_transformers.errors import CheckpointError
from x_transformers.folders.file_memory import Piece, file_tensor, memory_of

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHECKSUMS = "x_transformers.crc32"
"""Entry of the metadata of a file with the checksum of each tensor."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains an object of JSON.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} contains {type(found).__name__}, not an object of JSON.")
    return found


class Place(NamedTuple):
    """Where a tensor is in its file.

    Attributes:
        path: of the file.
        start, end: of its bytes.
        dtype, shape: of the tensor.
        checksum: of its bytes, if the file has one.
    """

    path: Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: int | None = None


class Shards:
    """Open files of a folder. Tensors are pages of the files: these may be replaced afterwards, but not overwritten.

    Args:
        files: each path with the open file.
        places: of the tensors, by name.
        about: metadata of each file.
    """

    def __init__(
        self, files: Mapping[Path, FileIO], places: Mapping[str, Place], about: Mapping[Path, Mapping[str, str]]
    ) -> None:
        self.files, self.places, self.about = files, places, about

    def tensor(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        place = self._place(name)
        return self._tensor([(name, place)], place.shape)

    def joined(self, names: Sequence[str]) -> Tensor | None:
        """Return tensors as one, whose rows are those of the first, then those of the second, and so on.

        Args:
            names: of the tensors.

        Returns:
            The tensor; None if the dtypes or the shapes of rows differ, so that they cannot be joined.

        Raises:
            CheckpointError: if one is missing or damaged.
        """
        places = [(name, self._place(name)) for name in names]
        _, first = places[0]
        if len({(place.dtype, place.shape[1:]) for _, place in places}) > 1 or not first.shape:
            return None
        rows = sum(place.shape[0] for _, place in places)
        return self._tensor(places, (rows, *first.shape[1:]))

    def _place(self, name: str) -> Place:
        place = self.places.get(name)
        if place is None:
            names = ", ".join(sorted(path.name for path in self.files))
            raise CheckpointError(f"{names} of this folder contain no tensor `{name}`, which the model needs.")
        return place

    def _tensor(self, places: Sequence[tuple[str, Place]], shape: tuple[int, ...]) -> Tensor:
        """Return the numbers in places of one dtype as one tensor."""
        pieces = [Piece(self.files[place.path], place.start, place.end) for _, place in places]
        name, first = places[0]
        try:
            found = file_tensor(pieces, first.dtype, shape)
        except EOFError as error:
            raise CheckpointError(f"{first.path} is damaged: it ends before tensor `{name}` does.") from error
        memory, start = memory_of(found), 0
        for name, place in places:
            part = memory[start : start + place.end - place.start]
            start += len(part)
            if place.checksum is not None and zlib.crc32(part) != place.checksum:
                raise CheckpointError(
                    f"{place.path} is damaged: the numbers of tensor `{name}` do not fit their checksum. Use another "
                    "copy of the file."
                )
        return found


def _read_header(path: Path, file: FileIO) -> tuple[dict[str, Place], dict[str, str]]:
    """Read the places of the tensors of a file, and its metadata.

    Raises:
        CheckpointError: if the file is damaged, or contains tensors of an unknown dtype.
    """
    try:
        # checks sizes, overlaps and the end of the file
        with safe_open(str(path), framework="pt", device="cpu"):
            pass
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}.") from error
    metadata = header.pop("__metadata__", {})
    checksums, places = _checksums(path, metadata), {}
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor `{name}` is of the dtype {about['dtype']}, which is not read.")
        start, end = (8 + length + offset for offset in about["data_offsets"])
        places[name] = Place(path, start, end, DTYPES[about["dtype"]], tuple(about["shape"]), checksums.get(name))
    return places, metadata


def _checksums(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    """Return the checksum of each tensor, if the file is one of this library."""
    try:
        found = json.loads(metadata.get(CHECKSUMS, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its checksums cannot be read: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(value, int) for value in found.values()):
        raise CheckpointError(f"{path} is damaged: its checksums are no numbers.")
    return found


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of weights, and of what older files contain besides them."""


@contextmanager
def open_shards(folder: Path) -> Iterator[Shards]:
    """Open the files of a folder: `model.safetensors`, or those that the index next to it lists.

    Raises:
        CheckpointError: if a file is missing or damaged, or does not contain what the index says.
    """
    whole = folder / WHOLE
    if whole.exists():
        paths, listed = [whole], None
    elif (folder / INDEX).exists():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{folder / INDEX} is damaged: its `weight_map` does not map tensors to files.")
        paths = sorted({folder / name for name in listed.values()})
        if any(path.parent != folder for path in paths):
            raise CheckpointError(f"{folder / INDEX} names files outside of its folder.")
    else:
        raise CheckpointError(
            f"{folder} contains neither {WHOLE} nor {INDEX}. Weights in other formats are not read; save them with "
            "`safe_serialization = True`."
        )
    with ExitStack() as stack:
        files: dict[Path, FileIO] = {}
        places: dict[str, Place] = {}
        about: dict[Path, Mapping[str, str]] = {}
        for path in paths:
            try:
                files[path] = stack.enter_context(path.open("rb", buffering=0))
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}.") from error
            found, about[path] = _read_header(path, files[path])
            places |= found
        for name, file in (listed or {}).items():
            if name not in places or places[name].path.name != file:
                raise CheckpointError(f"{folder / file} contains no tensor `{name}`, although {INDEX} says so.")
        yield Shards(files, places, about)
