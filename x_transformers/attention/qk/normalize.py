"""Normalization of queries and keys, to unit length (arXiv 2010.04245) or by an RMSNorm per head (2302.05442)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, QKNorm
from x_transformers.errors import ConfigError
from x_transformers.modules.head_gains import head_gains
from x_transformers.modules.inference import unobserved
from x_transformers.modules.norms import MultiheadRMSNorm
from x_transformers.ops import l2norm
from x_transformers.options.schema import Feature, at_least, opt, positive, require


@dataclass(frozen=True, kw_only=True)
class UnitNormOptions:
    qk_norm: bool = opt(False, "normalize queries and keys to unit length; the logit scale becomes `qk_norm_scale`")
    qk_norm_groups: int = opt(1, "cut each head into this many equal parts, each normalized by itself")
    qk_norm_scale: float = opt(10, "factor of the logits")
    qk_norm_dim_scale: bool = opt(False, "learn a scale per feature instead of using `qk_norm_scale`")

    def __post_init__(self) -> None:
        at_least(1, qk_norm_groups=self.qk_norm_groups)
        positive(qk_norm_scale=self.qk_norm_scale)


class QKUnitNorm(QKNorm):
    """Unit length for each of `groups` parts of a head: `q <- q / |q|`, `k <- k / |k|`.

    Without learned scales the logits are `scale * q k^T`. With them, `q` and `k` are multiplied by vectors
    `(h, 1, d)` and `(g, 1, d)` that start at `d ** 0.25`, and the usual `1 / sqrt(d)` stays.

    Args:
        shape: widths of the attention.
        groups: parts of a head, each normalized by itself.
        scale: factor of the logits.
        dim_scale: learn a scale per feature instead.

    Raises:
        ConfigError: if `groups` does not divide `dim_head`, or leaves parts of fewer than 3 features.
    """

    def __init__(self, shape: AttentionShape, groups: int, scale: float, dim_scale: bool) -> None:
        super().__init__()
        d = shape.dim_head
        if groups < 1 or d % groups or d // groups <= 2:
            raise ConfigError(
                f"`qk_norm_groups` is {groups}; it must divide `dim_head` = {d} into parts of at least 3 features."
            )
        self.groups = groups
        self.scale = None if dim_scale else scale
        self.q_scale = nn.Parameter(torch.full((shape.heads, 1, d), d**0.25)) if dim_scale else None
        self.k_scale = nn.Parameter(torch.full((shape.kv_heads, 1, d), d**0.25)) if dim_scale else None

    def normalize_q(self, q: Tensor) -> Tensor:
        q = l2norm(q, self.groups)
        return q if self.q_scale is None else q * self.q_scale

    def normalize_k(self, k: Tensor) -> Tensor:
        k = l2norm(k, self.groups)
        return k if self.k_scale is None else k * self.k_scale

    def normalize_memory(self, k: Tensor) -> Tensor:
        return self.normalize_k(k)


@dataclass(frozen=True, kw_only=True)
class RMSNormOptions:
    qk_rmsnorm: bool = opt(False, "RMSNorm on queries and keys, with a gain for each head")
    k_rmsnorm: bool = opt(False, "the same on keys only")
    qk_rmsnorm_eps: float | None = opt(None, "epsilon added to the mean square; default: none")
    qk_rmsnorm_across_heads: bool = opt(False, "one mean square for the features of all heads, instead of one a head")
    qk_rmsnorm_unit_offset: bool = opt(True, "store the gains minus 1, so that weight decay pulls them towards 1")

    def __post_init__(self) -> None:
        positive(qk_rmsnorm_eps=self.qk_rmsnorm_eps)
        require(not (self.qk_rmsnorm and self.k_rmsnorm), "`qk_rmsnorm` normalizes the keys already; drop `k_rmsnorm`.")


class QKRMSNorm(QKNorm):
    """RMSNorm of queries and keys, per head or over the features of all heads: `x <- x / rms(x) * (gamma + 1)`.

    Learned memory keys are not normalized.

    Args:
        shape: widths of the attention.
        keys_only: leave queries as they are.
        eps: added to the mean square, or None.
        across_heads: one mean square for all heads.
        unit_offset: store the gains minus 1.
    """

    def __init__(
        self,
        shape: AttentionShape,
        keys_only: bool,
        eps: float | None = None,
        across_heads: bool = False,
        unit_offset: bool = True,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {"mean_eps": eps, "across_heads": across_heads, "unit_offset": unit_offset}
        self.q_norm = None if keys_only else MultiheadRMSNorm(shape.dim_head, shape.heads, **given)
        self.k_norm = MultiheadRMSNorm(shape.dim_head, shape.kv_heads, **given)
        if eps is not None or across_heads or not unit_offset:
            self.beyond_reference = "such norm of queries and keys (`attn_qk_rmsnorm_eps`, ...)"

    def normalize_q(self, q: Tensor) -> Tensor:
        return q if self.q_norm is None else self.q_norm(q)

    def normalize_k(self, k: Tensor) -> Tensor:
        return self.k_norm(k)

    def joint(self) -> Callable[[Tensor], Tensor] | None:
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is None or not (_is_plain(q_norm) and _is_plain(k_norm)) or q_norm.across_heads:
            return None
        return lambda x: head_gains(q_norm.normalized(x), (q_norm.gamma, k_norm.gamma), q_norm.unit_offset)


def _is_plain(norm: MultiheadRMSNorm) -> bool:
    """Return True if the norm need not be called itself: no class, hooks or parametrization of a caller's own."""
    return type(norm) is MultiheadRMSNorm and unobserved(norm) and type(norm.gamma) is nn.Parameter


