"""Token embeddings and absolute positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError, ShapeError, StateDictError, TokenRangeError
from x_transformers.forward_pass.arrays import as_ids
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.inference import COPIED_BYTES, PreparesForInference, is_plain
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.second_names import SecondNames
from x_transformers.modules.state_dict import LoadsWhole, ReadsReference
from x_transformers.ops import l2norm, values_can_be_read
from x_transformers.options.schema import at_least


class TokenEmbedding(ReadsReference):
    """Table of token embeddings, `(num_tokens, dim)`.

    Args:
        dim: width.
        num_tokens: number of rows.
        l2norm_embed: look up rows of unit length (from a tiny initialization), as FixNorm does (1910.05895).
        scale: factor of the embeddings.
    """

    def __init__(self, dim: int, num_tokens: int, l2norm_embed: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        at_least(1, dim=dim, num_tokens=num_tokens)
        self.l2norm_embed, self.scale = l2norm_embed, scale
        self.emb = nn.Embedding(num_tokens, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Look up embeddings.

        Args:
            x: `(b, n)` ids.

        Returns:
            `(b, n, dim)`.

        Raises:
            TokenRangeError: if an id lies outside of the table. The kernel checks this, which accelerators leave out.
        """
        try:
            embeds = self.emb(x.long())
        except IndexError as error:
            raise out_of_range(x, len(table_of(self))) from error
        if self.l2norm_embed:
            embeds = l2norm(embeds)
        return embeds if self.scale == 1 else embeds * self.scale

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        if self.scale != 1:
            raise StateDictError("the reference has no `emb_scale`; a model with it cannot be exported.")

    def init_(self) -> None:
        """Initialize the table: Kaiming-normal, or N(0, 1e-5^2) where rows are normalized."""
        if self.l2norm_embed:
            nn.init.normal_(self.emb.weight, std=1e-5)
        else:
            nn.init.kaiming_normal_(self.emb.weight)


def out_of_range(ids: Tensor, count: int) -> TokenRangeError:
    """Return the error for ids of which some are not in a table of `count` rows."""
    return TokenRangeError(
        f"token ids run from {int(ids.min())} to {int(ids.max())}; this embedding holds {count}, 0 to {count - 1}."
    )


class SharedTokenEmbedding(SecondNames, TokenEmbedding):
    """Table of another model's token embedding, without weights of its own and without an entry in a state dict.

    The owner is kept in a tuple, so that it is not registered as a submodule. A deep copy of a model that contains both
    refers to the copied owner.

    Args:
        owner: the embedding that has the table.
    """

    def __init__(self, owner: TokenEmbedding) -> None:
        nn.Module.__init__(self)
        self.l2norm_embed, self.scale = owner.l2norm_embed, owner.scale
        self._owner = (owner,)

    @property
    def emb(self) -> nn.Embedding:
        """The owner's table. An assignment replaces it there."""
        return self._owner[0].emb

    @emb.setter
    def emb(self, value: nn.Embedding) -> None:
        self._owner[0].emb = value


def table_of(token_emb: nn.Module) -> Tensor:
    """Return the table `(num_tokens, dim)` of a token embedding, or of a module in its place that contains one.

    What is around the table of a `TokenEmbedding`, such as an adapter, changes its rows: those that it returns count.

    Raises:
        InputError: if the module contains no table.
    """
    emb = token_emb.emb if isinstance(token_emb, TokenEmbedding) else token_emb
    if emb is not token_emb and not isinstance(emb, nn.Embedding):
        inner = table_of(emb)
        rows: Tensor = emb(torch.arange(len(inner), device=inner.device))
        return rows
    if not isinstance(emb, nn.Embedding):
        emb = next((each for each in emb.modules() if isinstance(each, nn.Embedding)), None)
    if emb is None:
        raise InputError(
            f"`tie_embedding` computes logits with the token table, and {type(token_emb).__name__} contains no "
            "`nn.Embedding`; put one inside, or replace `to_logits` too."
        )
    return emb.weight


