"""Writing of a folder: tensors into one or several safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers.checkpoints.durable import replacing, writing
from x_transformers.errors import CheckpointError, InputError
from x_transformers.folders.file_memory import memory_of
from x_transformers.folders.shards import CHECKSUMS, DTYPES, INDEX, WHOLE

CONFIG = "config.json"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written.

    Attributes:
        dtype, shape: of the tensor.
        make: returns it; called when it is written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def entry_of(name: str, tensor: Any) -> Entry:
    """Return the entry of a tensor.

    Raises:
        CheckpointError: if it is none, or has no values that a file could contain.
    """
    if not isinstance(tensor, Tensor):
        what = f"is a {type(tensor).__name__}, not a tensor"
    elif type(tensor) not in (Tensor, torch.nn.Parameter):
        what = f"is a {type(tensor).__name__}, which is not a whole tensor; gather or dequantize it"
    elif tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        what = "is on the meta device, sparse or quantized"
    elif tensor.dtype not in NAMES:
        what = f"is of {tensor.dtype}"
    else:
        return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor.detach())
    raise CheckpointError(f"`{name}` {what}, and has no place in a safetensors file.")


def parse_size(size: int | str) -> int:
    """Return a size in bytes, of a number or a string such as "5GB" or "100 MiB".

    Raises:
        InputError: if it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    found = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if found < 1:
        raise InputError(f'`max_shard_size` is {size!r}; pass a number of bytes, or a size such as "5GB" or "500MB".')
    return found


def write_folder(
    folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entry], max_shard_size: int | str, *, mark: bool
) -> None:
    """Write `config.json` and the files of the weights; files of an earlier model are replaced.

    New files appear under their names after all of them are on the disk, so that an error leaves the folder as it was.

    Args:
        folder: is made if it is not there.
        config: contents of `config.json`.
        entries: tensors, by name.
        max_shard_size: of one file, except for tensors that are larger; in bytes, or such as "5GB".
        mark: add checksums, for readers of this library.

    Raises:
        CheckpointError: if something cannot be written.
        InputError: if `max_shard_size` is no size.
    """
    shards = _split(entries, parse_size(max_shard_size))
    with writing(folder), ExitStack() as pending:
        folder.mkdir(parents=True, exist_ok=True)
        index = {name: file for file, part in shards.items() for name in part}
        total = sum(entry.nbytes for entry in entries.values())
        # leaving the stack renames the drafts in the opposite order: the configuration is last
        _write_json(pending.enter_context(replacing(folder / CONFIG)), config)
        if len(shards) > 1:
            about = {"metadata": {"total_size": total}, "weight_map": index}
            _write_json(pending.enter_context(replacing(folder / INDEX)), about)
        for file, part in shards.items():
            _write_shard(pending.enter_context(replacing(folder / file)), part, mark)
        kept = {*shards, *([INDEX] if len(shards) > 1 else [])}
        stale = [path for path in folder.iterdir() if OWN_FILES.fullmatch(path.name) and path.name not in kept]
        pending.callback(lambda: [path.unlink() for path in stale])


def _split(entries: Mapping[str, Entry], most: int) -> dict[str, dict[str, Entry]]:
    """Return the tensors of each file, by its name."""
    parts: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if parts[-1] and size + entry.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = entry
        size += entry.nbytes
    # readers map numbers of a size to addresses that are multiples of it
    parts = [dict(sorted(part.items(), key=lambda item: -item[1].dtype.itemsize)) for part in parts]
    if len(parts) == 1:
        return {WHOLE: parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, start=1)}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def _write_shard(path: Path, entries: Mapping[str, Entry], mark: bool) -> None:
    """Write a safetensors file: the length of the header, the header, the tensors.

    Checksums come before the tensors in the file, but are known after them: the header is written twice.
    """
    header = _header(entries, dict.fromkeys(entries, 0) if mark else None)
    with path.open("wb") as file:
        file.write(header)
        checksums = {}
        for name, entry in entries.items():
            data = memory_of(_on_cpu(entry))
            if len(data) != entry.nbytes:
                raise CheckpointError(f"tensor `{name}` has another size than was announced.")
            checksums[name] = zlib.crc32(data) if mark else 0
            file.write(data)
        if mark:
            file.seek(0)
            file.write(_header(entries, checksums))


def _on_cpu(entry: Entry) -> Tensor:
    return entry.make().to("cpu", entry.dtype).contiguous()


def _header(entries: Mapping[str, Entry], checksums: Mapping[str, int] | None) -> bytes:
    """Return the header with its length, of the same size for all checksums."""
    metadata = {"format": "pt"}
    if checksums is not None:
        # right-aligned numbers: JSON ignores spaces
        pairs = (f"{json.dumps(name)}:{value:10}" for name, value in checksums.items())
        metadata[CHECKSUMS] = "{" + ",".join(pairs) + "}"
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, (start, entry) in _offsets(entries):
        offsets = [start, start + entry.nbytes]
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _offsets(entries: Mapping[str, Entry]) -> Iterator[tuple[str, tuple[int, Entry]]]:
    start = 0
    for name, entry in entries.items():
        yield name, (start, entry)
        start += entry.nbytes
