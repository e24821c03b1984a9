"""The module inside of what PyTorch puts around it.

`torch.compile`, DistributedDataParallel and activation checkpointing return a module that runs another one. Training
calls what the user gave; whoever reads a model's options, or runs its parts without them, looks inside.
"""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Given = TypeVar("Given")

_PARALLEL = (DataParallel, DistributedDataParallel)

COMPILED = "_orig_mod"
SEGMENTS = frozenset({COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Names of the only child of a compiled, checkpointed or sharded module; no module of a user has one of them. Importing
the classes would take a second."""


def unwrapped(module: Given) -> Given:
    """Return the innermost module that does the same: itself, if nothing is around it.

    Args:
        module: anything, also what is no module. The type of the result is that of what is inside, which the caller
            has to check.
    """
    inner = inside(module)
    return module if inner is None else cast(Given, unwrapped(inner))


def inside(module: object) -> nn.Module | None:
    """Return the module that this one only runs, or None if it is no such wrapper."""
    if isinstance(module, _PARALLEL):
        return module.module
    if not isinstance(module, nn.Module) or len(module._modules) != 1:
        return None
    (name,) = module._modules
    return module._modules[name] if name in SEGMENTS else None


def exchanges_gradients(module: object) -> bool:
    """Return True if DataParallel or DistributedDataParallel is among what is around a module."""
    inner = inside(module)
    return inner is not None and (isinstance(module, _PARALLEL) or exchanges_gradients(inner))


def plain_name(name: str) -> str:
    """Return the name that a parameter, or a prefix of names, has without what is around its modules."""
    if "._" not in name and not name.startswith("_"):
        return name
    return ".".join(part for part in name.split(".") if part not in SEGMENTS)
