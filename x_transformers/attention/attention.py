"""Multi-head attention: project, normalise, rotate, cache, extend the keys, weigh, project (1706.03762)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.backends.base import AttentionOutput, Request, Situation
from x_transformers.attention.base import (
    AttentionShape,
    BoundScore,
    KeyMod,
    Needs,
    Part,
    QKNorm,
    QKTransform,
    RowMod,
    ScoreMod,
    Similarity,
    ValueContext,
    ValueMod,
    Weighting,
    WeightMod,
)
from x_transformers.attention.call_adapter import given_rotations, standalone_call
from x_transformers.attention.catalog import SCHEMA
from x_transformers.attention.clip import clip_factors, clip_heads
from x_transformers.attention.core import Core
from x_transformers.attention.keys.additional import join_additional
from x_transformers.attention.keys.sink import LearnedSink
from x_transformers.attention.latent import LatentKeysValues, join_sub_keys
from x_transformers.attention.output_projection import build_output
from x_transformers.attention.projections import Projections
from x_transformers.attention.qk.caller_rotations import Pair
from x_transformers.attention.reference_weights import translate
from x_transformers.attention.scores.residual import ResidualScores
from x_transformers.attention.validation import check_input
from x_transformers.attention.values.residual import ValueMix, mix_values
from x_transformers.attention.weights.delta import given_delta
from x_transformers.cache import Shape
from x_transformers.errors import ConfigError, Faults, InputError, ShapeError
from x_transformers.forward_pass.call import BranchOutput, Carry, Deltas, LayerCall, Span
from x_transformers.forward_pass.documents import Documents, check_packing, documents_of, refuse_beside
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.masks.builder import visibility
from x_transformers.modules.branch_function import BranchCost, BranchFunction
from x_transformers.modules.inference import Map, PreparesForInference, plain_map
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import merge_heads, split_heads, widest
from x_transformers.options.configured import Configured
from x_transformers.options.signatures import parameter, show_keywords

Kind = TypeVar("Kind", bound=nn.Module)


class Parts(nn.ModuleDict, Generic[Kind]):
    """The parts of one slot, by feature, in the order of the catalogue."""

    def __iter__(self) -> Iterator[Kind]:  # type: ignore[override]
        return iter(self._modules.values())  # type: ignore[arg-type]


Slot = Parts[Kind] | tuple[()]


def _sources(xk: Tensor, xv: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor]:
    """What keys and values are projected from, recurrent memory in front."""
    if layer.context is not None:
        xk = xv = layer.context
    if layer.kv_residual is not None:
        xk, xv = xk + layer.kv_residual, xv + layer.kv_residual
    if layer.memory is not None:
        mk, mv = (layer.memory, layer.memory) if layer.memory.ndim == 3 else layer.memory[-2:].unbind(0)
        xk, xv = torch.cat((mk, xk), dim=-2), torch.cat((mv, xv), dim=-2)
    return xk, xv


def _grow(name: str, t: Tensor, layer: LayerCall) -> Tensor:
    """Put what is new behind what is cached. Recurrent memory stays in front and is not kept."""
    if layer.entry is None:
        return t
    if layer.memory is None:
        return layer.entry.grow(name, t)
    m = layer.memory.shape[-2]
    return torch.cat((t[..., :m, :], layer.entry.grow(name, t[..., m:, :])), dim=-2)


class Attention(Configured, PreparesForInference, ReadsReference, BranchFunction):
    """`softmax(q k^T / sqrt(d)) v` over the tokens themselves or a context, with whatever options add to it.

    Args:
        dim: width D of the input.
        dim_head: width d of a head.
        dim_context: width of the context in cross-attention; default D.
        heads: query heads h.
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
        faults = Faults()
        given = {"dim_head": dim_head, "dim_context": dim_context, **options}
        parsed = SCHEMA.parse(given, faults)
        SCHEMA.check_choices(parsed, faults)
        SCHEMA.check_rules(parsed, parsed, faults)
        faults.raise_if_any("Attention")

        head, out = parsed["heads"], parsed["attention_output"]
        if heads < 1:
            raise ConfigError(f"`heads` is {heads}; it must be at least 1.")
        self.causal = causal
        self.shape = shape = AttentionShape(
            dim=dim,
            heads=heads,
            kv_heads=parsed["grouped_heads"].count(heads),
            dim_head=head.dim_head,
            value_dim_head=head.dim_head if head.value_dim_head is None else head.value_dim_head,
            causal=causal,
        )
        dropout = parsed["attention_dropout"]
        self.dropout, self.sublayer_dropout = dropout.dropout, dropout.sublayer_dropout
        self.max_attend_past = parsed["window"].max_attend_past
        self.features = tuple(feature.name for feature in parsed.enabled())
        self.packed = parsed["backend"].flash_pack_seq
        self.takes_views = head.qkv_receive_diff_residuals
        # set by a stack whose later layers read what this one leaves
        self.leaves_values = self.leaves_scores = False
        self.residual = ResidualScores()

        with faults.catching():
            self.dim_context = source = dim if dim_context is None else dim_context
            latent = parsed["latent"]
            self.subheads = latent.latent_rope_subheads
            self.unrotated_heads = head.unrotated_heads(heads, shape.kv_heads)
            if self.subheads is not None:
                self.unrotated_heads = heads - self.subheads * heads // shape.kv_heads, shape.kv_heads - self.subheads
            self.latent_q = nn.Linear(dim, latent.dim_latent_q, bias=False) if latent.use_latent_q else None
            self.latent_kv = None
            if latent.use_latent_kv:
                self.latent_kv = LatentKeysValues(shape, source, latent.dim_latent_kv, self.subheads or 0)
            self.projections = Projections(
                dim=latent.dim_latent_q if latent.use_latent_q else dim,
                dim_context=latent.dim_latent_kv if latent.use_latent_kv else source,
                heads=heads,
                key_heads=shape.kv_heads - (self.subheads or 0),
                kv_heads=shape.kv_heads,
                dim_head=shape.dim_head,
                value_dim_head=shape.value_dim_head,
            )
        self.qk_norms: Slot[QKNorm] = _build("qk_norm", parsed, shape, faults)
        self.scores: Slot[ScoreMod] = _build("score", parsed, shape, faults)
        self.keys: Slot[KeyMod] = _build("keys", parsed, shape, faults)
        self.metrics: Slot[Similarity] = _build("metric", parsed, shape, faults)
        sinks: Slot[LearnedSink] = _build("sink", parsed, shape, faults)
        self.sink = next(iter(sinks), None)
        self.rows: Slot[RowMod] = _build("row", parsed, shape, faults)
        self.weighting: Slot[Weighting] = _build("weighting", parsed, shape, faults)
        self.weights: Slot[WeightMod] = _build("weights", parsed, shape, faults)
        self.values: Slot[ValueMod] = _build("values", parsed, shape, faults)
        self.value_mix = ValueMix(shape) if parsed.on("value_mix") else None
        width = shape.value_dim_head
        for mod in self.values:
            width = mod.out_width(width)
        with faults.catching():
            self.out = build_output(shape, shape.heads * width, out, gated=parsed.on("on_attn"))
        with faults.catching():
            self.switches = {feature.name: parsed.switch(feature) for feature in parsed.enabled()}
            self.core = self._core(parsed["backend"], self.switches)
        faults.raise_if_any("Attention")

    def _core(self, options: Any, switches: Mapping[str, str]) -> Core:
        """The core for what the parts need. Messages name the keyword that switched each part on."""
        because: dict[Needs, list[str]] = {}
        for path, part in self.parts().items():
            if not isinstance(part, ValueMod):
                because.setdefault(part.needs, []).append(switches[path.split(".")[1]])  # type: ignore[attr-defined]
        if self.sink is not None:
            because[Needs.SINK] = [switches["learned_sink"]]
        if self.dropout > 0:
            because[Needs.DROPOUT] = ["`dropout`"]
        scale = self.shape.dim_head**-0.5
        for norm in self.qk_norms:
            scale = norm.scale if norm.scale is not None else scale
        return Core(
            because=because, scale=scale, flash=options.flash, kernels=options.attend_sdp_kwargs, packed=self.packed
        )

    # what other code reads

    @property
    def heads(self) -> int:
        return self.shape.heads

    @property
    def kv_heads(self) -> int:
        return self.shape.kv_heads

    @property
    def scale(self) -> float:
        return self.core.scale

    @property
    def to_q(self) -> nn.Module:
        return self.projections.q

    @property
    def to_k(self) -> nn.Module | None:
        return self.projections.k

    @property
    def to_v(self) -> nn.Module:
        return self.projections.v

    @property
    def to_out(self) -> nn.Module:
        return self.out

    def cache_streams(self, rotations: Sequence[QKTransform] = ()) -> dict[str, Shape]:
        """The streams that grow with the sequence: `{name: (heads, width)}`, under the stack's query/key transforms."""
        shape, width = self.shape, self.shape.dim_head
        for transform in rotations:
            width = transform.width(width)
        streams: dict[str, Shape] = {"k": (shape.kv_heads, width), "v": (shape.kv_heads, shape.value_dim_head)}
        if self.latent_kv is not None:
            streams = self.latent_kv.cache_streams()
            if self.value_mix is not None:
                streams["value_mix"] = (shape.kv_heads, 1)
        for part in self.parts().values():
            streams.update(part.cache_streams(self.shape))
        return streams

    @property
    def reach(self) -> int | None:
        """How many slots back this attention looks at all; None if it may need the whole past."""
        # what later layers read of this one's keys must stand at the same places for all of them
        shared = self.leaves_scores or (self.leaves_values and self.latent_kv is not None)
        whole = shared or any(part.whole_past for part in self.parts().values())
        return None if whole else self.max_attend_past

    def parts(self) -> dict[str, Part]:
        """The parts that may declare streams, entries of checkpoints and causality, by their path below this module."""
        slots: dict[str, Any] = {
            "scores": self.scores,
            "rows": self.rows,
            "weighting": self.weighting,
            "weights": self.weights,
            "values": self.values,
        }
        return {f"{slot}.{name}": part for slot, parts in slots.items() if parts for name, part in parts.items()}

    @property
    def requires_causal(self) -> list[str]:
        """The keywords that need causality at every call."""
        return [self.switches[path.split(".")[1]] for path, part in self.parts().items() if part.requires_causal]

    @property
    def across_queries(self) -> bool:
        """Whether what a query gets depends on the other queries."""
        return any(weighting.across_queries for weighting in self.weighting)

    def share_scores(self) -> None:
        """Leave the logits for later attentions.

        Raises:
            ConfigError: if a fused kernel is demanded, which hands out none.
        """
        if self.core.flash:
            raise ConfigError(
                "`flash = True` demands a fused kernel, which keeps its scores to itself, but residual attention hands "
                "them on; leave `flash` at None, or drop residual attention."
            )
        self.leaves_scores = True
        self.core.demand(Needs.SCORES)

    def check_causality(self, causal: bool, cached: bool = False) -> None:
        """Raise an `InputError` if the parts cannot do with this causality, or with a cache."""
        if not causal and self.requires_causal:
            raise InputError(
                f"{self.requires_causal[0]} was built for causal attention; `causal = False` makes no sense with it."
            )
        if (causal or cached) and self.across_queries:
            raise InputError(
                "`inverted_attention` normalises over all queries, so that it can be neither causal nor cached."
            )

    def muon_parameters(self) -> Iterator[Tensor]:
        """What Muon may orthogonalise: the value and output matrices (2502.16982)."""
        yield from self.projections.v.parameters()
        yield from self.out.parameters()

    def explain(
        self, situation: Situation, *, causal: bool, bias: ScoreMod | None, training: bool, seq_len: int, **_: Any
    ) -> BranchCost:
        """Return the backend that would run, the reason for it, and the cost of a token.

        Args:
            situation: device and dtype.
            causal: tokens see only the past.
            bias: a score modification that the stack adds.
            training: explain training, which needs dropout.
            seq_len: number of keys.
        """
        needs = self.core.needs if training else self.core.needs & ~Needs.DROPOUT
        needs |= Needs.NOTHING if bias is None else bias.needs
        if self.max_attend_past is not None:
            needs |= Needs.MASK
        elif self.packed:
            needs |= Needs.DOCUMENTS
        skips = causal or self.max_attend_past is not None
        width = max(self.shape.dim_head, self.shape.value_dim_head)
        chosen, why = self.core.choose(situation._replace(width=width, queries=seq_len, skips=skips), needs)
        seen = seq_len if not causal else (seq_len + 1) // 2
        seen = seen if self.max_attend_past is None else min(seen, self.max_attend_past + 1)
        flops = super().explain(situation).flops
        flops += 2 * seen * self.heads * (self.shape.dim_head + self.shape.value_dim_head)
        return BranchCost(chosen.name, why, flops)

    def qk_clip_(self, pre_softmax_attn: Tensor | Intermediates, tau: float = 100) -> None:
        """Shrink query and key weights in place, so that no logit of those given exceeds tau (2507.20534).

        A head whose largest logit is `m > tau` gets all its logits multiplied by `tau / m`. Query/key norms undo the
        change, except for a scale that they learn.

        Args:
            pre_softmax_attn: `(b, h, i, j)` logits, or the record that holds them.
            tau: the bound, > 0.

        Raises:
            InputError: if the record holds no logits, or tau is not positive.
        """
        logits = pre_softmax_attn
        if isinstance(logits, Intermediates):
            logits = logits.pre_softmax_attn
        if logits is None:
            raise InputError(
                "`qk_clip_` reads logits, and this record holds none, since a fused kernel or a cache made it; run the "
                "pass without a cache, with `return_intermediates = True` and `flash` at None or False."
            )
        if tau <= 0:
            raise InputError(f"`tau` is {tau}; it must be positive.")
        if logits.ndim != 4 or logits.shape[1] != self.heads:
            raise ShapeError(f"the logits have shape {tuple(logits.shape)}; they must be (b, {self.heads}, i, j).")
        if self.sink is not None:
            logits = logits[..., 1:]
        keys = (self.projections.k, None if self.latent_kv is None else self.latent_kv.sub_keys)
        clip_heads(self.projections.q, keys, clip_factors(logits, tau), self.kv_heads)

    def prepare(self) -> Map | None:
        """The output projection, if it is a plain linear map."""
        return plain_map(self.out)

    # the way of the data

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        """Attend as one sublayer of a pass.

        Args:
            x: `(b, n, D)`, normalised.
            layer: the keys, their positions, and what else this sublayer gets.

        Returns:
            `(b, n, Do)`, a record if scores or a cache were asked for, and what later sublayers may read.
        """
        call = layer.call
        # three views of the stream, where the residual connection makes them, are the inputs of q, k and v
        xq, xk, xv = (x, x, x) if x.ndim == 3 else x.unbind(0)
        q, k, v, raw, own_kv = self._queries_keys_values(xq, xk, xv, layer)
        prefix, shown = 0, None
        if self.keys or self.values or layer.additional is not None:
            k, v = self._extend(k, v, layer)
            prefix, shown = self._prefix(layer), self._shown(layer)
        dtype, plain_q = q.dtype, q
        for metric in self.metrics:
            q, k = metric(q, k)
        if not q.dtype == k.dtype == v.dtype:
            q, k, v = widest(q, k, v)
        visible = visibility(
            call,
            layer.keys,
            causal=self._is_causal(layer),
            own=layer.context is None,
            window=self.max_attend_past,
            prefix=prefix,
            shown=shown,
            documents=layer.documents,
        )
        request = Request(
            q,
            k,
            v,
            self.core.scale,
            visible,
            self._scores(xq, layer) if self.scores or layer.biases else (),
            sink=None if self.sink is None else self.sink.logits,
            rows=self._row_mods(layer) if self.rows or layer.carry.scores else (),
            weighting=next(iter(self.weighting)) if self.weighting else None,
            weights=self._weight_mods(layer) if self.weights or layer.deltas.attn is not None else (),
            plain_q=plain_q,
            layer=layer,
            dropout=self.dropout if self.training else 0.0,
            capture=call.capture.scores or self.leaves_scores,
            memo=call.memo,
        )
        if q.dtype == dtype:
            weighed = self.core(request)
        else:
            # parts that need float32 have widened q, k and v; autocast would narrow them again
            with torch.autocast(q.device.type, enabled=False):
                weighed = self.core(request)
        heads = weighed.out
        if self.values or layer.deltas.out is not None:
            heads = self._behind(heads, xq, raw, visible.dead, layer)
        merged, plain = merge_heads(heads if heads.dtype == dtype else heads.to(dtype)), self.ready
        out = self.out(merged) if plain is None else F.linear(merged, *plain)
        if self.sublayer_dropout:
            out = F.dropout(out, self.sublayer_dropout, self.training)
        if call.row_mask is not None:
            out = out.masked_fill(~call.row_mask.unsqueeze(-1), 0.0)
        carry = layer.carry
        if self.leaves_values or self.leaves_scores:
            carry = self._leave(raw, weighed, layer)
        return BranchOutput(out, self._record(weighed, raw, own_kv, layer), carry)

    def _record(
        self, weighed: AttentionOutput, raw: Tensor, own_kv: tuple[Tensor, Tensor] | None, layer: LayerCall
    ) -> Intermediates | None:
        """What the caller asked to see, and where the cache is."""
        call = layer.call
        if not (call.capture.scores or call.capture.hiddens):
            return None if layer.entry is None else Intermediates(layer_type=layer.kind, entry=layer.entry)
        return Intermediates(
            qk_similarities=weighed.similarities,
            pre_softmax_attn=weighed.logits,
            post_softmax_attn=weighed.weights,
            values=raw,
            layer_type=layer.kind,
            entry=layer.entry,
            own_kv=own_kv if call.aligned else None,
        )

    def _is_causal(self, layer: LayerCall) -> bool:
        if layer.causal is not None:
            return layer.causal
        return layer.call.causal if layer.context is None else self.causal

    def _leave(self, raw: Tensor, weighed: AttentionOutput, layer: LayerCall) -> Carry:
        """What later sublayers may read: the first values and the latest scores of this kind, if anybody will."""
        carry = layer.carry
        if self.leaves_values and layer.kind not in carry.values:
            carry = replace(carry, values={**carry.values, layer.kind: raw})
        if self.leaves_scores and weighed.plain is not None:
            carry = replace(carry, scores={**carry.scores, layer.kind: (weighed.plain, self._prefix(layer))})
        return carry

    def _queries_keys_values(
        self, xq: Tensor, xk: Tensor, xv: Tensor, layer: LayerCall
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Queries, keys and values of everything that is there, rotated; the values as they were projected; and keys
        and values without recurrent memory, unrotated.
        """
        own, entry = layer.context is None, layer.entry
        if not own and entry is not None and entry.get("k") is not None:
            # a context that an earlier pass has read
            k, v = entry.get("k"), entry.get("v")
            q = self.projections.queries(xq if self.latent_q is None else self.latent_q(xq), layer.deltas.q)
            for norm in self.qk_norms:
                q = norm.normalize_q(q)
            q, _ = self._rotate(q, k[..., :0, :], layer, layer.fresh.first(0))
            return q, k, v, v, None
        q, k, raw, span = self._project(xq, xk, xv, layer)
        for norm in self.qk_norms:
            q, k = norm.normalize_q(q), norm.normalize_k(k)
        v = self._mixed(raw, xq, layer) if layer.carry.values else raw
        for mod in self.values:
            v = mod.project(v, xq, layer)
        m = 0 if layer.memory is None else layer.memory.shape[-2]
        fresh = (k[..., m:, :], v[..., m:, :]) if m else (k, v)
        if layer.rotations:
            q, k = self._rotate(q, k, layer, span)
        if own and self.latent_kv is None:
            k, v = _grow("k", k, layer), _grow("v", v, layer)
        elif not own and entry is not None:
            entry.put("k", k)
            entry.put("v", v)
        return q, k, v, raw, fresh

    def _project(self, xq: Tensor, xk: Tensor, xv: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor, Tensor, Span]:
        """Queries, keys and values as they come from their maps, and where the keys stand."""
        projections = self.projections
        packed = projections.ready
        if packed is not None and xk is xq and self._reads_plainly(layer):
            return *projections.together(xq, packed), layer.fresh
        q = projections.queries(xq if self.latent_q is None else self.latent_q(xq), layer.deltas.q)
        xk, xv = _sources(xk, xv, layer)
        if self.latent_kv is None:
            k, v = projections.keys_values(xk, xv, layer.deltas.k, layer.deltas.v)
            assert k is not None
            return q, k, v, layer.fresh
        span, streams = layer.fresh, self.latent_kv(xk)
        if layer.context is None:
            # what is cached is projected and rotated anew in every pass
            streams, span = {name: _grow(name, t, layer) for name, t in streams.items()}, layer.keys
        latent = streams["latent"].squeeze(1)
        k, v = projections.keys_values(latent, latent, layer.deltas.k, layer.deltas.v)
        return q, join_sub_keys(k, streams), v, span

    def _reads_plainly(self, layer: LayerCall) -> bool:
        """Whether queries, keys and values are maps of the same tokens and of nothing else."""
        if self.latent_q is not None or self.latent_kv is not None or layer.context is not None:
            return False
        return layer.kv_residual is None and layer.memory is None and layer.deltas.none

    def _rotate(self, q: Tensor, k: Tensor, layer: LayerCall, keys: Span) -> tuple[Tensor, Tensor]:
        """Transform by positions: every head, or the last ones."""
        for transform in layer.rotations:
            tables = layer.call.tables(transform, keys)
            if self.unrotated_heads is None:
                q, k = transform.apply_tables(q, k, tables)
                continue
            still_q, still_k = self.unrotated_heads
            turned_q, turned_k = transform.apply_tables(q[:, still_q:], k[:, still_k:], tables)
            q, k = torch.cat((q[:, :still_q], turned_q), dim=1), torch.cat((k[:, :still_k], turned_k), dim=1)
        return q, k

    def _mixed(self, v: Tensor, x: Tensor, layer: LayerCall) -> Tensor:
        """Values with those of the first layer of this kind mixed in, if it left any."""
        first = layer.carry.values.get(layer.kind)
        if first is None:
            return v
        if self.value_mix is None:
            return mix_values(v, first, 0.5)
        if layer.context is not None:
            raise InputError(
                "`learned_value_residual_mix` weighs a token's own values, and in cross-attention tokens have none; "
                "drop it there."
            )
        share = self.value_mix(layer.behind_memory(x))
        # values of cached tokens are projected anew from their latents, and so need the weights of then
        return mix_values(v, first, share if self.latent_kv is None else _grow("value_mix", share, layer))

    def _behind(self, out: Tensor, x: Tensor, raw: Tensor, dead: Tensor | None, layer: LayerCall) -> Tensor:
        """What is done to the heads' outputs."""
        n = x.shape[-2]
        own = raw[..., raw.shape[-2] - n :, :]
        if self.latent_kv is not None and layer.context is None:
            own = raw.index_select(-2, layer.keys.find(layer.call.query.index))
        seen = ValueContext(x, own, dead, layer)
        for mod in self.values:
            out = out if mod.outer else mod.after(out, seen)
        if layer.deltas.out is not None:
            out = out + split_heads(layer.deltas.out, self.heads).to(out.dtype)
        for mod in self.values:
            out = mod.after(out, seen) if mod.outer else out
        return out

    def _prefix(self, layer: LayerCall) -> int:
        """How many keys stand in front that are no tokens."""
        given = 0 if layer.additional is None else layer.additional[0].shape[-2]
        return sum(mod.count for mod in self.keys) + given if self.keys else given

    def _shown(self, layer: LayerCall) -> Tensor | None:
        """`(b, P)` bool, which of them are seen; None if all are."""
        if layer.additional is None or layer.additional_mask is None:
            return None
        before = sum(mod.count for mod in self.keys if mod.nothing)
        behind = self._prefix(layer) - before - layer.additional_mask.shape[-1]
        return F.pad(layer.additional_mask, (before, behind), value=True)

    def _extend(self, k: Tensor, v: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor]:
        """Put the keys that are no tokens in front: nothing, given ones, learned ones; and ready the values."""
        for mod in self.keys:
            if not mod.nothing:
                k, v = mod.extend(k, v, self._normalize_memory)
        if layer.additional is not None:
            k, v = join_additional(k, v, *layer.additional, heads=self.heads)
        for mod in self.values:
            v = mod.weigh(v)
        for mod in self.keys:
            if mod.nothing:
                k, v = mod.extend(k, v, self._normalize_memory)
        return k, v

    def _normalize_memory(self, k: Tensor) -> Tensor:
        for norm in self.qk_norms:
            k = norm.normalize_memory(k)
        return k

    def _scores(self, x: Tensor, layer: LayerCall) -> tuple[BoundScore, ...]:
        """Score modifications of the stack and of this layer, in pipeline order."""
        bound: list[BoundScore] = [] if layer.context is not None else list(layer.biases)
        if not self.scores:
            return tuple(bound)
        bound += [mod.bind_layer(x, layer) for mod in self.scores]
        return tuple(sorted(bound, key=lambda score: score.stage))

    def _row_mods(self, layer: LayerCall) -> tuple[RowMod, ...]:
        """Row modifications of this layer, and the scores of the one before it."""
        if layer.carry.scores and layer.kind in layer.carry.scores:
            return (*self.rows, self.residual)
        return tuple(self.rows)

    def _weight_mods(self, layer: LayerCall) -> tuple[WeightMod, ...]:
        """Changes of the weights by this layer, and by the caller."""
        return (*self.weights, *given_delta(layer.deltas.attn))

    # the reference's call form

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
    ) -> Tensor | tuple[Tensor, Intermediates] | BranchOutput:
        """Attend outside of a stack.

        Args:
            x: `(b, n, D)`, or with `qkv_receive_diff_residuals` `(3, b, n, D)`. With a cache, the new tokens only.
            context: `(b, m, Dc)`: keys and values come from here.
            mask: `(b, n)` bool, valid tokens: hides keys (self-attention) and zeroes output rows. With a cache it
                covers cached and new tokens.
            context_mask: `(b, m)` bool, valid keys.
            attn_mask: `(i, j)`, `(h, i, j)` or `(b, h, i, j)` bool, True where a query may see a key.
            rel_pos: a bias module, for example `AlibiPositionalBias`.
            attn_bias: broadcastable to `(b, h, i, j)`, added to the logits.
            pos: `(n,)` or `(b, n)` positions for `rel_pos`.
            prev_attn: `(b, h, i, every key)` logits of an earlier attention, added to the scores.
            mem, mem_mask: `(b, l, D)` recurrent memory before x, and its `(b, l)` mask.
            return_intermediates: also return the record, which a later call takes as `cache`.
            causal: overrides the constructor for this call.
            rotary_pos_emb, context_rotary_pos_emb: angles `(1|b, N, r)` and a factor of them, what a
                `RotaryEmbedding` returns, for every key, recurrent memory and cached ones included; with a context,
                for the queries, and for the context.
            polar_pos_emb: angles `(1|b, N, d)` and a bias `(h, 1, d)`, what a `PolarEmbedding` returns.
            value_residual: `(b, g, new keys, e)` values of an earlier attention, to be mixed in.
            additional_key_values: keys `(b, g', A, d)` and values `(b, g', A, e)` that are used as they are.
            additional_key_value_mask: `(b, A)` bool, valid ones.
            kv_input_residual: broadcastable to the source of keys and values, and added to it.
            q_delta, k_delta, v_delta: added behind the projections, to their flat features.
            o_delta: `(b, n, h * e)`, added to the heads' outputs.
            attn_delta: broadcastable to `(b, h, i, every key)`, added to the weights, also of hidden keys.
            flash_pack_seq_kwargs: with `flash_pack_seq`, at every call without a cache: x is `(1, n, D)`, one document
                after the other, and a document sees only itself, or only the document of the same number of the
                context. `cu_seqlens_q`, `cu_seqlens_k`: `(t + 1,)` whole numbers, 0 and where documents end;
                `max_seqlen_q`, `max_seqlen_k`: the length of the longest one. Causality is right-aligned in each.

        Raises:
            InputError: if arguments contradict each other.
            ShapeError: if an argument does not fit x.
        """
        if layer is not None:
            return self.run(x, layer)
        xq = self._view_of_queries(x, context)
        causal = self.causal if causal is None else causal
        if polar_pos_emb is not None and self.unrotated_heads is not None:
            raise InputError("`polar_pos_emb` turns all heads alike; drop `rotate_num_heads`, or the sub-heads.")
        self.check_causality(causal, cached=cache is not None)
        documents = self._documents(xq, flash_pack_seq_kwargs, cache, context)
        if documents is not None:
            refuse_beside(
                "flash_pack_seq_kwargs",
                mask=mask,
                context_mask=context_mask,
                attn_mask=attn_mask,
                mem=mem,
                additional_key_values=additional_key_values,
            )
        layer = standalone_call(
            xq,
            causal=causal,
            heads=self.heads,
            dim_context=self.dim_context,
            front=sum(mod.count for mod in self.keys),
            keep=return_intermediates,
            shows_scores=return_intermediates and self.core.flash is not True,
            context=context,
            mask=mask,
            context_mask=context_mask,
            attn_mask=attn_mask,
            rel_pos=rel_pos,
            attn_bias=attn_bias,
            pos=pos,
            prev_attn=prev_attn,
            mem=mem,
            mem_mask=mem_mask,
            cache=cache,
            rotations=given_rotations(rotary_pos_emb, context_rotary_pos_emb, polar_pos_emb, context is not None),
            value_residual=value_residual,
            additional_key_values=additional_key_values,
            additional_key_value_mask=additional_key_value_mask,
            kv_input_residual=kv_input_residual,
            deltas=Deltas(q_delta, k_delta, v_delta, o_delta, attn_delta),
            documents=documents,
            window=self.max_attend_past,
        )
        out, record, _ = self.run(x, layer)
        if not return_intermediates:
            return out
        return out, record if record is not None else Intermediates(layer_type="a")

    def _view_of_queries(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The input that queries are made of, of one or of three."""
        if not self.takes_views:
            check_input(x, self.shape.dim)
            return x
        if context is not None:
            raise InputError("`qkv_receive_diff_residuals` gives keys and values their own input; drop `context`.")
        if x.ndim != 4 or x.shape[0] != 3:
            raise ShapeError(
                f"the input has shape {tuple(x.shape)}; `qkv_receive_diff_residuals` takes (3, batch, tokens, "
                f"{self.shape.dim}), the inputs of queries, keys and values."
            )
        check_input(x[0], self.shape.dim)
        return x[0]

    def _documents(self, x: Tensor, given: Any, cache: Any, context: Tensor | None) -> Documents | None:
        """The documents of a packed row."""
        name = "flash_pack_seq_kwargs"
        check_packing(given, packed=self.packed, cached=cache is not None, name=name, keyword="flash_pack_seq")
        if given is None:
            return None
        keys = None if context is None else context.shape[1]
        return documents_of(given, batch=x.shape[0], queries=x.shape[1], keys=keys, name=name)

    # checkpoints

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        values, has_keys = self.values, self.projections.k is not None
        translate(state, prefix, shape=self.shape, parts=self.parts(), values=values, has_keys=has_keys)


def _build(slot: str, parsed: Any, shape: AttentionShape, faults: Faults) -> Any:
    """The parts of one slot."""
    parts: dict[str, nn.Module] = {}
    for feature in parsed.enabled(slot):
        with faults.catching():
            assert feature.build is not None
            parts[feature.name] = feature.build(parsed[feature.name], shape=shape)
    # a tuple is read and gone through faster than an empty module, which eager decoding notices
    return Parts(parts) if parts else ()


show_keywords(
    Attention,
    [(SCHEMA, "")],
    [
        parameter("dim", positional=True),
        parameter("heads", 8),
        parameter("causal", False),
    ],
)
