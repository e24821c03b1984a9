"""A stack over vectors in place of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.cache import KVCache
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.base import Model, check_common, given, valid_tokens
from x_transformers.models.heads import LinearNoBias
from x_transformers.models.requested_outputs import RequestedOutputs
from x_transformers.modules.norms import LayerNorm
from x_transformers.ops import masked_mean


class ContinuousTransformerWrapper(Model):
    """Vectors `(b, n, dim_in)` to vectors `(b, n, dim_out)`, through a stack.

    Args:
        max_seq_len: length of the absolute position table; None or 0 means none and no limit.
        attn_layers: the stack.
        dim_in, dim_out: widths of input and output, which linear maps lead from and to; None: the stack's, no map.
        project_in, project_out: modules in place of the linear maps.
        max_mem_len: positions of recurrent memory to keep (1901.02860).
        num_memory_tokens: learned tokens in front (2006.11527).
        post_emb_norm: LayerNorm behind the embeddings.
        emb_dropout: dropout of all that the stack reads.
        use_abs_pos_emb: absolute positions, unless the stack has rotary positions or T5's bias.
        scaled_sinu_pos_emb: sinusoids with a learned scale in place of the table.
        average_pool_embed: the features are the mean over the valid positions, `(b, D)`.
        probabilistic: the output is a mean and a variance, `(2, b, n, dim_out)`.
        use_identity_if_same_dim: no linear map where it would keep the width.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    joins_memories = False

    def __init__(
        self,
        *,
        max_seq_len: int | None = None,
        attn_layers: AttentionLayers,
        dim_in: int | None = None,
        dim_out: int | None = None,
        project_in: nn.Module | None = None,
        project_out: nn.Module | None = None,
        max_mem_len: int = 0,
        num_memory_tokens: int | None = None,
        post_emb_norm: bool = False,
        emb_dropout: float = 0.0,
        use_abs_pos_emb: bool = True,
        scaled_sinu_pos_emb: bool = False,
        average_pool_embed: bool = False,
        probabilistic: bool = False,
        use_identity_if_same_dim: bool = False,
    ) -> None:
        max_seq_len = 0 if max_seq_len is None else max_seq_len
        check_common(locals())
        for name, module, width in (("in", project_in, dim_in), ("out", project_out, dim_out)):
            if module is not None and width is not None:
                raise ConfigError(f"`project_{name}` is there, and `dim_{name}` = {width} asks for another; drop one.")
        if probabilistic and dim_out is None and project_out is None:
            raise ConfigError("`probabilistic` gives a mean and a variance of each output; say how many by `dim_out`.")
        dim = attn_layers.dim
        super().__init__(
            attn_layers,
            max_seq_len=max_seq_len,
            emb_dim=dim,
            use_abs_pos_emb=use_abs_pos_emb,
            scaled_sinu_pos_emb=scaled_sinu_pos_emb,
            max_mem_len=max_mem_len,
            emb_dropout=emb_dropout,
            num_memory_tokens=num_memory_tokens,
        )
        self.average_pool_embed, self.probabilistic = average_pool_embed, probabilistic
        self.dim_in = None if project_in is not None else dim if dim_in is None else dim_in
        self.dim_out = None if project_out is not None else dim if dim_out is None else dim_out
        self.post_emb_norm = LayerNorm(dim) if post_emb_norm else None
        if project_in is None and dim_in is not None and not (use_identity_if_same_dim and dim_in == dim):
            project_in = LinearNoBias(dim_in, dim)
        self.project_in = nn.Identity() if project_in is None else project_in
        if project_out is None and dim_out is not None:
            width = dim_out * 2 if probabilistic else dim_out
            project_out = None if use_identity_if_same_dim and width == dim else LinearNoBias(dim, width)
        self.project_out = nn.Identity() if project_out is None else project_out

    @property
    def can_cache_kv(self) -> bool:
        """Whether decoding may keep keys and values: where what is new does not change what came out before."""
        return not self.average_pool_embed and self.attn_layers.can_cache_kv

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
        sum_embeds: Tensor | None = None,
        prepend_embeds: Tensor | None = None,
        prepend_mask: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        input_not_include_cache: bool = False,
        seq_start_pos: Tensor | None = None,
        *,
        cache_age: int | None = None,
        capture: Capture | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n, dim_in)`. With a cache: the whole sequence, of which what is not cached runs, or the new
                positions (`input_not_include_cache`).
            return_embeddings: features `(b, n, D)` in place of outputs.
            return_intermediates: also the `LayerIntermediates`, which a later call takes as `cache`.
            return_mems, mems, mem_masks: recurrent memory: the last `max_mem_len` inputs of each self-attention.
            mask: `(b, n)` bool, valid positions; with a cache it covers cached and new ones.
            lens: `(b,)` valid positions of each row, from the left, in place of a mask.
            return_attn: also the attention weights, `(b, h, i, j)` for each attention.
            pos: `(n,)` or `(b, n)` integer positions, or a floating tensor added in place of position embeddings.
            sum_embeds: `(b, n, D)`, added to the projected input.
            prepend_embeds, prepend_mask: `(b, p, D)` embeddings before the others, and their `(b, p)` mask. Their
                outputs stand before the others'.
            seq_start_pos: `(b,)` positions of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            capture: what to keep of the stack for the caller, in place of what `return_intermediates` keeps.
            kwargs: of the stack; see `TransformerWrapper.forward`.

        Returns:
            `(b, p + n, dim_out)`; if `probabilistic`, `(2, b, p + n, dim_out)`, means and variances. Beside it what
            was asked for: intermediates, or else memories, or else weights.

        Raises:
            InputError: with what was given and what is needed.
        """
        self._check_input(x)
        if lens is not None:
            mask = _mask_of(lens, x, mask, cache)
        tokens = self._tokens(x.shape[1], cache, prepend_embeds, only_new=input_not_include_cache, age=cache_age)
        asked = RequestedOutputs(return_intermediates, return_mems, return_attn, capture=capture)

        embeds, stack_pos = self._place(self.project_in(tokens.newest(x, 1)), tokens, pos, seq_start_pos)
        if sum_embeds is not None:
            embeds = embeds + (sum_embeds if sum_embeds.shape[-2] == 1 else tokens.newest(sum_embeds, -2))
        if self.post_emb_norm is not None:
            embeds = self.post_emb_norm(embeds)
        if prepend_embeds is not None and tokens.starts:
            embeds = torch.cat((self._check_prepended(prepend_embeds, len(x)), embeds), dim=1)
        features, record = self._run(
            embeds,
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
        if self.average_pool_embed:
            valid = valid_tokens(tokens, len(x), mask, seq_start_pos, x.device)
            features = masked_mean(features[:, tokens.leading :], valid)
        return asked.results(features if return_embeddings else self._output(features), record)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 3 or not x.is_floating_point() or (self.dim_in is not None and x.shape[-1] != self.dim_in):
            width = "dim" if self.dim_in is None else self.dim_in
            raise ShapeError(
                f"x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating, (batch, positions, {width})."
            )

    def _output(self, features: Tensor) -> Tensor:
        out = self.project_out(features)
        if not self.probabilistic:
            return out
        mean, log_variance = out.unflatten(-1, (-1, 2)).unbind(dim=-1)
        return torch.stack((mean, log_variance.exp()))


def _mask_of(lens: Tensor, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """`(b, n)` bool, the first `lens` positions of each row."""
    if mask is not None or cache is not None:
        other = "mask" if mask is not None else "cache"
        raise InputError(f"`lens` says which positions of x are valid, and does not go with `{other}`; pass a `mask`.")
    if lens.shape != (x.shape[0],) or lens.is_floating_point() or lens.dtype is torch.bool:
        raise ShapeError(
            f"`lens` has shape {tuple(lens.shape)} and dtype {lens.dtype}; it must hold {x.shape[0]} whole numbers."
        )
    return torch.arange(x.shape[1], device=x.device) < lens.unsqueeze(-1)
