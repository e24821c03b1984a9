"""Encodings of sequences explained as sums of products of what is there and where it is (2608.29530)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import check_counts, checked, read_mask
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.losses import reaching
from x_transformers.models.embeddings import checked_ids, whole_numbers
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.inference import InferenceView
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import values_can_be_read
from x_transformers.options.configured import Configured
from x_transformers.options.schema import at_least

ROLE_SCHEMES = ("left_to_right", "right_to_left", "bidirectional", "wickel", "bag_of_words")


def num_roles_for_scheme(scheme: str, *, max_seq_len: int, num_fillers: int) -> int:
    """Return the number of roles of a scheme.

    Args:
        scheme: one of `ROLE_SCHEMES`; see `role_ids_for_tokens`.
        max_seq_len: length of the longest sequence, L.
        num_fillers: number of ids, F.

    Returns:
        L for "left_to_right" and "right_to_left", L (L + 1) / 2 for "bidirectional", (F + 1)^2 for "wickel", 1 for
        "bag_of_words".

    Raises:
        ConfigError: if there is no such scheme.
    """
    _check_scheme(scheme)
    if scheme == "bidirectional":
        return max_seq_len * (max_seq_len + 1) // 2
    if scheme == "wickel":
        return (num_fillers + 1) ** 2
    return 1 if scheme == "bag_of_words" else max_seq_len


def role_ids_for_tokens(tokens: Tensor, lengths: Tensor, scheme: str, *, max_seq_len: int, num_fillers: int) -> Tensor:
    """Return the role of each token, 0 for padding.

    The role of position i of a sequence of length L, counted from 0: i for "left_to_right", `L - 1 - i` for
    "right_to_left", `L (L - 1) / 2 + i` for "bidirectional", `previous * (F + 1) + next` for "wickel", with F for what
    is before the first and after the last token, and 0 for "bag_of_words".

    Args:
        tokens: `(b, n)` ids.
        lengths: `(b,)` number of tokens of each row, from the left.
        scheme: one of `ROLE_SCHEMES`.
        max_seq_len: length of the longest sequence.
        num_fillers: number of ids, F.

    Returns:
        `(b, n)` whole numbers.

    Raises:
        ConfigError: if there is no such scheme.
        InputError: if lengths or ids are out of range.
    """
    _check_scheme(scheme)
    tokens = whole_numbers(tokens, "`tokens` has").long()
    if tokens.ndim != 2:
        raise ShapeError(f"`tokens` has shape {tuple(tokens.shape)}; it must be (b, n).")
    n = tokens.shape[1]
    if lengths.shape != (len(tokens),) or bool(((lengths < 0) | (lengths > min(n, max_seq_len))).any()):
        raise InputError(
            f"`lengths` is {lengths.tolist()}; it must hold a number of tokens for each of {len(tokens)} rows, at most "
            f"{min(n, max_seq_len)}."
        )
    places, lengths = torch.arange(n, device=tokens.device), lengths.long().unsqueeze(-1)
    valid = places < lengths
    if scheme == "wickel":
        within = tokens.masked_fill(~valid, num_fillers)
        if bool(((within < 0) | (within > num_fillers)).any()):
            raise TokenRangeError(f"`tokens` must be ids of fillers, 0 to {num_fillers - 1}.")
        before, after = (
            F.pad(within, (1, 0), value=num_fillers)[:, :-1],
            F.pad(within, (0, 1), value=num_fillers)[:, 1:],
        )
        roles = before * (num_fillers + 1) + after
    elif scheme == "bag_of_words":
        roles = torch.zeros_like(tokens)
    elif scheme == "right_to_left":
        roles = lengths - 1 - places
    else:
        first = lengths * (lengths - 1) // 2 if scheme == "bidirectional" else 0
        roles = first + places.expand_as(tokens)
    return roles.masked_fill(~valid, 0)


def _check_scheme(scheme: str) -> None:
    if scheme not in ROLE_SCHEMES:
        raise ConfigError(f"`scheme` is {scheme!r}; it must be {', '.join(map(repr, ROLE_SCHEMES))}.")


class TPREncoder(Configured, nn.Module):
    """Tensor product representation of a sequence: a sum over its tokens of `filler^T W_o role`, plus a bias.

        state[o] = sum over valid i of f(token_i)^T W_o r(role_i) + b[o]

    Args:
        dim: width of the state.
        num_fillers: number of ids.
        num_roles: number of roles.
        filler_dim, role_dim: width of the embeddings f and r.
        mlp_dim: inner width of a network that reads the state; default none.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_fillers: int,
        num_roles: int,
        filler_dim: int = 24,
        role_dim: int = 24,
        mlp_dim: int | None = None,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, num_fillers=num_fillers, num_roles=num_roles, filler_dim=filler_dim, role_dim=role_dim)
        at_least(1, mlp_dim=mlp_dim)
        self.filler_emb, self.role_emb = nn.Embedding(num_fillers, filler_dim), nn.Embedding(num_roles, role_dim)
        for table in (self.filler_emb, self.role_emb):
            nn.init.normal_(table.weight, std=0.05)
        self.binding = nn.Parameter(torch.zeros(dim, filler_dim, role_dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.mlp = None
        if mlp_dim is not None:
            self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.SiLU(), nn.Linear(mlp_dim, dim))

    def state(self, tokens: Tensor, role_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the state of each row.

        Args:
            tokens: `(b, n)` ids of fillers.
            role_ids: `(b, n)` ids of roles.
            mask: `(b, n)` bool, valid tokens; the ids of others may be anything.

        Returns:
            `(b, dim)`.

        Raises:
            InputError: if the shapes differ, or ids are out of range.
        """
        fillers, roles = checked_ids(tokens, self).long(), checked_ids(role_ids, self).long()
        if roles.shape != fillers.shape:
            shapes = f"{tuple(fillers.shape)} and {tuple(roles.shape)}"
            raise ShapeError(f"`tokens` and `role_ids` have shapes {shapes}; they must be equal.")
        mask = None if mask is None else _mask_of(fillers, mask)
        if mask is not None:
            fillers, roles = fillers.masked_fill(~mask, 0), roles.masked_fill(~mask, 0)
        for name, ids, table in (("tokens", fillers, self.filler_emb), ("role_ids", roles, self.role_emb)):
            if values_can_be_read() and bool(((ids < 0) | (ids >= table.num_embeddings)).any()):
                raise TokenRangeError(f"`{name}` must be ids from 0 to {table.num_embeddings - 1}.")
        f, r = self.filler_emb(fillers), self.role_emb(roles)
        if mask is not None:
            f = f.masked_fill(~mask.unsqueeze(-1), 0.0)
        # the sum over tokens first: it is smaller than the product with the binding of each token
        bound = torch.einsum("b n f, b n r -> b f r", f, r)
        return torch.einsum("b f r, o f r -> b o", bound, self.binding) + self.bias

    def readout(self, state: Tensor) -> Tensor:
        """Return the encoding `(b, dim)` that belongs to a state."""
        return state if self.mlp is None else self.mlp(state)

    @checked
    def forward(self, tokens: Tensor, role_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the encoding of each row, `readout(state(...))`."""
        return self.readout(self.state(tokens, role_ids, mask))

    def fit(
        self,
        tokens: Tensor,
        role_ids: Tensor,
        target_encodings: Tensor,
        *,
        mask: Tensor | None = None,
        steps: int = 2000,
        batch_size: int = 1024,
        lr: float = 3e-3,
        ema_decay: float = 0.9,
        optim: Any = torch.optim.Adam,
    ) -> float:
        """Fit all parameters to encodings, by the mean squared error of random batches.

        Args:
            tokens, role_ids, mask: as in `state`, of all rows.
            target_encodings: `(b, dim)`, as constants.
            steps: number of steps.
            batch_size: number of rows of a step, drawn with repetition.
            lr: learning rate.
            ema_decay: decay of the average that is returned.
            optim: class of the optimizer.

        Returns:
            The exponential moving average of the losses, which begins at 0 and is not corrected for it.

        Raises:
            InputError: if there is no row, or the shapes differ.
        """
        if len(tokens) == 0 or target_encodings.shape != (len(tokens), len(self.bias)):
            raise ShapeError(
                f"`target_encodings` has shape {tuple(target_encodings.shape)}; it must be ({len(tokens)}, "
                f"{len(self.bias)}), with at least one row."
            )
        optimizer, average, targets = optim(self.parameters(), lr=lr), 0.0, target_encodings.detach()
        for _ in range(steps):
            rows = torch.randint(len(tokens), (batch_size,), device=tokens.device)
            seen = None if mask is None else mask[rows]
            with torch.enable_grad():
                loss = F.mse_loss(self(tokens[rows], role_ids[rows], seen), targets[rows])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average = average * ema_decay + loss.item() * (1 - ema_decay)
        return average


class DiscoverDecoder(SavesFolders):
    """One causal decoder that encodes a sequence to a vector, and writes a sequence from a vector.

    The vector is embedded before the tokens of the sequence that is written.

    Args:
        decoder: a causal model, whose embeddings are as wide as its features.
        num_fillers: number of ids that sequences consist of, from 0.
        bos_id: id that a written sequence begins from.
        pad_id: id of padding on the right.
        max_seq_len: length of the longest sequence.
        enc_pos: position whose feature is the encoding: "last", or a number.

    Raises:
        ConfigError: if the model cannot do both, or an id or position is out of range.
    """

    def __init__(
        self,
        *,
        decoder: TransformerWrapper,
        num_fillers: int,
        bos_id: int,
        pad_id: int,
        max_seq_len: int,
        enc_pos: str | int = "last",
    ) -> None:
        super().__init__()
        model = unwrapped(decoder)
        if not isinstance(model, TransformerWrapper) or not model.attn_layers.causal or model.pools:
            raise ConfigError("`decoder` must be a causal TransformerWrapper (around a Decoder) that does not pool.")
        if model.emb_dim != model.attn_layers.dim:
            raise ConfigError(
                f"the embeddings of `decoder` have width {model.emb_dim} and its features {model.attn_layers.dim}; "
                "they must be equal, since features become embeddings."
            )
        if model.to_logits is None or model.has_multiple_heads:
            raise ConfigError("`decoder` must have one head, from which sequences are written.")
        for name, value in (("bos_id", bos_id), ("pad_id", pad_id), ("num_fillers - 1", num_fillers - 1)):
            if not 0 <= value < model.num_tokens:
                raise ConfigError(f"`{name}` is {value}; ids of the decoder are 0 to {model.num_tokens - 1}.")
        if isinstance(enc_pos, str) and enc_pos != "last":
            raise ConfigError(f"`enc_pos` is {enc_pos!r}; it must be 'last' or the number of a position.")
        if isinstance(enc_pos, int) and not 0 <= enc_pos < max_seq_len:
            raise ConfigError(f"`enc_pos` is {enc_pos}; positions are 0 to {max_seq_len - 1}.")
        if model.pos_emb is not None and model.max_seq_len < max_seq_len:
            raise ConfigError(
                f"`max_seq_len` is {max_seq_len}, but the decoder has a table of {model.max_seq_len} positions."
            )
        self.decoder, self.num_fillers, self.bos_id, self.pad_id = decoder, num_fillers, bos_id, pad_id
        self.max_seq_len, self.enc_pos = max_seq_len, enc_pos

    @property
    def dim(self) -> int:
        """Width of the encodings."""
        return unwrapped(self.decoder).attn_layers.dim

    @checked
    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the encoding of each row.

        Args:
            tokens: `(b, n)` ids.
            mask: `(b, n)` bool, valid tokens, from the left; default all.

        Returns:
            `(b, dim)`: the feature of the last valid token, or of position `enc_pos`.

        Raises:
            InputError: if a row has no token, or none at `enc_pos`.
        """
        tokens = checked_ids(tokens, self)
        return self._encode(tokens, self._checked(tokens, mask))[0]

    def _checked(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the mask as bool; raise an `InputError` if a row has no token."""
        mask = None if mask is None else _mask_of(tokens, mask)
        empty = tokens.shape[1] == 0
        if mask is not None and values_can_be_read():
            empty = empty or not bool(mask.any(dim=-1).all())
        if empty:
            raise InputError("each row needs a token to be encoded; one is empty.")
        return mask

    def _encode(self, tokens: Tensor, mask: Tensor | None, **given: Any) -> tuple[Tensor, LayerIntermediates | None]:
        """Return encodings of checked tokens, and the record of the pass, if `given` requests it."""
        features, record = _pair(self.decoder(tokens, mask=mask, return_embeddings=True, **given))
        return self._encoding(features, tokens, mask), record

    def _encoding(self, features: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return the feature of each row that is its encoding."""
        if isinstance(self.enc_pos, int):
            if self.enc_pos >= tokens.shape[1]:
                raise InputError(f"`enc_pos` is {self.enc_pos}; the rows have {tokens.shape[1]} tokens.")
            return features[:, self.enc_pos]
        if mask is None:
            return features[:, -1]
        last = torch.where(mask, torch.arange(tokens.shape[1], device=tokens.device), 0).amax(dim=-1)
        return features[torch.arange(len(tokens), device=tokens.device), last]

    @checked
    def forward(self, tokens: Ids, targets: Ids | None = None, *, return_aux_loss: bool = False) -> Any:
        """Return encodings, or the logits of targets that are written from them.

        Args:
            tokens: `(b, n)` ids, `pad_id` after the end of a row.
            targets: `(b, m)` ids.
            return_aux_loss: also return the intermediates, with `aux_loss`, the losses of experts in all passes.

        Returns:
            `(b, dim)` encodings; or logits `(b, m, v)` of the targets, each after the encoding, `bos_id` and the
            targets before it. With `return_aux_loss` a pair of it and the intermediates of the last pass.

        Raises:
            InputError: with what was given and what is needed.
        """
        tokens = checked_ids(tokens, self)
        mask = self._checked(tokens, tokens != self.pad_id)
        given = {"return_aux_loss": True} if return_aux_loss else {}
        encodings, record = self._encode(tokens, mask, **given)
        if targets is None:
            return encodings if record is None else (encodings, record)
        targets = checked_ids(targets, self).long()
        if len(targets) != len(tokens):
            raise ShapeError(f"`targets` has {len(targets)} rows and `tokens` {len(tokens)}; they must be equal.")
        shown = F.pad(targets[:, :-1], (1, 0), value=self.bos_id)
        logits, last = _pair(self._after(encodings, shown, **given))
        model = unwrapped(self.decoder)
        logits = reaching(logits, model.attn_pool, model.to_next_embed_pred, model.exit_norms)
        if record is None or last is None:
            return logits
        last.include_routing([record])
        return logits, last

    def _after(self, encodings: Tensor, tokens: Tensor, **given: Any) -> Any:
        """Return logits `(b, n, v)` of what follows an encoding and tokens."""
        return self.decoder(tokens, prepend_embeds=encodings.unsqueeze(1), excise_prepend_embeds=True, **given)

    @torch.no_grad()
    @checked
    def decode(
        self,
        encodings: Tensor,
        lengths: Tensor | None = None,
        *,
        eos_id: int | None = None,
        max_len: int | None = None,
    ) -> Tensor:
        """Write the most likely sequence of each encoding, in evaluation mode.

        Args:
            encodings: `(b, dim)`.
            lengths: `(b,)` number of tokens of each row; or give `eos_id`.
            eos_id: ends a row; it is kept.
            max_len: number of columns of the result; default the largest length, or `max_seq_len` with `eos_id`.

        Returns:
            `(b, max_len)` ids, `pad_id` after the end of a row.

        Raises:
            InputError: with what was given and what is needed.
        """
        if (lengths is None) == (eos_id is None):
            raise InputError("a row ends by its length or by a token: pass `lengths` or `eos_id`, and not both.")
        if encodings.ndim != 2 or encodings.shape[1] != self.dim:
            raise ShapeError(f"`encodings` has shape {tuple(encodings.shape)}; it must be (b, {self.dim}).")
        if lengths is not None:
            check_counts(lengths, "lengths", self.max_seq_len, len(encodings))
        if max_len is None:
            max_len = self.max_seq_len if lengths is None else int(lengths.max()) if lengths.numel() else 0
        if not 0 <= max_len <= self.max_seq_len:
            raise InputError(f"{max_len} tokens are asked for; `max_seq_len` is {self.max_seq_len}.")
        tokens = torch.full((len(encodings), 1), self.bos_id, device=encodings.device)
        ended = torch.zeros(len(encodings), dtype=torch.bool, device=encodings.device)
        view = InferenceView(self)
        own = view.of(self)
        with view:
            for place in range(max_len):
                if lengths is not None:
                    ended = place >= lengths
                elif bool(ended.all()):
                    break
                token = own._after(encodings, tokens)[:, -1].argmax(dim=-1).masked_fill(ended, self.pad_id)
                tokens = torch.cat((tokens, token.unsqueeze(-1)), dim=-1)
                if eos_id is not None:
                    ended = ended | (token == eos_id)
        written = tokens[:, 1:]
        return F.pad(written, (0, max_len - written.shape[1]), value=self.pad_id)

    @torch.no_grad()
    def surgery(
        self, tokens: Tensor, edited_tokens: Tensor, role_ids_old: Tensor, role_ids_new: Tensor, tpr: TPREncoder
    ) -> Tensor:
        """Write what a sequence becomes if its encoding is edited as a tensor product representation says.

        The encoding of `tokens` plus the difference of the readouts of the two states is written out.

        Args:
            tokens: `(b, n)` ids, `pad_id` after the end of a row.
            edited_tokens: `(b, n)` ids with other fillers, and padding in the same places.
            role_ids_old, role_ids_new: `(b, n)` roles of the two.
            tpr: fitted to encodings of the decoder.

        Returns:
            `(b, m)` ids, m the length of the longest row.

        Raises:
            InputError: if padding differs, or ids are no fillers.
        """
        tokens, edited = checked_ids(tokens, self), checked_ids(edited_tokens, self)
        if edited.shape != tokens.shape or not torch.equal(edited == self.pad_id, tokens == self.pad_id):
            raise InputError("`edited_tokens` must have the padding of `tokens`, in the same places.")
        mask = tokens != self.pad_id
        for name, ids in (("tokens", tokens), ("edited_tokens", edited)):
            if bool((((ids < 0) | (ids >= self.num_fillers)) & mask).any()):
                raise TokenRangeError(f"`{name}` must hold fillers, ids 0 to {self.num_fillers - 1}, and padding.")
        old, new = tpr.state(tokens, role_ids_old, mask), tpr.state(edited, role_ids_new, mask)
        view = InferenceView(self)
        own = cast(DiscoverDecoder, view.of(self))
        with view:
            encodings = own.encode(tokens, mask)
        return self.decode(encodings + tpr.readout(new) - tpr.readout(old), mask.sum(dim=-1))


def _pair(out: Any) -> tuple[Tensor, LayerIntermediates | None]:
    """Return the output of a pass, and its record, or None."""
    return out if isinstance(out, tuple) else (out, None)


def _mask_of(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return a mask of tokens `(b, n)` as bool."""
    mask = read_mask(mask, "mask")
    if mask.shape != tokens.shape:
        raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; it must be that of the tokens, {tuple(tokens.shape)}.")
    return mask
