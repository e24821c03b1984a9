"""Plain data as JSON, with tensors next to it. Reading runs no code: there is a fixed list of types.

A value of a type that JSON lacks is a mapping with a single key that begins with "$": `{"$tuple": [1, 2]}`.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import CheckpointError

DEEPEST = 100


SIMPLE = frozenset({bool, int, float, str, type(None)})


def pack(value: Any, name: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return a value as JSON data.

    Args:
        value: numbers (also of numpy), strings, None, paths, dtypes, tensors and arrays, in lists, tuples, deques and
            dictionaries.
        name: of the value, for messages and tensors.
        tensors: receives the tensors, by their names.
        depth: levels above.

    Raises:
        CheckpointError: if there is anything else in it, which could not be read back.
    """
    if depth > DEEPEST:
        raise CheckpointError(f"`{name[:40]}...` is nested more than {DEEPEST} levels deep; save less of it.")
    if type(value).__module__ == "numpy" and type(value).__name__ != "ndarray" and value.shape == ():
        value = value.item()
    if value is None:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Tensor) or (type(value).__module__ == "numpy" and value.dtype.kind in "biuf"):
        while name in tensors:
            name += "'"
        tensors[name] = value if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        return {"$tensor" if isinstance(value, Tensor) else "$array": name}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}

    def inner(item: Any, key: object) -> Any:
        return item if type(item) in SIMPLE else pack(item, f"{name}.{key}", tensors, depth + 1)

    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: inner(item, key) for key, item in value.items()}
        return {"$dict": [[inner(key, "keys"), inner(item, key)] for key, item in value.items()]}
    if type(value) in (list, tuple, deque, torch.Size):
        items = [inner(item, i) for i, item in enumerate(value)]
        if isinstance(value, deque):
            return {"$deque": items, "length": value.maxlen}
        return items if isinstance(value, list) else {"$tuple": items}
    raise CheckpointError(
        f"`{name}` is a {type(value).__name__}, which a checkpoint cannot contain, since it could not be read back "
        "without running code; turn it into numbers, strings, tensors, lists or dictionaries."
    )


def unpack(data: Any, tensor: Callable[[str], Tensor], depth: int = 0) -> Any:
    """Return the value of which `pack` made `data`.

    Args:
        data: as read from JSON.
        tensor: function from the name of a tensor to the tensor.
        depth: levels above.

    Raises:
        CheckpointError: if `data` is nothing that `pack` returns.
    """
    if depth > DEEPEST:
        raise CheckpointError(f"data is nested more than {DEEPEST} levels deep")
    if type(data) in SIMPLE:
        return data
    if isinstance(data, list):
        return [item if type(item) in SIMPLE else unpack(item, tensor, depth + 1) for item in data]
    if not isinstance(data, dict):
        raise CheckpointError(f"{type(data).__name__} is no type of JSON")
    marks = [key for key in data if key.startswith("$")]
    if not marks:
        return {key: item if type(item) in SIMPLE else unpack(item, tensor, depth + 1) for key, item in data.items()}
    if len(data) == (2 if marks == ["$deque"] else 1):
        read = _READERS.get(marks[0])
        try:
            if read is not None:
                return read(data[marks[0]], data, lambda item: unpack(item, tensor, depth + 1), tensor)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
    raise CheckpointError(f"{str(data)[:60]} is no value of a checkpoint")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise TypeError
    return found


def _items(data: Any, inner: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(data, list):
        raise TypeError
    return [inner(item) for item in data]


_READERS: dict[str, Callable[[Any, dict[str, Any], Callable[[Any], Any], Callable[[str], Tensor]], Any]] = {
    "$tensor": lambda data, whole, inner, tensor: tensor(data),
    "$array": lambda data, whole, inner, tensor: tensor(data).numpy(),
    "$path": lambda data, whole, inner, tensor: Path(data),
    "$dtype": lambda data, whole, inner, tensor: _dtype(data),
    "$tuple": lambda data, whole, inner, tensor: tuple(_items(data, inner)),
    "$deque": lambda data, whole, inner, tensor: deque(_items(data, inner), maxlen=whole["length"]),
    "$dict": lambda data, whole, inner, tensor: {inner(key): inner(item) for key, item in data},
}


def write_sealed(path: Path, data: Any) -> None:
    """Write JSON data with its checksum.

    Raises:
        CheckpointError: if JSON cannot express it (a number of thousands of digits).
    """
    try:
        text = json.dumps({"checksum": _checksum(data), "data": data})
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
    path.write_text(text, encoding="utf-8")


def read_sealed(path: Path) -> Any:
    """Read JSON data, and verify its checksum.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        found = json.loads(path.read_bytes())
        intact = isinstance(found, dict) and "data" in found and found.get("checksum") == _checksum(found["data"])
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its contents do not fit its checksum.")
    return found["data"]


def _checksum(data: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}"
