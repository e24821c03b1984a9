"""Buffers that follow from options: frequencies, slopes, position scales. They stay in float32 and are never lost.

In bfloat16 an angle of 3,000 radians is off by several radians, so results are cast instead of buffers. What is in no
state dict cannot be loaded either: a model that was made on the meta device computes it when it gets its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """Base class of modules whose own buffers move between devices but are never cast, and can be computed again."""

    def derived_buffers(self) -> dict[str, Tensor]:
        """Compute the buffers, by name, in float32 on the current device, from plain attributes of the module.

        Every number has to have a dtype of its own, since the default dtype may be another one.
        """
        raise NotImplementedError

    def register_derived(self, *, persistent: bool = False) -> None:
        """Register the derived buffers; called by `__init__` after the attributes are set."""
        for name, buffer in self.derived_buffers().items():
            self.register_buffer(name, buffer, persistent=persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            # `to_empty` returns memory that nobody has written, and casts round: only the device is taken over
            if buffer is not None and moved is not None and moved is not buffer and not moved.is_meta:
                self._buffers[name] = self._on(name, buffer, moved.device)
        return self

    def _on(self, name: str, buffer: Tensor, device: torch.device) -> Tensor:
        """Return a buffer on another device, with its values, or with computed ones if it was on the meta device."""
        if not buffer.is_meta:
            return buffer.to(device)
        with torch.device(device):
            return self.derived_buffers()[name]

    def leave_meta(self, device: torch.device) -> None:
        """Compute the buffers that are on the meta device, on another one."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_meta:
                self._buffers[name] = self._on(name, buffer, device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        if local_metadata.get("assign_to_params_buffers", False):
            leave_meta(self, device_of(state_dict, prefix))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, buffer in self._buffers.items():
            # an assigned tensor may be of half precision
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()


def leave_meta(module: nn.Module, device: torch.device) -> None:
    """Compute all buffers in a module that follow from options and are on the meta device, on another one."""
    if isinstance(module, KeepsFloat32):
        module.leave_meta(device)
    for child in module._modules.values():
        if child is not None:
            leave_meta(child, device)


def device_of(state: dict[str, Any], prefix: str) -> torch.device:
    """Return the device of the entries of a module in a state dict; the default device if it has none."""
    found = (t.device for name, t in state.items() if name.startswith(prefix) and isinstance(t, Tensor))
    return next(found, torch.get_default_device())
