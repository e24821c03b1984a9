"""Token embeddings and absolute positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.inference import COPIED_BYTES, PreparesForInference, is_plain
from x_transformers.ops import l2norm


class TokenEmbedding(nn.Module):
    """A table of token embeddings, `(num_tokens, dim)`.

    Args:
        dim: width.
        num_tokens: rows.
        l2norm_embed: look up rows of unit length (from a tiny initialisation), as FixNorm does (1910.05895).
    """

    def __init__(self, dim: int, num_tokens: int, l2norm_embed: bool = False) -> None:
        super().__init__()
        self.l2norm_embed = l2norm_embed
        self.emb = nn.Embedding(num_tokens, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, n)` ids to `(b, n, dim)`.

        Raises:
            TokenRangeError: if an id lies outside of the table (checked by the kernel; on an accelerator the ids of
                a training batch are not looked at).
        """
        try:
            embeds = self.emb(x.long())
        except IndexError as error:
            raise TokenRangeError(
                f"token ids run from {int(x.min())} to {int(x.max())}; this embedding holds {self.emb.num_embeddings}, "
                f"0 to {self.emb.num_embeddings - 1}."
            ) from error
        return l2norm(embeds) if self.l2norm_embed else embeds

    def init_(self) -> None:
        """Draw the table: Kaiming-normal, or N(0, 1e-5^2) where rows are normalised."""
        if self.l2norm_embed:
            nn.init.normal_(self.emb.weight, std=1e-5)
        else:
            nn.init.kaiming_normal_(self.emb.weight)


class SharedTokenEmbedding(TokenEmbedding):
    """Another model's table, which stays that model's: this one has no weights, and no entry in a state dict.

    Args:
        owner: whose table it is. Copied together, the copy reads the copied owner's.
    """

    def __init__(self, owner: TokenEmbedding) -> None:
        nn.Module.__init__(self)
        self.l2norm_embed = owner.l2norm_embed
        self._owner = (owner,)

    @property
    def emb(self) -> nn.Embedding:
        return self._owner[0].emb


class AbsolutePositionalEmbedding(PreparesForInference):
    """A learned table of positions, `table[pos] / sqrt(dim)`.

    Args:
        dim: width.
        max_seq_len: rows.
        l2norm_embed: rows of unit length in place of the factor.
    """

    def __init__(self, dim: int, max_seq_len: int, l2norm_embed: bool = False) -> None:
        super().__init__()
        self.scale = 1.0 if l2norm_embed else dim**-0.5
        self.max_seq_len, self.l2norm_embed = max_seq_len, l2norm_embed
        self.emb = nn.Embedding(max_seq_len, dim)

    def prepare(self) -> Tensor | None:
        """`(1, max_seq_len, dim)`: what comes out for every position, unless the table is large or no plain one."""
        if (
            not is_plain(self.emb, nn.Embedding)
            or self.emb.max_norm is not None
            or self.emb.weight.nbytes > COPIED_BYTES
        ):
            return None
        return self._scaled(self.emb.weight.detach()).unsqueeze(0)

    def _scaled(self, embeds: Tensor) -> Tensor:
        return l2norm(embeds) if self.l2norm_embed else embeds * self.scale

    def forward(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        """Position embeddings for `x (b, n, ...)`: `(1|b, n, dim)`.

        Raises:
            ShapeError: if a position lies behind the table.
        """
        n = x.shape[1]
        if pos is None and isinstance(offset, int) and seq_start_pos is None:
            if offset + n > self.max_seq_len:
                raise ShapeError(
                    f"{offset + n} tokens were given, but there are absolute positions for `max_seq_len` = "
                    f"{self.max_seq_len}; shorten the input, or use rotary positions."
                )
            if self.ready is not None:
                return self.ready.narrow(1, offset, n)
        pos = positions(n, x.device, pos, seq_start_pos, offset)
        try:
            embeds = self.emb(pos)
        except IndexError as error:
            raise ShapeError(
                f"position {int(pos.max())} is asked for, but there are absolute positions for `max_seq_len` = "
                f"{self.max_seq_len}."
            ) from error
        return self._scaled(embeds)


class ScaledSinusoidalEmbedding(KeepsFloat32):
    """`[sin(pos * f), cos(pos * f)] * scale`, `f_k = theta ** (-2k / dim)`, with a learned scale (2202.10447).

    Args:
        dim: width, even.
        theta: base of the frequencies.

    Raises:
        ConfigError: if the width is odd.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000) -> None:
        super().__init__()
        if dim % 2:
            raise ConfigError(f"sinusoidal positions need an even width; it is {dim}.")
        half = dim // 2
        self.scale = nn.Parameter(torch.full((1,), dim**-0.5))
        self.register_buffer("inv_freq", theta ** -(torch.arange(half).float() / half), persistent=False)

    def forward(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        """Position embeddings for `x (b, n, ...)`: `(1|b, n, dim)`."""
        pos = positions(x.shape[1], x.device, pos, seq_start_pos, offset)
        angles = pos.unsqueeze(-1) * self.inv_freq
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(self.scale.dtype) * self.scale


def build_positions(
    dim: int, max_seq_len: int, *, sinusoids: bool = False, l2norm_embed: bool = False
) -> AbsolutePositionalEmbedding | ScaledSinusoidalEmbedding:
    """A table of `max_seq_len` positions, or sinusoids."""
    if sinusoids:
        return ScaledSinusoidalEmbedding(dim)
    return AbsolutePositionalEmbedding(dim, max_seq_len, l2norm_embed)


def positions(
    n: int, device: torch.device, pos: Tensor | None, seq_start_pos: Tensor | None, offset: int | Tensor
) -> Tensor:
    """`(1|b, n)` positions: as given, or counted from `offset`, less each row's left padding."""
    if pos is None:
        if isinstance(offset, int):
            pos = torch.arange(offset, offset + n, device=device)
        else:
            pos = offset.reshape(1) if n == 1 else torch.arange(n, device=device) + offset
    pos = pos if pos.ndim == 2 else pos.unsqueeze(0)
    if seq_start_pos is not None:
        pos = (pos - seq_start_pos.unsqueeze(-1)).clamp(min=0)
    return pos


def check_ids(x: Tensor) -> None:
    """Raise unless x is `(b, n)` of an integer type."""
    if x.is_floating_point() or x.dtype is torch.bool:
        raise InputError(f"token ids have dtype {x.dtype}; they must be of an integer type.")
    if x.ndim != 2:
        raise ShapeError(f"token ids have shape {tuple(x.shape)}; they must be (batch, tokens).")


def frac_gradient(t: Tensor, fraction: float) -> Tensor:
    """The same values, through which that fraction of the gradient passes (2105.13290)."""
    return t if fraction == 1 else t * fraction + t.detach() * (1 - fraction)
