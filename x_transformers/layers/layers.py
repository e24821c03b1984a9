"""`AttentionLayers`: a stack of sublayers, built from keywords, and one pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from x_transformers.attention.base import QKTransform, ScoreMod
from x_transformers.attention.qk.caller_rotations import GivenPolar, GivenRotation
from x_transformers.attention.qk.polar import PolarEmbedding
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.attention.scores.base import DistanceBias
from x_transformers.attention.validation import check_context, check_input, check_pairs
from x_transformers.attention.weights.hard import log_prob_from_hard_attend
from x_transformers.cache import KVCache, Shape, StaticCache
from x_transformers.errors import ConfigError, Faults, InputError, StateDictError
from x_transformers.forward_pass.call import Call, Capture, Span
from x_transformers.forward_pass.documents import Documents, refuse_beside
from x_transformers.forward_pass.intermediates import Intermediates, LayerIntermediates
from x_transformers.layers.additional_kv import deal_pairs, deal_residuals
from x_transformers.layers.branch import Branch
from x_transformers.layers.branches.norm_placement import norm_places
from x_transformers.layers.build import build_branch, check_value_residual, norm_of
from x_transformers.layers.catalog import ATTENTION, FEEDFORWARD, STACK
from x_transformers.layers.compile_blocks import Regional
from x_transformers.layers.conditioning import build_condition, build_injection, select_new_tokens
from x_transformers.layers.execution_order import Repeat, check_order, repeated
from x_transformers.layers.explain import ALWAYS_ON, Explanation, count, explain_sublayers, situation_of
from x_transformers.layers.packing import packed_kinds, read_documents
from x_transformers.layers.pass_inputs import (
    BlockTransform,
    block_transform,
    check_covers_places,
    deep_embeds,
    holds_context,
    new_tokens,
    offset_positions,
)
from x_transformers.layers.plan import SCHEMAS, StackPlan, make_plan
from x_transformers.layers.runner import PassInputs, Traversal
from x_transformers.layers.token_layout import build_token_layout
from x_transformers.layers.unet import ConcatCombine, check_sources, skip_sources
from x_transformers.modules.norms import ADAPTIVE
from x_transformers.modules.state_dict import ReadsReference, rename, rename_prefix
from x_transformers.ops import reference_head_order
from x_transformers.options.configured import Configured
from x_transformers.options.signatures import parameter, show_keywords


class AttentionLayers(Configured, ReadsReference, Traversal):
    """A stack of attention and feedforward layers over `(b, n, dim)`.

    Args:
        dim: width of the residual stream.
        depth: blocks.
        heads: query heads of every attention.
        causal: self-attention sees the past only.

    Raises:
        ConfigError: listing every unknown keyword, bad value and conflict of the call.
    """

    looks_back = False
    """Tokens see their past although the stack is not causal; what mixes neighbours looks back alone."""

    def __init__(
        self, dim: int, depth: int | None = None, heads: int = 8, causal: bool = False, **keywords: Any
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ConfigError(f"{type(self).__name__}: `dim` is {dim!r}; it must be a positive whole number.")
        plan = make_plan(type(self).__name__, {"depth": depth, "heads": heads, **keywords})
        options, structure = plan.options, plan.options["structure"]
        self.dim, self.depth, self.heads, self.causal = dim, plan.sequence.depth, structure.heads, causal
        self.sequence = plan.sequence
        self.steps = plan.sequence.steps(plan.sequence.order)
        self.cross_attend, self.only_cross = structure.cross_attend, structure.only_cross
        self.layer_types = tuple(layer.kind for layer in plan.layers)
        self.features = tuple(feature.name for feature in options.enabled())

        faults = Faults()
        norm = norm_of(plan)
        self.layers = nn.ModuleList()
        for index, layer in enumerate(plan.layers):
            schema, prefix = SCHEMAS[layer.kind]
            with faults.catching(lambda message, schema=schema, prefix=prefix: schema.in_full(message, prefix)):
                self.layers.append(build_branch(self, plan, layer, index, norm))
        if options.on("value_residual"):
            check_value_residual([self.branches(kind) for kind in "ac"], faults)
        self.rotary_pos_emb: QKTransform | None = None
        self.polar_pos_emb: QKTransform | None = None
        self.rel_pos: ScoreMod | None = None
        if plan.of("a"):
            with faults.catching():
                self._build_positions(plan)
        with faults.catching():
            self._build_surroundings(plan)
        with faults.catching():
            self.packed = packed_kinds(plan)
        faults.raise_if_any(type(self).__name__)
        self.final_norm = norm(dim) if norm_places(options).final else None
        self.regional = None
        self.context_dropout = options["context_dropout"].cross_attn_tokens_dropout
        # what cross-attentions hand on must be about the same keys
        self.one_context = options.on("value_residual") or options["residual_scores"].cross_residual_attn
        asked = options["stack"].disable_abs_pos_emb
        self.disable_abs_pos_emb = (
            asked if asked is not None else any(options.on(name) for name in ("rotary", "polar", "t5_bias"))
        )
        if options["stack"].verbose:
            for sentence in (*plan.warnings, *_unwise(self)):
                logger.warning(f"{type(self).__name__}: {sentence}")

    def _build_surroundings(self, plan: StackPlan) -> None:
        """What stands before, between and behind the layers."""
        options = plan.options
        self.frame = self.layers[0].residual.frame() if len(self.layers) else None  # type: ignore[union-attr]
        self.injection = build_injection(options["reinject_input"], self.dim) if options.on("reinject_input") else None
        self.need_condition = any(options.on(name) for name in ADAPTIVE)
        self.dim_condition = options["condition"].given_width(self.dim)
        self.condition_mlp = build_condition(options, self.dim) if self.need_condition else None
        self.skip_sources = skip_sources(self.sequence) if options.on("unet_skips") else {}
        self.skip_combines = nn.ModuleDict(
            {str(index): ConcatCombine(self.dim, source) for index, source in self.skip_sources.items()}
        )
        clamp = options["softclamp_output"]
        self.output_clamp = clamp.softclamp_output_value if clamp.softclamp_output else None
        self.num_residual_streams = options["residual_streams"].num_residual_streams
        self.reference_mix = options["residual_streams"].hyper_conn_reference_mix
        self.runs_in_order = options.on("lime")
        self.checkpoint_every = options["checkpointing"].checkpoint_every

    def _build_positions(self, plan: StackPlan) -> None:
        """The position parts that all self-attention layers share."""
        heads_of = [layer.options["heads"].dim_head for layer in plan.of("a")]
        if len(set(heads_of)) > 1:
            raise ConfigError("`attn_dim_head` differs between layers, but positions are shared; give one width.")
        rotated = plan.options["rotary"].rotary_emb_dim
        if rotated is not None and rotated > heads_of[0]:
            raise ConfigError(f"`rotary_emb_dim` is {rotated}; heads have `attn_dim_head` = {heads_of[0]} features.")
        surroundings = {
            "dim": self.dim,
            "heads": plan.options["structure"].heads,
            "dim_head": heads_of[0],
            "causal": self.causal,
            "kv_heads": {branch.attention.kv_heads for branch in self.branches("a")},
            "kwargs": plan.options["stack"].rel_pos_kwargs,
        }
        for slot, name in (("qk", "rotary_pos_emb"), ("polar qk", "polar_pos_emb"), ("score", "rel_pos")):
            for feature in plan.options.enabled(slot):
                assert feature.build is not None
                setattr(self, name, feature.build(plan.options[feature.name], **surroundings))

    # what other code reads

    @property
    def rotations(self) -> tuple[QKTransform, ...]:
        """The transforms of queries and keys by position."""
        return tuple(t for t in (self.rotary_pos_emb, self.polar_pos_emb) if t is not None)

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
        return [b.attention.cache_streams(self.rotations) if b.kind == "a" else {} for b in run]

    def static_cache(
        self,
        batch: int,
        capacity: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        prefix: int | None = 0,
        step: int = 1,
    ) -> StaticCache:
        """A cache of fixed buffers for `capacity` slots; attentions with a window have room for that alone.

        Args:
            batch, capacity: rows, and slots of each, prefix slots included.
            device, dtype: of the buffers; default those of the model.
            prefix: leading slots that are no tokens; None where they lie between the tokens, which needs all slots.
            step: tokens of most passes behind the prompts.
        """
        self._refuse_cache_unless_causal()
        like = next(self.parameters())
        cache = StaticCache(
            self.cache_streams(),
            batch,
            capacity,
            device or like.device,
            dtype or like.dtype,
            reaches=() if prefix is None else self.reaches(self.sequence.order),
            prefix=prefix or 0,
            step=step,
        )
        cache.order = self.sequence.order
        return cache

    def reaches(self, order: tuple[int, ...]) -> tuple[int | None, ...]:
        """How far back each sublayer of an order of execution looks, which is all that a cache must keep for it."""
        branches = self.branches("a", "c", "f")
        return tuple(branches[i].attention.reach if branches[i].kind == "a" else None for i in order)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each sublayer by itself from now on, in place. Sublayers of one build share a graph, so that a deep
        stack takes no longer to compile than a shallow one; between them PyTorch runs as ever.

        Passes with a cache stay as they are (`generate(compile = True)` compiles those), and so do copies of this
        stack. `torch.compile` of the whole model takes precedence where both are used.

        Args:
            options: of `torch.compile`: `mode`, `dynamic`, `fullgraph`, `backend` ...
        """
        self.regional = Regional(**options)

    def __getstate__(self) -> dict[str, Any]:
        # graphs belong to this object and this process
        return {**self.__dict__, "regional": None}

    def muon_parameters(self) -> Iterator[Tensor]:
        """What Muon may orthogonalise: value, output and feedforward matrices (2502.16982)."""
        for branch in self.branches("a", "c", "f"):
            if branch.kind == "f":
                yield from branch.feedforward.muon_parameters()
            else:
                yield from branch.attention.muon_parameters()

    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """Clip every attention's logits, see `Attention.qk_clip_`; a layer that ran twice by the larger ones.

        Raises:
            InputError: if the pass recorded no logits.
        """
        records: dict[int, list[Intermediates]] = {}
        for record in intermediates.attn_intermediates or ():
            if record.layer_index is not None:
                records.setdefault(record.layer_index, []).append(record)
        if not records:
            raise InputError("there are no records of attention here; run the pass with `return_hiddens = True`.")
        branches = self.branches("a", "c", "f")
        for index, ran in records.items():
            logits = [record.pre_softmax_attn for record in ran if record.pre_softmax_attn is not None]
            most = [t.amax(dim=(0, 2, 3))[None, :, None, None] for t in logits]
            branches[index].attention.qk_clip_(torch.stack(most).amax(dim=0) if len(most) == len(ran) else ran[0], tau)

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
        seq_pos_offset: int | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        input_not_include_cache: bool = False,
        cache_age: int | None = None,
        return_hiddens: bool = False,
        return_gumbel_log_probs: bool = False,
        rotary_pos_emb: tuple[Tensor, Tensor | float] | None = None,
        polar_pos_emb: tuple[Tensor, Tensor] | None = None,
        pos: Tensor | None = None,
        context_pos: Tensor | None = None,
        attn_bias: Tensor | None = None,
        deep_embeds_and_ids: tuple[Tensor, Tensor] | None = None,
        self_attn_additional_kv: LayerIntermediates | Sequence[tuple[Tensor, Tensor]] | None = None,
        additional_kv_mask: Tensor | None = None,
        detach_additional_kv: bool = False,
        route_additional_kv_to_top: bool = True,
        condition: Tensor | None = None,
        in_attn_cond: Tensor | None = None,
        layers_execute_order: Sequence[int] | None = None,
        repeat_blocks: Sequence[Repeat] | Repeat | None = None,
        self_attn_kv_residuals: Tensor | None = None,
        cross_attn_kv_residuals: Tensor | None = None,
        flash_pack_seq_kwargs: Mapping[str, Any] | None = None,
        flash_pack_seq_context_kwargs: Mapping[str, Any] | None = None,
        causal: bool | None = None,
        transform_block_inputs: BlockTransform | Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        *,
        places: Tensor | None = None,
        prefix: int | None = 0,
        capture: Capture | None = None,
        pairs: Callable[[Span, Span], Tensor] | None = None,
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
            mems: a `(b, l, D)` recurrent memory (or None) for each self-attention layer, then the earlier segment's
                `memory_states`, if it left any; mem_masks: `(b, l)` bool.
            seq_start_pos: `(b,)` tokens of left padding of each row.
            seq_pos_offset: the position of the first token, in place of 0. A cache knows where its tokens stand.
            cache: what an earlier pass with `return_hiddens` returned, or a cache.
            cache_age: run only that many tokens of x; default all that are not cached.
            return_hiddens: also return the intermediates.
            return_gumbel_log_probs: the same, with `log_probs` of the key that each query weighs most, for training
                hard attention by its log-probabilities.
            pos: integer positions for encodings, of the new or of all tokens. They never change who sees whom.
            attn_bias: broadcastable to `(b, h, i, j)`.
            causal: overrides the constructor for this pass.
            condition: `(b, c)` or `(b, n, c)`, for adaptive norms and scales. Here and below, a tensor over tokens
                may cover the new ones or all; the last ones are read.
            in_attn_cond: `(b, D)` or `(b, n, D)`, added to every sublayer's input.
            deep_embeds_and_ids: a table `(V, L, D)` and ids `(b, n)`; the t-th executed feedforward's output is
                multiplied by `table[ids, t]`, if t < L.
            layers_execute_order: indices of built sublayers, in place of the constructor's order.
            repeat_blocks: `(block, times)` or `((first, last), times)`, or several of them: blocks to run repeatedly.
            transform_block_inputs: `(block, stream) -> stream` at the entry of every executed block but the first,
                counted from 1, or a function of the stream for each block number. Streams are `(b * s, n, D)`.
            rotary_pos_emb: angles `(1|b, N, r)` of every key and a factor of them, in place of the stack's.
            polar_pos_emb: angles `(1|b, N, d)` of every key and a bias `(h, 1, d)`, in place of the stack's.
            context_pos: `(m,)` or `(b, m)` positions of the context; cross-attention then rotates too.
            self_attn_additional_kv: keys `(b, g', A, d)` and values `(b, g', A, e)` for each executed self-attention,
                which see them beside their own; or the record of another model's pass. To be passed at every step.
            additional_kv_mask: `(b, A)` bool, valid ones.
            detach_additional_kv: no gradient goes into them.
            route_additional_kv_to_top: the last pairs go to the last layers; else the first ones to the first.
            self_attn_kv_residuals: added to what keys and values of self-attention are made of: `(b, n, D)` in the
                first layer, or `(L, b, n, D)` in the first L; cross_attn_kv_residuals: the same for the context.
            flash_pack_seq_kwargs: with `attn_flash_pack_seq`, at every pass without a cache: x is `(1, n, D)`, one
                document after the other, each of which sees itself alone and counts its positions from 0.
                `cu_seqlens_q`, `cu_seqlens_k`: `(t + 1,)` whole numbers, 0 and where documents end; `max_seqlen_q`,
                `max_seqlen_k`: the length of the longest one.
            flash_pack_seq_context_kwargs: the same for cross-attention, between x and the context.
            places: `(b, all tokens so far)` bool, False for slots that are no tokens of their row (wrappers).
            prefix: leading slots that are no tokens, which windows keep in a cache; None if there are such between
                the tokens (wrappers).
            capture: what to keep for the caller; default everything with `return_hiddens` and without a cache.
            pairs: makes a further `attn_mask` from queries and keys.

        Raises:
            InputError: if arguments do not fit the stack or each other.
        """
        check_input(x, self.dim)
        self._check_call(x.shape[0], context, causal, cache, attn_mask)
        packs = {"flash_pack_seq_kwargs": flash_pack_seq_kwargs}
        packs["flash_pack_seq_context_kwargs"] = flash_pack_seq_context_kwargs
        documents: dict[str, Documents] = {}
        if self.packed or any(pack is not None for pack in packs.values()):
            documents = read_documents(self.packed, packs, x, context, cached=cache is not None)
        if "a" in documents:
            masks = {"mask": mask, "self_attn_kv_mask": self_attn_kv_mask, "attn_mask": attn_mask}
            further = {"seq_start_pos": seq_start_pos, "mems": mems, "self_attn_additional_kv": self_attn_additional_kv}
            refuse_beside("flash_pack_seq_kwargs", **masks, **further)
        if "c" in documents:
            refuse_beside("flash_pack_seq_context_kwargs", context_mask=context_mask)
        kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
        if seq_pos_offset:
            pos = offset_positions(seq_pos_offset, x, pos, kv)
        if kv is not None:
            x = new_tokens(x, kv, input_not_include_cache, cache_age)
        batch, n = x.shape[:2]
        causal = self.causal if causal is None else causal
        order = self.sequence.order
        if layers_execute_order is not None or repeat_blocks is not None:
            order = self.order_of(layers_execute_order, repeat_blocks)
        kv = self._cache_for_pass(kv, n, order, prefix, keep=return_hiddens and causal and not documents)
        if capture is None:
            explicit = return_hiddens and cache is None and self._may_show_scores()
            capture = Capture(scores=explicit, hiddens=return_hiddens)
        if return_gumbel_log_probs:
            if not self._may_show_scores():
                raise InputError("log-probabilities need scores, but `attn_flash = True` keeps none; leave it at None.")
            return_hiddens, capture = True, replace(capture, scores=True)

        if attn_bias is not None and kv is not None and kv.is_static and not kv.fresh:
            check_covers_places(attn_bias, kv.capacity)  # type: ignore[attr-defined]
            attn_bias = attn_bias[..., : kv.shown]  # type: ignore[attr-defined]
        query, keys = build_token_layout(
            batch,
            n,
            x.device,
            cache=kv,
            mask=mask,
            kv_mask=self_attn_kv_mask,
            seq_start_pos=seq_start_pos,
            places=places,
            pos=pos,
            documents=documents.get("a"),
        )
        size = {"batch": batch, "heads": self.heads, "queries": n, "keys": len(keys)}
        if attn_mask is not None:
            attn_mask = check_pairs(attn_mask, "attn_mask", **size)
        if attn_bias is not None:
            attn_bias = check_pairs(attn_bias, "attn_bias", **size)
        if pairs is not None:
            attn_mask = pairs(query, keys) if attn_mask is None else pairs(query, keys) & attn_mask
        call = Call(
            query=query,
            keys=keys,
            causal=causal,
            aligned=kv is None or kv.fresh,
            newest=n == 1 and (kv is None or kv.ends_with_newest),
            row_mask=mask.bool() if mask is not None and cache is None else None,
            attn_mask=attn_mask,
            attn_bias=attn_bias,
            capture=capture,
        )
        given = PassInputs(
            order=order,
            context=context,
            context_mask=context_mask,
            condition=self._condition(condition, batch, n),
            injection=self._injection(in_attn_cond, x),
            rotations=self._rotations(rotary_pos_emb, polar_pos_emb, kv),
            documents=documents,
        )
        if mems:
            self._take_memories(given, mems, mem_masks, condition)
        if deep_embeds_and_ids is not None:
            given.deep_embeds = deep_embeds(*deep_embeds_and_ids, x)
        if transform_block_inputs is not None:
            given.transform = block_transform(transform_block_inputs)
        if context_pos is not None:
            given.context_pos = self._check_context_pos(context_pos)
        if self_attn_additional_kv is not None:
            count, to_top = self.sequence.count("a", order), route_additional_kv_to_top
            given.additional = deal_pairs(self_attn_additional_kv, count, to_top=to_top, detach=detach_additional_kv)
            given.additional_mask = additional_kv_mask
        if self_attn_kv_residuals is not None or cross_attn_kv_residuals is not None:
            given.kv_residuals = {
                kind: deal_residuals(residuals, self.sequence.count(kind, order), name)
                for kind, residuals, name in (
                    ("a", self_attn_kv_residuals, "self_attn_kv_residuals"),
                    ("c", cross_attn_kv_residuals, "cross_attn_kv_residuals"),
                )
            }
        out, stream, seen = self.traverse(x, call, kv, given)
        if not return_hiddens:
            return out
        record = seen.intermediates(stream, out, kv)
        if return_gumbel_log_probs:
            for each in seen.records:
                each.log_probs = log_prob_from_hard_attend(each)
        return out, record

    def _cache_for_pass(
        self, kv: KVCache | None, n: int, order: tuple[int, ...], prefix: int | None, keep: bool
    ) -> KVCache | None:
        """The cache, begun for n tokens; a new one if the caller is to get one and gave none."""
        if kv is None:
            if not keep or not self.can_cache_kv:
                return None
            kv = KVCache()
        kv = kv.begin(n)
        if kv.order not in (None, order):
            raise InputError(f"the cache was filled by layers {kv.order}, but layers {order} are to run; keep one.")
        if kv.fresh:
            self._prepare_windows(kv, order, prefix)
        kv.order = order
        return kv

    def _prepare_windows(self, kv: KVCache, order: tuple[int, ...], prefix: int | None) -> None:
        """Tell a cache before its first pass what windows let it drop."""
        if not isinstance(kv, StaticCache):
            kv.prefix = prefix or 0
            kv.reaches = () if prefix is None else self.reaches(order)
        elif kv.rings and (prefix is None or prefix > kv.ring_prefix):
            raise InputError(
                f"the static cache keeps windows behind {kv.ring_prefix} leading slots, but this model has memory "
                "tokens or prepended embeddings beyond them; let the model make it (`model.static_cache`, with "
                "`prepended`)."
            )

    def _take_memories(
        self, given: PassInputs, mems: Sequence[Tensor | None], masks: Sequence[Tensor | None] | None, condition: Any
    ) -> None:
        """What the segment before left: memories of attention, then running states."""
        if condition is not None and condition.ndim == 3 and condition.shape[1] > 1:
            raise InputError(
                "`mems` with a `condition` for each token: nobody knows the memory's. Pass (b, c), or no `mems`."
            )
        attentions = self.sequence.count("a", given.order)
        given.mems, given.states = mems[:attentions], mems[attentions:]
        given.mem_masks = masks or ()

    def order_of(self, given: Sequence[int] | None, repeats: Sequence[Repeat] | Repeat | None) -> tuple[int, ...]:
        """The order of execution of one pass."""
        if given is None and repeats is None:
            return self.sequence.order
        if given is not None and repeats is not None:
            raise InputError("`repeat_blocks` and `layers_execute_order` both say what runs; pass one of them.")
        try:
            order = repeated(repeats, self.sequence) if repeats is not None else None
            order = check_order(given, len(self.layers)) if order is None else order
            check_sources(order, self.skip_sources)
        except ConfigError as error:
            raise InputError(str(error)) from None
        if self.runs_in_order and order != tuple(range(len(order))):
            raise InputError(
                f"layers {order} are to run, but with `integrate_layers` they must run in order, each once, since "
                "there is one weight for each earlier layer."
            )
        return order

    def _condition(self, given: Tensor | None, batch: int, n: int) -> Tensor | None:
        """What adaptive parts read, `(b, 1|n, c)`."""
        if given is None and not self.need_condition:
            return None
        if given is None or not self.need_condition:
            needs = f"needs `condition`, (b, {self.dim_condition})" if self.need_condition else "reads no `condition`"
            raise InputError(f"this stack {needs}: adaptive norms and layer scales are what reads one.")
        condition = select_new_tokens(given, batch, n, self.dim_condition, "condition")
        return condition if self.condition_mlp is None else self.condition_mlp(condition)

    def _injection(self, given: Tensor | None, x: Tensor) -> Tensor | None:
        """What is added to every sublayer's input, `(b, 1|n, D)`."""
        if given is not None:
            given = select_new_tokens(given, x.shape[0], x.shape[1], self.dim, "in_attn_cond")
        return given if self.injection is None else self.injection(x, given)

    # checks

    def _rotations(self, rotary: Any, polar: Any, kv: KVCache | None) -> tuple[QKTransform, ...]:
        """The transforms of self-attention: what a caller gives, in place of the stack's own."""
        if rotary is not None and polar is not None:
            raise InputError("`rotary_pos_emb` and `polar_pos_emb` both turn queries and keys; pass one of them.")
        if polar is not None and self.polar_pos_emb is None and kv is not None and kv.is_static:
            raise InputError("`polar_pos_emb` makes keys wider than the static cache has room for; use a dynamic one.")
        if polar is not None:
            return (GivenPolar(*polar),)
        return self.rotations if rotary is None else (GivenRotation(rotary),)

    def _check_context_pos(self, pos: Tensor) -> Tensor:
        if not self.cross_attend or not isinstance(self.rotary_pos_emb, RotaryEmbedding):
            raise InputError(
                "`context_pos` rotates the keys of cross-attention; it needs `cross_attend` and `rotary_pos_emb`."
            )
        return pos if pos.ndim == 2 else pos.unsqueeze(0)

    def _check_call(
        self, batch: int, context: Tensor | None, causal: bool | None, cache: Any, attn_mask: Tensor | None
    ) -> None:
        if cache is not None:
            self._refuse_cache_unless_causal()
            if attn_mask is not None:
                raise InputError("`attn_mask` with a cache is not supported; mask keys with `self_attn_kv_mask`.")
            if isinstance(cache, LayerIntermediates) and cache.cache is None:
                raise InputError("the intermediates given as `cache` hold none; they must come from a causal pass.")
        filled = cache is not None and self.cross_attend and holds_context(cache)
        if self.cross_attend and context is None and not filled:
            raise InputError("this stack cross-attends; pass `context`, (b, m, width).")
        if not self.cross_attend and context is not None:
            raise InputError("this stack does not cross-attend; set `cross_attend = True`, or drop `context`.")
        if context is not None and not filled:
            check_context(context, batch, self.branches("c")[0].attention.dim_context)
        if causal is not None and causal != self.causal:
            for branch in self.branches("a", "c"):
                branch.attention.check_causality(causal)
            if getattr(self.rel_pos, "causal", causal) != causal:
                raise InputError("the T5 bias was built for one direction; `causal` cannot be overridden with it.")
            if cache is not None:
                raise InputError("a cache needs the stack's own causality; drop `causal`.")

    def _refuse_cache_unless_causal(self) -> None:
        if not self.can_cache_kv:
            raise InputError("only a causal stack can use a cache; build a Decoder, or pass no `cache`.")

    def _may_show_scores(self) -> bool:
        return all(branch.attention.attend.backends.flash is not True for branch in self.branches("a", "c"))

    # checkpoints

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        for index in range(len(self.layers)):
            rename_prefix(state, f"{prefix}layer_integrators.{index}.", f"{prefix}layers.{index}.reader.")
        rename(state, f"{prefix}adaptive_mlp.0.weight", f"{prefix}condition_mlp.proj.weight")
        rename(state, f"{prefix}stream_emb", f"{prefix}frame.emb")
        rename(state, f"{prefix}reinject_input_proj.weight", f"{prefix}injection.proj.weight")
        rename(state, f"{prefix}learned_reinject_input_gate.weight", f"{prefix}injection.gate.weight")
        if not self.reference_mix and any(key.endswith(".2.static_alpha") for key in state):
            logger.warning(
                "these weights were trained with streams that mix by a matrix of ones; build the stack with "
                "`hyper_conn_reference_mix = True` to get the same outputs."
            )
        is_reference = any(key.startswith((f"{prefix}layers.0.0.", f"{prefix}layers.0.1.")) for key in state)
        rename(state, f"{prefix}final_norm.g", f"{prefix}final_norm.gamma")
        shared = [
            (part, f"{prefix}{name}.")
            for name, part in (("rel_pos", self.rel_pos), ("polar_pos_emb", self.polar_pos_emb))
            if isinstance(part, (DistanceBias, PolarEmbedding))
        ]
        if not is_reference or not shared:
            return
        orders = {(b.attention.heads, b.attention.kv_heads) for b in self.branches("a")}
        permuted = [order for pair in orders if (order := reference_head_order(*pair)) is not None]
        if len(permuted) == 0:
            return
        if len(orders) > 1:
            raise StateDictError(
                "the positions are shared by layers of different `attn_kv_heads`, whose heads stand in different "
                "orders in the reference; such a checkpoint cannot be read."
            )
        for part, path in shared:
            part.permute_heads(state, path, permuted[0])


def _unwise(stack: AttentionLayers) -> list[str]:
    dim = getattr(stack.rotary_pos_emb, "dim", 32)
    if dim < 32:
        return [f"`rotary_emb_dim` is {dim}; below 32, distant positions are hard to tell apart."]
    return []


show_keywords(
    AttentionLayers,
    [(STACK, ""), (ATTENTION, "attn_"), (ATTENTION, "cross_attn_"), (FEEDFORWARD, "ff_")],
    [parameter("dim", positional=True), parameter("causal", False)],
)
