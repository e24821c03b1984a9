"""A stack over vectors instead of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.forward_pass.arguments import check_counts, checked
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.names import passes_on
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.base import Model
from x_transformers.models.embeddings import build_embedding_norm
from x_transformers.models.heads import LinearNoBias
from x_transformers.models.inputs import ModelInputs
from x_transformers.models.options.base import check_size
from x_transformers.models.options.catalog import CONTINUOUS
from x_transformers.models.options.reading import read_options, show_options
from x_transformers.models.requested_outputs import with_requested
from x_transformers.ops import masked_mean
from x_transformers.options.signatures import shows_keywords_of


class ContinuousTransformerWrapper(Model):
    """Vectors `(b, n, dim_in)` to vectors `(b, n, dim_out)`, through a stack.

    Args:
        max_seq_len: length of the absolute position table; None or 0 for none and no limit.
        attn_layers: the stack.
        keywords: see below.

    Raises:
        ConfigError: listing every keyword that is unknown, wrong or in conflict, and what to change.
    """

    joins_memories = False
    drops_memory_tokens = True

    def __init__(self, *, max_seq_len: int | None = None, attn_layers: AttentionLayers, **keywords: Any) -> None:
        max_seq_len = 0 if max_seq_len is None else max_seq_len
        options = read_options(type(self), CONTINUOUS, attn_layers, keywords, max_seq_len=max_seq_len)
        check_size("max_seq_len", max_seq_len, least=0)
        dim, dim_in, dim_out = attn_layers.dim, options.dim_in, options.dim_out
        project_in, project_out = options.project_in, options.project_out
        halves = options.probabilistic and dim_out is None and project_out is None
        if halves and dim % 2:
            raise ConfigError(
                f"`probabilistic` without `dim_out` reads the {dim} features as pairs of a mean and a variance, and "
                "their number is odd; pass the number of outputs as `dim_out`."
            )
        super().__init__(attn_layers, options, max_seq_len=max_seq_len, emb_dim=dim)
        self.average_pool_embed, self.probabilistic = options.average_pool_embed, options.probabilistic
        self.dim_in = None if project_in is not None else dim if dim_in is None else dim_in
        self.dim_out = None if project_out is not None else dim // (1 + halves) if dim_out is None else dim_out
        self.post_emb_norm = build_embedding_norm(options, dim)
        keeps_equal = options.use_identity_if_same_dim
        if project_in is None and dim_in is not None and not (keeps_equal and dim_in == dim):
            project_in = LinearNoBias(dim_in, dim)
        self.project_in = nn.Identity() if project_in is None else project_in
        if project_out is None and dim_out is not None:
            width = dim_out * 2 if options.probabilistic else dim_out
            project_out = None if keeps_equal and width == dim else LinearNoBias(dim, width)
        self.project_out = nn.Identity() if project_out is None else project_out

    @property
    def can_cache_kv(self) -> bool:
        """True if decoding may cache keys and values: new positions must not change earlier outputs."""
        return not self.average_pool_embed and self.attn_layers.can_cache_kv

    @shows_keywords_of(AttentionLayers.forward, but=("return_hiddens",))
    @checked
    @passes_on("attn_layers", but=("return_hiddens",))
    def forward(
        self,
        x: Tensor,
        return_embeddings: bool = False,
        return_intermediates: bool = False,
        return_mems: bool = False,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        return_attn: bool = False,
        mems: Sequence[Tensor | None] | None = None,
        mem_masks: Sequence[Tensor | None] | None = None,
        pos: Tensor | None = None,
        sum_embeds: Tensor | float | None = None,
        prepend_embeds: Tensor | None = None,
        prepend_mask: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        input_not_include_cache: bool = False,
        seq_start_pos: Tensor | None = None,
        *,
        cache_age: int | None = None,
        capture: Capture | None = None,
        return_aux_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n, dim_in)`. With a cache, see `AttentionLayers.forward`: the whole sequence or its end, of which
                the new positions run.
            return_embeddings: return features `(b, n, D)` instead of outputs.
            return_intermediates: also return the `LayerIntermediates`, which a later call takes as `cache`.
            return_mems, mems, mem_masks: recurrent memory: the last `max_mem_len` inputs of each self-attention.
            mask: `(b, n)` bool, valid positions; with a cache it covers cached and new ones, or the new ones only.
            lens: `(b,)` valid positions of each row, from the left, instead of a mask.
            return_attn: also return the attention weights, `(b, h, i, j)` for each attention.
            pos: `(n,)` or `(b, n)` integer positions, or a floating tensor added instead of position embeddings.
            sum_embeds: `(b, n, D)` or what broadcasts to it, added to the projected input.
            prepend_embeds, prepend_mask: `(b, p, D)` embeddings before the others, and their `(b, p)` mask. Their
                outputs come before the others'.
            seq_start_pos: `(b,)` number of positions of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            capture: what the stack records, instead of what `return_intermediates` implies.
            return_aux_loss: return the intermediates too, with `aux_loss`, the losses of experts.
            kwargs: of the stack; see `TransformerWrapper.forward`.

        Returns:
            `(b, p + n, dim_out)`; if `probabilistic`, `(2, b, p + n, dim_out)`, means and variances. Together
            with it what was requested: intermediates, or else memories, or else attention weights.

        Raises:
            InputError: with what was given and what is needed.
        """
        self._check_input(x)
        if lens is not None:
            mask = _mask_of(lens, x, mask, cache)
        inputs = ModelInputs(
            stack=kwargs,
            mask=mask,
            pos=pos,
            seq_start_pos=seq_start_pos,
            sum_embeds=sum_embeds,
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
        embeds = self._add_positions(self.project_in(span.newest(x, 1)), inputs, span)
        features, record, _ = self._run_stack(embeds, inputs, span)
        if self.average_pool_embed:
            valid = span.valid(x.shape[0], mask, seq_start_pos, x.device)
            features = masked_mean(features[:, span.leading :], valid)
        out = features if return_embeddings else self._output(features)
        return out if record is None else with_requested(out, record, inputs)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 3 or not x.is_floating_point() or (self.dim_in is not None and x.shape[-1] != self.dim_in):
            width = "dim" if self.dim_in is None else self.dim_in
            raise ShapeError(
                f"x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating, (batch, positions, {width})."
            )

    def _output(self, features: Tensor) -> Tensor:
        """Map features to outputs; those of a probabilistic model are pairs of a mean and a logarithm of a variance."""
        out = self.project_out(features)
        if not self.probabilistic:
            return out
        mean, log_variance = out.unflatten(-1, (-1, 2)).unbind(dim=-1)
        return torch.stack((mean, log_variance.exp()))


def _mask_of(lens: Tensor, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """Return `(b, n)` bool, the first `lens` positions of each row."""
    if mask is not None or cache is not None:
        other = "mask" if mask is not None else "cache"
        raise InputError(
            f"`lens` specifies the valid positions of x and cannot be combined with `{other}`; pass a `mask`."
        )
    check_counts(lens, "lens", x.shape[1], x.shape[0])
    return torch.arange(x.shape[1], device=x.device) < lens.unsqueeze(-1)


show_options(ContinuousTransformerWrapper, CONTINUOUS)
