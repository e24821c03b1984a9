"""Normalisation layers. Every one is called as `norm(x)`; adaptive ones also read a condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.loading import ReadsReference, rename
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class NormOptions:
    norm_add_unit_offset: bool = opt(True, "norms store gain - 1, so that weight decay pulls towards the identity")


@dataclass(frozen=True, kw_only=True)
class RMSNormOptions:
    use_rmsnorm: bool = opt(False, "RMSNorm in place of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class SimpleRMSNormOptions:
    use_simple_rmsnorm: bool = opt(False, "RMSNorm without parameters in place of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class ScaleNormOptions:
    use_scalenorm: bool = opt(False, "ScaleNorm in place of LayerNorm")


class Norm(nn.Module):
    """The contract: `forward(x, condition=None)`. Plain norms ignore the condition; adaptive ones need it."""

    adaptive = False

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalise over the last axis."""
        raise NotImplementedError


class LayerNorm(Norm):
    """`(x - mean) / sqrt(var + 1e-5) * (gamma + offset)`, without a bias (1607.06450).

    Args:
        dim: width.
        unit_offset: store the gain less one.
    """

    def __init__(self, dim: int, unit_offset: bool = False, **_: Any) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((dim,), 1.0 - unit_offset))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        gamma = self.gamma + 1 if self.unit_offset else self.gamma
        return F.layer_norm(x, x.shape[-1:], gamma)


class RMSNorm(ReadsReference, Norm):
    """`x / |x| * sqrt(d) * (gamma + offset)` (1910.07467).

    Args:
        dim: width.
        unit_offset: store the gain less one.
    """

    def __init__(self, dim: int, unit_offset: bool = False, **_: Any) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((dim,), 1.0 - unit_offset))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        gamma = self.gamma + 1 if self.unit_offset else self.gamma
        return F.rms_norm(x, x.shape[-1:], gamma, eps=_TINY)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}g", f"{prefix}gamma")


class SimpleRMSNorm(Norm):
    """`x / |x| * sqrt(d)`, without parameters (2307.14995)."""

    def __init__(self, dim: int, **_: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=_TINY)


class ScaleNorm(ReadsReference, Norm):
    """`x / |x| * sqrt(d) * (gamma + offset)` with a single gain (1910.05895).

    Args:
        dim: width.
        unit_offset: store the gain less one.
    """

    def __init__(self, dim: int, unit_offset: bool = False, **_: Any) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((1,), 1.0 - unit_offset))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        gamma = self.gamma + 1 if self.unit_offset else self.gamma
        return F.rms_norm(x, x.shape[-1:], eps=_TINY) * gamma

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}g", f"{prefix}gamma")


_TINY = 1e-24
"""Added under the root: a zero vector maps to zero, and no other vector notices."""


LAYER_NORM = Feature(
    name="norm",
    group="stack",
    slot="norm options",
    options=NormOptions,
    summary="LayerNorm, unless another norm is chosen",
    paper="1607.06450",
    examples=({"norm_add_unit_offset": False},),
)

RMS_NORM = Feature(
    name="rmsnorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=RMSNormOptions,
    enabled=lambda options: options.use_rmsnorm,
    build=RMSNorm,
    summary="RMSNorm in place of LayerNorm",
    paper="1910.07467",
    examples=({"use_rmsnorm": True},),
)

SIMPLE_RMS_NORM = Feature(
    name="simple_rmsnorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=SimpleRMSNormOptions,
    enabled=lambda options: options.use_simple_rmsnorm,
    build=SimpleRMSNorm,
    summary="RMSNorm without parameters in place of LayerNorm",
    paper="2307.14995",
    examples=({"use_simple_rmsnorm": True},),
)

SCALE_NORM = Feature(
    name="scalenorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=ScaleNormOptions,
    enabled=lambda options: options.use_scalenorm,
    build=ScaleNorm,
    summary="one gain for all features in place of LayerNorm",
    paper="1910.05895",
    examples=({"use_scalenorm": True},),
)

FEATURES = (LAYER_NORM, RMS_NORM, SIMPLE_RMS_NORM, SCALE_NORM)
