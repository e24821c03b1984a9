"""Rotary position embedding (arXiv 2104.09864), with position interpolation (2306.15595) and xPos (2212.10554).

The pair of features `(2k, 2k + 1)` of a token at position `pos` is rotated by `pos * base ** (-2k / r)`, so that a
score depends on positions only through the distance of query and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import QKTransform
from x_transformers.attention.qk.decay import REACH, Decay
from x_transformers.attention.qk.rotation import RotationTable, rotate
from x_transformers.errors import ConfigError
from x_transformers.forward_pass.arguments import check_whole
from x_transformers.forward_pass.call import LayerCall, Span
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.schema import Feature, Rule, at_least, opt, positive, require


@dataclass(frozen=True, kw_only=True)
class RotaryOptions:
    rotary_pos_emb: bool = opt(False, "rotate queries and keys by their positions")
    rotary_xpos: bool = opt(False, "rotary embedding with the exponential decay of xPos; causal stacks only")
    rotary_emb_dim: int | None = opt(
        None, "number of features of a head to rotate; default: half of them, rounded up to even"
    )
    rotary_interpolation_factor: float = opt(1.0, "divide positions by this, >= 1")
    rotary_base_rescale_factor: float = opt(
        1.0, "NTK-aware scaling by f: the base 10000 becomes 10000 * f ** (r / (r - 2))"
    )
    rotary_xpos_scale_base: float = opt(512, "xPos: number of tokens that sets the scale of the decay")
    rotate_num_heads: int | None = opt(None, "rotate only the last k heads; needs as many kv heads as heads")

    def __post_init__(self) -> None:
        at_least(1, rotate_num_heads=self.rotate_num_heads)
        at_least(2, rotary_emb_dim=self.rotary_emb_dim)
        positive(
            rotary_base_rescale_factor=self.rotary_base_rescale_factor,
            rotary_xpos_scale_base=self.rotary_xpos_scale_base,
        )
        factor = self.rotary_interpolation_factor
        require(factor >= 1, f"`rotary_interpolation_factor` is {factor}; it must be at least 1.")


Tables = tuple[RotationTable, RotationTable]
"""Rotations of queries, and of keys."""


class RotaryEmbedding(KeepsFloat32, ReadsReference, QKTransform):
    """Rotation of adjacent feature pairs `(2k, 2k + 1)` by the angle `pos * base ** (-2k / r) / interpolation_factor`.

    With xPos, queries are also multiplied by `zeta_k ** ((pos - c) / scale_base)` and keys are divided by it, where
    `zeta_k = (2k + 0.4 r) / (1.4 r) < 1`, so that a score decays with `zeta_k ** (distance / scale_base)`, whatever c
    is. A stack caches keys without their factor and takes a c among the queries of each pass (see `Decay`), so that
    nothing overflows at far positions; a call of this module takes half of the largest position.

    Args:
        dim: number r of rotated features, even; the other features of a head stay as they are.
        use_xpos: decay scores with distance.
        scale_base: number of tokens that sets the scale of the decay.
        interpolation_factor: divides positions, >= 1.
        base: base of the frequencies.
        base_rescale_factor: NTK-aware scaling f of the base, to `base * f ** (r / (r - 2))`.
        num_heads: rotate only the last `num_heads` heads; default: all.

    Raises:
        ConfigError: if r is odd or below 2, if r is 2 with a rescaled base, or if the interpolation factor is below 1.
    """

    inv_freq: Tensor
    xpos_log: Tensor

    def __init__(
        self,
        dim: int,
        use_xpos: bool = False,
        scale_base: float = 512,
        interpolation_factor: float = 1.0,
        base: float = 10000,
        base_rescale_factor: float = 1.0,
        *,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ConfigError(
                f"`rotary_emb_dim` is {dim}; it must be even and at least 2, since features rotate in pairs."
            )
        if interpolation_factor < 1:
            raise ConfigError(f"`rotary_interpolation_factor` is {interpolation_factor}; it must be at least 1.")
        if base_rescale_factor != 1:
            if dim == 2:
                raise ConfigError(
                    "`rotary_base_rescale_factor` needs more than 2 rotated features; increase `rotary_emb_dim`."
                )
            # NTK-aware: the exponent is such that the lowest frequency, base ** (-(r - 2) / r), is divided by exactly
            # the factor (as interpolation would), while the highest one, which tells neighbors apart, stays at 1.
            base = base * base_rescale_factor ** (dim / (dim - 2))
        self.dim, self.use_xpos, self.num_heads = dim, use_xpos, num_heads
        self.decays = use_xpos
        self.interpolation_factor, self.scale_base, self.base = interpolation_factor, scale_base, base
        self.register_derived()

    def derived_buffers(self) -> dict[str, Tensor]:
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float32)
        # xPos: high frequencies (small k) decay fastest
        zeta = (pairs + 0.4 * self.dim) / (1.4 * self.dim)
        return {"inv_freq": 1.0 / self.base ** (pairs / self.dim), "xpos_log": zeta.log() / self.scale_base}

    @property
    def scale(self) -> Tensor | None:
        """XPos factors `(r / 2,)` of a distance of `scale_base`, the reference's buffer; None without xPos."""
        return (self.xpos_log * self.scale_base).exp() if self.use_xpos else None

    def forward(self, t: Tensor, offset: int = 0) -> tuple[Tensor, Tensor | float]:
        """Return the angles of positions and the xPos factor of queries, for `apply_rotary_pos_emb`.

        Args:
            t: positions `(n,)` or `(b, n)`.
            offset: number added to all positions.

        Returns:
            angles `(1|b, n, r)`, the same for both features of a pair, and the factor of queries: a tensor of that
            shape, or 1.0 without xPos. Keys take its reciprocal.
        """
        pos = (t if t.ndim > 1 else t.unsqueeze(0)) + offset
        angles = (pos.unsqueeze(-1) * self.inv_freq / self.interpolation_factor).repeat_interleave(2, dim=-1)
        if not self.use_xpos:
            return angles, 1.0
        centered = pos - torch.div(pos.max() + 1, 2, rounding_mode="floor")
        return angles, (centered.unsqueeze(-1) * self.xpos_log).exp().repeat_interleave(2, dim=-1)

    def forward_from_seq_len(self, seq_len: int) -> tuple[Tensor, Tensor | float]:
        """Return `forward` for the positions 0 ... seq_len - 1."""
        check_whole(seq_len=seq_len)
        return self.forward(torch.arange(seq_len, device=self.inv_freq.device))

    def tables(self, query: Span, keys: Span) -> Tables:
        """Return cosines and sines `(1|b, 1, n, r/2)` of queries and of keys, in float32."""
        q = self._table(query.pos)
        return q, q if keys.pos is query.pos else self._table(keys.pos)

    def _table(self, pos: Tensor) -> RotationTable:
        angles = pos[:, None, :, None] * self.inv_freq / self.interpolation_factor
        return RotationTable(angles.cos(), angles.sin())

    def apply_tables(self, q: Tensor, k: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        return self._rotate_heads(q, tables[0]), self._rotate_heads(k, tables[1])

    def transform_keys(self, k: Tensor, tables: Tables) -> Tensor:
        return self._rotate_heads(k, tables[1])

    def restore_keys(self, k: Tensor, tables: Tables) -> Tensor:
        return self._rotate_heads(k, tables[1], sign=-1)

    @property
    def reach(self) -> int | None:
        return max(1, int(REACH * self.scale_base)) if self.decays else None

    def decay(self, layer: LayerCall, heads: int, fixed: int) -> Decay:
        unrotated = 0 if self.num_heads is None else heads - self.num_heads
        assert self.reach is not None
        return Decay(self.xpos_log, self.reach, layer, max(fixed, unrotated))

    def _rotate_heads(self, t: Tensor, table: RotationTable, sign: int = 1) -> Tensor:
        if self.num_heads is None or self.num_heads == t.shape[1]:
            return rotate(t, table, sign)
        rest = t.shape[1] - self.num_heads
        return torch.cat((t[:, :rest], rotate(t[:, rest:], table, sign)), dim=1)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        # both follow from the options, and half-precision checkpoints contain them rounded: keep our own
        for name in ("inv_freq", "scale"):
            state.pop(f"{prefix}{name}", None)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}inv_freq"] = self.inv_freq.clone()
        if self.use_xpos:
            state[f"{prefix}scale"] = (self.xpos_log * self.scale_base).exp()


