"""A stack over token ids of which one stands for numbers: its embedding is scaled by the number (2310.02989)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, ShapeError
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.base import Model, check_common, given
from x_transformers.models.embeddings import TokenEmbedding, check_ids
from x_transformers.models.heads import TiedLogits
from x_transformers.models.requested_outputs import RequestedOutputs


class XValTransformerWrapper(Model):
    """Token ids and numbers to logits and a number at each position.

    The embedding of the numeric token is multiplied by its number.

    Args:
        num_tokens: vocabulary.
        max_seq_len: length of the absolute position table; 0 means none and no limit.
        numerical_token_id: the token that stands for a number.
        attn_layers: the stack.
        emb_dim: width of the embeddings; default the stack's, else a linear map leads there.
        logits_dim: width of the logits; default `num_tokens`.
        tie_embedding: logits from the token table, times `dim ** -0.5`.
        max_mem_len: positions of recurrent memory to keep (1901.02860).
        num_memory_tokens: learned tokens in front (2006.11527).
        emb_dropout: dropout of all that the stack reads.
        use_abs_pos_emb: absolute positions, unless the stack has rotary positions or T5's bias.
        scaled_sinu_pos_emb: sinusoids with a learned scale in place of the table.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    joins_memories = False

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        numerical_token_id: int,
        attn_layers: AttentionLayers,
        emb_dim: int | None = None,
        logits_dim: int | None = None,
        tie_embedding: bool = False,
        max_mem_len: int = 0,
        num_memory_tokens: int | None = None,
        emb_dropout: float = 0.0,
        use_abs_pos_emb: bool = True,
        scaled_sinu_pos_emb: bool = False,
    ) -> None:
        check_common(locals())
        if not 0 <= numerical_token_id < num_tokens:
            raise ConfigError(
                f"`numerical_token_id` is {numerical_token_id}; the vocabulary runs from 0 to {num_tokens - 1}."
            )
        dim = attn_layers.dim
        emb_dim = dim if emb_dim is None else emb_dim
        if tie_embedding and (emb_dim != dim or logits_dim not in (None, num_tokens)):
            raise ConfigError(
                "`tie_embedding` takes its logits from the token table, of the stack's width; drop `emb_dim` and "
                "`logits_dim`, or untie."
            )
        super().__init__(
            attn_layers,
            max_seq_len=max_seq_len,
            emb_dim=emb_dim,
            use_abs_pos_emb=use_abs_pos_emb,
            scaled_sinu_pos_emb=scaled_sinu_pos_emb,
            max_mem_len=max_mem_len,
            emb_dropout=emb_dropout,
            num_memory_tokens=num_memory_tokens,
        )
        self.num_tokens, self.numerical_token_id = num_tokens, numerical_token_id
        self.token_emb = TokenEmbedding(emb_dim, num_tokens)
        self.to_logits = (
            TiedLogits(self.token_emb, dim**-0.5)
            if tie_embedding
            else nn.Linear(dim, num_tokens if logits_dim is None else logits_dim)
        )
        self.to_numerical_output = nn.Sequential(nn.Linear(dim, 1))

    def forward(
        self,
        x: Tensor,
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
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n)` token ids. With a cache: the whole sequence, of which what is not cached runs, or the new
                tokens (`input_not_include_cache`).
            x_num: `(b, n)` numbers; they are read where x is the numeric token.
            return_embeddings: features `(b, n, D)` in place of outputs.
            return_intermediates: also the `LayerIntermediates`, which a later call takes as `cache`.
            return_mems, mems, mem_masks: recurrent memory: the last `max_mem_len` inputs of each self-attention.
            mask: `(b, n)` bool, valid tokens; with a cache it covers cached and new ones.
            return_attn: also the attention weights, `(b, h, i, j)` for each attention.
            pos: `(n,)` or `(b, n)` integer positions, or a floating tensor added in place of position embeddings.
            prepend_embeds, prepend_mask: `(b, p, E)` embeddings before the tokens, and their `(b, p)` mask. Their
                outputs stand before the others'.
            seq_start_pos: `(b,)` tokens of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            capture: what to keep of the stack for the caller, in place of what `return_intermediates` keeps.
            kwargs: of the stack; see `TransformerWrapper.forward`.

        Returns:
            `(logits, numbers)`, `(b, p + n, v)` and `(b, p + n)`. Beside them what was asked for: intermediates, or
            else memories, or else weights.

        Raises:
            InputError: with what was given and what is needed.
        """
        check_ids(x)
        if x_num.shape != x.shape:
            raise ShapeError(f"`x_num` has shape {tuple(x_num.shape)}; it must be that of x, {tuple(x.shape)}.")
        tokens = self._tokens(x.shape[1], cache, prepend_embeds, only_new=input_not_include_cache, age=cache_age)
        asked = RequestedOutputs(return_intermediates, return_mems, return_attn, capture=capture)

        embeds, stack_pos = self._place(
            self._embed(tokens.newest(x, 1), tokens.newest(x_num, 1)), tokens, pos, seq_start_pos
        )
        if prepend_embeds is not None and tokens.starts:
            embeds = torch.cat((self._check_prepended(prepend_embeds, len(x)), embeds), dim=1)
        features, record = self._run(
            embeds if self.project_emb is None else self.project_emb(embeds),
            tokens,
            asked,
            given(kwargs, mask=mask, pos=stack_pos, mem_masks=mem_masks),
            seq_start_pos=seq_start_pos,
            prepend_mask=prepend_mask,
            mems=mems,
            dropout=self.emb_dropout,
        )
        if record is not None:
            record.initial_embeds, record.last_layer_hiddens = embeds, features
        if return_embeddings:
            return asked.results(features, record)
        return asked.results((self.to_logits(features), self.to_numerical_output(features).squeeze(-1)), record)

    def _embed(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """`(b, n, E)`; what stands for a number where there is none, NaN even, is not read."""
        embeds = self.token_emb(ids)
        factor = torch.where(ids == self.numerical_token_id, numbers.to(embeds.dtype), 1.0)
        return embeds * factor.unsqueeze(-1)
