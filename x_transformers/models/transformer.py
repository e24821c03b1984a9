"""A stack between token embeddings and logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.attention import check_mask
from x_transformers.cache import KVCache, StaticCache
from x_transformers.call import Capture
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.intermediates import LayerIntermediates
from x_transformers.layers.explain import Explanation, count
from x_transformers.layers.layers import AttentionLayers
from x_transformers.layers.spans import check_start
from x_transformers.loading import ReadsReference
from x_transformers.models.embeddings import (
    AbsolutePositionalEmbedding,
    ScaledSinusoidalEmbedding,
    TokenEmbedding,
    check_ids,
    frac_gradient,
)
from x_transformers.models.frame import Frame, Layout, interspersed
from x_transformers.models.heads import LinearNoBias, TiedLogits
from x_transformers.norms import LayerNorm
from x_transformers.ops import pad_left
from x_transformers.options.configured import Configured


class TransformerWrapper(Configured, ReadsReference):
    """Token ids to logits, through a stack.

    Args:
        num_tokens: vocabulary.
        max_seq_len: length of the absolute position table; 0 means none and no limit.
        attn_layers: the stack.
        embed_num_tokens: further id embeddings, name -> vocabulary (`embed_ids` of a pass).
        emb_dim: width of the embeddings; default the stack's, else a linear map leads there.
        max_mem_len: positions of recurrent memory to keep (1901.02860).
        shift_mem_down: layer i reads the memory of layer i + shift (2012.15688).
        emb_dropout: dropout of the embedded sequence.
        post_emb_norm: LayerNorm behind the embeddings.
        num_memory_tokens: learned tokens in front (2006.11527).
        memory_tokens_interspersed_every: put them in front of every group of that many positions; causal stacks.
        tie_embedding: logits from the token table. tie_embedding_scale: their factor; default `dim ** -0.5`.
        logits_dim: width of the logits; default `num_tokens`.
        return_only_embed: no head; a pass returns features.
        use_abs_pos_emb: absolute positions, unless the stack has rotary positions or T5's bias.
        scaled_sinu_pos_emb: sinusoids with a learned scale in place of the table.
        l2norm_embed: embeddings of unit length with a tiny initialisation.
        emb_frac_gradient: fraction of the gradient that reaches the embeddings (2105.13290).
        attn_z_loss_weight: default of the argument of a pass.
        squeeze_out_last_dim: drop the logits' last axis if it has size 1.
        token_emb: this module in place of a new `TokenEmbedding`; its weights are left alone.
        to_logits: this module in place of a new head.
        input_not_include_cache: default of the argument of a pass.
        ff_deep_embed: each token has a learned factor per channel on the output of each of the first `depth`
            feedforwards that run (of all, if fewer run).

    Raises:
        ConfigError: with the keyword, its value and what to change.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        embed_num_tokens: Mapping[str, int] | None = None,
        emb_dim: int | None = None,
        max_mem_len: int = 0,
        shift_mem_down: int = 0,
        emb_dropout: float = 0.0,
        post_emb_norm: bool = False,
        num_memory_tokens: int | None = None,
        memory_tokens_interspersed_every: int | None = None,
        tie_embedding: bool = False,
        tie_embedding_scale: float | None = None,
        logits_dim: int | None = None,
        return_only_embed: bool = False,
        use_abs_pos_emb: bool = True,
        scaled_sinu_pos_emb: bool = False,
        l2norm_embed: bool = False,
        emb_frac_gradient: float = 1.0,
        attn_z_loss_weight: float = 1e-4,
        squeeze_out_last_dim: bool = False,
        token_emb: nn.Module | None = None,
        to_logits: nn.Module | None = None,
        input_not_include_cache: bool = False,
        ff_deep_embed: bool = False,
    ) -> None:
        super().__init__()
        _check_options(locals())
        dim = attn_layers.dim
        self.num_tokens, self.max_seq_len = num_tokens, max_seq_len
        self.emb_dim = emb_dim = dim if emb_dim is None else emb_dim
        self.max_mem_len, self.shift_mem_down = max_mem_len, shift_mem_down
        self.emb_dropout, self.emb_frac_gradient = emb_dropout, emb_frac_gradient
        self.l2norm_embed, self.squeeze_out_last_dim = l2norm_embed, squeeze_out_last_dim
        self.attn_z_loss_weight = attn_z_loss_weight
        self.input_not_include_cache = input_not_include_cache
        self.num_memory_tokens = num_memory_tokens or 0
        self.layout = Layout(self.num_memory_tokens, memory_tokens_interspersed_every)

        self.token_emb = token_emb if token_emb is not None else TokenEmbedding(emb_dim, num_tokens, l2norm_embed)
        self.pos_emb: AbsolutePositionalEmbedding | ScaledSinusoidalEmbedding | None = None
        if max_seq_len > 0 and use_abs_pos_emb and not attn_layers.disable_abs_pos_emb:
            if scaled_sinu_pos_emb:
                self.pos_emb = ScaledSinusoidalEmbedding(emb_dim)
            else:
                self.pos_emb = AbsolutePositionalEmbedding(emb_dim, max_seq_len, l2norm_embed)
        self.embeds = nn.ModuleDict(
            {f"{name}_embed": nn.Embedding(size, emb_dim) for name, size in (embed_num_tokens or {}).items()}
        )
        self.post_emb_norm = LayerNorm(emb_dim) if post_emb_norm else None
        self.project_emb = nn.Linear(emb_dim, dim) if emb_dim != dim else None
        self.attn_layers = attn_layers
        if token_emb is None:
            self.init_()
        self.to_logits: nn.Module | None = None
        if not return_only_embed:
            if tie_embedding:
                assert isinstance(self.token_emb, TokenEmbedding)
                scale = dim**-0.5 if tie_embedding_scale is None else tie_embedding_scale
                self.to_logits = TiedLogits(self.token_emb, scale)
            else:
                width = num_tokens if logits_dim is None else logits_dim
                self.to_logits = to_logits if to_logits is not None else LinearNoBias(dim, width)
        self.memory_tokens = nn.Parameter(torch.randn(self.num_memory_tokens, dim)) if num_memory_tokens else None
        deep = min(attn_layers.depth, _feedforwards(attn_layers))
        self.ff_deep_embed = nn.Parameter(torch.ones(num_tokens, deep, dim)) if ff_deep_embed else None

    def init_(self) -> None:
        """Draw the token embeddings anew (and positions, where rows are normalised)."""
        if isinstance(self.token_emb, TokenEmbedding):
            self.token_emb.init_()
        if self.l2norm_embed and isinstance(self.pos_emb, AbsolutePositionalEmbedding):
            nn.init.normal_(self.pos_emb.emb.weight, std=1e-5)

    # what other code reads

    add_continuous_pred_head = False
    looped = False
    recycling = False
    output_is_log_prob = False
    has_multiple_heads = False
    num_cls_tokens = 0

    @property
    def can_cache_kv(self) -> bool:
        """Whether decoding may keep keys and values."""
        return self.attn_layers.can_cache_kv

    @property
    def can_cache_kv_outside_max_seq_len(self) -> bool:
        """Whether positions go on beyond `max_seq_len` while a cache is in use."""
        return not isinstance(self.pos_emb, AbsolutePositionalEmbedding)

    def muon_parameters(self) -> Iterator[Tensor]:
        """What Muon may orthogonalise; see `AttentionLayers.muon_parameters`."""
        yield from self.attn_layers.muon_parameters()

    def attn_qk_clip_(self, intermediates: LayerIntermediates, tau: float = 100.0) -> None:
        """Bound attention's logits by shrinking weights in place; see `AttentionLayers.attn_qk_clip_`."""
        self.attn_layers.attn_qk_clip_(intermediates, tau)

    def explain(
        self,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        training: bool | None = None,
        seq_len: int | None = None,
    ) -> Explanation:
        """For each layer: features, backend and why, parameters, FLOPs; see `AttentionLayers.explain`."""
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
    ) -> StaticCache:
        """A cache of fixed buffers for rows of `max_len` tokens behind `prepended` embeddings."""
        return self.attn_layers.static_cache(batch, self.layout.slots(prepended + max_len), device, dtype)

    # one pass

    def forward(
        self,
        x: Tensor | None,
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        return_intermediates: bool = False,
        return_embeddings_and_intermediates: bool = False,
        return_logit_entropies: bool = False,
        mask: Tensor | None = None,
        return_mems: bool = False,
        return_attn: bool = False,
        mems: Sequence[Tensor | None] | None = None,
        mem_masks: Sequence[Tensor | None] | None = None,
        detach_mems: bool = True,
        pos: Tensor | None = None,
        prepend_embeds: Tensor | None = None,
        prepend_mask: Tensor | None = None,
        excise_prepend_embeds: bool = False,
        embed_ids: Mapping[str, Tensor] | None = None,
        sum_embeds: Tensor | None = None,
        transform_token_embeds: Callable[[Tensor], Tensor] | None = None,
        return_attn_z_loss: bool = False,
        attn_z_loss_weight: float | None = None,
        seq_start_pos: Tensor | None = None,
        cache: LayerIntermediates | KVCache | None = None,
        input_not_include_cache: bool | None = None,
        cache_age: int | None = None,
        attn_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        self_attn_kv_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `(b, n)` token ids; None stands for no tokens behind `prepend_embeds`. With a cache: the whole
                sequence, of which the tokens that are not cached run, or the new ones (`input_not_include_cache`).
            return_embeddings: features `(b, n, D)` in place of logits.
            return_logits_and_embeddings: both.
            return_intermediates: also the `LayerIntermediates`, which a later call takes as `cache`.
            return_embeddings_and_intermediates: features and intermediates.
            return_logit_entropies: fill `logit_entropies` of the intermediates, and return them.
            mask: `(b, n)` bool, valid tokens; with a cache it covers cached and new ones.
            return_mems, mems, mem_masks, detach_mems: recurrent memory, a `(b, m, D)` tensor for each self-attention.
            return_attn: also the attention weights, `(b, h, i, j)` for each attention.
            pos: `(n,)` or `(b, n)` integer positions, or a floating tensor added in place of position embeddings.
            prepend_embeds, prepend_mask: `(b, p, E)` embeddings before the tokens, and their `(b, p)` mask.
            excise_prepend_embeds: cut their positions off logits and features.
            embed_ids: name -> `(b, n)` ids of the further embeddings.
            sum_embeds: `(b, n, E)`, added to the token embeddings.
            transform_token_embeds: applied to the token embeddings before positions are added.
            return_attn_z_loss, attn_z_loss_weight: fill `attn_z_loss` of the intermediates, and return them.
            seq_start_pos: `(b,)` tokens of left padding of each row.
            cache, input_not_include_cache, cache_age: cached decoding.
            attn_mask, attn_bias, self_attn_kv_mask: of the stack, over tokens; slots around them are always seen.
            kwargs: of the stack: `context`, `context_mask`, `causal`, `condition`, `transform_block_inputs` and others.
                Those over tokens do not speak of memory tokens and prepended embeddings, which get zeros. What
                `transform_block_inputs` holds for block 1 is applied to the token embeddings, unless
                `transform_token_embeds` is given.

        Raises:
            InputError: with what was given and what is needed.
        """
        if return_embeddings_and_intermediates:
            return_embeddings = return_intermediates = True
        if (return_logits_and_embeddings or return_logit_entropies) and self.to_logits is None:
            raise InputError("this model has no head (`return_only_embed`); logits and entropies cannot be returned.")
        if prepend_embeds is None and x is None:
            raise InputError("there is nothing to run: pass token ids, or `prepend_embeds`.")
        kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
        if cache is not None:
            self._check_cache(kv, cache)
        only_new = self.input_not_include_cache if input_not_include_cache is None else input_not_include_cache
        if prepend_embeds is not None and kv is not None and kv.started:
            prepend_embeds = prepend_mask = None  # part of the cache already
        x = self._ids(x, prepend_embeds)
        tokens = _Tokens.of(x, kv, prepend_embeds, only_new, cache_age, self.layout)
        per_token = {"mask": mask, "self_attn_kv_mask": self_attn_kv_mask}
        if seq_start_pos is not None:
            check_start(seq_start_pos, x.shape[0])

        if transform_token_embeds is None:
            transform_token_embeds = _first_block(kwargs.get("transform_block_inputs"))
        embeds, stack_pos = self._embed(tokens, pos, seq_start_pos, embed_ids, sum_embeds, transform_token_embeds)
        if prepend_embeds is not None:
            embeds = torch.cat((self._check_prepended(prepend_embeds, x.shape[0]), embeds), dim=1)
        embeds = initial_embeds = frac_gradient(embeds, self.emb_frac_gradient)
        if self.emb_dropout:
            embeds = F.dropout(embeds, self.emb_dropout, self.training)
        if self.project_emb is not None:
            embeds = self.project_emb(embeds)
        framing = self._frame(embeds, tokens, seq_start_pos, prepend_mask)

        return_intermediates = return_intermediates or bool(kwargs.get("return_gumbel_log_probs"))
        want_record = return_intermediates or return_attn or return_attn_z_loss or return_logit_entropies
        want_scores = return_attn or return_attn_z_loss
        if want_scores and not self.attn_layers._may_show_scores():
            raise InputError("attention scores are asked for, but `attn_flash = True` keeps none; leave it at None.")
        capture = Capture(
            scores=want_scores or (return_intermediates and kv is None and self.attn_layers._may_show_scores()),
            hiddens=return_intermediates,
            memories=return_mems,
        )
        keep = want_record or return_mems or kv is not None
        if self.shift_mem_down and mems is not None:
            mems = self._moved_down(mems, kwargs)
        stack_args = framing.stack_arguments(per_token, attn_mask, attn_bias, seq_start_pos, stack_pos)
        if self.ff_deep_embed is not None and kwargs.get("deep_embeds_and_ids") is None:
            kwargs["deep_embeds_and_ids"] = (self.ff_deep_embed, tokens.ids)
        kwargs = framing.over_columns(kwargs)
        out = self.attn_layers(
            framing.x,
            mems=mems,
            mem_masks=mem_masks,
            cache=kv,
            input_not_include_cache=True,
            return_hiddens=keep,
            capture=capture,
            **stack_args,
            **kwargs,
        )
        record: LayerIntermediates | None = None
        if keep:
            out, record = out
            assert record is not None
            record.initial_embeds = initial_embeds
            framing.remember(record, out)
        features = framing.unframe(out)
        if record is not None:
            record.last_layer_hiddens = features
        cut = tokens.prepended if excise_prepend_embeds and kv is None else 0
        features = features[:, cut:] if cut else features

        logits = None
        wants_logits = not return_embeddings or return_logits_and_embeddings or return_logit_entropies
        if self.to_logits is not None and wants_logits:
            logits = self.to_logits(features)
            if self.squeeze_out_last_dim and logits.shape[-1] == 1:
                logits = logits.squeeze(-1)
        if logits is None or (return_embeddings and not return_logits_and_embeddings):
            result: Any = features
        else:
            result = (logits, features) if return_logits_and_embeddings else logits

        if return_mems:
            assert record is not None
            record.mems = self._new_memories(record, mems, detach_mems)
        if record is not None:
            self._auxiliary(record, logits, return_logit_entropies, return_attn_z_loss, attn_z_loss_weight)
        return _results(
            result,
            record,
            mems=return_mems,
            intermediates=return_intermediates or return_attn_z_loss or return_logit_entropies,
            attn=return_attn,
        )

    def _ids(self, x: Tensor | None, prepend_embeds: Tensor | None) -> Tensor:
        if x is None:
            assert prepend_embeds is not None
            return torch.zeros(prepend_embeds.shape[0], 0, dtype=torch.long, device=prepend_embeds.device)
        check_ids(x)
        return x

    def _check_cache(self, kv: KVCache | None, cache: Any) -> None:
        if not self.can_cache_kv:
            raise InputError("only a causal model can use a cache; build a Decoder, or pass no `cache`.")
        if kv is None:
            raise InputError("the intermediates given as `cache` hold none; ask for them with `return_intermediates`.")
        if kv.is_static and self.layout.every is not None and torch.compiler.is_compiling():
            raise InputError(
                "interspersed memory tokens make steps of different lengths; compiled decoding needs memory tokens in "
                "front alone."
            )

    def _check_prepended(self, embeds: Tensor, batch: int) -> Tensor:
        if embeds.ndim != 3 or embeds.shape[0] != batch or embeds.shape[2] != self.emb_dim:
            raise ShapeError(
                f"`prepend_embeds` has shape {tuple(embeds.shape)}; it must be ({batch}, p, {self.emb_dim})."
            )
        return embeds

    def _embed(
        self,
        tokens: _Tokens,
        pos: Tensor | None,
        seq_start_pos: Tensor | None,
        embed_ids: Mapping[str, Tensor] | None,
        sum_embeds: Tensor | None,
        transform: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings `(b, n, E)` of the new tokens, and the integer positions for the stack, if there are any."""
        ids = tokens.ids
        embeds = self.token_emb(ids)
        if transform is not None:
            embeds = transform(embeds)
        stack_pos = None
        if pos is not None and pos.is_floating_point():
            embeds = embeds + tokens.newest(pos, -2)
        else:
            stack_pos = None if pos is None else tokens.newest(pos.long(), -1)
            if self.pos_emb is not None:
                start = seq_start_pos if stack_pos is None else None
                embeds = embeds + self.pos_emb(ids, stack_pos, start, tokens.first).to(embeds.dtype)
        declared = {name.removesuffix("_embed") for name in self.embeds}
        given = dict(embed_ids or {})
        if set(given) != declared:
            raise InputError(f"`embed_ids` names {sorted(given)}; this model embeds {sorted(declared)}.")
        for name, more in given.items():
            embeds = embeds + self.embeds[f"{name}_embed"](tokens.newest(more, -1))
        if sum_embeds is not None:
            embeds = embeds + tokens.newest(sum_embeds, -2)
        if self.post_emb_norm is not None:
            embeds = self.post_emb_norm(embeds)
        return embeds, stack_pos

    def _frame(self, x: Tensor, tokens: _Tokens, seq_start_pos: Tensor | None, prepend_mask: Tensor | None) -> _Framing:
        frame = None
        plain = 0
        if self.layout.every is not None and self.memory_tokens is not None:
            old = 0 if tokens.kv is None else tokens.kv.tokens
            prepended = tokens.prepended if tokens.kv is None or not old else tokens.kv.prepended
            frame = interspersed(self.layout, old + x.shape[1], old, prepended, seq_start_pos, x.device)
            x = frame.fill(x, self.memory_tokens)
        elif self.memory_tokens is not None and tokens.starts:
            plain = self.num_memory_tokens
            x = torch.cat((self.memory_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        return _Framing(x, tokens, self.layout, frame, plain, prepend_mask)

    def _moved_down(self, mems: Sequence[Tensor | None], arguments: Mapping[str, Any]) -> list[Tensor | None]:
        """Memories of attention as their layers read them: from `shift_mem_down` layers above. States stay."""
        stack = self.attn_layers
        order = stack.order_of(arguments.get("layers_execute_order"), arguments.get("repeat_blocks"))
        attentions = sum(stack.layer_types[index] == "a" for index in order)
        own, states = list(mems)[:attentions], list(mems)[attentions:]
        shift = self.shift_mem_down % max(len(own), 1)
        return [*own[shift:], *own[:shift], *states]

    def _new_memories(
        self, record: LayerIntermediates, mems: Sequence[Tensor | None] | None, detach: bool
    ) -> list[Tensor]:
        inputs = record.memory_inputs or []
        old = list(mems or [])[: len(inputs)]
        old += [None] * (len(inputs) - len(old))
        new = []
        for past, hidden in zip(old, inputs, strict=False):
            whole = hidden if past is None else torch.cat((past, hidden), dim=-2)
            kept = whole[..., max(whole.shape[-2] - self.max_mem_len, 0) :, :]
            new.append(kept)
        new += record.memory_states or []
        return [kept.detach() if detach else kept for kept in new]

    def _auxiliary(
        self, record: LayerIntermediates, logits: Any, entropies: bool, z_loss: bool, weight: float | None
    ) -> None:
        if entropies:
            log_probs = logits.log_softmax(dim=-1)
            record.logit_entropies = -(log_probs.exp() * log_probs).sum(dim=-1)
        if z_loss:
            scores = [r.pre_softmax_attn for r in record.attn_intermediates or [] if r.pre_softmax_attn is not None]
            weight = self.attn_z_loss_weight if weight is None else weight
            total = torch.stack([s.logsumexp(dim=-1) for s in scores]).sum(dim=0)
            record.attn_z_loss = total.square().sum(dim=1).mean() * weight


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The new tokens of a pass, and how many came before.

    Attributes:
        ids: `(b, n)` new ids.
        first: index of the first new token in its row; a device scalar for a static cache.
        prepended: embeddings that this pass puts before them.
        kv: the cache, or None.
    """

    ids: Tensor
    first: int | Tensor
    prepended: int
    kv: KVCache | None

    @classmethod
    def of(
        cls,
        x: Tensor,
        kv: KVCache | None,
        prepend_embeds: Tensor | None,
        only_new: bool,
        age: int | None,
        layout: Layout,
    ) -> _Tokens:
        prepended = 0 if prepend_embeds is None else prepend_embeds.shape[1]
        if kv is None:
            return cls(x, 0, prepended, None)
        n = x.shape[1]
        held = kv.tokens - kv.prepended
        first: int | Tensor = held
        if kv.is_static:
            if not only_new:
                raise InputError("a static cache takes new tokens alone; pass `input_not_include_cache = True`.")
            if layout.every is None and kv.started:
                # counted on the device: slots and tokens grow alike, and a compiled step sees no number change
                first = kv.filled - kv.prefix  # type: ignore[attr-defined]
        new = n if only_new else n - held
        age = new if age is None else age
        if not 0 <= age <= max(new, 0) or (age == 0 and not prepended):
            raise InputError(
                f"{age} tokens are to run (`cache_age`), but x has {n} tokens and the cache holds {held}; run between "
                "1 and the number of tokens that are not cached. Pass the whole sequence, or the new tokens with "
                "`input_not_include_cache = True`."
            )
        return cls(x[:, n - age :], first + (new - age) if new > age else first, prepended, kv)

    @property
    def starts(self) -> bool:
        """Nothing is cached before these tokens."""
        return self.kv is None or not self.kv.started

    def newest(self, t: Tensor, dim: int) -> Tensor:
        """The part of a per-token tensor that speaks of the new tokens."""
        n, given = self.ids.shape[1], t.shape[dim]
        if given < n:
            raise ShapeError(f"a tensor over {given} tokens was given for {n} new tokens; it must cover them.")
        return t.narrow(dim, given - n, n)


@dataclass(frozen=True, eq=False)
class _Framing:
    """The internal sequence of a pass, and how arguments over tokens become arguments over its columns."""

    x: Tensor
    tokens: _Tokens
    layout: Layout
    frame: Frame | None
    memory: int
    prepend_mask: Tensor | None

    @property
    def before(self) -> int:
        """Prefix slots in front of the tokens, cached or new, where memory is not interspersed."""
        kv = self.tokens.kv
        return self.memory + self.tokens.prepended if self.tokens.starts or kv is None else kv.prefix

    @property
    def _prepended(self) -> int:
        """Prepended embeddings of this pass or of the first one."""
        kv = self.tokens.kv
        return self.tokens.prepended if self.tokens.starts or kv is None else kv.prepended

    def unframe(self, t: Tensor) -> Tensor:
        """Cut memory off `(b, internal, D)`."""
        if self.frame is not None:
            return self.frame.keep(t)
        return t[:, self.memory :] if self.memory else t

    def remember(self, record: LayerIntermediates, out: Tensor) -> None:
        """Fill in the memory tokens' outputs, and what a later cached pass must know."""
        if self.frame is not None:
            record.memory_tokens = self.frame.keep_memory(out, self.layout.memory)
        elif self.memory:
            record.memory_tokens = out[:, : self.memory]
        kv = record.cache
        if kv is None:
            return
        old = self.tokens.kv
        if self.tokens.starts:
            kv.prepended = self.tokens.prepended
            kv.prefix = self.layout.slots(self.tokens.prepended) if self.frame is not None else self.before
            kv.prefix_mask = self._prefix_mask()
        if not kv.is_static or self.frame is not None:
            new = self.tokens.ids.shape[1] + self.tokens.prepended
            kv.tokens = (0 if old is None else old.tokens) + new

    def _prefix_mask(self) -> Tensor | None:
        """`(b, prefix)` validity of the prefix that this pass begins with."""
        if self.prepend_mask is None:
            return None
        mask = check_mask(self.prepend_mask, self.x.shape[0], self.tokens.prepended, "prepend_mask")
        return pad_left(mask, 0 if self.frame is not None else self.memory, True)

    def stack_arguments(
        self,
        per_token: Mapping[str, Tensor | None],
        attn_mask: Tensor | None,
        attn_bias: Tensor | None,
        seq_start_pos: Tensor | None,
        pos: Tensor | None,
    ) -> dict[str, Any]:
        """Arguments over tokens, carried over to internal columns."""
        arguments: dict[str, Any] = {}
        kv = self.tokens.kv
        prefix_mask = self._prefix_mask() if self.tokens.starts or kv is None else kv.prefix_mask
        for name, mask in per_token.items():
            arguments[name] = None if mask is None else self._columns(mask.bool(), True, name, prefix_mask)
        if prefix_mask is not None and all(mask is None for mask in per_token.values()):
            name = "mask" if kv is None else "self_attn_kv_mask"
            known = torch.ones(self.x.shape[0], self._token_count(), dtype=torch.bool, device=self.x.device)
            arguments[name] = self._columns(known, True, name, prefix_mask)
        arguments["attn_mask"] = self._pairs(attn_mask, True)
        arguments["attn_bias"] = self._pairs(attn_bias, 0.0)
        arguments["pos"] = self._positions(pos)
        before = self.before
        if self.frame is not None:
            arguments["places"] = self.frame.places
        elif seq_start_pos is None or before == 0:
            arguments["seq_start_pos"] = seq_start_pos
        else:
            # padding stands behind the prefix, which stays visible
            count = before + self._token_count()
            token = torch.arange(count, device=self.x.device) - before
            arguments["places"] = (token < 0) | (token >= seq_start_pos.unsqueeze(-1))
        return arguments

    def over_columns(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Features and ids over tokens, for the columns of this pass; others than tokens get zeros, and the id -1."""
        moved = dict(arguments)
        for name in ("condition", "in_attn_cond"):
            t = moved.get(name)
            if t is not None and t.ndim == 3 and t.shape[1] > 1:
                moved[name] = self._spread_features(t, 0.0)
        residual = moved.get("self_attn_kv_residuals")
        if residual is not None:
            each = [self._spread_features(t, 0.0) for t in (residual if residual.ndim == 4 else residual[None])]
            moved["self_attn_kv_residuals"] = torch.stack(each) if residual.ndim == 4 else each[0]
        deep = moved.get("deep_embeds_and_ids")
        if deep is not None:
            table, ids = deep
            moved["deep_embeds_and_ids"] = table, self._spread_features(ids.unsqueeze(-1), -1).squeeze(-1)
        return moved

    def _spread_features(self, t: Tensor, value: float) -> Tensor:
        """`(b, tokens, w)` to `(b, columns, w)`."""
        t = F.pad(self.tokens.newest(t, 1), (0, 0, self.tokens.prepended, 0), value=value)
        if self.frame is None:
            return F.pad(t, (0, 0, self.memory, 0), value=value)
        return self.frame.fill(t, t.new_full((self.layout.memory, t.shape[-1]), value))

    def _token_count(self) -> int:
        """Tokens so far, or as many as a static cache has room for."""
        kv = self.tokens.kv
        if kv is None or (kv.is_static and self.tokens.starts):
            return self.tokens.ids.shape[1]
        if kv.is_static:
            return kv.capacity - self.before  # type: ignore[attr-defined]
        return kv.tokens - kv.prepended + self.tokens.ids.shape[1]

    def _columns(self, t: Tensor, value: bool, name: str, prefix: Tensor | None) -> Tensor:
        kv = self.tokens.kv
        batch, count = self.x.shape[0], self._token_count()
        if kv is None or not kv.is_static:
            t = check_mask(t, batch, count, name)
        else:
            t = t.expand(batch, -1)
        width = self._prepended if self.frame is not None else self.before
        front = t.new_full((batch, width), value) if prefix is None else prefix
        t = torch.cat((front, t), dim=-1)
        return t if self.frame is None else self.frame.spread(t, value)

    def _pairs(self, t: Tensor | None, value: float | bool) -> Tensor | None:
        """A tensor over new tokens (or one row for all of them) and tokens so far."""
        if t is None:
            return None
        internal, new = self.x.shape[1], self.tokens.ids.shape[1]
        if t.shape[-1] == internal and t.shape[-2] in (1, internal) and internal != new:
            return t
        in_front, in_this_pass = self.before, self.memory + self.tokens.prepended
        if self.frame is not None:
            in_front, in_this_pass = self._prepended, self.tokens.prepended
        one_row = t.shape[-2] == 1
        t = F.pad(t, (in_front, 0, 0 if one_row else in_this_pass, 0), value=value)
        if self.frame is None:
            return t
        t = self.frame.spread(t, value)
        return t if one_row else self.frame.spread_new(t, value)

    def _positions(self, pos: Tensor | None) -> Tensor | None:
        """Internal positions: the prefix counts from 0, tokens stand behind it."""
        if pos is None:
            return None
        pos = pos if pos.ndim == 2 else pos.unsqueeze(0)
        if self.frame is None:
            width = self.memory + self.tokens.prepended
            front = torch.arange(width, device=pos.device).expand(pos.shape[0], -1)
            return torch.cat((front, pos + self.before), dim=-1)
        item = pos + self._prepended
        if self.tokens.prepended:
            front = torch.arange(self.tokens.prepended, device=pos.device).expand(pos.shape[0], -1)
            item = torch.cat((front, item), dim=-1)
        columns = self.frame.columns[-self.frame.new :]
        owner = torch.where(columns < 0, -1 - columns, columns)
        owner = owner - owner.min()
        slots = self.layout.slot_of(item)[:, owner]
        which = self.frame.memory[-self.frame.new :]
        return torch.where(columns < 0, slots - self.layout.memory + which, slots)


def _first_block(given: Any) -> Any:
    """The function by which `transform_block_inputs` changes the embeddings, at the entry of block 1, or None."""
    if given is None:
        return None
    return functools.partial(given, 1) if callable(given) else given.get(1)


def _results(out: Any, record: LayerIntermediates | None, *, mems: bool, intermediates: bool, attn: bool) -> Any:
    """The result with what was asked for beside it; intermediates carry the memories too."""
    if intermediates:
        return out, record
    if mems:
        assert record is not None
        return out, record.mems
    if attn:
        assert record is not None
        return out, [r.post_softmax_attn for r in record.attn_intermediates or []]
    return out


def _check_options(given: dict[str, Any]) -> None:
    """Raise a `ConfigError` unless the wrapper's own options agree."""
    layers = given["attn_layers"]
    if not isinstance(layers, AttentionLayers):
        raise ConfigError(f"`attn_layers` is a {type(layers).__name__}; it must be a stack: an Encoder, a Decoder.")
    for name, least in (("num_tokens", 1), ("max_seq_len", 0), ("max_mem_len", 0), ("shift_mem_down", 0)):
        if not isinstance(given[name], int) or given[name] < least:
            raise ConfigError(f"`{name}` is {given[name]!r}; it must be a whole number, at least {least}.")
    if not 0 <= given["emb_dropout"] < 1:
        raise ConfigError(f"`emb_dropout` is {given['emb_dropout']}; it must lie in [0, 1).")
    if not 0 < given["emb_frac_gradient"] <= 1:
        raise ConfigError(f"`emb_frac_gradient` is {given['emb_frac_gradient']}; it must lie in (0, 1].")
    every = given["memory_tokens_interspersed_every"]
    if every is not None:
        if every < 1 or not given["num_memory_tokens"]:
            raise ConfigError(
                f"`memory_tokens_interspersed_every` is {every}; it must be at least 1 and needs `num_memory_tokens`."
            )
        if not layers.causal:
            raise ConfigError("`memory_tokens_interspersed_every` needs a causal stack; use a Decoder, or drop it.")
    if given["ff_deep_embed"] and not _feedforwards(layers):
        raise ConfigError("`ff_deep_embed` scales what feedforwards give, but the stack runs none; drop it.")
    if given["tie_embedding"]:
        for name in ("logits_dim", "to_logits"):
            if given[name] is not None and given[name] != given["num_tokens"]:
                raise ConfigError(f"`tie_embedding` takes its logits from the token table; drop `{name}`, or untie.")
        if given["emb_dim"] not in (None, layers.dim):
            raise ConfigError(
                f"`tie_embedding` needs embeddings of the stack's width {layers.dim}; `emb_dim` is {given['emb_dim']}."
            )
        if given["token_emb"] is not None and not isinstance(given["token_emb"], TokenEmbedding):
            raise ConfigError("`tie_embedding` needs a `TokenEmbedding`; untie, or pass one as `token_emb`.")


def _feedforwards(layers: AttentionLayers) -> int:
    """How many run in one pass."""
    return sum(layers.layer_types[index] == "f" for index in layers.sequence.order)
