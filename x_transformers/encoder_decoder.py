"""Encoder and decoder (1706.03762), trained to predict the next token of the decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.errors import ConfigError, UnknownKeywordError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.names import passes_on
from x_transformers.layers.branches.dropout import drop_context
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.named_stacks import Decoder, Encoder
from x_transformers.losses import plus_aux_loss, run_with_aux_loss
from x_transformers.models.embeddings import SharedTokenEmbedding, TokenEmbedding
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.inference import InferenceView
from x_transformers.ops import pad_left
from x_transformers.options.suggestions import suggestion

OF_THE_WRAPPER = frozenset(inspect.signature(TransformerWrapper).parameters) - {"attn_layers", "return_only_embed"}
"""Options with the prefixes `enc_` and `dec_` that go to the wrapper; all others go to the stack."""


REFERENCE_MIX = "hyper_conn_reference_mix"
"""Option of a stack that loading weights may set."""


class XTransformer(SavesFolders):
    """Encoder and decoder: source tokens to the loss of target tokens.

    Args:
        dim: width of both stacks.
        tie_token_emb: the decoder uses the token embedding of the encoder.
        ignore_index, pad_value: of the `AutoregressiveWrapper` around the decoder.
        cross_attn_tokens_dropout: fraction of the source's features that the decoder does not see in training
            (2202.07765), drawn once for all of its layers.
        kwargs: options of the encoder with the prefix `enc_`, and of the decoder with `dec_`: those of
            `TransformerWrapper`, of which `num_tokens` and `max_seq_len` are required, and of `Encoder` and `Decoder`.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        dim: int,
        tie_token_emb: bool = False,
        ignore_index: int = -100,
        pad_value: int = 0,
        cross_attn_tokens_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not 0 <= cross_attn_tokens_dropout < 1:
            raise ConfigError(f"`cross_attn_tokens_dropout` is {cross_attn_tokens_dropout}; it must lie in [0, 1).")
        (enc, enc_stack), (dec, dec_stack) = _split_options(kwargs)
        self.encoder = TransformerWrapper(**enc, return_only_embed=True, attn_layers=Encoder(dim=dim, **enc_stack))
        if self.encoder.pools or self.encoder.attn_pool is not None:
            raise ConfigError(
                "the decoder attends to the features of every source token; drop the encoder's `average_pool_embed`, "
                "`use_cls_token` and `attn_pool`."
            )
        if tie_token_emb:
            dec["token_emb"] = _shared(self.encoder, dim, dec)
        net = TransformerWrapper(**dec, attn_layers=Decoder(dim=dim, cross_attend=True, **dec_stack))
        self.decoder = AutoregressiveWrapper(net, ignore_index=ignore_index, pad_value=pad_value)
        self.cross_attn_tokens_dropout = cross_attn_tokens_dropout

    @checked
    @passes_on("decoder", but=("context", "context_mask"))
    def forward(
        self,
        src: Ids,
        tgt: Ids,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        src_prepend_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the mean over all valid targets of `-log p(tgt[t + 1] | tgt[..t], src)`.

        Args:
            src: `(b, n)` ids of the source.
            tgt: `(b, m)` ids, the first of which is a start token.
            mask: `(b, n)` bool, valid tokens of the source.
            attn_mask: of the encoder's self-attention, see `TransformerWrapper.forward`.
            src_prepend_embeds: `(b, p, D)` embeddings before the source, of an image for example (2209.06794).
            kwargs: of the decoder's loss, see `AutoregressiveWrapper.forward`.

        Returns:
            A scalar, or what else `kwargs` request.

        Raises:
            InputError: with what was given and what is needed.
        """
        context, mask, aux = _encode(self.encoder, src, mask, attn_mask, src_prepend_embeds)
        if self.training and self.cross_attn_tokens_dropout > 0:
            context, mask, _ = drop_context(context, mask, self.cross_attn_tokens_dropout)
        return plus_aux_loss(self.decoder(tgt, context=context, context_mask=mask, **kwargs), aux)

    @checked
    @passes_on("decoder.generate", but=("context", "context_mask"))
    def generate(
        self,
        seq_in: Ids,
        seq_out_start: Ids,
        seq_len: int,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        src_prepend_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue each start by at most `seq_len` tokens, in evaluation mode.

        Args:
            seq_in: `(b, n)` ids of the source.
            seq_out_start: `(b, m)` ids, or a list of `(m,)` ids of different lengths.
            seq_len: number of tokens to generate.
            mask, attn_mask, src_prepend_embeds: of the source, as in `forward`.
            kwargs: of `AutoregressiveWrapper.generate`.

        Returns:
            What `AutoregressiveWrapper.generate` returns: the new tokens, `(b, at most seq_len)`.

        Raises:
            InputError: with what was given and what is needed.
        """
        view = InferenceView(self.encoder)
        with torch.no_grad(), view:
            context, mask, _ = _encode(view.of(self.encoder), seq_in, mask, attn_mask, src_prepend_embeds)
        return self.decoder.generate(seq_out_start, seq_len, context=context, context_mask=mask, **kwargs)

    @checked
    @passes_on("decoder.stream", but=("context", "context_mask"))
    def stream(
        self,
        seq_in: Ids,
        seq_out_start: Ids,
        seq_len: int,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        src_prepend_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield the tokens of `generate`, `(b,)` each; the decoder is in evaluation mode until the last one.

        Args:
            seq_in, seq_out_start, seq_len, mask, attn_mask, src_prepend_embeds: as in `generate`.
            kwargs: of `AutoregressiveWrapper.stream`.

        Raises:
            InputError: immediately, with what was given and what is needed.
        """
        view = InferenceView(self.encoder)
        with torch.no_grad(), view:
            context, mask, _ = _encode(view.of(self.encoder), seq_in, mask, attn_mask, src_prepend_embeds)
        return self.decoder.stream(seq_out_start, seq_len, context=context, context_mask=mask, **kwargs)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor as plain data, with what loaded weights have changed; see `Configured`."""
        config = super().config
        for half, stack in self._stacks.items():
            if stack.reference_mix:
                config["options"][f"{half}_{REFERENCE_MIX}"] = True
        return config

    def adopt_config(self, config: Mapping[str, Any]) -> list[Callable[[], None]]:
        given = config["options"]
        halves = {half: {REFERENCE_MIX: given.get(f"{half}_{REFERENCE_MIX}", False)} for half in self._stacks}
        return [undo for half, stack in self._stacks.items() for undo in stack.adopt_config({"options": halves[half]})]

    @property
    def _stacks(self) -> dict[str, AttentionLayers]:
        return {"enc": self.encoder.attn_layers, "dec": self.decoder.net.attn_layers}

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        if not isinstance(self.decoder.net.token_emb, SharedTokenEmbedding):
            return
        # Files of the reference contain a tied table twice. Two tables that differ were not tied, and do not fit.
        own, second = (f"{prefix}{part}.token_emb.emb.weight" for part in ("encoder", "decoder.net"))
        if own in state and second in state and torch.equal(state[own], state[second]):
            del state[second]

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        if isinstance(self.decoder.net.token_emb, SharedTokenEmbedding):
            state[f"{prefix}decoder.net.token_emb.emb.weight"] = state[f"{prefix}encoder.token_emb.emb.weight"]


def _encode(
    encoder: TransformerWrapper,
    src: Ids,
    mask: Tensor | None,
    attn_mask: Tensor | None,
    prepend_embeds: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return features of prepended embeddings and source, their mask, and the auxiliary loss, if there is one."""
    given = {"mask": mask, "attn_mask": attn_mask, "prepend_embeds": prepend_embeds, "return_embeddings": True}
    features, aux = run_with_aux_loss(encoder, src, **given)
    if mask is not None:
        mask = pad_left(mask.bool(), 0 if prepend_embeds is None else prepend_embeds.shape[1], True)
    return features, mask, aux


def _split_options(given: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return for encoder and decoder the options of the wrapper and those of the stack.

    Raises:
        ConfigError: if an option has no prefix, is missing, or cannot be chosen.
    """
    stray = [name for name in given if not name.startswith(("enc_", "dec_"))]
    known = ("dim", "tie_token_emb", "ignore_index", "pad_value", "cross_attn_tokens_dropout")
    if stray:
        clauses = " ".join(f"unknown keyword `{name}`.{suggestion(name, known)}" for name in stray)
        raise UnknownKeywordError(f"XTransformer: {clauses} Options of its halves begin with `enc_` or `dec_`.")
    missing = [f"{half}_{name}" for half in ("enc", "dec") for name in ("num_tokens", "max_seq_len")]
    missing = [name for name in missing if name not in given]
    if missing:
        raise ConfigError(f"XTransformer: {' and '.join(f'`{name}`' for name in missing)} must be given.")
    fixed = {"dim": "both halves have the width `dim`", "attn_layers": "its stack is built here"}
    fixed |= {"return_only_embed": "the encoder has no head, and the decoder needs one"}
    halves = []
    for half in ("enc_", "dec_"):
        own = {name.removeprefix(half): value for name, value in given.items() if name.startswith(half)}
        for name, why in (
            fixed | ({"cross_attend": "the decoder always attends to the source"} if half == "dec_" else {})
        ).items():
            if name in own:
                raise ConfigError(f"XTransformer: `{half}{name}` cannot be given, since {why}; drop it.")
        wrapper = {name: value for name, value in own.items() if name in OF_THE_WRAPPER}
        halves.append((wrapper, {name: value for name, value in own.items() if name not in OF_THE_WRAPPER}))
    return halves


def _shared(encoder: TransformerWrapper, dim: int, decoder: Mapping[str, Any]) -> SharedTokenEmbedding:
    """Return the encoder's token embedding, for a decoder with these options."""
    own = encoder.token_emb
    if "token_emb" in decoder or not isinstance(own, TokenEmbedding):
        raise ConfigError(
            "`tie_token_emb` gives the decoder the encoder's `TokenEmbedding`; drop it, or `dec_token_emb` and a "
            "custom `enc_token_emb`."
        )
    if decoder["num_tokens"] > encoder.num_tokens:
        raise ConfigError(
            f"`tie_token_emb` shares a table of `enc_num_tokens` = {encoder.num_tokens} rows, but `dec_num_tokens` is "
            f"{decoder['num_tokens']}; untie, or make the encoder's vocabulary as large."
        )
    width = decoder.get("emb_dim") or dim
    if width != encoder.emb_dim or bool(decoder.get("l2norm_embed")) != own.l2norm_embed:
        raise ConfigError(
            f"`tie_token_emb` shares embeddings of width {encoder.emb_dim} with `l2norm_embed = {own.l2norm_embed}`; "
            "give `emb_dim` and `l2norm_embed` the same values for `enc_` and `dec_`."
        )
    return SharedTokenEmbedding(own)
