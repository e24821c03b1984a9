"""Stacks of layers: `AttentionLayers` and its named forms, `Encoder`, `Decoder`, `CrossAttender`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from x_transformers.attention.attention import (
    Attention,
    bind_attn_bias,
    check_input,
    check_mask,
    reference_head_order,
)
from x_transformers.attention.base import QKTransform, ScoreMod
from x_transformers.attention.scores.base import DistanceBias
from x_transformers.cache import KVCache, Shape, StaticCache
from x_transformers.call import Call, Capture, Carry, LayerCall, Span
from x_transformers.errors import ConfigError, Faults, InputError, ShapeError, StateDictError
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.intermediates import Intermediates, LayerIntermediates
from x_transformers.layers.branch import Branch, Passed
from x_transformers.layers.branches.dropout import drop_context
from x_transformers.layers.branches.shift import ShiftTokens
from x_transformers.layers.catalog import ATTENTION, FEEDFORWARD, STACK
from x_transformers.layers.explain import ALWAYS_ON, Explanation, count, explain_sublayers, situation_of
from x_transformers.layers.plan import SCHEMAS, LayerPlan, StackPlan, make_plan
from x_transformers.layers.residuals.base import Place
from x_transformers.layers.residuals.plain import plain_residual
from x_transformers.layers.spans import lay_out
from x_transformers.loading import ReadsReference, rename
from x_transformers.norms import LayerNorm
from x_transformers.options.configured import Configured
from x_transformers.options.schema import Options
from x_transformers.options.signatures import parameter, show_keywords


@dataclass(frozen=True, eq=False)
class SharedParts:
    """The stack's position parts, bound to one key axis and shared by the layers that have it."""

    keys: Span
    fresh: Span
    rotations: tuple[Any, ...]
    biases: tuple[Any, ...]


