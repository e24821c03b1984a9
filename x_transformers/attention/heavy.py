"""Conditional attention: besides attention of all tokens, a second one of the best tokens of a row (2303.09752)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from x_transformers.attention.base import BoundScore, Needs
from x_transformers.errors import ConfigError, InputError, StateDictError
from x_transformers.forward_pass.call import Call, Capture, Carry, Deltas, LayerCall, Memo, Span
from x_transformers.modules.branch_function import BranchCost
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import merge_heads
from x_transformers.options.schema import Feature, Options, Rule, Surroundings, at_least, opt, positive, require
from x_transformers.routing.best_tokens import BestTokens, Choice


@dataclass(frozen=True, kw_only=True)
class HeavyAttentionOptions:
    heavy_queries: int | float | None = opt(
        None,
        "number of tokens of a row, or their share, that attend in a second attention too; encoders only. None: none",
    )
    heavy_keys: int | float | None = opt(
        None, "number of tokens, or their share, that these attend to; default `heavy_queries`"
    )
    heavy_heads: int | None = opt(None, "number of heads of the second attention; default that of the first")
    heavy_dim_head: int | None = opt(None, "width of its heads; default that of the first")
    heavy_null: bool = opt(False, "add a learned vector to tokens that are not chosen to attend")
    heavy_ratio: float = opt(9 / 8, "factor of the numbers of tokens in the soft top-k that scores them")
    heavy_temperature: float = opt(0.03, "temperature of the soft top-k; the lower, the fewer tokens teach the routers")
    heavy_straight: bool = opt(
        True, "multiply outputs and values by 1 with the gradients of the scores; False: by the scores"
    )

    def __post_init__(self) -> None:
        at_least(1, heavy_heads=self.heavy_heads, heavy_dim_head=self.heavy_dim_head)
        for name in ("heavy_queries", "heavy_keys"):
            value = getattr(self, name)
            if isinstance(value, float):
                require(0 < value <= 1, f"`{name}` is {value}; a share must lie in (0, 1], a number must be whole.")
            else:
                at_least(1, **{name: value})
        positive(heavy_temperature=self.heavy_temperature)
        require(
            self.heavy_ratio >= 1,
            f"`heavy_ratio` is {self.heavy_ratio}; it must be at least 1, or chosen tokens would get a score near 0.",
        )

    def router(self, dim: int, number: int | float) -> BestTokens:
        """Build the choice of a number of tokens, or of a share."""
        return BestTokens(dim, number, self.heavy_ratio, self.heavy_temperature, self.heavy_straight)


SHARED = ("projection_bias", "qkv_clip", "qk_norm", "qk_rmsnorm", "softclamp_logits")
"""Features that the second attention has too."""

SHARED_KEYWORDS = ("dropout", "flash", "attend_sdp_kwargs", "dim_out", "zero_init_output", "output_proj_depth")
"""Further keywords that it has."""


class HeavyPlan(NamedTuple):
    """Second attention that the options of an attention ask for.

    Attributes:
        options: of this feature.
        keywords: of the second attention, besides the width of its input.
        heads: number of heads of the first one.
    """

    options: HeavyAttentionOptions
    keywords: Mapping[str, Any]
    heads: int


def plan_heavy(parsed: Options, heads: int, causal: bool) -> HeavyPlan | None:
    """Return what a second attention is built from; None if there is none.

    Args:
        parsed: options of the first attention.
        heads: number of its heads.
        causal: it is causal.

    Raises:
        ConfigError: if tokens must not see later ones.
    """
    if not parsed.on(FEATURE.name):
        return None
    if causal:
        raise ConfigError(why_not_causal(instead="Set `causal = False`, or drop it."))
    own: HeavyAttentionOptions = parsed[FEATURE.name]
    given = [parsed[name] for name in SHARED]
    keywords = {entry.name: getattr(options, entry.name) for options in given for entry in fields(options)}
    keywords |= {name: getattr(parsed[parsed.schema.owner[name].name], name) for name in SHARED_KEYWORDS}
    keywords |= {
        "heads": heads if own.heavy_heads is None else own.heavy_heads,
        "dim_head": parsed["heads"].dim_head if own.heavy_dim_head is None else own.heavy_dim_head,
        # the only key of a row whose tokens are all hidden, and of queries that need none of the others
        "num_mem_kv": 1,
        "project_out": True,
    }
    return HeavyPlan(own, keywords, heads)


def why_not_causal(instead: str) -> str:
    """Return the sentence that refuses causality."""
    return f"`heavy_queries` chooses the best tokens of a whole row, which a causal stack does not know yet. {instead}"


class HeavyAttention(ReadsReference):
    """Attention of the best tokens of a row, as queries, to the best ones, as keys, which is added to their outputs.

        T = topk(x . u)        S = topk(x . v)        y_t += l_t sum over s in S and a learned key of w_ts m_s W x_s

    for t in T, with weights w of an attention by itself. Queries and keys are chosen by a vector each, u and v. The
    factors l of outputs and m of values have the gradients of a soft top-k (`BestTokens`). Positions are those of the
    tokens. The learned key, with a learned value, is visible to every query. Only the chosen tokens
    are computed.

    Args:
        dim: width of the input.
        plan: number of tokens.
        attention: the second `Attention`.
    """

    def __init__(self, dim: int, plan: HeavyPlan, attention: Any) -> None:
        super().__init__()
        own = plan.options
        assert own.heavy_queries is not None
        self.heads, self.light_heads = attention.shape.heads, plan.heads
        self.queries = own.router(dim, own.heavy_queries)
        self.keys = own.router(dim, own.heavy_queries if own.heavy_keys is None else own.heavy_keys)
        self.attention: Any = attention
        width = attention.out.out_features
        self.null = nn.Parameter(torch.randn(width) * width**-0.5) if own.heavy_null else None

    def forward(self, xq: Tensor, xk: Tensor, xv: Tensor, out: Tensor, layer: LayerCall) -> Tensor:
        """Add the outputs of the chosen queries.

        Args:
            xq, xk, xv: `(b, n, D)` inputs of queries, keys and values of the first attention.
            out: `(b, n, D)` its output.
            layer: its call.

        Returns:
            `(b, n, D)`.

        Raises:
            InputError: if the call hides tokens from some of the others only, or attends to a context.
        """
        self._check(layer)
        mask, attention = layer.call.token_mask, self.attention
        queries, keys = self.queries(xq, mask), self.keys(xk, mask)
        own, xq = self._call(layer, queries, keys), queries.take(xq)
        heads = attention.project_heads(xq, keys.take(xk), keys.take(xv), own)
        v = heads.v * keys.scores[:, None, :, None].to(heads.v.dtype)
        k, v, prefix, shown = attention.extend_keys(heads.k, v, own)
        # the places of queries and keys are unrelated, as those of a context are
        result, _ = attention.attend.run(heads.q, k, v, xq, own, own=False, prefix=prefix, shown=shown)
        heavy = attention.out(merge_heads(result.out.to(heads.q.dtype)))
        added = queries.put(heavy * queries.scores.unsqueeze(-1), torch.zeros_like(out))
        if self.null is not None:
            added = torch.where(queries.chosen(out.shape[1]).unsqueeze(-1), added, self.null.to(out.dtype))
        return out + added

    def _check(self, layer: LayerCall) -> None:
        call = layer.call
        if layer.context is not None:
            raise InputError("`heavy_queries` chooses keys among the queries' own tokens; drop `context`.")
        if call.causal or layer.causal:
            raise InputError(why_not_causal(instead="Drop `causal`."))
        if call.attn_mask is not None:
            raise InputError(
                "`attn_mask` hides single pairs of tokens, and `heavy_queries` chooses among all tokens of a row; hide "
                "tokens by `mask`."
            )
        if layer.biases and self.heads != self.light_heads:
            raise InputError(
                f"biases of the scores are for the {self.light_heads} heads of the attention, and the second one has "
                f"`heavy_heads` = {self.heads}; leave it at None."
            )

    def _call(self, layer: LayerCall, queries: Choice, keys: Choice) -> LayerCall:
        """Return the call of the second attention: chosen tokens with their positions, and nothing of other layers."""
        call = layer.call
        span_q, span_k = (_chosen_span(call.query, choice) for choice in (queries, keys))
        inner = Call(query=span_q, keys=span_k, causal=False, aligned=False, capture=Capture(), memo=Memo())
        biases = tuple(_at_chosen(bias, layer, queries, keys, self.heads) for bias in layer.biases)
        return LayerCall(
            call=inner,
            keys=span_k,
            fresh=span_k,
            rotations=layer.rotations,
            biases=biases,
            carry=Carry(),
            deltas=Deltas(),
            causal=False,
        )

    def cost(self, cost: BranchCost, tokens: int) -> BranchCost:
        """Return the cost of both attentions, from one that counts all parameters for each token.

        Args:
            cost: per token of a row.
            tokens: number of tokens of the row.
        """
        tokens = max(tokens, 1)
        chosen = [min(router.count(tokens), tokens) for router in (self.queries, self.keys)]
        shape, maps = self.attention.shape, self.attention.projections
        sizes = [sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (maps, self.attention.out)]
        of_queries = maps.q.weight.numel() + sizes[1]
        of_keys = sizes[0] - maps.q.weight.numel()
        pairs = 2 * chosen[0] * (chosen[1] + 1) * shape.heads * shape.dim_head
        heavy = 2 * (of_queries * chosen[0] + of_keys * chosen[1] + pairs) // tokens
        routers = 4 * self.queries.weight.numel()
        words = f"{cost.why}; {chosen[0]} of {tokens} tokens attend to {chosen[1]} again"
        return cost._replace(why=words, flops=cost.flops - 2 * sum(sizes) + heavy + routers)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError(
            "the reference has no heavy attention; a model with `attn_heavy_queries` cannot be exported."
        )


def _chosen_span(tokens: Span, choice: Choice) -> Span:
    """Return the chosen tokens of a span, with their positions."""
    index = torch.arange(choice.places.shape[1], device=choice.places.device)
    pos = tokens.pos.expand(choice.places.shape[0], -1).gather(1, choice.places)
    return Span(index, index.unsqueeze(0), pos, choice.valid)


def _at_chosen(bias: BoundScore, layer: LayerCall, queries: Choice, keys: Choice, heads: int) -> BoundScore:
    """Return a bias of all queries and keys at the chosen ones."""
    b, i, j = queries.places.shape[0], queries.places.shape[1], keys.places.shape[1]
    # recurrent memory comes first
    before = layer.keys.length - layer.call.query.length

    def dense() -> Tensor:
        q, k = queries.places[:, None, :, None], keys.places[:, None, None, :] + before
        row, head = (torch.arange(count, device=q.device) for count in (b, heads))
        scores = layer.call.query.pos.new_zeros(b, heads, i, j, dtype=queries.scores.dtype)
        return bias.at(layer.call.memo)(scores, row[:, None, None, None], head[None, :, None, None], q, k)

    return BoundScore(needs=Needs.BIAS, stage=bias.stage, dense=dense)


def _other_heads(o: Options | Surroundings) -> bool:
    return o[FEATURE.name].heavy_heads is not None


_BIASED = {"alibi": "`alibi_pos_bias`", "t5_bias": "`rel_pos_bias`", "dynamic_bias": "`dynamic_pos_bias`"}
"""Features of a stack that have something for each head, and their keywords."""


def _biased(o: Options | Surroundings) -> list[str]:
    return [word for name, word in _BIASED.items() if o.on(name)]


FEATURE = Feature(
    name="heavy_attention",
    group="attn",
    slot="heavy",
    options=HeavyAttentionOptions,
    enabled=lambda options: options.heavy_queries is not None,
    summary="a second attention of the best tokens of a row",
    paper="2303.09752",
    self_attention_only=True,
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention,
            why="`heavy_queries` chooses queries and keys among the tokens of one row, and in cross-attention keys are "
            "in another; drop it there.",
        ),
        Rule(
            when=lambda o: _other_heads(o) and bool(_biased(o)),
            why=lambda o: f"{_biased(o)[0]} has a bias for each of the `heads`; leave `heavy_heads` at None.",
        ),
        Rule(
            when=lambda o: o.on("polar"),
            why="`polar_pos_emb` doubles the width of queries and keys, but the learned key of `heavy_queries` has no "
            "position and keeps its own. Use `rotary_pos_emb` instead.",
        ),
        Rule(
            when=lambda o: (
                o.on("rotary") and (o[FEATURE.name].heavy_dim_head or o["heads"].dim_head) < o["heads"].dim_head
            ),
            why="rotary embeddings are for heads of `dim_head` features, and those of `heavy_dim_head` are narrower; "
            "use at least as many.",
        ),
        Rule(
            when=lambda o: o.on("rotary") and _other_heads(o) and o["rotary"].rotate_num_heads is not None,
            why="the number of rotated heads is that of the first attention; leave `heavy_heads` at None.",
        ),
    ),
    unpackable="`heavy_queries` chooses among all tokens of a row",
    exempt={"precision": "a rounded score may choose another token", "export": "the reference has no heavy attention"},
    examples=(
        {
            "attn_heavy_queries": 3,
            "attn_heavy_keys": 4,
            "attn_heavy_heads": 2,
            "attn_heavy_dim_head": 12,
            "attn_heavy_null": True,
            "attn_heavy_temperature": 0.5,
        },
        {
            "attn_heavy_queries": 0.3,
            "attn_heavy_straight": False,
            "attn_heavy_ratio": 1.5,
            "attn_max_attend_past": 3,
            "attn_max_attend_future": 3,
        },
    ),
)
