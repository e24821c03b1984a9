"""Multi-head attention: project, normalise, rotate, cache, extend the keys, weigh, project (1706.03762)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attend import Core
from x_transformers.attention.backends.base import Weighed
from x_transformers.attention.base import (
    AttentionShape,
    BoundScore,
    KeyMod,
    Needs,
    QKNorm,
    RowMod,
    ScoreMod,
    Stage,
    ValueMod,
    Weighting,
    WeightMod,
)
from x_transformers.attention.catalog import SCHEMA
from x_transformers.attention.keys.sink import LearnedSink
from x_transformers.attention.masks import visibility
from x_transformers.attention.projections import Projections
from x_transformers.cache import Entry, KVCache, Shape
from x_transformers.call import Call, Capture, Carry, LayerCall, Span
from x_transformers.errors import ConfigError, Faults, InputError, ShapeError
from x_transformers.intermediates import Intermediates
from x_transformers.loading import ReadsReference, rename
from x_transformers.ops import merge_heads
from x_transformers.options.configured import Configured
from x_transformers.options.signatures import parameter, show_keywords

Part = TypeVar("Part", bound=nn.Module)


class Parts(nn.ModuleDict, Generic[Part]):
    """The parts of one slot, by feature, in the order of the catalogue."""

    def __iter__(self) -> Iterator[Part]:  # type: ignore[override]
        return iter(self._modules.values())  # type: ignore[arg-type]


class Attention(Configured, ReadsReference):
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
        # set by a stack whose later layers read what this one leaves
        self.leaves_values = self.leaves_scores = False

        with faults.catching():
            self.projections = Projections(
                dim=dim,
                dim_context=dim if dim_context is None else dim_context,
                heads=heads,
                kv_heads=shape.kv_heads,
                dim_head=shape.dim_head,
                value_dim_head=shape.value_dim_head,
            )
        self.qk_norms: Parts[QKNorm] = _build("qk_norm", parsed, shape, faults)
        self.scores: Parts[ScoreMod] = _build("score", parsed, shape, faults)
        self.keys: Parts[KeyMod] = _build("keys", parsed, shape, faults)
        sinks: Parts[LearnedSink] = _build("sink", parsed, shape, faults)
        self.sink = next(iter(sinks), None)
        self.rows: Parts[RowMod] = _build("row", parsed, shape, faults)
        self.weighting: Parts[Weighting] = _build("weighting", parsed, shape, faults)
        self.weights: Parts[WeightMod] = _build("weights", parsed, shape, faults)
        self.values: Parts[ValueMod] = _build("values", parsed, shape, faults)
        self.out = _output(shape, dim if out.dim_out is None else out.dim_out, out, faults)
        with faults.catching():
            switches = {feature.name: parsed.switch(feature) for feature in parsed.enabled()}
            self.core = self._core(parsed["backend"], switches)
        faults.raise_if_any("Attention")

    def _core(self, options: Any, switches: Mapping[str, str]) -> Core:
        """The core for what the parts need. Messages name the keyword that switched each part on."""
        because: dict[Needs, list[str]] = {}
        groups: tuple[Parts[Any], ...] = (self.scores, self.rows, self.weighting, self.weights)
        for name, part in (item for parts in groups for item in parts.items()):
            needs: Any = part.needs
            because.setdefault(needs, []).append(switches[name])
        if self.sink is not None:
            because[Needs.SINK] = [switches["learned_sink"]]
        if self.dropout > 0:
            because[Needs.DROPOUT] = ["`dropout`"]
        scale = self.shape.dim_head**-0.5
        for norm in self.qk_norms:
            scale = norm.scale if norm.scale is not None else scale
        return Core(because=because, scale=scale, flash=options.flash, kernels=options.attend_sdp_kwargs)

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
    def to_k(self) -> nn.Module:
        return self.projections.k

    @property
    def to_v(self) -> nn.Module:
        return self.projections.v

    @property
    def to_out(self) -> nn.Module:
        return self.out

    def cache_streams(self) -> dict[str, Shape]:
        """The streams that grow with the sequence: `{name: (heads, width)}`."""
        return {
            "k": (self.shape.kv_heads, self.shape.dim_head),
            "v": (self.shape.kv_heads, self.shape.value_dim_head),
        }

    # the way of the data

    def run(self, x: Tensor, layer: LayerCall) -> tuple[Tensor, Intermediates | None, Carry]:
        """Attend as one sublayer of a pass.

        Args:
            x: `(b, n, D)`, normalised.
            layer: the keys, their positions, and what else this sublayer gets.

        Returns:
            `(b, n, Do)`, a record if scores or a cache were asked for, and what later sublayers may read.
        """
        # three views of the stream, where the residual connection makes them, are the inputs of q, k and v
        xq, xk, xv = (x, x, x) if x.ndim == 3 else x.unbind(0)
        q = self.projections.queries(xq)
        k, v, raw = self._keys_values(xq, xk, xv, layer)
        for norm in self.qk_norms:
            q = norm.normalize_q(q)
        if layer.context is None:
            for transform, tables in layer.rotations:
                q, k = transform.apply_tables(q, k, tables)
            k, v = self._cached(k, v, layer)
        prefix = 0
        for mod in self.keys:
            k, v = mod.extend(k, v, self._normalize_memory)
            prefix += mod.count
        for mod in self.values:
            v = mod.weigh(v)

        call = layer.call
        visible = visibility(
            call,
            layer.keys,
            causal=call.causal if layer.context is None else self.causal,
            own=layer.context is None,
            window=self.max_attend_past,
            prefix=prefix,
        )
        weighed = self.core(
            q,
            k,
            v,
            visible,
            scores=self._scores(xq, layer),
            sink=None if self.sink is None else self.sink.logits,
            rows=tuple(self.rows),
            weighting=next(iter(self.weighting), None),
            weights=tuple(self.weights),
            layer=layer,
            dropout=self.dropout if self.training else 0.0,
            capture=call.capture.scores or self.leaves_scores,
            memo=call.memo,
        )
        out = weighed.out
        for mod in self.values:
            out = mod.after(out, xq, raw[..., raw.shape[-2] - xq.shape[-2] :, :], layer)
        weighed.out = out
        out = self.out(merge_heads(weighed.out))
        if self.sublayer_dropout:
            out = F.dropout(out, self.sublayer_dropout, self.training)
        if call.row_mask is not None:
            out = out.masked_fill(~call.row_mask.unsqueeze(-1), 0.0)
        carry = self._leave(raw, weighed, layer)
        if layer.entry is None and not call.capture.scores:
            return out, None, carry
        record = Intermediates(
            qk_similarities=weighed.similarities,
            pre_softmax_attn=weighed.logits,
            post_softmax_attn=weighed.weights,
            values=raw,
            layer_type=layer.kind,
            entry=layer.entry,
        )
        return out, record, carry

    def _leave(self, raw: Tensor, weighed: Weighed, layer: LayerCall) -> Carry:
        """What later sublayers may read: the first values and the latest scores of this kind, if anybody will."""
        carry = layer.carry
        if self.leaves_values and layer.kind not in carry.values:
            carry = replace(carry, values={**carry.values, layer.kind: raw})
        if self.leaves_scores and weighed.logits is not None:
            carry = replace(carry, scores={**carry.scores, layer.kind: weighed.logits})
        return carry

    def _keys_values(self, xq: Tensor, xk: Tensor, xv: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised keys, values, and the values as they were projected."""
        if layer.context is not None:
            xk = xv = layer.context
            held = None if layer.entry is None else (layer.entry.get("k"), layer.entry.get("v"))
            if held is not None and held[0] is not None and held[1] is not None:
                return held[0], held[1], held[1]
        elif layer.memory is not None:
            mk, mv = (layer.memory, layer.memory) if layer.memory.ndim == 3 else layer.memory.unbind(0)
            xk, xv = torch.cat((mk, xk), dim=-2), torch.cat((mv, xv), dim=-2)
        k, raw = self.projections.keys_values(xk, xv)
        for norm in self.qk_norms:
            k = norm.normalize_k(k)
        v = raw
        for mod in self.values:
            v = mod.project(v, xq, layer)
        if layer.context is not None and layer.entry is not None:
            layer.entry.put("k", k)
            layer.entry.put("v", v)
        return k, v, raw

    def _cached(self, k: Tensor, v: Tensor, layer: LayerCall) -> tuple[Tensor, Tensor]:
        """Put the new keys behind the cached ones. Recurrent memory stays in front and is not kept."""
        if layer.entry is None:
            return k, v
        m = 0 if layer.memory is None else layer.memory.shape[-2]
        k_all, v_all = layer.entry.grow("k", k[..., m:, :]), layer.entry.grow("v", v[..., m:, :])
        if m:
            k_all = torch.cat((k[..., :m, :], k_all), dim=-2)
            v_all = torch.cat((v[..., :m, :], v_all), dim=-2)
        return k_all, v_all

    def _normalize_memory(self, k: Tensor) -> Tensor:
        for norm in self.qk_norms:
            k = norm.normalize_memory(k)
        return k

    def _scores(self, x: Tensor, layer: LayerCall) -> tuple[BoundScore, ...]:
        """Score modifications of the stack and of this layer, in pipeline order."""
        bound: list[BoundScore] = [] if layer.context is not None else list(layer.biases)
        if not len(self.scores):
            return tuple(bound)
        bound += [mod.bind_layer(x, layer) for mod in self.scores]
        return tuple(sorted(bound, key=lambda score: score.stage))

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
        pos: Tensor | None = None,
        mem: Tensor | None = None,
        mem_mask: Tensor | None = None,
        return_intermediates: bool = False,
        cache: Intermediates | None = None,
        causal: bool | None = None,
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """Attend outside of a stack.

        Args:
            x: `(b, n, D)`. With a cache, the new tokens only.
            context: `(b, m, Dc)`: keys and values come from here.
            mask: `(b, n)` bool, valid tokens: hides keys (self-attention) and zeroes output rows. With a cache it
                covers cached and new tokens.
            context_mask: `(b, m)` bool, valid keys.
            attn_mask: `(i, j)`, `(h, i, j)` or `(b, h, i, j)` bool, True where a query may see a key.
            rel_pos: a bias module, for example `AlibiPositionalBias`.
            attn_bias: broadcastable to `(b, h, i, j)`, added to the logits.
            pos: `(n,)` or `(b, n)` positions for `rel_pos`.
            mem, mem_mask: `(b, l, D)` recurrent memory before x, and its `(b, l)` mask.
            return_intermediates: also return the record, which a later call takes as `cache`.
            causal: overrides the constructor for this call.

        Raises:
            ShapeError: if an argument does not fit x.
        """
        check_input(x, self.shape.dim)
        batch, n = x.shape[:2]
        causal = self.causal if causal is None else causal
        kv, entry = _standalone_cache(cache, n, return_intermediates and (causal or context is not None))
        index = torch.arange(kv.length - n, kv.length, device=x.device)
        places = torch.arange(kv.length, device=x.device)
        live = None if mask is None else check_mask(mask, batch, len(places), "mask")
        row = places.unsqueeze(0) if pos is None else (pos if pos.ndim == 2 else pos.unsqueeze(0))
        query = Span(index, places[None, -n:], row[:, -n:], None if live is None else live[:, -n:])
        keys = Span(places, places[None], row, live)
        if context is not None:
            m = context.shape[1]
            where = torch.arange(m, device=x.device)
            keys = Span(where, where[None], where[None], None)
            if context_mask is not None:
                keys = Span(where, where[None], where[None], check_mask(context_mask, batch, m, "context_mask"))
        elif context_mask is not None:
            keys = Span(keys.index, keys.slot, keys.pos, check_mask(context_mask, batch, len(keys), "context_mask"))
        if mem is not None:
            keys = keys.behind(mem.shape[1], mem_mask, batch)
        call = Call(
            query=query,
            keys=keys,
            causal=causal,
            aligned=kv.length == n,
            newest=n == 1,
            row_mask=query.live if cache is None else None,
            attn_mask=attn_mask,
            capture=Capture(scores=return_intermediates and cache is None and self.core.flash is not True),
        )
        biases = () if rel_pos is None else (rel_pos.bind(query, keys),)
        if attn_bias is not None:
            biases = (*biases, bind_attn_bias(attn_bias, len(query), len(keys)))
        layer = LayerCall(call=call, keys=keys, fresh=keys, biases=biases, memory=mem, context=context, entry=entry)
        out, record, _ = self.run(x, layer)
        if not return_intermediates:
            return out
        return out, record if record is not None else Intermediates(layer_type="a")

    # checkpoints

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        if f"{prefix}to_q.weight" not in state:
            return
        for old, new in _REFERENCE.items():
            rename(state, prefix + old, prefix + new)
        order = reference_head_order(self.shape.heads, self.shape.kv_heads)
        if order is None:
            return
        permute = _permute_heads(state, prefix, order, self.shape.heads)
        permute("projections.q.weight", 0)
        permute("out.weight", 1)
        permute("qk_norms.qk_norm.q_scale", 0)
        permute("qk_norms.qk_rmsnorm.q_norm.gamma", 0)
        permute("sink.logits", 0)