def build(
    options: RotaryOptions, *, heads: int, dim_head: int, causal: bool, kv_heads: set[int], **_: Any
) -> RotaryEmbedding:
    """Build the embedding of a stack whose heads have `dim_head` features.

    Raises:
        ConfigError: if more features or heads are to rotate than there are, if grouped heads are to rotate in part, or
            if xPos is requested for a stack that is not causal.
    """
    dim = options.rotary_emb_dim
    if dim is None:
        dim = max(2, dim_head // 2 + dim_head // 2 % 2)
    if dim > dim_head:
        raise ConfigError(f"`rotary_emb_dim` is {dim}; it must be at most `attn_dim_head` = {dim_head}.")
    if options.rotary_xpos and not causal:
        raise ConfigError("`rotary_xpos` needs a causal stack; use `rotary_pos_emb` in an `Encoder`.")
    rotated = options.rotate_num_heads
    if rotated is not None and not 1 <= rotated <= heads:
        raise ConfigError(f"`rotate_num_heads` is {rotated}; it must be between 1 and the {heads} heads.")
    if rotated not in (None, heads) and kv_heads != {heads}:
        raise ConfigError(
            "`rotate_num_heads` needs as many kv heads as heads, since keys rotate too; drop `attn_kv_heads` or rotate "
            "all heads."
        )
    return RotaryEmbedding(
        dim,
        use_xpos=options.rotary_xpos,
        scale_base=options.rotary_xpos_scale_base,
        interpolation_factor=options.rotary_interpolation_factor,
        base_rescale_factor=options.rotary_base_rescale_factor,
        num_heads=rotated,
    )


FEATURE = Feature(
    name="rotary",
    group="stack",
    slot="qk",
    choice="rotated positions",
    options=RotaryOptions,
    enabled=lambda options: options.rotary_pos_emb or options.rotary_xpos,
    build=build,
    idle=lambda options: () if options.rotary_xpos else ("rotary_xpos_scale_base",),
    summary="positions as rotations of queries and keys",
    paper="2104.09864",
    refuses=(
        Rule(
            when=lambda o: o["rotary"].rotary_xpos and o.on("memory_kv"),
            why="`rotary_xpos` scales keys by their position, and the keys of `attn_num_mem_kv` have no position; use "
            "`rotary_pos_emb`.",
        ),
    ),
    examples=(
        {"rotary_pos_emb": True, "rotary_emb_dim": 8},
        {"rotary_pos_emb": True, "rotary_emb_dim": 4, "rotary_interpolation_factor": 2.0},
        {"rotary_pos_emb": True, "rotary_emb_dim": 4, "rotary_base_rescale_factor": 4.0, "rotate_num_heads": 2},
        {"rotary_xpos": True, "rotary_emb_dim": 8, "rotary_xpos_scale_base": 16},
    ),
)
