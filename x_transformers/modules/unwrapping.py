"""Modules and names without the wrappers of PyTorch around them: `torch.compile`, DDP, activation checkpointing."""

from __future__ import annotations

from torch import nn

COMPILED = "_orig_mod"
SEGMENTS = frozenset({COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Names under which wrappers keep the module; no module of a user has one of them."""
PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of any number of wrappers; a module without a wrapper is returned as it is."""
    while True:
        name = "module" if isinstance(module, PARALLEL) else next(iter(SEGMENTS & module._modules.keys()), None)
        inner = None if name is None else module._modules[name]
        if inner is None:
            return module
        module = inner


def plain_name(name: str) -> str:
    """Return the name that a parameter, or a prefix of names, has without wrappers."""
    if "._" not in name and not name.startswith("_"):
        return name
    return ".".join(part for part in name.split(".") if part not in SEGMENTS)