_REFERENCE = {
    "to_q.weight": "projections.q.weight",
    "to_k.weight": "projections.k.weight",
    "to_v.weight": "projections.v.weight",
    "to_out.weight": "out.weight",
    "qk_norm_q_scale": "qk_norms.qk_norm.q_scale",
    "qk_norm_k_scale": "qk_norms.qk_norm.k_scale",
    "q_rmsnorm.gamma": "qk_norms.qk_rmsnorm.q_norm.gamma",
    "k_rmsnorm.gamma": "qk_norms.qk_rmsnorm.k_norm.gamma",
    "mem_k": "keys.memory_kv.keys",
    "mem_v": "keys.memory_kv.values",
    "attend.head_attn_sink": "sink.logits",
}


def reference_head_order(heads: int, kv_heads: int) -> Tensor | None:
    """Where our query heads stand in the reference, which tiles (`h % g`); None if the orders are the same."""
    if kv_heads in (1, heads):
        return None
    return torch.arange(heads).reshape(heads // kv_heads, kv_heads).T.flatten()


def _permute_heads(state: dict[str, Any], prefix: str, order: Tensor, heads: int) -> Any:
    def permute(name: str, dim: int) -> None:
        key = prefix + name
        if key in state:
            tensor = state[key]
            width = tensor.shape[dim] // heads
            rows = (order[:, None] * width + torch.arange(width)).flatten().to(tensor.device)
            state[key] = tensor.index_select(dim, rows)

    return permute


def _build(slot: str, parsed: Any, shape: AttentionShape, faults: Faults) -> Parts[Any]:
    parts: dict[str, nn.Module] = {}
    for feature in parsed.enabled(slot):
        with faults.catching():
            assert feature.build is not None
            parts[feature.name] = feature.build(parsed[feature.name], shape=shape)
    return Parts(parts)


def _output(shape: AttentionShape, dim_out: int, options: Any, faults: Faults) -> nn.Module:
    """The output projection, or the identity where it would be useless and is not asked for."""
    width = shape.heads * shape.value_dim_head
    project = options.project_out
    if project is None:
        project = shape.heads > 1 or shape.dim != dim_out or width != dim_out
    if not project:
        if width != dim_out:
            faults.add(f"`project_out = False` leaves the output at width {width}, but {dim_out} is asked for.")
        if options.zero_init_output or options.output_proj_depth is not None:
            faults.add("there is no output projection to initialise; set `project_out = True`.")
        return nn.Identity()
    out = nn.Linear(width, dim_out, bias=False)
    if options.zero_init_output:
        nn.init.zeros_(out.weight)
    elif options.output_proj_depth is not None:
        nn.init.normal_(out.weight, std=(2 * width * options.output_proj_depth) ** -0.5)
    return out


def bind_attn_bias(bias: Tensor, queries: int, keys: int) -> Any:
    """The caller's additive bias as a bound score; columns it does not cover, on the left, get 0."""
    if bias.ndim < 2 or bias.ndim > 4 or bias.shape[-2] not in (1, queries) or bias.shape[-1] > keys:
        raise ShapeError(f"`attn_bias` has shape {tuple(bias.shape)}; it must broadcast to (b, h, {queries}, {keys}).")
    full = F.pad(bias, (keys - bias.shape[-1], 0))
    full = full[(None,) * (4 - full.ndim)].expand(-1, -1, queries, -1)

    def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + full[b if full.shape[0] > 1 else 0, h if full.shape[1] > 1 else 0, q, k]

    return BoundScore(needs=Needs.BIAS, stage=Stage.BIAS, at=at, dense=lambda: full)


def check_input(x: Tensor, dim: int) -> None:
    """Raise unless x is `(b, n, dim)` of a floating dtype."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ShapeError(f"the input has shape {tuple(x.shape)}; it must be (batch, tokens, {dim}).")
    if not x.is_floating_point():
        raise InputError(f"the input has dtype {x.dtype}; it must be floating. Embed tokens first.")


def check_mask(mask: Tensor, batch: int, length: int, name: str) -> Tensor:
    """A `(batch, length)` mask as bool.

    Raises:
        ShapeError: if it has another shape.
    """
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != length:
        raise ShapeError(
            f"`{name}` has shape {tuple(mask.shape)}; it must be ({batch}, {length}): one value for each row and each "
            "token, cached ones included."
        )
    return mask.bool().expand(batch, -1)


def _standalone_cache(cache: Intermediates | None, n: int, keep: bool) -> tuple[KVCache, Entry | None]:
    kv = KVCache()
    if cache is not None:
        if cache.entry is None:
            raise InputError("the record given as `cache` holds no keys; it must come from `return_intermediates`.")
        kv.entries = [cache.entry]
        stream = cache.entry.grown.get("k")
        kv.length = 0 if stream is None else stream.shape[-2]
        keep = True
    kv = kv.begin(n)
    return kv, kv.entry(0) if keep else None


show_keywords(
    Attention,
    [(SCHEMA, "")],
    [
        parameter("dim", positional=True),
        parameter("heads", 8),
        parameter("causal", False),
    ],
)
