"""States of PyTorch's generators of random numbers, one for each process and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from x_transformers.errors import CheckpointError
from x_transformers.training.processes import rank


class RandomStates(NamedTuple):
    """States of the generators of one process."""

    cpu: Tensor
    cuda: list[Tensor]


def random_states() -> RandomStates:
    """Return the present states."""
    return RandomStates(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def set_random_states(states: RandomStates) -> None:
    """Set the generators to states; those of devices that this process lacks are left out."""
    torch.set_rng_state(states.cpu)
    for device, state in zip(range(torch.cuda.device_count()), states.cuda, strict=False):
        torch.cuda.set_rng_state(state, device)


def pack_random_states(name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the names of the present states, which are added to `tensors`."""
    states = random_states()
    named = {f"{name}.cpu": states.cpu, **{f"{name}.cuda.{i}": state for i, state in enumerate(states.cuda)}}
    tensors |= named
    return {"cpu": f"{name}.cpu", "cuda": [key for key in named if ".cuda." in key]}


def unpack_random_states(packed: Any, tensor: Callable[[str], Tensor]) -> RandomStates | None:
    """Return the states that this process had, None if there were fewer processes.

    Raises:
        CheckpointError: if they are no states of a generator.
    """
    if rank() >= len(packed):
        return None
    names = packed[rank()]
    states = RandomStates(tensor(names["cpu"]), [tensor(name) for name in names["cuda"]])
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device, state in zip(devices, (states.cpu, *states.cuda), strict=False):
        try:
            torch.Generator(device).set_state(state)
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"a random state of {device} is none: {error}") from error
    return states
