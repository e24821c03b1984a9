"""Forgetting attention: each token has a gate that fades all tokens before it (arXiv 2503.02130).

With gates `f_t` in (0, 1), the exponential of a score is multiplied by `f_{j+1} * ... * f_i`, that is, the score has a
bias `sum_{j < t <= i} log f_t`: an ALiBi whose slope depends on the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, BoundScore, Needs, ScoreFunction, ScoreMod, Stage, Tiles
from x_transformers.cache import Shape
from x_transformers.errors import ConfigError, InputError, UnknownKeywordError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.ops import at_least_float32, reorder_heads, split_heads
from x_transformers.options.schema import Feature, Rule, at_least, opt, require


@dataclass(frozen=True, kw_only=True)
class ForgettingOptions:
    data_dependent_alibi: bool = opt(False, "add a bias by forget gates, computed for each head and token")
    data_dependent_alibi_per_row: bool = opt(False, "compute the gates from query and key; causal attention only")
    data_dependent_alibi_per_row_dim_head: int = opt(8, "width of a head of these queries and keys")
    data_dependent_alibi_kwargs: Mapping[str, Any] = opt(
        {}, "`post_log_scale`: factor of the bias (1.0); `bias_init`: initial logit of the gates (5.0; not per row)"
    )

    def __post_init__(self) -> None:
        width = self.data_dependent_alibi_per_row_dim_head
        require(width >= 1, f"`data_dependent_alibi_per_row_dim_head` is {width}; it must be at least 1.")
        taken = {"post_log_scale"} if self.data_dependent_alibi_per_row else {"post_log_scale", "bias_init"}
        unknown = sorted(set(self.data_dependent_alibi_kwargs) - taken)
        if unknown:
            raise UnknownKeywordError(
                f"`data_dependent_alibi_kwargs` contains {unknown}; it takes {sorted(taken)} here."
            )


class DataDependentAlibi(ScoreMod):
    """Bias by forget gates: `bias[h, i, j] = F_i - F_j` with `F_i = sum_{t <= i} scale * log sigmoid(W_h x_t + c_h)`.

    Bidirectional attention has a second set of gates with running sums R, and `bias[h, i, j] = R_j - R_i` for keys
    after the query. Gates of hidden tokens are 1.

    Args:
        dim: width D of the input.
        heads: number of query heads.
        causal: have one set of gates; False: have one for each direction.
        bias_init: initial c. At its default of 5, little is forgotten at first.
        post_log_scale: the scale.
    """

    needs = Needs.BIAS
    stage = Stage.BIAS
    reference: ClassVar = {
        "data_dependent_alibi.to_forget_gates.0.weight": "to_gates.weight",
        "data_dependent_alibi.to_forget_gates.0.bias": "to_gates.bias",
    }

    def __init__(
        self, dim: int, heads: int, causal: bool = True, bias_init: float = 5.0, post_log_scale: float = 1.0
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, heads=heads)
        self.heads, self.requires_causal, self.scale = heads, causal, post_log_scale
        self.directions = 1 if causal else 2
        self.to_gates = nn.Linear(dim, self.directions * heads)
        nn.init.constant_(self.to_gates.bias, bias_init)

    def bind_layer(self, x: Tensor, layer: LayerCall) -> BoundScore:
        _refuse_context(layer)
        of_queries, of_keys = self._sums(x, layer)

        def tile(inputs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
            later = layer.keys.index[columns] > layer.call.query.index[rows].unsqueeze(-1)
            return self._difference(inputs[0][..., rows], inputs[1][..., columns], later)

        return BoundScore(
            needs=self.needs,
            stage=self.stage,
            at=lambda: self._at(of_queries, of_keys, layer),
            dense=lambda: tile((of_queries, of_keys), slice(None), slice(None)),
            tiles=lambda height: Tiles(tile, (of_queries, of_keys)),
        )

    def _at(self, of_queries: Tensor, of_keys: Tensor, layer: LayerCall) -> ScoreFunction:
        """Return the pointwise form."""
        # queries and keys may share one tensor of sums, and a kernel cannot add up gradients of a tensor read twice
        q_forward, q_backward = of_queries[:, : self.heads], of_queries[:, self.heads :]
        k_forward, k_backward = of_keys[:, : self.heads].clone(), of_keys[:, self.heads :].clone()
        q_index, k_index = layer.call.query.index, layer.keys.index

        def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + q_forward[b, h, q] - k_forward[b, h, k]

        def at_both(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            earlier, later = q_forward[b, h, q] - k_forward[b, h, k], k_backward[b, h, k] - q_backward[b, h, q]
            return score + torch.where(k_index[k] > q_index[q], later, earlier)

        return at if self.requires_causal else at_both

    def _difference(self, of_queries: Tensor, of_keys: Tensor, later: Tensor) -> Tensor:
        """Return the bias `(b, h, i, j)` from running sums `(b, c, i)` and `(b, c, j)`.

        `later`, `(i, j)`, is True where the key comes after the query. The c channels are the heads, or, if attention
        is bidirectional, the heads for the forward direction and then those for the backward direction.
        """
        bias = of_queries.unsqueeze(-1) - of_keys.unsqueeze(-2)
        if self.requires_causal:
            return bias
        # the backward sums run in the same direction as the forward ones, so that the difference has the opposite sign
        forward, backward = bias.split(self.heads, dim=1)
        return torch.where(later, -backward, forward)

    def _sums(self, x: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor]:
        """Return the running sums of the new tokens `(b, c, n)` and of all keys `(b, c, j)`.

        The cache keeps the sum of every token and the total so far, from which the next pass goes on. Only differences
        of sums matter, so that any origin will do, as long as it is the same in every pass: 0 before the first token.
        """
        sums = self._log_gates(x, layer).cumsum(dim=-1)
        memory = sums.shape[-1] - x.shape[-2]
        of_memory, of_queries = sums[..., :memory], sums[..., memory:]
        if memory:
            # move the origin to the end of recurrent memory, whose sums become positive
            of_memory, of_queries = of_memory - of_memory[..., -1:], of_queries - of_memory[..., -1:]
        of_keys = of_queries
        if layer.entry is not None:
            total = layer.entry.get("forgotten")
            of_queries = of_queries if total is None else of_queries + total
            layer.entry.put("forgotten", of_queries[..., -1:])
            of_keys = layer.entry.grow("forget", of_queries.unsqueeze(-1)).squeeze(-1)
        return of_queries, torch.cat((of_memory, of_keys), dim=-1) if memory else of_keys

    def forward(self, x: Tensor) -> Tensor:
        """Return the bias between the tokens of a sequence, for use outside of an `Attention`.

        Args:
            x: `(b, n, D)`.

        Returns:
            `(b, h, n, n)`.
        """
        sums = self._gates_of(x).cumsum(dim=-1)
        index = torch.arange(x.shape[1], device=x.device)
        return self._difference(sums, sums, index > index.unsqueeze(-1))

    def _gates_of(self, x: Tensor) -> Tensor:
        """Return the logarithms of the gates `(b, c, n)` of tokens `(b, n, D)`."""
        # in float32: the bias is a small difference of running sums, which grow with the length of the sequence
        return F.logsigmoid(at_least_float32(self.to_gates(x))).transpose(-1, -2) * self.scale

    def _log_gates(self, x: Tensor, layer: LayerCall) -> Tensor:
        """Return the logarithms of the gates of recurrent memory and new tokens, `(b, c, m + n)`; 0 for hidden ones."""
        gates = self._gates_of(layer.with_memory(x))
        token_mask = layer.fresh_token_mask
        return gates if token_mask is None else gates.masked_fill(~token_mask.unsqueeze(1), 0.0)

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        return {"forget": (self.directions * self.heads, 1, torch.float32)}

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        _permute(state, f"{prefix}to_gates.weight", order, self.directions)
        _permute(state, f"{prefix}to_gates.bias", order, self.directions)


class PerRowDataDependentAlibi(ScoreMod):
    """Bias by gates of query and key: `bias[h, i, j] = sum_{j <= t < i} scale * log sigmoid(u_i . w_t / sqrt(a))`.

    Each query has gates of its own, where those of `DataDependentAlibi` are the same for all queries.

    Args:
        dim: width D of the input.
        heads: number of query heads.
        causal: must be True, since a query forgets only tokens before it.
        dim_head: width a of u and w.
        post_log_scale: the scale.

    Raises:
        ConfigError: if `causal` is False.
    """

    needs = Needs.BIAS
    stage = Stage.BIAS
    requires_causal = True
    whole_past = True
    reference: ClassVar = {"data_dependent_alibi.to_forget_gates.0.weight": "to_uw.weight"}

    def __init__(
        self, dim: int, heads: int, causal: bool = True, dim_head: int = 8, post_log_scale: float = 1.0
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, heads=heads, dim_head=dim_head)
        if not causal:
            raise ConfigError(
                "`data_dependent_alibi_per_row` looks back from each query, so it needs causal attention."
            )
        self.heads, self.dim_head, self.scale = heads, dim_head, post_log_scale
        self.to_uw = nn.Linear(dim, 2 * heads * dim_head, bias=False)

    def bind_layer(self, x: Tensor, layer: LayerCall) -> BoundScore:
        _refuse_context(layer)
        u, w = self.to_uw(layer.with_memory(x)).chunk(2, dim=-1)
        memory = w.shape[-2] - x.shape[-2]
        u, w = split_heads(u[:, memory:], self.heads), split_heads(w, self.heads)
        if layer.entry is not None:
            of_tokens = layer.entry.grow("forget", w[..., memory:, :])
            w = torch.cat((w[..., :memory, :], of_tokens), dim=-2) if memory else of_tokens

        def tile(inputs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
            # the sums run from each key to the query, and a tile contains all keys up to its queries
            keys = layer.keys
            counts = keys.index[columns] < layer.call.query.index[rows].unsqueeze(-1)
            if keys.token_mask is not None:
                counts = counts & keys.token_mask[:, None, None, columns]
            return self._sum_gates(inputs[0][..., rows, :], inputs[1][..., columns, :], counts)

        return BoundScore(
            needs=self.needs,
            stage=self.stage,
            dense=lambda: tile((u, w), slice(None), slice(None)),
            tiles=lambda height: Tiles(tile, (u, w)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the bias between the tokens of a sequence, for use outside of an `Attention`.

        Args:
            x: `(b, n, D)`.

        Returns:
            `(b, h, n, n)`.
        """
        u, w = (split_heads(t, self.heads) for t in self.to_uw(x).chunk(2, dim=-1))
        index = torch.arange(x.shape[1], device=x.device)
        return self._sum_gates(u, w, index < index.unsqueeze(-1))

    def _sum_gates(self, u: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        """Return the bias `(b, h, i, j)` of `u (b, h, i, a)` and `w (b, h, j, a)`.

        `counts`, broadcastable to `(b, 1, i, j)`, is True for keys whose gate takes part: earlier, and not hidden.
        """
        gates = F.logsigmoid(at_least_float32(u @ w.transpose(-1, -2)) * self.dim_head**-0.5) * self.scale
        # the sum over the keys from j on: a running sum from the right
        return gates.masked_fill(~counts, 0.0).flip(-1).cumsum(dim=-1).flip(-1)

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        return {"forget": (self.heads, self.dim_head)}

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        _permute(state, f"{prefix}to_uw.weight", order, 2)


def _refuse_context(layer: LayerCall) -> None:
    if layer.context is not None:
        raise InputError(
            "`data_dependent_alibi` works in self-attention only, so it takes no `context`; drop one of them."
        )


def _permute(state: dict[str, Tensor], key: str, order: Tensor, groups: int) -> None:
    """Reorder the heads in each of `groups` blocks of rows, in place."""
    if key in state:
        state[key] = torch.cat([reorder_heads(block, 0, order) for block in state[key].chunk(groups)])


def build(options: ForgettingOptions, shape: AttentionShape, **_: Any) -> ScoreMod:
    """Build the bias of one attention."""
    kwargs = options.data_dependent_alibi_kwargs
    if not options.data_dependent_alibi_per_row:
        return DataDependentAlibi(shape.dim, shape.heads, shape.causal, **kwargs)
    width = options.data_dependent_alibi_per_row_dim_head
    return PerRowDataDependentAlibi(shape.dim, shape.heads, shape.causal, width, **kwargs)


def _idle(options: ForgettingOptions) -> tuple[str, ...]:
    return () if options.data_dependent_alibi_per_row else ("data_dependent_alibi_per_row_dim_head",)


FEATURE = Feature(
    name="forgetting",
    group="attn",
    slot="score",
    options=ForgettingOptions,
    enabled=lambda options: options.data_dependent_alibi,
    build=build,
    summary="bias by forget gates that depend on the data",
    paper="2503.02130",
    self_attention_only=True,
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention,
            why="`cross_attn_data_dependent_alibi` has no meaning: forget gates act along one sequence, and in "
            "cross-attention queries and keys are two. Drop it.",
        ),
        Rule(
            when=lambda o: o.on("alibi") or o.on("t5_bias"),
            why="`attn_data_dependent_alibi` is a position bias like `alibi_pos_bias` and `rel_pos_bias`; keep one of "
            "them.",
        ),
    ),
    idle=_idle,
    examples=(
        {"attn_data_dependent_alibi": True},
        {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True},
        {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_kwargs": {"post_log_scale": 0.5}},
    ),
)
