"""Forgetting attention: each token decides how much of what came before it is forgotten (2503.02130).

The bias of a key is the sum of the logarithms of the forget gates behind it, an ALiBi whose slope depends on the data.
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
from x_transformers.errors import ConfigError, InputError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.ops import at_least_float32, reorder_heads, split_heads
from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class ForgettingOptions:
    data_dependent_alibi: bool = opt(False, "bias by learned forget gates, one for each head and token")
    data_dependent_alibi_per_row: bool = opt(False, "gates depend on query and key; causal only")
    data_dependent_alibi_per_row_dim_head: int = opt(8, "width of a head of these queries and keys")
    data_dependent_alibi_kwargs: Mapping[str, Any] = opt(
        {}, "`post_log_scale`, factor of the bias (1.0); `bias_init`, initial gate logits (5.0, not with per row)"
    )

    def __post_init__(self) -> None:
        width = self.data_dependent_alibi_per_row_dim_head
        require(width >= 1, f"`data_dependent_alibi_per_row_dim_head` is {width}; it must be at least 1.")
        taken = {"post_log_scale"} if self.data_dependent_alibi_per_row else {"post_log_scale", "bias_init"}
        unknown = sorted(set(self.data_dependent_alibi_kwargs) - taken)
        require(not unknown, f"`data_dependent_alibi_kwargs` names {unknown}; it takes {sorted(taken)} here.")


class DataDependentAlibi(ScoreMod):
    """`bias[i, j] = F_i - F_j` with `F_i = sum_{t <= i} scale * log sigmoid(W x_t + c)`, apart for each head.

    Bidirectional attention has a second set of gates, and `bias[i, j] = R_j - R_i` for keys behind the query. Hidden
    tokens make nobody forget.

    Args:
        dim: width D of the input.
        heads: query heads.
        causal: one set of gates.
        bias_init: initial c.
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
        self.heads, self.requires_causal, self.scale = heads, causal, post_log_scale
        self.to_gates = nn.Linear(dim, heads if causal else 2 * heads)
        nn.init.constant_(self.to_gates.bias, bias_init)

    def bind_layer(self, x: Tensor, layer: LayerCall) -> BoundScore:
        _refuse_context(layer)
        own, every = self._sums(x, layer)

        def tile(inputs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
            behind = layer.keys.index[columns] > layer.call.query.index[rows].unsqueeze(-1)
            return self._between(inputs[0][..., rows], inputs[1][..., columns], behind)

        return BoundScore(
            needs=self.needs,
            stage=self.stage,
            at=lambda: self._at(own, every, layer),
            dense=lambda: tile((own, every), slice(None), slice(None)),
            tiles=lambda height: Tiles(tile, (own, every)),
        )

    def _at(self, own: Tensor, every: Tensor, layer: LayerCall) -> ScoreFunction:
        """The function of single scores."""
        # keys may be the queries themselves, and a kernel can give each tensor the gradient of one place only
        own_forward, own_backward = own[:, : self.heads], own[:, self.heads :]
        forward, backward = every[:, : self.heads].clone(), every[:, self.heads :].clone()
        of_q, of_k = layer.call.query.index, layer.keys.index

        def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + own_forward[b, h, q] - forward[b, h, k]

        def at_both(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            before, behind = own_forward[b, h, q] - forward[b, h, k], backward[b, h, k] - own_backward[b, h, q]
            return score + torch.where(of_k[k] > of_q[q], behind, before)

        return at if self.requires_causal else at_both

    def _between(self, own: Tensor, every: Tensor, behind: Tensor) -> Tensor:
        """`(b, h, i, j)` of running sums `(b, c, i)` and `(b, c, j)`; behind `(i, j)`: the key comes later."""
        bias = own.unsqueeze(-1) - every.unsqueeze(-2)
        if self.requires_causal:
            return bias
        forward, backward = bias.split(self.heads, dim=1)
        return torch.where(behind, -backward, forward)

    def _sums(self, x: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor]:
        """Running sums of the new tokens and of all keys, `(b, c, n)` and `(b, c, j)`; 0 before the first token."""
        sums = self._log_gates(x, layer).cumsum(dim=-1)
        memory = sums.shape[-1] - x.shape[-2]
        before, own = sums[..., :memory], sums[..., memory:]
        if memory:
            # recurrent memory ends where the first token begins
            before, own = before - before[..., -1:], own - before[..., -1:]
        every = own
        if layer.entry is not None:
            total = layer.entry.get("forgotten")
            own = own if total is None else own + total
            layer.entry.put("forgotten", own[..., -1:])
            every = layer.entry.grow("forget", own.unsqueeze(-1)).squeeze(-1)
        return own, torch.cat((before, every), dim=-1) if memory else every

    def forward(self, x: Tensor) -> Tensor:
        """The bias `(b, h, n, n)` between the tokens of `x (b, n, D)`, for use alone."""
        sums = self._gates_of(x).cumsum(dim=-1)
        index = torch.arange(x.shape[1], device=x.device)
        return self._between(sums, sums, index > index.unsqueeze(-1))

    def _gates_of(self, x: Tensor) -> Tensor:
        """`(b, c, n)` logarithms of the gates of `x (b, n, D)`."""
        return F.logsigmoid(at_least_float32(self.to_gates(x))).transpose(-1, -2) * self.scale

    def _log_gates(self, x: Tensor, layer: LayerCall) -> Tensor:
        """`(b, c, m + n)`, of recurrent memory and new tokens."""
        gates = self._gates_of(layer.behind_memory(x))
        live = layer.fresh_live
        return gates if live is None else gates.masked_fill(~live.unsqueeze(1), 0.0)

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        return {"forget": (self.to_gates.out_features, 1, torch.float32)}

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        _permute(state, f"{prefix}to_gates.weight", order, self.to_gates.out_features // self.heads)
        _permute(state, f"{prefix}to_gates.bias", order, self.to_gates.out_features // self.heads)


class PerRowDataDependentAlibi(ScoreMod):
    """`bias[i, j] = sum_{j <= t < i} scale * log sigmoid(u_i . w_t / sqrt(a))`: a query decides what it forgets.

    Args:
        dim: width D of the input.
        heads: query heads.
        causal: must be True, since a query forgets only what came before it.
        dim_head: width a of u and w.
        post_log_scale: the scale.

    Raises:
        ConfigError: if it is not to be causal.
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
        if not causal:
            raise ConfigError("`data_dependent_alibi_per_row` looks back from each query; it needs causal attention.")
        self.heads, self.dim_head, self.scale = heads, dim_head, post_log_scale
        self.to_uw = nn.Linear(dim, 2 * heads * dim_head, bias=False)

    def bind_layer(self, x: Tensor, layer: LayerCall) -> BoundScore:
        _refuse_context(layer)
        u, w = self.to_uw(layer.behind_memory(x)).chunk(2, dim=-1)
        memory = w.shape[-2] - x.shape[-2]
        u, w = split_heads(u[:, memory:], self.heads), split_heads(w, self.heads)
        if layer.entry is not None:
            every = layer.entry.grow("forget", w[..., memory:, :])
            w = torch.cat((w[..., :memory, :], every), dim=-2) if memory else every

        return BoundScore(needs=self.needs, stage=self.stage, dense=lambda: self._dense(u, w, layer))

    def forward(self, x: Tensor) -> Tensor:
        """The bias `(b, h, n, n)` between the tokens of `x (b, n, D)`, for use alone."""
        u, w = (split_heads(t, self.heads) for t in self.to_uw(x).chunk(2, dim=-1))
        index = torch.arange(x.shape[1], device=x.device)
        return self._between(u, w, index < index.unsqueeze(-1))

    def _dense(self, u: Tensor, w: Tensor, layer: LayerCall) -> Tensor:
        keys = layer.keys
        counts = keys.index < layer.call.query.index.unsqueeze(-1)
        if keys.live is not None:
            counts = counts & keys.live[:, None, None, :]
        return self._between(u, w, counts)

    def _between(self, u: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        """`(b, h, i, j)` of `u (b, h, i, a)` and `w (b, h, j, a)`, over the keys that count."""
        gates = F.logsigmoid(at_least_float32(u @ w.transpose(-1, -2)) * self.dim_head**-0.5) * self.scale
        return gates.masked_fill(~counts, 0.0).flip(-1).cumsum(dim=-1).flip(-1)

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        return {"forget": (self.heads, self.dim_head)}

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        _permute(state, f"{prefix}to_uw.weight", order, 2)


def _refuse_context(layer: LayerCall) -> None:
    if layer.context is not None:
        raise InputError("`data_dependent_alibi` forgets along the tokens themselves; it takes no `context`.")


def _permute(state: dict[str, Tensor], key: str, order: Tensor, groups: int) -> None:
    """Reorder the heads within each of `groups` blocks of rows."""
    if key in state:
        state[key] = torch.cat([reorder_heads(block, 0, order) for block in state[key].chunk(groups)])


def build(options: ForgettingOptions, shape: AttentionShape, **_: Any) -> ScoreMod:
    """The part for one attention."""
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
    summary="bias by learned forget gates",
    paper="2503.02130",
    self_attention_only=True,
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention,
            why="`cross_attn_data_dependent_alibi` would let a context forget tokens that it never had; drop it.",
        ),
        Rule(
            when=lambda o: o.on("alibi") or o.on("t5_bias"),
            why="`attn_data_dependent_alibi` is a position bias in place of `alibi_pos_bias` and `rel_pos_bias`; keep "
            "one of them.",
        ),
    ),
    idle=_idle,
    examples=(
        {"attn_data_dependent_alibi": True},
        {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True},
        {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_kwargs": {"post_log_scale": 0.5}},
    ),
)
