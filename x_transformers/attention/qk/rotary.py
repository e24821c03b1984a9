"""Rotary position embedding (arXiv 2104.09864), with position interpolation (2306.15595) and xPos (2212.10554).

The pair of features `(2k, 2k + 1)`, or `(k, k + r / 2)`, of a token at position `pos` is rotated by
`pos * base ** (-2k / r)`, so that a score depends on positions only through the distance of query and key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import QKTransform
from x_transformers.attention.qk.by_layer import TransformsByLayer
from x_transformers.attention.qk.decay import LARGEST, REACH, Decay
from x_transformers.attention.qk.frequencies import attention_factor, check_scaling, check_width, frequencies
from x_transformers.attention.qk.rotation import RotationTable, rotate
from x_transformers.errors import ConfigError, InputError, StateDictError
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
        1.0, "NTK-aware scaling by f: the base becomes `rotary_base` * f ** (r / (r - 2))"
    )
    rotary_base: float | tuple[float, ...] = opt(
        10000.0, "base of the frequencies; a tuple has one for each self-attention"
    )
    rotary_interleaved: bool = opt(
        True, "pairs are adjacent features (2k, 2k + 1); False: features (k, k + r / 2), as in Llama"
    )
    rotary_scaling: Mapping[str, Any] | tuple[Mapping[str, Any] | None, ...] | None = opt(
        None,
        "scaling of the frequencies to longer contexts: a dict as `rope_scaling` of Hugging Face's configurations, "
        "with `rope_type` linear, dynamic, yarn, longrope or llama3; a tuple has one, or None, for each self-attention",
    )
    rotary_layers: tuple[bool, ...] | None = opt(
        None, "for each self-attention, whether positions rotate its queries and keys; default: all"
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
        for base in self.rotary_base if isinstance(self.rotary_base, tuple) else (self.rotary_base,):
            require(base > 1, f"`rotary_base` is {base}; it must be greater than 1.")
        scalings = self.rotary_scaling if isinstance(self.rotary_scaling, tuple) else (self.rotary_scaling,)
        for scaling in scalings:
            if scaling is not None:
                check_scaling(scaling)
        twice = factor != 1 or self.rotary_base_rescale_factor != 1
        require(
            not twice or not any(scalings),
            "`rotary_scaling` scales the frequencies already; drop `rotary_interpolation_factor` and "
            "`rotary_base_rescale_factor`.",
        )
        require(
            not self.rotary_xpos or (self.rotary_interleaved and self.by_layer is None),
            "`rotary_xpos` decays adjacent pairs of features, at the same rates in every layer; drop "
            "`rotary_interleaved = False`, `rotary_layers` and tuples of `rotary_base` and `rotary_scaling`.",
        )
        require(
            self.rotary_layers is None or any(self.rotary_layers),
            "`rotary_layers` rotates no layer; drop `rotary_pos_emb`, or set one of them to True.",
        )

    @property
    def by_layer(self) -> dict[str, tuple[Any, ...]] | None:
        """The keywords that have one value for each self-attention, or None if all layers rotate alike."""
        given = {name: getattr(self, name) for name in ("rotary_base", "rotary_scaling", "rotary_layers")}
        return {name: value for name, value in given.items() if isinstance(value, tuple)} or None

    def of_layer(self, number: int) -> RotaryOptions | None:
        """Return the options of one self-attention, or None if it is not rotated."""
        own = {name: value[number] for name, value in (self.by_layer or {}).items()}
        return replace(self, **{**own, "rotary_layers": None}) if own.get("rotary_layers", True) else None


Tables = tuple[RotationTable, RotationTable]
"""Rotations of queries, and of keys."""


class RotaryEmbedding(KeepsFloat32, ReadsReference, QKTransform):
    """Rotation of pairs of features by the angle `pos * base ** (-2k / r) / interpolation_factor`.

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
        interleaved: pairs are adjacent features `(2k, 2k + 1)`; False: `(k, k + r / 2)`.
        scaling: scaling of the frequencies to longer contexts, see `frequencies`. That of YaRN and LongRoPE multiplies
            rotated queries and keys by a factor.

    Raises:
        ConfigError: if r is odd or below 2, if r is 2 with a rescaled base, if the interpolation factor is below 1, or
            if the scaling does not fit.
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
        interleaved: bool = True,
        scaling: Mapping[str, Any] | None = None,
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
        self.interleaved, self.scaling = interleaved, None if scaling is None else dict(scaling)
        if scaling is not None:
            check_scaling(scaling)
            check_width(scaling, dim)
        self.factor = attention_factor(scaling)
        self.register_derived()

    @property
    def refuses_tables(self) -> str | None:
        if not self.interleaved:
            return "it rotates the halves of heads (`rotary_interleaved = False`), and tables rotate adjacent features"
        return None if self.factor == 1 else "tables cannot contain the factor of its `rotary_scaling`"

    def derived_buffers(self) -> dict[str, Tensor]:
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float32)
        # xPos: high frequencies (small k) decay fastest
        zeta = (pairs + 0.4 * self.dim) / (1.4 * self.dim)
        return {"inv_freq": frequencies(self.base, self.dim, self.scaling), "xpos_log": zeta.log() / self.scale_base}

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

        Raises:
            InputError: if such angles cannot describe the rotation.
        """
        if self.refuses_tables is not None:
            raise InputError(f"this embedding has no tables of angles for callers: {self.refuses_tables}.")
        pos = (t if t.ndim > 1 else t.unsqueeze(0)) + offset
        angles = (pos.unsqueeze(-1) * self.inv_freq / self.interpolation_factor).repeat_interleave(2, dim=-1)
        if not self.use_xpos or pos.shape[-1] == 0:
            return angles, torch.ones_like(angles) if self.use_xpos else 1.0
        # Only ratios count: where factors relative to half of the largest position would overflow, they are relative
        # to the middle of a row.
        half = torch.div(pos.max() + 1, 2, rounding_mode="floor")
        ends = pos.amin(dim=-1, keepdim=True) + pos.amax(dim=-1, keepdim=True)
        far = (pos - half).abs().amax(dim=-1, keepdim=True) * self.xpos_log.abs().max() > LARGEST
        centered = pos - torch.where(far, torch.div(ends, 2, rounding_mode="floor"), half)
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
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1:
            cos, sin = cos * self.factor, sin * self.factor
        return RotationTable(cos, sin, halves=not self.interleaved)

    def apply_tables(self, q: Tensor, k: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        return self._rotate_heads(q, tables[0]), self._rotate_heads(k, tables[1])

    def transform_keys(self, k: Tensor, tables: Tables) -> Tensor:
        return self._rotate_heads(k, tables[1])

    def restore_keys(self, k: Tensor, tables: Tables) -> Tensor:
        table = tables[1]
        if self.factor != 1:
            table = RotationTable(table.cos / self.factor**2, table.sin / self.factor**2, table.halves)
        return self._rotate_heads(k, table, sign=-1)

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
        if self.refuses_tables is not None:
            raise StateDictError(
                "the reference rotates adjacent features, without a factor; a model with `rotary_interleaved = False` "
                "or this `rotary_scaling` cannot be exported."
            )
        state[f"{prefix}inv_freq"] = self.inv_freq.clone()
        if self.use_xpos:
            state[f"{prefix}scale"] = (self.xpos_log * self.scale_base).exp()


def build(
    options: RotaryOptions,
    *,
    heads: int,
    dim_head: int,
    causal: bool,
    kv_heads: set[int],
    layers: Sequence[int],
    shared_keys: Collection[int | None] = (None,),
    **_: Any,
) -> RotaryEmbedding | TransformsByLayer:
    """Build the embedding of a stack whose heads have `dim_head` features.

    Args:
        options: of the stack.
        heads: number of query heads.
        dim_head: features of a head.
        causal: the stack is causal.
        kv_heads: the numbers of key heads of its self-attentions.
        layers: index of each self-attention among the sublayers.
        shared_keys: the values of `attn_latent_rope_dim`: numbers of features of a key that all heads share.

    Raises:
        ConfigError: if more features or heads are to rotate than there are, if grouped heads are to rotate in part, if
            xPos is requested for a stack that is not causal, if a tuple does not have a value for each self-attention,
            or if more features are to rotate than all heads share.
    """
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
    options = _within_shared_key(options, shared_keys)
    if options.by_layer is None:
        return _build_one(options, dim_head)
    for name, values in options.by_layer.items():
        if len(values) != len(layers):
            raise ConfigError(
                f"`{name}` is a tuple of {len(values)} values, but there are {len(layers)} self-attentions; pass one "
                "value for each."
            )
    different: list[RotaryOptions] = []
    chosen = {}
    for number, index in enumerate(layers):
        own = options.of_layer(number)
        if own is not None:
            if own not in different:
                different.append(own)
            chosen[index] = different.index(own)
    return TransformsByLayer([_build_one(each, dim_head) for each in different], chosen)


def _within_shared_key(options: RotaryOptions, shared_keys: Collection[int | None]) -> RotaryOptions:
    """Return the options with no other features rotated than those of the key that all heads share, if there is one."""
    if set(shared_keys) == {None}:
        return options
    if len(shared_keys) > 1:
        raise ConfigError(
            "`attn_latent_rope_dim` differs between layers, but all of them rotate the same features; give one number."
        )
    (shared,) = shared_keys
    assert shared is not None
    dim = shared if options.rotary_emb_dim is None else options.rotary_emb_dim
    if dim > shared:
        raise ConfigError(
            f"`rotary_emb_dim` is {dim}, but only the `attn_latent_rope_dim` = {shared} features of a key that come "
            "from the input rotate; choose at most as many, or drop `rotary_emb_dim`."
        )
    return replace(options, rotary_emb_dim=dim)


def _build_one(options: RotaryOptions, dim_head: int) -> RotaryEmbedding:
    """Build the embedding of all layers, or of those that have the same options."""
    dim = options.rotary_emb_dim
    if dim is None:
        dim = max(2, dim_head // 2 + dim_head // 2 % 2)
    if dim > dim_head:
        raise ConfigError(f"`rotary_emb_dim` is {dim}; it must be at most `attn_dim_head` = {dim_head}.")
    assert not isinstance(options.rotary_base, tuple)
    assert not isinstance(options.rotary_scaling, tuple)
    return RotaryEmbedding(
        dim,
        use_xpos=options.rotary_xpos,
        scale_base=options.rotary_xpos_scale_base,
        interpolation_factor=options.rotary_interpolation_factor,
        base=options.rotary_base,
        base_rescale_factor=options.rotary_base_rescale_factor,
        num_heads=options.rotate_num_heads,
        interleaved=options.rotary_interleaved,
        scaling=options.rotary_scaling,
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
        {
            "rotary_pos_emb": True,
            "rotary_emb_dim": 6,
            "rotary_interleaved": False,
            "rotary_base": 500.0,
            "rotary_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
        {
            "rotary_pos_emb": True,
            "rotary_interleaved": False,
            "rotary_base": (100.0, 1000.0),
            "rotary_scaling": (None, {"rope_type": "linear", "factor": 2.0}),
        },
        {"rotary_pos_emb": True, "rotary_layers": (False, True)},
    ),
    exempt={("export", number): "the reference has no such positions" for number in (5, 6, 7)},
)
