"""Rotary position embedding (2104.09864), interpolated (2306.15595), with xPos's decay (2212.10554)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.base import QKTransform
from x_transformers.errors import ConfigError, InputError
from x_transformers.forward_pass.call import Span
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class RotaryOptions:
    rotary_pos_emb: bool = opt(False, "rotate queries and keys by their positions")
    rotary_xpos: bool = opt(False, "rotary with xPos's exponential decay; causal stacks only")
    rotary_emb_dim: int | None = opt(None, "features of a head that rotate; default half of them, rounded up to even")
    rotary_interpolation_factor: float = opt(1.0, "positions are divided by this, >= 1")
    rotary_base_rescale_factor: float = opt(1.0, "NTK-aware: the base 10000 becomes 10000 * f ** (r / (r - 2))")
    rotary_xpos_scale_base: float = opt(512, "xPos: tokens over which the decay acts")
    rotate_num_heads: int | None = opt(None, "only the last k heads rotate; needs as many kv heads as heads")


Tables = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class RotaryEmbedding(KeepsFloat32, ReadsReference, QKTransform):
    """Rotates adjacent feature pairs `(2k, 2k + 1)` by the angle `pos * base ** (-2k / r) / interpolation`.

    With xPos, queries are also multiplied by `zeta_k ** (pos / scale_base)` and keys divided by it, where
    `zeta_k = (2k + 0.4 r) / (1.4 r)`. Only differences of positions matter, so the centre is 0.

    Args:
        dim: rotated features r, even.
        use_xpos: with decay.
        scale_base: tokens over which the decay acts.
        interpolation_factor: divides positions, >= 1.
        base: of the frequencies.
        base_rescale_factor: NTK-aware change of the base.
        num_heads: rotate only the last heads; None rotates all.

    Raises:
        ConfigError: if r is odd or below 2, if r is 2 with a rescaled base, or if the interpolation is below 1.
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
            raise ConfigError(f"`rotary_emb_dim` is {dim}; features rotate in pairs, so it must be even and >= 2.")
        if interpolation_factor < 1:
            raise ConfigError(f"`rotary_interpolation_factor` is {interpolation_factor}; it must be at least 1.")
        if base_rescale_factor != 1:
            if dim == 2:
                raise ConfigError("`rotary_base_rescale_factor` needs more than 2 rotated features.")
            base = base * base_rescale_factor ** (dim / (dim - 2))
        self.dim, self.use_xpos, self.num_heads = dim, use_xpos, num_heads
        self.interpolation_factor, self.scale_base = interpolation_factor, scale_base
        pairs = torch.arange(0, dim, 2).float()
        self.register_buffer("inv_freq", 1.0 / base ** (pairs / dim), persistent=False)
        zeta = (pairs + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("xpos_log", zeta.log() / scale_base, persistent=False)

    def forward(self, t: Tensor, offset: int = 0) -> tuple[Tensor, Tensor | float]:
        """Angles `(1|b, n, r)`, repeated for each pair, and the xPos factor of queries (1. without xPos).

        Args:
            t: `(n,)` or `(b, n)` positions.
            offset: added to all of them.
        """
        pos = (t if t.ndim > 1 else t.unsqueeze(0)) + offset
        angles = (pos.unsqueeze(-1) * self.inv_freq / self.interpolation_factor).repeat_interleave(2, dim=-1)
        if not self.use_xpos:
            return angles, 1.0
        return angles, (pos.unsqueeze(-1) * self.xpos_log).exp().repeat_interleave(2, dim=-1)

    def forward_from_seq_len(self, seq_len: int) -> tuple[Tensor, Tensor | float]:
        """`forward` for positions 0 ... seq_len - 1."""
        return self.forward(torch.arange(seq_len, device=self.inv_freq.device))

    def tables(self, query: Span, keys: Span) -> Tables:
        """Cosines and sines `(1|b, 1, n, r/2)`, float32, of queries and of keys."""
        q = self._table(query.pos, 1.0)
        same = keys.pos is query.pos and not self.use_xpos
        return q, q if same else self._table(keys.pos, -1.0)

    def _table(self, pos: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        pos = pos[:, None, :, None]
        angles = pos * self.inv_freq / self.interpolation_factor
        cos, sin = angles.cos(), angles.sin()
        if self.use_xpos:
            factor = (sign * pos * self.xpos_log).exp()
            cos, sin = cos * factor, sin * factor
        return cos, sin

    def apply_tables(self, q: Tensor, k: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        q, k = self._rotate_heads(q, *tables[0]), self._rotate_heads(k, *tables[1])
        if self.use_xpos and k.dtype is torch.float16 and not torch.compiler.is_compiling() and k.isinf().any():
            raise InputError(
                "xPos scales keys beyond what float16 can hold at this length; use bfloat16 or float32, or a larger "
                "`rotary_xpos_scale_base`."
            )
        return q, k

    def _rotate_heads(self, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.num_heads is None or self.num_heads == t.shape[1]:
            return rotate(t, cos, sin)
        rest = t.shape[1] - self.num_heads
        return torch.cat((t[:, :rest], rotate(t[:, rest:], cos, sin)), dim=1)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        # derived from the options; a file of a half-precision model holds them rounded
        for name in ("inv_freq", "scale"):
            state.pop(f"{prefix}{name}", None)


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` features of `(b, h, n, d)` in adjacent pairs, in float32."""
    width = 2 * cos.shape[-1]
    if t.shape[-1] % 2 == 0:
        compiling = torch.compiler.is_compiling()
        if compiling and t.device.type == "cpu" and t.shape[-2] != 1:
            return turn(t, cos, sin)
        if not compiling and t.device.type in ("cpu", "cuda"):
            return _multiply(t, cos, sin)
    # a compiler makes one kernel of all that is below, with what stands around it
    even, odd = t[..., 0:width:2], t[..., 1:width:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(t.dtype)
    return turned if width == t.shape[-1] else torch.cat((turned, t[..., width:]), dim=-1)


def _multiply(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`(b, h, n, d)` by the complex numbers `cos + i sin (1|b, 1, n, r/2)`: one kernel on the way there, and one on
    the way back. Features that do not rotate are multiplied by 1.
    """
    pairs = at_least_float32(t).unflatten(-1, (-1, 2))
    if pairs.stride(-1) != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    turns = torch.complex(cos, sin)
    turns = F.pad(turns, (0, pairs.shape[-2] - turns.shape[-1]), value=1.0)
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(t.dtype)


@torch.library.custom_op("x_transformers::turn", mutates_args=())
def turn(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_multiply` as one operation of a compiled graph, to `(b, h, n, d)` without gaps.

    A CPU reads the numbers of a pair, which stand side by side, one by one in a loop that the compiler makes, and
    spends four times as long on it. For complex numbers it makes no loops.
    """
    return _multiply(t, cos, sin).contiguous()


@turn.register_fake
def _(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _keep_tables(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _turn_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    cos, sin = ctx.saved_tensors
    return turn(gradient, cos, -sin), None, None


turn.register_autograd(_turn_back, setup_context=_keep_tables)


def build(
    options: RotaryOptions, *, heads: int, dim_head: int, causal: bool, kv_heads: set[int], **_: Any
) -> RotaryEmbedding:
    """The part for a stack whose heads have `dim_head` features.

    Raises:
        ConfigError: if more features or heads are to rotate than there are.
    """
    dim = options.rotary_emb_dim
    if dim is None:
        dim = max(2, dim_head // 2 + dim_head // 2 % 2)
    if dim > dim_head:
        raise ConfigError(f"`rotary_emb_dim` is {dim}; heads have `attn_dim_head` = {dim_head} features.")
    if options.rotary_xpos and not causal:
        raise ConfigError("`rotary_xpos` needs a causal stack; use `rotary_pos_emb` in an Encoder.")
    rotated = options.rotate_num_heads
    if rotated is not None and not 1 <= rotated <= heads:
        raise ConfigError(f"`rotate_num_heads` is {rotated}; it must lie between 1 and the {heads} heads.")
    if rotated not in (None, heads) and kv_heads != {heads}:
        raise ConfigError("`rotate_num_heads` needs as many kv heads as heads; drop `attn_kv_heads` or rotate all.")
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
            why="`rotary_xpos` decays keys by position, and the keys of `attn_num_mem_kv` have none; use "
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
