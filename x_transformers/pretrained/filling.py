"""Weights of a model of ours from the tensors of a folder of another library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.folders.own import cast
from x_transformers.folders.shards import Shards
from x_transformers.pretrained.base import Outline
from x_transformers.pretrained.layouts import Link


def read_links(
    outline: Outline,
    own: Mapping[str, Tensor],
    shards: Shards,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    new: bool,
) -> dict[str, Tensor]:
    """Read the weights of a model, by name.

    Args:
        outline: has the links of weights and tensors.
        own: the parameters of the model, and buffers with a link, perhaps on the meta device.
        shards: the files.
        device, dtype: of the weights; None for the dtype of the first one. Buffers keep their own.
        new: parameters without a link are allowed.

    Raises:
        StateDictError: if a parameter has no link, a weight or tensor no place, or a weight another shape.
        CheckpointError: if a tensor is missing or damaged.
    """
    lost = [name for name in outline.weights if name not in own]
    if lost:
        raise StateDictError(f"the model has no place for {listed(lost)}; drop the keywords that remove it.")
    without = [name for name in own if name not in outline.weights]
    if without and not new:
        raise StateDictError(f"nothing in the files is meant for {listed(without)}.")
    links = outline.links
    names = {name: _name_in(shards, name, outline) for link in links for name in link.theirs}
    used = set(names.values())
    unused = [name for name in shards.places if name not in used and not name.endswith(outline.unused)]
    unused = [name for name in unused if not name.startswith(outline.others)]
    if unused:
        raise StateDictError(f"the files contain {listed(unused)}, which models of this family do not have.")
    state: dict[str, Tensor] = {}
    for link in links:
        for name, value in zip(link.ours, _read(link, shards, names), strict=True):
            if not value.is_floating_point() or value.shape != own[name].shape:
                raise StateDictError(
                    f"tensor {listed(link.theirs)} makes {tuple(value.shape)} numbers of {value.dtype} for `{name}`, "
                    f"which is {tuple(own[name].shape)}."
                )
            dtype = value.dtype if dtype is None else dtype
            kept = dtype if isinstance(own[name], nn.Parameter) else own[name].dtype
            state[name] = _compact(cast(value, device, kept))
    return state


def _read(link: Link, shards: Shards, names: Mapping[str, str]) -> Sequence[Tensor]:
    """Read the weights of a link.

    Raises:
        CheckpointError: if a tensor is missing or damaged.
        StateDictError: if a tensor has a shape of which no such weights can be made.
    """
    if link.layout.joins:
        whole = shards.joined([names[each] for each in link.theirs])
        if whole is not None:
            return [whole]
    theirs = [shards.tensor(names[each]) for each in link.theirs]
    try:
        return link.layout.read(*theirs)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in theirs)
        raise StateDictError(
            f"tensor {listed(link.theirs)} of the shape {shapes} has another layout: {error}"
        ) from error


def _name_in(shards: Shards, name: str, outline: Outline) -> str:
    """Return the name of a tensor in the files, which lack the prefix if they are those of a model without a head."""
    for new, old in (("", ""), *outline.older):
        if name.endswith(new):
            other = name.removesuffix(new) + old
            for found in (other, other.removeprefix(outline.prefix)):
                if found in shards.places:
                    return found
    return name


def _compact(value: Tensor) -> Tensor:
    """Return a contiguous tensor with no other memory than its own."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def listed(names: Iterable[str]) -> str:
    """Return names in backquotes; of many, the first five."""
    every = [f"`{name}`" for name in names]
    shown = ", ".join(every[:5])
    return shown if len(every) <= 5 else f"{shown} and {len(every) - 5} more"
