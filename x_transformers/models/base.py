"""Base of all models over a sequence: a stack, what a model puts around its tokens, and one pass through both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache import CacheHeader, KVCache, StaticCache
from x_transformers.errors import InputError, ShapeError
from x_transformers.folders.saved import SavesFolders
from x_transformers.forward_pass.arguments import check_whole, checked, explain_failure
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.batch_norms import AdvancesNorms
from x_transformers.layers.edited_cache import cache_of
from x_transformers.layers.experts import TrainsExperts
from x_transformers.layers.explain import Explanation, count
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.token_layout import check_start
from x_transformers.models.embeddings import AbsolutePositionalEmbedding, build_positions, frac_gradient
from x_transformers.models.inputs import ModelInputs, TokenSpan, new_tokens, same_for_all_tokens
from x_transformers.models.internal_sequence import surround
from x_transformers.models.memory_layout import MemoryLayout
from x_transformers.models.options.base import ModelOptions
from x_transformers.models.recurrence import new_memories, shifted_down
from x_transformers.models.repeated import Around
from x_transformers.models.requested_outputs import requested_capture, z_loss
from x_transformers.notices import warn


class Model(SavesFolders, TrainsExperts, AdvancesNorms):
    """A stack over embedded tokens. Abstract: a subclass embeds its inputs and turns features into outputs.

    Args:
        attn_layers: the stack.
        options: keywords that models share, see `models.options.catalog`.
        max_seq_len: length of the absolute position table; 0 for no positions and no limit.
        emb_dim: width of the embeddings.
        num_cls_tokens: number of class tokens before the others.

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        attn_layers: AttentionLayers,
        options: ModelOptions,
        *,
        max_seq_len: int,
        emb_dim: int,
        num_cls_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.emb_dim, self.max_seq_len, self.num_cls_tokens = emb_dim, max_seq_len, num_cls_tokens
        self.max_mem_len, self.shift_mem_down = options.max_mem_len, options.shift_mem_down
        self.emb_dropout, self.emb_frac_gradient = options.emb_dropout, options.emb_frac_gradient
        self.attn_z_loss_weight = options.attn_z_loss_weight
        self.num_memory_tokens = options.num_memory_tokens or 0
        self.layout = MemoryLayout(self.num_memory_tokens, options.memory_tokens_interspersed_every)
        self.attn_layers = attn_layers
        dim = attn_layers.dim
        without = _why_no_positions(max_seq_len, options.use_abs_pos_emb, attn_layers)
        for keyword in ("scaled_sinu_pos_emb", "abs_pos_emb_scale", "abs_pos_emb_offset"):
            if getattr(options, keyword) and without:
                warn(f"{type(self).__name__}: `{keyword}` has no effect: {without}.")
        self.pos_emb = None
        if not without:
            sinusoids, l2norm_embed = options.scaled_sinu_pos_emb, options.l2norm_embed
            self.pos_emb = build_positions(
                emb_dim,
                max_seq_len,
                sinusoids=sinusoids,
                l2norm_embed=l2norm_embed,
                scale=options.abs_pos_emb_scale,
                first_row=options.abs_pos_emb_offset,
            )
        self.project_emb: nn.Module | None = nn.Linear(emb_dim, dim) if emb_dim != dim else None
        self.memory_tokens = nn.Parameter(torch.randn(self.num_memory_tokens, dim)) if self.num_memory_tokens else None
        self.post_emb_norm: nn.Module | None = None
        self.cls_token: nn.Parameter | None = None

    last_position_only: ClassVar[Mapping[str, Any]] = {}
    """Arguments with which a pass returns the output of the last position only, for models that have such."""

    joins_memories: ClassVar[bool] = True
    """True if new memories are the old ones followed by the inputs of this pass; False if only these inputs."""

    drops_memory_tokens: ClassVar[bool] = False
    """True if the embedding dropout acts on everything that the stack reads, memory tokens included."""

    @property
    def has_memory_tokens(self) -> bool:
        """True if there are learned memory tokens before the others or between them."""
        return self.num_memory_tokens > 0

    @property
    def can_cache_kv(self) -> bool:
        """True if decoding may cache keys and values."""
        return self.attn_layers.can_cache_kv

    @property
    def can_cache_kv_outside_max_seq_len(self) -> bool:
        """True if positions continue beyond `max_seq_len` while a cache is in use."""
        return not isinstance(self.pos_emb, AbsolutePositionalEmbedding)

    def muon_parameters(self) -> list[Tensor]:
        """Return the matrices that Muon may orthogonalize; see `AttentionLayers.muon_parameters`."""
        return self.attn_layers.muon_parameters()

    @checked
    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """Bound the logits of attention by scaling down weights in place; see `AttentionLayers.attn_qk_clip_`.

        Args:
            intermediates: record of a pass that captured the largest logits.
            tau: largest logit allowed.
        """
        self.attn_layers.attn_qk_clip_(intermediates, tau)

    @checked
    def explain(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        training: bool | None = None,
        seq_len: int | None = None,
    ) -> Explanation:
        """Describe features, backend, parameters and FLOPs of each layer; see `AttentionLayers.explain`.

        Args:
            device: type of the device to describe, such as "cuda"; by default that of the parameters.
            dtype: of queries and keys; by default that of the parameters.
            training: describe a training pass; by default the mode that the model is in.
            seq_len: number of tokens; by default `max_seq_len`, or 1024 if the model has no such limit.
        """
        seq_len = seq_len or self.max_seq_len or 1024
        inner = self.attn_layers.explain(device, dtype, training, seq_len)
        return replace(inner, title=f"{type(self).__name__}: {inner.title}", parameters=count(self))

    def static_cache(
        self,
        batch: int,
        max_len: int,
        *,
        prepended: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        step: int = 1,
    ) -> StaticCache:
        """Return a cache of fixed buffers.

        Args:
            batch: number of rows.
            max_len: number of tokens of a row, after `prepended` embeddings.
            prepended: number of prepended embeddings.
            device, dtype: of the buffers.
            step: number of tokens of a pass. Attentions with a window have room for the window and these only.

        Raises:
            InputError: if the model cannot decode with a cache.
        """
        self._refuse_cache()
        check_whole(batch=batch, max_len=max_len, prepended=prepended, step=step)
        # a ring keeps its window after a prefix of fixed length; interspersed memory tokens belong to none
        prefix = None if self.layout.every is not None else self.layout.memory + prepended
        return self.attn_layers.static_cache(
            batch, self.layout.slots(prepended + max_len), device, dtype, prefix=prefix, step=step
        )

    # the steps of one pass

    def _token_span(self, n: int, inputs: ModelInputs) -> TokenSpan:
        """Return which of the n tokens given are new. Prepended embeddings that are cached do not run again."""
        leading = self.num_cls_tokens
        if inputs.prepend_embeds is not None:
            if inputs.prepend_embeds.ndim != 3:
                self._check_prepended(inputs.prepend_embeds, "b")
            leading += inputs.prepend_embeds.shape[1]
        if inputs.cache is None:
            return TokenSpan(n, n, 0, leading, None, True)
        kv = self._cache_of(inputs)
        return new_tokens(n, kv, inputs, 0 if kv.started else leading, self.layout)

    def _cache_of(self, inputs: ModelInputs) -> KVCache:
        if not self.can_cache_kv:
            self._refuse_cache()
        kv = inputs.cache
        if isinstance(kv, LayerIntermediates):
            names = ("layers_execute_order", "repeat_blocks")
            kv = cache_of(self.attn_layers, kv, *(inputs.stack.get(name) for name in names))
            if inputs.cache.cache is None and self.layout.memory:  # type: ignore[union-attr]
                raise InputError(
                    "keys and values that did not come from a pass contain none of memory tokens, which this model "
                    "has; begin with a pass over the first tokens."
                )
        assert kv is not None
        if kv.started and not kv.edited and kv.prefix != self.layout.slots(kv.prepended):
            raise InputError(
                f"the cache begins with {kv.prefix - kv.prepended} memory tokens, and this model has "
                f"{self.layout.slots(0)}; a cache belongs to the model that made it."
            )
        if self.layout.every is not None and kv.capacity is not None and torch.compiler.is_compiling():
            raise InputError(
                "interspersed memory tokens make steps of different lengths, which one compiled step cannot run; drop "
                "`memory_tokens_interspersed_every`, or decode without compilation."
            )
        return kv

    def _refuse_cache(self) -> None:
        if not self.attn_layers.can_cache_kv:
            raise InputError("only a causal model can use a cache; build a Decoder, or pass no `cache`.")
        if not self.can_cache_kv:
            raise InputError(
                "this model computes its output from all tokens at once (class tokens, pooling or recycling), so it "
                "cannot run on new tokens only; pass no `cache`."
            )

    def _add_positions(self, embeds: Tensor, inputs: ModelInputs, span: TokenSpan) -> Tensor:
        """Add position embeddings to token embeddings `(b, n, E)`, and note the integer positions for the stack.

        A caller's `pos` has one of three meanings: floating values are added instead of position embeddings; integers
        over the tokens select rows of the table; integers over prefix and tokens do so after the prefix. The stack,
        whose rotary embeddings and biases read positions too, receives integers only.
        """
        pos, start = inputs.pos, inputs.seq_start_pos
        if start is not None:
            # the first pass of a cache may read a part of the padding only
            whole = span.kv is None and not inputs.return_intermediates
            check_start(start, embeds.shape[0], span.count if whole else None)
        if pos is not None and pos.ndim == 3 and not pos.is_floating_point():
            if self.pos_emb is not None:
                raise InputError(
                    f"`pos` has shape {tuple(pos.shape)}; positions for each head cannot select position embeddings. "
                    "Build the model with `use_abs_pos_emb = False`, or pass (n,) or (b, n)."
                )
            return embeds
        if pos is not None:
            self._check_pos(pos, embeds)
        if pos is not None and pos.is_floating_point():
            inputs.pos = None
            return embeds + span.newest(pos, -2)
        if pos is not None:
            inputs.pos, pos = self._integer_positions(pos.long(), span)
            start = None  # a caller's positions leave out the padding already
        if self.pos_emb is None:
            return embeds
        return embeds + self.pos_emb(embeds, pos, start, span.first).to(embeds.dtype)

    def _check_pos(self, pos: Tensor, embeds: Tensor) -> None:
        """Raise a `ShapeError` unless positions are those of the rows of `embeds`, or of all rows alike."""
        batch, floating = embeds.shape[0], pos.is_floating_point()
        axes = pos.ndim - floating
        # tables have one position for each token; heads of their own are for the stack
        most = 2 if floating or self.pos_emb is not None else 3
        width = pos.shape[-1] == embeds.shape[-1] if floating and pos.ndim else True
        if not 1 <= axes <= most or (axes > 1 and pos.shape[0] not in (1, batch)) or not width or pos.is_complex():
            raise ShapeError(
                f"`pos` has shape {tuple(pos.shape)} and dtype {pos.dtype}; it must hold whole numbers, (n,) or "
                f"({batch}, n), or embeddings of positions, (n, {self.emb_dim}) or ({batch}, n, {self.emb_dim})."
            )

    def _integer_positions(self, pos: Tensor, span: TokenSpan) -> tuple[Tensor, Tensor]:
        """Return positions for the stack and for the position table."""
        prefix = self.layout.memory + span.leading
        if span.starts and prefix > 0 and self.layout.every is None and pos.shape[-1] == prefix + span.count:
            return pos, (pos[..., prefix:] - prefix).clamp(min=0)
        pos = span.newest(pos, -1)
        return pos, pos

    def _run_stack(
        self, embeds: Tensor, inputs: ModelInputs, span: TokenSpan, around: Around | None = None
    ) -> tuple[Tensor, LayerIntermediates | None, Tensor]:
        """Run the stack over embedded tokens.

        Args:
            embeds: `(b, n, E)` embeddings of the new tokens, with positions.
            inputs: of the pass.
            span: the new tokens.
            around: what runs the stack several times; default it runs once.

        Returns:
            Features `(b, leading + n, D)`; the record of the pass, or None if only the output was requested; and the
            embeddings `(b, p + n, E)` before dropout.

        Raises:
            InputError: if arguments do not fit the model or each other.
        """
        try:
            items, embeds = self._items(embeds, inputs, span)
        except RuntimeError as error:
            explain_failure(error, next(self.parameters()), vars(inputs))
            raise
        kv = span.kv
        if inputs.stack.get("return_gumbel_log_probs"):  # they are part of the record
            inputs.return_intermediates = True
        arguments = {
            "mask": inputs.mask,
            "self_attn_kv_mask": inputs.self_attn_kv_mask,
            "attn_mask": inputs.attn_mask,
            "attn_bias": inputs.attn_bias,
            "pos": inputs.pos,
            "seq_start_pos": inputs.seq_start_pos,
            "mems": inputs.mems,
            "mem_masks": inputs.mem_masks,
            "return_aux_loss": inputs.return_aux_loss,
            **inputs.stack,
        }
        if inputs.mems is not None and self.shift_mem_down:
            arguments["mems"] = shifted_down(inputs.mems, self.shift_mem_down, self.attn_layers, arguments)
        # Most passes run tokens only. If there is anything around the tokens, arguments over tokens have to become
        # arguments over the columns of the internal sequence.
        x, sequence = items, None
        prefixed = span.leading if kv is None or span.starts else kv.prefix
        if prefixed > 0 or self.memory_tokens is not None or inputs.prepend_mask is not None:
            sequence = surround(items, span, self.layout, self.memory_tokens, inputs.seq_start_pos)
            if inputs.prepend_mask is not None and span.starts:
                sequence.hide_prepended(inputs.prepend_mask, self.num_cls_tokens)
            x, arguments = sequence.x, sequence.over_columns(arguments)
        if self.emb_dropout and self.drops_memory_tokens:
            x = self._dropped(x)
        run = self.attn_layers if around is None else around(self.attn_layers, span)
        if kv is None and not inputs.needs_record:
            found = run(x, **arguments)
            features, record = found if type(found) is tuple else (found, None)
            return (features if sequence is None else sequence.without_memory(features, record)), record, embeds
        features, record = run(
            x,
            cache=kv,
            input_not_include_cache=True,
            return_hiddens=True,
            capture=requested_capture(inputs, self.attn_layers),
            header=CacheHeader(items=span.count) if sequence is None else sequence.header(),
            **arguments,
        )
        if sequence is not None:
            sequence.record(record, features)
        if inputs.return_mems:
            past = arguments["mems"] if self.joins_memories else None
            record.mems = new_memories(record, past, self.max_mem_len, inputs.detach_mems)
        if inputs.z_loss_weight is not None:
            record.attn_z_loss = z_loss(record.attn_intermediates or [], inputs.z_loss_weight)
        if sequence is not None:
            features = sequence.without_memory(features, record)
        record.initial_embeds, record.last_layer_hiddens = embeds, features[:, self.num_cls_tokens :]
        return features, record, embeds

    def _items(self, embeds: Tensor, inputs: ModelInputs, span: TokenSpan) -> tuple[Tensor, Tensor]:
        """Return class tokens, prepended embeddings and tokens, `(b, leading + n, D)`, and the last two `(b, p + n, E)`
        as they were before dropout.
        """
        if inputs.sum_embeds is not None:
            embeds = embeds + _of_new_tokens(inputs.sum_embeds, embeds, span)
        if self.post_emb_norm is not None:
            embeds = self.post_emb_norm(embeds)
        if inputs.prepend_embeds is not None and span.starts:
            embeds = torch.cat((self._check_prepended(inputs.prepend_embeds, embeds.shape[0]), embeds), dim=1)
        if self.emb_frac_gradient != 1:
            embeds = frac_gradient(embeds, self.emb_frac_gradient)
        items = embeds
        if self.emb_dropout and not self.drops_memory_tokens:
            items = self._dropped(items)
        if self.project_emb is not None:
            items = self.project_emb(items)
        if self.cls_token is not None:
            classes = self.cls_token.to(items.dtype).expand(items.shape[0], -1, -1)
            items = torch.cat((classes, items), dim=1)
        return items, embeds

    def _dropped(self, x: Tensor) -> Tensor:
        """Apply the embedding dropout."""
        return F.dropout(x, self.emb_dropout, self.training)

    def _check_prepended(self, embeds: Tensor, batch: int | str) -> Tensor:
        if embeds.ndim != 3 or embeds.shape[0] != batch or embeds.shape[2] != self.emb_dim:
            raise ShapeError(
                f"`prepend_embeds` has shape {tuple(embeds.shape)}; it must be ({batch}, p, {self.emb_dim})."
            )
        return embeds