class AttentionLayers(Configured, ReadsReference):
    """A stack of attention and feedforward layers over `(b, n, dim)`.

    Args:
        dim: width of the residual stream.
        depth: blocks.
        heads: query heads of every attention.
        causal: self-attention sees the past only.

    Raises:
        ConfigError: listing every unknown keyword, bad value and conflict of the call.
    """

    def __init__(
        self, dim: int, depth: int | None = None, heads: int = 8, causal: bool = False, **keywords: Any
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ConfigError(f"{type(self).__name__}: `dim` is {dim!r}; it must be a positive whole number.")
        plan = make_plan(type(self).__name__, {"depth": depth, "heads": heads, **keywords})
        options, structure = plan.options, plan.options["structure"]
        self.dim, self.depth, self.causal = dim, plan.sequence.depth, causal
        self.sequence = plan.sequence
        self.cross_attend, self.only_cross = structure.cross_attend, structure.only_cross
        self.layer_types = tuple(layer.kind for layer in plan.layers)
        self.features = tuple(feature.name for feature in options.enabled())

        faults = Faults()
        norm = _norm_of(plan)
        self.layers = nn.ModuleList()
        for index, layer in enumerate(plan.layers):
            schema, prefix = SCHEMAS[layer.kind]
            with faults.catching(lambda message, schema=schema, prefix=prefix: schema.in_full(message, prefix)):
                self.layers.append(self._branch(plan, layer, index, norm))
        self.rotary_pos_emb: QKTransform | None = None
        self.rel_pos: ScoreMod | None = None
        if plan.of("a"):
            with faults.catching():
                self._build_positions(plan)
        faults.raise_if_any(type(self).__name__)
        placement = options["norm_placement"]
        self.final_norm = norm(dim) if placement.final else None
        self.context_dropout = options["context_dropout"].cross_attn_tokens_dropout
        asked = options["stack"].disable_abs_pos_emb
        self.disable_abs_pos_emb = asked if asked is not None else options.on("rotary") or options.on("t5_bias")
        if options["stack"].verbose:
            for sentence in (*plan.warnings, *_unwise(self)):
                logger.warning(f"{type(self).__name__}: {sentence}")

    def _branch(self, plan: StackPlan, layer: LayerPlan, index: int, norm: Any) -> Branch:
        options, dim = plan.options, self.dim
        fn: Attention | FeedForward
        if layer.kind == "f":
            fn = FeedForward(dim, **layer.keywords)
        else:
            heads = options["structure"].heads
            fn = Attention(dim, heads=heads, causal=self.causal and layer.kind == "a", **layer.keywords)
        placement, factors = options["norm_placement"], options["residual_scale"]
        place = Place(dim=dim, index=index, kind=layer.kind, causal=self.causal, options=options)
        output_scale = factors.output_scale
        if layer.kind == "f" and options["macaron"].macaron:
            output_scale *= 0.5
        skip, shift = (
            _each(value, index)
            for value in (options["layer_dropout"].layer_dropout, options["shift_tokens"].shift_tokens)
        )
        return Branch(
            layer.kind,
            fn,
            _one(options, "residual", place) or plain_residual(place),
            reader=_one(options, "reader", place),
            norm=norm(dim) if placement.before else None,
            shift=ShiftTokens(shift, dim, self.causal) if shift else None,
            output_norm=norm(dim) if placement.sandwich_norm else None,
            stream_norm=norm(dim) if placement.behind else None,
            scale=_one(options, "branch scale", place),
            output_scale=output_scale,
            dropout=skip,
        )

    def _build_positions(self, plan: StackPlan) -> None:
        """The position parts that all self-attention layers share."""
        heads_of = [layer.options["heads"].dim_head for layer in plan.of("a")]
        if len(set(heads_of)) > 1:
            raise ConfigError("`attn_dim_head` differs between layers, but positions are shared; give one width.")
        surroundings = {
            "dim": self.dim,
            "heads": plan.options["structure"].heads,
            "dim_head": heads_of[0],
            "causal": self.causal,
            "kv_heads": {branch.attention.kv_heads for branch in self.branches("a")},
            "kwargs": plan.options["stack"].rel_pos_kwargs,
        }
        for slot, name in (("qk", "rotary_pos_emb"), ("score", "rel_pos")):
            for feature in plan.options.enabled(slot):
                assert feature.build is not None
                setattr(self, name, feature.build(plan.options[feature.name], **surroundings))

    # what other code reads

    def branches(self, *kinds: str) -> list[Branch]:
        """The sublayers of the given kinds, in order."""
        return [branch for branch in self.layers if branch.kind in kinds]  # type: ignore[union-attr, misc]

    @property
    def can_cache_kv(self) -> bool:
        """Whether decoding may keep keys and values; every causal stack can."""
        return self.causal

    @property
    def attn_heads(self) -> int:
        return next(iter(self.branches("a", "c"))).attention.heads

    @property
    def attn_dim_head(self) -> int:
        return next(iter(self.branches("a", "c"))).attention.shape.dim_head

    def cache_streams(self) -> list[dict[str, Shape]]:
        """The growing streams of each sublayer, in the order of execution."""
        branches = self.branches("a", "c", "f")
        run = [branches[index] for index in self.sequence.order]
        return [b.attention.cache_streams() if b.kind == "a" else {} for b in run]

    def static_cache(
        self, batch: int, capacity: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> StaticCache:
        """A cache of fixed buffers for `capacity` tokens."""
        self._refuse_cache_unless_causal()
        like = next(self.parameters())
        return StaticCache(self.cache_streams(), batch, capacity, device or like.device, dtype or like.dtype)

    def muon_parameters(self) -> Iterator[Tensor]:
        """What Muon may orthogonalise: value, output and feedforward matrices (2502.16982)."""
        for branch in self.branches("a", "c", "f"):
            if branch.kind == "f":
                yield from branch.feedforward.muon_parameters()
            else:
                yield from branch.attention.projections.v.parameters()
                yield from branch.attention.out.parameters()

    def explain(
        self,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        training: bool | None = None,
        seq_len: int = 1024,
    ) -> Explanation:
        """For each layer: the features that are on, the backend that would weigh and why, parameters and FLOPs.

        Args:
            device, dtype, training: the situation to explain; default the present one.
            seq_len: keys, for the FLOPs.
        """
        training = self.training if training is None else training
        words = {"a": "attention", "c": "cross-attention", "f": "feedforward"}
        sublayers = [(f"{i} {words[branch.kind]}", branch.fn) for i, branch in enumerate(self.branches(*"acf"))]
        situation = situation_of(self, device, dtype, training)
        rows = explain_sublayers(
            sublayers, causal=self.causal, bias=self.rel_pos, situation=situation, training=training, seq_len=seq_len
        )
        mode = "training" if training else "evaluation"
        title = f"{type(self).__name__}, {situation.device}, {situation.dtype}, {mode}, {seq_len} tokens"
        stack = tuple(feature for feature in self.features if feature not in ALWAYS_ON)
        return Explanation(title, stack, rows, count(self))

    # one pass

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        self_attn_kv_mask: Tensor | None = None,
        mems: Sequence[Tensor | None] | None = None,
        mem_masks: Sequence[Tensor | None] | None = None,
        seq_start_pos: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        input_not_include_cache: bool = False,
        cache_age: int | None = None,
        return_hiddens: bool = False,
        pos: Tensor | None = None,
        attn_bias: Tensor | None = None,
        causal: bool | None = None,
        *,
        places: Tensor | None = None,
        capture: Capture | None = None,
    ) -> Tensor | tuple[Tensor, LayerIntermediates]:
        """Run the stack.

        Args:
            x: `(b, n, D)`. With a cache: the whole sequence, of which the tokens that are not cached run, or the new
                tokens alone (`input_not_include_cache`).
            context: `(b, m, Dc)`, for stacks that cross-attend; with a filled cache it is not read again.
            mask: `(b, n)` bool, valid tokens; with a cache it covers cached and new ones.
            context_mask: `(b, m)` bool.
            attn_mask: `(i, j)`, `(h, i, j)` or `(b, h, i, j)` bool, True where a query may see a key.
            self_attn_kv_mask: as `mask`, for keys alone.
            mems: a `(b, l, D)` recurrent memory (or None) for each self-attention layer; mem_masks: `(b, l)` bool.
            seq_start_pos: `(b,)` tokens of left padding of each row.
            cache: what an earlier pass with `return_hiddens` returned, or a cache.
            cache_age: run only that many tokens of x; default all that are not cached.
            return_hiddens: also return the intermediates.
            pos: integer positions for encodings, of the new or of all tokens. They never change who sees whom.
            attn_bias: broadcastable to `(b, h, i, j)`.
            causal: overrides the constructor for this pass.
            places: `(b, all tokens so far)` bool, False for slots that are no tokens of their row (wrappers).
            capture: what to keep for the caller; default everything with `return_hiddens` and without a cache.

        Raises:
            InputError: if arguments do not fit the stack or each other.
        """
        check_input(x, self.dim)
        self._check_call(context, causal, cache, attn_mask)
        kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
        if kv is not None:
            x = _new_tokens(x, kv, input_not_include_cache, cache_age)
        batch, n = x.shape[:2]
        causal = self.causal if causal is None else causal
        if kv is not None:
            kv = kv.begin(n)
        elif return_hiddens and self.can_cache_kv and causal:
            kv = KVCache().begin(n)
        if capture is None:
            explicit = return_hiddens and cache is None and self._may_show_scores()
            capture = Capture(scores=explicit, hiddens=return_hiddens)

        query, keys = lay_out(
            batch,
            n,
            x.device,
            cache=kv,
            mask=mask,
            kv_mask=self_attn_kv_mask,
            seq_start_pos=seq_start_pos,
            places=places,
            pos=pos,
        )
        fresh = kv is None or kv.fresh
        call = Call(
            query=query,
            keys=keys,
            causal=causal,
            aligned=fresh,
            newest=n == 1 and (kv is None or not kv.is_static or kv.fresh),
            row_mask=mask.bool() if mask is not None and cache is None else None,
            attn_mask=attn_mask,
            attn_bias=attn_bias,
            capture=capture,
        )
        return self._run(x, call, kv, context, context_mask, mems, mem_masks, return_hiddens)

    def _run(
        self,
        x: Tensor,
        call: Call,
        kv: KVCache | None,
        context: Tensor | None,
        context_mask: Tensor | None,
        mems: Sequence[Tensor | None] | None,
        mem_masks: Sequence[Tensor | None] | None,
        return_hiddens: bool,
    ) -> Tensor | tuple[Tensor, LayerIntermediates]:
        seen = _Seen(call.capture)
        memories, memory_masks = list(mems or ()), list(mem_masks or ())
        shared: dict[int, SharedParts] = {}
        carry = Carry()
        branches = self.branches("a", "c", "f")
        for executed, index in enumerate(self.sequence.order):
            branch = branches[index]
            memory = memory_mask = None
            if branch.kind == "a":
                memory = memories.pop(0) if memories else None
                memory_mask = memory_masks.pop(0) if memory_masks else None
            entry = None if kv is None else kv.entry(executed)
            if branch.kind == "c":
                layer = self._cross_call(call, context, context_mask, entry)
            else:
                layer = self._self_call(call, memory, memory_mask, entry, shared, x)
            passed = branch(x, replace(layer, carry=carry))
            seen.add(branch.kind, x, passed)
            x, carry = passed.stream, passed.carry

        stream = x
        if self.final_norm is not None:
            x = self.final_norm(x)
        if not return_hiddens:
            return x
        return x, seen.intermediates(stream, x, kv)

    def _self_call(
        self,
        call: Call,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        entry: Any,
        shared: dict[int, SharedParts],
        x: Tensor,
    ) -> LayerCall:
        if memory is not None and memory.shape[1] == 0:
            memory = None
        rule = -1 if memory is None and memory_mask is None else id(memory_mask) if memory_mask is not None else 0
        rule = rule if memory is None else hash((rule, memory.shape[1]))
        if rule not in shared:
            shared[rule] = self._bind(call, memory, memory_mask, x.shape[0])
        parts = shared[rule]
        return LayerCall(
            call=call,
            keys=parts.keys,
            fresh=parts.fresh,
            rotations=parts.rotations,
            biases=parts.biases,
            memory=memory,
            entry=entry,
        )

    def _bind(self, call: Call, memory: Tensor | None, memory_mask: Tensor | None, batch: int) -> SharedParts:
        """Bind the stack's position parts to one key axis."""
        keys, fresh = call.keys, call.query
        if memory is not None:
            if memory.ndim != 3 or memory.shape[0] != batch or memory.shape[2] != self.dim:
                raise ShapeError(f"a memory has shape {tuple(memory.shape)}; it must be ({batch}, length, {self.dim}).")
            count = memory.shape[1]
            if memory_mask is not None:
                memory_mask = check_mask(memory_mask, batch, count, "mem_masks")
            keys, fresh = keys.behind(count, memory_mask, batch), fresh.behind(count, memory_mask, batch)
        rotations, biases = (), ()
        if self.rotary_pos_emb is not None:
            rotations = ((self.rotary_pos_emb, self.rotary_pos_emb.tables(call.query, fresh)),)
        if self.rel_pos is not None:
            biases = (self.rel_pos.bind(call.query, keys),)
        if call.attn_bias is not None:
            biases = (*biases, bind_attn_bias(call.attn_bias, len(call.query), len(keys)))
        return SharedParts(keys, fresh, rotations, biases)

    def _cross_call(self, call: Call, context: Tensor | None, context_mask: Tensor | None, entry: Any) -> LayerCall:
        held = None if entry is None else entry.get("k")
        source = context
        if held is None:
            assert context is not None
            if self.context_dropout and self.training:
                source, context_mask, _ = drop_context(context, context_mask, self.context_dropout)
        length = held.shape[-2] if held is not None else source.shape[1]  # type: ignore[union-attr]
        batch = held.shape[0] if held is not None else source.shape[0]  # type: ignore[union-attr]
        rule = ("context", length, id(context_mask))
        if rule not in call.memo:
            places = torch.arange(length, device=call.query.index.device)
            live = None if context_mask is None else check_mask(context_mask, batch, length, "context_mask")
            # the mask stays in the memo, so that its id stays its own
            call.memo[rule] = Span(places, places[None], places[None], live), context_mask
        keys = call.memo[rule][0]
        if source is None:
            source = call.query.index.new_empty(0)
        return LayerCall(call=call, keys=keys, fresh=keys, context=source, entry=entry)

    # checks

    def _check_call(self, context: Tensor | None, causal: bool | None, cache: Any, attn_mask: Tensor | None) -> None:
        if cache is not None:
            self._refuse_cache_unless_causal()
            if attn_mask is not None:
                raise InputError("`attn_mask` with a cache is not supported; mask keys with `self_attn_kv_mask`.")
            if isinstance(cache, LayerIntermediates) and cache.cache is None:
                raise InputError("the intermediates given as `cache` hold none; they must come from a causal pass.")
        filled = cache is not None and self.cross_attend and _holds_context(cache)
        if self.cross_attend and context is None and not filled:
            raise InputError("this stack cross-attends; pass `context`, (b, m, width).")
        if not self.cross_attend and context is not None:
            raise InputError("this stack does not cross-attend; set `cross_attend = True`, or drop `context`.")
        if context is not None and context.ndim != 3:
            raise ShapeError(f"`context` has shape {tuple(context.shape)}; it must be (b, m, width).")
        if causal is not None and causal != self.causal:
            if getattr(self.rel_pos, "causal", causal) != causal:
                raise InputError("the T5 bias was built for one direction; `causal` cannot be overridden with it.")
            if cache is not None:
                raise InputError("a cache needs the stack's own causality; drop `causal`.")

    def _refuse_cache_unless_causal(self) -> None:
        if not self.can_cache_kv:
            raise InputError("only a causal stack can use a cache; build a Decoder, or pass no `cache`.")

    def _may_show_scores(self) -> bool:
        return all(branch.attention.core.flash is not True for branch in self.branches("a", "c"))

    # checkpoints

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        is_reference = any(key.startswith((f"{prefix}layers.0.0.", f"{prefix}layers.0.1.")) for key in state)
        rename(state, f"{prefix}final_norm.g", f"{prefix}final_norm.gamma")
        if not is_reference or not isinstance(self.rel_pos, DistanceBias):
            return
        orders = {(b.attention.heads, b.attention.kv_heads) for b in self.branches("a")}
        permuted = [order for pair in orders if (order := reference_head_order(*pair)) is not None]
        if len(permuted) == 0:
            return
        if len(orders) > 1:
            raise StateDictError(
                "the position bias is shared by layers of different `attn_kv_heads`, whose heads stand in different "
                "orders in the reference; such a checkpoint cannot be read."
            )
        self.rel_pos.permute_heads(state, f"{prefix}rel_pos.", permuted[0])


class Encoder(AttentionLayers):
    """A bidirectional stack; see `AttentionLayers` for its arguments."""

    def __init__(self, **keywords: Any) -> None:
        _refuse_causal(keywords, "an Encoder is bidirectional", "a Decoder")
        super().__init__(causal=False, **_with_dim(self, keywords))


class Decoder(AttentionLayers):
    """A causal stack; see `AttentionLayers` for its arguments."""

    def __init__(self, **keywords: Any) -> None:
        _refuse_causal(keywords, "a Decoder is causal", "an Encoder")
        super().__init__(causal=True, **_with_dim(self, keywords))


class CrossAttender(AttentionLayers):
    """A stack of cross-attentions and feedforwards; see `AttentionLayers` for its arguments."""

    def __init__(self, **keywords: Any) -> None:
        for name in ("cross_attend", "only_cross"):
            if keywords.pop(name, True) is not True:
                raise ConfigError(f"CrossAttender: `{name}` is always True here; use an Encoder or a Decoder.")
        super().__init__(cross_attend=True, only_cross=True, **_with_dim(self, keywords))


class _Seen:
    """Collects what the caller asked to see."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.streams: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.memory_inputs: list[Tensor] = []
        self.records: list[Intermediates] = []

    def add(self, kind: str, stream: Tensor, passed: Passed) -> None:
        if self.capture.hiddens:
            self.inputs.append(passed.branch_input)
        if kind == "a" and (self.capture.hiddens or self.capture.memories):
            self.streams.append(stream)
            self.memory_inputs.append(passed.memory_input)
        if passed.record is not None:
            self.records.append(passed.record)

    def intermediates(self, stream: Tensor, out: Tensor, kv: KVCache | None) -> LayerIntermediates:
        return LayerIntermediates(
            hiddens=self.streams,
            last_hidden=out,
            attn_intermediates=self.records,
            layer_hiddens=[*self.inputs, stream] if self.capture.hiddens else None,
            memory_inputs=self.memory_inputs,
            cache=kv,
        )


def _one(options: Options, slot: str, place: Place) -> Any:
    """The part that a slot's feature builds for one sublayer, or None if no feature of the slot is on."""
    chosen = options.enabled(slot)
    if not chosen:
        return None
    assert chosen[0].build is not None
    return chosen[0].build(options[chosen[0].name], place)


def _each(value: Any, index: int) -> Any:
    """One sublayer's value of an option that may be one value or a tuple of them."""
    return value[index] if isinstance(value, tuple) else value


def _norm_of(plan: StackPlan) -> Any:
    """A maker of the chosen norm, by width."""
    offset = plan.options["norm"].norm_add_unit_offset
    chosen = plan.options.enabled("norm")
    build: Any = chosen[0].build if chosen else LayerNorm
    return lambda dim: build(dim, unit_offset=offset, options=plan.options)


def _new_tokens(x: Tensor, kv: KVCache, only_new: bool, age: int | None) -> Tensor:
    """The tokens of x that are not cached yet."""
    if kv.is_static and not only_new:
        raise InputError("a static cache takes new tokens alone; pass `input_not_include_cache = True`.")
    new = x.shape[1] if only_new else x.shape[1] - kv.length
    if age is None:
        age = new
    if not 1 <= age <= max(new, 0) and not (kv.dropped and age >= 1):
        raise InputError(
            f"{age} tokens are to run (`cache_age`), but x has {x.shape[1]} tokens and the cache holds {kv.length}; "
            "between 1 and the number of tokens that are not cached can run. Pass the whole sequence, or the new "
            "tokens with `input_not_include_cache = True`."
        )
    return x[:, x.shape[1] - age :]


def _holds_context(cache: LayerIntermediates | KVCache) -> bool:
    kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
    return kv is not None and any(entry.get("k") is not None for entry in kv.entries)


def _unwise(stack: AttentionLayers) -> list[str]:
    dim = getattr(stack.rotary_pos_emb, "dim", 32)
    if dim < 32:
        return [f"`rotary_emb_dim` is {dim}; below 32, distant positions are hard to tell apart."]
    return []


def _refuse_causal(keywords: dict[str, Any], what: str, other: str) -> None:
    if "causal" in keywords:
        raise ConfigError(f"{what}: drop `causal`, or build {other}.")


def _with_dim(stack: AttentionLayers, keywords: dict[str, Any]) -> dict[str, Any]:
    if "dim" not in keywords:
        raise ConfigError(f"{type(stack).__name__}: `dim` is missing, the width of the residual stream.")
    return keywords


for _class in (AttentionLayers, Encoder, Decoder, CrossAttender):
    _leading = [parameter("dim", positional=_class is AttentionLayers)]
    if _class in (AttentionLayers, CrossAttender):
        _leading.append(parameter("causal", False))
    show_keywords(
        _class, [(STACK, ""), (ATTENTION, "attn_"), (ATTENTION, "cross_attn_"), (FEEDFORWARD, "ff_")], _leading
    )
