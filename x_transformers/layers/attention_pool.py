"""Pooling by attention: learned queries attend to a sequence (1810.00825)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.attention import Attention
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.names import passes_on
from x_transformers.layers.named_stacks import CrossAttender
from x_transformers.options.schema import at_least


class AttentionPool(SavesFolders):
    """Pooling of a context by k learned queries, through one attention or a stack of cross-attention blocks.

    Args:
        dim: width of the queries and of the output.
        num_pooled_tokens: number of learned queries k; 0 if the caller passes the queries.
        dim_context: width of the context; default `dim`.
        add_residual: add the queries to the output of the attention.
        depth: number of blocks of cross-attention and feedforward; 1 is a single attention without feedforward.
        heads: number of heads of each attention.
        dim_head: width of a head.
        use_transformer_blocks: use blocks, also with `depth = 1`; default `depth > 1`.
        squeeze_output: remove the token axis of a single query from the output.
        attn_kwargs: more keywords for the attention, without prefix.

    Raises:
        ConfigError: if a value is out of range, or if options disagree.
    """

    def __init__(
        self,
        dim: int,
        num_pooled_tokens: int = 1,
        dim_context: int | None = None,
        add_residual: bool = False,
        depth: int = 1,
        heads: int = 8,
        dim_head: int = 64,
        use_transformer_blocks: bool | None = None,
        squeeze_output: bool | None = None,
        attn_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        blocks = depth > 1 if use_transformer_blocks is None else use_transformer_blocks
        self.squeeze_output = bool(squeeze_output)
        self.add_residual, self.dim = add_residual, dim
        dim_context = dim if dim_context is None else dim_context
        at_least(1, dim=dim, dim_context=dim_context)
        _check(num_pooled_tokens, depth, blocks, self.squeeze_output, add_residual)
        self.queries = nn.Parameter(torch.randn(num_pooled_tokens, dim) * 1e-2) if num_pooled_tokens else None
        self.pooler: Attention | CrossAttender
        options = dict(attn_kwargs or {})
        if blocks:
            self.pooler = CrossAttender(
                dim=dim,
                depth=depth,
                heads=heads,
                attn_dim_head=dim_head,
                cross_attn_dim_context=dim_context,
                **{f"attn_{name}": value for name, value in options.items()},
            )
        else:
            self.pooler = Attention(dim, dim_head, dim_context=dim_context, heads=heads, **options)

    @checked
    @passes_on("pooler", but=("context", "context_mask"))
    def forward(
        self, context: Tensor, mask: Tensor | None = None, queries: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """Pool a context.

        Args:
            context: `(b, m, dim_context)` tokens to pool.
            mask: `(b, m)` bool, True for valid tokens of the context.
            queries: `(k, dim)` or `(b, k, dim)`, used instead of the learned queries.
            arguments: more arguments for the forward pass of the attention or the stack.

        Returns:
            `(b, k, dim)`, or `(b, dim)` with `squeeze_output`.

        Raises:
            InputError: if there are no queries, or `squeeze_output` has to remove an axis of several.
            ShapeError: if the queries have another shape.
        """
        if context.ndim != 3:
            raise ShapeError(f"`context` has shape {tuple(context.shape)}; it must be (b, m, width).")
        given = self.queries if queries is None else queries
        if given is None:
            raise InputError("this pool has no queries (`num_pooled_tokens = 0`); pass `queries`, (b, k, dim).")
        if given.ndim == 2:
            given = given.expand(context.shape[0], -1, -1)
        if given.ndim != 3 or given.shape[0] != context.shape[0] or given.shape[-1] != self.dim:
            raise ShapeError(
                f"`queries` has shape {tuple(given.shape)}; it must be ({context.shape[0]}, k, {self.dim})."
            )
        if self.squeeze_output and given.shape[1] != 1:
            raise InputError(
                f"`squeeze_output` removes the axis of a single query, but there are {given.shape[1]}; pass one query."
            )
        out = self.pooler(given, context=context, context_mask=mask, **arguments)
        assert isinstance(out, Tensor)
        out = out + given if self.add_residual else out
        return out.squeeze(1) if self.squeeze_output else out


def _check(tokens: int, depth: int, blocks: bool, squeeze: bool, residual: bool) -> None:
    if tokens < 0 or depth < 1:
        raise ConfigError(
            f"AttentionPool: `num_pooled_tokens` is {tokens} and `depth` is {depth}; they must be at least 0 and 1."
        )
    if squeeze and tokens > 1:
        raise ConfigError(
            f"AttentionPool: `squeeze_output` needs a single query, but `num_pooled_tokens` is {tokens}; set it to 1."
        )
    if depth > 1 and not blocks:
        raise ConfigError(
            f"AttentionPool: `depth` is {depth}, and more than 1 needs blocks; drop `use_transformer_blocks = False`."
        )
    if residual and blocks:
        raise ConfigError("AttentionPool: blocks already add residuals; drop `add_residual`.")
