"""A stack over several streams of token ids at once, which are embedded and summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError, ShapeError, TokenRangeError
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.base import Model, check_common, given
from x_transformers.models.embeddings import check_ids, frac_gradient
from x_transformers.models.heads import LinearNoBias
from x_transformers.models.requested_outputs import RequestedOutputs
from x_transformers.models.tokens import Tokens
from x_transformers.modules.norms import LayerNorm


class MultiInputTransformerWrapper(Model):
    """Aligned streams of token ids to logits for each of them.

    Args:
        num_tokens: name of each stream -> its vocabulary.
        max_seq_len: length of the absolute position table; 0 means none and no limit.
        attn_layers: the stack.
        emb_dim: width of the embeddings; default the stack's, else a linear map leads there.
        max_mem_len: positions of recurrent memory to keep (1901.02860).
        shift_mem_down: layer i reads the memory of layer i + shift (2012.15688).
        emb_dropout: dropout of the embedded sequence.
        post_emb_norm: LayerNorm behind the embeddings.
        num_memory_tokens: learned tokens in front (2006.11527).
        memory_tokens_interspersed_every: put them in front of every group of that many positions; causal stacks.
        return_only_embed: no heads; a pass returns features.
        use_abs_pos_emb: absolute positions, unless the stack has rotary positions or T5's bias.
        scaled_sinu_pos_emb: sinusoids with a learned scale in place of the table.
        emb_frac_gradient: fraction of the gradient that reaches the embeddings (2105.13290).
        attn_z_loss_weight: default of the argument of a pass.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        num_tokens: Mapping[str, int] | None = None,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        emb_dim: int | None = None,
        max_mem_len: int = 0,
        shift_mem_down: int = 0,
        emb_dropout: float = 0.0,
        post_emb_norm: bool = False,
        num_memory_tokens: int | None = None,
        memory_tokens_interspersed_every: int | None = None,
        return_only_embed: bool = False,
        use_abs_pos_emb: bool = True,
        scaled_sinu_pos_emb: bool = False,
        emb_frac_gradient: float = 1.0,
        attn_z_loss_weight: float = 1e-4,
    ) -> None:
        check_common({name: value for name, value in locals().items() if name != "num_tokens"})
        sizes = _check_streams(num_tokens)
        dim = attn_layers.dim
        emb_dim = dim if emb_dim is None else emb_dim
        super().__init__(
            attn_layers,
            max_seq_len=max_seq_len,
            emb_dim=emb_dim,
            use_abs_pos_emb=use_abs_pos_emb,
            scaled_sinu_pos_emb=scaled_sinu_pos_emb,
            max_mem_len=max_mem_len,
            shift_mem_down=shift_mem_down,
            emb_dropout=emb_dropout,
            num_memory_tokens=num_memory_tokens,
            memory_tokens_interspersed_every=memory_tokens_interspersed_every,
            attn_z_loss_weight=attn_z_loss_weight,
        )
        self.num_tokens, self.emb_frac_gradient = sizes, emb_frac_gradient
        self.embeds = nn.ModuleDict({f"{name}_embed": nn.Embedding(size, emb_dim) for name, size in sizes.items()})
        self.post_emb_norm = LayerNorm(emb_dim) if post_emb_norm else None
        self.to_logits = (
            None
            if return_only_embed
            else nn.ModuleDict({name: LinearNoBias(dim, size) for name, size in sizes.items()})
        )

    def forward(
        self,
        x: Mapping[str, Tensor],
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        return_intermediates: bool = False,
        mask: Tensor | None = None,
        return_mems: bool = False,
        return_attn: bool = False,
        mems: Sequence[Tensor | None] | None = None,
        mem_masks: Sequence[Tensor | None] | None = None,
        pos: Tensor | None = None,
        prepend_embeds: Tensor | None = None,
        prepend_mask: Tensor | None = None,
        sum_embeds: Tensor | None = None,
        return_attn_z_loss: bool = False,
        attn_z_loss_weight: float | None = None,
        seq_start_pos: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        *,
        input_not_include_cache: bool = False,
        cache_age: int | None = None,
        capture: Capture | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n)` token ids of each stream, by name. With a cache: the whole sequence, of which what is not
                cached runs, or the new tokens (`input_not_include_cache`).
            return_embeddings: features `(b, n, D)` in place of logits; return_logits_and_embeddings: both.
            return_intermediates: also the `LayerIntermediates`, which a later call takes as `cache`.
            mask: `(b, n)` bool, valid positions; with a cache it covers cached and new ones.
            return_mems, mems, mem_masks: recurrent memory, a `(b, m, D)` tensor for each self-attention, detached.
            return_attn: also the attention weights, `(b, h, i, j)` for each attention.
            pos: `(n,)` or `(b, n)` integer positions, or a floating tensor added in place of position embeddings.
            prepend_embeds, prepend_mask: `(b, p, E)` embeddings before the tokens, and their `(b, p)` mask. Their
                outputs stand before the others'.
            sum_embeds: `(b, n, E)`, added to the token embeddings.
            return_attn_z_loss, attn_z_loss_weight: fill `attn_z_loss` of the intermediates, and return them.
            seq_start_pos: `(b,)` positions of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            capture: what to keep of the stack for the caller, in place of what `return_intermediates` keeps.
            kwargs: of the stack; see `TransformerWrapper.forward`.

        Returns:
            name -> logits `(b, p + n, v)`, and beside them what was asked for.

        Raises:
            InputError: with what was given and what is needed.
        """
        if return_logits_and_embeddings and self.to_logits is None:
            raise InputError("this model has no heads (`return_only_embed`); logits cannot be returned.")
        batch, n = self._check_input(x)
        tokens = self._tokens(n, cache, prepend_embeds, only_new=input_not_include_cache, age=cache_age)
        weight = None
        if return_attn_z_loss:
            weight = self.attn_z_loss_weight if attn_z_loss_weight is None else attn_z_loss_weight
        asked = RequestedOutputs(return_intermediates, return_mems, return_attn, weight, capture=capture)

        embeds, stack_pos = self._place(self._embed(x, tokens), tokens, pos, seq_start_pos)
        if sum_embeds is not None:
            embeds = embeds + (sum_embeds if sum_embeds.shape[-2] == 1 else tokens.newest(sum_embeds, -2))
        if self.post_emb_norm is not None:
            embeds = self.post_emb_norm(embeds)
        if prepend_embeds is not None and tokens.starts:
            embeds = torch.cat((self._check_prepended(prepend_embeds, batch), embeds), dim=1)
        embeds = frac_gradient(embeds, self.emb_frac_gradient)
        items = F.dropout(embeds, self.emb_dropout, self.training)
        features, record = self._run(
            items if self.project_emb is None else self.project_emb(items),
            tokens,
            asked,
            given(kwargs, mask=mask, pos=stack_pos, mem_masks=mem_masks),
            seq_start_pos=seq_start_pos,
            prepend_mask=prepend_mask,
            mems=mems,
        )
        if record is not None:
            record.initial_embeds, record.last_layer_hiddens = embeds, features
        if self.to_logits is None or (return_embeddings and not return_logits_and_embeddings):
            return asked.results(features, record)
        logits = {name: head(features) for name, head in self.to_logits.items()}
        return asked.results((logits, features) if return_logits_and_embeddings else logits, record)

    def _check_input(self, x: Mapping[str, Tensor]) -> tuple[int, int]:
        """Batch and length of the streams."""
        if not isinstance(x, Mapping) or set(x) != set(self.num_tokens):
            found = sorted(x) if isinstance(x, Mapping) else f"a {type(x).__name__}"
            raise InputError(f"x is {found}; this model reads a dict of the streams {sorted(self.num_tokens)}.")
        shapes = {name: tuple(ids.shape) for name, ids in x.items()}
        if len(set(shapes.values())) > 1:
            raise ShapeError(f"the streams have shapes {shapes}; they must be the same.")
        for ids in x.values():
            check_ids(ids)
        return next(iter(shapes.values()))  # type: ignore[return-value]

    def _embed(self, x: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        """The sum of the streams' embeddings, `(b, n, E)`."""
        total: Any = 0.0
        for name, size in self.num_tokens.items():
            ids = tokens.newest(x[name], 1).long()
            try:
                total = total + self.embeds[f"{name}_embed"](ids)
            except IndexError as error:
                raise TokenRangeError(
                    f"ids of `{name}` run from {int(ids.min())} to {int(ids.max())}; its vocabulary runs from 0 to "
                    f"{size - 1}."
                ) from error
        return total


def _check_streams(num_tokens: Mapping[str, int] | None) -> dict[str, int]:
    if not isinstance(num_tokens, Mapping) or not num_tokens:
        raise ConfigError(f"`num_tokens` is {num_tokens!r}; it must name at least one stream and its vocabulary.")
    for name, size in num_tokens.items():
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ConfigError(f"`num_tokens` names a stream {name!r}, which cannot name a module; choose another name.")
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"`num_tokens` gives {name!r} the vocabulary {size!r}; it must be at least 1.")
    return dict(num_tokens)
