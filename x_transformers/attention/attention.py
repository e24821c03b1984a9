"""Multi-head attention: project, normalize, rotate, cache, extend the keys, attend, project (1706.03762)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.backends.base import AttentionOutput, Situation
from x_transformers.attention.base import Needs, Part, ScoreMod, Slot, Weighting
from x_transformers.attention.build import build_parts
from x_transformers.attention.call_adapter import AttentionInputs, CallAdapter
from x_transformers.attention.catalog import SCHEMA
from x_transformers.attention.clip import checked_logits, clip_factors, clip_heads
from x_transformers.attention.heads import Heads
from x_transformers.attention.heavy import HeavyAttention
from x_transformers.attention.qk.caller_rotations import Pair
from x_transformers.attention.reference_weights import export, translate
from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import BranchOutput, Carry, Deltas, LayerCall
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.forward_pass.names import check_names, takes_no_more
from x_transformers.modules.branch_function import BranchCost, BranchFunction
from x_transformers.modules.inference import Map, PreparesForInference, plain_map
from x_transformers.modules.second_names import SecondName, SecondNames
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.configured import Configured
from x_transformers.options.signatures import parameter, show_keywords


class Attention(Configured, SecondNames, PreparesForInference, ReadsReference, CallAdapter, BranchFunction):
    """Multi-head attention `softmax(q k^T / sqrt(d)) v` of the tokens to themselves or to a context.

    Args:
        dim: width D of the input.
        dim_head: width d of a head.
        dim_context: width of the context in cross-attention; default D.
        heads: number of query heads h.
        causal: a token sees only tokens up to itself.

    Raises:
        ConfigError: listing every unknown keyword, bad value and conflict.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        dim_context: int | None = None,
        heads: int = 8,
        causal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        parts = build_parts(dim, heads, causal, {"dim_head": dim_head, "dim_context": dim_context, **options})
        self.shape, self.causal = parts.shape, causal
        self.dim_context, self.takes_views = parts.dim_context, parts.takes_views
        self.features, self.switches = parts.features, parts.switches
        (self.max_attend_past, self.max_attend_future), self.packed = parts.window, parts.packed
        self.unrotated_heads = parts.unrotated_heads
        self.sublayer_dropout = parts.sublayer_dropout
        # set by a stack whose later layers read them
        self.leaves_values = self.leaves_scores = False

        # the order of the state dict
        self.latent_q, self.latent_q_norm = parts.latent_q, parts.latent_q_norm
        self.latent_kv, self.projections = parts.latent_kv, parts.projections
        self.switch, self.qk_norms = parts.switch, parts.qk_norms
        self.scores, self.keys, self.metrics = parts.scores, parts.keys, parts.metrics
        self.sink, self.rows, self.weighting = parts.sink, parts.rows, parts.weighting
        self.weights, self.values, self.value_mix = parts.weights, parts.values, parts.value_mix
        self.out, self.attend = parts.out, parts.attend
        self.heavy = parts.heavy and HeavyAttention(dim, parts.heavy, Attention(dim, **parts.heavy.keywords))
        self.subsampling = parts.subsampling

    to_q = SecondName("projections.q")
    to_k = SecondName("projections.k")
    to_v = SecondName("projections.v")
    to_out = SecondName("out")
    to_latent_q = SecondName("latent_q")
    to_latent_kv = SecondName("latent_kv.project")
    to_rotateable_k = SecondName("latent_kv.sub_keys")

    # declarations

    def parts(self) -> dict[str, Part]:
        slots: dict[str, Any] = {
            "scores": self.scores,
            "rows": self.rows,
            "weighting": self.weighting,
            "weights": self.weights,
            "values": self.values,
        }
        return {f"{slot}.{name}": part for slot, parts in slots.items() if parts for name, part in parts.items()}

    @property
    def reach(self) -> int | None:
        """Number of earlier slots that this attention reads at most; None if it may read all of them."""
        # what later layers read of this one's keys must be at the same places for all of them
        shared = self.leaves_scores or (self.leaves_values and self.latent_kv is not None)
        whole = shared or any(part.whole_past for part in self.parts().values())
        return None if whole else self.max_attend_past

    @property
    def requires_causal(self) -> list[str]:
        """The keywords of parts that only work in causal passes."""
        return self.attend.requires_causal

    @property
    def across_queries(self) -> bool:
        """True if the output of a query depends on the other queries."""
        return bool(self.attend.across_queries)

    @property
    def keeps_documents_apart(self) -> bool:
        """True if the documents of packed rows do not see each other."""
        return self.packed

    def check_causality(self, causal: bool, cached: bool = False) -> None:
        self.attend.check_causality(causal, cached)

    def share_scores(self) -> None:
        """Leave the logits for later attentions.

        Raises:
            ConfigError: if a fused kernel is demanded, which returns none, or weights do not allow it.
        """
        _check_sums_of_scores(self.weighting, self.switches)
        self.attend.share_scores()
        self.leaves_scores = True

    def muon_parameters(self) -> list[Tensor]:
        """Return the value and output matrices, which Muon may orthogonalize (2502.16982)."""
        maps = (self.projections.v, self.out)
        heavy = [] if self.heavy is None else self.heavy.attention.muon_parameters()
        return [*(parameter for each in maps for parameter in each.parameters() if parameter.ndim > 1), *heavy]

    def explain(
        self,
        situation: Situation,
        *,
        causal: bool,
        bias: ScoreMod | None,
        training: bool,
        seq_len: int,
        reach: int | None = None,
        **_: Any,
    ) -> BranchCost:
        """Return the backend that would run, the reason for it, and the cost per token.

        Args:
            situation: device, dtype and mode.
            causal: of the passes.
            bias: the stack's score modification, or None.
            training: dropout is applied.
            seq_len: number of tokens.
            reach: number of queries whose decay with distance any backend can host; None without a decay.
        """
        shape = self.shape
        needs = _needs_of_pass(self, bias, training=training, decays=reach is not None and seq_len > reach)
        width = max(shape.dim_head, shape.value_dim_head)
        limited = bool(needs & Needs.MASK)
        situation = situation._replace(width=width, queries=seq_len, skips=causal or limited)
        backend, why = self.attend.backends.choose(situation, needs)
        seen = _seen_keys(seq_len, causal, self.max_attend_past, self.max_attend_future)
        flops = super().explain(situation).flops + 2 * seen * shape.heads * (shape.dim_head + shape.value_dim_head)
        cost = BranchCost(backend.name, why, flops)
        cost = cost if self.heavy is None else self.heavy.cost(cost, seq_len)
        return cost if self.switch is None else self.switch.cost(self, cost)

    def qk_clip_(self, pre_softmax_attn: Tensor | Intermediates, tau: float = 100) -> None:
        """Scale the maps to queries and keys down, in place, so that no given logit exceeds tau (2507.20534).

        The logits of a head whose largest one is `m > tau` are multiplied by `tau / m`. Query/key norms undo the
        change, except for a scale that they learn.

        Args:
            pre_softmax_attn: `(b, h, i, j)` logits, or the record that holds them.
            tau: the bound, > 0.

        Raises:
            InputError: if the record holds no logits, or tau is not positive.
        """
        logits = checked_logits(pre_softmax_attn, self.heads, tau)
        if self.sink is not None:
            # the sink's logits come first; no query and no key takes part in them
            logits = logits[..., 1:]
        clip_heads(self.projections, self.latent_kv, clip_factors(logits, tau))

    def prepare(self) -> Map | None:
        """Return the output projection, if it is a plain linear map."""
        return plain_map(self.out)

    # the path of the data

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        """Attend as one sublayer of a pass.

        Args:
            x: `(b, n, D)`, normalized; or `(3, b, n, D)`, the inputs of queries, keys and values.
            layer: the keys, their positions, and what else this sublayer reads.

        Returns:
            `(b, n, Do)`, a record if scores or a cache were requested, and values for later sublayers.
        """
        # a checkpoint wrapper runs this again, and must not append the same keys to the cache twice
        if layer.start is not None and layer.runs_again:
            layer = layer.restarted()
        call = layer.call
        xq, xk, xv = (x, x, x) if x.ndim == 3 else x.unbind(0)
        heads = self.project_heads(xq, xk, xv, layer)
        k, v, prefix, shown = heads.k, heads.v, 0, None
        if self.keys or self.values or layer.additional is not None:
            k, v, prefix, shown = self.extend_keys(k, v, layer)
        core = self.attend if self.subsampling is None else self.subsampling.around(self.attend)
        result, visible = core.run(
            heads.q, k, v, xq, layer, own=layer.context is None, prefix=prefix, shown=shown, decay=heads.decay
        )
        out = result.out
        if self.values or layer.deltas.out is not None:
            out = self.change_output(out, xq, heads.projected, visible.fully_masked_queries(call.memo), layer)
        if out.dtype != heads.q.dtype:
            out = out.to(heads.q.dtype)
        b, h, n, e = out.shape
        # the axes of a single token need not be exchanged
        out = out.reshape(b, 1, h * e) if n == 1 else out.transpose(1, 2).flatten(2)
        plain, chosen = self.ready, heads.chosen
        if chosen is not None:
            out = self.out(out, chosen.outputs)
        else:
            out = self.out(out) if plain is None else F.linear(out, *plain)
        if self.heavy is not None:
            out = self.heavy(xq, xk, xv, out, layer)
        if self.sublayer_dropout:
            out = F.dropout(out, self.sublayer_dropout, self.training)
        if call.row_mask is not None:
            out = out.masked_fill(~call.row_mask.unsqueeze(-1), 0.0)
        record, carry, capture = None, layer.carry, call.capture
        if layer.entry is not None or capture.scores or capture.hiddens or (chosen is not None and chosen.records):
            record = _record(result, heads, layer)
        if self.leaves_values or self.leaves_scores:
            left = heads.projected if self.leaves_values else None
            carry = _carry_on(left, result.plain if self.leaves_scores else None, prefix, layer)
        return BranchOutput(out, record, carry)

    @takes_no_more
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rel_pos: ScoreMod | None = None,
        attn_bias: Tensor | None = None,
        rotary_pos_emb: Pair | None = None,
        context_rotary_pos_emb: Pair | None = None,
        polar_pos_emb: tuple[Tensor, Tensor] | None = None,
        pos: Tensor | None = None,
        prev_attn: Tensor | None = None,
        mem: Tensor | None = None,
        mem_mask: Tensor | None = None,
        return_intermediates: bool = False,
        cache: Intermediates | None = None,
        value_residual: Tensor | None = None,
        additional_key_values: tuple[Tensor, Tensor] | None = None,
        additional_key_value_mask: Tensor | None = None,
        kv_input_residual: Tensor | None = None,
        q_delta: Tensor | None = None,
        k_delta: Tensor | None = None,
        v_delta: Tensor | None = None,
        o_delta: Tensor | None = None,
        attn_delta: Tensor | None = None,
        flash_pack_seq_kwargs: Mapping[str, Any] | None = None,
        causal: bool | None = None,
        *,
        layer: LayerCall | None = None,
        **unknown: Any,
    ) -> Tensor | tuple[Tensor, Intermediates | BranchOutput] | BranchOutput:
        """Attend outside of a stack; or, with `layer`, as a sublayer of one (see `run`).

        Args:
            x: `(b, n, D)`, or with `qkv_receive_diff_residuals` `(3, b, n, D)`. With a cache, the new tokens only.
            context: `(b, m, Dc)`: keys and values come from here.
            mask: `(b, n)` bool, valid tokens: hides keys (self-attention) and sets output rows to zero. With a cache it
                covers cached and new tokens.
            context_mask: `(b, m)` bool, valid keys.
            attn_mask: `(i, j)`, `(h, i, j)` or `(b, h, i, j)` bool, True where a query may see a key.
            rel_pos: a bias module, for example `AlibiPositionalBias`.
            attn_bias: broadcastable to `(b, h, i, j)`, added to the logits.
            pos: `(n,)` or `(b, n)` positions for `rel_pos`; for an `AlibiPositionalBias` also `(b, h, n)`.
            prev_attn: `(b, h, i, every key)` logits of an earlier attention, added to the scores.
            mem, mem_mask: `(b, l, D)` recurrent memory before x, and its `(b, l)` mask.
            return_intermediates: also return the record, which a later call takes as `cache`.
            causal: overrides the constructor for this call.
            rotary_pos_emb, context_rotary_pos_emb: angles `(1|b, N, r)` and a factor of them, as a
                `RotaryEmbedding` returns them, for every key, recurrent memory and cached ones included; with a
                context, for the queries, and for the context.
            polar_pos_emb: angles `(1|b, N, d)` and a bias `(h, 1, d)`, as a `PolarEmbedding` returns them.
            value_residual: `(b, g, new keys, e)` values of an earlier attention, which are mixed in.
            additional_key_values: keys `(b, g', A, d)` and values `(b, g', A, e)` that are used as they are.
            additional_key_value_mask: `(b, A)` bool, valid ones.
            kv_input_residual: broadcastable to the source of keys and values, and added to it.
            q_delta, k_delta, v_delta: added to the flat features of the projections.
            o_delta: `(b, n, h * e)`, added to the heads' outputs.
            attn_delta: broadcastable to `(b, h, i, every key)`, added to the weights, also of hidden keys.
            flash_pack_seq_kwargs: with `flash_pack_seq`, at every call without a cache: x is `(1, n, D)`, one document
                after the other, and a document sees only itself, or only the document of the same number of the
                context. `cu_seqlens_q`, `cu_seqlens_k`: `(t + 1,)` whole numbers, 0 and the end of each document;
                `max_seqlen_q`, `max_seqlen_k`: the length of the longest one. Causality is right-aligned in each.
            layer: the call of a sublayer, instead of all other arguments.

        Returns:
            `(b, n, Do)`, and the record if `return_intermediates` is set; with `layer`, a `BranchOutput`, which then
            comes second.

        Raises:
            InputError: if arguments contradict each other.
            ShapeError: if an argument does not fit x.
        """
        if unknown:
            check_names(self, Attention.forward, unknown)
        if layer is not None:
            output = self.run(x, layer)
            return (output.out, output) if return_intermediates else output
        given = AttentionInputs(
            x=x,
            context=context,
            mask=mask,
            context_mask=context_mask,
            attn_mask=attn_mask,
            rel_pos=rel_pos,
            attn_bias=attn_bias,
            rotary_pos_emb=rotary_pos_emb,
            context_rotary_pos_emb=context_rotary_pos_emb,
            polar_pos_emb=polar_pos_emb,
            pos=pos,
            prev_attn=prev_attn,
            mem=mem,
            mem_mask=mem_mask,
            return_intermediates=return_intermediates,
            cache=cache,
            value_residual=value_residual,
            additional_key_values=additional_key_values,
            additional_key_value_mask=additional_key_value_mask,
            kv_input_residual=kv_input_residual,
            deltas=Deltas(q_delta, k_delta, v_delta, o_delta, attn_delta),
            flash_pack_seq_kwargs=flash_pack_seq_kwargs,
            causal=causal,
        )
        return self.run_call(given)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        translate(self, state, prefix)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        export(self, state, prefix)


