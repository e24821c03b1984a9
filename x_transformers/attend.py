"""Weighing alone: queries, keys and values in, weighed values out. Helpers of attention under their public names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.backends.base import AttentionOutput, Request
from x_transformers.attention.base import After, AttentionShape, BoundScore, Needs, Part, RowContext, RowMod, Stage
from x_transformers.attention.call_adapter import without_hidden
from x_transformers.attention.core import Core
from x_transformers.attention.keys import sink, zero
from x_transformers.attention.qk import l2_distance
from x_transformers.attention.reference_weights import rename_parts
from x_transformers.attention.scores import cog, selective, talking_heads
from x_transformers.attention.scores.residual import ResidualScores
from x_transformers.attention.scores.selective import selective_attn
from x_transformers.attention.scores.softclamp import FEATURE as SOFTCLAMP
from x_transformers.attention.validation import bind_attn_bias, check_mask, check_pairs
from x_transformers.attention.weights import custom, gumbel, hard, inverted, sigmoid, topk
from x_transformers.attention.weights.delta import given_delta
from x_transformers.attention.weights.hard import log_prob_from_hard_attend
from x_transformers.attention.weights.topk import sparse_topk_attn
from x_transformers.errors import Faults, InputError, ShapeError
from x_transformers.forward_pass.call import Call, Carry, Deltas, LayerCall, Span
from x_transformers.forward_pass.documents import Documents, check_packing, documents_of, refuse_beside
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.masks.builder import causal_mask as create_causal_mask
from x_transformers.masks.builder import causal_mask as onnx_create_causal_mask
from x_transformers.masks.builder import visibility
from x_transformers.modules.state_dict import ReadsReference, rename
from x_transformers.ops import default_device, l1norm, one_hot_straight_through, qk_l2_dist_squared, softclamp, widest
from x_transformers.options.configured import Configured
from x_transformers.options.schema import Schema, unpackable
from x_transformers.options.signatures import parameter, show_keywords

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

SCHEMA = Schema(
    (
        zero.FEATURE,
        sink.FEATURE,
        l2_distance.FEATURE,
        SOFTCLAMP,
        *talking_heads.FEATURES,
        cog.FEATURE,
        selective.FEATURE,
        sigmoid.FEATURE,
        topk.FEATURE,
        hard.FEATURE,
        gumbel.FEATURE,
        custom.FEATURE,
        inverted.FEATURE,
    )
)
"""What acts between queries, keys, values and the weighed values."""

NEED_HEADS = ("learned_sink", "pre_talking_heads", "post_talking_heads", "pre_scale_post_talking_heads")


class GivenAddend(RowMod):
    """`logits <- logits + fn(queries, logits)`, of masked logits; a `CoPE`, for example."""

    stage = Stage.CONTEXTUAL
    requires_causal = True

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, After | None]:
        return logits + self.fn(rows.q, logits).to(logits.dtype), None


class Attend(Configured, ReadsReference):
    """`softmax(scale * q k^T + bias) v` over what is seen, with whatever options add to it; no projections.

    Query head q reads key and value head `q // (h // g)`.

    Args:
        causal: a query sees only keys up to its own; the last query is the last key.
        heads: query heads h, for the options that have something for each head.
        scale: factor of `q k^T`; default `1 / sqrt(d)`.
        dropout: of the weights, in training.
        flash: False keeps scores and weights for the record; True demands a fused kernel, which keeps none; None
            takes the fastest backend that hosts the options.
        cope: function of the queries `(b, h, i, d)` and the masked logits `(b, h, i, j)` that gives what to add to
            them; a `CoPE`, for example. Causal only.
        sdp_kwargs: which of PyTorch's kernels may run: `enable_flash`, `enable_math`, ...
        qk_norm, onnxable: kept for old scripts; the softmax runs in float32 at least, and masks are comparisons of
            index ranges.
        flash_pack_seq: rows are packed: documents, told by `flash_pack_seq_kwargs` at every call, see only themselves,
            on every device and whatever `flash` says; with PyTorch's variable-length kernel where there is one.

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
        for feature in parsed.enabled() if flash_pack_seq else ():
            if feature.unpackable is not None:
                faults.add(unpackable(feature))
        if cope is not None and not causal:
            faults.add("`cope` counts the keys up to the query; it needs `causal = True`.")
        needy = [parsed.switch(feature) for feature in parsed.enabled() if feature.name in NEED_HEADS]
        if needy and heads is None:
            faults.add(f"{needy[0]} has something for each head; give `heads`.")
        faults.raise_if_any("Attend")
        self.causal, self.heads, self.scale, self.dropout = causal, heads, scale, dropout
        self.packed = flash_pack_seq
        self.switches = {feature.name: parsed.switch(feature) for feature in parsed.enabled()} | {"cope": "`cope`"}
        # no part of these reads the widths
        shape = AttentionShape(dim=0, heads=heads or 1, kv_heads=1, dim_head=0, value_dim_head=0, causal=causal)
        self.parts = nn.ModuleDict()
        for feature in parsed.enabled():
            with faults.catching():
                assert feature.build is not None
                self.parts[feature.name] = feature.build(parsed[feature.name], shape=shape)
        if cope is not None:
            self.parts["cope"] = GivenAddend(cope)
        self.residual = ResidualScores()
        because: dict[Needs, list[str]] = {Needs.DROPOUT: ["`dropout`"]} if dropout else {}
        for name, part in self.parts.items():
            need = Needs.SINK if name == "learned_sink" else getattr(part, "needs", Needs.NOTHING)
            because.setdefault(need, []).append(self.switches[name])
        with faults.catching():
            self.core = Core(
                because=because, scale=scale or 1.0, flash=flash, kernels=sdp_kwargs, packed=flash_pack_seq
            )
        faults.raise_if_any("Attend")

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
        """Weigh.

        Args:
            q: `(b, h, i, d)`.
            k: `(b, g, j, d)`, g a divisor of h.
            v: `(b, g, j, e)`.
            mask: bool, True where a key is seen: `(b, j)`, or `(h, i, j)` or `(b, h, i, j)`, each axis perhaps 1.
            attn_bias: broadcastable to `(b, h, i, j)`, added to the scaled scores.
            prev_attn: `(b, h, i, j)` logits of an earlier attention, added to the scores; one column more with a zero
                key.
            attn_delta: broadcastable to `(b, h, i, j)`, added to the weights, also of hidden keys.
            row_mask: `(b, i)` bool, the queries that others may know of, where queries have to do with each other.
            flash_pack_seq_kwargs: with `flash_pack_seq`, at every call: q is `(1, h, i, d)`, one document after the
                other, and a document of queries sees only the document of keys of the same number. `cu_seqlens_q`,
                `cu_seqlens_k`: `(t + 1,)` whole numbers, 0 and where documents end; `max_seqlen_q`, `max_seqlen_k`:
                the length of the longest one. Causality is right-aligned in each.
            causal: overrides the constructor's for this call.

        Returns:
            `(b, h, i, e)`, zeros for a query that sees nothing; and the record, empty where a fused kernel ran.

        Raises:
            InputError: if arguments contradict each other or the options.
            ShapeError: if one does not fit the others.
        """
        request, dtype = self._request(
            q, k, v, mask, attn_bias, prev_attn, attn_delta, row_mask, flash_pack_seq_kwargs, causal
        )
        request.capture = self.core.flash is False
        weighed = self._weigh(request, self.core)
        record = Intermediates(weighed.similarities, weighed.logits, weighed.weights)
        return weighed.out.to(dtype), record

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
        """`forward` by a fused kernel, whatever `flash` says; the record is empty.

        Raises:
            InputError: if no fused kernel hosts the options here.
        """
        request, dtype = self._request(q, k, v, mask, attn_bias, None, None, None, flash_pack_seq_kwargs, causal)
        return self._weigh(request, self.core.fused_alone).out.to(dtype), Intermediates()

    def _weigh(self, request: Request, weigh: Callable[[Request], AttentionOutput]) -> AttentionOutput:
        if request.plain_q is request.q:
            return weigh(request)
        # distances need float32, and autocast would narrow them again
        with torch.autocast(request.q.device.type, enabled=False):
            return weigh(request)

    def _request(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        attn_bias: Tensor | None,
        prev_attn: Tensor | None,
        attn_delta: Tensor | None,
        row_mask: Tensor | None,
        packs: Mapping[str, Any] | None,
        causal: bool | None,
    ) -> tuple[Request, torch.dtype]:
        """What the core is asked for, and the dtype of the result."""
        self._check(q, k, v)
        documents = self._documents(q, k, packs)
        if documents is not None:
            refuse_beside("flash_pack_seq_kwargs", mask=mask, row_mask=row_mask)
        causal = self._causality(causal, q.shape[2], k.shape[2], aligned=documents is None)
        layer = _layer(q, k, causal, mask, row_mask, documents)
        keys, biases = len(layer.keys), ()
        if attn_bias is not None:
            size = {"batch": q.shape[0], "heads": q.shape[1], "queries": q.shape[2], "keys": keys}
            attn_bias = check_pairs(attn_bias, "attn_bias", **size)
            biases = (bind_attn_bias(attn_bias, q.shape[2], keys),)
        prefix = 0
        if "zero_kv" in self.parts:
            prefix = 1
            k, v = self.parts["zero_kv"].extend(k, v, lambda t: t)  # type: ignore[operator]
        rows, slots = [], self._slots()
        if prev_attn is not None:
            previous = without_hidden(prev_attn, prefix + keys)
            layer.carry = Carry(scores={"a": (previous, prefix)})
            rows.append(self.residual)
        plain_q, dtype = q, v.dtype
        if "l2_distance" in self.parts:
            q, k = self.parts["l2_distance"](q, k)
            q, k, v = widest(q, k, v)
        scores: tuple[BoundScore, ...] = biases
        if "softclamp_logits" in self.parts:
            scores = (*biases, self.parts["softclamp_logits"].bind_layer(q, layer))  # type: ignore[operator]
        request = Request(
            q,
            k,
            v,
            plain_q.shape[-1] ** -0.5 if self.scale is None else self.scale,
            visibility(
                layer.call,
                layer.keys,
                causal=causal,
                # documents of queries and keys may differ in length, as those of a context do
                own=documents is None,
                window=None,
                prefix=prefix,
                documents=documents,
            ),
            scores,
            sink=self.parts["learned_sink"].logits if "learned_sink" in self.parts else None,  # type: ignore[arg-type]
            rows=(*slots.get("row", ()), *rows),
            weighting=next(iter(slots.get("weighting", ())), None),
            weights=(*slots.get("weights", ()), *given_delta(attn_delta)),
            plain_q=plain_q,
            layer=layer,
            dropout=self.dropout if self.training else 0.0,
        )
        return request, dtype

    def _slots(self) -> dict[str, list[Any]]:
        slots: dict[str, list[Any]] = {}
        for name, part in self.parts.items():
            slots.setdefault("row" if name == "cope" else SCHEMA.features[name].slot, []).append(part)
        return slots

    def _causality(self, causal: bool | None, queries: int, keys: int, *, aligned: bool) -> bool:
        """Whether this call is causal; `aligned`: the last query is the last key."""
        causal = self.causal if causal is None else causal
        parts = [(self.switches[name], part) for name, part in self.parts.items() if isinstance(part, Part)]
        for name, part in parts:
            if part.requires_causal and not causal:
                raise InputError(f"{name} was built for causal attention; `causal = False` makes no sense with it.")
            if causal and getattr(part, "across_queries", False):
                raise InputError(f"{name} normalises over all queries; it cannot be causal.")
        if causal and aligned and queries > keys:
            raise InputError(
                f"there are {queries} queries and {keys} keys; in causal attention the last query is the last key, so "
                "that the first ones would see nothing. Give as many keys, or `causal = False`."
            )
        return causal

    def _documents(self, q: Tensor, k: Tensor, given: Mapping[str, Any] | None) -> Documents | None:
        """The documents of a packed row."""
        name, queries, keys = "flash_pack_seq_kwargs", q.shape[2], k.shape[2]
        check_packing(given, packed=self.packed, cached=False, name=name, keyword="flash_pack_seq")
        if given is None:
            return None
        counting = next((self.switches[each] for each in ("cope", "selective") if each in self.parts), None)
        if counting is not None and queries != keys:
            raise InputError(
                f"there are {queries} queries and {keys} keys; {counting} reads in packed rows which key is a query's "
                "own, so that both must be the same tokens."
            )
        return documents_of(
            given, batch=q.shape[0], queries=queries, keys=None if counting is not None else keys, name=name
        )

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        if not q.ndim == k.ndim == v.ndim == 4:
            raise ShapeError(f"got {shapes}; they must be (b, h, i, d), (b, g, j, d) and (b, g, j, e).")
        fits = q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
        if not fits or q.shape[1] % max(k.shape[1], 1):
            raise ShapeError(
                f"got {shapes}; batches, keys and values must agree, queries and keys have one width, and the heads of "
                "queries be a multiple of those of keys."
            )
        if self.heads not in (None, q.shape[1]):
            raise ShapeError(f"q has shape {tuple(q.shape)}; this was built for `heads` = {self.heads}.")

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}head_attn_sink", f"{prefix}parts.learned_sink.logits")
        rename_parts(state, prefix, {f"parts.{name}": part for name, part in self._own_parts()}, "attend.")

    def _own_parts(self) -> list[tuple[str, Part]]:
        own = [(name, part.fn if isinstance(part, GivenAddend) else part) for name, part in self.parts.items()]
        named = [(f"{name}.fn" if name == "cope" else name, part) for name, part in own]
        return [(name, part) for name, part in named if isinstance(part, Part)]


def _layer(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, row_mask: Tensor | None, documents: Documents | None
) -> LayerCall:
    """One sublayer's call whose keys end with the queries; in packed rows, document by document."""
    batch, i, j = q.shape[0], q.shape[2], k.shape[2]
    live = own = pairs = None
    if mask is not None and mask.ndim == 2:
        live = check_mask(mask, batch, j, "mask")
    elif mask is not None:
        pairs = check_pairs(mask.bool(), "mask", batch=batch, heads=q.shape[1], queries=i, keys=j)
    if row_mask is not None:
        own = check_mask(row_mask, batch, i, "row_mask")
    index, places = torch.arange(j - i, j, device=q.device), torch.arange(j, device=q.device)
    slots = places[None] if documents is None or i != j else documents.places(j)
    query = Span(index, slots[:, j - i :], slots[:, j - i :], own)
    keys = Span(places, slots, slots, live)
    call = Call(query, query, causal, aligned=i == j, newest=i == 1, attn_mask=pairs)
    return LayerCall(call, keys, keys, carry=Carry(), deltas=Deltas())


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
