"""Autoencoder of sequences of vectors: an encoder to one latent vector, and a causal decoder that starts from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.layers.named_stacks import Decoder, Encoder
from x_transformers.losses import normal_divergence, plus_aux_loss, run_with_aux_loss
from x_transformers.models.continuous import ContinuousTransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.ops import at_least_float32, masked_mean
from x_transformers.options.schema import at_least
from x_transformers.options.stack_groups import refuse_in_groups

__getattr__ = names_of(__name__)

RESERVED: dict[str, str] = dict.fromkeys(("dim", "depth"), "set `dim` for both stacks, and `enc_depth` and `dec_depth`")

LOSSES: dict[str, Callable[..., Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss}


class DeterministicLatentBottleneck(SavesFolders):
    """Features to a latent vector, `f(W x + b)`, without a loss of its own.

    Args:
        dim: width of the features.
        dim_latent: width of the latent vector.
        activation: f; default the identity.
    """

    def __init__(self, dim: int, dim_latent: int, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        at_least(1, dim=dim, dim_latent=dim_latent)
        self.proj = nn.Linear(dim, dim_latent)
        self.activation = nn.Identity() if activation is None else activation

    @checked
    def forward(self, x: Tensor, return_unreduced_loss: bool = False) -> tuple[Tensor, None]:
        """Map `(b, dim)` features to `(b, dim_latent)`; there is no loss to reduce or not to reduce.

        Returns:
            the latent vectors, and None.
        """
        return self.activation(self.proj(x)), None


class VariationalLatentBottleneck(SavesFolders):
    """Features to a normally distributed latent vector (1312.6114).

    With the mean `mu` and the logarithm `v` of the variance, both linear in the features:

        z = mu + exp(v / 2) * eps,    eps ~ N(0, 1)
        loss = sum over dimensions of max((exp(v) + mu^2 - v - 1) / 2 - floor, 0)

    Args:
        dim: width of the features.
        dim_latent: width of z.
        kl_div_floor: divergence of each dimension that costs nothing.

    Raises:
        ConfigError: if `kl_div_floor` is negative.
    """

    def __init__(self, dim: int, dim_latent: int, kl_div_floor: float = 0.0) -> None:
        super().__init__()
        at_least(1, dim=dim, dim_latent=dim_latent)
        if kl_div_floor < 0:
            raise ConfigError(f"`kl_div_floor` is {kl_div_floor}; a divergence is 0 or more, and so is its floor.")
        self.kl_div_floor = kl_div_floor
        self.to_mean_log_var = nn.Sequential(nn.Linear(dim, dim_latent * 2))

    @checked
    def forward(self, x: Tensor, return_unreduced_loss: bool = False) -> tuple[Tensor, Tensor]:
        """Sample a latent vector for each row.

        Args:
            x: `(b, dim)` features.
            return_unreduced_loss: return the divergence of each row, instead of the mean over rows.

        Returns:
            z `(b, dim_latent)`, and the divergence from the standard normal distribution, a scalar or `(b,)`.
        """
        mean, log_variance = self.to_mean_log_var(x).chunk(2, dim=-1)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = normal_divergence(mean, log_variance, self.kl_div_floor)
        return z, divergence if return_unreduced_loss else divergence.mean()


BOTTLENECKS = {"deterministic": DeterministicLatentBottleneck, "variational": VariationalLatentBottleneck}


class ContinuousTransformerAutoencoder(SavesFolders):
    """Sequences of vectors through one latent vector each: `(b, n, dim_input)` to the loss of their reconstruction.

    The encoder's features are averaged over valid positions and go through a bottleneck. The decoder is causal; the
    latent vector is embedded in front of the sequence and predicts its first vector, and each vector predicts the next
    one.

    Args:
        dim: width of both stacks.
        enc_depth, dec_depth: number of blocks of the encoder and the decoder.
        max_seq_len: length of the tables of absolute positions.
        dim_input: width of the vectors; default `dim`.
        dim_latent: width of the latent vector; default `dim`.
        bottleneck: a module to use instead. It maps `(b, dim)` features to `(b, dim_latent)` latent vectors and their
            loss, a scalar or None; with `return_unreduced_loss = True`, the loss of each row.
        bottleneck_type: "deterministic" or "variational".
        deterministic_bottleneck_kwargs, variational_bottleneck_kwargs: further keywords of the bottleneck.
        loss_type: "l2" for squared and "l1" for absolute errors.
        attn_dim_head, heads: of both stacks.
        enc_kwargs, dec_kwargs: further keywords of the `Encoder` and of the `Decoder`.
        latents_dropout_prob: probability in training that the decoder of a row does not see the latent vector.
        kwargs: further keywords of both stacks.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        dim: int,
        enc_depth: int,
        dec_depth: int,
        max_seq_len: int,
        dim_input: int | None = None,
        dim_latent: int | None = None,
        bottleneck: nn.Module | None = None,
        bottleneck_type: str = "deterministic",
        deterministic_bottleneck_kwargs: Mapping[str, Any] | None = None,
        variational_bottleneck_kwargs: Mapping[str, Any] | None = None,
        loss_type: str = "l2",
        attn_dim_head: int = 64,
        heads: int = 8,
        enc_kwargs: Mapping[str, Any] | None = None,
        dec_kwargs: Mapping[str, Any] | None = None,
        latents_dropout_prob: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if loss_type not in LOSSES:
            raise ConfigError(f"`loss_type` is {loss_type!r}; it must be {' or '.join(map(repr, LOSSES))}.")
        if not 0 <= latents_dropout_prob <= 1:
            raise ConfigError(f"`latents_dropout_prob` is {latents_dropout_prob}; it must lie in [0, 1].")
        dim_input = dim if dim_input is None else dim_input
        dim_latent = dim if dim_latent is None else dim_latent
        enc_kwargs, dec_kwargs = dict(enc_kwargs or {}), dict(dec_kwargs or {})
        groups = {"enc_kwargs": enc_kwargs, "dec_kwargs": dec_kwargs, "kwargs": kwargs}
        refuse_in_groups(RESERVED, groups)
        both = {"dim": dim, "attn_dim_head": attn_dim_head, "heads": heads, **kwargs}
        self.loss_type, self.latents_dropout_prob = loss_type, latents_dropout_prob
        self.encoder = ContinuousTransformerWrapper(
            dim_in=None if dim_input == dim else dim_input,
            max_seq_len=max_seq_len,
            average_pool_embed=True,
            attn_layers=Encoder(**{**both, "depth": enc_depth, **enc_kwargs}),
        )
        of_each_type = {"deterministic": deterministic_bottleneck_kwargs, "variational": variational_bottleneck_kwargs}
        self.bottleneck = _bottleneck(bottleneck, bottleneck_type, of_each_type, dim, dim_latent)
        self.from_latent_to_prepend_token = nn.Sequential(nn.Linear(dim_latent, dim))
        self.decoder = ContinuousTransformerWrapper(
            dim_in=dim_input,
            dim_out=dim_input,
            max_seq_len=max_seq_len,
            attn_layers=Decoder(**{**both, "depth": dec_depth, **dec_kwargs}),
        )

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.from_latent_to_prepend_token.parameters()).device

    @checked
    def encode(
        self,
        seq: Tensor,
        lens: Tensor | None = None,
        return_aux_loss: bool = False,
        return_unreduced_loss: bool = False,
    ) -> Any:
        """Return the latent vector of each row.

        Args:
            seq: `(b, n, dim_input)`.
            lens: `(b,)` number of valid vectors of each row, from the left; default all.
            return_aux_loss: also return the loss of the bottleneck, None if it has none.
            return_unreduced_loss: a loss for each row.

        Returns:
            `(b, dim_latent)`, or a pair of it and the loss.

        Raises:
            InputError: with what was given and what is needed.
        """
        latents, loss, _ = self._encode(seq, lens, return_unreduced_loss)
        return (latents, loss) if return_aux_loss else latents

    def _encode(self, seq: Tensor, lens: Tensor | None, unreduced: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return latent vectors, the loss of the bottleneck, and that of experts in the encoder."""
        features, aux = run_with_aux_loss(self.encoder, seq, lens=lens)
        latents, loss = self.bottleneck(features, return_unreduced_loss=unreduced)
        return latents, loss, aux

    @checked
    def forward(
        self,
        seq: Tensor,
        lens: Tensor | None = None,
        return_all_losses: bool = False,
        return_unreduced_loss: bool = False,
    ) -> Any:
        """Return the error of the reconstruction, plus the loss of the bottleneck.

        Args:
            seq: `(b, n, dim_input)`.
            lens: `(b,)` number of valid vectors of each row, from the left; default all.
            return_all_losses: also return the two of which the loss is the sum; that of the bottleneck is 0 if it has
                none.
            return_unreduced_loss: return the losses of each row, `(b,)`; a row without a valid vector has the error 0.

        Returns:
            The loss, a scalar or `(b,)`, or a pair `(loss, (error, loss of the bottleneck))`.

        Raises:
            InputError: with what was given and what is needed.
        """
        if seq.ndim == 3 and seq.shape[1] == 0:
            raise ShapeError(f"`seq` has shape {tuple(seq.shape)}; reconstruction needs at least one vector.")
        latents, aux_loss, of_encoder = self._encode(seq, lens, return_unreduced_loss)
        valid = None if lens is None else torch.arange(seq.shape[1], device=seq.device) < lens.unsqueeze(-1)
        predicted, of_decoder = self._decode(latents, seq[:, :-1], None if valid is None else valid[:, :-1])
        errors = LOSSES[self.loss_type](at_least_float32(predicted), at_least_float32(seq), reduction="none").mean(-1)
        if return_unreduced_loss:
            error = masked_mean(errors, valid)
        else:
            error = masked_mean(errors.flatten(), None if valid is None else valid.flatten(), dim=0)
        aux_loss = torch.zeros_like(error) if aux_loss is None else aux_loss
        total = plus_aux_loss(error + aux_loss, of_encoder, of_decoder)
        return (total, (error, aux_loss)) if return_all_losses else total

    def _decode(self, latents: Tensor, seq: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return predictions `(b, 1 + n, dim_input)` of the vectors after the latent vector and after each of `seq`,
        and the loss of experts.

        Rows whose latent vector is dropped see neither its slot nor what is embedded there.
        """
        slot = self.from_latent_to_prepend_token(latents).unsqueeze(1)
        seen = None
        if self.training and self.latents_dropout_prob > 0:
            seen = F.dropout(latents.new_ones(len(latents), 1), self.latents_dropout_prob) != 0
            slot = slot.masked_fill(~seen.unsqueeze(-1), 0.0)
        return run_with_aux_loss(self.decoder, seq, mask=mask, prepend_embeds=slot, prepend_mask=seen)


def _bottleneck(
    given: nn.Module | None,
    kind: str,
    of_each_type: Mapping[str, Mapping[str, Any] | None],
    dim: int,
    dim_latent: int,
) -> nn.Module:
    """Return the bottleneck, and refuse keywords of another one."""
    if kind not in BOTTLENECKS:
        raise ConfigError(f"`bottleneck_type` is {kind!r}; it must be {' or '.join(map(repr, BOTTLENECKS))}.")
    for name, more in of_each_type.items():
        if more and (given is not None or name != kind):
            other = "a `bottleneck` is given" if given is not None else f"`bottleneck_type` is {kind!r}"
            raise ConfigError(f"`{name}_bottleneck_kwargs` are for a bottleneck that is not built: {other}.")
    if given is not None:
        return given
    return BOTTLENECKS[kind](dim, dim_latent, **(of_each_type[kind] or {}))