def _check_sums_of_scores(weighting: Slot[Weighting], switches: Mapping[str, str]) -> None:
    """Raise a `ConfigError` if weights of sums of logits of several layers make no sense."""
    for name, part in weighting.items() if weighting else ():
        if not part.adds_earlier_scores:
            raise ConfigError(
                f"residual attention adds the logits of earlier layers, and weights of {switches[name]} do not depend "
                "on differences of logits only, as those of a softmax; drop one of them."
            )


def _carry_on(values: Tensor | None, scores: Tensor | None, prefix: int, layer: LayerCall) -> Carry:
    """Add what later layers read: the first values and the latest scores of this kind, if there are any."""
    carry, kind = layer.carry, layer.kind
    if values is not None and kind not in carry.values:
        carry = replace(carry, values={**carry.values, kind: values})
    if scores is not None:
        carry = replace(carry, scores={**carry.scores, kind: (scores, prefix)})
    return carry


def _record(result: AttentionOutput, heads: Heads, layer: LayerCall) -> Intermediates:
    """Return what the caller requested, and the entry of the cache."""
    capture = layer.call.capture
    if not (capture.scores or capture.hiddens):
        # without the call of `__init__`, which every layer pays at every token
        record = object.__new__(Intermediates)
        record.layer_type, record.entry = layer.kind, layer.entry
        if heads.chosen is not None:
            record.routing = heads.chosen.records
        return record
    record = Intermediates(
        qk_similarities=result.similarities,
        pre_softmax_attn=result.logits,
        post_softmax_attn=result.weights,
        values=heads.projected,
        layer_type=layer.kind,
        entry=layer.entry,
        own_kv=heads.fresh if layer.call.aligned else None,
        routing=() if heads.chosen is None else heads.chosen.records,
    )
    if result.on_demand is not None:
        record.defer(result.on_demand)
    return record


def _needs_of_pass(attention: Attention, bias: ScoreMod | None, *, training: bool, decays: bool) -> int:
    """Return what an attention requires of a backend, with a bias of the stack and perhaps a decay with distance."""
    core = attention.attend
    needs = core.needs if training else core.needs_in_evaluation
    if bias is not None:
        needs |= bias.needs
    if attention.max_attend_past is not None or attention.max_attend_future is not None:
        needs |= Needs.MASK
    elif attention.packed:
        needs |= Needs.DOCUMENTS
    return needs | Needs.DECAY if decays else needs


def _seen_keys(count: int, causal: bool, past: int | None, future: int | None) -> int:
    """Return the number of keys that a query sees on average; `past` and `future` bound those before and after it."""
    before = (count - 1) // 2
    after = 0 if causal else count - 1 - before
    before, after = (each if most is None else min(each, most) for each, most in ((before, past), (after, future)))
    return before + 1 + after


show_keywords(
    Attention,
    [(SCHEMA, "")],
    [
        parameter("dim", positional=True),
        parameter("heads", 8),
        parameter("causal", False),
    ],
)
