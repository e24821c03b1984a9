"""`AttentionLayers`: a stack of sublayers, built from keywords, and one pass through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.projections import HeadOptions
from x_transformers.attention.weights.hard import log_prob_from_hard_attend
from x_transformers.cache import NO_PREFIX, CacheHeader, KVCache, StaticCache
from x_transformers.errors import ConfigError, InputError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import check_whole, checked
from x_transformers.forward_pass.call import Capture, Span, check_attributes
from x_transformers.forward_pass.intermediates import Intermediates, LayerIntermediates
from x_transformers.forward_pass.names import check_names, takes_no_more
from x_transformers.layers.batch_norms import AdvancesNorms
from x_transformers.layers.blockwise import run_by_blocks
from x_transformers.layers.catalog import KEYWORDS
from x_transformers.layers.compile_blocks import CompiledBlocks
from x_transformers.layers.early_exit import EarlyExit
from x_transformers.layers.execution_order import Repeat
from x_transformers.layers.experts import TrainsExperts
from x_transformers.layers.explain import Explanation, explain_stack
from x_transformers.layers.optional_inputs import explain_failed_pass, refuse_cache_unless_causal
from x_transformers.layers.pass_state import KINDS_OF_INPUTS, BlockTransform, PassInputs, PassState
from x_transformers.layers.plan import make_plan
from x_transformers.layers.reference_names import (
    export_positions,
    mixes_as_reference,
    stack_names,
    translate_positions,
)
from x_transformers.layers.residuals.streams import HyperConnection
from x_transformers.layers.runner import begin_pass, finish, finish_by_batch, finish_exits, run_steps
from x_transformers.layers.stack import LayerStack
from x_transformers.notices import warn
from x_transformers.options.signatures import parameter, show_keywords


class AttentionLayers(SavesFolders, TrainsExperts, AdvancesNorms, LayerStack):
    """A stack of attention and feedforward layers over `(b, n, dim)`.

    Args:
        dim: width of the residual stream.
        depth: number of blocks.
        heads: number of query heads of every attention.
        causal: self-attention sees only the past.

    Raises:
        ConfigError: listing every unknown keyword, bad value and conflict of the call.
    """

    def __init__(
        self, dim: int, depth: int | None = None, heads: int = 8, causal: bool = False, **keywords: Any
    ) -> None:
        name = type(self).__name__
        if not isinstance(dim, int) or dim < 1:
            raise ConfigError(f"{name}: `dim` is {dim!r}; it must be a positive whole number.")
        plan = make_plan(name, {"depth": depth, "heads": heads, **keywords})
        LayerStack.__init__(self, plan, dim, causal)
        if plan.options["stack"].verbose:
            narrow = getattr(self.rotary_pos_emb, "dim", 32)
            unwise = f"`rotary_emb_dim` is {narrow}; below 32, distant positions are hard to tell apart."
            for sentence in (*plan.warnings, *([unwise] if narrow < 32 else ())):
                warn(f"{name}: {sentence}")

    @property
    def attn_heads(self) -> int:
        """Number of query heads of the first attention; of a stack without one, `heads`."""
        return next((attention.heads for attention in self.attentions()), self.heads)

    @property
    def attn_dim_head(self) -> int:
        """Width of a head of the first attention; of a stack without one, that of an attention by default."""
        return next((attention.shape.dim_head for attention in self.attentions()), HeadOptions().dim_head)

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
        """Return a cache of fixed buffers for `capacity` slots. Attentions with a window get buffers for the window.

        Args:
            batch: number of rows.
            capacity: slots of each row, prefix slots included.
            device: device of the buffers; default that of the parameters.
            dtype: dtype of the buffers; default that of the parameters.
            prefix: leading slots that are no tokens; None if there are such slots between the tokens, which windows
                must keep all.
            step: number of tokens of most passes after the prompts.

        Raises:
            InputError: if the stack is not causal.
        """
        refuse_cache_unless_causal(self)
        check_whole(batch=batch, capacity=capacity, prefix=prefix or 0, step=step)
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

    def compile_blocks(self, **options: Any) -> None:
        """Compile each sublayer by itself from now on, in place.

        Sublayers of one build share a graph, so that a deep stack compiles as fast as a shallow one; between the
        sublayers, PyTorch runs eagerly as usual. Passes with a cache are not compiled (`generate(compile = True)`
        compiles those), and neither are copies of this stack. `torch.compile` of the whole model takes precedence.

        Args:
            options: options of `torch.compile`: `mode`, `dynamic`, `fullgraph`, `backend` ...
        """
        self.compiled = CompiledBlocks(**options)

    def __getstate__(self) -> dict[str, Any]:
        # graphs belong to this object and this process
        return {**self.__dict__, "compiled": None}

    def muon_parameters(self) -> list[Tensor]:
        """Return the matrices that Muon may orthogonalize: value, output and feedforward matrices (2502.16982)."""
        return [matrix for branch in self.sublayers for matrix in branch.fn.muon_parameters()]

    @checked
    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """Clip the logits of every attention in place, see `Attention.qk_clip_`.

        A layer that ran twice is clipped by the larger logits.

        Args:
            intermediates: the record of a pass.
            tau: bound of the logits.

        Raises:
            InputError: if the pass recorded no logits.
        """
        records: dict[int, list[Intermediates]] = {}
        for record in intermediates.attn_intermediates or ():
            if record.layer_index is not None:
                records.setdefault(record.layer_index, []).append(record)
        if not records:
            raise InputError("there are no records of attention here; run the pass with `return_hiddens = True`.")
        for index, ran in records.items():
            logits = [record.pre_softmax_attn for record in ran if record.pre_softmax_attn is not None]
            most = [t.amax(dim=(0, 2, 3))[None, :, None, None] for t in logits]
            attention = self.sublayers[index].attention
            attention.qk_clip_(torch.stack(most).amax(dim=0) if len(most) == len(ran) else ran[0], float(tau))  # type: ignore[operator]

    @checked
    def explain(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        training: bool | None = None,
        seq_len: int = 1024,
    ) -> Explanation:
        """Return a table of the sublayers: features, attention backend and the reason for it, parameters, FLOPs.

        Args:
            device: device to explain; default that of the parameters.
            dtype: dtype to explain; default that of the parameters.
            training: explain training or evaluation; default the present mode.
            seq_len: number of keys, for the FLOPs.
        """
        return explain_stack(self, device, dtype, training, seq_len)

    @takes_no_more
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
        header: CacheHeader = NO_PREFIX,
        capture: Capture | None = None,
        pairs: Callable[[Span, Span], Tensor] | None = None,
        self_attn_inputs: Mapping[int, Tensor] | None = None,
        return_aux_loss: bool = False,
        exits: Mapping[int, nn.Module | None] | None = None,
        early_exit: EarlyExit | None = None,
        **unknown: Any,
    ) -> Tensor | tuple[Tensor, LayerIntermediates]:
        """Run the stack.

        Args:
            x: `(b, n, D)`. With a cache: the whole sequence, of which the tokens that are not cached run, or the new
                tokens (`input_not_include_cache`); of an x that is no longer than the cache, the last token runs.
            context: `(b, m, Dc)`, for stacks that cross-attend; with a filled cache it is not read again.
            mask: `(b, n)` bool, valid tokens; with a cache it covers cached and new ones, or the new ones only.
            context_mask: `(b, m)` bool, valid tokens of the context.
            attn_mask: `(i, j)`, `(h, i, j)` or `(b, h, i, j)` bool, True where a query may see a key.
            self_attn_kv_mask: like `mask`, but only for keys.
            mems: a `(b, l, D)` recurrent memory (or None) for each self-attention layer, then the `memory_states` of
                the previous segment, if it left any.
            mem_masks: `(b, l)` bool for each memory, valid tokens.
            seq_start_pos: `(b,)` number of tokens of left padding of each row.
            seq_pos_offset: position of the first token, by default 0. A cache knows the positions of its tokens.
            cache: the intermediates of an earlier pass with `return_hiddens`, or a cache.
            input_not_include_cache: `x` contains only tokens that are not cached.
            cache_age: number of the last tokens of x to run; default all that are new.
            return_hiddens: also return the intermediates.
            return_gumbel_log_probs: the same, with `log_probs` of the key with the largest weight of each query, for
                training hard attention by its log-probabilities.
            rotary_pos_emb: angles `(1|b, N, r)` of every key and a factor of them, instead of the stack's.
            polar_pos_emb: angles `(1|b, N, d)` of every key and a bias `(h, 1, d)`, instead of the stack's.
            pos: integer positions for encodings, `(n,)` or `(b, n)`, of the tokens of x, the new ones or all so far;
                for ALiBi also `(b, h, n)`, of all tokens. They never change which tokens see each other.
            context_pos: `(m,)` or `(b, m)` positions of the context; cross-attention then rotates too.
            attn_bias: broadcastable to `(b, h, i, j)`, added to the logits of self-attention.
            deep_embeds_and_ids: a table `(V, L, D)` and ids `(b, n)`; the t-th executed feedforward's output is
                multiplied by `table[ids, t]`, if t < L.
            self_attn_additional_kv: keys `(b, g', A, d)` and values `(b, g', A, e)` for each executed self-attention,
                which attends to them besides its own; or the record of another model's pass. Pass it at every step.
            additional_kv_mask: `(b, A)` bool, valid ones.
            detach_additional_kv: no gradient flows into them.
            route_additional_kv_to_top: the last pairs go to the last layers; else the first pairs to the first layers.
            condition: `(b, c)` or `(b, n, c)`, for adaptive norms and scales. Of this and other tensors over tokens,
                which may cover the new ones or all, the last ones are read.
            in_attn_cond: `(b, D)` or `(b, n, D)`, added to every sublayer's input.
            layers_execute_order: indices of built sublayers, instead of the constructor's order.
            repeat_blocks: `(block, times)` or `((first, last), times)`, or several of them: blocks to run repeatedly.
            self_attn_kv_residuals: added to the source of keys and values of self-attention: `(b, n, D)` in the first
                layer, or `(L, b, n, D)` in the first L.
            cross_attn_kv_residuals: the same for the context, `(b, m, Dc)` or `(L, b, m, Dc)`.
            flash_pack_seq_kwargs: with `attn_flash_pack_seq`, at every pass without a cache: x is `(1, n, D)`, one
                document after the other, each of which sees only itself and counts its positions from 0.
                `cu_seqlens_q`, `cu_seqlens_k`: `(t + 1,)` whole numbers, 0 and the end of each document;
                `max_seqlen_q`, `max_seqlen_k`: the length of the longest document.
            flash_pack_seq_context_kwargs: the same for cross-attention, between x and the context.
            causal: overrides the constructor for this pass.
            transform_block_inputs: `(block, stream) -> stream` at the entry of every executed block but the first,
                counted from 1, or a function of the stream for each block number. Streams are `(b * s, n, D)`.
            places: `(b, all tokens so far)` bool, False for slots that are no tokens of their row (wrappers).
            header: slots that are no tokens, for the cache (wrappers).
            capture: what to record; default everything with `return_hiddens` and without a cache.
            pairs: computes a further `attn_mask` from queries and keys.
            self_attn_inputs: for the n-th executed self-attention, counted from 0, `(b, k, D)` that its last k tokens
                read, before the norm; the stream itself stays as it is. `(3, b, k, D)` for separate views.
            return_aux_loss: also return the intermediates, with `aux_loss`; by itself it makes no cache.
            exits: the same, with the features after some blocks as `exits`: numbers of blocks, counted from 1, and a
                norm of each, or None for the final norm.
            early_exit: rule by which tokens leave before the last block.

        Returns:
            `(b, n, D)`, and the intermediates with `return_hiddens`, `return_gumbel_log_probs`, `return_aux_loss` or
            `exits`.

        Raises:
            InputError: if arguments do not fit the stack or each other.
            ShapeError: if an argument has a shape that does not fit `x`.
        """
        if unknown:
            check_names(self, AttentionLayers.forward, unknown)
        # in the order of the signature; `torch.compile` cannot read `locals()` before PyTorch 2.13
        # fmt: off
        inputs = PassInputs(
            x, context, mask, context_mask, attn_mask, self_attn_kv_mask, mems, mem_masks, seq_start_pos,
            seq_pos_offset, cache, input_not_include_cache, cache_age, return_hiddens, return_gumbel_log_probs,
            rotary_pos_emb, polar_pos_emb, pos, context_pos, attn_bias, deep_embeds_and_ids, self_attn_additional_kv,
            additional_kv_mask, detach_additional_kv, route_additional_kv_to_top, condition, in_attn_cond,
            layers_execute_order, repeat_blocks, self_attn_kv_residuals, cross_attn_kv_residuals,
            flash_pack_seq_kwargs, flash_pack_seq_context_kwargs, causal, transform_block_inputs, places, header,
            capture, pairs, self_attn_inputs, return_aux_loss, exits, early_exit,
        )
        # fmt: on
        check_attributes(inputs, KINDS_OF_INPUTS)
        state: PassState | None = None
        try:
            state = begin_pass(self, inputs)
            steps = self.steps if inputs.order == self.sequence.order else self.sequence.steps(inputs.order)
            if self.checkpoint_every is self.depth_routers is early_exit is None and self.parallel_blocks == 1:
                run_steps(self, steps, inputs, state)
                batch = self.batch_norms
                out = finish_by_batch(self, inputs, state) if batch else finish(self, inputs, state.stream)
            else:
                state, out = run_by_blocks(self, steps, inputs, state)
        except RuntimeError as error:
            explain_failed_pass(self, inputs, state, error)
            raise
        if not (return_hiddens or return_gumbel_log_probs or return_aux_loss or exits):
            return out
        record = state.recorder.intermediates(state, out)
        if exits:
            record.exits = finish_exits(self, inputs, state.recorder)
        if return_gumbel_log_probs:
            for each in state.recorder.records:
                each.log_probs = log_prob_from_hard_attend(each)
        return out, record

    # state dicts

    def mix_streams_as_reference(self, on: bool = True) -> None:
        super().mix_streams_as_reference(on)
        # wrappers around this stack share these options
        self._config["options"]["hyper_conn_reference_mix"] = on

    def adopt_config(self, config: Mapping[str, Any]) -> list[Callable[[], None]]:
        if self.reference_mix or not config["options"].get("hyper_conn_reference_mix"):
            return []
        options = self._config["options"]
        before = dict(options)

        def undo() -> None:
            self.mix_streams_as_reference(on=False)
            options.clear()
            options.update(before)

        self.mix_streams_as_reference()
        return [undo]

    def reference_names(self) -> Mapping[str, str]:
        return stack_names(self)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        translate_positions(self, state, prefix)
        super().translate_reference(state, prefix)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        export_positions(self, state, prefix)
        super().export_reference(state, prefix)

    def after_loading(
        self, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> Callable[[], None] | None:
        streams = any(isinstance(branch.residual, HyperConnection) for branch in self.sublayers)
        if self.reference_mix or not streams or not mixes_as_reference(state, prefix, metadata):
            return None

        def finish() -> None:
            self.mix_streams_as_reference()
            warn(
                f"{type(self).__name__}: these weights were trained with residual streams that mix by a matrix of "
                "ones, so that this model computes them that way from now on (`hyper_conn_reference_mix = True`)."
            )

        return finish

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # `torch.save` keeps the metadata of a state dict, so that our own files say how their streams are mixed
        if self.reference_mix and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["reference_mix"] = True


show_keywords(AttentionLayers, KEYWORDS, [parameter("dim", positional=True), parameter("causal", False)])
