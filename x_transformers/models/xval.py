"""A stack over token ids, one of which represents numbers: its embedding is multiplied by the number (2310.02989)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, ShapeError
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.arrays import Ids
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.base import Model
from x_transformers.models.embeddings import TokenEmbedding, checked_ids
from x_transformers.models.heads import TiedLogits
from x_transformers.models.inputs import ModelInputs
from x_transformers.models.options.base import check_size
from x_transformers.models.options.catalog import XVAL
from x_transformers.models.options.reading import read_options, show_options
from x_transformers.models.requested_outputs import with_requested
from x_transformers.options.signatures import shows_keywords_of


class XValTransformerWrapper(Model):
    """Token ids and numbers to logits and a number at each position.

    The embedding of the numeric token is multiplied by its number.

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: length of the absolute position table; 0 for none and no limit.
        numerical_token_id: the token that represents a number.
        attn_layers: the stack.
        keywords: see below.

    Raises:
        ConfigError: listing every keyword that is unknown, wrong or in conflict, and what to change.
    """

    joins_memories = False
    drops_memory_tokens = True

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        numerical_token_id: int,
        attn_layers: AttentionLayers,
        **keywords: Any,
    ) -> None:
        options = read_options(type(self), XVAL, attn_layers, keywords, num_tokens=num_tokens, max_seq_len=max_seq_len)
        check_size("num_tokens", num_tokens)
        check_size("max_seq_len", max_seq_len, least=0)
        if not 0 <= numerical_token_id < num_tokens:
            raise ConfigError(
                f"`numerical_token_id` is {numerical_token_id}; the vocabulary runs from 0 to {num_tokens - 1}."
            )
        dim = attn_layers.dim
        emb_dim = dim if options.emb_dim is None else options.emb_dim
        super().__init__(attn_layers, options, max_seq_len=max_seq_len, emb_dim=emb_dim)
        self.num_tokens, self.numerical_token_id = num_tokens, numerical_token_id
        self.token_emb = TokenEmbedding(emb_dim, num_tokens)
        self.to_logits = (
            TiedLogits(self, dim**-0.5)
            if options.tie_embedding
            else nn.Linear(dim, num_tokens if options.logits_dim is None else options.logits_dim)
        )
        self.to_numerical_output = nn.Sequential(nn.Linear(dim, 1))

    @shows_keywords_of(AttentionLayers.forward, but=("return_hiddens",))
    @checked
    @passes_on("attn_layers", but=("return_hiddens",))
    def forward(
        self,
        x: Ids,
        x_num: Tensor,
        return_embeddings: bool = False,
        return_intermediates: bool = False,
        return_mems: bool = False,
        mask: Tensor | None = None,
        return_attn: bool = False,
        mems: Sequence[Tensor | None] | None = None,
        pos: Tensor | None = None,
        prepend_embeds: Tensor | None = None,
        *,
        mem_masks: Sequence[Tensor | None] | None = None,
        prepend_mask: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        input_not_include_cache: bool = False,
        cache_age: int | None = None,
        capture: Capture | None = None,
        return_aux_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n)` token ids. With a cache: the whole sequence, of which the tokens that are not cached run, or
                the new ones only (`input_not_include_cache`).
            x_num: `(b, n)` numbers, read only where x is the numeric token.
            return_embeddings: return features `(b, n, D)` instead of outputs.
            return_intermediates: also return the `LayerIntermediates`, which a later call takes as `cache`.
            return_mems, mems, mem_masks: recurrent memory: the last `max_mem_len` inputs of each self-attention.
            mask: `(b, n)` bool, valid tokens; with a cache it covers cached and new ones.
            return_attn: also return the attention weights, `(b, h, i, j)` for each attention.
            pos: `(n,)` or `(b, n)` integer positions, or a floating tensor added instead of position embeddings.
            prepend_embeds, prepend_mask: `(b, p, E)` embeddings before the tokens, and their `(b, p)` mask. Their
                outputs come before the others'.
            seq_start_pos: `(b,)` number of tokens of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            capture: what the stack records, instead of what `return_intermediates` implies.
            return_aux_loss: return the intermediates too, with `aux_loss`, the losses of experts.
            kwargs: of the stack; see `TransformerWrapper.forward`.

        Returns:
            `(logits, numbers)`, `(b, p + n, v)` and `(b, p + n)`. Together with them what was requested:
            intermediates, or else memories, or else attention weights.

        Raises:
            InputError: with what was given and what is needed.
        """
        x = checked_ids(x, self)
        if x_num.shape != x.shape or x_num.is_complex():
            raise ShapeError(f"`x_num` has shape {tuple(x_num.shape)}; it must be that of x, {tuple(x.shape)}.")
        inputs = ModelInputs(
            stack=kwargs,
            mask=mask,
            pos=pos,
            seq_start_pos=seq_start_pos,
            prepend_embeds=prepend_embeds,
            prepend_mask=prepend_mask,
            mems=mems,
            mem_masks=mem_masks,
            cache=cache,
            input_not_include_cache=input_not_include_cache,
            cache_age=cache_age,
            return_intermediates=return_intermediates,
            return_mems=return_mems,
            return_attn=return_attn,
            return_aux_loss=return_aux_loss,
            capture=capture,
        )
        span = self._token_span(x.shape[1], inputs)
        embeds = self._embed(span.newest(x, 1), span.newest(x_num, 1))
        features, record, _ = self._run_stack(self._add_positions(embeds, inputs, span), inputs, span)
        out: Any = features
        if not return_embeddings:
            out = (self.to_logits(features), self.to_numerical_output(features).squeeze(-1))
        return out if record is None else with_requested(out, record, inputs)

    def _embed(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """Return `(b, n, E)` embeddings, those of the numeric token times its numbers."""
        embeds = self.token_emb(ids)
        # Where there is no number, `numbers` may hold anything. A product with NaN would be NaN, even times zero, so
        # these factors are replaced before they are multiplied.
        factor = torch.where(ids == self.numerical_token_id, numbers.to(embeds.dtype), 1.0)
        return embeds * factor.unsqueeze(-1)


show_options(XValTransformerWrapper, XVAL)
