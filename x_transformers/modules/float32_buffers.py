"""Buffers that stay in float32 when their module is cast: frequencies, slopes, position scales.

In bfloat16 an angle of 3,000 radians is off by several radians, so results are cast instead of buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """Base class of modules whose own buffers move between devices but are never cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
