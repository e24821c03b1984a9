"""The core of attention: `Attend` decides about causality, visibility and backend, and runs it (1706.03762).

Helpers of attention are here under their public names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from x_transformers.attention.attend_inputs import AttendInputs
from x_transformers.attention.backends.base import AttentionOutput, Backend, Request
from x_transformers.attention.backends.choice import BackendChoice
from x_transformers.attention.backends.on_demand import can_wait, scores_on_demand
from x_transformers.attention.base import (
    AttentionShape,
    Needs,
    Part,
    RowContext,
    RowMod,
    ScoreMod,
    Similarity,
    Stage,
    Visibility,
    WeightChange,
    Weighting,
    WeightMod,
)
from x_transformers.attention.keys import sink, zero
from x_transformers.attention.keys.sink import LearnedSink
from x_transformers.attention.qk import l2_distance
from x_transformers.attention.qk.decay import Decay
from x_transformers.attention.reference_weights import export_parts, rename_parts
from x_transformers.attention.scores import cog, selective, talking_heads
from x_transformers.attention.scores.residual import ResidualScores
from x_transformers.attention.scores.selective import selective_attn
from x_transformers.attention.scores.softclamp import FEATURE as SOFTCLAMP
from x_transformers.attention.validation import without_hidden
from x_transformers.attention.weights import clipped, custom, gumbel, hard, inverted, power, sigmoid, topk
from x_transformers.attention.weights.delta import given_delta
from x_transformers.attention.weights.hard import log_prob_from_hard_attend
from x_transformers.attention.weights.topk import sparse_topk_attn
from x_transformers.errors import ConfigError, Faults, InputError
from x_transformers.forward_pass.arguments import checked
from x_transformers.forward_pass.call import Capture, Carry, Deltas, LayerCall
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.masks.builder import causal_mask as create_causal_mask
from x_transformers.masks.builder import causal_mask as onnx_create_causal_mask
from x_transformers.masks.builder import spelled_out, visibility
from x_transformers.modules.conveniences import names_of
from x_transformers.modules.state_dict import ReadsReference, rename
from x_transformers.ops import default_device, l1norm, one_hot_straight_through, qk_l2_dist_squared, softclamp, widest
from x_transformers.options.configured import Configured
from x_transformers.options.schema import Options, Schema
from x_transformers.options.signatures import parameter, show_keywords

__getattr__ = names_of(__name__)

__all__ = [
    "Attend",
    "Intermediates",
    "create_causal_mask",
    "default_device",
    "l1norm",
    "log_prob_from_hard_attend",
    "one_hot_straight_through",
    "onnx_create_causal_mask",
    "qk_l2_dist_squared",
    "selective_attn",
    "softclamp",
    "sparse_topk_attn",
]

WEIGHTINGS = (
    sigmoid.FEATURE,
    clipped.FEATURE,
    power.FEATURE,
    topk.FEATURE,
    hard.FEATURE,
    gumbel.FEATURE,
    custom.FEATURE,
    inverted.FEATURE,
)
"""Features that compute or change the weights; the catalog of attention includes them."""

SCHEMA = Schema(
    (
        zero.FEATURE,
        sink.FEATURE,
        l2_distance.FEATURE,
        SOFTCLAMP,
        *talking_heads.FEATURES,
        cog.FEATURE,
        selective.FEATURE,
        *WEIGHTINGS,
    )
)
"""Options that act between queries, keys, values and the output."""

NEED_HEADS = ("learned_sink", "pre_talking_heads", "post_talking_heads", "pre_scale_post_talking_heads")


class GivenAddend(RowMod):
    """`logits <- logits + fn(queries, logits)`, of masked logits; a `CoPE`, for example."""

    stage = Stage.CONTEXTUAL
    requires_causal = True

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        return logits + self.fn(rows.q, logits).to(logits.dtype), None


@dataclass(eq=False)
class ScoreParts:
    """Parts between queries, keys, values and the output of attention, by slot.

    `Attend` reads them here without owning them: they are submodules of an `Attention`, or of `Attend.parts`. (Not
    frozen: an `InferenceView` replaces the modules in its copy.)

    Attributes:
        scores, rows, weighting, weights: what changes scores, rows of logits and weights.
        metrics: similarities that replace the dot product.
        sink: learned logits in the softmax, or None.
    """

    scores: Collection[ScoreMod] = ()
    metrics: Collection[Similarity] = ()
    sink: LearnedSink | None = None
    rows: Collection[RowMod] = ()
    weighting: Collection[Weighting] = ()
    weights: Collection[WeightMod] = ()


class Attend(Configured, ReadsReference):
    """`softmax(scale * q k^T + bias) v` over the visible keys, with optional changes; without projections.

    This is the core of every `Attention`: it decides about causality, visibility and the backend. Query head q uses key
    and value head `q // (h // g)`.

    Args:
        causal: a query sees only keys up to its own; the last query is aligned with the last key.
        heads: number of query heads h, for the options that have something for each head.
        scale: factor of `q k^T`; default `1 / sqrt(d)`.
        dropout: of the weights, in training.
        flash: False keeps scores and weights for the record; True demands a fused kernel, which keeps none; None
            chooses the fastest backend that hosts the options.
        cope: function of the queries `(b, h, i, d)` and the masked logits `(b, h, i, j)` that returns what is added to
            them; a `CoPE`, for example. Causal only.
        sdp_kwargs: which of PyTorch's kernels may run: `enable_flash`, `enable_math`, ...
        qk_norm, onnxable: kept for old scripts; the softmax runs in float32 at least, and masks are comparisons of
            index ranges.
        flash_pack_seq: rows are packed: documents, specified by `flash_pack_seq_kwargs` at every call, see only
            themselves, whatever `flash` is; with PyTorch's variable-length kernel where there is one.

    Raises:
        ConfigError: listing every unknown keyword, bad value and conflict.
    """

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        heads: int | None = None,
        scale: float | None = None,
        qk_norm: bool = False,
        flash: bool | None = False,
        cope: Callable[[Tensor, Tensor], Tensor] | None = None,
        onnxable: bool = False,
        sdp_kwargs: dict[str, bool] | None = None,
        flash_pack_seq: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        faults = Faults()
        parsed = SCHEMA.parse(options, faults)
        SCHEMA.check_choices(parsed, faults)
        SCHEMA.check_rules(parsed, parsed, faults)
        if not 0 <= dropout < 1:
            faults.add(f"`dropout` is {dropout}; it must lie in [0, 1).")
        if cope is not None and not causal:
            faults.add("`cope` counts the keys up to the query; it needs `causal = True`.")
        _check_features(parsed, faults, heads=heads, packed=flash_pack_seq)
        faults.raise_if_any("Attend")
        self.heads = heads
        # no part of these reads the widths
        shape = AttentionShape(dim=0, heads=heads or 1, kv_heads=1, dim_head=0, value_dim_head=0, causal=causal)
        self.parts = nn.ModuleDict()
        slots: dict[str, list[Any]] = {}
        for feature in parsed.parts():
            with faults.catching():
                assert feature.build is not None
                self.parts[feature.name] = part = feature.build(parsed[feature.name], shape=shape, others=parsed)
                slots.setdefault(feature.slot, []).append(part)
        self.switches = {feature.name: parsed.switch(feature) for feature in parsed.enabled()}
        if cope is not None:
            self.parts["cope"] = part = GivenAddend(cope)
            self.switches["cope"] = "`cope`"
            slots.setdefault("row", []).append(part)
        with faults.catching():
            self._assemble(
                _by_slot(slots),
                [(self.switches[name], part) for name, part in self.parts.items()],
                causal=causal,
                scale=scale,
                dropout=dropout,
                window=(None, None),
                backends=BackendChoice(flash=flash, kernels=sdp_kwargs, packed=flash_pack_seq),
                packed=flash_pack_seq,
            )
        faults.raise_if_any("Attend")

    @classmethod
    def of_parts(cls, slots: ScoreParts, switches: Iterable[tuple[str, nn.Module]], **settings: Any) -> Attend:
        """Build the core of an `Attention` from parts that belong to it; see `_assemble`.

        Raises:
            ConfigError: if a fused kernel is demanded and none can host the parts.
        """
        core = cls.__new__(cls)
        nn.Module.__init__(core)
        core.heads, core.parts, core.switches = None, nn.ModuleDict(), {}
        core._assemble(slots, switches, **settings)
        return core

    def _assemble(
        self,
        slots: ScoreParts,
        switches: Iterable[tuple[str, nn.Module]],
        *,
        causal: bool,
        scale: float | None,
        dropout: float,
        window: tuple[int | None, int | None],
        backends: BackendChoice,
        packed: bool,
    ) -> None:
        """Set everything that a pass reads.

        `switches` are the keywords that switched on the parts, each with its part; `causal` is for attention to a
        context and for calls that do not override it; `window` has the numbers of slots before and after a query.
        """
        self.slots, self.causal, self.scale, self.dropout = slots, causal, scale, dropout
        (self.window, self.ahead), self.packed, self.backends = window, packed, backends
        self.leaves_scores = False
        self._answer: tuple[Any, Any] = (None, None)
        self.residual = ResidualScores()
        named = list(switches)
        needed_by = _needed_by(named, dropout)
        self.requires_causal = [switch for switch, part in named if getattr(part, "requires_causal", False)]
        self.across_queries = [switch for switch, part in named if getattr(part, "across_queries", False)]
        self.needs = Needs.NOTHING
        for need in needed_by:
            self.needs |= need
        self.needs_in_evaluation = self.needs & ~Needs.DROPOUT
        backends.check(self.needs, needed_by)

    def share_scores(self) -> None:
        """Return the logits of every call, for later attentions.

        Raises:
            ConfigError: if a fused kernel is demanded.
        """
        if self.backends.flash:
            raise ConfigError(
                "`flash = True` demands a fused kernel, which does not return its scores, but residual attention "
                "passes them on; leave `flash` at None, or drop residual attention."
            )
        self.leaves_scores = True
        self.needs |= Needs.SCORES
        self.needs_in_evaluation |= Needs.SCORES

    def check_causality(self, causal: bool, cached: bool = False) -> None:
        """Check that the parts support a kind of pass.

        Args:
            causal: tokens see only tokens up to themselves.
            cached: the pass has a cache.

        Raises:
            InputError: if they do not.
        """
        if not causal and self.requires_causal:
            raise InputError(
                f"{self.requires_causal[0]} was built for causal attention; `causal = False` makes no sense with it."
            )
        if (causal or cached) and self.across_queries:
            raise InputError(
                f"{self.across_queries[0]} normalizes over all queries, so that it can be neither causal nor cached."
            )

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        layer: LayerCall,
        *,
        own: bool = True,
        prefix: int = 0,
        shown: Tensor | None = None,
        decay: Decay | None = None,
        only_fused: bool = False,
    ) -> tuple[AttentionOutput, Visibility]:
        """Attend within one sublayer, or one call of `forward`.

        Args:
            q: `(b, h, i, d)`.
            k: `(b, g, P + j, d)`.
            v: `(b, g, P + j, e)`.
            x: `(b, n, D)` the input of the sublayer, which some score modifications read.
            layer: positions and mask of the keys, causality, and what earlier layers and the caller add.
            own: the keys are the tokens' own; keys of a context have slots of their own.
            prefix: number P of keys before the first token.
            shown: `(b, P)` bool, which of those are visible; None for all.
            decay: of the scores with distance.
            only_fused: run a fused kernel, whatever `flash` is.

        Returns:
            `(b, h, i, e)`, zeros for a query that sees no key, with the scores if requested; and the visible keys.
        """
        call, parts, deltas, causal = layer.call, self.slots, layer.deltas, layer.causal
        if causal is None:
            causal = call.causal if layer.context is None else self.causal
        visible = visibility(
            call,
            layer.keys,
            causal=causal,
            own=own,
            window=self.window,
            ahead=self.ahead,
            prefix=prefix,
            shown=shown,
            documents=layer.documents,
            pairs=layer.context_attn_mask,
        )
        plain_q = q
        if decay is not None:
            q, k, decay = decay.at_once(q, k, prefix)
        for metric in parts.metrics:
            q, k = metric(q, k)
        # some parts compute queries, keys or values in float32, and kernels take one dtype only
        if not q.dtype == k.dtype == v.dtype:
            q, k, v = widest(q, k, v)
        scores, rows, weights = layer.biases, (), ()
        if parts.scores:
            bound = (*scores, *(mod.bind_layer(x, layer) for mod in parts.scores))
            # the sort is stable: within a stage, biases of the stack stay before those of the layer
            scores = tuple(sorted(bound, key=lambda score: score.stage))
        if parts.rows or layer.carry.scores:
            rows = _listed(parts.rows) + ((self.residual,) if layer.kind in layer.carry.scores else ())
        if parts.weights or deltas.attn is not None:
            weights = _listed(parts.weights) + given_delta(deltas.attn)
        dropout = self.dropout if self.training else 0.0
        later = call.capture.on_demand and not self.leaves_scores and not torch.compiler.is_compiling()
        request = Request(
            q,
            k,
            v,
            # the width before a similarity appended features to the queries
            plain_q.shape[-1] ** -0.5 if self.scale is None else self.scale,
            visible,
            call.memo,
            scores,
            None if parts.sink is None else parts.sink.logits,
            rows,
            next(iter(parts.weighting)) if parts.weighting else None,
            weights,
            plain_q,
            layer,
            dropout,
            self.leaves_scores or (call.capture.scores and not later),
            decay,
        )
        needs = _needs_of(request, self.needs if dropout > 0 else self.needs_in_evaluation)
        backend = (self.backends.only_fused if only_fused else self._backend)(request, needs)
        if later and not can_wait(request, backend, self.training):
            request, later = request._replace(capture=True), False
        if visible.documents is not None and not backend.reads_documents:
            request = _with_masked_documents(request)
        result = backend.attend(request) if q is plain_q else _attend_wide(backend, request)
        return result._replace(on_demand=scores_on_demand(request)) if later else result, visible

    def _backend(self, request: Request, needs: int) -> Backend:
        """Return the backend for a request. Eager decoding asks for every token, so the last answer is kept."""
        if torch.compiler.is_compiling():
            return self.backends.for_request(request, needs)
        q, k, v, hiding = request.q, request.k, request.v, request.visible.hiding
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        skips = hiding is not None and (hiding.order is not None or hiding.slots is not None)
        # all that `for_request` reads, except in a graph: with something left out, a later call could get a kernel that
        # cannot host it
        mode = learns, skips, torch._C._are_functorch_transforms_active(), forward_ad._current_level
        asked = (q.device, q.dtype, mode, q.shape[-2:], v.shape[-1], needs, self.backends.flash)
        if asked != self._answer[0]:
            self._answer = asked, self.backends.for_request(request, needs)
        return self._answer[1]

    @checked
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        prev_attn: Tensor | None = None,
        attn_delta: Tensor | None = None,
        row_mask: Tensor | None = None,
        flash_pack_seq_kwargs: Mapping[str, Any] | None = None,
        causal: bool | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Attend to the values.

        Args:
            q: `(b, h, i, d)`.
            k: `(b, g, j, d)`, g a divisor of h.
            v: `(b, g, j, e)`.
            mask: bool, True where a key is visible: `(b, j)`, or `(h, i, j)` or `(b, h, i, j)`, each axis perhaps 1.
            attn_bias: broadcastable to `(b, h, i, j)`, added to the scaled scores.
            prev_attn: `(b, h, i, j)` logits of an earlier attention, added to the scores; one column more with a zero
                key.
            attn_delta: broadcastable to `(b, h, i, j)`, added to the weights, also of hidden keys.
            row_mask: `(b, i)` bool, the queries that other queries may depend on, for options that couple them.
            flash_pack_seq_kwargs: with `flash_pack_seq`, at every call: q is `(1, h, i, d)`, one document after the
                other, and a document of queries sees only the document of keys of the same number. `cu_seqlens_q`,
                `cu_seqlens_k`: `(t + 1,)` whole numbers, 0 and the end of each document; `max_seqlen_q`,
                `max_seqlen_k`: the length of the longest one. Causality is right-aligned in each.
            causal: overrides the constructor's for this call.

        Returns:
            `(b, h, i, e)`, zeros for a query that sees no key; and the record, empty where a fused kernel ran.

        Raises:
            InputError: if arguments contradict each other or the options.
            ShapeError: if one does not fit the others.
        """
        given = AttendInputs(q, k, v, mask, attn_bias, row_mask, flash_pack_seq_kwargs, causal)
        layer = self._layer(given, Capture(scores=self.backends.flash is False))
        layer.deltas = Deltas(attn=attn_delta)
        if prev_attn is not None:
            prefix = int("zero_kv" in self.parts)
            layer.carry = Carry(scores={"a": (without_hidden(prev_attn, prefix + layer.keys.length), prefix)})
        result = _run_bare(self, q, k, v, layer)
        return result.out.to(v.dtype), Intermediates(result.similarities, result.logits, result.weights)

    def flash_attn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        flash_pack_seq_kwargs: Mapping[str, Any] | None = None,
        causal: bool | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Attend by a fused kernel, whatever `flash` is. For the arguments see `forward`; the record is empty.

        Raises:
            InputError: if no fused kernel hosts the options here.
        """
        layer = self._layer(AttendInputs(q, k, v, mask, attn_bias, None, flash_pack_seq_kwargs, causal), Capture())
        return _run_bare(self, q, k, v, layer, only_fused=True).out.to(v.dtype), Intermediates()

    def _layer(self, given: AttendInputs, capture: Capture) -> LayerCall:
        """Check the arguments of a call, and return the call of a sublayer that they mean."""
        given.check_shapes(self.heads)
        counting = next((self.switches[each] for each in ("cope", "selective") if each in self.parts), None)
        documents = given.documents(packed=self.packed, counting=counting)
        causal = self.causal if given.causal is None else given.causal
        self.check_causality(causal)
        return given.layer_call(causal, documents, capture)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}head_attn_sink", f"{prefix}parts.learned_sink.logits")
        rename_parts(state, prefix, {f"parts.{path}": part for path, part in _own_parts(self.parts)}, "attend.")

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}parts.learned_sink.logits", f"{prefix}head_attn_sink")
        export_parts(state, prefix, {f"parts.{path}": part for path, part in _own_parts(self.parts)}, "attend.")


def _run_bare(
    core: Attend, q: Tensor, k: Tensor, v: Tensor, layer: LayerCall, only_fused: bool = False
) -> AttentionOutput:
    """Attend without projections, perhaps with a zero key."""
    prefix = int("zero_kv" in core.parts)
    if prefix:
        k, v = core.parts["zero_kv"].extend(k, v, lambda t: t)  # type: ignore[operator]
    # documents of queries and keys may differ in length, as those of a context do
    return core.run(q, k, v, q, layer, own=layer.documents is None, prefix=prefix, only_fused=only_fused)[0]


def _check_features(options: Options, faults: Faults, *, heads: int | None, packed: bool) -> None:
    """Add a fault for each feature that mixes packed documents, and for the first one that lacks `heads`."""
    for sentence in options.unpackable() if packed else ():
        faults.add(sentence)
    needy = [options.switch(feature) for feature in options.enabled() if feature.name in NEED_HEADS]
    if needy and heads is None:
        faults.add(f"{needy[0]} has something for each head; give `heads`.")


def _own_parts(parts: nn.ModuleDict) -> Iterator[tuple[str, Part]]:
    """Yield the parts with entries of their own, by path."""
    for name, part in parts.items():
        own = part.fn if isinstance(part, GivenAddend) else part
        if isinstance(own, Part):
            yield f"{name}.fn" if own is not part else name, own


def _listed(parts: Iterable[Any]) -> tuple[Any, ...]:
    """Return modules as a tuple; the compilers of older versions of PyTorch make one from items only."""
    return tuple(part for part in parts)


def _attend_wide(backend: Backend, request: Request) -> AttentionOutput:
    """Attend without autocast: the parts that widened the queries need float32, which it would narrow again."""
    with torch.autocast(request.q.device.type, enabled=False):
        return backend.attend(request)


def _needs_of(request: Request, needs: int) -> int:
    """Return what a backend needs for a request: the needs of every call, and those of this one."""
    for part in (*request.scores, *request.rows, *request.weights):
        needs |= part.needs
    if request.capture:
        needs |= Needs.SCORES
    if request.visible.hiding is not None and not request.visible.is_causal:
        needs |= Needs.MASK
    if request.visible.documents is not None:
        needs |= Needs.DOCUMENTS
    if request.decay is not None:
        needs |= Needs.DECAY
    return needs


def _with_masked_documents(request: Request) -> Request:
    """Return the request with the documents of a packed row among the rules of its mask."""
    visible, i, j = request.visible, request.q.shape[-2], request.k.shape[-2]
    masked = request.memo.once(lambda: spelled_out(visible, i, j), "documents", visible)
    return request._replace(visible=masked)


def _by_slot(parts: Mapping[str, Sequence[Any]]) -> ScoreParts:
    """Return parts that are listed by the slots of their features."""
    names = {"scores": "score", "metrics": "metric", "rows": "row", "weighting": "weighting", "weights": "weights"}
    sink = next(iter(parts.get("sink", ())), None)
    return ScoreParts(sink=sink, **{name: tuple(parts.get(slot, ())) for name, slot in names.items()})


def _needed_by(switches: Iterable[tuple[str, nn.Module]], dropout: float) -> dict[int, list[str]]:
    """Return the keywords that each need comes from."""
    found: dict[int, list[str]] = {Needs.DROPOUT: ["`dropout`"]} if dropout > 0 else {}
    for switch, part in switches:
        need = Needs.SINK if isinstance(part, LearnedSink) else getattr(part, "needs", Needs.NOTHING)
        found.setdefault(need, []).append(switch)
    return found


show_keywords(
    Attend,
    [(SCHEMA, "")],
    [
        parameter("dropout", 0.0),
        parameter("causal", False),
        parameter("heads", None),
        parameter("scale", None),
        parameter("qk_norm", False),
        parameter("flash", False),
        parameter("cope", None),
        parameter("onnxable", False),
        parameter("sdp_kwargs", None),
        parameter("flash_pack_seq", False),
    ],
)