def _of_new_tokens(more: Tensor | float, embeds: Tensor, span: TokenSpan) -> Tensor | float:
    """Return what is added to the embeddings `(b, n, E)` of the new tokens.

    Raises:
        ShapeError: if it does not broadcast to them.
    """
    if not isinstance(more, Tensor):
        return float(more)
    if not same_for_all_tokens(more):
        more = span.newest(more, -2)
    sizes = zip(more.shape[::-1], embeds.shape[::-1][: more.ndim], strict=True)
    if more.ndim > embeds.ndim or more.is_complex() or any(size not in (1, whole) for size, whole in sizes):
        raise ShapeError(
            f"`sum_embeds` has shape {tuple(more.shape)} and dtype {more.dtype}; it must broadcast to "
            f"{tuple(embeds.shape)}."
        )
    return more


def _why_no_positions(max_seq_len: int, use_abs_pos_emb: bool, layers: AttentionLayers) -> str | None:
    """Return why a model has no absolute positions, or None if it has."""
    if max_seq_len <= 0:
        return "without `max_seq_len` there are no absolute positions"
    if not use_abs_pos_emb:
        return "`use_abs_pos_emb` is False, which turns all absolute positions off"
    if layers.disable_abs_pos_emb:
        return "the stack has `disable_abs_pos_emb`, the default with rotary positions and the T5 bias"
    return None
