"""safetensors files with a checksum over everything in them, and plain data next to the tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from x_transformers.errors import CheckpointError

CHECKSUM = "checksum"


class TensorFile(NamedTuple):
    """Contents of a file.

    Attributes:
        about: plain data, by name.
        tensors: by name.
        checksum: the file's own, which fits its contents; None if it has none.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    checksum: str | None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> str:
    """Write a file of tensors.

    Args:
        path: of the file.
        tensors: by name. Tensors that share memory are written once for each name.
        about: plain data, by name.

    Returns:
        The checksum of the contents.

    Raises:
        TypeError: if something is no dense tensor with values.
    """
    ready: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        _check(name, tensor)
        tensor = tensor.detach().cpu().contiguous()
        start = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if start in memory else tensor
        memory.add(start)
    metadata = {key: json.dumps(value) for key, value in (about or {}).items()}
    metadata[CHECKSUM] = checksum = _checksum(metadata, ready)
    path.touch()  # has the permissions of the user's umask, or those of the file that was there
    mode = path.stat().st_mode
    save_file(ready, path, metadata=metadata)  # replaces it by one that only its owner can read
    path.chmod(mode)
    return checksum


def read_tensors(path: str | Path, device: str = "cpu", *, verify: bool = True) -> TensorFile:
    """Read a file of tensors, also one that another library wrote.

    Args:
        path: of the file.
        device: of the tensors.
        verify: compare the checksum, if the file has one, with that of the contents.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = metadata.pop(CHECKSUM, None)
        if verify and checksum is not None and checksum != _checksum(metadata, tensors):
            raise CheckpointError(f"{path} is damaged: its contents do not fit its checksum. Use another copy of it.")
        about = {key: _decoded(value) for key, value in metadata.items()}
        return TensorFile(about, {name: tensor.to(device) for name, tensor in tensors.items()}, checksum)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}.") from error


def _decoded(value: str) -> Any:
    """Read JSON; what other libraries write as metadata is any text, and stays one."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        what = f"is a {type(tensor).__name__}, not a tensor"
    elif type(tensor) not in (Tensor, torch.nn.Parameter):
        what = f"is a {type(tensor).__name__}, which is not a whole tensor; gather it, see `gathered`,"
    elif tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        what = "is on the meta device, sparse or quantized"
    else:
        return
    raise TypeError(f"`{name}` {what} and has no place in a safetensors file")


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values."""
    found = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{found.hexdigest()}"
