"""Tensors of which several processes write one part each, read by any number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers.checkpoints.durable import sync, writing
from x_transformers.checkpoints.tensor_files import TensorFile, read_tensors, write_tensors
from x_transformers.errors import CheckpointError
from x_transformers.training.processes import every_process, is_sharded_tensor, rank, world_size


def part_file(number: int) -> str:
    """Return the name of the file that a process writes."""
    return f"states-{number:05d}.safetensors"


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """Write the tensors of all processes, each of which writes what no earlier one has. All have to call this.

    Args:
        folder: of the files.
        tensors: those of this process by name; a tensor that is sharded has the same name in all processes.

    Returns:
        index: where each tensor is, as JSON data: `{name: {"dtype", "shape", "sharded", "parts"}}`. A part is the
            number of a process and the place in the tensor where its part begins.
        checksums: of the files, by their names.
        problem: what went wrong in any process, or None.
    """
    parts = {name: _own_part(tensor) for name, tensor in tensors.items()}
    about = {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            is_sharded_tensor(tensor),
            list(parts[name][1]),
        )
        for name, tensor in tensors.items()
        if parts[name][0].numel() or not tensor.numel()
    }
    index: dict[str, Any] = {}
    mine: dict[str, Tensor] = {}
    for number, theirs in enumerate(every_process(about)):
        for name, (dtype, shape, sharded, start) in theirs.items():
            entry = index.setdefault(name, {"dtype": dtype, "shape": shape, "sharded": sharded, "parts": []})
            if all(start != other for _, other in entry["parts"]):
                entry["parts"].append([number, start])
                if number == rank():
                    mine[name] = parts[name][0]
    path, checksum, problem = folder / part_file(rank()), "", None
    try:
        with writing(path):
            checksum = write_tensors(path, mine)
            sync(path)
    except CheckpointError as error:
        problem = str(error)
    results = every_process((checksum, problem))
    checksums = {part_file(number): checksum for number, (checksum, _) in enumerate(results)}
    return index, checksums, next((problem for _, problem in results if problem is not None), None)


class PartReader:
    """Tensors of all processes that wrote a folder, by name. Nothing larger than the files is ever allocated.

    Args:
        folder: of the files.
        index, checksums: what `write_parts` returned.

    Raises:
        CheckpointError: if a file is missing or damaged, or is not described by `index`.
    """

    def __init__(self, folder: Path, index: Any, checksums: Mapping[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.files: list[TensorFile] = []
        for number in range(len(checksums)):
            path = folder / part_file(number)
            # each process verifies its share of the files, and the others learn about damage from it
            file = read_tensors(path, verify=number % world_size() == rank())
            if file.checksum is None or file.checksum != checksums.get(path.name):
                raise CheckpointError(f"{path} is damaged, or belongs to another checkpoint.")
            self.files.append(file)
        for name, entry in index.items():
            self._check(name, entry)

    def _check(self, name: str, entry: Any) -> None:
        """Check that the parts of a tensor cover it."""
        covered = 0
        for number, start in entry["parts"]:
            if not 0 <= number < len(self.files) or name not in self.files[number].tensors:
                raise CheckpointError(f"{self.folder / part_file(number)} lacks the tensor `{name}`.")
            part = self.files[number].tensors[name]
            ends = [begin + size for begin, size in zip(start, part.shape, strict=True)]
            inside = all(
                begin >= 0 and end <= size for begin, end, size in zip(start, ends, entry["shape"], strict=True)
            )
            if not inside or str(part.dtype) != f"torch.{entry['dtype']}":
                raise CheckpointError(
                    f"`{name}` in {self.folder / part_file(number)} is {tuple(part.shape)} of {part.dtype}, which is "
                    f"no part of a tensor {tuple(entry['shape'])} of {entry['dtype']}."
                )
            covered += part.numel()
        if covered != math.prod(entry["shape"]) or len({str(start) for _, start in entry["parts"]}) != len(
            entry["parts"]
        ):
            raise CheckpointError(f"the files in {self.folder} contain {covered} elements of `{name}`, and not all.")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        return tuple(self.index[name]["shape"])

    def whole(self, name: str) -> Tensor:
        """Return a whole tensor, in memory of its own."""
        return self._region(name, (0,) * len(self.shape(name)), self.shape(name))

    def like(self, name: str, parameter: Any) -> Tensor:
        """Return a tensor, sharded as a parameter is if it was sharded when it was written, or is of its shape."""
        if not is_sharded_tensor(parameter):
            return self.whole(name)
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = parameter.device_mesh, parameter.placements
        if self.shape(name) != tuple(parameter.shape):
            if not self.index[name]["sharded"]:
                return self.whole(name)
            everywhere = [Replicate()] * mesh.ndim
            whole = self.whole(name).to(parameter.to_local().device)
            return DTensor.from_local(whole, mesh, everywhere, run_check=False)
        shape, start = _own_region(parameter)
        region = self._region(name, start, shape).to(parameter.to_local().device)
        return DTensor.from_local(
            region, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    def _region(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Put together a region of a tensor from the parts that overlap with it."""
        entry = self.index[name]
        region = torch.zeros(tuple(shape), dtype=getattr(torch, entry["dtype"]))
        for number, begin in entry["parts"]:
            part = self.files[number].tensors[name]
            overlap = [
                (max(s, b), min(s + n, b + m)) for s, n, b, m in zip(start, shape, begin, part.shape, strict=True)
            ]
            if all(low < high for low, high in overlap):
                target = tuple(slice(low - s, high - s) for (low, high), s in zip(overlap, start, strict=True))
                source = tuple(slice(low - b, high - b) for (low, high), b in zip(overlap, begin, strict=True))
                region[target] = part[source]
        return region


def _own_part(tensor: Any) -> tuple[Tensor, Sequence[int]]:
    """Return what this process has of a tensor, and where it begins."""
    if not is_sharded_tensor(tensor):
        return tensor.detach(), (0,) * tensor.ndim
    return tensor.to_local().detach(), _own_region(tensor)[1]


def _own_region(tensor: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shape of the part of this process, and where it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
