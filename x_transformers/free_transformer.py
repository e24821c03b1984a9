"""A decoder whose upper half is conditioned on bits that an encoder draws from the text (2510.17558)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.decoding.filters import top_p
from x_transformers.decoding.generation_inputs import check_length_and_end
from x_transformers.decoding.loop import Decoding
from x_transformers.decoding.options import GenerationOptions
from x_transformers.decoding.prompts import Prompts, read_prompts
from x_transformers.decoding.step import ONLY_CACHE, Reader, Sequences
from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids, as_prompts
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.named_stacks import Decoder, Encoder
from x_transformers.losses import mean_aux_loss, mean_over, plus_aux_loss, run_with_aux_loss, token_losses
from x_transformers.models.embeddings import checked_ids, out_of_range
from x_transformers.models.heads import LinearNoBias
from x_transformers.models.next_item import check_predicts
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.inference import InferenceView
from x_transformers.notices import warn
from x_transformers.ops import at_least_float32
from x_transformers.options.configured import Configured
from x_transformers.options.schema import at_least
from x_transformers.options.stack_groups import refuse_in_groups
from x_transformers.options.values import shown

__getattr__ = names_of(__name__)

NAT = math.log(2)
"""Entropy of one fair bit."""

RESERVED = {
    "dim": "set `dim` for all stacks",
    "depth": "set `enc_depth`, `dec_head_depth` and `dec_tail_depth`",
    **dict.fromkeys(("rotary_pos_emb", "use_rmsnorm", "pre_norm_has_final_norm"), "it is fixed in this model"),
    **dict.fromkeys(("cross_attend", "only_cross"), "the encoder only cross-attends, and the others do not"),
}


class BinaryMapper(Configured, KeepsFloat32):
    """Logits of bits to a one-hot code, drawn bit by bit.

    With `p_i = sigmoid(a_i / temperature)` bit i is 1 with probability `p_i`, and the code has the index
    `sum_i bit_i 2^i`. The auxiliary loss keeps the bits random:

        mean of max(bits ln 2 - H(a) - threshold, 0),    H the sum of the entropies of the bits

    Args:
        bits: number of bits; there are `2^bits` codes.
        kl_loss_threshold: information of all bits, in nats, that costs nothing.

    Raises:
        ConfigError: if there is no bit, or the threshold is negative.
    """

    power_two: Tensor
    codes: Tensor

    def __init__(self, bits: int = 1, kl_loss_threshold: float = NAT) -> None:
        super().__init__()
        if bits < 1 or kl_loss_threshold < 0:
            raise ConfigError(
                f"`bits` is {bits} and `kl_loss_threshold` {kl_loss_threshold}; they must be at least 1 and 0."
            )
        self.bits, self.num_codes, self.kl_loss_threshold = bits, 2**bits, kl_loss_threshold
        self.register_derived()

    def derived_buffers(self) -> dict[str, Tensor]:
        powers = 2 ** torch.arange(self.bits)
        return {"power_two": powers, "codes": torch.arange(self.num_codes).unsqueeze(-1).bitwise_and(powers) != 0}

    @checked
    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw a code for each position.

        Args:
            logits: `(..., bits)`.
            temperature: divides the logits in the draw.
            straight_through: let the gradient of the code be that of the probabilities of all codes; default in
                training.
            calc_aux_loss: compute the auxiliary loss; default in training.

        Returns:
            One-hot codes `(..., 2^bits)`, and the loss, a scalar that is 0 if it is not computed.

        Raises:
            InputError: if the logits are of another number of bits, or the temperature is not positive.
        """
        if logits.shape[-1] != self.bits:
            raise ShapeError(f"`logits` has shape {tuple(logits.shape)}; its last axis must be {self.bits}, the bits.")
        if temperature <= 0:
            raise InputError(f"`temperature` is {temperature}; it divides the logits and must be positive.")
        straight_through = self.training if straight_through is None else straight_through
        calc_aux_loss = self.training if calc_aux_loss is None else calc_aux_loss
        drawn = torch.rand_like(logits) <= (logits / temperature).sigmoid()
        one_hot = F.one_hot((drawn * self.power_two).sum(dim=-1), self.num_codes).to(logits.dtype)
        loss = self._excess(logits) if calc_aux_loss else logits.new_zeros(())
        if straight_through:
            soft = self._probabilities(logits)
            one_hot = one_hot + soft - soft.detach()
        return one_hot, loss

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each code, `(..., 2^bits)`."""
        ones, zeros = F.logsigmoid(logits), F.logsigmoid(-logits)
        each = zeros.sum(dim=-1, keepdim=True) + F.linear(ones - zeros, self.codes.to(logits.dtype))
        return each.exp()

    def _excess(self, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").sum(dim=-1)
        excess = (self.bits * NAT - entropy - self.kl_loss_threshold).relu()
        return mean_over(excess, torch.ones_like(excess, dtype=torch.bool))


class FreeTransformer(SavesFolders):
    """Next-token model that decides about a text before it writes it: `(b, n)` ids to a loss.

    The lower half of a causal decoder reads the tokens. An encoder, which sees all of them, attends to its output with
    a learned query, and its own output gives the logits of bits, from which codes are drawn. The first layer of the
    upper half adds a linear map of the codes to what its keys and values are computed from. The loss is that of the
    next tokens plus the weighted information of the codes.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of all stacks.
        dec_head_depth: number of blocks below the codes; 0 for none.
        dec_tail_depth: number of blocks above them, at least 1.
        max_seq_len: not used; positions are rotary.
        enc_depth: number of blocks of the encoder.
        dim_latent: not used; a code has a vector of width `dim`.
        attn_dim_head, heads: of all stacks.
        latent_bits: number of bits of a code.
        per_token_latents: draw a code for each token; default one for each row if it comes from another text.
        kl_loss_threshold: information of a code, in nats, that costs nothing.
        binary_mapper_kwargs: further keywords of `BinaryMapper`.
        enc_kwargs: further keywords of the encoder.
        dec_kwargs: further keywords of both halves of the decoder.
        kl_loss_weight: weight of the information.
        latent_dropout_prob: dropout of codes.
        pad_id: id of padding on the right, which is not encoded and not predicted; any number, also one of no token.
        kwargs: further keywords of all stacks.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        dec_head_depth: int,
        dec_tail_depth: int,
        max_seq_len: int,
        enc_depth: int = 1,
        dim_latent: int | None = None,
        attn_dim_head: int = 64,
        heads: int = 8,
        latent_bits: int = 16,
        per_token_latents: bool = True,
        kl_loss_threshold: float = NAT,
        binary_mapper_kwargs: Mapping[str, Any] | None = None,
        enc_kwargs: Mapping[str, Any] | None = None,
        dec_kwargs: Mapping[str, Any] | None = None,
        kl_loss_weight: float = 1.0,
        latent_dropout_prob: float = 0.0,
        pad_id: int = -1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        at_least(1, num_tokens=num_tokens, dim=dim, dim_latent=dim_latent)
        if dim_latent is not None:
            warn("FreeTransformer: `dim_latent` has no effect, since a code has a vector of width `dim`; drop it.")
        if dec_head_depth < 0 or dec_tail_depth < 1:
            raise ConfigError(
                f"`dec_head_depth` is {dec_head_depth} and `dec_tail_depth` {dec_tail_depth}; they must be at least 0 "
                "and 1, since the codes enter the tail."
            )
        if not 0 <= latent_dropout_prob < 1:
            raise ConfigError(f"`latent_dropout_prob` is {latent_dropout_prob}; it must lie in [0, 1).")
        refuse_in_groups(RESERVED, {"enc_kwargs": enc_kwargs, "dec_kwargs": dec_kwargs, "kwargs": kwargs})
        stack = {"dim": dim, "attn_dim_head": attn_dim_head, "heads": heads, "rotary_pos_emb": True}
        every = {**stack, "use_rmsnorm": True, **kwargs}
        halves = {**every, **(dec_kwargs or {})}
        self.num_tokens, self.pad_id, self.kl_loss_weight = num_tokens, pad_id, kl_loss_weight
        self.per_token_latents, self.latent_dropout_prob = per_token_latents, latent_dropout_prob
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.token_unembed = LinearNoBias(dim, num_tokens)
        self.query_token_for_latents = nn.Parameter(torch.randn(dim) * 1e-2)
        self.encoder = Encoder(
            depth=enc_depth,
            only_cross=True,
            cross_attend=True,
            pre_norm_has_final_norm=True,
            **{**every, **(enc_kwargs or {})},
        )
        self.binary_mapper = BinaryMapper(latent_bits, kl_loss_threshold, **(binary_mapper_kwargs or {}))
        self.to_latent_bit_logits = LinearNoBias(dim, latent_bits)
        self.from_latent_to_condition = LinearNoBias(self.binary_mapper.num_codes, dim)
        self.decoder_head = (
            Decoder(depth=dec_head_depth, pre_norm_has_final_norm=False, **halves) if dec_head_depth > 0 else None
        )
        self.decoder_tail = Decoder(depth=dec_tail_depth, pre_norm_has_final_norm=True, **halves)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.token_emb.weight.device

    def encode_to_latents(
        self,
        decoder_head_embeds: Tensor,
        mask: Tensor | None = None,
        return_kl_loss: bool = False,
        per_token_latents: bool | None = None,
    ) -> Any:
        """Draw codes for what the lower half of the decoder returned.

        Args:
            decoder_head_embeds: `(b, n, dim)`.
            mask: `(b, n)` bool, valid tokens.
            return_kl_loss: also return the information of the codes beyond the threshold.
            per_token_latents: a code for each token instead of one for each row; default that of the constructor.

        Returns:
            One-hot codes, `(b, n, codes)` or `(b, 1, codes)`; or a pair of them and the loss, a scalar.
        """
        latents, loss, _ = self._encode(decoder_head_embeds, mask, return_kl_loss, per_token_latents)
        return (latents, loss) if return_kl_loss else latents

    def _encode(
        self, decoder_head_embeds: Tensor, mask: Tensor | None, information: bool, per_token_latents: bool | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes, their information if it is requested, and the auxiliary loss, if there is one."""
        each = self.per_token_latents if per_token_latents is None else per_token_latents
        batch, n, _ = decoder_head_embeds.shape
        queries = self.query_token_for_latents.expand(batch, n if each else 1, -1)
        pos: Any = {}
        if each:
            places = torch.arange(n, device=decoder_head_embeds.device)
            pos = {"pos": places, "context_pos": places}
        given = {"context": decoder_head_embeds, "context_mask": mask, **pos}
        features, aux = run_with_aux_loss(self.encoder, queries, **given)
        latents, loss = self.binary_mapper(self.to_latent_bit_logits(features), calc_aux_loss=information)
        return latents, loss, aux

    @checked
    def forward(self, seq: Ids, seq_for_latents: Ids | None = None, return_all_losses: bool = False) -> Any:
        """Return the loss of the next tokens plus the weighted information of the codes.

        Args:
            seq: `(b, n)` ids, `pad_id` where there is none.
            seq_for_latents: `(b, m)` ids that one code for each row is drawn from; default the codes are those of
                `seq`, one for each token with `per_token_latents`.
            return_all_losses: also return the two losses.

        Returns:
            A scalar, or `(scalar, (loss of the next tokens, information))`.

        Raises:
            InputError: with what was given and what is needed.
        """
        seq = checked_ids(seq, self)
        check_predicts(seq)
        tokens, labels = seq[:, :-1], seq[:, 1:]
        (embeds, of_head), valid = self._read(tokens), tokens != self.pad_id
        source, mask, each = embeds, valid, self.per_token_latents
        if seq_for_latents is not None:
            other = checked_ids(seq_for_latents, self)
            if len(other) != len(seq):
                raise ShapeError(f"`seq_for_latents` has {len(other)} rows and `seq` {len(seq)}; they must be equal.")
            (source, of_other), mask, each = self._read(other), other != self.pad_id, False
            of_head = mean_aux_loss([of_head, of_other])
        latents, information, of_encoder = self._encode(source, mask, True, each)
        latents = F.dropout(latents, self.latent_dropout_prob, self.training)
        condition = self.from_latent_to_condition(latents).expand(-1, embeds.shape[1], -1)
        features, of_tail = run_with_aux_loss(self.decoder_tail, embeds, self_attn_kv_residuals=condition)
        logits = self.token_unembed(features)
        # labels in 64 bits, which hold any `pad_id`
        losses = token_losses(logits, labels.long(), ignore_index=self.pad_id)
        loss = mean_over(losses, labels != self.pad_id)
        total = plus_aux_loss(loss + information * self.kl_loss_weight, of_head, of_encoder, of_tail)
        return (total, (loss, information)) if return_all_losses else total

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the lower half of the decoder makes of ids, `(b, n, dim)`, and its auxiliary loss."""
        ids = ids.masked_fill(ids == self.pad_id, 0).long()
        try:
            embeds = self.token_emb(ids)
        except IndexError as error:
            raise out_of_range(ids, self.num_tokens) from error
        return (embeds, None) if self.decoder_head is None else run_with_aux_loss(self.decoder_head, embeds)

    @checked
    def generate(
        self,
        prompts: Ids | Sequence[Ids],
        seq_len: int,
        latents: Tensor | int | Sequence[int] | None = None,
        filter_logits_fn: str | Callable[..., Tensor] = top_p,
        logit_filter_kwargs: Mapping[str, Any] | None = None,
        use_kv_cache: bool = True,
        *,
        temperature: float = 1.0,
        eos_token: int | None = None,
    ) -> Tensor:
        """Continue prompts to `seq_len` tokens, in evaluation mode.

        Args:
            prompts: `(..., n)` ids, or a list of `(n,)` ids of different lengths.
            seq_len: number of tokens of the result, prompts included.
            latents: index of a code, a list of one for each row, or codes `(codes,)` or `(b, codes)`; default none, so
                that the tail is not conditioned.
            filter_logits_fn: "top_p", "top_k", "top_a", "min_p", or a function of logits `(b, v)`.
            logit_filter_kwargs: its keywords.
            use_kv_cache: keep keys and values. False runs the whole sequence at each step.
            temperature: 0 takes the most likely token; otherwise logits are divided by it before the draw.
            eos_token: ends a row; after it come `pad_id`s, or 0 if that is no token.

        Returns:
            `(..., seq_len)` ids, prompts included; those of different lengths have their padding on the left.

        Raises:
            InputError: with what was given and what is needed.
        """
        options = GenerationOptions(
            temperature=temperature, filter_logits_fn=filter_logits_fn, filter_kwargs=logit_filter_kwargs
        )
        check_length_and_end(seq_len, eos_token, self.num_tokens)
        pad = self.pad_id if 0 <= self.pad_id < self.num_tokens else 0
        read = read_prompts(as_prompts(prompts, self, "`prompts`"), None, pad, self.num_tokens)
        length = read.tokens.shape[1]
        if seq_len < length:
            raise InputError(f"`seq_len` is {seq_len}, prompts included; the longest prompt has {length} tokens.")
        view = InferenceView(self)
        with torch.inference_mode(), view:
            own = view.of(self)
            condition = None if latents is None else own.from_latent_to_condition(self._codes(latents, read))
            reader = _Halves(own, condition, cached=use_kv_cache)
            decoding = Decoding(Sequences(read.tokens, read.start), reader, options.choose, self.num_tokens)
            new = list(decoding.run(seq_len - length, eos_token, pad))
        # outside of inference mode: tokens that training may use
        tokens = torch.cat([read.tokens, *new], dim=-1)
        return F.pad(tokens, (0, seq_len - tokens.shape[1]), value=pad).reshape(*read.lead, seq_len)

    def _codes(self, latents: Any, read: Prompts) -> Tensor:
        """Return `(1|b, 1, codes)` what the caller gave as codes."""
        weight, rows, count = self.from_latent_to_condition.weight, len(read.tokens), self.binary_mapper.num_codes
        try:
            given = torch.as_tensor(latents, device=weight.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"`latents` is {shown(latents)}; it must be an index of a code, or codes.") from error
        if given.is_complex():
            raise InputError(f"`latents` has dtype {given.dtype}; it must hold indices of codes, or codes.")
        if given.ndim < 2 and not given.is_floating_point() and given.shape in ((), (1,), (rows,)):
            if bool(((given < 0) | (given >= count)).any()):
                raise TokenRangeError(f"`latents` is {given.tolist()}; codes have the indices 0 to {count - 1}.")
            given = F.one_hot(given.reshape(-1).long(), count)
        if given.shape not in ((count,), (1, count), (rows, count)):
            raise ShapeError(
                f"`latents` has shape {tuple(given.shape)}; it must be an index, {rows} of them, or codes of shape "
                f"({count},) or ({rows}, {count})."
            )
        return given.reshape(-1, 1, count).to(weight.dtype)


class _Halves(Reader):
    """Reads tokens through both halves of the decoder, which have a cache each.

    Args:
        model: in evaluation mode.
        condition: `(1|b, 1, dim)` what the codes add, or None.
        cached: keep keys and values.
    """

    record = None

    def __init__(self, model: FreeTransformer, condition: Tensor | None, *, cached: bool) -> None:
        self.model, self.condition, self.cached, self.length = model, condition, cached, 0
        self.caches = [KVCache(), KVCache()]

    def read(self, sequences: Sequences) -> Tensor:
        new = sequences.length - self.length
        if self.cached:
            self.length = sequences.length
        x = self.model.token_emb(sequences.newest(new))
        added = {}
        if self.condition is not None:
            added["self_attn_kv_residuals"] = self.condition.expand(len(x), new, -1)
        if self.model.decoder_head is not None:
            x = self._run(0, self.model.decoder_head, x, sequences.start)
        x = self._run(1, self.model.decoder_tail, x, sequences.start, **added)
        return self.model.token_unembed(x[:, -1:])

    def _run(self, half: int, stack: AttentionLayers, x: Tensor, start: Tensor | None, **added: Any) -> Any:
        if not self.cached:
            return stack(x, seq_start_pos=start, **added)
        given: Any = {"cache": self.caches[half], "input_not_include_cache": True, "capture": ONLY_CACHE}
        x, record = stack(x, seq_start_pos=start, return_hiddens=True, **given, **added)
        self.caches[half] = record.cache
        return x