def build_unit(options: UnitNormOptions, shape: AttentionShape, **_: Any) -> QKUnitNorm:
    """Build the norm of one attention."""
    return QKUnitNorm(shape, options.qk_norm_groups, options.qk_norm_scale, options.qk_norm_dim_scale)


def build_rms(options: RMSNormOptions, shape: AttentionShape, **_: Any) -> QKRMSNorm:
    """Build the norm of one attention."""
    return QKRMSNorm(
        shape,
        options.k_rmsnorm,
        options.qk_rmsnorm_eps,
        options.qk_rmsnorm_across_heads,
        options.qk_rmsnorm_unit_offset,
    )


UNIT = Feature(
    name="qk_norm",
    group="attn",
    slot="qk_norm",
    options=UnitNormOptions,
    enabled=lambda options: options.qk_norm,
    build=build_unit,
    idle=lambda options: ("qk_norm_scale",) if options.qk_norm_dim_scale else (),
    summary="queries and keys normalized to unit length",
    paper="2010.04245",
    examples=(
        {"attn_qk_norm": True},
        {"attn_qk_norm": True, "attn_qk_norm_groups": 2, "attn_qk_norm_scale": 4.0},
        {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    ),
)

RMS = Feature(
    name="qk_rmsnorm",
    group="attn",
    slot="qk_norm",
    options=RMSNormOptions,
    enabled=lambda options: options.qk_rmsnorm or options.k_rmsnorm,
    build=build_rms,
    summary="RMSNorm per head on queries and keys",
    paper="2302.05442",
    exempt={("export", number): "the reference has neither the epsilon nor a mean across heads" for number in (3, 4)},
    examples=(
        {"attn_qk_rmsnorm": True},
        {"attn_k_rmsnorm": True},
        {"attn_qk_rmsnorm": True, "attn_qk_rmsnorm_eps": 0.01, "attn_qk_rmsnorm_unit_offset": False},
        {"attn_qk_rmsnorm": True, "attn_qk_rmsnorm_across_heads": True, "attn_kv_heads": 2},
    ),
)