class AbsolutePositionalEmbedding(PreparesForInference, ReadsReference):
    """Learned table of positions, `table[pos] / sqrt(dim)`.

    Args:
        dim: width.
        max_seq_len: number of rows.
        l2norm_embed: rows of unit length instead of the factor.
        scale: another factor.
        first_row: row of position 0, after this number of rows that no position has (2205.01068).
    """

    def __init__(
        self,
        dim: int,
        max_seq_len: int,
        l2norm_embed: bool = False,
        scale: float | None = None,
        first_row: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, max_seq_len=max_seq_len)
        at_least(0, first_row=first_row)
        self.scale = scale or (1.0 if l2norm_embed else dim**-0.5)
        self.own_scale = scale is not None
        self.max_seq_len, self.l2norm_embed, self.first_row = max_seq_len, l2norm_embed, first_row
        self.emb = nn.Embedding(first_row + max_seq_len, dim)

    def prepare(self) -> Tensor | None:
        """Return the embeddings `(max_seq_len, dim)` of all positions, unless the table is large or modified."""
        if (
            not is_plain(self.emb, nn.Embedding)
            or self.emb.max_norm is not None
            or self.emb.weight.nbytes > COPIED_BYTES
        ):
            return None
        return self._scaled(self.emb.weight.detach()[self.first_row :])

    def _scaled(self, rows: Tensor) -> Tensor:
        if self.l2norm_embed:
            rows = l2norm(rows)
        return rows if self.scale == 1 else rows * self.scale

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        for keyword, given in (("abs_pos_emb_scale", self.own_scale), ("abs_pos_emb_offset", self.first_row > 0)):
            if given:
                raise StateDictError(f"the reference has no `{keyword}`; a model with it cannot be exported.")

    def forward(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        """Return position embeddings.

        Args:
            x: `(b, n, ...)` what has these positions.
            pos: `(n,)` or `(b, n)` positions; default counted from `offset`.
            seq_start_pos: `(b,)` left padding of each row, which does not count.
            offset: position of the first token, if `pos` is not given.

        Returns:
            `(n, dim)`; with a position or padding for each row, `(b, n, dim)`.

        Raises:
            ShapeError: if a position is not in the table.
        """
        n = x.shape[1]
        if pos is None and isinstance(offset, int) and seq_start_pos is None:
            if offset + n > self.max_seq_len:
                raise ShapeError(
                    f"{offset + n} tokens were given, but there are absolute positions for `max_seq_len` = "
                    f"{self.max_seq_len}; shorten the input, or use rotary positions."
                )
            if self.ready is not None and not torch.is_grad_enabled():
                return self.ready.narrow(0, offset, n)
            pos = torch.arange(offset, offset + n, device=x.device)
        else:
            pos = positions(n, x.device, pos, seq_start_pos, offset)
        try:
            embeds = self.emb(pos + self.first_row if self.first_row else pos)
        except IndexError as error:
            raise ShapeError(
                f"position {int(pos.max())} was requested, but there are absolute positions for `max_seq_len` = "
                f"{self.max_seq_len}; shorten the input, or use rotary positions."
            ) from error
        return self._scaled(embeds)


class ScaledSinusoidalEmbedding(KeepsFloat32, LoadsWhole):
    """Sinusoids `[sin(pos * f), cos(pos * f)] * scale` with a learned scale, `f_k = theta ** (-2k / dim)` (2202.10447).

    Args:
        dim: width, even.
        theta: base of the frequencies.

    Raises:
        ConfigError: if the width is odd.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000) -> None:
        super().__init__()
        at_least(1, dim=dim)
        if dim % 2:
            raise ConfigError(f"sinusoidal positions need an even width; it is {dim}.")
        self.frequencies, self.theta = dim // 2, theta
        self.scale = nn.Parameter(torch.full((1,), dim**-0.5))
        self.register_derived()

    def derived_buffers(self) -> dict[str, Tensor]:
        return {"inv_freq": self.theta ** -(torch.arange(self.frequencies, dtype=torch.float32) / self.frequencies)}

    def forward(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        """Return position embeddings `(n, dim)` or `(b, n, dim)`; see `AbsolutePositionalEmbedding.forward`."""
        pos = positions(x.shape[1], x.device, pos, seq_start_pos, offset)
        angles = pos.unsqueeze(-1) * self.inv_freq
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(self.scale.dtype) * self.scale


def build_positions(
    dim: int,
    max_seq_len: int,
    *,
    sinusoids: bool = False,
    l2norm_embed: bool = False,
    scale: float | None = None,
    first_row: int = 0,
) -> AbsolutePositionalEmbedding | ScaledSinusoidalEmbedding:
    """Build a table of `max_seq_len` positions, or sinusoids."""
    if sinusoids:
        return ScaledSinusoidalEmbedding(dim)
    return AbsolutePositionalEmbedding(dim, max_seq_len, l2norm_embed, scale, first_row)


def build_embedding_norm(options: Any, dim: int) -> LayerNorm | None:
    """Build the norm after the embeddings, or return None if the options of a model request none."""
    if not options.post_emb_norm:
        return None
    return LayerNorm(dim, eps=options.post_emb_norm_eps, bias=options.post_emb_norm_bias)


def positions(
    n: int, device: torch.device, pos: Tensor | None, seq_start_pos: Tensor | None, offset: int | Tensor
) -> Tensor:
    """Return `(n,)` or `(b, n)` positions: as given, or counted from `offset`, minus the left padding of each row."""
    if pos is None:
        if isinstance(offset, int):
            pos = torch.arange(offset, offset + n, device=device)
        else:
            pos = offset.reshape(1) if n == 1 else torch.arange(n, device=device) + offset
    if seq_start_pos is not None:
        pos = (pos - seq_start_pos.unsqueeze(-1)).clamp(min=0)
    return pos


def further_embeddings(table: nn.Module, ids: Tensor, name: str) -> Tensor:
    """Look up the embeddings of further ids `(b, n)`.

    Raises:
        TokenRangeError: if an id lies outside of the table. The kernel checks this, which accelerators leave out.
    """
    try:
        return table(ids.long())
    except IndexError as error:
        raise TokenRangeError(
            f"`embed_ids[{name!r}]` runs from {int(ids.min())} to {int(ids.max())}; its table, {table}, is smaller."
        ) from error


def checked_ids(x: Any, model: nn.Module) -> Tensor:
    """Return token ids `(b, n)` of an integer type; arrays and lists become tensors.

    Args:
        x: the ids.
        model: reads them.

    Raises:
        InputError: if they are no whole numbers.
        ShapeError: if they have another rank.
    """
    if not isinstance(x, Tensor):
        x = as_ids(x, model, "the array of token ids")
    if x.is_floating_point() or x.is_complex() or x.dtype is torch.bool:
        x = whole_numbers(x, "token ids have")
    if x.ndim != 2:
        raise ShapeError(f"token ids have shape {tuple(x.shape)}; they must be (batch, tokens).")
    return x


def whole_numbers(t: Tensor, subject: str) -> Tensor:
    """Return a tensor of an integer type; floating values, which data sets often contain, must be whole numbers.

    Args:
        t: the tensor. While compiling, floating values are not checked.
        subject: subject and verb of the message, such as "`prompts` has".

    Raises:
        InputError: if a value is no whole number, or the tensor is boolean or complex.
    """
    if not t.is_floating_point():
        if t.dtype is torch.bool or t.is_complex():
            raise InputError(f"{subject} dtype {t.dtype}; pass an integer type.")
        return t
    if values_can_be_read() and not bool((t.isfinite() & (t == t.round())).all()):
        raise InputError(f"{subject} dtype {t.dtype}, and not all values are whole numbers; pass an integer type.")
    return t.long()


def frac_gradient(t: Tensor, fraction: float) -> Tensor:
    """Return the same values, which pass on this fraction of the gradient (2105.13290)."""
    return t if fraction == 1 else t * fraction + t.detach() * (1 - fraction)
