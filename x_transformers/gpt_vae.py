"""A decoder whose texts begin from a latent vector, which an encoder draws from the text (1312.6114, 2304.13705)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_ids, as_prompts
from x_transformers.forward_pass.names import passes_on
from x_transformers.layers.named_stacks import Decoder, Encoder
from x_transformers.losses import normal_divergence, plus_aux_loss, run_with_aux_loss
from x_transformers.models.embeddings import checked_ids
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.inference import InferenceView
from x_transformers.options.schema import at_least
from x_transformers.options.stack_groups import refuse_in_groups

__getattr__ = names_of(__name__)

RESERVED: dict[str, str] = dict.fromkeys(("dim", "depth"), "set `dim` for both stacks, and `depth` and `enc_depth`")


class GPTVAE(SavesFolders):
    """Next-token model whose rows are conditioned on a latent vector each: `(b, n)` ids to a loss.

    The features of an encoder, averaged over the tokens of a row, give the mean `mu` and the logarithm `v` of the
    variance of its latent vector `z = mu + exp(v / 2) * eps`, `eps ~ N(0, 1)`. A linear map of z is embedded before
    the tokens of a causal decoder. The loss is that of the next tokens plus the weighted divergence

        mean over rows of sum over dimensions of max((exp(v) + mu^2 - v - 1) / 2 - floor, 0)

    In training the latent vector is hidden from some of the rows, so that texts can be generated without one.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of both stacks.
        depth, enc_depth: number of blocks of the decoder and of the encoder.
        max_seq_len: length of the tables of absolute positions.
        dim_latent: width of z; default `dim`.
        attn_dim_head, heads: of both stacks.
        enc_kwargs, dec_kwargs: further keywords of the `Encoder` and of the `Decoder`.
        vae_kl_loss_weight: weight of the divergence.
        vae_kl_div_floor: divergence of each dimension that costs nothing.
        latents_dropout_prob: probability in training that a row does not see its latent vector.
        pad_id: id of padding, which is not encoded and not predicted; any number, also one of no token.
        encoder: a module to use instead, `(ids, mask = mask)` to features `(b, dim)`.
        kwargs: further keywords of both stacks.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        enc_depth: int,
        max_seq_len: int,
        dim_latent: int | None = None,
        attn_dim_head: int = 64,
        heads: int = 8,
        enc_kwargs: Mapping[str, Any] | None = None,
        dec_kwargs: Mapping[str, Any] | None = None,
        vae_kl_loss_weight: float = 1.0,
        vae_kl_div_floor: float = 0.0,
        latents_dropout_prob: float = 0.5,
        pad_id: int = -1,
        encoder: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        at_least(1, num_tokens=num_tokens, dim=dim, dim_latent=dim_latent)
        if vae_kl_div_floor < 0:
            raise ConfigError(
                f"`vae_kl_div_floor` is {vae_kl_div_floor}; a divergence is 0 or more, and so is its floor."
            )
        if not 0 <= latents_dropout_prob <= 1:
            raise ConfigError(f"`latents_dropout_prob` is {latents_dropout_prob}; it must lie in [0, 1].")
        if encoder is not None and enc_kwargs:
            raise ConfigError("`enc_kwargs` are for an encoder that is not built, since one is given; drop them.")
        dim_latent = dim if dim_latent is None else dim_latent
        refuse_in_groups(RESERVED, {"enc_kwargs": enc_kwargs, "dec_kwargs": dec_kwargs, "kwargs": kwargs})
        both = {"dim": dim, "attn_dim_head": attn_dim_head, "heads": heads, **kwargs}
        self.vae_kl_loss_weight, self.vae_kl_div_floor = vae_kl_loss_weight, vae_kl_div_floor
        self.latents_dropout_prob, self.pad_id, self.dim_latent = latents_dropout_prob, pad_id, dim_latent
        if encoder is None:
            encoder = TransformerWrapper(
                num_tokens=num_tokens,
                max_seq_len=max_seq_len + 1,
                return_only_embed=True,
                average_pool_embed=True,
                attn_layers=Encoder(**{**both, "depth": enc_depth, **(enc_kwargs or {})}),
            )
        self.encoder = encoder
        self.to_latent_mean_log_variance = nn.Sequential(nn.Linear(dim, dim_latent * 2))
        self.from_latent_to_prepend_token = nn.Sequential(nn.Linear(dim_latent, dim))
        self.decoder = TransformerWrapper(
            num_tokens=num_tokens,
            max_seq_len=max_seq_len,
            attn_layers=Decoder(**{**both, "depth": depth, **(dec_kwargs or {})}),
        )
        self.ar_wrapped_decoder = AutoregressiveWrapper(self.decoder, ignore_index=pad_id)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.from_latent_to_prepend_token.parameters()).device

    @checked
    def encode_to_latents(self, seq: Ids, return_mean_log_var: bool = False) -> Any:
        """Draw the latent vector of each row.

        Args:
            seq: `(b, n)` ids, `pad_id` where there is none.
            return_mean_log_var: also return `(mu, v)`.

        Returns:
            z, `(b, dim_latent)`; or a pair of it and of `(mu, v)`, `(b, dim_latent)` each.

        Raises:
            InputError: with what was given and what is needed.
        """
        latents, parameters, _ = self._encode(seq)
        return (latents, parameters) if return_mean_log_var else latents

    def _encode(self, seq: Ids) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Return latent vectors, mean and logarithm of the variance, and the auxiliary loss, if there is one."""
        seq = checked_ids(seq, self)
        valid = seq != self.pad_id
        features, aux = run_with_aux_loss(self.encoder, seq.masked_fill(~valid, 0), mask=valid)
        mean, log_variance = self.to_latent_mean_log_variance(features).chunk(2, dim=-1)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return latents, (mean, log_variance), aux

    @checked
    def forward(self, seq: Ids, seq_for_latents: Ids | None = None, return_all_losses: bool = False) -> Any:
        """Return the loss of the next tokens plus the weighted divergence of the latent vectors.

        Args:
            seq: `(b, n)` ids, `pad_id` where there is none.
            seq_for_latents: `(b, m)` ids that the latent vectors are drawn from; default `seq`.
            return_all_losses: also return the two losses.

        Returns:
            A scalar, or `(scalar, (loss of the next tokens, divergence))`.

        Raises:
            InputError: with what was given and what is needed.
        """
        seq = checked_ids(seq, self)
        source = seq if seq_for_latents is None else seq_for_latents
        latents, (mean, log_variance), aux = self._encode(source)
        if len(latents) != len(seq):
            raise ShapeError(f"`seq_for_latents` has {len(latents)} rows and `seq` {len(seq)}; they must be equal.")
        # a row whose slot is hidden has the positions, and the loss, of a row without one
        seen = None
        if self.training and self.latents_dropout_prob > 0:
            seen = F.dropout(latents.new_ones(len(latents), 1), self.latents_dropout_prob) != 0
        slot = self.from_latent_to_prepend_token(latents).unsqueeze(1)
        loss = self.ar_wrapped_decoder(seq, prepend_embeds=slot, prepend_mask=seen)
        divergence = normal_divergence(mean, log_variance, self.vae_kl_div_floor).mean()
        total = plus_aux_loss(loss + divergence * self.vae_kl_loss_weight, aux)
        return (total, (loss, divergence)) if return_all_losses else total

    @torch.no_grad()
    @checked
    @passes_on("ar_wrapped_decoder.generate")
    def generate(
        self,
        prompts: Ids | Sequence[Ids],
        seq_len: int,
        latents: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
        seq_for_latents: Ids | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Continue prompts, from latent vectors if there are any, in evaluation mode.

        Args:
            prompts: `(..., n)` ids, or a list of `(n,)` ids of different lengths.
            seq_len: number of tokens to generate.
            latents: `(dim_latent,)` for all rows, or `(b, dim_latent)`; default none: the rows do not see a latent
                vector.
            seq_for_latents: `(m,)` or `(b, m)` ids that latent vectors are drawn from, instead of giving them.
            generate_kwargs: of `AutoregressiveWrapper.generate`.

        Returns:
            The new tokens, `(..., m)`, m at most `seq_len`; see `AutoregressiveWrapper.generate`.

        Raises:
            InputError: with what was given and what is needed.
        """
        if latents is not None and seq_for_latents is not None:
            raise InputError("`latents` and `seq_for_latents` both say what to begin from; give only one of them.")
        if seq_for_latents is not None:
            latents = self._drawn(seq_for_latents)
        if latents is not None:
            if "prepend_embeds" in generate_kwargs:
                raise InputError("`prepend_embeds` is where the latent vector goes; drop it, or the latent vector.")
            prompts = as_prompts(prompts, self, "`prompts`")
            rows = prompts.shape[:-1].numel() if isinstance(prompts, Tensor) else len(prompts)
            generate_kwargs["prepend_embeds"] = self._slot(latents, rows)
        return self.ar_wrapped_decoder.generate(prompts, seq_len, **generate_kwargs)

    def _drawn(self, seq: Ids) -> Tensor:
        """Return latent vectors of `(m,)` or `(b, m)` ids, drawn in evaluation mode."""
        seq = as_ids(seq, self, "`seq_for_latents`")
        view = InferenceView(self)
        own = view.of(self)
        with view:
            return own.encode_to_latents(seq.unsqueeze(0) if seq.ndim == 1 else seq)

    def _slot(self, latents: Any, rows: int) -> Tensor:
        """Return `(rows, 1, dim)` the embeddings of latent vectors."""
        weight = next(self.from_latent_to_prepend_token.parameters())
        latents = torch.as_tensor(latents, device=weight.device).to(weight.dtype)
        if latents.shape not in ((self.dim_latent,), (1, self.dim_latent), (rows, self.dim_latent)):
            raise ShapeError(
                f"`latents` has shape {tuple(latents.shape)}; it must be ({self.dim_latent},), or "
                f"({rows}, {self.dim_latent}) for this number of prompts."
            )
        return self.from_latent_to_prepend_token(latents.expand(rows, -1)).unsqueeze(1)
